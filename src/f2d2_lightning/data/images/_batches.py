"""Batches of images as CIFAR-10 and downsampled ImageNet come in: a row of pixels and a label for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def checked_batch(
    found: Mapping[str, Any], name: str, shape: tuple[int, int, int], labels: range, home: str
) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(N, C, H, W)``, ``uint8``, and labels counted from 0, ``(N,)``, ``int64``, of one batch.

    ``found`` is what the file ``name`` holds: ``data``, an array ``(N, C H W)``, and ``labels``, ``N`` of them in the
    range given; ``home`` is where to get the file again.

    Raises:
        ValueError: If they are missing, of another type, shape or range, or not as many.
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
