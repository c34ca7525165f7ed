"""Write the data of the tasks in this folder from the embedded samples.

python recipes/gpt/tasks/make_data.py
"""

import json
import random
from pathlib import Path

import pyarrow.parquet

HERE = Path(__file__).resolve().parent
SAMPLES = HERE.parents[2] / "shared" / "samples"
QUESTIONS, CHOICES = 500, 4
PIECES, CHARACTERS = 300, 400


def main() -> None:
    """Write wordnet_class.jsonl and prose.jsonl."""
    draw = random.Random(0)
    table = pyarrow.parquet.read_table(SAMPLES / "supersenses" / "test.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    names, rows = features["label"]["names"], table.to_pylist()
    questions = []
    for row in draw.sample(rows, QUESTIONS):
        right = names[row["label"]]
        choices = [right, *draw.sample([name for name in names if name != right], CHOICES - 1)]
        draw.shuffle(choices)
        questions.append({"definition": row["text"], "choices": choices, "label": choices.index(right)})
    write("wordnet_class.jsonl", questions)

    pieces = []
    for source in ("messages", "novels"):
        texts = pyarrow.parquet.read_table(SAMPLES / source / "eval.parquet")["text"].to_pylist()
        pieces += [text[at : at + CHARACTERS] for text in texts for at in range(0, len(text) - CHARACTERS, CHARACTERS)]
    write("prose.jsonl", [{"text": piece} for piece in draw.sample(pieces, PIECES)])


def write(name: str, rows: list[dict[str, object]]) -> None:
    """One JSON object a line."""
    (HERE / name).write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
