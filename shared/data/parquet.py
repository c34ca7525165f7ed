"""Parquet files that belong together: the columns of all of them, where one knows of a column only that it is empty."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def with_rows(files: Sequence[Path]) -> tuple[list[Path], Any]:
    """The files that have a row (all, if none has), and their columns; None = the library finds these by itself.

    It cannot read a file without rows, which some programs write. It takes the columns from the first file, and cannot
    read the others where that has nulls alone in a column, whose type then is null.

    Args:
        files: Parquet.
    """
    import datasets
    import pyarrow.parquet

    known = {file: pyarrow.parquet.read_metadata(file) for file in files}
    kept = [file for file in files if known[file].num_rows] or list(files)
    schemas = [known[file].schema.to_arrow_schema() for file in kept] if len(kept) > 1 else []
    if not any(_holds_null(field.type) for schema in schemas for field in schema):
        return kept, None
    merged: dict[str, Any] = {}
    for schema in map(pyarrow.parquet.read_schema, kept):  # with what the library wrote of its own types
        for name, feature in datasets.Features.from_arrow_schema(schema).items():
            merged[name] = _filled(merged.get(name), feature)
    return kept, datasets.Features(merged)


def _holds_null(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_null(kind) or any(_holds_null(kind.field(index).type) for index in range(kind.num_fields))


def _filled(known: Any, other: Any) -> Any:
    """The first of two types of a column, or the second where that knows more."""
    if known is None or getattr(known, "dtype", "") == "null":
        return other
    if isinstance(known, dict) and isinstance(other, dict):
        return {name: _filled(known.get(name), other.get(name)) for name in known | other}
    inner = getattr(known, "feature", None)  # of lists
    return type(known)(_filled(inner, other.feature)) if inner is not None and hasattr(other, "feature") else known
