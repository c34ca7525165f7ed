"""The run folder's README.md: a model card written from the run's own measurements."""

import math
import re
from pathlib import Path
from typing import Any

from shared.data.hub_data import is_hub_id
from shared.run.summary import listed


def write_model_card(
    run_dir: Path,
    title: str,
    pipeline_tag: str,
    usage: str,
    record: dict[str, Any],
    metrics: dict[str, float],
    samples: str,
    figures: dict[str, str],
) -> None:
    """Write the card with its metadata block, so that the Hub shows task, library and results.

    Args:
        run_dir: the run folder; config.yaml and figures/loss.png are there already.
        title: heading and model name.
        pipeline_tag: the Hub's task name, such as text-generation.
        usage: Python that loads the model.
        record: contents of run.json.
        metrics: the last evaluation, metric key to value.
        samples: what the model made, as plain text.
        figures: heading -> file name in figures/, of images beside the loss curve.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    data = ModelCardData(
        library_name=_library(run_dir),
        pipeline_tag=pipeline_tag,
        model_name=title,
        tags=["pretraining"],
        datasets=_hub_ids(str(record["data"])) or None,
        base_model=next(iter(_hub_ids(str(record["init"]))), None),
        language=record.get("language") or None,
        license=record.get("license") or None,
        eval_results=[
            EvalResult(
                task_type=pipeline_tag,
                dataset_type="held-out data",
                dataset_name=str(record["data"]),
                metric_type=key.removeprefix("eval/"),
                metric_value=round(value, 6),
            )
            for key, value in metrics.items()
            if math.isfinite(value)  # the metadata knows no other numbers
        ],
    )
    rows = "\n".join(f"| `{key}` | {value:.4f} |" for key, value in metrics.items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    images = "".join(f"\n### {heading}\n\n![{heading}](figures/{file})\n" for heading, file in figures.items())
    made = "Fine-tuned" if Path(str(record["command"][0])).stem == "finetune" else "Pre-trained"
    when = f" after update {record['best_step']:,}, the best evaluation" if "best_step" in record else ""
    commit = f", commit `{record['git_commit'][:12]}`" if record["git_commit"] else ""
    kept = ""
    if best := record.get("best"):
        value = f"`{best['metric']}` {best['evaluation'][best['metric']]:.4f}"
        kept = f"`{best['folder']}/` holds the model after update {best['step']:,}, of the best evaluation: {value}.\n"
    left_out = f"Of the data were left out: {listed(record['left_out'])}.\n" if record.get("left_out") else ""
    text = f"""---
{data.to_yaml()}
---
# {_plain(title)}

{made} from {_code(record["init"])} on {_code(record["data"])} with {_code(record["command"][0])}{commit}:
{record["parameters"]:,} parameters, {record["steps"]:,} updates, {record["training_seconds"]:,.0f} s of training,
{record["training_flops"]:.3g} floating-point operations on {record["hardware"]}.

```python
{usage}
```

It is read by {_library(run_dir)} {record["versions"].get(_library(run_dir), "")}, which wrote it, and by later ones.

## Results

Measured on data that was held out of training{when}, each sample counted once.

| metric | value |
|---|---|
{rows}

{kept}{left_out}
![Loss over the updates](figures/loss.png)
{images}
## Samples

{_block(samples)}

## How it was made

`config.yaml` holds every field and `recipe.py` the program; with them and the same data the run can be repeated.
Versions: {versions}. `metrics.jsonl` has all measurements.

The model was trained on limited data: what it says may be wrong, biased or offensive, and no evaluation beyond the
table above was made.
"""
    ModelCard(text)  # refuses metadata that the Hub would refuse
    (run_dir / "README.md").write_text(text, encoding="utf-8")


def _hub_ids(names: str) -> list[str]:
    """Those of some comma-separated names that are Hub ids, owner and all, and not files or folders here."""
    ids = [name.split(":")[0].split("@")[0].strip() for name in names.split(",")]
    return [name for name in ids if "/" in name and is_hub_id(name) and not Path(name).exists()]


def _library(run_dir: Path) -> str:
    """The one that loads the exported model; diffusers leaves its version in what it writes."""
    config = run_dir / "config.json"
    parts = ("model_index.json", "pytorch_lora_weights.safetensors")
    is_of_diffusers = any((run_dir / name).exists() for name in parts) or (
        config.exists() and "_diffusers_version" in config.read_text()
    )
    return "diffusers" if is_of_diffusers else "transformers"


def _plain(text: str) -> str:
    """Text that neither Markdown nor HTML takes for its own."""
    return re.sub(r"([\\`*_\[\]<>#|&~$])", r"\\\1", " ".join(text.split()))


def _code(text: object) -> str:
    """A code span that holds any text, in a fence longer than its own runs of backticks."""
    content = " ".join(str(text).split())
    fence = "`" * (_longest_run_of_backticks(content) + 1)
    return f"{fence} {content} {fence}" if "`" in content else f"`{content or ' '}`"


def _block(text: str) -> str:
    """A code block that holds any text; nothing inside it is Markdown or HTML."""
    fence = "`" * max(3, _longest_run_of_backticks(text) + 1)
    return f"{fence}text\n{text}\n{fence}"


def _longest_run_of_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
