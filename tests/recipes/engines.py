"""Which page was tried on which engine, and with what: two processes must give what one gives. README has the table.

python -m tests.recipes.engines        # after a case came or went
"""

from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- engines -->\n", "<!-- /engines -->"
COLUMNS = {
    "multi_cpu": "DDP",
    "fsdp2": "FSDP2",
    "deepspeed_zero1": "ZeRO-1",
    "deepspeed_zero2": "ZeRO-2",
    "deepspeed_zero3": "ZeRO-3",
    "deepspeed_zero3_offload": "ZeRO-3, all in CPU memory",
}
# Of what a page is trained with; fine-tuning trains by AdamW but for GPT's whole model.
WORDS = {
    "muon": "Muon",
    "unclipped_muon": "Muon (`--max_grad_norm 0`)",
    "adamw": "AdamW",
    "lamb": "LAMB",
    "ema": "all",
    "whole": "Muon",
    "adapter": "adapter",
    "all": "all",
    "classes": "classes",
    "tags": "tags of words",
}
_AVERAGED = {engine: ["ema"] for engine in ("multi_cpu", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")}
# Page -> engine of accelerate_configs/ -> kinds.
TRIED: dict[str, dict[str, list[str]]] = {
    "bert/pretrain.py": {
        "multi_cpu": ["muon", "adamw", "lamb"],
        "fsdp2": ["muon", "adamw", "lamb"],
        "deepspeed_zero2": ["adamw", "unclipped_muon"],
        "deepspeed_zero3": ["adamw"],
    },
    "bert/finetune.py": {
        "multi_cpu": ["tags"],
        "fsdp2": ["classes"],
        "deepspeed_zero2": ["classes"],
        "deepspeed_zero3": ["classes"],
    },
    "gpt/pretrain.py": {
        "multi_cpu": ["muon", "adamw"],
        "fsdp2": ["muon", "adamw"],
        "deepspeed_zero1": ["adamw", "unclipped_muon"],
        "deepspeed_zero2": ["adamw", "unclipped_muon"],
        "deepspeed_zero3": ["adamw", "unclipped_muon"],
        "deepspeed_zero3_offload": ["adamw"],
    },
    "gpt/finetune.py": {
        "multi_cpu": ["whole"],
        "fsdp2": ["whole", "adapter"],
        "deepspeed_zero2": ["adamw"],
        "deepspeed_zero3": ["adamw", "adapter"],
    },
    "resnet/pretrain.py": _AVERAGED,
    "resnet/pretrain_rsb.py": {"multi_cpu": ["lamb"], "fsdp2": ["lamb"]},
    "resnet/finetune.py": {engine: ["all"] for engine in ("multi_cpu", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")},
    "text_to_image/train_vae.py": _AVERAGED,
    "text_to_image/pretrain.py": _AVERAGED,
    "text_to_image/pretrain_transformer.py": _AVERAGED,
    "text_to_image/finetune.py": {
        "multi_cpu": ["adapter"],
        "fsdp2": ["adapter", "all"],
        "deepspeed_zero2": ["adapter"],
        "deepspeed_zero3": ["adapter", "all"],
    },
}
# Of these: also stopped by a signal and gone on with, equal to the bit.
STOPPED: dict[str, list[tuple[str, str]]] = {
    "bert/pretrain.py": [("multi_cpu", "muon"), ("deepspeed_zero2", "adamw"), ("fsdp2", "lamb")],
    "bert/finetune.py": [("multi_cpu", "tags")],
    "gpt/pretrain.py": [
        ("multi_cpu", "muon"),
        ("fsdp2", "muon"),
        ("deepspeed_zero2", "adamw"),
        ("deepspeed_zero3", "adamw"),
        ("deepspeed_zero2", "unclipped_muon"),
        ("deepspeed_zero3", "unclipped_muon"),
    ],
    "gpt/finetune.py": [("multi_cpu", "whole")],
    "resnet/pretrain.py": [("multi_cpu", "ema"), ("fsdp2", "ema"), ("deepspeed_zero3", "ema")],
    "resnet/pretrain_rsb.py": [],
    "resnet/finetune.py": [],
    "text_to_image/train_vae.py": [("multi_cpu", "ema"), ("fsdp2", "ema"), ("deepspeed_zero2", "ema")],
    "text_to_image/pretrain.py": [("fsdp2", "ema"), ("deepspeed_zero2", "ema")],
    "text_to_image/pretrain_transformer.py": [("fsdp2", "ema")],
    "text_to_image/finetune.py": [("fsdp2", "adapter")],
}


def pairs(page: str) -> list[tuple[str, str]]:
    """Engines and kinds of a page."""
    return [(engine, kind) for engine, kinds in TRIED[page].items() for kind in kinds]


def table() -> str:
    """What README shows."""
    lines = ["| page | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for page, engines in TRIED.items():
        cells = []
        for engine in COLUMNS:
            marks = [" †" if (engine, kind) in STOPPED[page] else "" for kind in engines.get(engine, [])]
            words = [WORDS[kind] + mark for kind, mark in zip(engines.get(engine, []), marks, strict=True)]
            cells.append(", ".join(words))
        lines.append(f"| {page} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    """The README with the table as it is now."""
    head, begin, rest = readme.partition(BEGIN)
    return f"{head}{begin}{table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
