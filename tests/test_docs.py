"""Every command in a README runs, and what a README says about keys, files and fields is so."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import core_turns, faults
from tests.conftest import CASES, ROOT, load_recipe
from tests.hub_server import start_hub
from tests.launching import preloaded_python
from tests.recipes import engines

READMES = [ROOT / "README.md", *sorted((ROOT / "recipes").rglob("README.md"))]
# Commands that name no run folder, and the one they get here.
DEFAULT_RUNS = {
    **{f"accelerate launch recipes/{family}/pretrain.py": family for family in ("bert", "gpt", "resnet")},
    "accelerate launch recipes/resnet/pretrain_rsb.py": "resnet_rsb",
    "accelerate launch recipes/text_to_image/train_vae.py": "vae",
    "accelerate launch recipes/text_to_image/cache_latents.py": "latents",
    "accelerate launch recipes/text_to_image/pretrain.py": "text_to_image",
}
# The goals are of machines that do about 137 a core; on one of half that speed the seven default runs take 45 minutes.
GOALS_FROM = 100.0  # GFLOP/s of a core in matrix products
CUT_RUN = ["--max_steps", "100"]
CONFIGS = sorted((ROOT / "recipes").rglob("configs/*.yaml"))


def commands_of(readme: Path) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_readmes_have_commands_and_configs_are_found() -> None:
    assert len(READMES) >= 3
    assert sum(len(commands_of(readme)) for readme in READMES) >= 8
    assert len(CONFIGS) >= 3


def test_the_table_of_engines_is_what_the_tests_try() -> None:
    readme = (ROOT / "README.md").read_text()
    assert engines.with_table(readme) == readme, "run python -m tests.recipes.engines"
    for page, of_page in engines.TRIED.items():
        assert (ROOT / "recipes" / page).is_file()
        assert {engine for engine, _ in engines.STOPPED[page]} <= of_page.keys() <= engines.COLUMNS.keys()


def test_the_table_of_faults_is_what_the_tests_try(request: pytest.FixtureRequest) -> None:
    """Numbers of cases are compared where all tests were collected."""
    assert faults.gone() == []
    readme, cases = (ROOT / "README.md").read_text(), request.config.stash[CASES]
    said = faults.with_table(readme, cases)
    if not all(cases[file, name] for fault in faults.FAULTS for file, names in fault.tests.items() for name in names):
        readme, said = (re.sub(r"\d+ (\[|cases:)", r"\1", text) for text in (readme, said))
    assert said == readme, "run python -m tests.faults"


def test_the_commands_for_jobs_are_such_as_hf_takes() -> None:
    """It reads them, and runs nothing; the flags of the recipe are read by the recipe."""
    import click
    from huggingface_hub.cli.hf import app

    [block] = re.findall(r"^```shell\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    commands = [shlex.split(command) for command in re.split(r"\n(?=hf )", block.replace("\\\n", ""))]
    read: list[dict[str, Any]] = []
    for command in commands:
        at: Any = app
        context = click.Context(at)
        words = command[1:]
        while isinstance(at, click.Group):
            at = at.get_command(context, words.pop(0))
        read.append(at.make_context(at.name, words).params)
    assert read[1]["volume"] == (".:/recipes", "hf://buckets/YOU/runs:/runs")
    program = read[1]["command"][-1].partition("&& exec ")[2].split()
    for word in program:
        assert not word.endswith((".py", ".yaml")) or (ROOT / word).is_file(), word
    at = program.index("recipes/gpt/pretrain.py")
    recipe = load_recipe("gpt/pretrain.py")
    assert recipe.cli.parse(recipe.Config, program[at + 1 :]).output_dir.startswith("/runs/")


def test_every_config_says_what_it_stands_for() -> None:
    rows = [line for line in (ROOT / "recipes" / "README.md").read_text().splitlines() if "/configs/" in line]
    for config in CONFIGS:
        [row] = [line for line in rows if f"]({config.relative_to(ROOT / 'recipes')})" in line]
        assert row.count("|") == 6, row


@pytest.fixture(scope="module")
def whole() -> bool:
    """Whether default runs go to their end and must reach their goals: on a fast machine, or with WHOLE_RUNS=1."""
    with core_turns.alone():
        return os.environ.get("WHOLE_RUNS") == "1" or core_speed() >= GOALS_FROM


@pytest.mark.slow
def test_commands_of_the_gpt_readme_run_in_order(tmp_path: Path, whole: bool) -> None:
    """The first must reach the README's goal; a general-purpose compressor, `xz -9e`, needs 1.89 bits a byte."""
    entries = run_commands("gpt", tmp_path, whole)
    skip_goals_unless(whole)
    assert entries[-1]["eval/prose/bits_per_byte"] <= 1.45


@pytest.mark.slow
def test_commands_of_the_bert_readme_run_in_order(tmp_path: Path, whole: bool) -> None:
    """The first must reach the README's goals; a coin answers half of the pairs right."""
    entries = run_commands("bert", tmp_path, whole)
    skip_goals_unless(whole)
    assert entries[-1]["eval/prose/mlm_accuracy"] >= 0.25
    assert entries[-1]["eval/prose/nsp_accuracy"] >= 0.70


@pytest.mark.slow
def test_commands_of_the_resnet_readme_run_in_order(tmp_path: Path, whole: bool) -> None:
    """The first must reach the README's goal, the long recipe come near it; logistic regression reaches 81 %."""
    entries = run_commands("resnet", tmp_path, whole)
    skip_goals_unless(whole)
    assert entries[-1]["eval/top1"] >= 0.90
    long = (tmp_path / "outputs" / "resnet_rsb" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(long[-1])["eval/top1"] >= 0.87


@pytest.mark.slow
def test_commands_of_the_text_to_image_readme_run_in_order(tmp_path: Path, whole: bool) -> None:
    """The autoencoder must reach the README's goal, and diffusion's error fall on all three splits."""
    entries = run_commands("text_to_image", tmp_path, whole)
    images = list((tmp_path / "outputs" / "images").glob("*-3d-fluent-emoji-red-apple.png"))
    assert len(images) == 4
    manifest = json.loads((tmp_path / "outputs" / "latents" / "manifest.json").read_text())
    assert (manifest["images"], manifest["rows"]) == (5099, 5099)
    skip_goals_unless(whole)
    assert entries[-1]["eval/psnr"] >= 24
    lines = (tmp_path / "outputs" / "text_to_image" / "metrics.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if "eval/loss" in entry]
    for split in ("train", "test_unseen_concept", "test_unseen_combination"):
        losses = [entry[f"eval/loss_{split}"] for entry in entries]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.3


@pytest.mark.slow
def test_commands_of_the_top_readme_run(tmp_path: Path) -> None:
    """Those after the first two, with a small model and few updates; pushes go to a Hub on loopback."""
    hub = start_hub()
    small = shlex.split(
        "--max_steps 4 --hidden_size 32 --num_layers 1 --data shared/samples/novels/eval.parquet --best_metric loss"
    )
    environment = {**environment_for(tmp_path), **hub.environment(), "HF_HUB_OFFLINE": "0"}
    commands = [command for command in commands_of(ROOT / "README.md") if not command.startswith("pip install")]
    assert [command for command in commands if "--push_to_hub" in command]
    for command in commands:
        words = words_for(tmp_path, command) + (small if "pretrain.py" in command else [])
        with core_turns.sharing():
            run_command([*words, *(["--push_every", "2"] if "--push_to_hub" in command else [])], environment)

    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("## What a run folder holds") : readme.index("## Licence")]
    for name in re.findall(r"`([\w.]+(?:\.\w+|/))`", table):
        assert (tmp_path / "outputs" / "mine" / name).exists(), name
    assert list((tmp_path / "outputs" / "tracked").rglob("events.out.tfevents.*"))
    loading = re.search(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert loading
    program = loading[1].replace("YOU/", "tester/").replace("step-500", "step-2") + "print(model.num_parameters())"
    run_command([sys.executable, "-c", program], {**environment, "HF_HOME": str(tmp_path / "other_home")})
    assert hub.model("tester/my-gpt").private
    assert not [name for name in hub.files("tester/my-gpt") if "checkpoint" in name or name.endswith((".bin", ".pkl"))]
    hub.stop()


def run_command(words: list[str], environment: dict[str, str]) -> None:
    """From the repository's root; it must end well."""
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def environment_for(folder: Path) -> dict[str, str]:
    """That of a new user, who has an empty home."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HOME": str(folder / "home")}
    return {**environment, "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}


def words_for(folder: Path, command: str) -> list[str]:
    """The command, whose run folders and copies go to `folder`."""
    words = [word.replace("outputs/", f"{folder}/outputs/") for word in shlex.split(command)]
    words = [word.replace("../my_", f"{folder}/my_") for word in words]
    return words + (["--output_dir", f"{folder}/outputs/{DEFAULT_RUNS[command]}"] if command in DEFAULT_RUNS else [])


def preloaded(words: list[str]) -> list[str]:
    """The same by an interpreter that has the libraries imported; for runs that are short."""
    if words[:2] == ["accelerate", "launch"]:
        return [*preloaded_python(), "-m", "accelerate.commands.launch", *words[2:]]
    return [*preloaded_python(), *words[1:]] if words[0] == "python" else words


def core_speed() -> float:
    """GFLOP/s of one core in products of matrices of float32, the best of ten."""
    import torch

    threads, size, seconds = torch.get_num_threads(), 1024, math.inf
    torch.set_num_threads(1)
    left, right = torch.randn(2, size, size)
    for _ in range(10):
        begin = time.perf_counter()
        left @ right
        seconds = min(seconds, time.perf_counter() - begin)
    torch.set_num_threads(threads)
    return 2e-9 * size**3 / seconds


def skip_goals_unless(whole: bool) -> None:
    if not whole:
        pytest.skip(f"all commands ran, default runs only as {' '.join(CUT_RUN)}: this machine is too slow for goals")


def run_commands(family: str, folder: Path, whole: bool) -> list[dict[str, float]]:
    """As written, from the repository's root, with an empty home; the metrics of the first one's run.

    Default runs start as a user's do, with all cores, and are cut unless they are to be whole; see `preloaded` for the
    others. Run folders and copies go to a temporary folder.
    """
    environment, commands = environment_for(folder), commands_of(ROOT / "recipes" / family / "README.md")
    assert commands[0] in DEFAULT_RUNS
    for command in commands:
        words = words_for(folder, command)
        if command in DEFAULT_RUNS:
            words += CUT_RUN if not whole and "cache_latents" not in command else []
            with core_turns.alone():
                run_command(words, environment)
        else:
            with core_turns.sharing():
                run_command(preloaded(words), environment)
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
    documented = set(re.findall(r"^\| `(\w+/[\w{}/]+)`", readme, re.MULTILINE))
    shared = ["performance/throughput.py", "run/training_run.py"]
    shared += {"text_to_image": ["diffusion/fixed_evaluation.py"], "resnet": ["metrics/classification.py"]}.get(
        family, []
    )
    sources = [*(ROOT / "recipes" / family).glob("*.py"), *(ROOT / "shared" / name for name in shared)]
    program = "".join(source.read_text() for source in sources).replace('"{split.name}/', '"eval/')  # test has the same
    logged = set(re.findall(r'"((?:train|eval|perf)/[\w{}/]*[\w}])"', program))
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
