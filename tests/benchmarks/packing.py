"""Print how much of packed training rows stays empty: the rows of the README that say so.

    python tests/benchmarks/packing.py        # less than a minute

The embedded prose with a tokenizer of 4,096 tokens, packed from the cache and as a stream, and made-up documents of
about 600 tokens whose lengths are log-normal: the narrower, the more are a bit longer than half a row.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from shared.data.batches import IGNORED
from shared.text import streaming, tokenization
from shared.text.documents import open_texts
from shared.text.packing import MAX_WASTE, pack, pack_corpus

STREAMED_ROWS = {256: 3000, 1024: 1500}  # a few windows of each
SPREADS = (0.1, 0.3, 0.5, 0.8, 1.3)


def main() -> None:
    """Measure and print, one line a figure."""
    texts = open_texts("prose", config="", split="", text_column="text")
    for seq_length, count in STREAMED_ROWS.items():
        with tempfile.TemporaryDirectory() as folder:
            options = {"seq_length": seq_length, "cache_dir": Path(folder)}
            tokenizer = tokenization.load_or_train("", [texts], vocab_size=4096, **options)
            rows, _ = pack_corpus(texts, tokenizer, eval_fraction=0.0, num_processes=2, **options)
            say(f"prose, rows of {seq_length}", 1 - rows.pieces[:, 1].sum() / (len(rows) * seq_length))
        start = {"seed": 0, "rank": 0, "state": streaming.start_of_stream(1)}
        stream = streaming.stream_rows([texts], tokenizer, seq_length=seq_length, eval_fraction=0.0, **start)
        empty = [np.mean(next(stream)[0]["labels"] == IGNORED) for _ in range(count)]
        say(f"prose, rows of {seq_length}, streamed", float(np.mean(empty)))
    for spread in SPREADS:
        draw = np.random.default_rng(0)
        lengths = np.maximum(2, draw.lognormal(np.log(600) - spread**2 / 2, spread, 20_000).astype(int))
        packed = list(pack(np.cumsum(lengths), 1024, MAX_WASTE))
        say(f"made up, rows of 1024, spread {spread}", 1 - (lengths - 1).sum() / (len(packed) * 1024))


def say(what: str, share: float) -> None:
    """Print one figure."""
    print(f"{what}: {share:.2%} empty", flush=True)  # noqa: T201 (the output of a command)


if __name__ == "__main__":
    main()
