"""Records in splits: formats, names of splits, and what cannot be read."""

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from shared.command_line import UsageError
from shared.text.tables import in_utf8, load_split, split_names, validation_split

ROWS = [{"text": f"text {number}", "number": number} for number in range(3)]


def write(file: Path) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif file.suffix in (".csv", ".tsv"):
        mark = {".csv": ",", ".tsv": "\t"}[file.suffix]
        file.write_text(
            "".join(mark.join(map(str, row)) + "\n" for row in [list(ROWS[0]), *(r.values() for r in ROWS)])
        )
    else:
        file.write_text(json.dumps(ROWS) if file.suffix == ".json" else lines)
    return file


def rows_of(name: str) -> list[dict[str, Any]]:
    """As they are read from a file of that name; cells are texts."""
    is_csv = Path(name).suffix in (".csv", ".tsv")
    return [{key: str(value) for key, value in row.items()} for row in ROWS] if is_csv else ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz"])
def test_a_file_of_any_format_has_train_alone(tmp_path: Path, name: str) -> None:
    data = str(write(tmp_path / name))
    assert split_names(data, "") == ["train"]
    assert load_split(data, "", "train").to_list() == rows_of(name)


def test_the_split_to_evaluate_on_is_found(tmp_path: Path) -> None:
    for name in ("train", "test", "dev-00000-of-00001"):
        write(tmp_path / f"{name}.jsonl")
    assert validation_split(str(tmp_path), "") == "validation"
    assert validation_split(str(tmp_path), "", "validation") == "test"
    assert validation_split(str(tmp_path / "train.jsonl"), "") == ""


def test_names_and_folders_of_any_kind_are_read(tmp_path: Path) -> None:
    """Brackets, blanks, links, names that tell no split, and a README, which is none of the records."""
    for name in ("a [v1]/b*c.jsonl", "a [v1]/train.jsonl", "elsewhere/x, y.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name)
    (tmp_path / "a [v1]" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a [v1]" / "README.md").write_text("about")
    data = str(tmp_path / "a [v1]")
    assert split_names(data, "") == ["train"]
    assert len(load_split(data, "", "train")) == 9


def test_a_split_is_read_without_the_others_and_cells_are_texts(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n007,01\nNA,1\n,None\n")
    (tmp_path / "test.csv").write_text("text,label\nx,\n")
    (tmp_path / "validation.csv").write_text('a "broken\nfile,,,\n')
    train = load_split(str(tmp_path), "", "train")
    assert train.to_list() == [
        {"text": "007", "label": "01"},
        {"text": "NA", "label": "1"},
        {"text": None, "label": "None"},
    ]
    assert load_split(str(tmp_path), "", "test").to_list() == [{"text": "x", "label": None}]
    (tmp_path / "test-un seen.csv").write_text("text,label\ny,1\n")
    assert split_names(str(tmp_path), "") == ["train", "validation", "test", "test-un seen"]
    assert load_split(str(tmp_path), "", "test-un seen").to_list() == [{"text": "y", "label": "1"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_a_mark_at_the_beginning_is_no_text(tmp_path: Path, name: str, ending: bytes) -> None:
    file = write(tmp_path / name)
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes().replace(b"\n", ending))
    assert load_split(str(file), "", "train").to_list() == rows_of(name)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.csv")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    cases = {str(tmp_path): "files of one format", str(tmp_path / "empty"): "a file, or a folder of files"}
    (tmp_path / "nothing.jsonl").write_text("")
    cases[str(tmp_path / "broken.jsonl")] = "files that can be read, broken.jsonl: .*JSON"
    cases[str(tmp_path / "nothing.jsonl")] = "files that can be read, nothing.jsonl: there is no record in them"
    for data, words in cases.items():
        with pytest.raises(UsageError, match=f"data: .*expected {words}") as caught:
            load_split(data, "", "train")
        assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "latin.jsonl"
    file.write_bytes('{"text": "café"}\n'.encode("latin-1"))
    expected = r"eval_data: .*latin.jsonl.*expected"
    with pytest.raises(UsageError, match=expected) as caught, in_utf8(str(file), "eval_data"):
        load_split(str(file), "", "train", "eval_data").to_list()
    assert "\n" not in str(caught.value)
