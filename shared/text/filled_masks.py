"""What a masked language model filled in and answered, as text that a reader can check."""

from typing import Any

import numpy as np

from shared.data.batches import IGNORED

ANSWERS = ("continuation", "other document")  # whether a second segment follows, in the order of the labels


def show_filled(
    tokenizer: Any, input_ids: np.ndarray, positions: np.ndarray, labels: np.ndarray, guesses: np.ndarray
) -> str:
    """The text with [guess] at each hidden token, and [guess, not truth] where that is wrong.

    Args:
        tokenizer: of the ids.
        input_ids: (T,), no padding.
        positions: (M,), of the hidden tokens.
        labels: (M,), what they were; -100 at places that are left.
        guesses: (M,), what the model takes for most likely.
    """
    words = tokenizer.convert_ids_to_tokens(input_ids.tolist())
    for position, label, guess in zip(positions.tolist(), labels.tolist(), guesses.tolist(), strict=True):
        if label != IGNORED:
            truth, guessed = tokenizer.convert_ids_to_tokens([label, guess])
            words[position] = f"[{guessed}]" if guess == label else f"[{guessed}, not {truth}]"
    return tokenizer.convert_tokens_to_string(words)


def show_answer(guess: int, truth: int) -> str:
    """What the model takes the second segment for, and what it is where that is wrong; both as labels, 0 or 1."""
    wrong = "" if guess == truth else f", wrong, it is the {ANSWERS[truth]}"
    return f"second segment: {ANSWERS[guess]}{wrong}"
