"""Cells are what is written; a row with more or fewer of them than the header is refused, and named."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.command_line import UsageError
from shared.data.csv_rows import read_csv

cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(cells, min_size=2, max_size=2), min_size=1, max_size=6),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_the_library_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], encoding: str, ending: str
) -> None:
    csv.writer(text := io.StringIO(), lineterminator=ending).writerows([["a", "b"], *rows])
    file = tmp_path_factory.mktemp("csv") / "x.csv"
    file.write_bytes(text.getvalue().encode(encoding))
    assert [[cell or "" for cell in row.values()] for row in read_csv(file)] == rows


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_marks_in_tsv_are_those_of_a_spreadsheet_or_of_the_text(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.tsv", 'text\tlabel\n"hello there\tpos\nfoo\tneg\nbar"\tpos\n')
    assert [row["text"] for row in read_csv(plain)] == ['"hello there', "foo", 'bar"']
    gaps = write(tmp_path / "c.tsv", 'text\tlabel\n"x\ty\nz"\tw\n\t\n\t\n')
    assert [row["text"] for row in read_csv(gaps)] == ['"x', 'z"', None, None]
    quoted = write(tmp_path / "b.tsv", 'text\tlabel\n"two\nlines"\tpos\n"a ""b"""\tneg\n')
    assert [row["text"] for row in read_csv(quoted)] == ["two\nlines", 'a "b"']


def test_long_cells_and_empty_ones(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", f"\n  \ntext,label\n\n{'x' * 1_000_000},\n")
    assert list(read_csv(file)) == [{"text": "x" * 1_000_000, "label": None}]
    assert list(read_csv(write(tmp_path / "b.csv", ""))) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,b\n1,2\n\n1,2,3\n", r"2 cells in row 1, as in the header, got 3: \['1', '2', '3'\]"),
        ("a,b\n1\n", "2 cells in row 0, as in the header, got 1"),
        ("a,b,\n1,2,\n", "a name of its own in UTF-8 for each column, got"),
        ("a,a\n1,2\n", "a name of its own in UTF-8 for each column"),
        ('a,b\n"1,2\n', "a table, line 2"),
        (b"caf\xe9,b\n1,2\n", "a name of its own in UTF-8 for each column"),
        (b"a,b\ncaf\xe9,2\n", "text in UTF-8, row 0 has"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path: Path, content: str | bytes, words: str) -> None:
    file = write(tmp_path / "x.csv", content)
    with pytest.raises(UsageError, match=f"eval_data: '.*x.csv': expected {words}") as caught:
        list(read_csv(file, "eval_data"))
    assert "\n" not in str(caught.value)
