"""What leaves with a recipe, what stays behind, and that the copy needs nothing of the repository."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared import eject as eject_module
from shared.command_line import UsageError
from shared.eject import eject, shared_data, shared_modules, trimmed_requirements

ROOT = Path(__file__).resolve().parents[2]
STAGES = sorted((ROOT / "recipes").glob("*/*.py"))
FAMILIES = sorted({path.parent.name for path in STAGES})

RECIPE = """
import sys
import torch
from shared import losses, VERSION
from shared.metrics import recall as measure
def main():
    import yaml
    from shared import loader
"""
REPOSITORY = {
    "LICENSE": "free",
    "CONTRIBUTING.md": "stays",
    "requirements.txt": """
# One series only.
torch>=2.13,<2.14  # no CUDA
accelerate>=1.15,<2
tensorboard
deepspeed
datasets[audio]>=5; python_version >= "3.11"
huggingface_hub
PyYAML>=6.0,<7
scipy
pytest
""",
    "accelerate_configs/cpu.yaml": "# when: a laptop\nuse_cpu: true\n",
    "accelerate_configs/slurm/job.sh": "srun\n",
    "recipes/fish/pretrain.py": RECIPE,
    "recipes/fish/sing.py": "import shared.metrics.pitch.high\n",
    "recipes/fish/README.md": "# Fish",
    "recipes/fish/notes.txt": "stays",
    "recipes/fish/configs/big/huge.yaml": "max_steps: 3",
    "recipes/fish/assets/weights.safetensors": "w",
    "recipes/fish/__pycache__/pretrain.cpython-311.pyc": "stays",
    "recipes/bird/pretrain.py": "import scipy.stats\nimport evaluate\n",
    "shared/__init__.py": "VERSION = 1\n",
    "shared/losses.py": "from shared.deep import helper\n",
    "shared/deep.py": "import os.path\ntry:\n    import huggingface_hub.utils as utils\nfinally:\n    helper = 1\n",
    "shared/loader.py": "import datasets, pathlib\nFOLDER = pathlib.Path(__file__).parent / 'samples' / 'songs'\n",
    "shared/unused.py": "import scipy\nFOLDER = 'tunes'\n",
    "shared/metrics/__init__.py": "",
    "shared/metrics/recall.py": "from . import precision\nfrom .. import ties\n",
    "shared/metrics/precision.py": "",
    "shared/metrics/pitch/__init__.py": "",
    "shared/metrics/pitch/high.py": "from shared.losses import *\n",
    "shared/ties.py": "from .losses import helper\n",
    "shared/samples/README.md": "songs: public domain",
    "shared/samples/make_songs.py": "stays",
    "shared/samples/songs/part/a.txt": "la",
    "shared/samples/tunes/b.txt": "stays",
}
GENERAL = {"LICENSE", "requirements.txt", "accelerate_configs/cpu.yaml", "accelerate_configs/slurm/job.sh"}
FISH = {f"recipes/fish/{name}" for name in ("README.md", "configs/big/huge.yaml", "assets/weights.safetensors")}
MODULES = {f"shared/{name}.py" for name in ("__init__", "losses", "deep", "loader", "ties")} | {
    f"shared/metrics/{name}.py" for name in ("__init__", "recall", "precision")
}
DATA = {"shared/samples/README.md", "shared/samples/songs/part/a.txt"}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository that has each kind of import and of file."""
    root = tmp_path / "repository"
    for name, text in REPOSITORY.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------------------------
# What is copied


def test_a_folder_takes_its_stages_and_the_modules_data_and_configs_that_they_need(repository, tmp_path):
    target = tmp_path / "new" / "my fish"
    said = eject(repository / "recipes" / "fish", target, repository)

    pitch = {f"shared/metrics/pitch/{name}.py" for name in ("__init__", "high")}
    stages = {"recipes/fish/pretrain.py", "recipes/fish/sing.py"}
    assert files_under(target) == GENERAL | FISH | MODULES | DATA | pitch | stages
    for name in files_under(target) - {"requirements.txt"}:
        assert (target / name).read_bytes() == (repository / name).read_bytes()
    assert "pretrain.py, sing.py and 3 other files" in said
    assert said.splitlines()[-1] == (
        f"run it: cd '{target}' && pip install -r requirements.txt && accelerate launch recipes/fish/pretrain.py"
    )


def test_one_stage_takes_only_its_own_modules(repository, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    said = eject(repository / "recipes" / "fish" / "sing.py", target, repository)

    modules = {"__init__", "losses", "deep", "metrics/__init__", "metrics/pitch/__init__", "metrics/pitch/high"}
    stage = {"recipes/fish/sing.py"}
    assert files_under(target) == GENERAL | FISH | stage | {f"shared/{name}.py" for name in modules}
    assert said.endswith("accelerate launch recipes/fish/sing.py")


def test_requirements_are_the_imported_lines_without_comments(repository, tmp_path):
    eject(repository / "recipes" / "fish", tmp_path / "target", repository)
    assert (tmp_path / "target" / "requirements.txt").read_text() == (
        "torch>=2.13,<2.14\naccelerate>=1.15,<2\ntensorboard\n"
        'datasets[audio]>=5; python_version >= "3.11"\nhuggingface_hub\nPyYAML>=6.0,<7\n'
    )


def test_deepspeed_is_required_where_an_accelerate_config_names_it(repository):
    config = repository / "accelerate_configs" / "zero.yaml"
    config.write_text("distributed_type: DEEPSPEED\n")
    assert trimmed_requirements([], [config], repository) == [
        "torch>=2.13,<2.14",
        "accelerate>=1.15,<2",
        "tensorboard",
        "deepspeed",
    ]


@pytest.mark.parametrize("stage", STAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_stage_here_has_its_requirements_and_no_module_that_does_not_run_it(stage):
    modules = shared_modules([stage], ROOT)
    assert ROOT / "shared" / "__init__.py" in modules
    assert ROOT / "shared" / "eject.py" not in modules
    assert trimmed_requirements([stage, *modules], [], ROOT)


def test_there_are_recipes_to_eject():
    assert {"bert", "gpt", "resnet", "text_to_image"} <= set(FAMILIES)


def test_the_gpt_recipe_takes_what_it_is_known_to_need():
    modules = shared_modules([ROOT / "recipes" / "gpt" / "pretrain.py"], ROOT)
    names = {path.stem for path in modules}
    assert {"command_line", "checkpoints", "dry_run", "documents", "sample_order", "token_cache"} <= names
    data = {path.relative_to(ROOT / "shared" / "samples").as_posix() for path in shared_data(modules, ROOT)}
    assert {"README.md", "messages/train.parquet", "novels/eval.parquet"} <= data
    assert "make_prose.py" not in data
    requirements = trimmed_requirements(modules, [], ROOT)
    distributions = {re.split(r"[<>=]", line)[0] for line in requirements}
    assert {"torch", "transformers", "accelerate", "datasets", "PyYAML", "tensorboard"} <= distributions
    assert not distributions & {"pytest", "ruff", "mypy", "hypothesis", "deepspeed"}


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("source", ["", "recipes", "recipes/none", "recipes/fish/configs", "recipes/fish/README.md"])
def test_a_source_that_is_no_recipe_is_refused(repository, tmp_path, source):
    with pytest.raises(UsageError, match=r"^source: .*: expected a recipe's folder, such as recipes/gpt"):
        eject(repository / source, tmp_path / "target", repository)
    assert not (tmp_path / "target").exists()


def test_a_target_that_holds_something_is_refused(repository, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for target in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(UsageError, match=r"^target: .*: expected a folder that is empty or does not exist$"):
            eject(repository / "recipes" / "fish", target, repository)
    assert files_under(tmp_path / "full") == {"mine.txt"}


@pytest.mark.parametrize("target", ["", "copy", "recipes/fish/copy", "../link/copy"])
def test_a_target_inside_the_repository_is_refused(repository, tmp_path, target):
    (tmp_path / "link").symlink_to(repository)
    before = files_under(repository)
    with pytest.raises(UsageError, match=r"^target: .*: expected a folder outside the repository "):
        eject(repository / "recipes" / "fish", repository / target, repository)
    assert files_under(repository) == before


def test_a_target_that_cannot_be_written_is_refused(repository, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"^target: .*: expected a folder that can be written, got "):
        eject(repository / "recipes" / "fish", tmp_path / "file" / "target", repository)


def test_an_import_without_a_requirement_is_refused_before_anything_is_written(repository, tmp_path):
    with pytest.raises(UsageError, match=r"^requirements\.txt: expected a line for 'evaluate', which .*/pretrain\.py"):
        eject(repository / "recipes" / "bird", tmp_path / "target", repository)
    assert not (tmp_path / "target").exists()


def test_a_recipe_that_is_not_python_is_refused(repository, tmp_path):
    (repository / "recipes" / "bird" / "pretrain.py").write_text("def\n")
    with pytest.raises(UsageError, match=r"^source: .*pretrain\.py: expected Python, got "):
        eject(repository / "recipes" / "bird", tmp_path / "target", repository)


def test_the_command_line_copies_or_refuses_in_one_line_with_status_2(tmp_path):
    command = [sys.executable, "-m", "shared.eject", "recipes/gpt/generate.py", str(tmp_path / "target")]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60, "check": False}
    first, second = (subprocess.run(command, **options) for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.startswith("copied recipes/gpt/ (generate.py")
    assert (second.returncode, second.stdout) == (2, "")
    assert re.fullmatch(r"error: target: .*\n", second.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# The copy runs by itself

# Runs a stage as `python STAGE.py ...` would, in an interpreter that cannot open any file of the repository, and
# loads what it leaves.
RUN_AND_LOAD = """
import os, runpy, sys

stage, repository, model_class, output_dir = sys.argv[1:5]

def refuse(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes)):
        if os.path.realpath(os.fsdecode(arguments[0])).startswith(repository + os.sep):
            raise RuntimeError(f"the copy opened {arguments[0]!r}")

sys.addaudithook(refuse)
sys.path[0] = os.path.dirname(stage)
sys.argv[:] = [stage, *sys.argv[5:]]
runpy.run_path(stage, run_name="__main__")

import importlib, shared

library, name = model_class.split(".")
model = getattr(importlib.import_module(library), name).from_pretrained(output_dir)
print("loaded", model.num_parameters(), shared.__file__)
"""
TRANSFORMER = ["--hidden_size", "32", "--num_layers", "1", "--num_heads", "2", "--seq_length", "32"]
TEXT = ["--data", "texts.jsonl", "--vocab_size", "300", "--global_batch_size", "2"]
RESNET = ["--depths", "1", "--hidden_sizes", "8", "--global_batch_size", "8"]
VAE = ["--block_out_channels", "8,8", "--global_batch_size", "4"]
# Each family's first stage, a tiny model of it, and the class that loads it.
TINY = {
    "bert": ("pretrain.py", [*TRANSFORMER, *TEXT], "transformers.AutoModelForMaskedLM"),
    "gpt": ("pretrain.py", [*TRANSFORMER, *TEXT], "transformers.AutoModelForCausalLM"),
    "resnet": ("pretrain.py", RESNET, "transformers.AutoModelForImageClassification"),
    "text_to_image": ("train_vae.py", VAE, "diffusers.AutoencoderKL"),
}


def run_ejected(source: Path, tmp_path: Path) -> None:
    """Eject `source`, train its first stage for two steps in an empty environment, and load the result."""
    target, elsewhere, home = (tmp_path / name for name in ("my_recipe", "elsewhere", "home"))
    eject(source, target)
    for folder in (elsewhere, home, home / "hf"):
        folder.mkdir()
    texts = [f"The {i}th fish sang of the sea. The sea of {i} ships came home late." for i in range(60)]
    (elsewhere / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    family = source.name if source.is_dir() else source.parent.name
    assert family in TINY, f"give {family} its line in TINY"
    first_stage, flags, model_class = TINY[family]
    output_dir = tmp_path / "run"
    stage = target / "recipes" / family / first_stage
    command = [sys.executable, "-c", RUN_AND_LOAD, stage, ROOT, model_class, output_dir]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": "", "HOME": str(home), "HF_HOME": str(home / "hf")}
    result = subprocess.run(
        [str(part) for part in [*command, *flags, "--max_steps", 2, "--output_dir", output_dir]],
        cwd=elsewhere,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    word, num_parameters, shared_file = result.stdout.splitlines()[-1].split(maxsplit=2)
    assert word == "loaded"
    assert int(num_parameters) > 0
    assert Path(shared_file) == target / "shared" / "__init__.py"
    assert [json.loads(line)["step"] for line in (output_dir / "metrics.jsonl").open()][-1] == 2


def test_one_ejected_stage_runs_in_an_empty_environment(tmp_path):
    run_ejected(ROOT / "recipes" / "gpt" / "pretrain.py", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_ejected_family_runs_in_an_empty_environment(tmp_path, family):
    run_ejected(ROOT / "recipes" / family, tmp_path)


def test_the_interpreter_of_these_runs_cannot_read_the_repository(tmp_path):
    stage = tmp_path / "stage.py"
    stage.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport shared.optim.schedules\n")
    command = [sys.executable, "-c", RUN_AND_LOAD, str(stage), str(ROOT), "", ""]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert re.search(r"RuntimeError: the copy opened '.*shared", result.stderr)
    assert eject_module.REPOSITORY == ROOT
