"""Images from prompts, each from a seed of its own: with a pipeline of diffusers, or as a recipe shows them."""

import contextlib
import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from shared.command_line import UsageError, expect, is_speaking_process
from shared.data.randomness import derive_seed, normal_numbers
from shared.diffusion.adapters import ADAPTER_FILE
from shared.images.pixel_range import to_uint8
from shared.models.pretrained import load_diffusion_model, load_errors

# Samplers of any model that learned to predict noise or v. DDIM's own default is for pixels: it clips what is predicted
# to [-1, 1], where latents are larger; Stable Diffusion's configuration of it does not.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def load_pipeline(name: str, field: str, dtype: torch.dtype = torch.float32) -> Any:
    """A text-to-image pipeline, of any architecture that the library has, from safetensors.

    Nothing that comes with it is run. It shows no progress bars of its own.

    Args:
        name: a run folder, any folder of `save_pretrained`, or a Hub id.
        field: the configuration field that `name` comes from, for the message.
        dtype: of its weights and of what it computes.

    Raises:
        UsageError: it is not there, or makes no images from text.
    """
    with _only_errors():  # else the import says of each image processor that torchvision is not there
        from diffusers import AutoPipelineForText2Image
    with without_bars():
        pipeline = load_diffusion_model(AutoPipelineForText2Image, name, field, dtype=dtype, trust_remote_code=False)
    pipeline.set_progress_bar_config(disable=True)
    if type(pipeline).__name__ == "PRXPipeline":
        pipeline.transformer.register_forward_pre_hook(_one_timestep, with_kwargs=True)
        if reads_as_written(name):
            pipeline.text_preprocessor.clean_text = pipeline.text_preprocessor.basic_clean
    return pipeline


def add_adapter(pipeline: Any, name: str, scale: float) -> None:
    """Add an adapter (LoRA) to a pipeline, from safetensors.

    Args:
        pipeline: from `load_pipeline`.
        name: run folder of recipes/text_to_image/finetune.py, a file, or a Hub id.
        scale: of what the adapter changes; 1 = as it was trained.

    Raises:
        UsageError: it is not there, or is no adapter of this pipeline; naming lora.
    """
    has_loader = hasattr(pipeline, "load_lora_weights") and hasattr(pipeline, "unet")
    expect(has_loader, "lora", name, f'"" for a {type(pipeline).__name__}, of which diffusers loads no adapters')
    file = {"weight_name": ADAPTER_FILE} if Path(name).is_dir() else {}
    with load_errors("lora", name), _only_errors():
        pipeline.load_lora_weights(name, use_safetensors=True, **file)
    for network in (pipeline.unet, pipeline.text_encoder):
        network.eval()  # what was loaded is in training mode, where an adapter's dropout would be at work
    if scale != 1:
        pipeline.set_adapters(pipeline.get_active_adapters(), scale)


def make_images(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance_scale: float,
    negative_prompt: str,
    batch_size: int,
) -> Iterator[np.ndarray]:
    """Make an image of each prompt, which depends on its prompt and its seed alone, not on what else is in its batch.

    On the same hardware it is the same to rounding, whatever the size of the batch. Progress is shown on a terminal.

    Args:
        pipeline: from `load_pipeline`, on any device.
        prompts: of any number of images.
        seeds: of each; the noise is drawn on the CPU, so that all devices have the same.
        num_steps: of the scheduler.
        guidance_scale: how far an image follows the prompt's prediction beyond the empty one's (Ho and Salimans 2022);
            1 = no guidance.
        negative_prompt: what stands in for the empty prompt; "" = the empty prompt.
        batch_size: images that are made at a time.

    Yields:
        uint8 (H, W, 3), one for each prompt, in order.
    """
    options: dict[str, Any] = {"num_inference_steps": num_steps, "guidance_scale": guidance_scale}
    if "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters:
        options["use_resolution_binning"] = False  # which knows the sizes of published models alone
    is_quiet = not is_speaking_process() or None  # None: where there is no terminal
    with tqdm(total=len(prompts), desc="images", unit="image", disable=is_quiet) as bar:
        for first in range(0, len(prompts), batch_size):
            batch = list(prompts[first : first + batch_size])
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[first : first + batch_size]]
            if negative_prompt:
                options["negative_prompt"] = [negative_prompt] * len(batch)
            with _only_errors():  # `lost_text` tells of long prompts
                made = pipeline(prompt=batch, generator=generators, **options).images
            for image in made:
                yield np.asarray(image.convert("RGB"))
                bar.update()


def starting_noise(seed: int, number: int, shape: Sequence[int]) -> Tensor:
    """Noise that images shown during training begin with, the same at every step of a run: float32 (number, C, h, w).

    Args:
        seed: of the run.
        number: of images; each has noise of its own.
        shape: of an image's latents, (C, h, w).
    """
    # The word is part of the seed: with another one, runs would show other images.
    noise = normal_numbers(derive_seed(seed, "pictures"), np.arange(number), count=math.prod(shape))
    return torch.from_numpy(noise.astype(np.float32)).reshape(-1, *shape)


def decode_images(vae: Any, latents: Tensor) -> list[np.ndarray]:
    """Images uint8 (H, W, 3) of latents (B, C, h, w) of variance one.

    Args:
        vae: `diffusers.AutoencoderKL`, on the device of the latents.
        latents: as a diffusion model makes them.
    """
    return list(to_uint8(vae.decode(latents / vae.config.scaling_factor).sample).cpu().numpy())


def set_scheduler(pipeline: Any, name: str) -> None:
    """Make images by another sampler, with the noise schedule that the model was trained with.

    Args:
        pipeline: its scheduler is replaced.
        name: one of `SCHEDULERS`.

    Raises:
        UsageError: there is no such sampler, or the model, such as one trained by flow matching, needs its own.
    """
    import diffusers

    expect(name in SCHEDULERS, "scheduler", name, f'"" for the model\'s own, or one of {", ".join(SCHEDULERS)}')
    class_name, options = SCHEDULERS[name]
    own = type(pipeline.scheduler).__name__
    fits = class_name in [known.__name__ for known in pipeline.scheduler.compatibles]
    expect(fits, "scheduler", name, f'"", for this model can have no other than its own, {own}')
    pipeline.scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **options)


def check_steps(pipeline: Any, num_steps: int) -> None:
    """Refuse more steps than the model was trained with timesteps.

    Raises:
        UsageError: naming num_steps.
    """
    most = pipeline.scheduler.config.get("num_train_timesteps", 1000)
    expect(1 <= num_steps <= most, "num_steps", num_steps, f"from 1 to {most}, the model's timesteps")


def check_guidance(name: str, guidance_scale: float) -> None:
    """Refuse guidance of a model that has never seen the empty caption, as far as its run folder tells.

    Args:
        name: run folder, whose config.yaml is read if it is there, or whatever else holds the model.
        guidance_scale: see `make_images`.

    Raises:
        UsageError: naming guidance_scale.
    """
    expect(guidance_scale >= 1, "guidance_scale", guidance_scale, "at least 1, which is no guidance")
    is_guidable = _run_fields(name).get("caption_dropout") != 0
    expected = f"1, for {name} was trained with caption_dropout 0 and has never seen the empty caption"
    expect(guidance_scale == 1 or is_guidable, "guidance_scale", guidance_scale, expected)


def _run_fields(name: str) -> dict[str, Any]:
    """What a run folder's config.yaml says; empty for whatever else holds a model."""
    file = Path(name) / "config.yaml"
    fields = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    return fields if isinstance(fields, dict) else {}


def reads_as_written(name: str) -> bool:
    """Whether a PRX pipeline was trained on captions as they are, and not as it cleans prompts; for a frozen encoder.

    As far as its run folder tells, or that of the pipeline which it was fine-tuned from.
    """
    fields = _run_fields(name)
    if "text_encoder" not in fields and fields.get("init", name) != name:
        return reads_as_written(fields["init"])
    return fields.get("text_encoder", "scratch") != "scratch"


def read_prompts(file: str) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        UsageError: there are none, or it is no text file; naming prompts_file.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "") or "other bytes"
        raise UsageError(f"prompts_file: {file!r}: expected a text file, got {reason}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    expect(bool(prompts), "prompts_file", file, "a prompt on each line, got none")
    return prompts


def lost_text(pipeline: Any, prompt: str) -> str:
    """The end of a prompt that none of the pipeline's text encoders reads; "" = all of it is read.

    As text of whole tokens, so in a tokenizer's spelling, such as in small letters.
    """
    tokenizers = [part for part in pipeline.components.values() if hasattr(part, "model_max_length")]
    tokenizer = max(tokenizers, key=lambda tokenizer: tokenizer.model_max_length)
    with _only_errors():
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
    num_read = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    return tokenizer.decode(ids[num_read:]).strip()


def _one_timestep(_: Any, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The one timestep of a batch; with guidance the pipeline of diffusers 0.42 gives two, which fit one prompt."""
    return inputs, {**named, "timestep": named["timestep"][:1]}


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Logs of transformers and diffusers without warnings, where these are known to be harmless."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of transformers and diffusers, and no notes to the programmer; what their logs say stays."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library in shown:
            library.enable_progress_bar()
