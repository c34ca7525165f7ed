"""Measure the full-size configurations of recipes/bert on one GPU: sequences a second and MFU.

    python tests/benchmarks/bert_gpu.py                            # BERT-base at length 128, a few minutes on an H100
    python tests/benchmarks/bert_gpu.py --configs bert_large_phase1 --per_device_batch_size 64

Sizes, batch, optimizer, precision and compilation are the configuration's; the text is the embedded prose, so that no
network is needed. A figure is the median over the updates after the first ten, which compile and warm up.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
LAUNCH += [
    "--config_file",
    str(ROOT / "accelerate_configs" / "single_gpu.yaml"),
    str(ROOT / "recipes/bert/pretrain.py"),
]
WARM_UPDATES = 10


def measure(config: str, updates: int, per_device_batch_size: int) -> dict[str, Any]:
    """Medians of `perf/` over the updates of one configuration that are warm, and what the GPU is called."""
    with tempfile.TemporaryDirectory(prefix="bert_gpu_") as folder:
        flags: dict[str, Any] = {
            "config": ROOT / "recipes" / "bert" / "configs" / f"{config}.yaml",
            "output_dir": Path(folder, config),
            "data": "sample",
            "data_config": "",
            "text_column": "",
            "tokenizer": "",
            "max_steps": updates,
            "warmup_steps": 5,
            "log_every": 1,
            "eval_every": 0,
            "save_every": 0,
        }
        flags["schedule_steps"] = 0
        if per_device_batch_size:
            flags["per_device_batch_size"] = per_device_batch_size
        subprocess.run([*LAUNCH, *(f"--{name}={value}" for name, value in flags.items())], check=True)
        lines = Path(folder, config, "metrics.jsonl").read_text().splitlines()
        record = json.loads(Path(folder, config, "run.json").read_text())
    entries = [json.loads(line) for line in lines]
    ends = [entry["perf/training_seconds"] for entry in entries]
    for entry, begun, ended in zip(entries[1:], ends, ends[1:], strict=False):
        entry["perf/pairs_per_second"] = record["pairs_per_update"] / (ended - begun)
    entries = entries[WARM_UPDATES:]
    keys = ("perf/tokens_per_second", "perf/mfu", "perf/data_wait_fraction", "perf/pairs_per_second")
    medians = {key: statistics.median(entry[key] for entry in entries) for key in keys}
    return {**medians, "parameters": record["parameters"], "hardware": record["hardware"]}


def main() -> None:
    """Print one line of the README's table for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configs", default="bert_base_phase1,megatron_base_short", help="names in recipes/bert/configs"
    )
    parser.add_argument("--updates", type=int, default=40, help="of each; more than ten")
    parser.add_argument("--per_device_batch_size", type=int, default=0, help="rows of a micro-batch; 0 = the config's")
    options = parser.parse_args()
    if options.updates <= WARM_UPDATES:
        parser.error(f"--updates: {options.updates}: expected more than {WARM_UPDATES}")
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    for config in options.configs.split(","):
        found = measure(config, options.updates, options.per_device_batch_size)
        keys = ("pairs_per_second", "tokens_per_second", "mfu", "data_wait_fraction")
        pairs, tokens, mfu, waiting = (found[f"perf/{key}"] for key in keys)
        cells = (
            f"`configs/{config}.yaml`, {found['parameters'] / 1e6:.0f}M, bf16: sequences and real tokens a second, MFU",
            f"{pairs:,.0f}, {tokens:,.0f}, {mfu:.1%} (waiting for data {waiting:.1%})",
            "50 % MFU",
            f"`python tests/benchmarks/bert_gpu.py --configs {config}`",
            commit.stdout.strip(),
            found["hardware"],
        )
        print(f"| {' | '.join(cells)} |", flush=True)  # noqa: T201 (the output of a command)


if __name__ == "__main__":
    main()
