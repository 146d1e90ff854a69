"""What the data modules of images share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from f2d2_lightning.data.dataset import Values, take
from f2d2_lightning.data.module import FlowDataModule
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.utils.checks import checked
from f2d2_lightning.utils.class_names import labels_of

LabeledImages = tuple[Values, Tensor | None]
"""Images ``(N, C, H, W)``, ``uint8``, and labels ``(N,)`` or ``None``."""


class ImageDataModule(FlowDataModule):
    """8-bit images, dequantized to [-1, 1] with 256 levels after whatever crops and resizes them.

    Under a Trainer files are fetched and caches written by one process of each node, before the others look for them.

    Args:
        labels: Give batches ``(states, labels)``, for class-conditional models.
        batch_size: Samples per training batch.
        eval_batch_size: Samples per validation and test batch.
        num_workers: Processes that load; data in memory need none.
        seed: Of order, flips and noise; splits do not depend on it.
        flip: Mirror training images left to right with probability 1/2, a function of seed, epoch and sample.
        count: Training images to use; ``None`` for all that are left.
        val: Validation images; of data without such a part they are training images.
        test: Test images; ``None`` for all of their part.
    """

    @checked
    def __init__(
        self,
        labels: bool = False,
        batch_size: int = 256,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        flip: bool = False,
        count: int | None = None,
        val: int | None = 1000,
        test: int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, Quantization(256), flip)
        self.with_labels, self.count, self.val, self.test = labels, count, val, test
        self.classes: list[str] | None = None
        """Names of the classes in the order of their labels, once the data are set up; ``None`` if they have none."""
        self._own_classes: list[str] = []
        self._own_labels: dict[str, Tensor] = {}

    def relabel(self, classes: Sequence[str]) -> None:
        """Number the labels by another list of names, such as the one that a model was trained with.

        Args:
            classes: All names in the order of their labels; more than the data have will do. An empty list takes the
                data's names for the labels themselves.

        Raises:
            ValueError: If the data have no names, or one that is not among them.
        """
        self.setup()
        if not self._own_labels:
            if not self.classes:
                raise ValueError(
                    f"{type(self).__name__} has no names of classes; set labels=True, or leave it as it is"
                )
            self._own_classes = self.classes
            own = {name: data.labels for name, data in self._sets.items() if data.labels is not None}
            self._own_labels = {name: labels.clone() for name, labels in own.items()}
        numbers = torch.tensor(labels_of(self._own_classes, classes, type(self).__name__))
        for name, labels in self._own_labels.items():
            # in place: loaders may have been made
            self._sets[name].labels.copy_(numbers[labels])  # type: ignore[union-attr]
        self.classes = list(classes) or [*map(str, range(int(numbers.max()) + 1))]

    def prepare_data(self) -> None:
        """Fetch and convert what is to be, before other processes look for it."""
        self.setup()


def divide(
    train: LabeledImages,
    val_part: LabeledImages | None = None,
    test_part: LabeledImages | None = None,
    *,
    count: int | None = None,
    val: int | None = None,
    test: int | None = None,
    draw: bool = False,
) -> dict[str, LabeledImages]:
    """Splits of images that come in one, two or three parts.

    Where there is no part to validate, the last ``val`` training images do; where there is none to test, the ``test``
    training images before those. Numbers that are ``None`` are all that there are.

    With ``draw`` the images of a split are drawn from each part, in a way that depends on nothing else, and stay in
    their order: images may be sorted by class. Otherwise the first ones are used of each.
    """
    total = len(train[0])
    apart = {"val": 0 if val_part else val or 0, "test": 0 if test_part else test or 0}
    left = total - sum(apart.values())
    # images, where the split begins in them, how many there are at most, and how many are wanted
    places = {"train": (train, 0, left, left if count is None else count)}
    for name, part, start, wanted in (("val", val_part, total - apart["val"], val), ("test", test_part, left, test)):
        most = len(part[0]) if part else total
        places[name] = (part or train, 0 if part else start, most, (most if part else 0) if wanted is None else wanted)
    if not all(1 <= size <= most for _, _, most, size in places.values()):
        others = "".join(f" and {places[name][2]} {name}" for name in apart if places[name][0] is not train)
        taken = "".join(
            f"; {name} images are taken from the end of the training images" for name in apart if apart[name]
        )
        raise ValueError(f"count={count}, val={val} and test={test} do not fit {total} training{others} images{taken}")
    found = {}
    for name, ((values, labels), start, _, size) in places.items():
        rows: slice | Tensor = slice(start, start + size)
        if draw:
            order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
            rows = order[rows].sort().values
        found[name] = (take(values, rows), None if labels is None else labels[rows])
    return found


def checked_batch(
    found: Mapping[str, Any], name: str, shape: tuple[int, int, int], labels: range, home: str
) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(N, C, H, W)``, ``uint8``, and labels counted from 0, ``(N,)``, ``int64``, of one batch.

    ``found`` is what the file ``name`` holds: ``data``, an array ``(N, C H W)``, and ``labels``, ``N`` of them in the
    range given; ``home`` is where to get the file again.
    """
    pixels, classes, dim = found.get("data"), found.get("labels"), int(np.prod(shape))
    again = f"it is corrupt, truncated or another data set; get it again from {home}"
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (dim,):
        came = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else "no array"
        raise ValueError(
            f"{name} has {came} as data; uint8 (N, {dim}), {' x '.join(map(str, shape))} pixels a row, are expected: "
            + again
        )
    if not isinstance(classes, np.ndarray):
        whole = isinstance(classes, list) and all(type(label) is int and abs(label) < 2**31 for label in classes)
        classes = np.array(classes, np.int64) if whole else np.array("none")
    if classes.shape != (len(pixels),) or classes.dtype.kind not in "iu":
        raise ValueError(
            f"{name} has {len(pixels)} images and {classes.dtype} {classes.shape} as labels; as many whole numbers are "
            f"expected: {again}"
        )
    if len(classes) and not (classes.min() >= labels[0] and classes.max() <= labels[-1]):
        raise ValueError(
            f"{name} has labels {classes.min()} to {classes.max()}; {labels[0]} to {labels[-1]} are expected: {again}"
        )
    return pixels.reshape(-1, *shape), classes.astype(np.int64) - labels[0]
