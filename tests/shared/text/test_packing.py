"""Packed rows: nothing lost, nothing twice, little wasted, and no document sees another."""

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.data.batches import IGNORED
from shared.text import packing
from shared.text.documents import open_texts
from shared.text.packing import MAX_WASTE, OPEN_ROWS, BestFitPacker, Piece, cut, fill_row, pack, pack_corpus
from shared.text.tokenization import encode
from shared.text.vocabulary import special_ids

LENGTHS = st.lists(st.integers(1, 90), max_size=60)
SEQ_LENGTHS = st.integers(1, 40)
MAX_WASTES = st.sampled_from([0.0, 0.02, 0.3, 1.0])


def ends(lengths: list[int]) -> list[int]:
    return list(itertools.accumulate(lengths))


def targets(rows: list[list[Piece]]) -> list[int]:
    return sorted(token for row in rows for start, length in row for token in range(start + 1, start + length + 1))


# ---------------------------------------------------------------------------------------------------------------------
# Which token goes where


@given(LENGTHS, SEQ_LENGTHS, MAX_WASTES)
def test_every_token_but_each_documents_first_is_a_target_once(
    lengths: list[int], seq_length: int, max_waste: float
) -> None:
    firsts = {0, *ends(lengths)}
    expected = [token for token in range(sum(lengths)) if token not in firsts]
    assert targets(list(pack(ends(lengths), seq_length, max_waste))) == expected


@given(LENGTHS, SEQ_LENGTHS, MAX_WASTES)
def test_rows_are_never_overfull_and_pieces_stay_in_their_document(
    lengths: list[int], seq_length: int, max_waste: float
) -> None:
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for row in pack(ends(lengths), seq_length, max_waste):
        assert 1 <= sum(length for _, length in row) <= seq_length
        for start, length in row:
            assert length >= 1
            assert document_of[start] == document_of[start + length]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=LENGTHS, seq_length=SEQ_LENGTHS, max_waste=MAX_WASTES, limit=st.integers(1, 5))
def test_only_so_many_rows_are_open_and_little_is_empty(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], seq_length: int, max_waste: float, limit: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(packing, "OPEN_ROWS", limit)
        packer, first, closed = BestFitPacker(seq_length, max_waste), 0, []
        for length in lengths:
            closed += packer.add((first, min(length, seq_length)))
            first += length
            rows = list(itertools.chain.from_iterable(packer.open_rows.values()))
            assert len(rows) == packer.num_open <= limit
        closed += packer.flush()
        assert packer.num_open == 0
    empty = [seq_length - sum(length for _, length in row) for row in closed]
    assert sum(empty[:-1]) <= max_waste * seq_length * len(closed)


def test_many_documents_keep_the_number_of_open_rows_bounded() -> None:
    packer = BestFitPacker(1000, 1.0)
    for _ in range(3 * OPEN_ROWS):
        packer.add((0, 501))  # no two fit together
        assert packer.num_open <= OPEN_ROWS


def test_a_piece_goes_to_the_fullest_row_that_has_room() -> None:
    packer = BestFitPacker(10, 0.0)
    assert [packer.add((at, length)) for at, length in enumerate([4, 7, 9])] == [[], [], []]
    assert packer.add((3, 3)) == [[(1, 7), (3, 3)]]
    assert packer.add((4, 1)) == [[(2, 9), (4, 1)]]
    assert packer.add((5, 10)) == [[(5, 10)]]
    assert list(packer.flush()) == [[(0, 4)]]


def test_open_rows_are_closed_fullest_first() -> None:
    packer = BestFitPacker(10, 1.0)
    for at, length in enumerate([6, 8, 7]):
        packer.add((at, length))
    assert list(packer.flush()) == [[(1, 8)], [(2, 7)], [(0, 6)]]


def test_pieces_are_cut_to_fill_rows_that_would_stay_too_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "OPEN_ROWS", 2)
    packer = BestFitPacker(10, 0.0)
    assert [packer.add(piece) for piece in ((0, 6), (100, 7))] == [[], []]
    assert packer.add((200, 8)) == [[(100, 7), (200, 3)]]  # the fullest row is filled, the rest goes on
    assert list(packer.flush()) == [[(0, 6), (203, 4)], [(207, 1)]]


def test_a_stated_share_may_stay_empty_before_a_piece_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "OPEN_ROWS", 1)
    packer = BestFitPacker(10, 0.1)
    assert [packer.add((at, 9)) for at in (0, 100, 200)] == [[], [[(0, 9)]], [[(100, 9)]]]
    assert packer.add((300, 2)) == [[(200, 9)]]
    assert packer.add((400, 9)) == [[(300, 2), (400, 8)]]  # 1 + 1 + 1 empty tokens of 30 are allowed, not 8 more


@pytest.mark.parametrize(
    ("length", "pieces"),
    [
        (1, []),
        (2, [(5, 1)]),
        (5, [(5, 4)]),
        (6, [(5, 4), (9, 1)]),
        (9, [(5, 4), (9, 4)]),
        (10, [(5, 4), (9, 4), (13, 1)]),
    ],
)
def test_a_document_is_cut_at_whole_rows(length: int, pieces: list[Piece]) -> None:
    assert list(cut(5, 5 + length, 4)) == pieces


# ---------------------------------------------------------------------------------------------------------------------
# Tensors of a row


@given(st.lists(st.integers(1, 12), max_size=6), st.integers(0, 7))
def test_labels_are_the_next_tokens_and_positions_restart(lengths: list[int], empty: int) -> None:
    seq_length, tokens = sum(lengths) + empty, np.arange(100, 200)
    stretches = [tokens[start : start + length + 1] for start, length in enumerate(lengths)]
    row = fill_row(stretches, seq_length, pad_token_id=7)
    assert {name: (values.dtype, values.shape) for name, values in row.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (np.int64, (seq_length,))
    )
    at = 0
    for stretch in stretches:
        piece = slice(at, at + len(stretch) - 1)
        assert row["input_ids"][piece].tolist() == stretch[:-1].tolist()
        assert row["labels"][piece].tolist() == stretch[1:].tolist()
        assert row["position_ids"][piece].tolist() == list(range(len(stretch) - 1))
        at = piece.stop
    assert row["input_ids"][at:].tolist() == [7] * empty
    assert row["labels"][at:].tolist() == [IGNORED] * empty
    assert row["position_ids"][at:].tolist() == list(range(empty))


def test_the_label_of_padding_is_the_one_that_torch_leaves_out() -> None:
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORED


# ---------------------------------------------------------------------------------------------------------------------
# A corpus


def test_rows_of_a_corpus_hold_all_of_it(tokenizer: Any, tmp_path: Path) -> None:
    texts = open_texts("prose_eval", config="", split="", text_column="text")
    options = {"seq_length": 256, "eval_fraction": 0.1, "cache_dir": tmp_path, "num_processes": 1}
    splits = pack_corpus(texts, tokenizer, **options)
    begin, end = special_ids(tokenizer)
    for rows in splits:
        samples = [rows.read(row) for row in range(len(rows))]
        inputs, labels = (np.concatenate([sample[name] for sample in samples]) for name in ("input_ids", "labels"))
        is_target = labels != IGNORED
        documents = np.split(rows.cache.tokens, rows.cache.ends)[:-1]
        assert (
            np.bincount(labels[is_target]).tolist() == np.bincount(np.concatenate([d[1:] for d in documents])).tolist()
        )
        assert (
            np.bincount(inputs[is_target]).tolist() == np.bincount(np.concatenate([d[:-1] for d in documents])).tolist()
        )
        assert np.sum(inputs[is_target] == begin) == np.sum(labels == end) == len(documents) > 0
        assert rows.cache.num_bytes > 0
    assert sum(len(rows.cache.ends) for rows in splits) == 25


def test_another_process_maps_the_rows_itself(tokenizer: Any, tmp_path: Path) -> None:
    texts = open_texts("prose_eval", config="", split="", text_column="text")
    options = {"seq_length": 64, "eval_fraction": 0.1, "cache_dir": tmp_path, "num_processes": 1}
    rows = pack_corpus(texts, tokenizer, **options)[0]
    message = pickle.dumps(rows)
    again = pickle.loads(message)
    assert len(message) < 1000
    assert (len(again), again.fingerprint) == (len(rows), rows.fingerprint)
    for row in (0, 1, len(rows) - 1):
        assert all(np.array_equal(again.read(row)[name], values) for name, values in rows.read(row).items())


def test_held_out_documents_are_cut_at_whole_rows_only(tokenizer: Any, tmp_path: Path) -> None:
    """Also where that leaves much empty: here nearly half of every row."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": "a" * 70 + str(n)}) + "\n" for n in range(40)))
    texts = open_texts(str(tmp_path / "data.jsonl"), config="", split="", text_column="text")
    options = {"seq_length": 0, "eval_fraction": 1.0, "cache_dir": tmp_path, "num_processes": 1}
    longest = int(np.diff(pack_corpus(texts, tokenizer, **{**options, "seq_length": 64})[1].cache.ends).max())
    for eval_fraction, is_whole in ((1.0, True), (0.0, False)):
        changed = {"seq_length": int(1.7 * longest), "eval_fraction": eval_fraction}
        train, held_out = pack_corpus(texts, tokenizer, **{**options, **changed})
        rows = held_out if is_whole else train
        assert len(train if is_whole else held_out) == 0
        assert (len(rows.pieces) == 40) == is_whole
        assert (len(rows) == 40) == is_whole


def test_an_empty_split_has_no_rows(tokenizer: Any, tmp_path: Path) -> None:
    texts = open_texts("prose_eval", config="", split="", text_column="text")
    options = {"seq_length": 64, "eval_fraction": 0.0, "cache_dir": tmp_path, "num_processes": 1}
    assert len(pack_corpus(texts, tokenizer, **options)[1]) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Waste


def waste(document_ends: np.ndarray, seq_length: int) -> float:
    """Share of the rows' tokens that is padding."""
    rows = list(pack(document_ends, seq_length, MAX_WASTE))
    return 1 - sum(length for row in rows for _, length in row) / (len(rows) * seq_length)


@pytest.mark.parametrize("seq_length", [256, 1024])
@pytest.mark.parametrize("data", ["prose_eval", pytest.param("prose", marks=pytest.mark.slow)])
def test_little_of_the_prose_s_rows_is_empty(data: str, seq_length: int, tokenizer: Any, tmp_path: Path) -> None:
    texts = open_texts(data, config="", split="", text_column="text")
    options = {"seq_length": seq_length, "eval_fraction": 0.0, "cache_dir": tmp_path, "num_processes": 2}
    ends_of_documents = pack_corpus(texts, tokenizer, **options)[0].cache.ends
    assert waste(ends_of_documents, seq_length) < (0.01 if data == "prose" else 0.03)


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.5, 0.8, 1.3])
def test_little_of_the_rows_of_web_pages_is_empty(spread: float) -> None:
    """The narrower, the more documents are a bit longer than half a row."""
    draw = np.random.default_rng(0)
    lengths = np.maximum(2, draw.lognormal(np.log(600) - spread**2 / 2, spread, 20_000).astype(int))
    assert abs(lengths.mean() - 600) < 36
    assert waste(np.cumsum(lengths), 1024) < 0.03


# ---------------------------------------------------------------------------------------------------------------------
# Documents in a row do not see each other

SIZES = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}


@pytest.mark.parametrize("architecture", ["nanochat", "llama", "gpt2"])
def test_logits_in_a_row_are_those_of_the_lone_document(architecture: str, tokenizer: Any, prose: list[str]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SIZES)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # at the default some heads are zero and see nothing
    ids = [
        encode(tokenizer.backend_tokenizer, text)[:length] for text, length in zip(prose, (20, 51, 33), strict=False)
    ]
    row = {name: torch.from_numpy(values)[None] for name, values in fill_row(ids, 128, 0).items()}
    packed = {"input_ids": row["input_ids"], "position_ids": row["position_ids"]}
    with torch.no_grad():
        logits = model(**packed, use_cache=False).logits[0]
        leaking = model(**packed, use_cache=False, attention_mask=torch.ones_like(row["input_ids"])).logits[0]
        at = 0
        for stretch in ids:
            alone = model(input_ids=torch.from_numpy(stretch[:-1])[None], use_cache=False).logits[0]
            of_row = slice(at, at + len(alone))
            torch.testing.assert_close(logits[of_row], alone, rtol=0, atol=1e-5)
            # What this test would see if documents did attend to each other.
            assert at == 0 or (leaking[of_row] - alone).abs().max() > 1e-2
            at = of_row.stop
