"""Tokenised documents on disk: complete or absent, the same however they are made, split by content."""

import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from shared.command_line import UsageError
from shared.text import document_pool, token_cache
from shared.text.documents import open_texts
from shared.text.packing import pack_corpus
from shared.text.token_cache import SPLITS, build_token_cache, content_share, open_token_cache
from shared.text.tokenization import decode_bytes, encode, to_bytes
from shared.text.vocabulary import special_ids

ROOT = Path(__file__).parents[3]
DOCUMENTS = [f"Document {number} has {'many ' * (number % 40)}words.\n" for number in range(400)]


def build(
    folder: Path, documents: Iterable[str], tokenizer: Any, eval_fraction: float = 0.1, num_processes: int = 1
) -> Path:
    parts = folder.with_name(f"parts-{folder.name}")
    build_token_cache(folder, parts, documents, tokenizer, eval_fraction=eval_fraction, num_processes=num_processes)
    return folder


def read(folder: Path, split: str, tokenizer: Any) -> list[bytes]:
    """The documents of a split, checked for their begin and end tokens."""
    cache = open_token_cache(folder, split)
    stretches = [stretch.tolist() for stretch in np.split(cache.tokens, cache.ends)[:-1]] if len(cache.ends) else []
    begin, end = special_ids(tokenizer)
    assert all(stretch[0] == begin and stretch[-1] == end for stretch in stretches)
    return [decode_bytes(tokenizer.backend_tokenizer, stretch[1:-1]) for stretch in stretches]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_document_is_there_with_its_tokens_and_bytes(tokenizer: Any, tmp_path: Path) -> None:
    documents = [*DOCUMENTS[:50], "é" * 500, "bytes \udcff\x00", "<|endoftext|>", "\ud83d", "", "a\n" * 100_000]
    folder = build(tmp_path / "cache", documents, tokenizer, eval_fraction=0.0)
    expected = [to_bytes(document) for document in documents if document]
    assert read(folder, "train", tokenizer) == expected
    cache = open_token_cache(folder, "train")
    assert cache.num_bytes == sum(map(len, expected))
    assert cache.tokens.dtype == np.uint16
    assert cache.ends[0] == len(encode(tokenizer.backend_tokenizer, documents[0])) + 2
    assert len(open_token_cache(folder, "eval").tokens) == open_token_cache(folder, "eval").num_bytes == 0


def test_the_number_of_processes_changes_no_byte(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_pool, "_BATCH_CHARACTERS", 1000)  # many batches, so that processes can overtake
    alone, many = (build(tmp_path / str(n), DOCUMENTS, tokenizer, num_processes=n) for n in (1, 3))
    assert files(alone) == files(many)
    assert set(files(alone)) == {"summary.json"} | {f"{s}/{n}.bin" for s in SPLITS for n in ("tokens", "documents")}
    assert read(alone, "train", tokenizer) + read(alone, "eval", tokenizer) != []


def test_few_documents_are_read_ahead(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_pool, "_BATCH_CHARACTERS", 1)
    handed_over, written = 0, []

    def documents() -> Iterator[str]:
        nonlocal handed_over
        for document in DOCUMENTS:
            handed_over += 1
            yield document

    for _ in token_cache._tokenize(documents(), tokenizer, 2):
        written.append(handed_over - len(written))
    assert len(written) == len(DOCUMENTS)
    assert max(written) <= 2 * 2 + 1


def test_ids_beyond_two_bytes_are_kept(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "[END]": 1, "word": 70_000}  # fewer entries than its largest id
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]", unk_token="[UNK]")
    cache = open_token_cache(build(tmp_path / "cache", ["word"], tokenizer, eval_fraction=0.0), "train")
    assert cache.tokens.tolist() == [1, 70_000, 1]


def test_another_process_maps_the_files_itself(tokenizer: Any, tmp_path: Path) -> None:
    cache = open_token_cache(build(tmp_path / "cache", DOCUMENTS, tokenizer), "train")
    message = pickle.dumps(cache)
    assert len(message) < 1000
    again = pickle.loads(message)
    assert (again.folder, again.num_bytes) == (cache.folder, cache.num_bytes)
    assert np.array_equal(again.tokens, cache.tokens)
    assert isinstance(again.tokens, np.memmap)


# ---------------------------------------------------------------------------------------------------------------------
# What is held out


def splits(folder: Path, documents: Iterable[str], tokenizer: Any, fraction: float) -> tuple[list[bytes], list[bytes]]:
    build(folder, documents, tokenizer, eval_fraction=fraction)
    return read(folder, "train", tokenizer), read(folder, "eval", tokenizer)


@pytest.mark.parametrize("seed", range(4))
def test_equal_documents_share_a_split(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    documents = draw.choices([f"text {number}" for number in range(60)], k=300)
    documents += [documents[0]] * 3  # of the first one too, which is held out whatever its content
    train, held_out = splits(tmp_path / "cache", documents, tokenizer, 0.1)
    assert documents[0].encode() in held_out
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(document.encode() for document in documents)


def test_only_the_first_document_depends_on_the_order(tokenizer: Any, tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(DOCUMENTS, len(DOCUMENTS))
    orders = {"a": DOCUMENTS, "b": shuffled, "c": [DOCUMENTS[0], *shuffled]}
    found = {name: set(splits(tmp_path / name, order, tokenizer, 0.1)[1]) for name, order in orders.items()}
    by_content = {data for data in map(to_bytes, DOCUMENTS) if content_share(data) < 0.1}
    for name, order in orders.items():
        assert found[name] == by_content | {to_bytes(order[0])}


def test_about_the_share_asked_for_is_held_out(tokenizer: Any, tmp_path: Path) -> None:
    train, held_out = splits(tmp_path / "cache", (f"text {number}" for number in range(3000)), tokenizer, 0.1)
    assert len(train) + len(held_out) == 3000
    assert abs(len(held_out) - 300) < 5 * (3000 * 0.1 * 0.9) ** 0.5


def test_content_shares_are_uniform() -> None:
    shares = np.array([content_share(str(number).encode()) for number in range(10_000)])
    counts, _ = np.histogram(shares, bins=20, range=(0, 1))
    assert np.abs(counts - 500).max() < 5 * 500**0.5


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_two_documents_are_enough(tokenizer: Any, tmp_path: Path, fraction: float) -> None:
    other = next(text for text in DOCUMENTS if content_share(text.encode()) > fraction)
    train, held_out = splits(tmp_path / "cache", ["first", other], tokenizer, fraction)
    assert (train, held_out) == ([other.encode()], [b"first"])


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_no_documents(tokenizer: Any, tmp_path: Path, documents: list[str]) -> None:
    for fraction in (0.0, 0.1):
        with pytest.raises(UsageError, match=r"^data: expected at least one document, got none$"):
            build(tmp_path / "cache", documents, tokenizer, fraction)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("documents", [["one"], ["one"] * 5, DOCUMENTS[:3]])
def test_none_left_to_train_on(tokenizer: Any, tmp_path: Path, documents: list[str]) -> None:
    message = (
        f"^data: expected documents to train on, but all {len(documents)} .* held out; with a smaller eval_fraction"
    )
    with pytest.raises(UsageError, match=message):
        build(tmp_path / "cache", documents, tokenizer, eval_fraction=0.9999 if len(documents) == 3 else 0.05)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_the_name_changes_with_data_tokenizer_and_settings(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS[:20]))

    def name(seq_length: int = 16, eval_fraction: float = 0.1, which: Any = tokenizer, processes: int = 1) -> str:
        texts = open_texts(str(tmp_path / "data.txt"), config="", split="", text_column="")
        options = {"seq_length": seq_length, "eval_fraction": eval_fraction, "num_processes": processes}
        train, held_out = pack_corpus(texts, which, cache_dir=tmp_path / "cache", **options)
        assert train.fingerprint == held_out.fingerprint
        return train.fingerprint

    first = name()
    assert name(seq_length=32) == name(processes=2) == first  # rows lie beside the same tokens
    assert sorted(path.name for path in (tmp_path / "cache" / "tokens" / first / "train").iterdir()) == [
        *("documents.bin", "rows_16", "rows_32", "tokens.bin")
    ]
    other = pickle.loads(pickle.dumps(tokenizer))
    other.add_tokens(["added"])
    names = [first, name(eval_fraction=0.2), name(which=other)]
    (tmp_path / "data.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS[:21]))
    assert len({*names, name()}) == 4


def test_what_is_there_is_not_built_again(tokenizer: Any, tmp_path: Path) -> None:
    def unreadable() -> Iterator[str]:
        raise AssertionError("read again")
        yield ""

    folder = build(tmp_path / "cache", DOCUMENTS[:5], tokenizer)
    before = files(folder)
    assert files(build(folder, unreadable(), tokenizer)) == before


def test_an_error_half_way_leaves_nothing(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_pool, "_BATCH_CHARACTERS", 1000)

    def documents() -> Iterator[str]:
        yield from DOCUMENTS
        raise UsageError("data: damaged")

    with pytest.raises(UsageError, match=r"^data: damaged$"):
        build(tmp_path / "cache", documents(), tokenizer, num_processes=2)
    assert os.listdir(tmp_path) == []


def test_a_kill_half_way_leaves_nothing_that_looks_complete_and_no_process(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_pool, "_BATCH_CHARACTERS", 1000)

    def documents() -> Iterator[str]:
        yield from DOCUMENTS
        (tmp_path / "children").write_text(children_of(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(
        target=build, args=(tmp_path / "cache", documents(), tokenizer, 0.1, 2)
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "cache").exists()
    assert not list((tmp_path / "parts-cache").glob("*/[0-9]*"))  # less than a part was read
    workers = (tmp_path / "children").read_text().split()
    assert len(workers) == 2
    wait_until(lambda: not any(is_running(worker) for worker in workers))
    complete = build(tmp_path / "cache", DOCUMENTS, tokenizer)
    assert files(complete) == files(build(tmp_path / "other", DOCUMENTS, tokenizer))


def children_of(process: int) -> str:
    return Path(f"/proc/{process}/task/{process}/children").read_text()


def is_running(process: str) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_of_two_that_build_the_same_at_once_one_waits(tokenizer: Any, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    has_read = context.Lock()  # of which nobody gives back what he took

    def documents() -> Iterator[str]:
        assert has_read.acquire(timeout=1)
        time.sleep(0.3)
        yield from DOCUMENTS

    builders = [context.Process(target=build, args=(tmp_path / "cache", documents(), tokenizer)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert os.listdir(tmp_path) == ["cache"]
    assert files(tmp_path / "cache") == files(build(tmp_path / "alone", DOCUMENTS, tokenizer))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_with_the_corpus() -> None:
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "memory.py")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"ratio (\d+\.\d+)", output)
    assert found, output
    assert float(found[1]) <= 1.2, output


def test_a_summary_says_what_is_in_the_files(tokenizer: Any, tmp_path: Path) -> None:
    folder = build(tmp_path / "cache", DOCUMENTS, tokenizer)
    summary = json.loads((folder / "summary.json").read_text())
    assert sum(summary[split]["documents"] for split in SPLITS) == len(DOCUMENTS)
    assert sum(summary[split]["bytes"] for split in SPLITS) == sum(map(len, DOCUMENTS))
    for split in SPLITS:
        assert summary[split]["tokens"] == len(open_token_cache(folder, split).tokens)
