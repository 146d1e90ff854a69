"""Images of a folder or zip file, decoded, cropped and resized when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from f2d2_lightning.data.dataset import LazyValues
from f2d2_lightning.data.images._files import MODES, decoded
from f2d2_lightning.data.images._stores import FolderStore, Store, image_rows

Filter = Literal["box", "bilinear", "bicubic", "lanczos"]
"""How images are resized; all with antialiasing (Pillow widens the filter by the scale)."""


@dataclass(frozen=True)
class Framing:
    """From an image of any size to 8-bit pixels of one: a crop about the centre, then a resize.

    Both come before dequantization: averages of dequantized pixels would have narrower noise than the bins are wide.

    Args:
        size: Height and width, or ``(width, height)``.
        crop: Side of the square that is cut out; ``"square"`` for the largest that the image has, ``None`` for no
            crop. Where the margins are odd, the pixel more stays right and below.
        resize: Filter that brings other sizes to ``size``; ``None`` refuses them. Aspect ratio is not kept.
        source: Width and height that images must have to begin with; ``None`` for any.
    """

    size: int | tuple[int, int]
    crop: int | Literal["square"] | None = None
    resize: Filter | None = None
    source: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if min(self.target) < 1 or (isinstance(self.crop, int) and self.crop < 1):
            raise ValueError(f"size={self.size} and crop={self.crop}; both are at least 1 pixel")
        if isinstance(self.crop, str) and self.crop != "square":
            raise ValueError(f"crop={self.crop!r}; a number of pixels, 'square' or None is expected")
        if self.resize not in (None, *get_args(Filter)):
            raise ValueError(f"resize={self.resize!r}; box, bilinear, bicubic, lanczos or None is expected")

    @property
    def target(self) -> tuple[int, int]:
        """Width and height of what comes out."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def __call__(self, image: Image.Image) -> Image.Image:
        """The picture, in the mode that it had; a ``ValueError`` if its size does not fit."""
        if self.source is not None and image.size != self.source:
            raise ValueError(
                f"is {_by(image.size)} (width x height), and {_by(self.source)} is expected; it is of another data "
                "set, or was altered: get it again"
            )
        if self.crop is not None:
            side = min(image.size) if self.crop == "square" else self.crop
            if side > min(image.size):
                raise ValueError(f"is {_by(image.size)}, too small for a crop of {side} x {side}; choose a smaller one")
            left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if image.size == self.target:
            return image
        if self.resize is None:
            raise ValueError(
                f"is {_by(image.size)} (width x height), and {_by(self.target)} is expected; crop or resize the files, "
                "ask for that size, or say crop=... or resize=... (f2d2 nll: --resize true)"
            )
        return image.resize(self.target, Image.Resampling[self.resize.upper()])


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


class ImageReader(LazyValues):
    """Images ``(N, C, H, W)``, ``uint8``, of a store, whose files ``rows`` they are in this order.

    Images of another mode than that of so many ``channels`` are refused, or with ``convert`` converted.
    """

    def __init__(
        self, store: Store, rows: Sequence[int], channels: int, framing: Framing, convert: bool = False
    ) -> None:
        if channels not in MODES:
            raise ValueError(f"channels={channels}; 1 (grey) or 3 (RGB), 2 or 4 with alpha, are expected")
        self.store, self.channels, self.framing, self.convert = store, channels, framing, convert
        self.rows = np.array(rows, np.int64)
        width, height = framing.target
        self.shape = (len(rows), channels, height, width)

    def __getitems__(self, rows: list[int]) -> Tensor:
        """Decoded anew each time; a ``ValueError`` says which file is no image, or does not fit."""
        _, channels, height, width = self.shape
        values = torch.empty(len(rows), channels, height, width, dtype=torch.uint8)
        with self.store.opened() as content:
            for place, row in enumerate(self.rows[rows].tolist()):
                where = self.store.where(row)
                picture = decoded(content(row), where, MODES[self.channels], self.convert)
                try:
                    pixels = np.array(self.framing(picture)).reshape(height, width, channels)
                except ValueError as error:
                    raise ValueError(f"{where} {error}") from error
                values[place] = torch.from_numpy(pixels).permute(2, 0, 1)
        return values

    def fingerprint(self) -> str:
        """Another one if files, their choice or what is done to them changes."""
        return repr((self.store.fingerprint(), self.rows.tobytes(), self.shape, self.framing, self.convert))


@dataclass(frozen=True)
class ImageFiles:
    """Images of one shape, with their names."""

    values: Tensor
    """8-bit values, ``(N, C, H, W)``, ``uint8``."""
    names: list[str]
    """Paths relative to the folder, with forward slashes, in the order of ``values``."""

    def classes(self) -> list[str]:
        """Class of each image: the name of its topmost folder; a ``ValueError`` if it is in none."""
        if alone := [name for name in self.names if "/" not in name]:
            raise ValueError(
                f"{alone[0]} is in no folder that is named by a class label or name; put each image into a folder "
                "that is called as its class in training is (or by its label, where classes have no names), or give an "
                ".npz file with x and y"
            )
        return [name.partition("/")[0] for name in self.names]


def read_images(
    path: str | Path, shape: Sequence[int], *, convert: bool = False, framing: Framing | None = None
) -> ImageFiles:
    """Read a folder of images, or one image.

    Args:
        path: A folder, searched recursively, or an image file.
        shape: Of one image, ``(C, H, W)``: 1 channel is grey, 2 grey with alpha, 3 RGB, 4 RGB with alpha.
        convert: Convert images of another mode, as Pillow does: grey is ITU-R 601-2 luma, RGB of grey repeats it.
            Transparent pixels and more than 8 bits a value are refused all the same.
        framing: Crop and filter that bring images of another size to ``H x W``, whose own size is not looked at; by
            default they are refused.

    Raises:
        FileNotFoundError: If there is neither a folder nor a file.
        ValueError: Says which file is none that is asked for, and what to do.
    """
    path = Path(path)
    if len(shape) != 3 or shape[0] not in MODES:
        raise ValueError(
            f"the model's states have shape {tuple(shape)}; image files can be read for (C, H, W) with C in "
            f"{', '.join(map(str, MODES))}"
        )
    if not path.exists():
        raise FileNotFoundError(f"there is neither a folder nor a file at {path}")
    store = FolderStore(path)
    rows = image_rows(store)
    names = [store.names[row] for row in rows]
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the name {name!r} is not Unicode and cannot go into a table; rename the file") from error
    channels, height, width = shape
    framing = Framing((width, height)) if framing is None else replace(framing, size=(width, height))
    return ImageFiles(ImageReader(store, rows, channels, framing, convert)[:], names)
