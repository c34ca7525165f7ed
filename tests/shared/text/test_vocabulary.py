from types import SimpleNamespace

from shared.text.vocabulary import num_ids, special_ids


def test_ids_with_gaps_are_counted_to_the_largest() -> None:
    assert num_ids(SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 7})) == 8


def test_the_end_token_stands_in_for_a_missing_begin_token() -> None:
    assert special_ids(SimpleNamespace(bos_token_id=0, eos_token_id=2)) == (0, 2)
    assert special_ids(SimpleNamespace(bos_token_id=None, eos_token_id=2)) == (2, 2)
