"""Files that know of a column only that it is empty have the type that others have."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from shared.data.parquet import with_rows


def write(file: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def nothing(kind: Any = None) -> Any:
    return pyarrow.array([None], kind or pyarrow.null())


def test_files_that_know_all_their_types_are_left_to_the_library(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, {"a": [1], "b": ["x"]}) for name in ("1.parquet", "2.parquet"))
    assert with_rows([first, second]) == ([first, second], None)
    alone = write(tmp_path / "3.parquet", {"a": nothing()})
    assert with_rows([alone]) == ([alone], None)
    empty = write(tmp_path / "4.parquet", {"a": nothing()[:0]})
    assert with_rows([empty, first]) == ([first], None)
    assert with_rows([empty]) == ([empty], None)


def test_types_are_those_of_the_files_that_know_them(tmp_path: Path) -> None:
    structs = [{"bytes": b"x", "path": None}]
    first = write(
        tmp_path / "1.parquet", {"a": nothing(), "image": structs, "tags": nothing(pyarrow.list_(pyarrow.null()))}
    )
    second = write(tmp_path / "2.parquet", {"a": ["x"], "image": [{"bytes": b"y", "path": "p"}], "tags": [["t"]]})
    for files in ([first, second], [second, first]):
        _, features = with_rows(files)
        assert features["a"] == datasets.Value("string")
        assert features["image"] == {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        assert features["tags"] == datasets.List(datasets.Value("string"))
        options = {"data_files": [str(file) for file in files], "features": features, "split": "train"}
        rows = list(datasets.load_dataset("parquet", **options))
        assert sorted((row["a"] or "", row["image"]["path"] or "") for row in rows) == [("", ""), ("x", "p")]
