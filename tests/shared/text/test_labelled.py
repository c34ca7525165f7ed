"""Labelled texts from every kind of file, the same from each, and what is wrong with them in one line."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from shared.command_line import UsageError
from shared.text.labelled import LabelledTexts, few_of_each_class, hold_out, open_labelled

ROWS = [{"text": f"text {number}", "label": ["b", "a", "c"][number % 3]} for number in range(9)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(data: Path | str, **options: Any) -> LabelledTexts:
    usual: dict[str, Any] = {"config": "", "split": "train", "columns": ("text",), "label_column": "label"}
    return open_labelled(str(data), **{**usual, "label_kind": "auto", "like": None, **options})


# -- formats -----------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    write(tmp_path / "one.jsonl", ROWS)
    table.to_csv(tmp_path / "one.csv", index=False)
    table.to_csv(tmp_path / "one.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "one.parquet")
    (tmp_path / "two.json").write_text(json.dumps(ROWS))
    with gzip.open(tmp_path / "three.jsonl.gz", "wt") as file:
        file.write((tmp_path / "one.jsonl").read_text())
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder" / "train-00000-of-00001.parquet")
    found = [opened(path) for path in (*sorted(tmp_path.glob("*.*")), tmp_path / "folder")]
    assert len(found) == 7
    for samples in found:
        assert samples.problem == "classes"
        assert samples.class_names == ("a", "b", "c")
        assert list(samples.texts) == [row["text"] for row in ROWS]
        assert [samples.class_names[label] for label in samples.labels] == [row["label"] for row in ROWS]
    assert len({samples.fingerprint() for samples in found}) == 1


def test_labels_are_classes_numbers_or_tags(tmp_path: Path) -> None:
    rows = [{"text": "a b", "words": ["a", "b"], "stars": n, "score": n / 2, "tags": ["O", "B-X"]} for n in (1, 10, 2)]
    path = write(tmp_path / "data.jsonl", rows)
    stars = opened(path, label_column="stars")
    assert (stars.problem, stars.class_names, stars.labels.tolist()) == ("classes", ("1", "2", "10"), [0, 2, 1])
    score = opened(path, label_column="score")
    assert (score.problem, score.class_names, score.labels.tolist()) == ("numbers", (), [0.5, 5.0, 1.0])
    tags = opened(path, label_column="tags", columns=("words",))
    assert (tags.problem, tags.class_names, tags.labels) == ("tags", ("B-X", "O"), [[1, 0]] * 3)
    assert tags.subset(np.array([1])).texts == [["a", "b"]]


def test_classes_of_another_split_have_the_numbers_of_the_training_data(tmp_path: Path) -> None:
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    other = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])})
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list([{"text": "x", "label": n} for n in (0, 1)], features=names).to_parquet(
        tmp_path / "data" / "train.parquet"
    )
    datasets.Dataset.from_list([{"text": "x", "label": n} for n in (0, 1)], features=other).to_parquet(
        tmp_path / "eval.parquet"
    )
    train = opened(tmp_path / "data")
    assert opened(tmp_path / "eval.parquet", like=train).labels.tolist() == [1, 0]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("labels", "kind", "expected"),
    [
        (["01", "1", "2"], "auto", ("01", "1", "2")),
        (["NA", "None", "yes"], "auto", ("NA", "None", "yes")),
        (["3", "10", "-1"], "auto", ("-1", "3", "10")),
        (["0.5", "3", "1e-2"], "auto", [0.5, 3.0, 0.01]),
        (["1", "2", "3"], "numbers", [1.0, 2.0, 3.0]),
        (["0.5", "2,5", "high"], "classes", ("0.5", "2,5", "high")),
        (["1.0", "2.0", "1.0"], "classes", ("1.0", "2.0")),
        (["0.5", "high", "1.5"], "auto", "numbers alone, as ['0.5'] is, or label_kind classes; row 1 in the split"),
        (["2,5", "3,5", "4,5"], "auto", "numbers alone, as ['2,5'] is, or label_kind classes; row 0 in the split"),
        (["0.5", "high", "1.5"], "numbers", "a finite number in every row, row 1 in the split"),
        (["a", "", "b"], "classes", "a label in every row, row 1 in the split"),
    ],
)
def test_labels_that_are_texts_are_what_all_of_them_look_like_or_what_is_asked_for(
    tmp_path: Path, form: str, labels: list[str], kind: str, expected: Any
) -> None:
    path = tmp_path / f"data.{form}"
    cells = [f'"{label}"' if label else "" for label in labels]
    if form == "csv":
        path.write_text("text,label\n" + "".join(f"x,{cell}\n" for cell in cells))
    else:
        write(path, [{"text": "x", "label": label or None} for label in labels])
    if isinstance(expected, str):
        with pytest.raises(UsageError) as caught:
            opened(path, label_kind=kind)
        assert str(caught.value).startswith(f"label_column: 'label': expected {expected}")
        return
    found = opened(path, label_kind=kind)
    if isinstance(expected, tuple):
        assert found.class_names == expected
        assert [found.class_names[label] for label in found.labels] == labels
    else:
        assert found.labels.tolist() == pytest.approx(expected)


def test_labels_of_evaluation_are_read_as_those_of_training(tmp_path: Path) -> None:
    numbers = opened(write(tmp_path / "train.jsonl", [{"text": "x", "label": 0.5}]))
    whole = opened(write(tmp_path / "eval.jsonl", [{"text": "x", "label": 2}, {"text": "x", "label": 3}]), like=numbers)
    assert (whole.problem, whole.labels.tolist()) == ("numbers", [2.0, 3.0])
    (tmp_path / "gap.csv").write_text("text,label\nx,1\nx,\nx,2\n")
    (tmp_path / "mixed.jsonl").write_text('{"text": "x", "label": 0}\n{"text": "x", "label": "one"}\n')
    for name, expected in {
        "gap.csv": "expected a label in every row, row 1",
        "mixed.jsonl": "expected names alone or numbers alone, or label_kind classes or numbers; row 0",
    }.items():
        with pytest.raises(UsageError, match=expected):
            opened(tmp_path / name)
    several = write(tmp_path / "several.jsonl", [{"text": "x y", "label": ["a", "b"]}])
    with pytest.raises(UsageError, match="label_column: 'label': expected one label for each text, or with them a"):
        opened(several)


# -- choosing ----------------------------------------------------------------------------------------------------------


def samples_of(labels: list[int]) -> LabelledTexts:
    names = tuple(str(label) for label in range(max(labels) + 1))
    return LabelledTexts(
        "classes", [str(n) for n in range(len(labels))], None, np.array(labels), names, np.arange(len(labels))
    )


def test_few_labels_keep_their_texts() -> None:
    samples = samples_of([0, 1, 2] * 9)
    chosen = few_of_each_class(samples, 2, 0)
    assert len(chosen) == 6
    assert [samples.labels[int(text)] for text in chosen.texts] == chosen.labels.tolist()


def test_a_share_of_each_class_is_held_out() -> None:
    train, held_out = hold_out(samples_of([0] * 40 + [1] * 20), 0.1)
    assert np.bincount(held_out.labels).tolist() == [4, 2]
    assert not set(train.texts) & set(held_out.texts)
    assert [str(row) for row in held_out.rows] == list(held_out.texts)
    assert len(train) + len(held_out) == 60
    train, held_out = hold_out(samples_of([0, 0, 1, 1, 1, 2]), 0.2)
    assert [np.bincount(side.labels, minlength=3).tolist() for side in (train, held_out)] == [[1, 2, 1], [1, 1, 0]]


# -- what is wrong -----------------------------------------------------------------------------------------------------


def test_bad_data_gets_one_line(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", ROWS)
    train = opened(good)
    none = write(tmp_path / "none.jsonl", [*ROWS, {"text": "x", "label": None}])
    pair = write(tmp_path / "pair.jsonl", [{**ROWS[0], "other": "y"}, {**ROWS[1], "other": None}])
    lone = write(tmp_path / "lone.jsonl", [{"text": "x", "label": "a"}] * 3)
    unseen = write(tmp_path / "unseen.jsonl", [{"text": "x", "label": "d"}])
    numbers = write(tmp_path / "numbers.jsonl", [{"text": "x", "label": 0.5}, {"text": "x", "label": None}])
    short = write(tmp_path / "short.jsonl", [{"text": ["a", "b"], "label": ["O"]}])
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed" / "train.jsonl", ROWS)
    (tmp_path / "mixed" / "test.csv").write_text("text,label\nx,a\n")
    empty = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.Dataset.from_list([{"text": "x", "label": 0}, {"text": "x", "label": 1}], features=empty).to_parquet(
        tmp_path / "empty.parquet"
    )
    hidden = datasets.Dataset.from_dict({"text": ["x"], "label": [-1]}, features=empty)
    hidden.to_parquet(tmp_path / "hidden.parquet")
    cases: list[tuple[str, Path | str, dict[str, Any]]] = [
        ("data: '/no/such.csv': expected", "/no/such.csv", {}),
        ("expected files that can be read", tmp_path / "broken.jsonl", {}),
        ("expected files of one format", tmp_path / "mixed", {}),
        ("split: 'test': expected one of the splits of", good, {"split": "test"}),
        ("text_column: 'body': expected a column of", good, {"columns": ("body",)}),
        ("text_pair_column: 'other': expected a column of", good, {"columns": ("text", "other")}),
        (
            "text_pair_column: 'other': expected a text in every row, row 1 has None",
            pair,
            {"columns": ("text", "other")},
        ),
        ("label_column: 'stars': expected a column of", good, {"label_column": "stars"}),
        ("expected a label in every row, row 9", none, {}),
        ("row 0 in the split train of", unseen, {"like": train}),
        ("expected a label in every row, row 0 in the split train of", tmp_path / "hidden.parquet", {"like": train}),
        ("expected two classes at least", lone, {}),
        ("expected a sample of every class", tmp_path / "empty.parquet", {}),
        ("expected a label in every row, row 1", numbers, {}),
        ("expected a label for each of the 2 words of row 0", short, {}),
        (
            "text_column: 'n': expected a text in every row",
            write(tmp_path / "n.jsonl", [{**ROWS[0], "n": 1}] * 2),
            {"columns": ("n",)},
        ),
    ]
    for message, data, options in cases:
        with pytest.raises(UsageError) as caught:
            opened(data, **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
