"""What a run says of itself before it begins: a table of what came up and of what follows from the configuration."""

from typing import Any


def describe_engine(accelerator: Any) -> dict[str, Any]:
    """What came up: engine, processes, accumulation and precision."""
    return {
        "engine": accelerator.distributed_type.value,
        "processes": accelerator.num_processes,
        "accumulation": accelerator.gradient_accumulation_steps,
        "precision": accelerator.mixed_precision,
        "device": str(accelerator.device),
    }


def table(rows: dict[str, str]) -> str:
    """Two columns as plain lines: names, and values that start at one column."""
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows.items())
