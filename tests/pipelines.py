"""Text-to-image pipelines of the library, tiny and with random weights, whose images have 16 x 16 pixels."""

from typing import Any

import diffusers
import torch
import transformers

from shared.diffusion.clip_tokenizer import train_clip_tokenizer

CAPTIONS = ["red apple", "green pear", "a red cat sees a green dog", "train image 1", "test image 2"]
LENGTH = 12  # tokens of a prompt, start and end included
LONG_PROMPT = "red apple green pear a red cat sees a green dog red pear"  # a token for each word
WIDTH = 16  # of the text encoders


def tiny_vae() -> Any:
    """It halves the sides once."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2, "sample_size": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(**sizes, **blocks, mid_block_add_attention=False, shift_factor=0.1).eval()


def tiny_tokenizer(length: int = LENGTH) -> Any:
    return train_clip_tokenizer(CAPTIONS, 560, length)


def tiny_text_encoder(tokenizer: Any, model_class: Any = transformers.CLIPTextModel) -> Any:
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"projection_dim": WIDTH, "max_position_embeddings": tokenizer.model_max_length}
    return model_class(transformers.CLIPTextConfig(vocab_size=len(tokenizer), **sizes, **ends)).eval()


def stable_diffusion(vae: Any) -> Any:
    """Of the same classes as those of pretrain.py."""
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
    )
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    schedule |= {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"}
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler.from_config(schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_3(vae: Any) -> Any:
    """A transformer trained by flow matching, with a second text encoder that reads more."""
    torch.manual_seed(2)
    tokenizers = [tiny_tokenizer(), tiny_tokenizer(LENGTH + 4)]
    encoders = [tiny_text_encoder(each, transformers.CLIPTextModelWithProjection) for each in tokenizers]
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=2,
        out_channels=2,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )


def pixart(vae: Any) -> Any:
    """A transformer whose pipeline would draw in the sizes of the published models."""
    torch.manual_seed(3)
    tokenizer = tiny_tokenizer(120)  # its pipeline's own number
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=2,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=WIDTH,
        cross_attention_dim=16,
    )
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_text_encoder(tokenizer),
        vae=vae,
        transformer=transformer.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def prx(vae: Any) -> Any:
    """Of the same classes as those of pretrain_transformer.py; it cleans prompts with ftfy."""
    torch.manual_seed(4)
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "num_heads": 2, "depth": 1, "axes_dim": [4, 4], "mlp_ratio": 2.0}
    transformer = diffusers.PRXTransformer2DModel(in_channels=2, patch_size=2, context_in_dim=WIDTH, **sizes)
    return diffusers.PRXPipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        vae=vae,
        default_sample_size=16,
    )
