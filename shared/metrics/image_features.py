"""How near generated images come to true ones, in the features of a classifier.

One number for a set of images, the Fréchet distance (Heusel et al. 2017), and one for single images: how often
each is nearest to the one that its caption belongs to. Feature networks take uint8 images (B, 3, H, W) and give
features (B, F), as `torchmetrics` wants it.
"""

# Shapes: B images of a batch, N made images, M true ones, F features.
import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from torchmetrics.image.fid import FrechetInceptionDistance

from shared.command_line import UsageError, expect, one_line
from shared.models.pretrained import load_pretrained

INCEPTION = "inception"
_INCEPTION_FEATURES = 2048  # of its last pooling (Heusel et al. 2017)


class ClassifierFeatures(nn.Module):
    """What a ResNet classifier knows of an image before its head: the last stage, its mean over places; frozen.

    Attributes:
        num_features: how many numbers that are.
        class_names: by class, of the head.

    Args:
        model: `transformers.ResNetForImageClassification`; it is put into evaluation mode, for good.
        side: of the images that it was trained on, in pixels.
        mean: of the channels, from 0 to 1, as it was trained with.
        std: likewise.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(self, model: Any, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.num_features: int = model.config.hidden_sizes[-1]
        self.class_names = [model.config.id2label[number] for number in range(model.config.num_labels)]
        self._resnet = model.resnet.eval().requires_grad_(False)
        self._head = model.classifier.eval().requires_grad_(False)
        self._side = side
        self.register_buffer("_mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("_std", torch.tensor(std)[:, None, None])

    def train(self, mode: bool = True) -> "ClassifierFeatures":
        """Stay in evaluation mode, whatever is asked for."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 (B, F) of uint8 images (B, 3, H, W); those of other sides are resized, not cut."""
        scaled = images.to(torch.float32) / 255
        if images.shape[2:] != (self._side, self._side):
            scaled = interpolate(scaled, size=(self._side, self._side), mode="bilinear", antialias=True)
        return self._resnet((scaled - self._mean) / self._std).pooler_output.flatten(1)

    def classes(self, images: Tensor) -> Tensor:
        """The class int64 (B,) that each of uint8 images (B, 3, H, W) is taken for."""
        return self._head(self(images)).argmax(1)


def load_classifier(name: str, field: str) -> ClassifierFeatures:
    """A ResNet classifier, from a folder or Hub id, such as one of recipes/resnet.

    Raises:
        UsageError: it is not there or no ResNet classifier, naming `field`.
    """
    model = load_pretrained(transformers.AutoModelForImageClassification, name, field)
    is_resnet = isinstance(model, transformers.ResNetForImageClassification)
    expect(is_resnet, field, name, f"a ResNet classifier, got {type(model).__name__}")
    processor = load_pretrained(transformers.AutoImageProcessor, name, field)
    cut = processor.crop_size if getattr(processor, "do_center_crop", None) else None
    side = cut.height if cut else processor.size.shortest_edge or processor.size.height
    return ClassifierFeatures(model, side, processor.image_mean, processor.image_std)


def load_features(name: str, field: str) -> nn.Module:
    """A feature network, with its number of features as `num_features`.

    Args:
        name: folder or Hub id of a ResNet classifier, such as one of recipes/resnet; or inception, the network of
            published Fréchet distances, whose weights `torch-fidelity` downloads.
        field: the configuration field that it comes from, for the message.

    Raises:
        UsageError: it is not there or no ResNet classifier, or `torch-fidelity` or its weights are not there.
    """
    return _load_inception(field) if name == INCEPTION else load_classifier(name, field)


def frechet_distance(features: nn.Module, true: Iterable[Tensor], made: Iterable[Tensor]) -> float:
    """Distance of two sets of images: that of normal distributions with the means and covariances of their features.

    Heusel et al. 2017, section "Fréchet Inception Distance"; sums and covariances are in float64. Sets of the same kind
    have a distance above 0 that falls about as 1 / N (Chong and Forsyth 2020), and with fewer images than features
    most of it may be that. So only distances of equal numbers of images, and of one feature network, compare.

    Under `torch.distributed` each process calls this with its share, of at least one image, and all get the distance
    of the whole.

    Args:
        features: see `load_features`.
        true: batches of uint8 (B, 3, H, W).
        made: likewise.

    Raises:
        RuntimeError: there are fewer than two images in one of the sets.
    """
    device = next(features.parameters()).device
    metric = FrechetInceptionDistance(feature=features).to(device)
    for batches, is_true in ((true, True), (made, False)):
        for images in batches:
            metric.update(images.to(device), real=is_true)
    return metric.compute().item()


@torch.no_grad()
def share_of_classes(classifier: ClassifierFeatures, images: Iterable[Tensor]) -> dict[str, float]:
    """The share of images that are taken for each class, by its name.

    Args:
        classifier: see `load_classifier`.
        images: batches of uint8 (B, 3, H, W).
    """
    device = next(classifier.parameters()).device
    found = torch.cat([classifier.classes(batch.to(device)) for batch in images])
    shares = found.bincount(minlength=len(classifier.class_names)).double() / len(found)
    return dict(zip(classifier.class_names, shares.tolist(), strict=True))


def caption_match(made: Tensor, true: Tensor, targets: Tensor) -> dict[str, float]:
    """How often a made image is nearest to the true image of its own caption.

    Retrieval among true images, as R-precision is among captions (Xu et al. 2018, section 4). Similarity is the
    cosine of features from which the mean of the true ones is taken: features behind a ReLU are positive, so without
    this all images are alike. A true image that is as similar as the own one counts as nearer, so that features
    that tell nothing score nothing.

    What is scored follows from `true`: an image has only to be told from these. Where they show a thing in one style,
    its image in any style counts; images of it in the other styles, to which no target points, mend that.

    Args:
        made: features (N, F).
        true: features (M, F).
        targets: int64 (N,), the row of `true` that each made image should be.

    Returns:
        top1 and top5, shares of the N whose own image is the nearest, or among the nearest five; and top1_chance and
        top5_chance, what images at random score.
    """
    mean = true.double().mean(0)
    made_units, true_units = (normalize(rows.double() - mean, dim=1) for rows in (made, true))
    similarities = made_units @ true_units.T  # (N, M)
    own = similarities.gather(1, targets[:, None])
    nearer = len(true) - 1 - (similarities < own).sum(1)  # (N,), with what is equally near, or not a number
    shares = {f"top{count}": float((nearer < count).double().mean()) for count in (1, 5)}
    return {**shares, **{f"top{count}_chance": min(count / len(true), 1.0) for count in (1, 5)}}


def _load_inception(field: str) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        # torch-fidelity unpickles this file without any check, so it is seen to hold nothing but weights before.
        torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, weights_only=True)
        network: Any = FrechetInceptionDistance(feature=_INCEPTION_FEATURES).inception
    except (ImportError, OSError, pickle.UnpicklingError) as error:
        reason = one_line(error)
        expected = "torch-fidelity, torchvision and, to download the weights once, the network"
        raise UsageError(f"{field}: {INCEPTION!r}: expected {expected}: {reason}") from error
    network.num_features = _INCEPTION_FEATURES
    return network
