import random
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from shared.command_line import UsageError
from shared.text.documents import Beginning, open_texts
from shared.text.tokenization import train_byte_level_bpe
from shared.text.wordpiece import (
    SPECIAL_TOKENS,
    continues_word,
    load_or_train,
    load_wordpiece,
    tells_words,
    train_wordpiece,
)


@pytest.fixture(scope="module")
def wordpiece(prose: list[str]) -> Any:
    return train_wordpiece(prose, vocab_size=2000, seq_length=64, lowercase=True)


def test_it_is_the_library_s_tokenizer_and_survives_its_folder(wordpiece: Any, tmp_path: Path) -> None:
    wordpiece.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, BertTokenizer)
    assert len(loaded) == 2000
    assert loaded.model_max_length == 64
    pair = loaded("The President", "of the Étates")
    assert loaded.decode(pair["input_ids"]) == "[CLS] the president [SEP] of the etates [SEP]"
    assert pair["token_type_ids"] == wordpiece("The President", "of the Étates")["token_type_ids"]
    assert loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]


def test_case_is_kept_if_asked(prose: list[str], tmp_path: Path) -> None:
    train_wordpiece(prose, vocab_size=2000, seq_length=64, lowercase=False).save_pretrained(tmp_path)
    loaded = load_wordpiece(str(tmp_path))
    assert loaded.decode(loaded("The President", add_special_tokens=False)["input_ids"]) == "The President"


def test_prose_has_few_unknown_words(wordpiece: Any, prose: list[str]) -> None:
    ids = wordpiece(prose[5])["input_ids"]
    assert ids.count(wordpiece.unk_token_id) == 0


def test_a_vocabulary_smaller_than_the_alphabet_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"vocab_size: 20: expected at least \d\d, the characters of the text, or a sma"
    ):
        train_wordpiece(["abcdefghijklmnopqrstuvwxyz " * 3], vocab_size=20, seq_length=64, lowercase=True)


def test_the_same_text_gives_the_same_ids(prose: list[str], wordpiece: Any) -> None:
    """Also where pairs and characters are equally frequent, and whatever order a hash table has."""
    again = train_wordpiece(prose, vocab_size=2000, seq_length=64, lowercase=True)
    assert again.get_vocab() == wordpiece.get_vocab()
    draw = random.Random(0)
    text = [" ".join("".join(draw.choices("abcdefgh", k=6)) for _ in range(20)) for _ in range(300)]
    text.append(" ".join(chr(0x4E00 + number) for number in range(50)))
    options: dict[str, Any] = {"vocab_size": 400, "seq_length": 64, "lowercase": True, "limit_alphabet": 30}
    first, *others = (train_wordpiece(text, **options).get_vocab() for _ in range(4))
    assert all(other == first for other in others)
    assert {token for token in first if ord(token[-1]) >= 0x4E00} == {chr(0x4E00 + number) for number in range(22)}


def test_rare_characters_and_rare_pairs_take_no_entries() -> None:
    characters = [chr(0x4E00 + number) for number in range(3000)]
    text = [" ".join(characters), " ".join(characters[:20]), "seldom often often s l d m s l d m"]
    found = set(train_wordpiece(text, 100, 64, True, limit_alphabet=29, min_frequency=2).get_vocab())
    assert set(characters) & found == set(characters[:20])
    assert "often" in found
    assert "seldom" not in found
    assert "seldom" in train_wordpiece(text, 200, 64, True, limit_alphabet=100, min_frequency=1).get_vocab()


def test_it_is_trained_once_and_found_again(tmp_path: Path) -> None:
    texts = open_texts("prose_eval", config="", split="", text_column="text")
    options: dict[str, Any] = {"seq_length": 64, "lowercase": True, "cache_dir": tmp_path}
    first = load_or_train("", [texts], vocab_size=500, **options)
    [folder] = (tmp_path / "tokenizers").iterdir()
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    assert load_or_train("", [texts], vocab_size=500, **options).get_vocab() == first.get_vocab()
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written
    assert len(load_or_train("", [texts], vocab_size=600, **options)) == 600
    several = load_or_train("", [texts, Beginning(texts, 50)], vocab_size=500, **options)
    assert several.name_or_path != str(folder)
    assert load_or_train(str(folder), [texts], vocab_size=600, **options).get_vocab() == first.get_vocab()


def test_a_tokenizer_without_berts_tokens_is_refused(tmp_path: Path) -> None:
    train_byte_level_bpe(["some words"], 300, 64).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="expected one with a cls_token"):
        load_wordpiece(str(tmp_path))


def test_continuations_are_told_from_words(wordpiece: Any) -> None:
    continues = continues_word(wordpiece)
    tokens = wordpiece.convert_ids_to_tokens(list(range(len(wordpiece))))
    assert [bool(flag) for flag in continues] == [token.startswith("##") for token in tokens]
    assert 100 < continues.sum() < 1900


@pytest.mark.parametrize(
    ("model", "before", "trainer", "known"),
    [
        (models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), trainers.BpeTrainer, True),  # RoBERTa
        (models.Unigram(), pre_tokenizers.Metaspace(), trainers.UnigramTrainer, True),  # XLM-RoBERTa
        (models.WordLevel(unk_token="<unk>"), pre_tokenizers.Whitespace(), trainers.WordLevelTrainer, False),
    ],
)
def test_words_of_other_tokenizers(model: Any, before: Any, trainer: Any, known: bool) -> None:
    """A token called ## is one of text there."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = before
    text = "unbelievable houses ## unbelievable housed and ##"
    options = {"unk_token": "<unk>"} if trainer is trainers.UnigramTrainer else {}
    backend.train_from_iterator(
        [text] * 9, trainer(vocab_size=60, special_tokens=["<s>", "<unk>"], show_progress=False, **options)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="<s>", unk_token="<unk>")
    assert tells_words(tokenizer) == known
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = [place for place, begins in enumerate(~continues_word(tokenizer)[ids]) if begins or place == 0]
    words = [tokenizer.decode(ids[a:b]).strip() for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    if known:
        assert [re.sub("[\u0120\u2581 ]", "", word) for word in words] == text.split()
    assert not continues_word(tokenizer)[tokenizer.cls_token_id]
