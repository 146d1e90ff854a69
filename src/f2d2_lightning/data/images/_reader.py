"""Images of a folder or zip file, decoded, cropped and resized when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from f2d2_lightning.data.dataset import LazyValues
from f2d2_lightning.data.images._files import MODES, as_mode, check_mode, open_image
from f2d2_lightning.data.images._stores import Store

__all__ = ["Filter", "Framing", "ImageReader"]

Filter = Literal["box", "bilinear", "bicubic", "lanczos"]
"""How images are resized; all with antialiasing (Pillow widens the filter by the scale)."""


@dataclass(frozen=True)
class Framing:
    """From an image of any size to ``size x size`` 8-bit pixels: a crop about the centre, then a resize.

    Both come before dequantization: averages of dequantized pixels would have narrower noise than the bins are wide.

    Args:
        size: Height and width.
        crop: Side of the square that is cut out; ``"square"`` for the largest that the image has, ``None`` for no
            crop. Where the margins are odd, the pixel more stays right and below.
        resize: Filter that brings other sizes to ``size``; ``None`` refuses them. Aspect ratio is not kept.
        source: Width and height that images must have to begin with; ``None`` for any.

    Raises:
        ValueError: If a number is below 1, or the words are others.
    """

    size: int
    crop: int | Literal["square"] | None = None
    resize: Filter | None = None
    source: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or (isinstance(self.crop, int) and self.crop < 1):
            raise ValueError(f"size={self.size} and crop={self.crop}; both are at least 1 pixel")
        if isinstance(self.crop, str) and self.crop != "square":
            raise ValueError(f"crop={self.crop!r}; a number of pixels, 'square' or None is expected")
        if self.resize not in (None, "box", "bilinear", "bicubic", "lanczos"):
            raise ValueError(f"resize={self.resize!r}; box, bilinear, bicubic, lanczos or None is expected")

    def __call__(self, image: Image.Image) -> Image.Image:
        """The picture, in the mode that it had.

        Raises:
            ValueError: If it is too small for the crop, or of another size and may not be resized.
        """
        width, height = image.size
        if self.source is not None and image.size != self.source:
            raise ValueError(
                f"is {width} x {height} (width x height), and {self.source[0]} x {self.source[1]} is expected; it is "
                "of another data set, or was altered: get it again"
            )
        if self.crop is not None:
            side = min(image.size) if self.crop == "square" else self.crop
            if side > min(image.size):
                raise ValueError(
                    f"is {width} x {height}, too small for a crop of {side} x {side}; choose a smaller one"
                )
            left, top = (width - side) // 2, (height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if image.size == (self.size, self.size):
            return image
        if self.resize is None:
            raise ValueError(
                f"is {image.size[0]} x {image.size[1]} (width x height), and {self.size} x {self.size} is expected; "
                "ask for that size, or for a crop or resize where the data module has them"
            )
        return image.resize((self.size, self.size), Image.Resampling[self.resize.upper()])


class ImageReader(LazyValues):
    """Images ``(N, C, size, size)``, ``uint8``.

    Args:
        store: Where they are.
        rows: Their numbers in the store, in the order that they get here.
        channels: 1 grey, 3 RGB.
        framing: Crop and resize.
        convert: Convert images of another mode; else they are refused.
    """

    def __init__(
        self, store: Store, rows: Sequence[int], channels: int, framing: Framing, convert: bool = False
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}; 1 (grey) or 3 (RGB) are expected")
        self.store, self.channels, self.framing, self.convert = store, channels, framing, convert
        self.rows = np.array(rows, np.int64)
        self.shape = (len(rows), channels, framing.size, framing.size)

    def __getitems__(self, rows: list[int]) -> Tensor:
        """Decoded anew each time.

        Raises:
            ValueError: If a file is no image, or does not fit. Says which.
        """
        values = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        with self.store.opened() as content:
            for place, row in enumerate(self.rows[rows].tolist()):
                picture = self._picture(content(row), self.store.where(row))
                pixels = np.array(picture).reshape(self.framing.size, self.framing.size, self.channels)
                values[place] = torch.from_numpy(pixels).permute(2, 0, 1)
        return values

    def _picture(self, content: bytes, where: str) -> Image.Image:
        with open_image(where, content) as image:
            check_mode(image, where, MODES[self.channels], self.convert)
            picture = as_mode(image, where, MODES[self.channels])
        try:
            return self.framing(picture)
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error

    def fingerprint(self) -> str:
        """Another one if files, their choice or what is done to them changes."""
        return repr((self.store.fingerprint(), self.rows.tobytes(), self.shape, self.framing, self.convert))
