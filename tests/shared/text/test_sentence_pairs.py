"""Properties of the pairs, held over made-up corpora; tokens are numbers that tell where they stood."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.text.sentence_cache import SentenceCache
from shared.text.sentence_pairs import NUM_SPECIAL, WINDOW_UPDATES, SentencePairs, make_pairs, truncate

CLS, SEP, PAD = 1, 2, 3
FIRST_TOKEN = 10

corpora = st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=12), min_size=2, max_size=6)


def cache_of(lengths: list[list[int]], folder: Path = Path("/nowhere/train")) -> SentenceCache:
    """Documents of sentences with these lengths; token n of the corpus has the id FIRST_TOKEN + n."""
    flat = [length for document in lengths for length in document]
    tokens = np.arange(FIRST_TOKEN, FIRST_TOKEN + sum(flat), dtype=np.uint32)
    return SentenceCache(folder, tokens, np.cumsum(flat), np.cumsum([len(document) for document in lengths]))


def pairs_of(lengths: list[list[int]], folder: Path, seq_length: int = 32, seed: int = 0) -> SentencePairs:
    return SentencePairs(cache_of(lengths, folder / "train"), (CLS, SEP, PAD), seq_length, 0.1, seed)


def document_of(cache: SentenceCache, sentence: int) -> int:
    return int(np.searchsorted(cache.document_ends, sentence, side="right"))


@given(corpora, st.integers(8, 64), st.sampled_from([0.0, 0.1, 0.9]), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_segments_are_whole_sentences_of_the_right_documents(
    lengths: list[list[int]], seq_length: int, short_fraction: float, seed: int
) -> None:
    cache = cache_of(lengths)
    for a_first, a_end, b_first, b_end, is_next in make_pairs(cache, seq_length, short_fraction, seed):
        a, b = (a_first, a_end), (b_first, b_end)
        for first, end in (a, b):
            assert 0 <= first < end <= len(cache.sentence_ends)
            assert document_of(cache, first) == document_of(cache, end - 1)
        assert (document_of(cache, a_first) == document_of(cache, b_first)) == bool(is_next)
        assert not is_next or b_first == a_end
        # No sentence more than the target asks for, but for a true continuation, which has two at least.
        longest = seq_length - NUM_SPECIAL
        assert len(cache.read(*a)) - len(cache.read(a_end - 1, a_end)) < longest
        last = len(cache.read(b_end - 1, b_end))
        assert b_end - b_first == 1 or len(cache.read(*a)) + len(cache.read(*b)) - last < longest


@given(corpora, st.integers(8, 64), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_every_sentence_is_used_and_what_was_replaced_returns(
    lengths: list[list[int]], seq_length: int, seed: int
) -> None:
    """Within a document each pair begins where the one before it ended, or, for a lone last sentence, one before."""
    cache = cache_of(lengths)
    walked: dict[int, int] = {}
    for a_first, a_end, _, b_end, is_next in make_pairs(cache, seq_length, 0.1, seed):
        document = document_of(cache, a_first)
        first = int(cache.document_ends[document - 1]) if document else 0
        last = int(cache.document_ends[document])
        expected = walked.get(document, first)
        assert a_first == expected or (a_first == expected - 1 == last - 2 and is_next)
        walked[document] = b_end if is_next else a_end
    assert walked == {document: int(end) for document, end in enumerate(cache.document_ends)}


@given(corpora, st.integers(8, 64), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_pairs_are_a_function_of_the_seed(lengths: list[list[int]], seq_length: int, seed: int) -> None:
    cache = cache_of(lengths)
    assert list(make_pairs(cache, seq_length, 0.1, seed)) == list(make_pairs(cache, seq_length, 0.1, seed))


@pytest.mark.parametrize("sentences", [2, 3, 20])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_half_of_the_pairs_continue(sentences: int, seed: int) -> None:
    """Within 3 standard errors of one half, also where sentences fill rows alone and where documents are short."""
    draw = random.Random(seed)
    cache = cache_of([[draw.randint(3, 60) for _ in range(sentences)] for _ in range(6000 // sentences)])
    is_next = [pair[4] for pair in make_pairs(cache, 48, 0.1, seed)]
    assert abs(np.mean(is_next) - 0.5) < 3 * 0.5 / len(is_next) ** 0.5


def test_a_tenth_of_the_pairs_is_shorter() -> None:
    cache = cache_of([[1] * 3000 for _ in range(10)])
    pairs = np.array(list(make_pairs(cache, 64, 0.1, seed=5)))
    sizes = (pairs[:, 1] - pairs[:, 0]) + (pairs[:, 3] - pairs[:, 2])
    share = np.mean(sizes < 61)
    assert abs(share - 0.1 * 59 / 60) < 3 * (0.09 / len(pairs)) ** 0.5 + 20 / len(pairs)  # and the documents' ends


@given(st.integers(1, 60), st.integers(1, 60), st.integers(5, 70), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_truncation_is_that_of_the_released_code(len_a: int, len_b: int, longest: int, seed: int) -> None:
    """Against its loop: as long as both are too long together, a token goes from an end of the longer one."""
    kept_a, kept_b = len_a, len_b
    while kept_a + kept_b > longest:
        if kept_a > kept_b:
            kept_a -= 1
        else:
            kept_b -= 1
    segments = np.arange(len_a), np.arange(100, 100 + len_b)
    a, b = truncate(*segments, longest, random.Random(seed))
    assert (len(a), len(b)) == (kept_a, kept_b)
    assert all(np.array_equal(np.diff(part), np.ones(len(part) - 1)) for part in (a, b))  # a stretch of the segment


def test_truncation_takes_from_both_ends_alike() -> None:
    fronts = [int(truncate(np.arange(60), np.arange(10), 50, random.Random(seed))[0][0]) for seed in range(500)]
    assert abs(np.mean(fronts) - 10) < 3 * (20 * 0.25 / 500) ** 0.5
    assert np.std(fronts) == pytest.approx(5**0.5, rel=0.15)


@given(corpora, st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_a_row_is_laid_out_as_bert_reads_it(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], seed: int
) -> None:
    pairs = pairs_of(lengths, tmp_path_factory.mktemp("rows"), seed=seed)
    of_epoch = pairs.epoch(0)
    for index, (a_first, a_end, b_first, b_end, is_next) in enumerate(of_epoch.tolist()):
        row = pairs.read(0, index)
        size = int(row["attention_mask"].sum())
        ids = row["input_ids"].tolist()
        assert pairs.lengths(of_epoch)[index] == size
        assert row["attention_mask"].tolist() == [1] * size + [0] * (32 - size)
        assert ids[size:] == [PAD] * (32 - size)
        assert ids[0] == CLS
        assert ids[size - 1] == SEP
        middle = ids.index(SEP)
        assert row["token_type_ids"].tolist() == [0] * (middle + 1) + [1] * (size - middle - 1) + [0] * (32 - size)
        assert set(ids[1:middle]) <= set(pairs.cache.read(a_first, a_end).tolist())
        assert set(ids[middle + 1 : size - 1]) <= set(pairs.cache.read(b_first, b_end).tolist())
        assert size - NUM_SPECIAL > 1
        assert int(row["next_sentence_label"]) == 1 - is_next  # 0 = continues, as transformers has it


CORPUS = [[random.Random(document).randint(2, 30) for _ in range(40)] for document in range(30)]


def test_epochs_differ_and_repeat(tmp_path: Path) -> None:
    one, same, other = (pairs_of(CORPUS, tmp_path, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.epoch(3), same.epoch(3))
    assert not np.array_equal(one.epoch(3)[:50], one.epoch(4)[:50])
    assert not np.array_equal(one.epoch(3)[:50], other.epoch(3)[:50])


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_an_epoch_has_every_pair_once_on_any_number_of_processes(tmp_path: Path, num_processes: int) -> None:
    pairs = pairs_of(CORPUS, tmp_path)
    per_epoch = pairs.updates_per_epoch(8)
    assert per_epoch > WINDOW_UPDATES // 2
    for epoch in (0, 2):
        updates = [
            [
                sample
                for rank in range(num_processes)
                for sample in pairs.samples_of_update(
                    epoch * per_epoch + number, global_batch_size=8, rank=rank, num_processes=num_processes
                )
            ]
            for number in range(per_epoch)
        ]
        whole = [
            pairs.samples_of_update(epoch * per_epoch + number, global_batch_size=8, rank=0, num_processes=1)
            for number in range(per_epoch)
        ]
        assert updates == whole
        seen = [pair for update in updates for _, pair in update]
        assert {sample_epoch for update in updates for sample_epoch, _ in update} == {epoch}
        assert max(np.bincount(seen)) <= 2
        assert len(set(seen)) > 0.9 * min(len(pairs.epoch(epoch)), per_epoch * 8)
    first = [pair for number in range(per_epoch) for _, pair in whole_update(pairs, number)]
    assert len(set(first)) == len(first)


def whole_update(pairs: SentencePairs, number: int) -> list[tuple[int, int]]:
    return pairs.samples_of_update(number, global_batch_size=8, rank=0, num_processes=1)


def test_pairs_of_an_update_have_like_lengths(tmp_path: Path) -> None:
    pairs = pairs_of(CORPUS, tmp_path, seq_length=96)
    lengths = pairs.lengths(pairs.epoch(0))
    updates = [
        lengths[[pair for _, pair in whole_update(pairs, number)]] for number in range(pairs.updates_per_epoch(8))
    ]
    padding = 1 - sum(update.sum() for update in updates) / sum(len(update) * update.max() for update in updates)
    assert padding < 0.05
    assert np.corrcoef([update.mean() for update in updates], np.arange(len(updates)))[0, 1] < 0.5  # in no order


def test_a_corpus_smaller_than_a_batch_still_fills_it(tmp_path: Path) -> None:
    pairs = pairs_of([[3, 4], [5, 6, 7]], tmp_path)
    samples = pairs.samples_of_update(7, global_batch_size=64, rank=0, num_processes=1)
    assert len(samples) == 64
    assert {epoch for epoch, _ in samples} == {7}
