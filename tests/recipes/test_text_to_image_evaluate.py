"""The numbers are what the libraries and plain counting give, and bad input is one line."""

import json
import logging
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
import transformers
from accelerate import Accelerator
from torchmetrics.image.fid import FrechetInceptionDistance

from shared import command_line as cli
from shared.data.randomness import derive_seed
from shared.images.decoding import EncodedImage
from tests import pipelines
from tests.conftest import ROOT
from tests.launching import launch

PROGRAM = ROOT / "recipes" / "text_to_image" / "evaluate.py"
KEYS = ["eval/frechet_distance", "eval/caption_match_top1", "eval/caption_match_top5"]


@pytest.fixture
def fields(tiny_pipeline: Path, tiny_classifier: Path, captioned: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a run on the 7 images of the split test."""
    options = {"model": str(tiny_pipeline), "features": str(tiny_classifier), "data": str(captioned)}
    return {**options, "output_dir": str(tmp_path / "out"), "image_size": 16, "num_steps": 3, "batch_size": 3}


def run(evaluate: ModuleType, fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    fields = {**fields, **changes}
    evaluate.main(evaluate.Config(**fields))
    return json.loads((Path(fields["output_dir"] or fields["model"]) / "evaluation.json").read_text())


def expected_numbers(true: torch.Tensor, made: torch.Tensor, classifier: Path) -> list[float]:
    """Distance and matches of uint8 (N, 3, 16, 16), by the libraries and by counting."""
    model = transformers.ResNetForImageClassification.from_pretrained(classifier).eval()
    statistics = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.4]])[:, :, None, None]

    class Features(torch.nn.Module):
        num_features = 12

        @torch.no_grad()
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return model.resnet((images / 255 - statistics[0]) / statistics[1]).pooler_output.flatten(1)

    metric = FrechetInceptionDistance(feature=Features())
    metric.update(true, real=True)
    metric.update(made, real=False)
    of_true, of_made = (Features()(images).double().numpy() for images in (true, made))
    center = of_true.mean(0)
    ranks = []
    for index, row in enumerate(of_made - center):
        near = [row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in of_true - center]
        ranks.append(sum(value > near[index] for value in near))
    return [metric.compute().item(), np.mean(np.array(ranks) < 1), np.mean(np.array(ranks) < 5)]


def read_true(captioned: Path, number: int) -> torch.Tensor:
    files = [(captioned / "test" / f"{index:02d}.png").read_bytes() for index in range(number)]
    pixels = np.stack([EncodedImage(data).center_crop(16, 1.0) for data in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_the_classifier_is_asked_what_the_images_are(
    evaluate: ModuleType, fields: dict[str, Any], captioned: Path, tiny_classifier: Path
) -> None:
    """Against the library's own model."""
    model = transformers.ResNetForImageClassification.from_pretrained(tiny_classifier).eval()
    true, statistics = read_true(captioned, 7), torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.4]])[:, :, None, None]
    with torch.no_grad():
        expected = model((true / 255 - statistics[0]) / statistics[1]).logits.argmax(1)
    network = evaluate.load_classifier(str(tiny_classifier), "classifier")
    assert torch.equal(network.classes(true), expected)
    shares = evaluate.share_of_classes(network, true.split(3))
    assert list(shares.values()) == pytest.approx([float((expected == one).double().mean()) for one in range(2)])
    found = run(evaluate, fields, classifier=str(tiny_classifier), num_steps=1)
    for part in ("metrics", "reconstructions"):
        asked = [found[part][f"eval/taken_for/{name}"] for name in network.class_names]
        assert sum(asked) == pytest.approx(1)


def test_images_are_chosen_by_their_captions(evaluate: ModuleType, fields: dict[str, Any], captioned: Path) -> None:
    cfg = evaluate.Config(**fields)
    assert evaluate.open_data(cfg, "train", None, "image 3")[1] == [3, *range(30, 40)]
    with pytest.raises(cli.UsageError, match="captions_with: 'image 6': expected text that at least two captions of"):
        evaluate.open_data(cfg, "test", None, "image 6")


def test_the_numbers_are_the_libraries(
    evaluate: ModuleType,
    fields: dict[str, Any],
    captioned: Path,
    tiny_pipeline: Path,
    tiny_classifier: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run(evaluate, fields, seed=3)
    assert (found["num_images"], found["settings"]["data_split"]) == (7, "test")
    assert found["chance"] == {KEYS[1]: 1 / 7, KEYS[2]: 5 / 7}
    true = read_true(captioned, 7)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    settings = {"guidance_scale": 4.0, "num_inference_steps": 3}
    generators = [torch.Generator().manual_seed(derive_seed(3, index)) for index in range(7)]
    captions = [f"test image {index}" for index in range(7)]
    images = [
        pipeline(caption, generator=generator, **settings).images[0]
        for caption, generator in zip(captions, generators, strict=True)
    ]
    made = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = pipeline.vae.encode(true / 127.5 - 1).latent_dist.mode()
        decoded = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample, output_type="np")
    reconstructed = torch.from_numpy((decoded * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    printed = capsys.readouterr().out
    for name, images in (("metrics", made), ("reconstructions", reconstructed)):
        expected = expected_numbers(true, images, tiny_classifier)
        assert list(found[name]) == KEYS
        np.testing.assert_allclose(list(found[name].values()), expected, rtol=1e-2, atol=1e-4)
        assert all(f"{value:.3f}" in printed for value in found[name].values())


def test_true_images_match_themselves_and_no_others(
    evaluate: ModuleType, captioned: Path, tiny_classifier: Path
) -> None:
    true, network = read_true(captioned, 7), evaluate.load_features(str(tiny_classifier), "features")
    same, chance = evaluate.measure(network, true, true[:0], true, batch_size=3, mine=slice(None))
    assert same == {KEYS[0]: pytest.approx(0, abs=1e-5), KEYS[1]: 1.0, KEYS[2]: 1.0}
    others, _ = evaluate.measure(network, true, true[:0], true.roll(1, 0), batch_size=3, mine=slice(None))
    assert others[KEYS[0]] == pytest.approx(0, abs=1e-5)
    assert others[KEYS[1]] == 0.0
    assert chance == {KEYS[1]: 1 / 7, KEYS[2]: 5 / 7}
    beside, chance = evaluate.measure(network, true, 255 - true, true, batch_size=3, mine=slice(None))
    assert beside == same
    assert chance == {KEYS[1]: 1 / 14, KEYS[2]: 5 / 14}
    taken, _ = evaluate.measure(network, true.roll(1, 0), true[2:], true, batch_size=3, mine=slice(None))
    assert taken == {KEYS[0]: pytest.approx(0, abs=1e-5), KEYS[1]: 0.0, KEYS[2]: taken[KEYS[2]]}


def test_an_autoencoder_without_a_distribution_reconstructs_as_well(evaluate: ModuleType, captioned: Path) -> None:
    torch.manual_seed(0)
    channels, layers, scales = (8, 16), (1, 1), ((), ())
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
    ).eval()
    true = read_true(captioned, 3)
    with torch.no_grad():
        expected = vae(true / 127.5 - 1).sample.clamp(-1, 1) * 127.5 + 127.5
    assert (evaluate.reconstruct(vae, true, batch_size=2) - expected).abs().max() < 0.51


def test_the_batch_size_changes_nothing(evaluate: ModuleType, fields: dict[str, Any]) -> None:
    one, other = (run(evaluate, fields, batch_size=batch_size) for batch_size in (1, 7))
    for name in ("metrics", "reconstructions"):
        np.testing.assert_allclose(list(one[name].values()), list(other[name].values()), rtol=2e-2, atol=1e-4)


@pytest.mark.slow
def test_processes_share_the_images(evaluate: ModuleType, fields: dict[str, Any], tmp_path: Path) -> None:
    """Seven images by two processes: the numbers of one process, and one table."""
    one = run(evaluate, fields)
    flags = {**fields, "output_dir": tmp_path / "two"}
    status, output = launch("multi_cpu", PROGRAM, *(f"--{name}={value}" for name, value in flags.items()))
    assert status == 0, output
    assert output.count("evaluation.json") == 1
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3)
    precision = {"launcher": ("--num_processes=2", "--mixed_precision=bf16"), "ACCELERATE_USE_CPU": "true"}
    assert launch("multi_cpu", PROGRAM, *(f"--{name}={value}" for name, value in flags.items()), **precision)[0] == 0
    short = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert short["settings"]["precision"] == "bf16"
    assert short["metrics"].keys() == one["metrics"].keys()
    assert short["metrics"] != one["metrics"]


def test_a_image_does_not_depend_on_which_others_are_measured(evaluate: ModuleType, fields: dict[str, Any]) -> None:
    pipeline = evaluate.load_pipeline(fields["model"], "model")
    made: dict[int, dict[int, torch.Tensor]] = {}
    for number in (7, 3):
        cfg = evaluate.Config(**fields, max_images=number)
        captions, positions, true = evaluate.open_data(cfg, "test", number)
        assert captions == [f"test image {position}" for position in positions]
        assert len(positions) == number
        both = torch.cat(
            [true, evaluate.make(cfg, Accelerator(cpu=True), pipeline, captions, positions, slice(None))], dim=1
        ).int()
        made[number] = dict(zip(positions, both, strict=True))
    assert list(made[3]) == [0, 3, 6]
    for position, images in made[3].items():
        assert (images - made[7][position]).abs().max() <= 1


def test_a_damaged_image_is_left_out_and_named(
    evaluate: ModuleType, fields: dict[str, Any], captioned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(captioned, tmp_path / "data")
    (tmp_path / "data" / "test" / "02.png").write_bytes(b"no image")
    cfg = evaluate.Config(**{**fields, "data": str(tmp_path / "data")})
    captions, positions, true = evaluate.open_data(cfg, "test", None)
    assert positions == [0, 1, 3, 4, 5, 6]
    assert captions == [f"test image {position}" for position in positions]
    assert torch.equal(true, read_true(captioned, 7)[positions])
    assert "02.png (row 2) cannot be decoded and is left out" in caplog.text


def test_the_sample_is_measured_on_unseen_combinations_into_the_run_folder(
    evaluate: ModuleType, fields: dict[str, Any], tiny_pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Most of the captions are longer than the tiny text encoder takes."""
    model = Path(shutil.copytree(tiny_pipeline, tmp_path / "run"))
    changes = {"data": "sample", "max_images": 3, "num_steps": 1, "model": str(model), "output_dir": ""}
    with caplog.at_level(logging.WARNING):
        found = run(evaluate, fields, **changes)
    assert (found["settings"]["data_split"], found["num_images"]) == ("test_unseen_combination", 3)
    assert (found["settings"]["others_split"], found["num_others"]) == ("train", 4599)
    assert found["settings"]["scheduler"] == "DPMSolverMultistepScheduler"
    assert "3 of 3 captions are longer than the text encoder takes and cut" in caplog.text
    assert (model / "figures" / "evaluation.png").stat().st_size > 1000


def test_bad_input_gets_one_line(
    evaluate: ModuleType, fields: dict[str, Any], captioned: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    no_dropout = Path(shutil.copytree(tiny_pipeline, tmp_path / "no_dropout"))
    (no_dropout / "config.yaml").write_text("caption_dropout: 0.0\n")
    train_alone = Path(shutil.copytree(captioned, tmp_path / "data", ignore=shutil.ignore_patterns("test")))
    (tmp_path / "file").write_text("")
    cases: dict[str, dict[str, Any]] = {
        f"model: '{tmp_path}': expected a run folder or a Hub id": {"model": str(tmp_path)},
        "output_dir: '': expected a folder, for the model 'me/model' is none": {"model": "me/model", "output_dir": ""},
        "file/x': expected a folder that can be written": {"output_dir": str(tmp_path / "file" / "x")},
        "guidance_scale: 4.0: expected 1, for ": {"model": str(no_dropout)},
        "data: '/no/such/folder': expected": {"data": "/no/such/folder"},
        "data_split: 'dev': expected one of train, test": {"data_split": "dev"},
        "data_split: '': expected a name, for no split's begins with validation": {"data": str(train_alone)},
        "caption_column: 'alt': expected a column of texts": {"caption_column": "alt"},
        "image_column: 'alt': expected a column that holds images": {"image_column": "alt"},
        "expected images of at least 18 pixels": {"image_size": 18},
        "image_size: 14: expected the sides of the model's images, 16 x 16": {"image_size": 14},
        "features: '': expected inception, or a classifier of such images": {"features": ""},
        "features: '/no/features': expected a run folder or a Hub id": {"features": "/no/features"},
        "num_steps: 1001: expected from 1 to 1000": {"num_steps": 1001},
        "max_images: 1: expected at least 2": {"max_images": 1},
        "batch_size: 0": {"batch_size": 0},
        "seed: -1": {"seed": -1},
    }
    for message, changes in cases.items():
        with pytest.raises(cli.UsageError) as caught:
            run(evaluate, fields, **changes)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not Path(fields["output_dir"]).exists()


def test_a_pipeline_without_an_autoencoder_is_refused(
    evaluate: ModuleType, fields: dict[str, Any], tmp_path: Path
) -> None:
    pipelines.prx(None).save_pretrained(tmp_path / "pixels")
    with pytest.raises(cli.UsageError, match=r"model: .*: expected a latent diffusion pipeline, which has"):
        run(evaluate, fields, model=str(tmp_path / "pixels"))


def test_help_is_quick() -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), "--help"], capture_output=True, text=True, timeout=6)
    assert done.returncode == 0
    assert "--max_images" in done.stdout
