"""Reading texts: every format gives the same documents, every byte survives, every error is one clear message."""

import codecs
import gzip
import itertools
import json
import lzma
import os
import random
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import assume, given
from hypothesis import strategies as st

from shared.command_line import UsageError
from shared.data import left_out
from shared.data.hub_data import is_hub_id
from shared.fields import Corpus
from shared.text import file_contents
from shared.text.documents import (
    DOCUMENT_SEPARATOR,
    UNSEPARATED_CHARACTERS,
    Beginning,
    HubTexts,
    LocalTexts,
    entries_of,
    list_corpora,
    list_splits,
    open_corpora,
    open_held_out,
    open_texts,
    short_names,
)
from shared.text.packing import pack_corpus
from shared.text.tokenization import to_bytes, train_byte_level_bpe
from tests.hub_server import Hub, Repository, start_hub

ROOT = Path(__file__).parents[3]
DOCUMENTS = [
    "one\n",
    "two, in\n\ntwo paragraphs\n",
    "drei: äöü €, 四 and 🐈\n",
    '\tno words: \\ " { } \x0b\x85\u2028\n',
    "x" * 100_000 + "\n",
]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
COMPRESSED = [suffix for suffix in COMPRESS if suffix]


def texts(data: Path | str, *, config: str = "", split: str = "train", text_column: str = "") -> Any:
    return open_texts(str(data), config=config, split=split, text_column=text_column)


def error_of(data: Path | str, **options: str) -> str:
    """The message of the one `UsageError` that opening and reading `data` ends in."""
    with pytest.raises(UsageError) as raised:
        list(texts(data, **options))
    message = str(raised.value)
    assert "\n" not in message
    assert "expected" in message
    return message


def write(path: Path, content: bytes | str) -> Path:
    """Write a file whose suffixes say how; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))
    return path


def write_documents(path: Path, documents: list[str]) -> Path:
    if path.suffix == ".parquet":
        column = pyarrow.array(documents, pyarrow.string())
        pyarrow.parquet.write_table(pyarrow.table({"text": column, "n": range(len(documents))}), path)
        return path
    if ".txt" in path.name.lower():
        return write(path, f"{DOCUMENT_SEPARATOR}\n".join(documents))
    return write(path, "".join(json.dumps({"n": 1, "text": document}) + "\n" for document in documents))


# ---------------------------------------------------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize(
    "name", [f"data{kind}{suffix}" for kind in (".txt", ".jsonl") for suffix in COMPRESS] + ["data.parquet", "DATA.TXT"]
)
def test_every_format_and_compression_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    assert list(texts(write_documents(tmp_path / name, DOCUMENTS))) == DOCUMENTS


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_archives_of_several_parts_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    parts = COMPRESS[suffix](b"one\n") + COMPRESS[suffix](b"two\n")
    (tmp_path / f"a.txt{suffix}").write_bytes(parts)
    assert list(texts(tmp_path / f"a.txt{suffix}")) == ["one\ntwo\n"]


def test_a_folder_is_read_sorted_nested_and_without_hidden_and_unknown_files(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "third")
    write(tmp_path / "a" / "z.txt.gz", "second")
    write(tmp_path / "a" / "deep" / "a.txt", "first")
    write(tmp_path / "c.jsonl", '{"text": "fourth"}')
    for passed_over in (".hidden.txt", ".git/x.txt", "a/.cache/y.txt", "notes.md", "image.png", "archive.gz", "no"):
        write(tmp_path / passed_over, "not to be read")
    assert list(texts(tmp_path)) == ["first", "second", "third", "fourth"]
    assert [file.name for file in list_splits(tmp_path)["train"]] == ["a.txt", "z.txt.gz", "b.txt", "c.jsonl"]


def test_a_folder_with_splits_is_trained_on_one_and_evaluated_on_another(tmp_path: Path) -> None:
    for split, text in (("train", "one"), ("validation", "two"), ("test", "three")):
        write(tmp_path / f"{split}.jsonl", json.dumps({"text": text}))
    write(tmp_path / "README.txt", "about")
    assert list(texts(tmp_path)) == ["one"]
    assert list(texts(tmp_path, split="dev")) == ["two"]
    [held_out], fraction = open_held_out(Corpus(data=str(tmp_path)))
    assert (list(held_out), fraction) == (["two"], 0.0)
    [held_out], _ = open_held_out(Corpus(data="prose", eval_data=str(tmp_path), eval_split="test"))
    assert list(held_out) == ["three"]
    for data, split in ((f"{tmp_path}:split=validation", "train"), (str(tmp_path), "val")):
        [held_out], _ = open_held_out(Corpus(data=data, data_split=split))
        assert list(held_out) == ["three"]
    with pytest.raises(UsageError, match=r"^eval_split: 'dev_b': expected one of the splits of"):
        open_held_out(Corpus(data="prose", eval_data=str(tmp_path), eval_split="dev_b"))
    assert open_held_out(Corpus(data=f"{tmp_path},{tmp_path / 'test.jsonl'}"))[1] == 0.05
    expected = f"data_split: 'other': expected one of the splits of {str(tmp_path)!r}: train, validation, test"
    with pytest.raises(UsageError, match=f"^{re.escape(expected)}$"):
        texts(tmp_path, split="other")


def test_a_path_with_a_comma_is_one_corpus(tmp_path: Path) -> None:
    write(tmp_path / "a,b" / "x.txt", "one")
    assert [list(corpus) for corpus in open_corpora(str(tmp_path / "a,b"), config="", split="", text_column="")] == [
        ["one"]
    ]
    assert entries_of(f"{tmp_path}/a,b") == [f"{tmp_path}/a,b"]
    assert entries_of("a, b:config=x") == ["a", "b:config=x"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_byte_order_mark_tells_the_encoding_and_is_no_text(tmp_path: Path, encoding: str, suffix: str) -> None:
    mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    lines = "äöü 四\r\nand 🐈\n"
    records = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines.splitlines())
    for name, content in (("a.txt", lines), ("a.jsonl", records)):
        (tmp_path / f"{name}{suffix}").write_bytes(COMPRESS[suffix]((mark + content).encode(encoding)))
    assert "".join(texts(tmp_path / f"a.txt{suffix}")) == lines
    assert list(texts(tmp_path / f"a.jsonl{suffix}")) == lines.splitlines()


def test_other_encodings_without_a_mark_and_cut_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("some words".encode("utf-16-le"))
    expected = "expected text in UTF-8, or with a byte-order mark; it is full of zero bytes"
    assert error_of(tmp_path / "a.txt") == f"data: '{tmp_path}/a.txt': {expected}"
    (tmp_path / "b.txt").write_bytes("some words".encode("utf-16")[:-1])
    assert error_of(tmp_path / "b.txt").startswith(f"data: '{tmp_path}/b.txt': expected a readable file, got 'utf-16")


def test_a_category_is_text_and_an_odd_record_is_named(tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.array(["one", "two", None, "one"]).dictionary_encode(), "id": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(texts(tmp_path / "a.parquet")) == ["one", "two", "one"]
    write(tmp_path / "a.jsonl", '{"text": "one", "id": 1}\n{"text": 3, "id": 2}\n')
    expected = f"text_column: 'text': expected text in {tmp_path}/a.jsonl:2, got int"
    with pytest.raises(UsageError, match=f"^{re.escape(expected)}$"):
        list(texts(tmp_path / "a.jsonl"))


def test_a_folder_inside_a_hidden_folder_is_read(tmp_path: Path) -> None:
    write(tmp_path / ".cache" / "corpus" / "a.txt", "read")
    assert list(texts(tmp_path / ".cache" / "corpus")) == ["read"]


def test_the_column_is_found_in_the_first_file_that_has_records(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "b.jsonl.gz", "")
    write(tmp_path / "c.jsonl", '{"body": "two"}\n')
    assert list(texts(tmp_path)) == ["one", "two"]
    assert list(texts(tmp_path, text_column="body")) == ["one", "two"]


def test_several_corpora_and_the_embedded_samples() -> None:
    train, held_out = open_corpora("sample, sample_eval", config="", split="", text_column="text")
    assert (len(list(train)), len(list(held_out))) == (493 + 2630, 25 + 153)
    sources, fraction = open_held_out(Corpus())
    assert [(source.name, len(list(source))) for source in sources] == [("prose", 25), ("dictionary", 153)]
    assert fraction == 0
    [prose], fraction = open_held_out(Corpus(data="prose"))
    assert (prose.name, len(list(prose)), fraction) == ("prose", 25, 0)
    sources, fraction = open_held_out(Corpus(data="prose, dictionary"))
    assert ([source.name for source in sources], fraction) == (["prose", "dictionary"], 0)
    assert open_held_out(Corpus(data="prose,mine.txt")) == ([], 0.05)
    sources, _ = open_held_out(Corpus(data="books"))
    assert [(source.name, len(list(source))) for source in sources] == [("novels", 16), ("dictionary", 153)]


def test_one_of_several_corpora_may_have_columns_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "one", "note": "x"}\n')
    write(tmp_path / "b.jsonl", '{"body": "two", "note": "x"}\n')
    corpora = open_corpora(
        f"{tmp_path}/a.jsonl, {tmp_path}/b.jsonl:text_column=body", config="", split="", text_column="text"
    )
    assert [list(corpus) for corpus in corpora] == [["one"], ["two"]]
    shared = {"config": "c", "split": "train", "text_column": ""}
    assert list_corpora("a/b:config=d:split=train[:5%],e", **shared) == [
        {"data": "a/b", "config": "d", "split": "train[:5%]", "text_column": ""},
        {"data": "e", **shared},
    ]
    with pytest.raises(
        UsageError, match="data: 'a/b:column=c': expected NAME, or NAME:KEY=VALUE with config, split, tex"
    ):
        list_corpora("x, a/b:column=c", **shared)


def test_the_corpora_to_evaluate_on_are_those_that_are_named_or_none(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "b.txt", "two")
    corpora, fraction = open_held_out(Corpus(data="sample", eval_data=f"{tmp_path}/a.txt, {tmp_path}/b.txt"))
    assert ([list(corpus) for corpus in corpora], fraction) == ([["one"], ["two"]], 0)
    assert open_held_out(Corpus(data=str(tmp_path), eval_fraction=0.25)) == ([], 0.25)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["prose", "dictionary"], ["prose", "dictionary"]),
        (["a/text.jsonl.gz", "Salesforce/wikitext", "b/text.txt", "c/text"], ["text", "wikitext", "text_2", "text_3"]),
        (["x/a", "y/a", "z/a_2"], ["a", "a_2", "a_2_2"]),
        (["data/", "../.hidden"], ["data", "../.hidden"]),
    ],
)
def test_short_names_of_corpora_differ(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "text")
    assert list(texts("~/a.txt")) == ["text"]


# ---------------------------------------------------------------------------------------------------------------------
# .txt


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separator_lines_part_documents_and_are_no_text(tmp_path: Path, end: str) -> None:
    bar = DOCUMENT_SEPARATOR
    content = f"{bar}{end}one{end}one{end} {bar}\t{end}{bar}{end}say {bar} in a line{end}{bar}{end}{end}{bar}{end}last"
    assert list(texts(write(tmp_path / "a.txt", content))) == [
        f"one{end}one{end}",
        f"say {bar} in a line{end}",
        end,
        "last",
    ]


def test_a_separated_document_is_never_cut_however_long(tmp_path: Path) -> None:
    document = "a line of text\n" * 20_000
    assert len(document) > 4 * UNSEPARATED_CHARACTERS
    path = write_documents(tmp_path / "a.txt", [document, "short\n", document])
    assert list(texts(path)) == [document, "short\n", document]


@pytest.mark.parametrize("long_line", ["x" * UNSEPARATED_CHARACTERS + DOCUMENT_SEPARATOR, DOCUMENT_SEPARATOR * 9000])
def test_a_part_of_a_long_line_is_no_separator(tmp_path: Path, long_line: str) -> None:
    assert "".join(texts(write(tmp_path / "a.txt", f"{long_line}\nend"))) == f"{long_line}\nend"


def lines(number: int) -> Iterator[bytes]:
    draw = random.Random(0)
    for _ in range(number):
        yield draw.randbytes(draw.randint(0, 400)).replace(b"\n", b"") + draw.choice([b"\n", b"\r\n", b"\r", b"\n\n\n"])


@pytest.mark.parametrize(
    "content",
    [b"".join(lines(3000)), "äé€🐈".encode() * 50_000, b"\n" * 200_000, b"\xff\x80" * 100_000, b"no end of line"],
    ids=["random bytes", "one long line", "empty lines", "invalid", "short"],
)
@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_pieces_of_an_unseparated_file_are_together_the_file(tmp_path: Path, content: bytes, suffix: str) -> None:
    pieces = list(texts(write(tmp_path / f"a.txt{suffix}", content)))
    assert b"".join(to_bytes(piece) for piece in pieces) == content
    assert all(UNSEPARATED_CHARACTERS <= 2 * len(piece) < 4 * UNSEPARATED_CHARACTERS for piece in pieces[:-1])


def test_pieces_end_at_line_ends(tmp_path: Path) -> None:
    pieces = list(texts(write(tmp_path / "a.txt", "a line of text\r\n" * 20_000)))
    assert len(pieces) == 5
    assert all(piece.endswith("text\r\n") for piece in pieces)
    halves = list(texts(write(tmp_path / "c.txt", ("a line\n" * 5_000 + "\n") * 4)))
    assert [piece.count("line") for piece in halves] == [5_000] * 4


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_one_line_of_ten_megabytes_needs_the_memory_of_a_page(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.txt{suffix}", b"abcdefghi " * 1_000_000)
    next(iter(texts(path)))  # imports what it needs
    tracemalloc.start()
    size = sum(len(piece) for piece in texts(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 10_000_000
    assert peak < (10_000_000 if suffix == ".xz" else 1_500_000)  # 8 MiB is the dictionary of an .xz file


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


@given(st.binary(min_size=1, max_size=200))
def test_every_byte_of_a_text_file_is_kept(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    assume(content.count(0) * 8 < len(content) or not content)  # else it looks like UTF-16
    assume(not content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)))
    path = tmp_path_factory.getbasetemp() / "any_bytes.txt"
    path.write_bytes(content)
    assert b"".join(to_bytes(text) for text in LocalTexts("", (path,), "")) == content


def test_bytes_that_are_not_utf8_are_kept_in_every_format(tmp_path: Path) -> None:
    data = b"caf\xe9 \x00 \xff\xfe"
    escaped = data.decode("utf-8", "surrogateescape")
    write(tmp_path / "a.txt", data)
    write(tmp_path / "b.jsonl", b'{"text": "caf\xe9 \\u0000 \xff\xfe"}\n')
    invalid = pyarrow.array([data, b"ok"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), tmp_path / "c.parquet")
    assert list(texts(tmp_path)) == [escaped, escaped, escaped, "ok"]


def test_a_lone_surrogate_in_json_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", r'{"text": "a\ud83d\ude00b\ud83dc"}')
    assert list(texts(path)) == ["a\U0001f600b\ud83dc"]


def test_texts_that_are_none_or_empty_are_passed_over(tmp_path: Path) -> None:
    records = [{"id": "x", "text": None}, {"id": "y", "text": ""}, {"id": "z", "text": "read"}]
    write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, records)) + "\n \n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b.parquet")
    assert list(texts(tmp_path)) == ["read", "read"]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()])
def test_every_kind_of_parquet_text_is_read(tmp_path: Path, kind: pyarrow.DataType) -> None:
    table = pyarrow.table({"text": pyarrow.array(["a", None, "", "ß" * 5000], kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(texts(tmp_path / "a.parquet")) == ["a", "ß" * 5000]


# ---------------------------------------------------------------------------------------------------------------------
# Columns


def test_the_column_called_text_or_the_only_one_that_holds_text_is_read(tmp_path: Path) -> None:
    assert list(texts(write(tmp_path / "a.jsonl", '{"n": 1, "body": "only"}'))) == ["only"]
    both = write(tmp_path / "b.jsonl", '{"title": "t", "text": "this"}')
    assert list(texts(both)) == ["this"]
    assert list(texts(both, text_column="title")) == ["t"]


def test_columns_are_told_from_more_than_the_first_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"id": "x", "text": null}\n{"id": "y", "text": "this", "n": 3}\n')
    assert list(texts(path)) == ["this"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_wrong_column_names_those_there_are(tmp_path: Path, name: str) -> None:
    record = {"title": "t", "body": "b", "n": 1}
    if name == "a.jsonl":
        write(tmp_path / name, json.dumps(record))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / name)
    for asked in ("wrong", "n", ""):
        message = error_of(tmp_path / name, text_column=asked)
        assert message.startswith(f"text_column: {asked!r}: expected a column of")
        assert message.endswith("that holds text: title, body")


def test_no_column_that_holds_text(tmp_path: Path) -> None:
    message = error_of(write(tmp_path / "a.jsonl", '{"n": 1, "tags": ["a"]}'))
    assert message.endswith("holds text: none of its columns is, they are n, tags")


def test_a_later_file_without_the_column(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.parquet", ["one"])
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    assert f"{tmp_path}/b.parquet" in error_of(tmp_path)
    write(tmp_path / "b.parquet", write_documents(tmp_path / "a.parquet", ["one"]).read_bytes())
    write(tmp_path / "c.jsonl", '{"text": "a"}\n\n{"body": "b"}')
    assert error_of(tmp_path) == f"text_column: 'text': expected one of ['body'] in {tmp_path}/c.jsonl:3"
    write(tmp_path / "c.jsonl", '{"text": "a"}\n{"text": 5}')
    assert error_of(tmp_path) == f"text_column: 'text': expected text in {tmp_path}/c.jsonl:2, got int"


# ---------------------------------------------------------------------------------------------------------------------
# Nothing there


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.xz", "a.txt.zst", "a.parquet"])
def test_a_file_without_documents(tmp_path: Path, name: str) -> None:
    path = write_documents(tmp_path / name, [])
    assert error_of(path) == f"data: {str(path)!r}: expected at least one document, got none"


@pytest.mark.parametrize("content", ["", '{"text": null}', '{"text": ""}\n', "\n\n"])
def test_a_folder_without_documents(tmp_path: Path, content: str) -> None:
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.jsonl", content)
    assert error_of(tmp_path) == f"data: {str(tmp_path)!r}: expected at least one document, got none"


def test_an_empty_folder_and_a_file_of_an_unknown_kind(tmp_path: Path) -> None:
    assert error_of(tmp_path).startswith(f"data: {str(tmp_path)!r}: expected a folder with files that end in one of")
    for name in ("a.csv", "a.gz", "a.parquet.gz", "a", "txt"):
        path = write(tmp_path / name, "x")
        assert error_of(path).startswith(f"data: {str(path)!r}: expected a file that ends in one of .txt .jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_truncated_archive_is_noticed(tmp_path: Path, kind: str, suffix: str) -> None:
    draw = random.Random(0)
    path = write_documents(tmp_path / f"a{kind}{suffix}", [f"{draw.random()}\n" for _ in range(5000)])
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) - 9, len(whole) // 2):
        path.write_bytes(whole[:length])
        assert error_of(path).startswith(f"data: {str(path)!r}: expected a readable file, got ")


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_damaged_archive_is_noticed(tmp_path: Path, suffix: str) -> None:
    draw = random.Random(0)
    path = write_documents(tmp_path / f"a.txt{suffix}", [f"{draw.random()}\n" for _ in range(5000)])
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3 : len(whole) // 2] = draw.randbytes(len(whole) // 2 - len(whole) // 3)
    path.write_bytes(whole)
    assert error_of(path).startswith(f"data: {str(path)!r}: expected a readable file, got ")
    path.write_bytes(b"this was never compressed")
    assert error_of(path).startswith(f"data: {str(path)!r}: expected a readable file, got ")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "Expecting property name"),
        ("[1]", "list"),
        ("7", "int"),
        ('{"text": "a\x00"}', "Invalid control character"),
        ("[" * 100_000, "recursion"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "integer string conversion"),
    ],
)
def test_a_line_that_is_no_json_object_is_named(tmp_path: Path, line: str, found: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    message = error_of(path)
    assert message.startswith(f"data: {path}:3: expected a JSON object, got ")
    assert found in message


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", "this is text")
    assert error_of(path).startswith(f"data: {str(path)!r}: expected a Parquet file, got ")
    write_documents(path, [f"document {number} " * 50 for number in range(2000)])
    whole = bytearray(path.read_bytes())
    whole[500:5000] = bytes(4500)
    path.write_bytes(whole)
    assert error_of(path).startswith(f"data: {str(path)!r}: expected a readable file, got ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "secret")
    path.chmod(0)
    assert error_of(path).startswith(f"data: {str(path)!r}: expected a readable file, got ")


# ---------------------------------------------------------------------------------------------------------------------
# The reader as an iterator


def test_what_the_consumer_raises_is_not_taken_for_a_fault_of_the_file(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "a.jsonl.gz", DOCUMENTS)
    for error in (OSError("disk full"), EOFError("end"), ValueError("value")):
        with pytest.raises(type(error)) as raised:
            read_and_raise(path, error)
        assert raised.value is error


def read_and_raise(path: Path, error: Exception) -> None:
    for _ in texts(path):
        raise error


def test_a_reader_that_is_left_early_closes_its_file(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "a.txt.xz", DOCUMENTS)
    reader = iter(texts(path))
    next(reader)
    assert open_descriptors(path) == 1
    reader.close()
    assert open_descriptors(path) == 0


def open_descriptors(path: Path) -> int:
    links = Path("/proc/self/fd")
    return sum(os.path.realpath(link) == str(path.resolve()) for link in links.iterdir())


def test_a_fingerprint_changes_with_the_files_and_with_the_column(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "a", "title": "t"}')
    seen = {texts(tmp_path).fingerprint, texts(tmp_path, text_column="title").fingerprint}
    assert texts(tmp_path).fingerprint in seen
    write(tmp_path / "b.jsonl", '{"text": "b"}')
    seen.add(texts(tmp_path).fingerprint)
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    seen.add(texts(tmp_path).fingerprint)
    write(tmp_path / "c.jsonl", '{"text": "bb"}')
    seen.add(texts(tmp_path).fingerprint)
    write(tmp_path / "c.jsonl", '{"text": "cc"}')
    seen.add(texts(tmp_path).fingerprint)
    assert len(seen) == 6


@pytest.mark.parametrize("is_large", [False, True])
def test_a_fingerprint_is_that_of_a_copy_elsewhere_whenever_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    if is_large:
        monkeypatch.setattr(file_contents, "_WHOLE", 3)
        monkeypatch.setattr(file_contents, "_BLOCK", 16)
    content = "".join(f'{{"text": "{number:06}"}}\n' for number in range(5_000))  # 100 KB
    first = texts(write(tmp_path / "a" / "x.jsonl", content)).fingerprint
    copy = write(tmp_path / "b" / "x.jsonl", content)
    os.utime(copy, ns=(1, 1))
    assert texts(copy).fingerprint == first
    for changed in (content.replace("000000", "999999"), content.replace("004999", "999999"), content + "\n"):
        assert texts(write(tmp_path / "c" / "x.jsonl", changed)).fingerprint != first


def test_empty_documents_are_counted_for_each_split_and_again_where_tokens_are_there(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.jsonl", '{"text": "a b"}\n{"text": ""}\n{"text": null}\n')
    write(tmp_path / "data" / "test.jsonl", '{"text": "a"}\n{"text": ""}\n')
    tokenizer = train_byte_level_bpe(["a b"], 300, 8)
    options = {"seq_length": 8, "eval_fraction": 1.0, "cache_dir": tmp_path / "cache", "num_processes": 1}
    for _ in range(2):
        left_out.forget()
        for split in ("train", "test"):
            pack_corpus(texts(tmp_path / "data", split=split), tokenizer, **options)
        assert left_out.counts() == {"empty_documents": 3}


def test_a_column_of_nulls_is_no_text_beside_one_that_is(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "notes": pyarrow.nulls(1)}), tmp_path / "a.parquet")
    assert list(texts(tmp_path)) == ["a"]


# ---------------------------------------------------------------------------------------------------------------------
# The Hub

PATHS = [
    "",
    "./a",
    "../a",
    "/a/b",
    "a/b/c",
    "a//b",
    "a/",
    "~/a",
    ".",
    "..",
    "a/..",
    "a.txt",
    "b/a.JSONL.GZ",
    "a.tar",
    "b/a.jpg",
    "a b",
    "a\\b",
]


@pytest.mark.parametrize("data", PATHS)
def test_what_looks_like_a_path_is_never_taken_for_a_hub_id(data: str) -> None:
    assert not is_hub_id(data)


@pytest.mark.parametrize("data", ["", "./nothing", "a/b/c", "nothing.txt", "nothing/a.parquet", "~nobody/a"])
def test_a_path_that_is_not_there(data: str) -> None:
    expected = f"data: {data!r}: expected embedded data, a file or folder that exists, or a Hub data set id"
    assert error_of(data) == expected


@pytest.mark.parametrize("data", ["wikitext", "Salesforce/wikitext", "allenai/dolma_v1.6-sample"])
def test_a_hub_id_that_cannot_be_had_offline(data: str) -> None:
    assert is_hub_id(data)
    message = error_of(data)
    assert message.startswith(f"data: {data!r}: expected a file or folder that exists, or a Hub data set that can be")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = start_hub()
    parquet = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["c", None, "", "d"], "n": range(4)}), parquet)
    card = "configs:\n- config_name: lines\n  data_files: lines/*.jsonl\n- config_name: more\n  data_files: more.jsonl"
    lines = {
        "README.md": f"---\n{card}\n---\n".encode(),
        "lines/a.jsonl": b'{"text": null, "title": "x"}\n{"text": "a", "title": "y"}\n',
        "lines/b.jsonl": b'{"text": "b", "title": "z"}\n',
        "more.jsonl": b'{"text": "e"}',
    }
    for name, files in (("lines", lines), ("table", {"data/train.parquet": parquet.getvalue().to_pybytes()})):
        repository = server.repositories["datasets", f"tester/{name}"] = Repository(private=False)
        repository.commit(files, "files")
    yield server
    server.stop()


READ_FROM_HUB = """
import json, sys
from shared.command_line import UsageError
from shared.text.documents import open_texts
from shared.text.streaming import open_shards

answers = sys.stdout
sys.stdout = sys.stderr
for line in sys.stdin:
    data, streaming, config, split, column = json.loads(line)
    options = {"config": config, "split": split, "text_column": column}
    try:
        parts = open_shards(data, **options) if streaming else [open_texts(data, **options)]
        found = [list(part) for part in parts], [part.fingerprint for part in parts]
    except UsageError as error:
        found = str(error)
    print(json.dumps(found), file=answers, flush=True)
"""
Read = Callable[..., Any]


@pytest.fixture(scope="module")
def read(hub: Hub) -> Iterator[Read]:
    """What `open_texts` (`open_shards` if `streaming`) finds: documents and fingerprints, or the message.

    It runs in a process of its own, since huggingface_hub reads its settings when it is imported.
    """
    environment = {key: value for key, value in hub.environment().items() if key != "HF_HUB_OFFLINE"}
    command, pipe = [sys.executable, "-c", READ_FROM_HUB], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=ROOT) as child:

        def ask(data: str, streaming: bool, config: str = "", split: str = "train", text_column: str = "") -> Any:
            child.stdin.write(json.dumps([data, streaming, config, split, text_column]) + "\n")
            child.stdin.flush()
            return json.loads(child.stdout.readline())

        yield ask
        child.stdin.close()


def test_a_hub_data_set_gives_the_same_documents_downloaded_and_streamed(read: Read) -> None:
    lines, streamed_lines = (read("tester/lines", streaming, "lines") for streaming in (False, True))
    titles, streamed_titles = (
        read("tester/lines", streaming, "lines", "train", "title") for streaming in (False, True)
    )
    more, streamed_more = (read("tester/lines", streaming, "more") for streaming in (False, True))
    table, streamed_table = (read("tester/table", streaming) for streaming in (False, True))
    assert (lines[0], streamed_lines[0]) == ([["a", "b"]], [["a"], ["b"]])
    assert (table[0], streamed_table[0]) == ([["c", "d"]], [["c", "d"]])
    assert (titles[0], streamed_titles[0]) == ([["x", "y", "z"]], [["x", "y"], ["z"]])
    assert (more[0], streamed_more[0]) == ([["e"]], [["e"]])
    assert len({part for found in (lines, titles, more, table) for part in found[1]}) == 4
    assert len({part for found in (streamed_lines, streamed_titles, streamed_more) for part in found[1]}) == 5


def test_a_streamed_data_set_has_another_fingerprint_after_a_commit(hub: Hub, read: Read) -> None:
    repository = hub.repositories["datasets", "tester/lines"]
    before = read("tester/lines", True, "lines")
    assert read("tester/lines", True, "lines") == before
    newest = dict(repository.commits[repository.head])
    repository.commit(newest | {"lines/b.jsonl": b'{"text": "new", "title": "z"}\n'}, "changed")
    after = read("tester/lines", True, "lines")
    repository.commit(newest, "as it was")
    assert after[0] == [["a"], ["new"]]
    assert not set(before[1]) & set(after[1])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("config", "split", "text_column", "names"),
    [
        ("", "train", "", ["lines", "more"]),
        ("none", "train", "", ["lines", "more"]),
        ("lines", "test", "", ["train"]),
        ("lines", "train", "n", ["text", "title"]),
    ],
)
def test_what_is_wrong_with_a_hub_data_set_is_said(
    read: Read, streaming: bool, config: str, split: str, text_column: str, names: list[str]
) -> None:
    message = read("tester/lines", streaming, config, split, text_column)
    assert isinstance(message, str)
    assert "\n" not in message
    assert "expected" in message
    assert all(name in message for name in names), message


@pytest.mark.parametrize("world_size", [1, 3, 9])
def test_the_shares_of_tasks_are_all_documents_in_their_order(tmp_path: Path, world_size: int) -> None:
    import datasets

    for number in range(5):
        write_documents(tmp_path / f"{number}.jsonl", [f"{number} {document}" for document in DOCUMENTS[: number + 1]])
    local = texts(tmp_path)
    hub = HubTexts("name", datasets.Dataset.from_dict({"text": list(local)}), "text")
    for corpus in (local, hub):
        shares = [list(corpus.share(rank, world_size)) for rank in range(world_size)]
        assert [document for share in shares for document in share] == list(local)
    assert sum(map(bool, shares)) == world_size


@pytest.mark.parametrize("characters", [1, 1000, 100_000])
def test_the_beginning_of_a_corpus_is_exactly_as_long_as_asked(characters: int) -> None:
    whole = open_texts("prose", config="", split="", text_column="text")
    beginning = Beginning(whole, characters)
    assert "".join(beginning) == "".join(itertools.islice(whole, 20))[:characters]
    assert len({whole.fingerprint, beginning.fingerprint, Beginning(whole, characters + 1).fingerprint}) == 3


def test_the_beginning_of_a_corpus_reads_no_further() -> None:
    class Endless:
        fingerprint = "endless"

        def __iter__(self) -> Iterator[str]:
            return itertools.cycle(["abc", "defgh"])

    assert list(Beginning(Endless(), 10)) == ["abc", "defgh", "ab"]
