from typing import Any

import numpy as np
import pytest

from shared.data.batches import IGNORED
from shared.text.label_rows import encode
from shared.text.labelled import LabelledTexts
from shared.text.wordpiece import train_wordpiece

WORDS = ["the", "cat", "unbelievable", "dog", "sees"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_wordpiece([" ".join(WORDS)] * 20, vocab_size=38, seq_length=64, lowercase=True)


def test_rows_are_the_tokenizer_s_and_batches_as_long_as_their_longest(tokenizer: Any) -> None:
    texts = ["the cat", "the dog sees the cat", "cat"]
    rows = encode(
        LabelledTexts("classes", texts, None, np.array([2, 0, 1]), ("a", "b", "c"), np.arange(3)), tokenizer, 64
    )
    assert rows.lengths == tuple(len(tokenizer(text)["input_ids"]) for text in texts)
    batch = rows.batch([0, 1])
    expected = tokenizer(texts[:2], padding=True, return_tensors="np")
    assert batch.keys() == {*expected.keys(), "labels"}
    for name, values in expected.items():
        assert np.array_equal(batch[name], values), name
    assert batch["labels"].tolist() == [2, 0]
    assert rows.batch([2])["input_ids"].shape == (1, rows.lengths[2])


def test_of_a_pair_the_longer_text_is_cut(tokenizer: Any) -> None:
    pairs = LabelledTexts("numbers", ["the cat"], ["dog " * 40], np.array([0.5], dtype=np.float32), (), np.arange(1))
    rows = encode(pairs, tokenizer, 16)
    assert rows.lengths == (16,)
    assert (rows.num_cut, rows.num_words_left_out) == (1, 0)
    text = tokenizer.decode(rows.columns["input_ids"][0])
    assert text.startswith("[CLS] the cat [SEP] dog")
    assert rows.columns["token_type_ids"][0][-1] == 1
    assert rows.batch([0])["labels"].dtype == np.float32


def test_the_first_token_of_a_word_has_its_label(tokenizer: Any) -> None:
    words = ["the", "unbelievable", "dog"]
    assert len(tokenizer.tokenize(words[1])) > 1
    rows = encode(
        LabelledTexts("tags", [words, ["cat"]], None, [[0, 1, 2], [1]], ("O", "B-A", "B-B"), np.arange(2)),
        tokenizer,
        64,
    )
    ids, labels = rows.columns["input_ids"][0], rows.labels[0]
    assert [label for label in labels if label != IGNORED] == [0, 1, 2]
    place = labels.index(1)
    assert tokenizer.convert_ids_to_tokens(ids[place]) == tokenizer.tokenize(words[1])[0]
    batch = rows.batch([0, 1])
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_what_a_row_has_no_room_for_is_counted(tokenizer: Any) -> None:
    assert len(tokenizer.tokenize("c")) == 1
    lengths = [20, 5, 0, 16]
    labels = [[0] * length for length in lengths]
    samples = LabelledTexts("tags", [["c"] * length for length in lengths], None, labels, ("O", "B"), np.arange(4))
    rows = encode(samples, tokenizer, 12)
    assert (rows.num_cut, rows.num_words_left_out) == (2, 20 - 10 + 16 - 10)
    assert sum(label != IGNORED for row in rows.labels for label in row) == 10 + 5 + 10
    assert encode(samples, tokenizer, 64).num_cut == 0
