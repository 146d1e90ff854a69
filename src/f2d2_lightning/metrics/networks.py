"""Networks by whose features samples are judged: Inception, to compare with the literature, and a small one.

A feature network takes images as 8-bit values, ``uint8`` ``(B, C, H, W)``, and answers features ``(B, F)``, one row per
image; any ``nn.Module`` that does so will do. Figures that follow from features (FID, KID, precision, recall) can be
compared between models only if the feature network is the same.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from f2d2_lightning.flows._held import evaluating
from f2d2_lightning.utils.files import whole_file

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_FEATURES = (64, 192, 768, 2048)
SMALL_FORMAT = "f2d2_lightning.metrics.SmallFeatures"


def check_images(images: Tensor, channels: Sequence[int] | None = None) -> None:
    """Refuse, with a :class:`ValueError`, images that are not ``uint8`` ``(B, C, H, W)``, or not of these channels."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images have dtype {images.dtype} and shape {tuple(images.shape)}; uint8 (B, C, H, W) in 0 to 255 are "
            "expected (states become images by f2d2_lightning.likelihood.state_images)"
        )
    if channels is not None and images.shape[1] not in channels:
        raise ValueError(
            f"images have {images.shape[1]} channels, and these features are of {' or '.join(map(str, channels))}; "
            "train others (benchmarks/train_features.py); Inception takes 1 (grey) or 3 (RGB)"
        )


def extract_features(network: nn.Module, images: Tensor, num_features: int | None = None) -> Tensor:
    """Features ``(B, F)`` of images ``uint8 (B, C, H, W)``, in the network's precision: evaluation mode, no gradients.

    ``num_features`` is ``F`` of earlier batches. Images that the network cannot take, and answers that are anything but
    finite features of this number, are a :class:`ValueError`.
    """
    check_images(images)
    name = type(network).__name__
    with evaluating(network), torch.no_grad():
        try:
            features = network(images)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"{name} cannot take images uint8 {tuple(images.shape)} on {images.device} ({error}); a feature "
                "network takes 8-bit images (B, C, H, W) and scales them itself"
            ) from error
    floating = isinstance(features, Tensor) and features.is_floating_point()
    if not floating or features.shape != (len(images), num_features or features.shape[-1]):
        came = f"{features.dtype} {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features)}"
        raise ValueError(
            f"{name} answered {came} to {len(images)} images; floating features ({len(images)}, "
            f"{num_features or 'F'}) are expected, one row per image (flatten further axes), "
            "whose number must not depend on the batch"
        )
    if not bool(features.isfinite().all()):
        bad = int((~features.isfinite()).any(1).sum())
        raise ValueError(f"{name} answered NaN or infinity to {bad} of {len(images)} images; its weights are unfit")
    return features


def check_network(network: nn.Module, images: Tensor) -> int:
    """Number of features, after batches of one and of all images, ``uint8 (B, C, H, W)``, were tried.

    It is a :class:`ValueError` if the network's ``num_features`` says another one, and as :func:`extract_features`.
    """
    count = extract_features(network, images[:1]).shape[1]
    extract_features(network, images, count)
    stated = getattr(network, "num_features", None)
    if isinstance(stated, int) and stated != count:
        raise ValueError(
            f"{type(network).__name__} says num_features={stated} and answers {count} features; correct one of them"
        )
    return count


def load_network(features: str | Path | nn.Module, weights: str | Path | None = None) -> nn.Module:
    """A feature network by name, by file, or as it is.

    That is ``"inception"`` with a file of its weights, the path of a file of :meth:`SmallFeatures.save`, or a network.
    A missing file is a :class:`FileNotFoundError`, one of another kind, or weights for another network a
    :class:`ValueError`.
    """
    if features == "inception":
        return InceptionFeatures(weights)
    if weights is not None:
        raise ValueError(
            f"weights={str(weights)!r} goes with features='inception', not with {features!r}: a network brings its own"
        )
    return features if isinstance(features, nn.Module) else SmallFeatures.load(features)


class SmallFeatures(nn.Module):
    """A small convolutional classifier, whose last hidden layer gives features.

    Grey images of any size: three stages of convolutions, each halving height and width, then a mean over 2 x 2 areas.
    Figures by such features say how samples of two models on the same data compare, in squared units that the training
    happened to choose; they are not the FID of the literature. ``benchmarks/train_features.py`` trains it.

    Args:
        classes: Number of classes that it is trained to tell apart.
        num_features: Number of features.
        width: Channels of the first stage; each later one has twice as many.
        channels: Channels of the images.

    Raises:
        ValueError: If one of them is not positive.
    """

    def __init__(self, classes: int = 10, num_features: int = 64, width: int = 16, channels: int = 1) -> None:
        super().__init__()
        if min(classes, num_features, width, channels) < 1:
            raise ValueError(
                f"classes={classes}, num_features={num_features}, width={width} and channels={channels} are at least 1"
            )
        self.classes, self.num_features, self.width, self.channels = classes, num_features, width, channels
        widths = (channels, width, 2 * width, 4 * width)
        stages: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            stages += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            stages += [nn.MaxPool2d(2, ceil_mode=True)]  # an axis of one pixel stays one
        self.stages = nn.Sequential(*stages)
        self.hidden = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], num_features), nn.ReLU()
        )
        self.head = nn.Linear(num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images, ``uint8 (B, C, H, W) -> (B, num_features)``; other images are a ``ValueError``."""
        check_images(images, [self.channels])
        return self.hidden(self.stages(images.to(self.head.weight.dtype) / 127.5 - 1))

    def logits(self, images: Tensor) -> Tensor:
        """Unnormalised log-probabilities of the classes, ``uint8 (B, C, H, W) -> (B, classes)``."""
        return self.head(self(images))

    def save(self, path: str | Path) -> None:
        """Write sizes and weights to a file; one that is there is a ``FileExistsError``."""
        path = Path(path)
        if path.exists():
            raise FileExistsError(f"{path} exists; remove it, or choose another name")
        sizes = {name: getattr(self, name) for name in ("classes", "num_features", "width", "channels")}
        state = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        with whole_file(path) as partial:
            torch.save({"format": SMALL_FORMAT, "sizes": sizes, "state_dict": state}, partial)

    @classmethod
    def load(cls, path: str | Path) -> SmallFeatures:
        """The network in a file that :meth:`save` wrote, in evaluation mode; plain values only, no code is run.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is of another kind, or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no feature network at {path}; train one (benchmarks/train_features.py), or correct the path"
            )
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if saved["format"] != SMALL_FORMAT:
                raise ValueError(f"its format is {saved['format']!r:.80}")
            network = cls(**saved["sizes"]).to(saved["state_dict"]["head.weight"].dtype)
            network.load_state_dict(saved["state_dict"])
        except Exception as error:  # a file of another kind fails anywhere
            raise ValueError(
                f"{path} is damaged or no file of SmallFeatures.save ({type(error).__name__}: {str(error)[:300]}); "
                "train one with benchmarks/train_features.py"
            ) from error
        return network.eval()


class InceptionFeatures(nn.Module):
    """Features of the InceptionV3 network that the FID was defined with, from a local file; nothing is downloaded.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017,
    https://arxiv.org/abs/1706.08500. This is torch-fidelity's ``inception-v3-compat``, a port of that network: images
    are resized to 299 x 299 as its TensorFlow original does (torchmetrics' own resizing differs by default). Grey
    images become three equal channels.

    Args:
        weights: File ``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity's release v0.2.0; plain values
            only are read, no code in it is run.
        num_features: Layer: 2048 is the FID's, 64, 192 and 768 are earlier ones, for few images.

    Raises:
        FileNotFoundError: If there is no such file; says how to get it.
        ValueError: If it holds something else, or there is no such layer.
    """

    def __init__(self, weights: str | Path | None, num_features: int = 2048) -> None:
        super().__init__()
        if num_features not in INCEPTION_FEATURES:
            raise ValueError(
                f"num_features is {num_features}; Inception has layers of {', '.join(map(str, INCEPTION_FEATURES))}"
            )
        if weights is None or not Path(weights).is_file():
            came = "weights is not given" if weights is None else f"there is no file at {weights}"
            raise FileNotFoundError(
                f"Inception's weights are needed, and {came}; nothing is downloaded here. Get {INCEPTION_FILE} once, "
                f"curl -LO {INCEPTION_URL}, and give its path: weights=.../{INCEPTION_FILE}. A feature network of your "
                "own does as well, where figures need not compare with the literature: features= any module from "
                "images uint8 (B, C, H, W) to (B, F), or a file of SmallFeatures (benchmarks/train_features.py)"
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            content = Path(weights).read_bytes()
            # read before torch-fidelity reads it, which would run code in it
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", [str(num_features)], feature_extractor_weights_path=io.BytesIO(content)
            )
        except Exception as error:  # a file of another kind fails anywhere
            raise ValueError(
                f"{weights} does not hold the weights of InceptionV3 ({str(error)[:300]}); get {INCEPTION_URL}"
            ) from error
        self.num_features = num_features
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images, ``uint8 (B, 1 or 3, H, W) -> (B, num_features)``; others are a ``ValueError``."""
        check_images(images, (1, 3))
        (features,) = self.network(images.expand(-1, 3, -1, -1))
        return features
