"""The autoencoder that latents are made with is frozen, and found where a run left it."""

from pathlib import Path

import pytest
import torch

from shared.command_line import UsageError
from shared.diffusion.latent_encoding import load_autoencoder
from tests import pipelines


def test_the_autoencoder_is_the_named_one_or_else_the_trained_or_else_the_shipped(tmp_path: Path) -> None:
    for number, name in enumerate(("named", "shipped", "trained")):
        vae = pipelines.tiny_vae()
        vae.register_to_config(scaling_factor=float(number))
        if name == "trained":
            assert load_autoencoder("", tmp_path / "trained", tmp_path / "shipped").config.scaling_factor == 1
        vae.to(torch.bfloat16).save_pretrained(tmp_path / name)
    assert load_autoencoder("", tmp_path / "trained", tmp_path / "shipped").config.scaling_factor == 2
    vae = load_autoencoder(str(tmp_path / "named"), tmp_path / "trained", tmp_path / "shipped")
    assert vae.config.scaling_factor == 0
    assert not vae.training
    assert {(weight.dtype, weight.requires_grad) for weight in vae.parameters()} == {(torch.float32, False)}
    with pytest.raises(UsageError, match="vae: '/no/vae': expected a run folder or a Hub id"):
        load_autoencoder("/no/vae", tmp_path / "trained", tmp_path / "shipped")
