"""Fine-tuning of text to image: what it trains, that the library loads it, exact resume, priors, and refusals."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from shared import command_line as cli
from shared.diffusion.captions import encode_captions
from shared.diffusion.generation import add_adapter, load_pipeline
from shared.diffusion.latent_updates import FixedSamples
from tests import pipelines
from tests.recipes.runs import (
    assert_same,
    metric,
    metrics_of,
    push_and_load,
    results_of,
    run,
    run_card,
    state_at,
    weights,
)

TINY: dict[str, Any] = {
    "lora_rank": 4,
    "lora_dropout": 0.1,
    "train_text_encoder": True,
    "global_batch_size": 8,
    "max_steps": 8,
    "warmup_steps": 2,
    "learning_rate": 0.02,
    "log_every": 1,
    "eval_every": 4,
    "num_workers": 0,
    "sample_steps": 2,
    "guidance_scale": 2.0,
}
WHOLE = {"lora_rank": 0, "lora_dropout": 0.0, "learning_rate": 0.002}


def config_of(module: ModuleType, tiny_pipeline: Path, captioned: Path, run_dir: Path, **fields: Any) -> Any:
    paths = {"init": str(tiny_pipeline), "data": str(captioned), "output_dir": str(run_dir)}
    return module.Config(**{**TINY, **paths, **fields})


@pytest.fixture(scope="module")
def reference(
    text_to_image_finetune: ModuleType, tiny_pipeline: Path, captioned: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An uninterrupted run of an adapter, of the text encoder too, that kept a checkpoint of every update."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    fields = {"save_every": 1, "keep_checkpoints": 100}
    run(text_to_image_finetune, config_of(text_to_image_finetune, tiny_pipeline, captioned, folder, **fields))
    return folder


@pytest.fixture(scope="module")
def prx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PRX pipeline of random weights."""
    vae, folder = pipelines.tiny_vae(), tmp_path_factory.mktemp("prx")
    vae.register_to_config(shift_factor=0.0)
    pipeline = pipelines.prx(vae)
    for weight in pipeline.transformer.parameters():  # its blocks begin as nothing, which nothing can be learned beside
        torch.nn.init.normal_(weight, std=0.2)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    """Four images without captions."""
    draw, folder = np.random.default_rng(1), tmp_path / "subject"
    folder.mkdir()
    for index in range(4):
        Image.fromarray(draw.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def trained_model(module: ModuleType, cfg: Any, run_dir: Path, step: int) -> Any:
    """The model as the checkpoint of a step has it."""
    model = module.build_model(cfg, module.open_init(cfg))
    model.load_state_dict(load_file(run_dir / "checkpoints" / f"step_{step:08d}" / "model.safetensors"))
    return model.eval()


def some_inputs() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    tokenizer = pipelines.tiny_tokenizer()
    texts = encode_captions(["train image 1", "red apple"], tokenizer, None)
    return torch.randn(2, 2, 8, 8, generator=draw), torch.tensor([3, 700]), texts


# -- what is trained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_the_librarys(text_to_image_finetune: ModuleType, prediction_type: str) -> None:
    """Against diffusers' DDPM scheduler, which has its own formulas for both."""
    draw = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(8, 2, 4, 4, generator=draw) for name in ("latents", "noise")}
    library = diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    batch["uniform"] = torch.arange(8) / 8
    noisy = text_to_image_finetune.diffuse(batch, library.alphas_cumprod, prediction_type, 0)
    assert noisy.timesteps.tolist() == [125 * number for number in range(8)]
    asked = (batch["latents"], batch["noise"], noisy.timesteps)
    torch.testing.assert_close(noisy.latents, library.add_noise(*asked))
    velocity = library.get_velocity(*asked)
    torch.testing.assert_close(noisy.wanted, batch["noise"] if prediction_type == "epsilon" else velocity)
    assert (noisy.weights == 1).all()
    weighted = text_to_image_finetune.diffuse(batch, library.alphas_cumprod, prediction_type, 5.0).weights
    ratio = library.alphas_cumprod[noisy.timesteps] / (1 - library.alphas_cumprod[noisy.timesteps])
    errors_of_latents = ratio if prediction_type == "epsilon" else ratio + 1  # of one of the prediction
    torch.testing.assert_close(weighted * errors_of_latents, ratio.clamp(max=5.0))


def test_an_adapter_begins_as_nothing_and_alone_is_trained(
    text_to_image_finetune: ModuleType, tiny_pipeline: Path, captioned: Path, tmp_path: Path
) -> None:
    cfg = config_of(text_to_image_finetune, tiny_pipeline, captioned, tmp_path)
    model = text_to_image_finetune.build_model(cfg, text_to_image_finetune.open_init(cfg)).eval()
    latents, timesteps, texts = some_inputs()
    pipeline = load_pipeline(str(tiny_pipeline), "model")
    with torch.no_grad():
        states = pipeline.text_encoder(texts["text"]).last_hidden_state
        expected = pipeline.unet(latents, timesteps, states).sample
        assert torch.equal(model(latents, timesteps, **texts), expected)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    places = {name.split(".lora_")[0].rpartition(".")[2] for name in trained}
    assert places == {"to_q", "to_k", "to_v", "0", "q_proj", "k_proj", "v_proj", "out_proj"}


def test_the_loss_of_the_prior_has_its_weight(
    text_to_image_finetune: ModuleType, tiny_pipeline: Path, captioned: Path, tmp_path: Path
) -> None:
    """The update's loss is that of the images and so many times that of the prior, which count apart."""
    found = []
    draw = torch.Generator().manual_seed(0)
    latents, _, texts = some_inputs()
    one, other = (
        {"latents": latents, "noise": torch.randn(2, 2, 8, 8, generator=draw), "uniform": torch.rand(2), **texts}
        for _ in range(2)
    )
    for parts, weight in (([[one]], 1.0), ([[other]], 1.0), ([[one], [other]], 0.25)):
        fields = {"global_batch_size": 2, "prior_weight": weight, "lora_dropout": 0.0}
        cfg = config_of(text_to_image_finetune, tiny_pipeline, captioned, tmp_path, **fields)
        GradientState._reset_state()
        accelerator, init = Accelerator(cpu=True), text_to_image_finetune.open_init(cfg)
        model = text_to_image_finetune.build_model(cfg, init)
        model, optimizer = accelerator.prepare(model, text_to_image_finetune.build_optimizer(cfg, model))
        update = (cfg, accelerator, model, optimizer, parts, init.noise)
        found.append(float(text_to_image_finetune.train_update(*update)[0]))
    assert found[2] == pytest.approx(found[0] + 0.25 * found[1], rel=1e-5)


# -- what it leaves ----------------------------------------------------------------------------------------------------


def test_run_learns_and_says_what_was_before(
    text_to_image_finetune: ModuleType, reference: Path, tiny_pipeline: Path, captioned: Path
) -> None:
    assert metric(reference, "step") == list(range(1, 9))
    record = json.loads((reference / "run.json").read_text())
    assert metric(reference, "eval/loss")[-1] < record["eval_loss_before"]
    assert record["trained_parameters"] < record["parameters"] / 5
    pipeline = load_pipeline(str(tiny_pipeline), "model")
    module = text_to_image_finetune
    cfg = config_of(module, tiny_pipeline, captioned, reference)
    [_, held_out, _] = module.open_data(cfg, Accelerator(cpu=True), module.open_init(cfg))
    factor = pipeline.vae.config.scaling_factor
    reading = {"scaling_factor": factor, "tokenizer": pipeline.tokenizer, "empty": None}
    samples, errors = FixedSamples(held_out["test"], 200, module.NUM_BANDS, reading, batch_size=7), []
    for number in range(len(samples)):
        item = {name: torch.from_numpy(value) for name, value in samples[number].items()}
        scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
        timesteps = (item["uniform"] * 1000).long()
        with torch.no_grad():
            states = pipeline.text_encoder(item["text"]).last_hidden_state
            noisy = scheduler.add_noise(item["latents"], item["noise"], timesteps)
            predicted = pipeline.unet(noisy, timesteps, states).sample
        velocity = scheduler.get_velocity(item["latents"], item["noise"], timesteps)
        errors.append((predicted - velocity).square().mean().item())
    assert record["eval_loss_before"] == pytest.approx(np.mean(errors), rel=1e-4)
    card = (reference / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert (reference / "figures" / "images.png").stat().st_size > 0


def test_the_library_loads_the_adapter_to_the_bit(
    text_to_image_finetune: ModuleType, reference: Path, tiny_pipeline: Path, captioned: Path
) -> None:
    cfg = config_of(text_to_image_finetune, tiny_pipeline, captioned, reference)
    model = trained_model(text_to_image_finetune, cfg, reference, 8)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    latents, timesteps, texts = some_inputs()
    with torch.no_grad():
        before = pipeline.unet(latents, timesteps, pipeline.text_encoder(texts["text"]).last_hidden_state).sample
        pipeline.load_lora_weights(reference)
        after = pipeline.unet(latents, timesteps, pipeline.text_encoder(texts["text"]).last_hidden_state).sample
        assert torch.equal(after, model(latents, timesteps, **texts))
    assert not torch.allclose(before, after)
    with safe_open(reference / "pytorch_lora_weights.safetensors", "pt") as file:
        names = list(file.keys())
    assert {name.split(".")[0] for name in names} == {"unet", "text_encoder"}


def test_images_are_made_with_a_share_of_the_adapter(reference: Path, tiny_pipeline: Path) -> None:
    latents, timesteps, texts = some_inputs()
    made = []
    for scale in (0.0, 0.5, 1.0):
        pipeline = load_pipeline(str(tiny_pipeline), "model")
        add_adapter(pipeline, str(reference), scale)
        states = encode_captions(["train image 1", "red apple"], pipeline.tokenizer, pipeline.text_encoder)["text"]
        with torch.no_grad():
            made.append(pipeline.unet(latents, timesteps, states).sample)
    plain = load_pipeline(str(tiny_pipeline), "model")
    with torch.no_grad():
        torch.testing.assert_close(
            made[0], plain.unet(latents, timesteps, plain.text_encoder(texts["text"]).last_hidden_state).sample
        )
    assert not torch.allclose(made[1], made[0])
    assert not torch.allclose(made[1], made[2])


def test_the_code_of_the_card_runs(reference: Path, tmp_path: Path) -> None:
    run_card(reference, tmp_path)


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_resuming_is_exact_to_the_bit(
    text_to_image_finetune: ModuleType,
    tiny_pipeline: Path,
    captioned: Path,
    reference: Path,
    tmp_path: Path,
    stop: int,
) -> None:
    run_dir = state_at(reference, stop, tmp_path / "run")
    fields = {"save_every": 1, "keep_checkpoints": 100, "num_workers": 1 if stop == 4 else 0}
    run(text_to_image_finetune, config_of(text_to_image_finetune, tiny_pipeline, captioned, run_dir, **fields))
    assert_same(run_dir, reference)
    before = [json.loads((folder / "run.json").read_text())["eval_loss_before"] for folder in (run_dir, reference)]
    assert before[0] == before[1]


def test_an_adapter_is_merged_into_the_pipeline(
    text_to_image_finetune: ModuleType, tiny_pipeline: Path, captioned: Path, reference: Path, tmp_path: Path
) -> None:
    module = text_to_image_finetune
    run(module, config_of(module, tiny_pipeline, captioned, tmp_path / "run", merge=True))
    assert results_of(tmp_path / "run") == results_of(reference)
    merged = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "run")
    assert merged.unet.state_dict().keys() == load_pipeline(str(tiny_pipeline), "model").unet.state_dict().keys()
    model = trained_model(module, config_of(module, tiny_pipeline, captioned, reference), reference, 8)
    latents, timesteps, texts = some_inputs()
    with torch.no_grad():
        states = merged.text_encoder(texts["text"]).last_hidden_state
        torch.testing.assert_close(merged.unet(latents, timesteps, states).sample, model(latents, timesteps, **texts))
    run_card(tmp_path / "run", tmp_path)


def test_all_weights_are_trained_and_what_is_kept_is_as_it_was(
    text_to_image_finetune: ModuleType, tiny_pipeline: Path, captioned: Path, tmp_path: Path
) -> None:
    """The text encoder stays, unless it is to be trained; scheduler and autoencoder stay."""
    module = text_to_image_finetune
    fields = {**WHOLE, "train_text_encoder": False, "max_steps": 4, "eval_every": 0}
    run(module, config_of(module, tiny_pipeline, captioned, tmp_path / "run", **fields))
    before, after = weights(tiny_pipeline), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (not name.startswith("unet.")), name
    kept = [
        (folder / "scheduler" / "scheduler_config.json").read_text() for folder in (tiny_pipeline, tmp_path / "run")
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("kind", ["whole", "merged"])
def test_a_transformer_of_flow_matching(
    text_to_image_finetune: ModuleType, prx: Path, captioned: Path, tmp_path: Path, kind: str
) -> None:
    module = text_to_image_finetune
    fields = WHOLE if kind == "whole" else {"merge": True}
    cfg = config_of(module, prx, captioned, tmp_path / "run", **fields)
    run(module, cfg)
    assert (
        metric(tmp_path / "run", "eval/loss")[-1]
        < json.loads((tmp_path / "run" / "run.json").read_text())["eval_loss_before"]
    )
    assert weights(tmp_path / "run").keys() == weights(prx).keys()
    assert type(load_pipeline(str(tmp_path / "run"), "model")).__name__ == "PRXPipeline"
    run_card(tmp_path / "run", tmp_path)


def test_a_subject_of_few_images_with_a_prior_that_the_model_makes(
    text_to_image_finetune: ModuleType, tiny_pipeline: Path, subject: Path, tmp_path: Path
) -> None:
    """As DreamBooth has it: a caption for all images, none held out, and the class's images from the model itself."""
    module = text_to_image_finetune
    fields = {"caption": "a red apple", "prior_caption": "a green pear", "prior_images": 6, "eval_fraction": 0.0}
    fields |= {"cache_dir": str(tmp_path / "cache"), "max_steps": 4, "train_text_encoder": False}
    run(module, config_of(module, tiny_pipeline, subject, tmp_path / "run", **fields))
    [prior] = (tmp_path / "cache").glob("prior-*")
    assert len(list(prior.glob("*.png"))) == 6
    last = metrics_of(tmp_path / "run")[-1]
    assert last["eval/loss"] == last["eval/loss_train"]
    assert "eval/loss_prior" in last
    written = prior.stat().st_mtime_ns
    run(module, config_of(module, tiny_pipeline, subject, tmp_path / "again", **fields))
    assert prior.stat().st_mtime_ns == written
    assert results_of(tmp_path / "again") == results_of(tmp_path / "run")


def test_few_images_are_a_part_of_more(
    text_to_image_finetune: ModuleType, tiny_pipeline: Path, captioned: Path, tmp_path: Path
) -> None:
    module, seen = text_to_image_finetune, []
    for number in (3, 10, 0):
        cfg = config_of(module, tiny_pipeline, captioned, tmp_path, train_images=number)
        splits, _, _ = module.open_data(cfg, Accelerator(cpu=True), module.open_init(cfg))
        seen.append(set(splits["train"].captions()))
    assert [len(one) for one in seen] == [3, 10, 40]
    assert seen[0] < seen[1] < seen[2]


@pytest.fixture
def latents_of_other(tmp_path: Path) -> Path:
    """A folder that only begins like a cache."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "identity.json").write_text("{}")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_rank": 0}, "lora_dropout: 0.1: expected 0.0 without lora_rank, which makes an adapter"),
        ({"lora_rank": 99}, "lora_rank: 99: expected at most 16, the smaller side of the largest matrix of init"),
        ({"caption_dropout": 0.0}, "guidance_scale: 2.0: expected 1 with caption_dropout 0"),
        ({"captions_with": "zebra"}, "captions_with: 'zebra': expected text that leaves samples to train on"),
        ({"captions_without": "image"}, "captions_without: 'image': expected text that leaves samples to train on"),
        ({"image_size": 15}, "image_size: 15: expected a multiple of 2, for the autoencoder halves it"),
        ({"init": "nowhere"}, "init: 'nowhere': expected a run folder or a Hub id of such a model"),
        ({"eval_fraction": 0.0}, "prompts_file: '': expected a file of prompts with eval_fraction 0"),
        ({"data": "cache"}, "data: .*cache.*: expected a cache of latents, it is not complete"),
        ({"prior_data": "cache"}, "prior_data: .*cache.*: expected a cache of latents, it is not complete"),
        ({"push_to_hub": "me/mine"}, "merge: False: expected True where init is a folder"),
    ],
)
def test_bad_fields_are_refused_in_one_line(
    text_to_image_finetune: ModuleType,
    tiny_pipeline: Path,
    captioned: Path,
    latents_of_other: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    message: str,
) -> None:
    found = {name: str(latents_of_other) if value == "cache" else value for name, value in fields.items()}
    with pytest.raises(cli.UsageError, match=message) as raised:
        run(
            text_to_image_finetune,
            config_of(text_to_image_finetune, tiny_pipeline, captioned, tmp_path / "run", **found),
        )
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_other_models_are_refused_in_one_line(
    text_to_image_finetune: ModuleType, prx: Path, captioned: Path, tmp_path: Path
) -> None:
    module = text_to_image_finetune
    with pytest.raises(cli.UsageError, match="merge: False: expected True for PRX, of which diffusers loads no adapt"):
        run(module, config_of(module, prx, captioned, tmp_path / "run"))
    pipelines.stable_diffusion_3(pipelines.tiny_vae()).save_pretrained(tmp_path / "sd3")
    with pytest.raises(cli.UsageError, match="StableDiffusionPipeline or PRXPipeline, got StableDiffusion3Pipeline"):
        run(module, config_of(module, tmp_path / "sd3", captioned, tmp_path / "run"))
    tiny = pipelines.stable_diffusion(pipelines.tiny_vae())
    tiny.scheduler.register_to_config(prediction_type="sample")
    tiny.save_pretrained(tmp_path / "sample")
    with pytest.raises(cli.UsageError, match="a model that predicts epsilon or v_prediction, got sample"):
        run(module, config_of(module, tmp_path / "sample", captioned, tmp_path / "run"))


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_dry_run_says_the_costs_and_writes_nothing(
    text_to_image_finetune: ModuleType,
    tiny_pipeline: Path,
    captioned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    fields = {"dry_run": True, **(WHOLE if kind == "whole" else {})}
    run(
        text_to_image_finetune,
        config_of(text_to_image_finetune, tiny_pipeline, captioned, tmp_path / "run", **fields),
    )
    said = capsys.readouterr().out
    assert "first caption: train image 0" in said
    assert "memory: total" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_pushing_leaves_what_the_library_loads(
    text_to_image_finetune: ModuleType, tiny_pipeline: Path, captioned: Path, tmp_path: Path
) -> None:
    cfg = config_of(text_to_image_finetune, tiny_pipeline, captioned, tmp_path / "run", max_steps=2, merge=True)
    program = """
from diffusers import StableDiffusionPipeline
made = StableDiffusionPipeline.from_pretrained("tester/mine")("train image 1", num_inference_steps=2)
print(made.images[0].size)"""
    fields = {name: getattr(cfg, name) for name in (*TINY, "init", "data", "max_steps", "merge")}
    printed, pushed = push_and_load(text_to_image_finetune, fields, program, tmp_path)
    assert "(16, 16)" in printed
    assert "unet/diffusion_pytorch_model.safetensors" in pushed
