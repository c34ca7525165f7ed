"""Measure the full-size configurations of recipes/gpt on one GPU: tokens a second and MFU.

    python tests/benchmarks/gpt_gpu.py                       # GPT-2 124M and nanochat 135M, a few minutes on an H100
    python tests/benchmarks/gpt_gpu.py --configs gpt2_124m --updates 40 --per_device_batch_size 16

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
LAUNCH += ["--config_file", str(ROOT / "accelerate_configs" / "single_gpu.yaml"), str(ROOT / "recipes/gpt/pretrain.py")]
WARM_UPDATES = 10


def measure(config: str, updates: int, per_device_batch_size: int) -> dict[str, Any]:
    """Medians of `perf/` over the updates of one configuration that are warm, and what the GPU is called."""
    with tempfile.TemporaryDirectory(prefix="gpt_gpu_") as folder:
        flags: dict[str, Any] = {
            "config": ROOT / "recipes" / "gpt" / "configs" / f"{config}.yaml",
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
        if config == "gpt2_124m":  # whose tokenizer comes from the Hub and has 50,257 tokens
            flags["vocab_size"] = 50257
        if per_device_batch_size:
            flags["per_device_batch_size"] = per_device_batch_size
        subprocess.run([*LAUNCH, *(f"--{name}={value}" for name, value in flags.items())], check=True)
        lines = Path(folder, config, "metrics.jsonl").read_text().splitlines()
        record = json.loads(Path(folder, config, "run.json").read_text())
    entries = [json.loads(line) for line in lines][WARM_UPDATES:]
    keys = ("perf/tokens_per_second", "perf/mfu", "perf/data_wait_fraction")
    medians = {key: statistics.median(entry[key] for entry in entries) for key in keys}
    return {**medians, "parameters": record["parameters"], "hardware": record["hardware"]}


def main() -> None:
    """Print one line of the README's table for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default="gpt2_124m,nanochat_135m", help="names in recipes/gpt/configs")
    parser.add_argument("--updates", type=int, default=40, help="of each; more than ten")
    parser.add_argument("--per_device_batch_size", type=int, default=0, help="rows of a micro-batch; 0 = the config's")
    options = parser.parse_args()
    if options.updates <= WARM_UPDATES:
        parser.error(f"--updates: {options.updates}: expected more than {WARM_UPDATES}")
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    for config in options.configs.split(","):
        found = measure(config, options.updates, options.per_device_batch_size)
        rate, mfu, waiting = (found[f"perf/{key}"] for key in ("tokens_per_second", "mfu", "data_wait_fraction"))
        cells = (
            f"`configs/{config}.yaml`, {found['parameters'] / 1e6:.0f}M parameters, bf16: tokens a second, MFU",
            f"{rate:,.0f}, {mfu:.1%} (waiting for data {waiting:.1%})",
            "50 % MFU",
            f"`python tests/benchmarks/gpt_gpu.py --configs {config}`",
            commit.stdout.strip(),
            found["hardware"],
        )
        print(f"| {' | '.join(cells)} |", flush=True)  # noqa: T201 (the output of a command)


if __name__ == "__main__":
    main()
