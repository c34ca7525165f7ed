"""Latents are the autoencoder's own, every image once, whatever stops the run and on any number of processes."""

import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import generate_aspect_ratio_buckets
from PIL import Image
from transformers import AutoTokenizer, CLIPTextModel

from shared import command_line as cli
from shared.diffusion import latent_cache
from shared.diffusion.captions import load_text_encoder, text_identity
from shared.images.decoding import EncodedImage
from tests.conftest import ROOT
from tests.launching import finish, preloaded_python, start
from tests.recipes.conftest import cache_flags
from tests.recipes.runs import run

PROGRAM = ROOT / "recipes" / "text_to_image" / "cache_latents.py"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_rows_are_the_library_s_latents_of_every_image(latents: Path, captioned: Path, tiny_vae: Path) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_vae).eval()
    manifest = latent_cache.read_manifest(latents, "latents")
    assert (manifest["images"], manifest["rows"]) == (47, 47)
    assert [entry["rows"] for entry in manifest["shards"]] == [16, 16, 8, 7]
    for split, number in (("train", 40), ("test", 7)):
        read = latent_cache.Latents(latents, manifest, split)
        assert list(read.captions()) == [f"{split} image {index}" for index in range(number)]
        for index in (0, 5, number - 1):
            data = (captioned / split / f"{index:02d}.png").read_bytes()
            pixels = EncodedImage(data).center_crop(16, 1.0)
            for mirrored, shown in ((False, pixels), (True, pixels[:, ::-1].copy())):
                scaled = torch.from_numpy(shown).permute(2, 0, 1)[None].float() / 127.5 - 1
                with torch.no_grad():
                    posterior = vae.encode(scaled).latent_dist
                found = read.read(index, mirrored=mirrored)
                assert found["caption"] == read.captions()[index]
                for name in ("mean", "std"):
                    expected = getattr(posterior, name)[0].numpy()
                    np.testing.assert_allclose(found[name], expected, rtol=2e-3, atol=2e-3)


def test_the_shards_are_a_data_set_of_the_library(latents: Path) -> None:
    opened = datasets.load_dataset("arrow", data_dir=str(latents))
    assert {name: len(split) for name, split in opened.items()} == {"train": 40, "test": 7}
    assert opened["train"]["index"] == list(range(40))


def test_one_sample_of_each_posterior_takes_half_of_the_room(
    cache_latents: ModuleType, latents: Path, captioned: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    """It is drawn from mean and deviation, other noise for each image and its mirror image, always the same."""
    flags = {**cache_flags(captioned, tiny_vae, tmp_path / "latents"), "sampled": True}
    run(cache_latents, cache_latents.Config(**flags))
    run(cache_latents, cache_latents.Config(**{**flags, "output_dir": str(tmp_path / "again"), "batch_size": 5}))
    whole, one, again = (
        latent_cache.Latents(folder, latent_cache.read_manifest(folder, "data"), "train")
        for folder in (latents, tmp_path / "latents", tmp_path / "again")
    )
    noise = []
    for index in range(len(whole)):
        for mirrored in (False, True):
            posterior, sample = whole.read(index, mirrored=mirrored), one.read(index, mirrored=mirrored)
            assert not sample["std"].any()
            noise.append((sample["mean"].astype(np.float64) - posterior["mean"]) / posterior["std"])
            np.testing.assert_allclose(again.read(index, mirrored=mirrored)["mean"], sample["mean"], atol=2e-3)
    noise = np.stack(noise)
    assert abs(noise.mean()) < 3 / math.sqrt(noise.size)
    assert noise.std() == pytest.approx(1.0, abs=3 / math.sqrt(noise.size))
    correlation = np.corrcoef(noise.reshape(len(noise), -1)) - np.eye(len(noise))
    assert np.abs(correlation).max() < 6 / math.sqrt(noise[0].size)
    sizes = [
        sum(entry["bytes"] for entry in latent_cache.read_manifest(folder, "data")["shards"])
        for folder in (tmp_path / "latents", latents)
    ]
    assert sizes[1] - sizes[0] == pytest.approx(47 * 2 * 2 * 8 * 8 * 2, rel=0.1)


def test_the_dry_run_says_what_the_files_take_and_leaves_nothing(
    cache_latents: ModuleType, full_latents: Path, full_flags: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    cfg = cache_latents.Config(**{**full_flags, "output_dir": str(tmp_path / "new")}, dry_run=True)
    run(cache_latents, cfg)
    printed = capsys.readouterr().out
    assert "first caption: train image 0\n" in printed
    assert re.search(r"images of train +40\n", printed)
    assert re.search(r"embedding of a caption +192 B\n", printed)  # 6 x 16 x 2
    read = [
        latent_cache.Latents(full_latents, latent_cache.read_manifest(full_latents, "data"), name)
        for name in ("train", "test")
    ]
    exact = (
        sum(2 * 2 * 2 * math.prod(shape) * len(rows) for split in read for shape, rows in split.buckets()) + 47 * 192
    )
    [(number, unit)] = re.findall(r"all images +([\d.]+) (\S+)\n", printed)
    assert (unit, float(number)) == ("KiB", pytest.approx(exact / 1024, rel=0.1))  # buckets differ in their areas
    assert not (tmp_path / "new").exists()


def test_a_disk_without_room_is_refused(
    cache_latents: ModuleType, captioned: Path, tiny_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=40_000))
    with pytest.raises(cli.UsageError, match=r"output_dir: '.*': expected a disk with 47 KiB of room, it has 39.1 KiB"):
        run(cache_latents, cache_latents.Config(**cache_flags(captioned, tiny_vae, tmp_path / "latents")))
    assert not (tmp_path / "latents").exists()


def test_bfloat16_is_float32_to_its_digits(
    cache_latents: ModuleType, latents: Path, captioned: Path, tiny_vae: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run(cache_latents, cache_latents.Config(**cache_flags(captioned, tiny_vae, tmp_path / "latents")))
    exact, short = (
        latent_cache.Latents(folder, latent_cache.read_manifest(folder, "data"), "test")
        for folder in (latents, tmp_path / "latents")
    )
    for name in ("mean", "std"):
        pairs = [(part.read(index, mirrored=False)[name] for part in (exact, short)) for index in range(7)]
        one, other = (np.stack(values).astype(np.float64) for values in zip(*pairs, strict=True))
        assert 0 < np.abs(one - other).mean() < 0.01 * one.std() + 1e-3, name


def buckets_of(folder: Path, split: str) -> list[tuple[int, int]]:
    """The bucket of each image by the logarithm of its aspect ratio, in pixels."""
    buckets = generate_aspect_ratio_buckets(16, 4)
    assert len(buckets) == 5
    found = []
    for path in sorted((folder / split).glob("*.png")):
        width, height = Image.open(path).size
        found.append(min(buckets, key=lambda bucket: abs(math.log(height * bucket[1] / width / bucket[0]))))
    return found


def test_images_of_many_shapes_are_resized_and_cut_to_their_buckets(
    full_latents: Path, of_many_shapes: Path, tiny_vae: Path
) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_vae).eval()
    manifest = latent_cache.read_manifest(full_latents, "latents")
    assert manifest["buckets"] == [list(bucket) for bucket in generate_aspect_ratio_buckets(16, 4)]
    for split in ("train", "test"):
        buckets = buckets_of(of_many_shapes, split)
        assert len(set(buckets)) >= 4
        read = latent_cache.Latents(full_latents, manifest, split)
        assert len(read) == len(buckets)
        for index, (height, width) in enumerate(buckets):
            image = Image.open(of_many_shapes / split / f"{index:02d}.png")
            scale = max(height / image.height, width / image.width)
            image = image.resize((int(image.width * scale + 1e-6), int(image.height * scale + 1e-6)), Image.BILINEAR)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            pixels = np.array(image.crop((left, top, left + width, top + height)))
            for mirrored, shown in ((False, pixels), (True, pixels[:, ::-1].copy())):
                with torch.no_grad():
                    scaled = torch.from_numpy(shown).permute(2, 0, 1)[None].float() / 127.5 - 1
                    posterior = vae.encode(scaled).latent_dist
                found = read.read(index, mirrored=mirrored)
                for name in ("mean", "std"):
                    assert found[name].shape == (2, height // 2, width // 2)
                    expected = getattr(posterior, name)[0].numpy()
                    np.testing.assert_allclose(found[name], expected, rtol=2e-3, atol=2e-3)


def test_buckets_are_the_rows_of_each_shape(full_latents: Path, latents: Path, of_many_shapes: Path) -> None:
    read = latent_cache.Latents(full_latents, latent_cache.read_manifest(full_latents, "latents"), "train")
    expected: dict[tuple[int, int, int], list[int]] = {}
    for index, (height, width) in enumerate(buckets_of(of_many_shapes, "train")):
        expected.setdefault((2, height // 2, width // 2), []).append(index)
    assert [(shape, rows.tolist()) for shape, rows in read.buckets()] == sorted(expected.items())
    assert {rows.dtype for _, rows in read.buckets()} == {np.dtype(np.int64)}
    squares = latent_cache.Latents(latents, latent_cache.read_manifest(latents, "latents"), "test")
    assert [(shape, rows.tolist()) for shape, rows in squares.buckets()] == [((2, 8, 8), list(range(7)))]
    assert latent_cache.read_manifest(latents, "latents")["buckets"] == [[16, 16]]


def test_text_is_the_encoder_s_own_to_float16(full_latents: Path, tiny_text_encoder: Path) -> None:
    manifest = latent_cache.read_manifest(full_latents, "latents")
    tokenizer = AutoTokenizer.from_pretrained(tiny_text_encoder)
    encoder = CLIPTextModel.from_pretrained(tiny_text_encoder).eval()
    assert manifest["text_shape"] == [6, 16]
    for split in ("train", "test"):
        read = latent_cache.Latents(full_latents, manifest, split)
        for index, caption in enumerate(read.captions()):
            ids = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids
            with torch.no_grad():
                expected = encoder(ids).last_hidden_state[0].numpy()
            found = read.read(index, mirrored=False)["text"]
            assert (found.shape, found.dtype) == ((6, 16), np.float16)
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_captions_that_are_too_long_are_cut_counted_and_named_once(
    cache_latents: ModuleType, full_flags: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(cache_latents, cache_latents.Config(**{**full_flags, "output_dir": str(tmp_path / "latents")}))
    assert capfd.readouterr().out.count("10 captions of this run were cut to 6 tokens") == 1


@pytest.fixture(params=["squares", "full"])
def made(request: pytest.FixtureRequest, captioned: Path, tiny_vae: Path) -> tuple[Path, dict[str, Any]]:
    """A cache and the flags that made it: squares without text, or buckets with it."""
    if request.param == "squares":
        return request.getfixturevalue("latents"), cache_flags(captioned, tiny_vae, Path())
    return request.getfixturevalue("full_latents"), request.getfixturevalue("full_flags")


@pytest.mark.parametrize("lost", [["data/train-00001-of-00003.arrow"], ["manifest.json"]])
def test_a_killed_run_goes_on(
    cache_latents: ModuleType, made: tuple[Path, dict[str, Any]], tmp_path: Path, lost: list[str]
) -> None:
    """With what is missing, and with what was half written lying about."""
    latents, flags = made
    files = files_of(latents)
    for name, content in files.items():
        if name not in (*lost, "manifest.json"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    (tmp_path / "data" / ".train-00001-of-00003.arrow").write_bytes(b"half of")
    with pytest.raises(cli.UsageError, match="it is not complete, the command that made it goes on"):
        latent_cache.read_manifest(tmp_path, "latents")
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in files if (tmp_path / name).exists()}
    run(cache_latents, cache_latents.Config(**{**flags, "output_dir": str(tmp_path)}))
    assert {name: content for name, content in files_of(tmp_path).items() if "/." not in name} == files
    shards = [name for name in kept if name.endswith(".arrow")]
    assert all((tmp_path / name).stat().st_mtime_ns == kept[name] for name in shards)


def test_two_processes_with_workers_make_the_same_files(
    full_latents: Path, full_flags: dict[str, Any], tmp_path: Path
) -> None:
    options = {**full_flags, "output_dir": tmp_path / "latents", "num_workers": 1}
    flags = [f"--{name}={value}" for name, value in options.items()]
    process = start("multi_cpu", PROGRAM, *flags, python=preloaded_python())
    output = finish(process)
    assert process.returncode == 0, output
    assert output.count("10 captions of this run were cut to 6 tokens") == 1
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    expected = json.loads((full_latents / "manifest.json").read_text())
    for entry in (*manifest["shards"], *expected["shards"]):
        del entry["sha256"], entry["bytes"]  # of float16 numbers that another number of threads computed
    assert manifest == expected
    one, other = (latent_cache.Latents(folder, manifest, "train") for folder in (full_latents, tmp_path / "latents"))
    for index in range(40):
        mine, theirs = (cache.read(index, mirrored=True) for cache in (one, other))
        for name in ("mean", "std", "text"):
            np.testing.assert_allclose(mine[name], theirs[name], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_and_doubles_nothing(full_flags: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL while it encodes, again and again, until a run comes to its end."""
    options = {**full_flags, "output_dir": tmp_path / "latents", "images_per_shard": 2, "batch_size": 1}
    command = [*preloaded_python(), str(PROGRAM), *(f"--{name}={value}" for name, value in options.items())]
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
        time.sleep(0.1)  # until the program itself has gone
        kills += 1
    assert process.returncode == 0
    assert kills >= 5
    manifest = latent_cache.read_manifest(tmp_path / "latents", "latents")
    assert manifest["rows"] == 47
    opened = datasets.load_dataset("arrow", data_dir=str(tmp_path / "latents"), cache_dir=str(tmp_path / "hf"))
    assert opened["train"]["index"] == list(range(40))


def test_damaged_images_are_left_out_named_and_refused_beyond_a_share(
    cache_latents: ModuleType, captioned: Path, tiny_vae: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    shutil.copytree(captioned, data)
    (data / "train" / "03.png").write_bytes(b"no image")
    options = cache_flags(data, tiny_vae, tmp_path / "latents")
    with pytest.raises(cli.UsageError, match=r"max_bad_fraction: 0.01: expected at least 0.021, the share of images"):
        run(cache_latents, cache_latents.Config(**options))
    assert not (tmp_path / "latents" / "manifest.json").exists()
    with caplog.at_level(logging.WARNING):
        run(
            cache_latents,
            cache_latents.Config(**{**options, "output_dir": str(tmp_path / "other")}, max_bad_fraction=0.1),
        )
    assert "03.png (row 3) cannot be decoded and is left out" in caplog.text
    manifest = latent_cache.read_manifest(tmp_path / "other", "latents")
    assert (manifest["images"], manifest["rows"], manifest["left_out"]) == (47, 46, {"damaged_images": 1})
    assert "train image 3" not in latent_cache.Latents(tmp_path / "other", manifest, "train").captions()


def test_a_shard_without_a_image_is_one_of_the_data_set(
    cache_latents: ModuleType, captioned: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    shutil.copytree(captioned, tmp_path / "data")
    (tmp_path / "data" / "train" / "39.png").write_bytes(b"no image")
    options = {**cache_flags(tmp_path / "data", tiny_vae, tmp_path / "latents"), "images_per_shard": 39}
    run(cache_latents, cache_latents.Config(**options, max_bad_fraction=0.1))
    manifest = latent_cache.read_manifest(tmp_path / "latents", "latents")
    assert [entry["rows"] for entry in manifest["shards"]] == [39, 0, 7]
    assert len(latent_cache.Latents(tmp_path / "latents", manifest, "train")) == 39
    assert len(datasets.load_dataset("arrow", data_dir=str(tmp_path / "latents"), split="train")) == 39


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
        "expected images that fill 18 x 18 pixels (height x width); 40 of 40 tried are smaller": {"image_size": 18},
        "bucket_multiple: 1: expected a multiple of 2, for the autoencoder halves it": {"bucket_multiple": 1},
        "bucket_multiple: 6: expected a divisor of image_size, 16": {"bucket_multiple": 6},
        "bucket_multiple: -1: expected at least 0": {"bucket_multiple": -1},
        "text_encoder: '/no/encoder'": {"text_encoder": "/no/encoder"},
        "expected an empty folder or a cache of latents, it holds other files": {"output_dir": str(tmp_path / "mine")},
        "expected an empty folder or the same cache, not vae '": {
            "output_dir": str(latents),
            "vae": str(tmp_path / "other_vae"),
        },
        "the same cache, not mirrored True -> False": {"output_dir": str(latents), "mirrored": False},
        "the same cache, not buckets [[16, 16]] -> [[12, 12]]": {"output_dir": str(latents), "image_size": 12},
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
    wanted = {"vae": manifest["vae"], "buckets": [[16, 16]]}
    latent_cache.check_identity(manifest, wanted, "latents", latents)
    with pytest.raises(cli.UsageError, match=r"latents: .* expected a cache as configured, not mirrored True -> False"):
        latent_cache.check_identity(manifest, {**wanted, "mirrored": False}, "latents", latents)
    with pytest.raises(cli.UsageError, match=r"latents: .* expected a cache of latents, there is no manifest.json"):
        latent_cache.read_manifest(tmp_path, "latents")
    for name, content in files_of(latents).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "data" / "train-00002-of-00003.arrow").unlink()
    with pytest.raises(cli.UsageError, match=r"train-00002-of-00003\.arrow is lost or changed"):
        latent_cache.read_manifest(tmp_path, "latents")
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [{"file": "data/train-00000-of-00001.parquet"}]}))
    with pytest.raises(cli.UsageError, match=r"expected shards with the suffix \.arrow, make another cache"):
        latent_cache.read_manifest(tmp_path, "latents")


def test_a_cache_of_another_text_encoder_is_refused(
    cache_latents: ModuleType,
    full_latents: Path,
    full_flags: dict[str, Any],
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    """By who goes on making it and by who reads it: of other weights, of another tokenizer, and of none."""
    manifest = latent_cache.read_manifest(full_latents, "latents")
    tokenizer, encoder = load_text_encoder(str(tiny_text_encoder), "text_encoder")
    latent_cache.check_identity(manifest, text_identity(tokenizer, encoder), "latents", full_latents)
    tokenizer.pad_token = "<|endoftext|>"
    for part in (tokenizer, encoder):
        part.save_pretrained(tmp_path / "other_tokenizer")
    for file in tiny_text_encoder.iterdir():
        (tmp_path / "other_weights").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "other_weights")
    with torch.no_grad():
        encoder.final_layer_norm.bias += 1e-3
    encoder.save_pretrained(tmp_path / "other_weights")
    before = files_of(full_latents)
    for name in ("other_tokenizer", "other_weights"):
        other = text_identity(*load_text_encoder(str(tmp_path / name), "text_encoder"))
        with pytest.raises(cli.UsageError, match="expected a cache as configured, not text_encoder '"):
            latent_cache.check_identity(manifest, other, "latents", full_latents)
    for name in (tmp_path / "other_tokenizer", tmp_path / "other_weights", ""):
        flags = {**full_flags, "output_dir": str(full_latents), "text_encoder": str(name)}
        with pytest.raises(cli.UsageError, match="expected an empty folder or the same cache, not text_encoder '"):
            run(cache_latents, cache_latents.Config(**flags))
    assert files_of(full_latents) == before


def test_a_damaged_image_leaves_a_gap_in_its_bucket(
    cache_latents: ModuleType, full_latents: Path, full_flags: dict[str, Any], of_many_shapes: Path, tmp_path: Path
) -> None:
    """All others are what they were."""
    shutil.copytree(of_many_shapes, tmp_path / "data")
    (tmp_path / "data" / "train" / "03.png").write_bytes(b"no image")
    target = tmp_path / "latents"
    flags = {**full_flags, "data": str(tmp_path / "data"), "output_dir": str(target), "max_bad_fraction": 0.1}
    run(cache_latents, cache_latents.Config(**flags))
    whole = latent_cache.Latents(full_latents, latent_cache.read_manifest(full_latents, "latents"), "train")
    rest = latent_cache.Latents(target, latent_cache.read_manifest(target, "latents"), "train")
    others = [index for index in range(40) if index != 3]
    assert list(rest.captions()) == [whole.captions()[index] for index in others]
    for row, index in enumerate(others):
        found, expected = (cache.read(at, mirrored=False) for cache, at in ((rest, row), (whole, index)))
        for name in ("mean", "std", "text"):
            np.testing.assert_allclose(found[name], expected[name], rtol=2e-3, atol=2e-3)
