"""Fréchet distances against their closed form, retrieval against counting, and the shipped network on real images."""

import importlib.util
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from shared.command_line import UsageError
from shared.images.captioned import SAMPLE, CaptionedImages, open_captioned
from shared.images.decoding import EncodedImage
from shared.metrics.image_features import caption_match, frechet_distance, load_features
from shared.models.resnet import build_processor
from tests.conftest import ROOT

ASSETS = ROOT / "recipes" / "text_to_image" / "assets"
SHIPPED = ASSETS / "emoji_resnet"


def open_emoji(split: str) -> CaptionedImages:
    options = {"config": "", "image_column": "", "caption_column": "", "max_bad_fraction": 0.0}
    return open_captioned(str(SAMPLE), split=split, **options)


def read(opened: CaptionedImages, rows: list[int]) -> Tensor:
    """uint8 (B, 3, 64, 64)."""
    pixels = [EncodedImage(opened.files.read(row)).center_crop(64, 1.0) for row in rows]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def emoji() -> Tensor:
    """100 held-out images."""
    return read(open_emoji("test_unseen_combination"), list(range(100)))


@pytest.fixture(scope="module")
def shipped() -> nn.Module:
    return load_features(str(SHIPPED), "eval_features")


def noisy(images: Tensor, deviation: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * deviation
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


# -- the network -------------------------------------------------------------------------------------------------------


def test_the_classes_of_the_shipped_classifier_are_the_names_of_the_emoji_that_it_was_trained_on() -> None:
    names = pyarrow.parquet.read_table(SAMPLE / "data" / "train-00000-of-00001.parquet")["name"].to_pylist()
    classes = transformers.AutoConfig.from_pretrained(SHIPPED).id2label
    assert [classes[number] for number in range(len(classes))] == sorted(set(names))


def test_features_are_what_the_library_s_classifier_sees(shipped: nn.Module, emoji: Tensor) -> None:
    model = transformers.ResNetForImageClassification.from_pretrained(SHIPPED).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(SHIPPED)
    inputs = processor([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in emoji], return_tensors="pt")
    features = shipped(emoji)
    assert features.dtype == torch.float32
    assert features.shape == (100, shipped.num_features)
    with torch.no_grad():
        torch.testing.assert_close(features, model.resnet(**inputs).pooler_output.flatten(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.classifier(features), model(**inputs).logits, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of images of 32 pixels with a normalisation of its own."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    folder = tmp_path_factory.mktemp("saved")
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).save_pretrained(folder)
    build_processor(32, 1.0, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("side", [16, 32, 64])
def test_images_are_normalised_and_resized_as_the_classifier_s(saved: Path, emoji: Tensor, side: int) -> None:
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side)) for image in emoji[:8]]
    inputs = transformers.AutoImageProcessor.from_pretrained(saved)(images, return_tensors="pt")
    model = transformers.ResNetForImageClassification.from_pretrained(saved).eval()
    with torch.no_grad():
        expected = model.resnet(**inputs).pooler_output.flatten(1)
    given = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)
    found = load_features(str(saved), "eval_features")(given)
    assert float((found - expected).norm() / expected.norm()) < (1e-5 if side == 32 else 0.005)  # Pillow rounds


def test_the_network_stays_as_it_is(saved: Path, emoji: Tensor) -> None:
    features = load_features(str(saved), "eval_features")
    before = {name: tensor.clone() for name, tensor in features.state_dict().items()}
    first = features(emoji)
    features.train()
    assert torch.equal(features(emoji), first)
    assert not first.requires_grad
    assert not any(parameter.requires_grad for parameter in features.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in features.state_dict().items())


def test_what_is_no_resnet_classifier(tmp_path: Path, saved: Path) -> None:
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ResNetForImageClassification.from_pretrained(saved).save_pretrained(tmp_path / "no_processor")
    for name, message in (
        ("nowhere", "expected a run folder or a Hub id of such a model"),
        ("vit", "expected a ResNet classifier, got ViTForImageClassification"),
        ("no_processor", "preprocessor_config.json"),
    ):
        with pytest.raises(UsageError) as caught:
            load_features(str(tmp_path / name), "eval_features")
        assert str(caught.value).startswith(f"eval_features: '{tmp_path / name}': expected ")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_inception_says_what_it_needs() -> None:
    with pytest.raises(UsageError, match="eval_features: 'inception': expected torch-fidelity, torchvision and"):
        load_features("inception", "eval_features")


# -- Fréchet distance --------------------------------------------------------------------------------------------------


class Pixel(nn.Module):
    """The three channels of the first pixel."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, 0, 0].float() * self.scale


def closed_form(true: np.ndarray, made: np.ndarray) -> float:
    """Heusel et al. 2017, equation 6, of features (N, F), by eigenvalues of symmetric matrices."""
    one, other = (np.atleast_2d(np.cov(rows.T)) for rows in (true, made))
    values, vectors = np.linalg.eigh(one)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(0)).sum()
    means = np.square(true.mean(0) - made.mean(0)).sum()
    return float(means + np.trace(one) + np.trace(other) - 2 * trace)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), number=st.integers(2, 40), cut=st.integers(1, 39))
def test_the_distance_is_the_closed_form(seed: int, number: int, cut: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    true, made = (torch.randint(0, 256, (number, 3, 1, 1), dtype=torch.uint8, generator=draw) for _ in range(2))
    expected = closed_form(*(images[:, :, 0, 0].double().numpy() for images in (true, made)))
    assert frechet_distance(Pixel(), true.split(cut), [made]) == pytest.approx(expected, rel=1e-5, abs=1e-2)


def test_the_distance_of_known_normal_distributions() -> None:
    draw = torch.Generator().manual_seed(0)
    means, deviations = torch.tensor([[100.0, 120.0, 140.0], [110.0, 120.0, 125.0]]), torch.tensor([10.0, 25.0])
    true, made = (
        (torch.randn(20000, 3, generator=draw) * deviation + mean).round().to(torch.uint8)[:, :, None, None]
        for mean, deviation in zip(means, deviations, strict=True)
    )
    expected = 10**2 + 15**2 + 3 * (25 - 10) ** 2
    assert frechet_distance(Pixel(), [true], [made]) == pytest.approx(expected, rel=0.01)


def test_the_distance_of_the_shipped_features_is_the_closed_form(shipped: nn.Module, emoji: Tensor) -> None:
    made = noisy(emoji, 40)
    expected = closed_form(*(shipped(images).double().numpy() for images in (emoji, made)))
    assert frechet_distance(shipped, emoji.split(32), made.split(50)) == pytest.approx(expected, rel=1e-4)


def test_the_distance_grows_with_noise_and_is_none_of_equal_sets(shipped: nn.Module, emoji: Tensor) -> None:
    distances = [frechet_distance(shipped, [emoji], [noisy(emoji, deviation)]) for deviation in (0, 10, 20, 40, 80)]
    assert abs(distances[0]) < 1e-4 * distances[1]
    assert distances[1:] == sorted(distances[1:])
    assert distances[4] > 10 * distances[1]


@pytest.mark.parametrize("numbers", [(1, 5), (5, 1), (5, 0)])
def test_one_image_has_no_covariance(numbers: tuple[int, int]) -> None:
    images = torch.zeros(5, 3, 1, 1, dtype=torch.uint8)
    true, made = (images[:number].split(2) if number else () for number in numbers)
    with pytest.raises(RuntimeError, match="More than one sample"):
        frechet_distance(Pixel(), true, made)


def share_of_distance(rank: int, folder: str) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)  # else a forked process waits for the threads of its parent
    init = f"file://{folder}/together"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    true, made = torch.load(f"{folder}/images.pt", weights_only=True)
    distance = frechet_distance(Pixel(), true[rank::2].split(3), made[rank::2].split(4))
    Path(f"{folder}/{rank}").write_text(str(distance))
    torch.distributed.destroy_process_group()


def test_processes_share_the_images(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    true, made = (torch.randint(0, 256, (11, 3, 1, 1), dtype=torch.uint8, generator=draw) for _ in range(2))
    torch.save([true, made], tmp_path / "images.pt")
    torch.multiprocessing.start_processes(share_of_distance, (str(tmp_path),), nprocs=2, start_method="fork")
    alone = frechet_distance(Pixel(), [true], [made])
    assert [float((tmp_path / str(rank)).read_text()) for rank in range(2)] == pytest.approx([alone] * 2, rel=1e-6)


# -- caption match -----------------------------------------------------------------------------------------------------


def around(*angles: float) -> Tensor:
    """Points of a circle, whose centre is far from the origin."""
    radians = torch.tensor(angles) / 180 * torch.pi
    return torch.stack([radians.cos(), radians.sin()], 1) + 50


TRUE = around(0, 60, 120, 180, 240, 300)  # their mean is the centre


@pytest.mark.parametrize(
    ("angle", "target", "top1", "top5"),
    [(2, 0, 1, 1), (2, 1, 0, 1), (62, 1, 1, 1), (2, 3, 0, 0), (182, 3, 1, 1), (100, 5, 0, 0)],
)
def test_a_made_image_belongs_to_the_nearest_true_one(angle: float, target: int, top1: float, top5: float) -> None:
    found = caption_match(around(angle), TRUE, torch.tensor([target]))
    assert (found["top1"], found["top5"]) == (top1, top5)


def test_shares_are_of_the_made_images() -> None:
    found = caption_match(around(1, 61, 181, 5), TRUE, torch.tensor([0, 1, 0, 1]))
    assert found == {"top1": 0.5, "top5": 0.75, "top1_chance": 1 / 6, "top5_chance": 5 / 6}
    assert caption_match(TRUE[:2], TRUE[:3], torch.tensor([0, 1]))["top5_chance"] == 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), number=st.integers(1, 20), candidates=st.integers(6, 40))
def test_matches_are_those_counted_one_by_one(seed: int, number: int, candidates: int) -> None:
    draw = np.random.default_rng(seed)
    made, true = draw.normal(3, 1, (number, 4)), draw.normal(3, 1, (candidates, 4))
    targets = draw.integers(0, candidates, number)
    hits = {1: 0, 5: 0}
    for row, target in zip(made - true.mean(0), targets, strict=True):
        cosines = [row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in true - true.mean(0)]
        for count in hits:
            hits[count] += int(target in np.argsort(cosines)[::-1][:count])
    found = caption_match(torch.tensor(made), torch.tensor(true), torch.tensor(targets))
    assert found["top1"] == pytest.approx(hits[1] / number)
    assert found["top5"] == pytest.approx(hits[5] / number)


@pytest.mark.parametrize("value", [50.0, float("nan")])
def test_features_that_tell_nothing_score_nothing(value: float) -> None:
    found = caption_match(torch.full((6, 2), value), TRUE, torch.arange(6))
    assert found["top1"] == found["top5"] == 0


def test_one_image_for_all_captions_scores_at_chance() -> None:
    found = caption_match(around(70).expand(6, 2), TRUE, torch.arange(6))
    assert found["top1"] == pytest.approx(found["top1_chance"])
    assert found["top5"] == pytest.approx(found["top5_chance"])


# -- the shipped network on held-out images --------------------------------------------------------------------------


def concept(caption: str) -> str:
    """What follows the style."""
    return caption.split(", ", 1)[1]


@torch.no_grad()
def reconstruction(images: Tensor) -> Tensor:
    vae = diffusers.AutoencoderKL.from_pretrained(ASSETS / "vae").eval()
    made = vae.decode(vae.encode(images.float() / 127.5 - 1).latent_dist.mean).sample
    return ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def test_the_nearer_to_the_caption_the_higher_the_score(shipped: nn.Module) -> None:
    """A reconstruction, an image of the same thing in another style, and any image, in this order."""
    train, held_out = open_emoji("train"), open_emoji("test_unseen_combination")
    first_of = {concept(train.captions[row]): row for row in reversed(range(len(train)))}
    true = read(held_out, list(range(len(held_out))))
    some = torch.arange(0, len(true), 4)
    in_another_style = read(train, [first_of[concept(held_out.captions[row])] for row in some.tolist()])
    any_image = read(train, np.random.default_rng(0).choice(len(train), len(some), replace=False).tolist())
    candidates, kinds = shipped(true), (reconstruction(true[some]), in_another_style, any_image)
    scores = [caption_match(shipped(made), candidates, some) for made in kinds]
    assert scores[0]["top1"] > 0.95
    assert 0.4 < scores[1]["top1"] < 0.9
    assert scores[2]["top5"] < 0.15
    # Beside the other style's own image, which no target points at, a copy of it is worth nothing.
    with_copies = torch.cat([candidates, shipped(in_another_style)])
    assert caption_match(shipped(kinds[0]), with_copies, some)["top1"] > 0.9
    assert caption_match(shipped(kinds[1]), with_copies, some)["top1"] == 0


@torch.no_grad()
def test_the_shipped_network_names_unseen_images_as_its_card_says() -> None:
    held_out = open_emoji("test_unseen_combination")
    model = transformers.ResNetForImageClassification.from_pretrained(SHIPPED).eval()
    features = load_features(str(SHIPPED), "eval_features")
    answers = model.classifier(features(read(held_out, list(range(len(held_out)))))).argmax(1).tolist()
    named = [model.config.id2label[answer] for answer in answers]
    right = np.mean([name == concept(caption) for name, caption in zip(named, held_out.captions, strict=True)])
    assert f"| `eval/top1` | {right:.4f} |" in (SHIPPED / "README.md").read_text()
