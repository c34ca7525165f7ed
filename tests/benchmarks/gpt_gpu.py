"""Measure the full-size configurations of recipes/gpt on one GPU: tokens a second and MFU.

    python tests/benchmarks/gpt_gpu.py                       # GPT-2 124M and nanochat 135M, a few minutes on an H100
    python tests/benchmarks/gpt_gpu.py --configs gpt2_124m --updates 40 --per_device_batch_size 16

Sizes, batch, optimizer, precision and compilation are the configuration's; the text is the embedded prose, so that no
network is needed. A figure is the median over the updates after the first ten, which compile and warm up.
"""

import argparse

from harness import EMBEDDED_PROSE, GPU_WARM_UPDATES, commit_of_the_tree, run_on_gpu, say


def main() -> None:
    """Print one line of the README's table for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default="gpt2_124m,nanochat_135m", help="names in recipes/gpt/configs")
    parser.add_argument("--updates", type=int, default=40, help="of each; more than ten")
    parser.add_argument("--per_device_batch_size", type=int, default=0, help="rows of a micro-batch; 0 = the config's")
    options = parser.parse_args()
    if options.updates <= GPU_WARM_UPDATES:
        parser.error(f"--updates: {options.updates}: expected more than {GPU_WARM_UPDATES}")
    for config in options.configs.split(","):
        # GPT-2's tokenizer comes from the Hub and has 50,257 tokens.
        flags = {"vocab_size": 50257} if config == "gpt2_124m" else {}
        found = run_on_gpu("gpt", config, options.updates, options.per_device_batch_size, **flags, **EMBEDDED_PROSE)
        rate, mfu, waiting = (found[f"perf/{key}"] for key in ("tokens_per_second", "mfu", "data_wait_fraction"))
        cells = (
            f"`configs/{config}.yaml`, {found['parameters'] / 1e6:.0f}M parameters, bf16: tokens a second, MFU",
            f"{rate:,.0f}, {mfu:.1%} (waiting for data {waiting:.1%})",
            "50 % MFU",
            f"`python tests/benchmarks/gpt_gpu.py --configs {config}`",
            commit_of_the_tree(),
            found["hardware"],
        )
        say(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
