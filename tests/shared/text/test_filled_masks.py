from typing import Any

import numpy as np
import pytest

from shared.text.filled_masks import show_answer, show_filled
from shared.text.wordpiece import train_wordpiece


@pytest.fixture(scope="module")
def wordpiece() -> Any:
    return train_wordpiece(["the cat sees a dog and a house"] * 9, vocab_size=60, seq_length=16, lowercase=True)


def test_right_and_wrong_guesses_are_told_apart(wordpiece: Any) -> None:
    ids = np.array(wordpiece("the cat sees a dog")["input_ids"])
    cat, sees, dog, house = wordpiece.convert_tokens_to_ids(["cat", "sees", "dog", "house"])
    hidden = ids.copy()
    hidden[[2, 5]] = wordpiece.mask_token_id
    shown = show_filled(
        wordpiece, hidden, np.array([2, 5, 0]), np.array([cat, dog, -100]), np.array([cat, house, sees])
    )
    assert shown == "[CLS] the [cat] sees a [house, not dog] [SEP]"


def test_answers_say_what_is_true_where_they_are_wrong() -> None:
    assert show_answer(0, 0) == "second segment: continuation"
    assert show_answer(0, 1) == "second segment: continuation, wrong, it is the other document"
