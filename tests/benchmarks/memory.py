"""Measure that preparing text needs no more memory for ten times of it: tokenising and packing, or sentences and pairs.

    python tests/benchmarks/memory.py                     # 20 and 200 MB for GPT: a few minutes on two quiet cores
    python tests/benchmarks/memory.py --family bert       # the same for BERT: sentences, and the pairs of an epoch
    python tests/benchmarks/memory.py --megabytes 5       # 5 and 50 MB

Each corpus is made-up web pages of the embedded prose's words, among them many that come once. A fresh process reads
and prepares it (two processes tokenise), then reads the result. Counted is the largest sum, over that process and its
children, of anonymous memory: what programs allocate, without the pages of memory-mapped files that the system may drop
at any time, pages shared by several processes once.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

VOCAB_SIZE, SEQ_LENGTH, TOKENISING_PROCESSES = 2048, 1024, 2
SECONDS_BETWEEN_SAMPLES = 0.1


def main() -> None:
    """Print the two peaks, what of them was there before the corpus was opened, and the ratio of the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=20, help="size of the smaller corpus; the other has ten times")
    parser.add_argument("--family", default="gpt", choices=PREPARATIONS, help="whose preparation; default: gpt")
    parser.add_argument("--corpus", help="prepare this file (used by this program itself)")
    arguments = parser.parse_args()
    if arguments.corpus:
        PREPARATIONS[arguments.family](Path(arguments.corpus))
        return
    peaks = []
    for megabytes in (arguments.megabytes, 10 * arguments.megabytes):
        before, peak, seconds = measure(arguments.family, megabytes)
        peaks.append(peak)
        say(f"{megabytes} MB of text: peak {peak:.0f} MB ({before:.0f} MB after the imports), {seconds:.0f} s")
    say(f"ratio {peaks[1] / peaks[0]:.3f}")


def measure(family: str, megabytes: int) -> tuple[float, float, float]:
    """Anonymous memory in MB before the corpus is opened and at its peak, and the seconds between."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(corpus, megabytes)
        command = [sys.executable, __file__, "--family", family, "--corpus", str(corpus)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            assert child.stdout is not None
            child.stdout.readline()  # imports are done
            started, before = time.monotonic(), anonymous_megabytes(child.pid)
            peak = before
            while child.poll() is None:
                peak = max(peak, anonymous_megabytes(child.pid))
                time.sleep(SECONDS_BETWEEN_SAMPLES)
        if child.returncode:
            raise SystemExit(f"preparing {megabytes} MB failed with exit status {child.returncode}")
        return before, peak, time.monotonic() - started


def tokenise_and_pack(corpus: Path) -> None:
    """What is measured of GPT."""
    from shared.text.documents import open_texts
    from shared.text.packing import pack_corpus
    from shared.text.tokenization import load_tokenizer, train_byte_level_bpe

    cache_dir = corpus.parent / "cache"
    sample = open_texts("prose_eval", config="", split="", text_column="text")
    train_byte_level_bpe(sample, VOCAB_SIZE, SEQ_LENGTH).save_pretrained(cache_dir / "tokenizer")
    tokenizer = load_tokenizer(str(cache_dir / "tokenizer"))
    say("ready")
    texts = open_texts(str(corpus), config="", split="", text_column="")
    options = {"seq_length": SEQ_LENGTH, "eval_fraction": 0.01, "num_processes": TOKENISING_PROCESSES}
    rows = pack_corpus(texts, tokenizer, cache_dir=cache_dir, **options)[0]
    for row in range(len(rows)):
        rows.read(row)


def split_and_pair(corpus: Path) -> None:
    """What is measured of BERT."""
    from shared.text.documents import open_texts
    from shared.text.sentence_cache import split_corpus
    from shared.text.sentence_pairs import SentencePairs
    from shared.text.wordpiece import load_wordpiece, train_wordpiece

    cache_dir = corpus.parent / "cache"
    sample = open_texts("prose_eval", config="", split="", text_column="text")
    train_wordpiece(sample, VOCAB_SIZE, SEQ_LENGTH, lowercase=True).save_pretrained(cache_dir / "tokenizer")
    tokenizer = load_wordpiece(str(cache_dir / "tokenizer"))
    say("ready")
    texts = open_texts(str(corpus), config="", split="", text_column="")
    options = {"language": "en", "one_sentence_per_line": False, "eval_fraction": 0.01}
    train, _ = split_corpus(texts, tokenizer, cache_dir=cache_dir, num_processes=TOKENISING_PROCESSES, **options)
    pairs = SentencePairs(train, (2, 3, 0), 128, 0.1, 0)
    for pair in range(len(pairs.epoch(0))):
        pairs.read(0, pair)


PREPARATIONS = {"gpt": tokenise_and_pack, "bert": split_and_pair}


def write_corpus(path: Path, megabytes: int) -> None:
    """Pages of log-normal length, about 3,000 characters, of words of the prose and of words that come once."""
    from shared.text.documents import open_texts

    words = " ".join(open_texts("prose_eval", config="", split="", text_column="text")).split(" ")
    draw = random.Random(0)
    size = 0
    with path.open("w") as file:
        while size < megabytes * 1_000_000:
            start, length = draw.randrange(len(words)), int(draw.lognormvariate(6, 0.8)) + 1
            page = words[start : start + length]
            page[:: 1 + length // 10] = [f"{draw.getrandbits(40):x}" for _ in page[:: 1 + length // 10]]
            size += file.write(json.dumps({"text": " ".join(page)}) + "\n")


def anonymous_megabytes(process: int) -> float:
    """Anonymous memory of a process and its descendants, shared pages in proportion."""
    return sum(proportional_anonymous_bytes(member) for member in descendants(process)) / 1e6


def descendants(process: int) -> Iterable[int]:
    """The process and all that it or its children started."""
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            for child in children.read_text().split():
                yield from descendants(int(child))
        except OSError:  # it ended
            continue


def proportional_anonymous_bytes(process: int) -> int:
    """`Pss_Anon` of one process, 0 if it ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)  # noqa: T201 (the output of a command)


if __name__ == "__main__":
    main()
