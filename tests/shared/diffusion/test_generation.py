"""An image is the library's own of its prompt and seed, whatever stands beside it; samplers solve one equation."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.command_line import UsageError
from shared.diffusion.generation import (
    SCHEDULERS,
    check_guidance,
    check_steps,
    decode_images,
    load_pipeline,
    lost_text,
    make_images,
    set_scheduler,
    starting_noise,
)
from tests import pipelines

PROMPTS = ["red apple", "green pear", "a red cat sees a green dog", "", "red apple"]
SEEDS = [5, 2**62 + 1, 7, 5, 8]
SETTINGS: dict[str, Any] = {"num_steps": 4, "guidance_scale": 4.0, "negative_prompt": "", "batch_size": 1}


@pytest.fixture(scope="module")
def vae() -> Any:
    return pipelines.tiny_vae()


@pytest.fixture
def stable_diffusion(vae: Any) -> Any:
    return silent(pipelines.stable_diffusion(vae))


def silent(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make(pipeline: Any, prompts: list[str], seeds: list[int], **settings: Any) -> np.ndarray:
    """int64 (N, H, W, 3)."""
    return np.stack(list(make_images(pipeline, prompts, seeds, **{**SETTINGS, **settings}))).astype(np.int64)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    pipelines.stable_diffusion(pipelines.tiny_vae()).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved pipeline that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def refusal(name: str | Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_pipeline(str(name), "model")
    message = str(caught.value)
    assert message.startswith(f"model: {str(name)!r}: expected a run folder or a Hub id of such a model: ")
    assert "\n" not in message
    return message


def test_a_pipeline_is_loaded_in_float32_without_bars(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    pipeline = load_pipeline(str(saved), "model")
    pipeline(prompt=["red apple"], num_inference_steps=1)
    assert capfd.readouterr() == ("", "")
    for name in ("unet", "text_encoder", "vae"):
        weights = getattr(pipeline, name).state_dict()
        [file] = (saved / name).glob("*.safetensors")
        for key, stored in load_file(file).items():
            assert stored.dtype == torch.bfloat16
            assert torch.equal(weights[key], stored.float()), key


def test_what_is_no_pipeline(saved: Path, tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere")
    refusal("me/there-is-no-such-model")
    refusal("")
    refusal(tmp_path)
    refusal(saved / "model_index.json")
    refusal(saved / "unet")


def test_a_pipeline_that_reads_no_text(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "DDPMPipeline"}))
    assert "DDPMPipeline" in refusal(folder)


class Payload:
    """Makes a folder when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_parts_of_a_pipeline_are_read_from_safetensors_alone(folder: Path, tmp_path: Path, part: str) -> None:
    [file] = (folder / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    refusal(folder)
    file.unlink()
    pickled = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({"x": Payload(tmp_path / "canary")}, folder / part / pickled)
    refusal(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("entry", ["_class_name", "unet"])
def test_code_that_comes_with_a_pipeline_is_not_run(folder: Path, tmp_path: Path, entry: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, entry: ["evil", "Evil"]}))
    code = f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\nclass Evil: pass\n"
    for place in (folder, folder / "unet"):
        (place / "evil.py").write_text(code)
    refusal(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("negative_prompt", ["", "green pear"])
def test_a_image_is_the_library_s(stable_diffusion: Any, negative_prompt: str) -> None:
    made = make(stable_diffusion, PROMPTS, SEEDS, negative_prompt=negative_prompt)
    assert made.shape == (5, 16, 16, 3)
    for image, prompt, seed in zip(made, PROMPTS, SEEDS, strict=True):
        expected = stable_diffusion(
            prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=4,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        np.testing.assert_array_equal(image, np.asarray(expected))


def test_prompt_seed_guidance_and_steps_each_change_a_image(stable_diffusion: Any) -> None:
    made = make(stable_diffusion, ["red apple"], [5])
    for prompt, seed, settings in (
        ("green pear", 5, {}),
        ("red apple", 6, {}),
        ("red apple", 5, {"guidance_scale": 1.0}),
        ("red apple", 5, {"num_steps": 5}),
        ("red apple", 5, {"negative_prompt": "green pear"}),
    ):
        assert np.abs(make(stable_diffusion, [prompt], [seed], **settings) - made).max() > 2


@pytest.mark.parametrize("build", [pipelines.stable_diffusion, pipelines.stable_diffusion_3, pipelines.pixart])
def test_the_batch_changes_no_image(build: Any, vae: Any) -> None:
    """Beyond rounding; the number of images needs not be a multiple of the batch."""
    pipeline = silent(build(vae))
    alone = make(pipeline, PROMPTS, SEEDS)
    assert alone[0].std() > 20
    assert np.abs(alone[0] - alone[4]).max() > 50
    for batch_size in (2, 3, 8):
        assert np.abs(make(pipeline, PROMPTS, SEEDS, batch_size=batch_size) - alone).max() <= 1
    reversed_order = make(pipeline, PROMPTS[::-1], SEEDS[::-1], batch_size=4)
    assert np.abs(reversed_order[::-1] - alone).max() <= 1


def test_prx_makes_as_many_images_at_a_time_as_others(vae: Any, tmp_path: Path) -> None:
    """Which the library's own pipeline does not, with guidance; without, and for one prompt, it is the same."""
    own = silent(pipelines.prx(vae))
    own.save_pretrained(tmp_path)
    pipeline = load_pipeline(str(tmp_path), "model")
    alone = make(pipeline, PROMPTS, SEEDS)
    for batch_size in (2, 8):
        assert np.abs(make(pipeline, PROMPTS, SEEDS, batch_size=batch_size) - alone).max() <= 1
    assert np.abs(make(own, PROMPTS, SEEDS) - alone).max() <= 1
    without = {"guidance_scale": 1.0, "batch_size": 3}
    np.testing.assert_array_equal(make(own, PROMPTS, SEEDS, **without), make(pipeline, PROMPTS, SEEDS, **without))


def test_prx_cleans_no_prompts_of_a_run_whose_captions_were_not_cleaned(vae: Any, tmp_path: Path) -> None:
    pipelines.prx(vae).save_pretrained(tmp_path)
    prompts = ["Test (cat)"]
    encoded = {}
    for text_encoder in ("scratch", "openai/clip-vit-large-patch14"):
        (tmp_path / "config.yaml").write_text(f"text_encoder: {text_encoder}\n")
        encoded[text_encoder], *_ = load_pipeline(str(tmp_path), "model").encode_prompt(prompts, "cpu")
    library = pipelines.prx(vae)
    for text_encoder, skip in (("scratch", False), ("openai/clip-vit-large-patch14", True)):
        expected, *_ = library.encode_prompt(prompts, "cpu", skip_text_cleaning=skip)
        assert torch.equal(encoded[text_encoder], expected)
    assert not torch.equal(encoded["scratch"], expected)


def test_the_global_generator_is_neither_read_nor_moved(stable_diffusion: Any) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    made = make(stable_diffusion, PROMPTS, SEEDS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.testing.assert_array_equal(make(stable_diffusion, PROMPTS, SEEDS), made)


ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    "schedule", [{"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}, ZERO], ids=["noise", "v", "zero"]
)
def test_samplers_come_to_the_same_image(stable_diffusion: Any, schedule: dict[str, Any]) -> None:
    """All solve one differential equation. DDIM with its own defaults, which clip latents, is 13 away."""
    trained = stable_diffusion.scheduler
    own = stable_diffusion.scheduler = type(trained).from_config(trained.config, **schedule)
    settings = {"guidance_scale": 1.0, "batch_size": 4, "num_steps": 30}
    exact = make(stable_diffusion, PROMPTS[:4], SEEDS[:4], **settings)
    for name in SCHEDULERS:
        set_scheduler(stable_diffusion, name)
        assert schedule.items() <= dict(stable_diffusion.scheduler.config).items()
        torch.testing.assert_close(stable_diffusion.scheduler.alphas_cumprod, own.alphas_cumprod, rtol=0, atol=1e-7)
        assert np.abs(make(stable_diffusion, PROMPTS[:4], SEEDS[:4], **settings) - exact).mean() < 2, name
        assert len(make(stable_diffusion, PROMPTS[:1], SEEDS[:1], num_steps=1)) == 1


@pytest.mark.slow
def test_every_sampler_made_from_the_saved_scheduler_comes_to_the_same_image(stable_diffusion: Any) -> None:
    own, settings = stable_diffusion.scheduler, {"guidance_scale": 1.0, "batch_size": 2}
    exact = make(stable_diffusion, PROMPTS[:2], SEEDS[:2], num_steps=30, **settings)
    others = ("Ancestral", "SDE", "DDPM", "EDM")  # of their own noise, or scale
    for other in own.compatibles:
        if not any(part in other.__name__ for part in others):
            stable_diffusion.scheduler = other.from_config(own.config)
            found = make(stable_diffusion, PROMPTS[:2], SEEDS[:2], num_steps=50, **settings)
            assert np.abs(found - exact).mean() < 2, other.__name__


def test_a_model_trained_by_flow_matching_keeps_its_sampler(vae: Any) -> None:
    pipeline = pipelines.stable_diffusion_3(vae)
    own = pipeline.scheduler
    for name in SCHEDULERS:
        with pytest.raises(UsageError) as caught:
            set_scheduler(pipeline, name)
        expected = 'expected "", for this model can have no other than its own, FlowMatchEulerDiscreteScheduler'
        assert str(caught.value) == f"scheduler: {name!r}: {expected}"
    assert pipeline.scheduler is own


def test_an_unknown_sampler_is_refused(stable_diffusion: Any) -> None:
    with pytest.raises(UsageError, match="scheduler: 'pndm': expected \"\" for the model's own, or one of ddim, dpm"):
        set_scheduler(stable_diffusion, "pndm")


def test_a_step_is_a_timestep_at_least(stable_diffusion: Any) -> None:
    check_steps(stable_diffusion, 1)
    check_steps(stable_diffusion, 1000)
    for number in (0, 1001):
        with pytest.raises(UsageError, match=f"num_steps: {number}: expected from 1 to 1000, the model's timesteps"):
            check_steps(stable_diffusion, number)


def test_what_is_lost_of_a_prompt_is_what_the_library_cuts(stable_diffusion: Any) -> None:
    tokenizer = stable_diffusion.tokenizer
    words = pipelines.LONG_PROMPT.split()
    for number in range(len(words) + 1):
        prompt = " ".join(words[:number])
        read = tokenizer(prompt, truncation=True).input_ids[1:-1]
        lost = lost_text(stable_diffusion, prompt)
        assert f"{tokenizer.decode(read)} {lost}".split() == words[:number]
        assert bool(lost) == (number > pipelines.LENGTH - 2)
    long, cut = " ".join(words), " ".join(words[: pipelines.LENGTH - 2])
    np.testing.assert_array_equal(*make(stable_diffusion, [long, cut], [3, 3]))


def test_a_prompt_is_read_as_far_as_any_text_encoder_does(vae: Any) -> None:
    pipeline = pipelines.stable_diffusion_3(vae)
    assert lost_text(pipeline, "red " * (pipelines.LENGTH + 2)) == ""
    assert lost_text(pipeline, "red " * (pipelines.LENGTH + 3) + "apple") == "red apple"


def test_guidance_is_refused_where_the_empty_caption_was_never_seen(tmp_path: Path) -> None:
    for content, is_refused in (
        ("caption_dropout: 0.0", True),
        ("caption_dropout: 0", True),
        ("caption_dropout: 0.1", False),
        ("image_size: 64", False),
        ("- caption_dropout", False),
        ("", False),
    ):
        (tmp_path / "config.yaml").write_text(content)
        check_guidance(str(tmp_path), 1.0)
        if is_refused:
            with pytest.raises(UsageError, match=r"guidance_scale: 4.0: expected 1, for .* with caption_dropout 0"):
                check_guidance(str(tmp_path), 4.0)
        else:
            check_guidance(str(tmp_path), 4.0)
    check_guidance("me/model", 4.0)
    with pytest.raises(UsageError, match=r"guidance_scale: 0.5: expected at least 1"):
        check_guidance("me/model", 0.5)


def test_shown_images_begin_with_noise_of_their_own() -> None:
    noise = starting_noise(3, 40, (2, 8, 8))
    assert (noise.dtype, noise.shape) == (torch.float32, (40, 2, 8, 8))
    assert torch.equal(starting_noise(3, 7, (2, 8, 8)), noise[:7])
    assert not torch.equal(starting_noise(4, 7, (2, 8, 8)), noise[:7])
    assert len({row.numpy().tobytes() for row in noise}) == 40
    assert abs(noise.mean()) < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)


def test_images_are_decoded_as_the_pipeline_does(vae: Any) -> None:
    import diffusers

    latents = starting_noise(0, 3, (2, 8, 8))
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
        images = decode_images(vae, latents)
    expected = diffusers.image_processor.VaeImageProcessor().postprocess(decoded, output_type="np")
    assert [image.shape for image in images] == [(16, 16, 3)] * 3
    assert np.array_equal(np.stack(images), (expected * 255).round().astype(np.uint8))
