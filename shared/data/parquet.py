"""Parquet files that belong together: the columns of all of them, where one knows of a column only that it is empty."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def common_features(files: Sequence[Path]) -> Any:
    """The columns as `datasets.Features`; None = the library finds them by itself.

    It takes them from the first file, and cannot read the others where that has nulls alone in a column, whose type
    then is null.

    Args:
        files: Parquet.
    """
    import datasets
    import pyarrow.parquet

    schemas = [pyarrow.parquet.read_schema(file) for file in files]
    if len(files) == 1 or not any(_holds_null(field.type) for schema in schemas for field in schema):
        return None
    merged: dict[str, Any] = {}
    for schema in schemas:
        for name, feature in datasets.Features.from_arrow_schema(schema).items():
            merged[name] = _filled(merged.get(name), feature)
    return datasets.Features(merged)


def with_rows(files: Sequence[Path]) -> list[Path]:
    """The files that have a row, some programs write others too, which the library cannot read; all, if none has."""
    import pyarrow.parquet

    return [file for file in files if pyarrow.parquet.read_metadata(file).num_rows] or list(files)


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
