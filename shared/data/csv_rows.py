"""Rows of .csv and .tsv files, whose cells are texts, whatever they look like."""

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.command_line import UsageError, expect
from shared.data.text_lines import read_lines

_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how `read_lines` writes such bytes


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
    csv.field_size_limit(sys.maxsize)  # the library refuses texts of more than 131,072 characters
    is_tsv = ".tsv" in [suffix.lower() for suffix in file.suffixes]
    is_plain = is_tsv and _has_plain_lines(file)
    mark: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if is_plain else {}
    rows = csv.reader(read_lines(file), delimiter="\t" if is_tsv else ",", strict=True, **mark)
    header: list[str] = []
    try:
        header = next(rows, [])
        expect(
            len(set(header)) == len(header), field, str(file), f"columns of different names, got {', '.join(header)}"
        )
        for number, cells in enumerate(filter(None, rows)):
            expected = f"{len(header)} cells in row {number}, as in the header, got {len(cells)}: {cells}"
            expect(len(cells) == len(header), field, str(file), expected)
            odd = next(filter(_NOT_UTF8.search, cells), None)
            expect(odd is None, field, str(file), f"text in UTF-8, row {number} has {odd!r}")
            yield {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise UsageError(
            f"{field}: {str(file)!r}: expected cells with commas, line {rows.line_num}: {error}"
        ) from error


def _has_plain_lines(file: Path) -> bool:
    """Whether each line of a .tsv is a row by itself, of which quotation marks would make fewer."""
    lines = [line.rstrip("\r\n") for line in read_lines(file) if line.strip()]
    widths = {line.count("\t") for line in lines}
    try:
        quoted = sum(1 for row in csv.reader(read_lines(file), delimiter="\t", strict=True) if row)
    except csv.Error:  # a mark that ends nowhere, or before the cell does
        quoted = 0
    return len(widths) == 1 and quoted < len(lines)
