"""Latents are the autoencoder's own, every picture once, whatever stops the run and on any number of processes."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import diffusers
import numpy as np
import pytest
import torch

from shared import command_line as cli
from shared import latent_cache
from shared.decoding import EncodedPicture
from tests.conftest import ROOT
from tests.launching import finish, start
from tests.recipes.conftest import cache_flags
from tests.recipes.runs import run

PROGRAM = ROOT / "recipes" / "text_to_image" / "cache_latents.py"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_rows_are_the_library_s_latents_of_every_picture(latents: Path, captioned: Path, tiny_vae: Path) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_vae).eval()
    manifest = latent_cache.read_manifest(latents, "latents")
    assert (manifest["pictures"], manifest["rows"]) == (47, 47)
    assert [entry["rows"] for entry in manifest["shards"]] == [16, 16, 8, 7]
    for split, number in (("train", 40), ("test", 7)):
        read = latent_cache.Latents(latents, manifest, split)
        assert list(read.captions()) == [f"{split} picture {index}" for index in range(number)]
        for index in (0, 5, number - 1):
            data = (captioned / split / f"{index:02d}.png").read_bytes()
            pixels = EncodedPicture(data).center_crop(16, 1.0)
            for mirrored, picture in ((False, pixels), (True, pixels[:, ::-1].copy())):
                scaled = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
                with torch.no_grad():
                    posterior = vae.encode(scaled).latent_dist
                found = read.read(index, mirrored=mirrored)
                for part, expected in zip(found, (posterior.mean, posterior.std), strict=True):
                    np.testing.assert_allclose(part, expected[0].numpy(), rtol=2e-3, atol=2e-3)


def test_the_shards_are_a_data_set_of_the_library(latents: Path) -> None:
    opened = datasets.load_dataset("parquet", data_dir=str(latents))
    assert {name: len(split) for name, split in opened.items()} == {"train": 40, "test": 7}
    assert opened["train"]["index"] == list(range(40))


@pytest.mark.parametrize("lost", [["data/train-00001-of-00003.parquet"], ["manifest.json"]])
def test_a_killed_run_goes_on(
    cache_latents: ModuleType, captioned: Path, tiny_vae: Path, latents: Path, tmp_path: Path, lost: list[str]
) -> None:
    """With what is missing, and with what was half written lying about."""
    files = files_of(latents)
    for name, content in files.items():
        if name not in (*lost, "manifest.json"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    (tmp_path / "data" / ".train-00001-of-00003.parquet").write_bytes(b"half of")
    with pytest.raises(cli.UsageError, match="it is not complete, the command that made it goes on"):
        latent_cache.read_manifest(tmp_path, "latents")
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in files if (tmp_path / name).exists()}
    run(cache_latents, cache_latents.Config(**cache_flags(captioned, tiny_vae, tmp_path)))
    assert {name: content for name, content in files_of(tmp_path).items() if "/." not in name} == files
    shards = [name for name in kept if name.endswith(".parquet")]
    assert all((tmp_path / name).stat().st_mtime_ns == kept[name] for name in shards)


def test_two_processes_with_workers_make_the_same_files(
    captioned: Path, tiny_vae: Path, latents: Path, tmp_path: Path
) -> None:
    options = {**cache_flags(captioned, tiny_vae, tmp_path / "latents"), "num_workers": 1}
    process = start("multi_cpu", str(PROGRAM), *(f"--{name}={value}" for name, value in options.items()))
    output = finish(process)
    assert process.returncode == 0, output
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    expected = json.loads((latents / "manifest.json").read_text())
    for entry in (*manifest["shards"], *expected["shards"]):
        del entry["sha256"], entry["bytes"]  # of float16 numbers that another number of threads computed
    assert manifest == expected
    one, other = (latent_cache.Latents(folder, manifest, "train") for folder in (latents, tmp_path / "latents"))
    for index in range(40):
        for mine, theirs in zip(one.read(index, mirrored=True), other.read(index, mirrored=True), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_and_doubles_nothing(captioned: Path, tiny_vae: Path, tmp_path: Path) -> None:
    """SIGKILL while it encodes, again and again, until a run comes to its end."""
    options = {**cache_flags(captioned, tiny_vae, tmp_path / "latents"), "pictures_per_shard": 2, "batch_size": 1}
    command = [sys.executable, str(PROGRAM), *(f"--{name}={value}" for name, value in options.items())]
    kills = 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
        before = len(list((tmp_path / "latents").glob("data/[!.]*")))
        while process.poll() is None and len(list((tmp_path / "latents").glob("data/[!.]*"))) < before + 3:
            time.sleep(0.001)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0
    assert kills >= 5
    manifest = latent_cache.read_manifest(tmp_path / "latents", "latents")
    assert manifest["rows"] == 47
    opened = datasets.load_dataset("parquet", data_dir=str(tmp_path / "latents"), cache_dir=str(tmp_path / "hf"))
    assert opened["train"]["index"] == list(range(40))


def test_damaged_pictures_are_left_out_named_and_refused_beyond_a_share(
    cache_latents: ModuleType, captioned: Path, tiny_vae: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    shutil.copytree(captioned, data)
    (data / "train" / "03.png").write_bytes(b"no picture")
    options = cache_flags(data, tiny_vae, tmp_path / "latents")
    with pytest.raises(cli.UsageError, match=r"max_bad_fraction: 0.01: expected at least 0.021, the share of pictures"):
        run(cache_latents, cache_latents.Config(**options))
    assert not (tmp_path / "latents" / "manifest.json").exists()
    with caplog.at_level(logging.WARNING):
        run(
            cache_latents,
            cache_latents.Config(**{**options, "output_dir": str(tmp_path / "other")}, max_bad_fraction=0.1),
        )
    assert "03.png (row 3) cannot be decoded and is left out" in caplog.text
    manifest = latent_cache.read_manifest(tmp_path / "other", "latents")
    assert (manifest["pictures"], manifest["rows"]) == (47, 46)
    assert "train picture 3" not in latent_cache.Latents(tmp_path / "other", manifest, "train").captions()


def test_a_shard_without_a_picture_is_one_of_the_data_set(
    cache_latents: ModuleType, captioned: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    shutil.copytree(captioned, tmp_path / "data")
    (tmp_path / "data" / "train" / "39.png").write_bytes(b"no picture")
    options = {**cache_flags(tmp_path / "data", tiny_vae, tmp_path / "latents"), "pictures_per_shard": 39}
    run(cache_latents, cache_latents.Config(**options, max_bad_fraction=0.1))
    manifest = latent_cache.read_manifest(tmp_path / "latents", "latents")
    assert [entry["rows"] for entry in manifest["shards"]] == [39, 0, 7]
    assert len(latent_cache.Latents(tmp_path / "latents", manifest, "train")) == 39
    assert len(datasets.load_dataset("parquet", data_dir=str(tmp_path / "latents"), split="train")) == 39


def test_bad_input_gets_one_line(
    cache_latents: ModuleType, captioned: Path, tiny_vae: Path, latents: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not yours")
    other = diffusers.AutoencoderKL.from_pretrained(tiny_vae)
    with torch.no_grad():
        other.quant_conv.bias += 1
    other.save_pretrained(tmp_path / "other_vae")
    cases: dict[str, dict[str, Any]] = {
        "data: '/no/such/folder'": {"data": "/no/such/folder"},
        "data_split: 'dev': expected one of train, test": {"data_splits": "dev"},
        "caption_column: 'alt': expected a column of texts": {"caption_column": "alt"},
        "vae: '/no/vae'": {"vae": "/no/vae"},
        "image_size: 15: expected a multiple of 2, for the autoencoder halves it": {"image_size": 15},
        "expected pictures of at least 18 pixels": {"image_size": 18},
        "expected an empty folder or a cache of latents, it holds other files": {"output_dir": str(tmp_path / "mine")},
        "expected an empty folder or the same cache, not vae '": {
            "output_dir": str(latents),
            "vae": str(tmp_path / "other_vae"),
        },
        "the same cache, not mirrored True -> False": {"output_dir": str(latents), "mirrored": False},
        "batch_size: 0": {"batch_size": 0},
    }
    before = files_of(latents)
    for message, fields in cases.items():
        with pytest.raises(cli.UsageError) as caught:
            run(cache_latents, cache_latents.Config(**{**cache_flags(captioned, tiny_vae, tmp_path / "new"), **fields}))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert files_of(latents) == before
    assert not (tmp_path / "new").exists()


def test_a_cache_of_something_else_is_refused_by_its_reader(latents: Path, tmp_path: Path) -> None:
    manifest = latent_cache.read_manifest(latents, "latents")
    wanted = {"vae": manifest["vae"], "image_size": 16}
    latent_cache.check_identity(manifest, wanted, "latents", latents)
    with pytest.raises(cli.UsageError, match=r"latents: .* expected a cache as configured, not image_size 16 -> 32"):
        latent_cache.check_identity(manifest, {**wanted, "image_size": 32}, "latents", latents)
    with pytest.raises(cli.UsageError, match=r"latents: .* expected a cache of latents, there is no manifest.json"):
        latent_cache.read_manifest(tmp_path, "latents")
    for name, content in files_of(latents).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "data" / "train-00002-of-00003.parquet").unlink()
    with pytest.raises(cli.UsageError, match=r"train-00002-of-00003\.parquet is lost or changed"):
        latent_cache.read_manifest(tmp_path, "latents")
