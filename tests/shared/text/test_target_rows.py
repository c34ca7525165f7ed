"""Examples in rows: every target once, no example cut apart, what does not fit counted."""

import itertools
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.command_line import UsageError
from shared.data.batches import IGNORED
from shared.text import tokenization
from shared.text.conversations import Conversations, encode_example, stop_token, with_template
from shared.text.target_rows import TargetRows, pack_examples


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return with_template(tokenization.train_byte_level_bpe(["the cat sees the dog " * 20], 300, 64), "")


def packed(
    records: list[dict[str, Any]], tokenizer: Any, seq_length: int, folder: Path, num_processes: int = 1
) -> TargetRows:
    samples = Conversations("messages", records)
    options: dict[str, Any] = {"seq_length": seq_length, "cache_dir": folder, "num_processes": num_processes}
    return pack_examples(samples, tokenizer, **options)


TOKENIZER: list[Any] = []
WORDS = st.lists(st.sampled_from(["cat", "dog", "the", "sees"]), min_size=1, max_size=8).map(" ".join)


@given(pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=12), seq_length=st.integers(8, 64))
@settings(deadline=None, max_examples=20)
def test_every_target_that_fits_is_in_the_rows_once(pairs: list[tuple[str, str]], seq_length: int) -> None:
    if not TOKENIZER:
        TOKENIZER.append(with_template(tokenization.train_byte_level_bpe(["the cat sees the dog " * 20], 300, 64), ""))
    records = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in pairs
    ]
    stop = stop_token(TOKENIZER[0])
    examples = [encode_example(TOKENIZER[0], record, stop) for record in records]
    with tempfile.TemporaryDirectory() as folder:
        rows = packed(records, TOKENIZER[0], seq_length, Path(folder))
        found = [example for row in map(rows.read, range(len(rows))) for example in examples_of(row)]
    expected: list[tuple[int, ...]] = []
    for ids, is_target in examples:
        ids, is_target = ids[: seq_length + 1], is_target[: seq_length + 1]
        if is_target[1:].any():
            expected.append((*ids[:-1], *np.where(is_target[1:], ids[1:], IGNORED)))
    assert sorted(found) == sorted(expected)
    assert rows.num_cut == sum(len(ids) > seq_length + 1 for ids, _ in examples)
    assert rows.num_left_out == len(examples) - len(expected)


def examples_of(row: dict[str, np.ndarray]) -> list[tuple[int, ...]]:
    """The examples of a row with a target, inputs and labels."""
    begins = [*np.flatnonzero(row["position_ids"] == 0), len(row["labels"])]
    parts = [slice(first, last) for first, last in itertools.pairwise(begins)]
    return [(*row["input_ids"][part], *row["labels"][part]) for part in parts if (row["labels"][part] != IGNORED).any()]


def test_examples_are_tokenised_once_by_any_number_of_processes(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.text.document_pool._BATCH_CHARACTERS", 100)  # several batches
    records = [
        {"messages": [{"role": "user", "content": "the " * n}, {"role": "assistant", "content": "cat"}]}
        for n in range(1, 30)
    ]
    one, two = (packed(records, tokenizer, 48, tmp_path / str(number), number) for number in (1, 2))
    assert [rows.folder.name for rows in (one, two)] == [two.folder.name] * 2
    files = [{path.name: path.read_bytes() for path in rows.folder.iterdir()} for rows in (one, two)]
    assert files[0] == files[1]
    before = one.folder.stat().st_mtime_ns
    again = packed(records, tokenizer, 48, tmp_path / "1")
    assert (again.folder, again.folder.stat().st_mtime_ns) == (one.folder, before)
    sent = pickle.dumps(one)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).read(0)["labels"], one.read(0)["labels"])
    assert packed(records[:-1], tokenizer, 48, tmp_path / "1").folder != one.folder
    assert packed(records, tokenizer, 47, tmp_path / "1").folder != one.folder


def test_an_answer_that_no_row_has_room_for_is_left_out_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "the cat " * 40}, {"role": "assistant", "content": "a dog"}]}
    short = {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat " * 40}]}
    rows = packed([long, short], tokenizer, 16, tmp_path)
    assert (len(rows), rows.num_cut, rows.num_left_out) == (1, 2, 1)
    assert len(packed([long], tokenizer, 16, tmp_path)) == 0


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    plain = tokenization.train_byte_level_bpe(["the cat sees the dog " * 20], 300, 64)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    with_template(plain, refusing + with_template(plain, "").chat_template)
    talk = [{"role": role, "content": "the"} for role in ("user", "assistant")]
    records = [{"messages": talk}, {"messages": [{"role": "system", "content": "cat"}, *talk]}]
    with pytest.raises(UsageError, match=r"data: row 1: expected a conversation that the chat template takes"):
        packed(records, plain, 16, tmp_path)
    assert [path.name for path in (tmp_path / "examples").iterdir() if path.is_dir()] == []
