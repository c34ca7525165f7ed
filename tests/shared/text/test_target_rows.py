"""Examples in rows: every target once, no example cut apart, what does not fit counted."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.command_line import UsageError
from shared.data.batches import IGNORED
from shared.text import tokenization
from shared.text.conversations import Conversations, encode_example, stop_token, with_template
from shared.text.target_rows import pack_examples


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return with_template(tokenization.train_byte_level_bpe(["the cat sees the dog " * 20], 300, 64), "")


TOKENIZER: list[Any] = []
WORDS = st.lists(st.sampled_from(["cat", "dog", "the", "sees"]), min_size=1, max_size=8).map(" ".join)


@given(pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=12), seq_length=st.integers(8, 64))
@settings(deadline=None)
def test_every_target_that_fits_is_in_the_rows_once(pairs: list[tuple[str, str]], seq_length: int) -> None:
    if not TOKENIZER:
        TOKENIZER.append(with_template(tokenization.train_byte_level_bpe(["the cat sees the dog " * 20], 300, 64), ""))
    records = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in pairs
    ]
    stop = stop_token(TOKENIZER[0])
    examples = [encode_example(TOKENIZER[0], record, stop) for record in records]
    rows = pack_examples(Conversations("messages", records), TOKENIZER[0], seq_length)
    expected: list[tuple[int, ...]] = []
    for ids, is_target in examples:
        ids, is_target = ids[: seq_length + 1], is_target[: seq_length + 1]
        if is_target[1:].any():
            expected.append((*ids[:-1], *np.where(is_target[1:], ids[1:], IGNORED)))
    found: list[tuple[int, ...]] = []
    for row in map(rows.read, range(len(rows))):
        begins = [*np.flatnonzero(row["position_ids"] == 0), seq_length]
        for first, last in itertools.pairwise(begins):
            if (row["labels"][first:last] != IGNORED).any():
                found.append((*row["input_ids"][first:last], *row["labels"][first:last]))
    assert sorted(found) == sorted(expected)
    assert rows.num_cut == sum(len(ids) > seq_length + 1 for ids, _ in examples)
    assert rows.num_left_out == len(examples) - len(expected)


def test_an_answer_that_no_row_has_room_for_is_left_out_and_counted(tokenizer: Any) -> None:
    long = {"messages": [{"role": "user", "content": "the cat " * 40}, {"role": "assistant", "content": "a dog"}]}
    short = {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat " * 40}]}
    rows = pack_examples(Conversations("messages", [long, short]), tokenizer, 16)
    assert (len(rows), rows.num_cut, rows.num_left_out) == (1, 2, 1)
    assert len(pack_examples(Conversations("messages", [long]), tokenizer, 16)) == 0


def test_a_conversation_that_the_template_refuses_is_named(tokenizer: Any) -> None:
    plain = tokenization.train_byte_level_bpe(["the cat sees the dog " * 20], 300, 64)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    with_template(plain, refusing + with_template(plain, "").chat_template)
    talk = [{"role": role, "content": "the"} for role in ("user", "assistant")]
    records = [{"messages": talk}, {"messages": [{"role": "system", "content": "cat"}, *talk]}]
    with pytest.raises(UsageError, match=r"data: row 1: expected a conversation that the chat template takes"):
        pack_examples(Conversations("messages", records), plain, 16)
