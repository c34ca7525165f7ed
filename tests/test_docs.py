"""Every command in a README runs, and what a README says about keys, files and fields is so."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, load_recipe

READMES = [ROOT / "README.md", *sorted((ROOT / "recipes").rglob("README.md"))]
# Commands that name no run folder, and the one they get here.
DEFAULT_RUNS = {
    **{f"accelerate launch recipes/{family}/pretrain.py": family for family in ("bert", "gpt", "resnet")},
    "accelerate launch recipes/resnet/pretrain_rsb.py": "resnet_rsb",
    "accelerate launch recipes/text_to_image/train_vae.py": "vae",
    "accelerate launch recipes/text_to_image/cache_latents.py": "latents",
    "accelerate launch recipes/text_to_image/pretrain.py": "text_to_image",
}
CONFIGS = sorted((ROOT / "recipes").rglob("configs/*.yaml"))


def commands_of(readme: Path) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_readmes_have_commands_and_configs_are_found() -> None:
    assert len(READMES) >= 3
    assert sum(len(commands_of(readme)) for readme in READMES) >= 8
    assert len(CONFIGS) >= 3


@pytest.mark.slow
def test_commands_of_the_gpt_readme_run_in_order(tmp_path: Path) -> None:
    """The first must reach the README's goal; a general-purpose compressor, `xz -9e`, needs 1.89 bits a byte."""
    entries = run_commands("gpt", tmp_path)
    assert entries[-1]["eval/bits_per_byte"] <= 1.45


@pytest.mark.slow
def test_commands_of_the_bert_readme_run_in_order(tmp_path: Path) -> None:
    """The first must reach the README's goals; a coin answers half of the pairs right."""
    entries = run_commands("bert", tmp_path)
    assert entries[-1]["eval/mlm_accuracy"] >= 0.25
    assert entries[-1]["eval/nsp_accuracy"] >= 0.70


@pytest.mark.slow
def test_commands_of_the_resnet_readme_run_in_order(tmp_path: Path) -> None:
    """The first must reach the README's goal, the long recipe come near it; logistic regression reaches 81 %."""
    entries = run_commands("resnet", tmp_path)
    assert entries[-1]["eval/top1"] >= 0.90
    long = (tmp_path / "outputs" / "resnet_rsb" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(long[-1])["eval/top1"] >= 0.87


@pytest.mark.slow
def test_commands_of_the_text_to_image_readme_run_in_order(tmp_path: Path) -> None:
    """The autoencoder must reach the README's goal, and diffusion's error fall on all three splits."""
    entries = run_commands("text_to_image", tmp_path)
    assert entries[-1]["eval/psnr"] >= 24
    manifest = json.loads((tmp_path / "outputs" / "latents" / "manifest.json").read_text())
    assert (manifest["images"], manifest["rows"]) == (5099, 5099)
    lines = (tmp_path / "outputs" / "text_to_image" / "metrics.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if "eval/loss" in entry]
    for split in ("train", "test_unseen_concept", "test_unseen_combination"):
        losses = [entry[f"eval/loss_{split}"] for entry in entries]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.3
    images = list((tmp_path / "outputs" / "images").glob("*-3d-fluent-emoji-red-apple.png"))
    assert len(images) == 4


def run_commands(family: str, folder: Path) -> list[dict[str, float]]:
    """As written, from the repository's root, with an empty home; the metrics of the first one's run.

    Run folders and copies go to a temporary folder.
    """
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HOME": str(folder / "home")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    commands = commands_of(ROOT / "recipes" / family / "README.md")
    assert commands[0] in DEFAULT_RUNS
    for command in commands:
        words = [word.replace("outputs/", f"{folder}/outputs/") for word in shlex.split(command)]
        words = [word.replace("../my_", f"{folder}/my_") for word in words]
        if command in DEFAULT_RUNS:
            words += ["--output_dir", f"{folder}/outputs/{DEFAULT_RUNS[command]}"]
        result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    metrics = folder / "outputs" / DEFAULT_RUNS[commands[0]] / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def test_relative_links_lead_somewhere() -> None:
    links = [
        (readme, link)
        for readme in [*READMES, ROOT / "CONTRIBUTING.md"]
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", readme.read_text())
    ]
    assert links
    for readme, link in links:
        assert (readme.parent / link).exists(), f"{readme}: {link}"


@pytest.mark.parametrize("family", ["bert", "gpt", "resnet", "text_to_image"])
def test_metrics_table_has_the_keys_that_the_recipe_logs(family: str) -> None:
    readme = (ROOT / f"recipes/{family}/README.md").read_text()
    documented = set(re.findall(r"^\| `(\w+/[\w{}]+)`", readme, re.MULTILINE))
    shared = ["performance/throughput.py", "run/training_run.py"]
    shared += ["diffusion/fixed_evaluation.py"] if family == "text_to_image" else []
    sources = [*(ROOT / "recipes" / family).glob("*.py"), *(ROOT / "shared" / name for name in shared)]
    logged = set(re.findall(r'"((?:train|eval|perf)/[\w{}]+)"', "".join(source.read_text() for source in sources)))
    assert documented == {key.replace("{unit}", "tokens" if family in ("bert", "gpt") else "images") for key in logged}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_opens_with_its_facts(path: Path) -> None:
    from shared.command_line import parse

    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    named = re.search(r"^# Program: (\w+\.py)$", head, re.MULTILINE)
    recipe = load_recipe(f"{path.parents[1].name}/{named[1] if named else 'pretrain.py'}")
    cfg = parse(recipe.Config, ["--config", str(path)])
    recipe.check_config(cfg)
    for fact in ("Data:", "Expected:", "Hardware and time:"):
        assert fact in head
