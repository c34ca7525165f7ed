"""Measure the full-size configurations of recipes/bert on one GPU: sequences a second and MFU.

    python tests/benchmarks/bert_gpu.py                         # BERT-base at length 128, a few minutes on an H100
    python tests/benchmarks/bert_gpu.py --configs bert_large_phase1 --per_device_batch_size 64

Sizes, batch, optimizer, precision and compilation are the configuration's; the text is the embedded prose, so that no
network is needed. A figure is the median over the updates after the first ten, which compile and warm up.
"""

import argparse

from harness import EMBEDDED_PROSE, GPU_WARM_UPDATES, commit_of_the_tree, run_on_gpu, say


def main() -> None:
    """Print one line of the README's table for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default="bert_base_phase1,megatron_base_short", help="in recipes/bert/configs")
    parser.add_argument("--updates", type=int, default=40, help="of each; more than ten")
    parser.add_argument("--per_device_batch_size", type=int, default=0, help="pairs of a micro-batch; 0 = the config's")
    options = parser.parse_args()
    if options.updates <= GPU_WARM_UPDATES:
        parser.error(f"--updates: {options.updates}: expected more than {GPU_WARM_UPDATES}")
    for config in options.configs.split(","):
        found = run_on_gpu(
            "bert", config, options.updates, options.per_device_batch_size, schedule_steps=0, **EMBEDDED_PROSE
        )
        rate, mfu, waiting = (found[f"perf/{key}"] for key in ("tokens_per_second", "mfu", "data_wait_fraction"))
        sequences = found["pairs_per_update"] / found["seconds_per_update"]
        cells = (
            f"`configs/{config}.yaml`, {found['parameters'] / 1e6:.0f}M, bf16: sequences and real tokens a second, MFU",
            f"{sequences:,.0f}, {rate:,.0f}, {mfu:.1%} (waiting for data {waiting:.1%})",
            "50 % MFU",
            f"`python tests/benchmarks/bert_gpu.py --configs {config}`",
            commit_of_the_tree(),
            found["hardware"],
        )
        say(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
