"""Files, grid and list are of the library's images; wrong input is one line; nothing else is said."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from shared import command_line as cli
from tests import pipelines
from tests.conftest import ROOT
from tests.launching import launch

WORDS = pipelines.LONG_PROMPT.split()
KEPT, LOST = " ".join(WORDS[: pipelines.LENGTH - 2]), " ".join(WORDS[pipelines.LENGTH - 2 :])
PROGRAM = ROOT / "recipes" / "text_to_image" / "generate.py"


def fields(model: Path, target: Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(model), "output_dir": str(target), "num_steps": 3, **changes}


def read(folder: Path) -> list[tuple[dict[str, Any], np.ndarray]]:
    entries = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["grid.png", "prompts.jsonl", *(entry["file"] for entry in entries)]
    )
    return [(entry, np.asarray(Image.open(folder / entry["file"]))) for entry in entries]


@pytest.mark.slow
def test_the_program_leaves_the_library_s_images_and_says_what_it_cut(tiny_pipeline: Path, tmp_path: Path) -> None:
    """In a process of its own, from another folder; the libraries say nothing."""
    prompt = f"{KEPT} {LOST}"
    flags = fields(tiny_pipeline, tmp_path / "new" / "images", prompt=prompt, images_per_prompt=3, seed=4)
    command = [sys.executable, str(PROGRAM), *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"3 images, and together in grid.png: {tmp_path}/new/images/\n"
    said = [line for line in done.stderr.splitlines() if "font cache" not in line]  # matplotlib's, on a new machine
    assert said == [f"prompt '{prompt}' is longer than the text encoder takes and cut: without '{LOST}'"]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    made = read(tmp_path / "new" / "images")
    slug = prompt.replace(" ", "-")
    assert [entry["file"] for entry, _ in made] == [f"0000{index}-{slug}.png" for index in range(3)]
    assert len({image.tobytes() for _, image in made}) == 3
    for entry, image in made:
        settings = {"guidance_scale": entry["guidance_scale"], "num_inference_steps": entry["num_steps"]}
        for text in (entry["prompt"], KEPT):
            expected = pipeline(text, generator=torch.Generator().manual_seed(entry["seed"]), **settings).images[0]
            assert np.abs(image.astype(int) - np.asarray(expected)).max() <= 1
    assert Image.open(tmp_path / "new" / "images" / "grid.png").width > 500


def test_the_seed_gives_the_same_images_in_any_batches(
    generate: ModuleType, tiny_pipeline: Path, tmp_path: Path
) -> None:
    text = "red apple\n\n  green pear \n"  # a byte-order mark is no part of the first prompt
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8-sig")
    common = {"prompts_file": str(tmp_path / "prompts.txt"), "images_per_prompt": 2}
    of_batches = []
    for batch_size in (1, 3, 8):
        target = tmp_path / str(batch_size)
        generate.main(generate.Config(**fields(tiny_pipeline, target, **common, batch_size=batch_size)))
        of_batches.append(read(target))
    assert [entry["prompt"] for entry, _ in of_batches[0]] == ["red apple"] * 2 + ["green pear"] * 2
    for other in of_batches[1:]:
        for (entry, image), (same_entry, same_image) in zip(of_batches[0], other, strict=True):
            assert entry == same_entry
            assert np.abs(image.astype(int) - same_image).max() <= 1
    generate.main(generate.Config(**fields(tiny_pipeline, tmp_path / "again", **common, batch_size=3)))
    for (_, image), (_, same_image) in zip(of_batches[1], read(tmp_path / "again"), strict=True):
        np.testing.assert_array_equal(image, same_image)
    generate.main(generate.Config(**fields(tiny_pipeline, tmp_path / "other", **common, seed=1)))
    for (_, image), (_, other_image) in zip(of_batches[0], read(tmp_path / "other"), strict=True):
        assert np.abs(image.astype(int) - other_image).max() > 20


@pytest.mark.slow
def test_processes_share_the_images_and_bfloat16_makes_nearly_the_same(
    generate: ModuleType, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """Five images by two processes: the files of one process."""
    options = {"prompt": "a cat", "images_per_prompt": 5, "batch_size": 2}
    generate.main(generate.Config(**fields(tiny_pipeline, tmp_path / "one", **options)))
    flags = fields(tiny_pipeline, tmp_path / "two", **options)
    status, output = launch("multi_cpu", PROGRAM, *(f"--{name}={value}" for name, value in flags.items()))
    assert status == 0, output
    assert output.count("5 images, and together in grid.png") == 1
    flags["output_dir"] = str(tmp_path / "short")
    precision = {"launcher": ("--num_processes=2", "--mixed_precision=bf16"), "ACCELERATE_USE_CPU": "true"}
    assert launch("multi_cpu", PROGRAM, *(f"--{name}={value}" for name, value in flags.items()), **precision)[0] == 0
    one, two, short = (read(tmp_path / name) for name in ("one", "two", "short"))
    assert [entry for entry, _ in one] == [entry for entry, _ in two]
    for (_, image), (_, other) in zip(one, two, strict=True):
        assert np.abs(image.astype(int) - other).max() <= 1
    assert all(entry["precision"] == "bf16" for entry, _ in short)
    assert {image.shape for _, image in short} == {image.shape for _, image in one}


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_a_named_sampler_is_the_library_s(
    generate: ModuleType, tiny_pipeline: Path, tmp_path: Path, scheduler: str
) -> None:
    options = {"scheduler": scheduler, "images_per_prompt": 1, "guidance_scale": 2.0}
    generate.main(generate.Config(**fields(tiny_pipeline, tmp_path / "images", **options)))
    [(entry, image)] = read(tmp_path / "images")
    assert entry["scheduler"] == scheduler
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    wanted = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}[scheduler]
    unclipped = {"clip_sample": False, "set_alpha_to_one": False} if scheduler == "ddim" else {}
    pipeline.scheduler = wanted.from_config(pipeline.scheduler.config, **unclipped)
    generator = torch.Generator().manual_seed(entry["seed"])
    expected = pipeline(entry["prompt"], generator=generator, num_inference_steps=3, guidance_scale=2.0).images[0]
    assert np.abs(image.astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize(
    ("index", "prompt", "name"),
    [
        (0, "3D Fluent emoji, red apple", "00000-3d-fluent-emoji-red-apple.png"),
        (12345, "../../etc/passwd\0", "12345-etc-passwd.png"),
        (7, "червоне яблуко", "00007-image.png"),
        (7, "", "00007-image.png"),
        (7, "a" * 59 + " b" * 100, "00007-" + "a" * 59 + ".png"),
    ],
)
def test_file_names_are_plain(generate: ModuleType, index: int, prompt: str, name: str) -> None:
    assert generate.file_name(index, prompt) == name


def test_more_images_than_a_grid_can_show(generate: ModuleType, tiny_pipeline: Path, tmp_path: Path) -> None:
    options = {"images_per_prompt": 70, "num_steps": 1, "guidance_scale": 1.0, "batch_size": 35}
    generate.main(generate.Config(**fields(tiny_pipeline, tmp_path / "images", **options)))
    assert len(read(tmp_path / "images")) == 70


def test_bad_input_gets_one_line(generate: ModuleType, tiny_pipeline: Path, tmp_path: Path) -> None:
    no_dropout = Path(shutil.copytree(tiny_pipeline, tmp_path / "no_dropout"))
    (no_dropout / "config.yaml").write_text("caption_dropout: 0.0\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("\xe4pple".encode("latin-1"))
    (tmp_path / "file").write_text("")
    wanted = "expected a run folder or a Hub id of such a model: "
    cases: dict[str, dict[str, Any]] = {
        f"model: '{tmp_path}/nowhere': {wanted}": {"model": str(tmp_path / "nowhere")},
        f"model: '{tmp_path}': {wanted}Error no file named model_index.json": {"model": str(tmp_path)},
        f"model: '{tiny_pipeline}/vae': {wanted}": {"model": str(tiny_pipeline / "vae")},
        f"guidance_scale: 4.0: expected 1, for {no_dropout} was trained with caption_dropout 0": {
            "model": str(no_dropout)
        },
        "guidance_scale: 0.0: expected at least 1": {"guidance_scale": 0.0},
        "negative_prompt: 'fog': expected \"\" with guidance_scale 1": {
            "negative_prompt": "fog",
            "guidance_scale": 1.0,
        },
        "prompts_file: '/no/such.txt': expected a text file, got No such file": {"prompts_file": "/no/such.txt"},
        "latin.txt': expected a text file, got other bytes": {"prompts_file": str(tmp_path / "latin.txt")},
        "empty.txt': expected a prompt on each line, got none": {"prompts_file": str(tmp_path / "empty.txt")},
        "scheduler: 'best': expected \"\" for the model's own, or one of ddim, dpm, euler, unipc": {
            "scheduler": "best"
        },
        "num_steps: 0: expected at least 1": {"num_steps": 0},
        "num_steps: 2000: expected from 1 to 1000, the model's timesteps": {"num_steps": 2000},
        "batch_size: 0": {"batch_size": 0},
        "images_per_prompt: 0": {"images_per_prompt": 0},
        "seed: -1": {"seed": -1},
        f"output_dir: '{tmp_path}/file/x': expected a folder that can be written, '{tmp_path}/file' is not one": {
            "output_dir": str(tmp_path / "file" / "x")
        },
    }
    for message, changes in cases.items():
        with pytest.raises(cli.UsageError) as caught:
            generate.main(generate.Config(**{**fields(tiny_pipeline, tmp_path / "new"), **changes}))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    generate.main(generate.Config(**fields(no_dropout, tmp_path / "new", guidance_scale=1.0)))


def test_help_is_quick() -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), "--help"], capture_output=True, text=True, timeout=6)
    assert done.returncode == 0
    assert "--prompts_file" in done.stdout
