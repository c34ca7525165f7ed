"""The tokenizer: every byte comes back, no text can forge a special token, training is deterministic."""

import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from shared.command_line import UsageError
from shared.text import tokenization
from shared.text.tokenization import (
    END_OF_TEXT,
    decode_bytes,
    encode,
    fingerprint,
    load_or_train,
    load_tokenizer,
    to_bytes,
    train_byte_level_bpe,
)
from shared.text.vocabulary import special_ids

ROOT = Path(__file__).parents[3]
# hypothesis leaves lone surrogates out unless asked for; here they are half of the texts' point.
ANY_TEXT = st.text(st.characters(codec=None) | st.characters(categories=["Cs"]), max_size=60)
SPELLED = st.lists(st.sampled_from([END_OF_TEXT, "<|endof", "text|>", " ", "a", "\n", "é", "\udcff"])).map("".join)
FIXTURES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


class Corpus:
    """Documents in memory."""

    def __init__(self, documents: Iterable[str]) -> None:
        self.documents = list(documents)
        self.fingerprint = str(self.documents)

    def __iter__(self) -> Iterator[str]:
        return iter(self.documents)


@pytest.fixture
def backend(tokenizer: Any) -> Any:
    return tokenizer.backend_tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


@given(st.binary(max_size=300))
def test_a_text_that_came_from_bytes_is_those_bytes(data: bytes) -> None:
    assert to_bytes(data.decode("utf-8", "surrogateescape")) == data


@given(ANY_TEXT, ANY_TEXT)
def test_bytes_of_any_text_do_not_depend_on_what_is_beside_it(left: str, right: str) -> None:
    assert to_bytes(left + right) == to_bytes(left) + to_bytes(right)


@given(st.text())
def test_bytes_of_valid_text_are_utf8(text: str) -> None:
    assert to_bytes(text) == text.encode()


@FIXTURES
@given(data=st.binary(max_size=300))
def test_any_bytes_come_back_from_their_tokens(backend: Any, data: bytes) -> None:
    ids = encode(backend, data.decode("utf-8", "surrogateescape"))
    assert ids.dtype == np.int64
    assert decode_bytes(backend, ids) == data


@FIXTURES
@given(text=ANY_TEXT | SPELLED)
def test_any_text_comes_back_and_holds_no_special_token(backend: Any, tokenizer: Any, text: str) -> None:
    ids = encode(backend, text)
    assert decode_bytes(backend, ids) == to_bytes(text)
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)


@FIXTURES
@given(text=st.text() | SPELLED, block=st.integers(1, 9))
def test_a_text_that_is_longer_than_a_block_comes_back(
    backend: Any, monkeypatch: pytest.MonkeyPatch, text: str, block: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "_BLOCK_CHARACTERS", block)
        assert decode_bytes(backend, encode(backend, text)) == to_bytes(text)


@pytest.mark.parametrize("text", ["line of text\n" * 20_000, "x" * 200_000, "caf\udce9 " * 30_000 + "\ud83d"])
def test_a_long_text_comes_back(backend: Any, text: str) -> None:
    assert decode_bytes(backend, encode(backend, text)) == to_bytes(text)


def test_blocks_end_at_line_ends_so_that_they_change_no_token_of_a_line(backend: Any) -> None:
    lines = [f"line {number} of a long text\n" for number in range(8_000)]
    of_lines = [encode(backend, line) for line in lines]
    assert encode(backend, "".join(lines)).tolist() == np.concatenate(of_lines).tolist()
    blocks = list(tokenization._blocks("".join(lines)))
    assert len(blocks) > 1
    assert all(block.endswith("\n") for block in blocks)


def test_most_tokens_of_prose_are_more_than_a_byte(backend: Any, prose: list[str]) -> None:
    assert len(encode(backend, prose[0])) < 0.5 * len(prose[0])


def test_ids_beyond_the_vocabulary_give_nothing_and_special_tokens_their_name(backend: Any, tokenizer: Any) -> None:
    assert decode_bytes(backend, [tokenizer.eos_token_id, 10_000, *encode(backend, "a")]) == b"<|endoftext|>a"


def test_bytes_in_other_vocabularies() -> None:
    named = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True))
    assert encode(named, "\udcff\udc80").tolist() == [0xFF, 0x80]
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "known": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert encode(words, "known \udcff\udc80 known").tolist() == [1, 0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_every_byte_has_a_token_and_the_vocabulary_has_the_size_asked_for(tokenizer: Any) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == 1024
    assert sorted(tokenizer.get_vocab().values()) == list(range(1024))
    alphabet = {character for token in tokenizer.get_vocab() if token != END_OF_TEXT for character in token}
    assert len(alphabet) == 256


TRAIN = """
import sys
from shared.text.documents import open_texts
from shared.text.tokenization import train_byte_level_bpe

documents = open_texts("prose_eval", config="", split="", text_column="text")
sys.stdout.write(train_byte_level_bpe(documents, 1024, 256).backend_tokenizer.to_str())
"""


def test_two_trainings_in_two_processes_give_the_same_tokenizer(prose: list[str]) -> None:
    here = train_byte_level_bpe(prose, 1024, 256).backend_tokenizer.to_str()
    again = subprocess.run([sys.executable, "-c", TRAIN], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert json.loads(again) == json.loads(here)


def test_training_survives_any_bytes_and_a_corpus_with_too_few_merges() -> None:
    noise = random.Random(0).randbytes(3000).decode("utf-8", "surrogateescape")
    tokenizer = train_byte_level_bpe([noise, "", "\ud83d", "ab ab"], 5000, 64)
    assert 257 <= len(tokenizer) < 5000
    assert decode_bytes(tokenizer.backend_tokenizer, encode(tokenizer.backend_tokenizer, noise)) == to_bytes(noise)


def test_a_tokenizer_is_trained_once_and_found_again(prose: list[str], tmp_path: Path) -> None:
    corpus, other = Corpus(text[:3000] for text in prose[:2]), Corpus(["other " * 100])
    sizes = {"vocab_size": 300, "seq_length": 64}
    folder = Path(load_or_train("", [corpus], **sizes, cache_dir=tmp_path).name_or_path)
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    assert load_or_train("", [corpus], **sizes, cache_dir=tmp_path).name_or_path == str(folder)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written
    for sources, changed in (([corpus], {"vocab_size": 301}), ([corpus], {"seq_length": 65}), ([other], {})):
        load_or_train("", sources, **(sizes | changed), cache_dir=tmp_path)
    assert len(list(folder.parent.iterdir())) == 4
    assert all(not path.name.startswith(".") for path in folder.parent.iterdir())


def test_each_corpus_is_trained_on_however_large_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "TRAINING_CHARACTERS", 2000)
    corpora = [Corpus(["aardvark " * 1000] * 3), Corpus(["zebra " * 1000] * 3)]
    vocabulary = load_or_train("", corpora, vocab_size=300, seq_length=64, cache_dir=tmp_path).get_vocab()
    assert {"Ġaardvark", "Ġzebra"} <= set(vocabulary)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def test_auto_tokenizer_puts_the_begin_token_before_a_prompt(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = loaded("The President")["input_ids"]
    assert ids == [tokenizer.eos_token_id, *encode(tokenizer.backend_tokenizer, "The President")]
    assert loaded.bos_token == loaded.eos_token == loaded.pad_token == END_OF_TEXT
    assert loaded.model_max_length == 256
    assert fingerprint(loaded) == fingerprint(tokenizer)


@FIXTURES
@given(text=st.text() | st.sampled_from(["it 's a , b .", " two  spaces ", "n't", f"say {END_OF_TEXT}!", "\r\n\t"]))
def test_decoding_gives_the_text(tokenizer: Any, text: str) -> None:
    begin, end = special_ids(tokenizer)
    ids = [begin, *encode(tokenizer.backend_tokenizer, text), end]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_tokenizer_that_would_cut_or_pad_is_kept_from_it(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    for text in ("short", "a text of more than eight tokens " * 5):
        assert decode_bytes(loaded.backend_tokenizer, encode(loaded.backend_tokenizer, text)) == text.encode()
    assert fingerprint(loaded) == fingerprint(tokenizer)


def test_a_fingerprint_changes_with_vocabulary_and_special_tokens(tokenizer: Any, tmp_path: Path) -> None:
    other = resaved(tokenizer, tmp_path / "a", eos_token="!")
    larger = resaved(tokenizer, tmp_path / "b")
    larger.add_tokens(["added"])
    assert len({fingerprint(each) for each in (tokenizer, other, larger)}) == 3


def test_what_is_wrong_with_a_tokenizer_is_said(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"expected one with an end token \(eos_token\)"):
        resaved(tokenizer, tmp_path / "endless", eos_token=None)
    expectations = {"slow": "one with a tokenizer.json", "empty": "folder or Hub id", "broken": "folder or Hub id"}
    for name, expected in (expectations | {"nothing": "folder or Hub id"}).items():
        with pytest.raises(UsageError, match=r"^tokenizer: '.*': expected ") as raised:
            load_tokenizer(str(tmp_path / name))
        assert expected in str(raised.value)
        assert "\n" not in str(raised.value)


def test_code_that_comes_with_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
    )
    with pytest.raises(UsageError, match=r"^tokenizer: "):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "canary").exists()


def resaved(tokenizer: Any, folder: Path, **special_tokens: str | None) -> Any:
    """The tokenizer loaded from a copy with other special tokens; None takes one away."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | special_tokens
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return load_tokenizer(str(folder))
