"""Rows of .csv and .tsv files, whose cells are texts, whatever they look like."""

import csv
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.command_line import UsageError, expect
from shared.data.text_lines import read_lines

_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how `read_lines` writes such bytes
_LONGEST_CELL = 2**31 - 1  # characters; the library's 131,072 are too few for texts


def read_csv(file: Path, field: str = "data") -> Iterator[dict[str, str | None]]:
    """Each row by the names of the header, None for an empty cell; blank lines are passed over.

    Cells of a .csv may be in quotation marks (RFC 4180). Those of a .tsv may be too, as spreadsheets write them, unless
    that would join lines that have as many cells as the header each, of texts that begin with such a mark.

    Args:
        file: maybe compressed, in an encoding that `read_lines` knows.
        field: that names it, for the message.

    Raises:
        UsageError: it cannot be read, or a row has another number of cells than the header; it names the row, from 0.
    """
    csv.field_size_limit(_LONGEST_CELL)
    is_tsv = ".tsv" in [suffix.lower() for suffix in file.suffixes]
    options: dict[str, Any] = {"delimiter": "\t" if is_tsv else ",", "strict": True}
    if is_tsv and _has_plain_lines(file, field):
        options["quoting"] = csv.QUOTE_NONE
    rows = csv.reader(read_lines(file, field=field), **options)
    there = (cells for cells in rows if len(cells) > 1 or "".join(cells).strip())
    try:
        header = next(there, [])
        is_right = all(header) and len(set(header)) == len(header) and not any(map(_NOT_UTF8.search, header))
        expect(is_right, field, str(file), f"a name of its own in UTF-8 for each column, got {header}")
        for number, cells in enumerate(there):
            expected = f"{len(header)} cells in row {number}, as in the header, got {len(cells)}: {reprlib.repr(cells)}"
            expect(len(cells) == len(header), field, str(file), expected)
            odd = next(filter(_NOT_UTF8.search, cells), None)
            expect(odd is None, field, str(file), f"text in UTF-8, row {number} has {reprlib.repr(odd)}")
            yield {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise UsageError(f"{field}: {str(file)!r}: expected a table, line {rows.line_num}: {error}") from error


def _has_plain_lines(file: Path, field: str) -> bool:
    """Whether each line of a .tsv is a row by itself, of which quotation marks would make fewer."""
    widths: set[int] = set()
    num_lines = num_quoted = 0
    for line in read_lines(file, field=field):
        if line.strip("\r\n"):
            widths.add(line.count("\t"))
            num_lines += 1
    try:
        num_quoted = sum(1 for row in csv.reader(read_lines(file, field=field), delimiter="\t", strict=True) if row)
    except csv.Error:  # a mark that ends nowhere, or before the cell does
        num_quoted = 0
    return len(widths) == 1 and num_quoted < num_lines
