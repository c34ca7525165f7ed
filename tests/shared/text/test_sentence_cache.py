import itertools
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencex

from shared.command_line import UsageError
from shared.data import left_out
from shared.text.sentence_cache import LONGEST_SENTENCE, SentenceCache, join_caches, open_sentence_cache, split_corpus
from shared.text.tokenization import train_byte_level_bpe
from shared.text.wordpiece import continues_word, train_wordpiece


class Corpus:
    """Documents in memory."""

    def __init__(self, *documents: str) -> None:
        self.documents = documents
        self.fingerprint = str(hash(documents))

    def __iter__(self) -> Iterator[str]:
        return iter(self.documents)


@pytest.fixture(scope="module")
def wordpiece(prose: list[str]) -> Any:
    return train_wordpiece(prose, vocab_size=1000, seq_length=64, lowercase=True)


def split(corpus: Any, wordpiece: Any, folder: Path, **options: Any) -> tuple[SentenceCache, SentenceCache]:
    options = {"language": "en", "one_sentence_per_line": False, "eval_fraction": 0.0, "num_processes": 1, **options}
    return split_corpus(corpus, wordpiece, cache_dir=folder, **options)


def sentences_of(cache: SentenceCache) -> list[list[list[int]]]:
    """Token ids of each sentence of each document."""
    starts = [0, *cache.document_ends.tolist()]
    return [
        [cache.read(number, number + 1).tolist() for number in range(first, last)]
        for first, last in itertools.pairwise(starts)
    ]


def test_sentences_and_their_order_are_kept(prose: list[str], wordpiece: Any, tmp_path: Path) -> None:
    train, held_out = split(Corpus(*prose), wordpiece, tmp_path, num_processes=2)
    expected = [
        [ids for sentence in sentencex.segment("en", text) if (ids := wordpiece.encode(sentence)[1:-1])]
        for text in prose
    ]
    assert max(len(ids) for document in expected for ids in document) <= LONGEST_SENTENCE
    assert sentences_of(train) == expected
    assert len(held_out.document_ends) == len(held_out.tokens) == 0


def test_sentences_end_where_a_reader_would_say(wordpiece: Any, tmp_path: Path) -> None:
    text = 'Mr. Smith came.  "Why?" he asked. A line that is\nwrapped goes on.\n\nA heading\n\nThe end.'
    train, _ = split(Corpus(text, "One. Two."), wordpiece, tmp_path)
    assert [wordpiece.decode(ids) for ids in sentences_of(train)[0]] == [
        "mr. smith came.",
        '" why? " he asked.',
        "a line that is wrapped goes on.",
        "a heading",
        "the end.",
    ]


def test_language_changes_where_sentences_end(wordpiece: Any, tmp_path: Path) -> None:
    corpus = Corpus("Das ist der 3. Oktober im Jahr. Ja.", "One. Two.")
    english, german = (split(corpus, wordpiece, tmp_path, language=code)[0] for code in ("en", "de"))
    assert len(sentences_of(german)[0]) == 2
    assert len(sentences_of(english)[0]) == 3


def test_lines_are_sentences_and_blank_lines_end_documents_if_asked(wordpiece: Any, tmp_path: Path) -> None:
    text = "first. of one\nsecond of one\n\n\nfirst of two\nsecond of two\nthird of two\n"
    train, _ = split(Corpus(text), wordpiece, tmp_path, one_sentence_per_line=True)
    assert [len(document) for document in sentences_of(train)] == [2, 3]
    assert wordpiece.decode(sentences_of(train)[0][0]) == "first. of one"


def test_each_document_is_in_one_split_by_its_content(prose: list[str], wordpiece: Any, tmp_path: Path) -> None:
    whole, _ = split(Corpus(*prose), wordpiece, tmp_path)
    train, held_out = split(Corpus(*prose, prose[3]), wordpiece, tmp_path, eval_fraction=0.3)
    again, _ = split(Corpus(*reversed(prose[2:]), *prose[:2]), wordpiece, tmp_path, eval_fraction=0.3)
    parts = [[str(document) for document in sentences_of(cache)] for cache in (train, held_out)]
    assert not set(parts[0]) & set(parts[1])
    assert sorted({*parts[0], *parts[1]}) == sorted(str(document) for document in sentences_of(whole))
    assert 2 <= len(parts[1]) < len(parts[0])
    assert len(set(parts[0]) ^ {str(document) for document in sentences_of(again)}) <= 4  # the first two are held out


def test_sentences_of_a_byte_level_tokenizer_begin_with_a_word(prose: list[str], tmp_path: Path) -> None:
    """Or what is masked whole would go from one sentence into the next."""
    tokenizer = train_byte_level_bpe(prose, 400, 64)
    train, _ = split(Corpus("It is. Go on.", "One. Two."), tokenizer, tmp_path)
    firsts = [int(train.read(place, place + 1)[0]) for place in range(len(train.sentence_ends))]
    assert not continues_word(tokenizer)[firsts].any()


def test_all_can_be_held_out(wordpiece: Any, tmp_path: Path) -> None:
    train, held_out = split(Corpus("One. Two.", "Three. Four."), wordpiece, tmp_path, eval_fraction=1.0)
    assert (len(train.document_ends), len(held_out.document_ends)) == (0, 2)


def test_documents_of_one_sentence_are_left_out_and_counted(wordpiece: Any, tmp_path: Path) -> None:
    train, _ = split(Corpus("One. Two.", "Alone.", "", "  \n", "Three. Four. Five."), wordpiece, tmp_path)
    assert [len(document) for document in sentences_of(train)] == [2, 3]
    assert left_out.counts() == {"documents_without_a_pair": 2}  # of blanks, and of one sentence
    assert train.lost.documents == 2


def test_what_the_tokenizer_loses_of_a_text_is_counted_also_over_several_corpora(tmp_path: Path) -> None:
    texts = ["किताब पानी में है। " * 8, "नदी और पेड़। यह घर है। " * 8]
    for lowercase in (True, False):
        tokenizer = train_wordpiece(texts, vocab_size=200, seq_length=64, lowercase=lowercase)
        folder = tmp_path / str(lowercase)
        hindi, _ = split(Corpus(*texts), tokenizer, folder, language="hi")
        signs = sum(text.count(sign) for text in texts for sign in "\u0941\u0947\u0948\u0902\u093c")
        assert hindi.lost.marks == (signs if lowercase else 0)
        assert hindi.lost.unknown == 0
        strange = [f"यह घर है। {'x' * 120} {'y' * 3}. यह।", "नदी। caf\udce9 घर है।" + "पानी में है। " * 60]
        latin, _ = split(Corpus(*strange), tokenizer, folder, language="hi", one_sentence_per_line=False)
        assert latin.lost.unknown == 120 + 3 + len("caf\ufffd")
        assert latin.lost.bytes == 1
        assert ("vowel_signs" in left_out.counts()) == lowercase
        expected = r"data: '': expected words that the tokenizer knows; [4-9]\d\.\d% of the characters are in words"
        with pytest.raises(UsageError, match=expected):
            split(Corpus("acgt" * 40 + ". acgt है।", "घर है। " + "acgt" * 40), tokenizer, folder, language="hi")


@pytest.mark.parametrize(
    "documents", [("One. Two.",), ("One. Two.", "Alone."), ("Alone.", "Another."), ("One. Two.", "")]
)
def test_one_document_in_all_is_refused(wordpiece: Any, tmp_path: Path, documents: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"expected at least 2 documents of 2 sentences or more to train on.*got [01]"):
        split(Corpus(*documents), wordpiece, tmp_path)
    assert not list(tmp_path.glob("sentences/*"))


def test_too_few_documents_for_two_splits_are_refused(wordpiece: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"to train on, .* got 1 "):
        split(Corpus("One. Two.", "Three. Four.", "Five. Six."), wordpiece, tmp_path, eval_fraction=0.1)


@pytest.mark.timeout(60)
@pytest.mark.slow
def test_a_long_line_without_an_end_is_cut(wordpiece: Any, tmp_path: Path) -> None:
    train, _ = split(Corpus("word " * 2_000_000, "One. Two."), wordpiece, tmp_path)  # 10 MB
    lengths = np.diff(train.sentence_ends, prepend=0)
    assert lengths.max() == LONGEST_SENTENCE
    assert lengths[:-2].sum() == len(wordpiece.encode("word")[1:-1]) * 2_000_000
    assert train.lost.cuts == len(lengths) - 3  # sentences
    assert left_out.counts()["cuts_within_sentences"] == train.lost.cuts


def test_special_tokens_and_odd_bytes_in_the_text_are_text(wordpiece: Any, tmp_path: Path) -> None:
    train, _ = split(Corpus("A [SEP] b.\n\n\x00Two \udc80\ud800 three.", "One. Two."), wordpiece, tmp_path)
    assert not {wordpiece.sep_token_id, wordpiece.mask_token_id} & set(train.tokens.tolist())


def test_a_corpus_is_split_once(prose: list[str], wordpiece: Any, tmp_path: Path) -> None:
    class Once(Corpus):
        def __iter__(self) -> Iterator[str]:
            self.reads = getattr(self, "reads", 0) + 1
            return super().__iter__()

    corpus = Once(*prose[:3])
    for _ in range(2):
        split(corpus, wordpiece, tmp_path)
    assert corpus.reads == 1
    split(corpus, wordpiece, tmp_path, language="de")
    split(corpus, train_wordpiece(prose, 900, 64, lowercase=False), tmp_path)
    assert corpus.reads == 3


def test_several_corpora_become_one(prose: list[str], wordpiece: Any, tmp_path: Path) -> None:
    caches = [split(Corpus(*part), wordpiece, tmp_path)[0] for part in (prose[:4], prose[4:7], prose[7:])]
    joined = join_caches(caches, tmp_path)
    assert sentences_of(joined) == [document for cache in caches for document in sentences_of(cache)]
    assert (
        join_caches(caches, tmp_path).fingerprint
        == joined.fingerprint
        != join_caches(caches[::-1], tmp_path).fingerprint
    )
    assert join_caches(caches[:1], tmp_path) is caches[0]


def test_another_process_maps_the_files_itself(prose: list[str], wordpiece: Any, tmp_path: Path) -> None:
    train, _ = split(Corpus(*prose), wordpiece, tmp_path)
    message = pickle.dumps(train)
    again = pickle.loads(message)
    assert len(message) < 1000
    assert not again.tokens.flags.owndata  # the file's
    assert np.array_equal(again.tokens, train.tokens)
    assert json.loads((train.folder.parent / "summary.json").read_text())["documents"]["train"] == 25
    assert open_sentence_cache(train.folder.parent, "train").fingerprint == train.fingerprint
