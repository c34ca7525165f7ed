"""Write answers/, questions with answers as `messages`, from the raw collections of WordNet and of prose.

    python shared/samples/make_answers.py FOLDER

FOLDER holds what make_wordnet.py and make_prose.py read. Five tasks, which the column `task` names:

* define: a word, its definition.
* name: a definition, its first word.
* kind: a word and its definition, the word of which it is a kind (the hypernym of WordNet).
* class: a definition, which of 24 kinds of thing it is of.
* summarise: a paragraph without its first sentence, and that sentence, which mostly says what it is about.

Words to define and to name are of the dictionary's documents, paragraphs of those of the prose, and the test split is
of what those hold out; of kind and class the splits are WordNet's own here. What a test question is about, word or
definition, is in no training question of any task.
"""

import random
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import make_prose
import make_wordnet
import pyarrow
import pyarrow.parquet

NUMBERS = {"test": 200, "train": 4000}  # of each task
CHARACTERS = (200, 700)  # of a paragraph to summarise, so that it fits into a row of 256 tokens
SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")
TITLE = re.compile(r"\b(Mr|Mrs|Dr|St|Messrs|Gen|Col|Capt)\.$")
TEXT = datasets.Value("string")


def main(raw: Path) -> None:
    """Convert the files of `raw` into Parquet files beside this script."""
    draw, asked = random.Random(0), set[str]()  # asked: what test questions are about
    for split, number in NUMBERS.items():
        rows, about = [], set[str]()
        for task, pairs in {**definitions(raw, split), **kinds(raw, split), **summaries(raw, split)}.items():
            fresh = {pair.question: pair for pair in reversed(pairs) if not asked & pair.subject}  # first meanings
            chosen = [fresh[question] for question in draw.sample(sorted(fresh), number)]
            rows += [row_of(task, pair) for pair in chosen]
            about.update(*(pair.subject for pair in chosen))
        asked |= about
        draw.shuffle(rows)
        write(split, rows)


class Pair(NamedTuple):
    """A question, its answer, and the word and the definition that it is about."""

    question: str
    answer: str
    subject: frozenset[str]


def definitions(raw: Path, split: str) -> dict[str, list[Pair]]:
    """Words to define and definitions to name, of other entries each."""
    pairs: dict[str, list[Pair]] = {"define": [], "name": []}
    for number, record in enumerate(make_wordnet.entries(raw)):
        if make_wordnet.is_held_out(number // make_wordnet.ENTRIES) == (split == "test"):
            word, definition = record["words"][0], record["definition"]
            subject = frozenset((word, definition))
            if number % 2:
                pairs["define"].append(Pair(f"What does {word} mean?", definition, subject))
            else:
                pairs["name"].append(Pair(f"Which word means: {definition}?", word, subject))
    return pairs


def kinds(raw: Path, split: str) -> dict[str, list[Pair]]:
    """Words and definitions, and of what they are a kind."""
    related = make_wordnet.rows_of(raw, "hypernym_pairs", split)
    classes = make_wordnet.rows_of(raw, "supersense", split)
    return {
        "kind": [
            Pair(
                f"{row['sentence1']}. What kind of thing is it?",
                row["sentence2"].partition(":")[0],
                frozenset(row["sentence1"].split(": ", 1)),
            )
            for row in related
            if row["label"] == 1
        ],
        "class": [
            Pair(f"{row['text']}. Which class is it of?", row["label"], frozenset([row["text"]])) for row in classes
        ],
    }


def summaries(raw: Path, split: str) -> dict[str, list[Pair]]:
    """Paragraphs without their first sentence, and that sentence."""
    pairs = []
    for record in make_prose.records(raw / "pd_prose.jsonl.xz"):
        if make_prose.is_held_out(record["id"]) != (split == "test"):
            continue
        for paragraph in record["paragraphs"]:
            first, *rest = SENTENCE_END.split(paragraph)
            while rest and TITLE.search(first):
                first = f"{first} {rest.pop(0)}"
            is_speech = '"' in paragraph
            if len(rest) > 1 and CHARACTERS[0] <= len(paragraph) <= CHARACTERS[1] and not is_speech:
                pairs.append(Pair(f"Summarise: {' '.join(rest)}", first, frozenset([first])))
    return {"summarise": pairs}


def row_of(task: str, pair: Pair) -> dict[str, Any]:
    """A row of the data set."""
    turns = (("user", pair.question), ("assistant", pair.answer))
    return {"task": task, "messages": [{"role": role, "content": content} for role, content in turns]}


def write(split: str, rows: list[dict[str, Any]]) -> None:
    """Write one split."""
    features = datasets.Features({"task": TEXT, "messages": datasets.List({"role": TEXT, "content": TEXT})})
    target = Path(__file__).parent / "answers" / f"{split}.parquet"
    target.parent.mkdir(exist_ok=True)
    table = pyarrow.Table.from_pylist([features.encode_example(row) for row in rows], schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, target, row_group_size=1024, compression="zstd", compression_level=19)
    sys.stdout.write(f"{target}: {len(rows)} rows, {target.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
