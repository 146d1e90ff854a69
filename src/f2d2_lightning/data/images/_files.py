"""Folders of image files as arrays of 8-bit values, read as they are or refused.

What a file holds reaches the likelihood unchanged: nothing is cropped, rotated (EXIF orientation is not applied),
rescaled or converted unless asked for, because a likelihood of altered pixels is that of another picture.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from f2d2_lightning.data.images._stores import SUFFIXES, FolderStore, image_rows

__all__ = ["MODES", "SUFFIXES", "ImageFiles", "as_mode", "check_mode", "open_image", "read_images"]

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's name of 8-bit images by number of channels."""
KINDS = {"L": "grey", "LA": "grey with alpha", "RGB": "colour", "RGBA": "colour with alpha"}
CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
ALPHA = ("LA", "PA", "RGBA")


@dataclass(frozen=True)
class ImageFiles:
    """Images of one shape, with their names."""

    values: Tensor
    """8-bit values, ``(N, C, H, W)``, ``uint8``."""
    names: list[str]
    """Paths relative to the folder, with forward slashes, in the order of ``values``."""

    def classes(self) -> list[str]:
        """Class of each image: the name of its topmost folder.

        Raises:
            ValueError: If an image is in no folder.
        """
        if alone := [name for name in self.names if "/" not in name]:
            raise ValueError(
                f"{alone[0]} is in no folder that is named by a class label or name; put each image into a folder "
                "that is called as its class in training is (or by its label, where classes have no names), or give an "
                ".npz file with x and y"
            )
        return [name.partition("/")[0] for name in self.names]


def read_images(path: str | Path, shape: Sequence[int], *, convert: bool = False, resize: bool = False) -> ImageFiles:
    """Read a folder of images, or one image.

    Args:
        path: A folder, searched recursively, or an image file.
        shape: Of one image, ``(C, H, W)``: 1 channel is grey, 2 grey with alpha, 3 RGB, 4 RGB with alpha.
        convert: Convert images of another mode, as Pillow does: grey is ITU-R 601-2 luma, RGB of grey repeats it.
            Transparent pixels and more than 8 bits a value are refused all the same.
        resize: Bring images of another size to ``H x W``: bicubic with antialiasing, rounded to 8 bits, aspect ratio
            not kept. That is before any dequantization, as it has to be: averaging dequantized pixels would narrow
            their noise, and the likelihood would count pixels that no 8-bit image has.

    Raises:
        FileNotFoundError: If there is neither a folder nor a file.
        ValueError: If there are no images, files of other types, corrupt or truncated files, several pictures in a
            file, or images of another mode or size than asked for. Says which file and what to do.
    """
    path = Path(path)
    if len(shape) != 3 or shape[0] not in MODES:
        raise ValueError(
            f"the model's states have shape {tuple(shape)}; image files can be read for (C, H, W) with C in "
            f"{', '.join(map(str, MODES))}"
        )
    if path.is_dir():
        store = FolderStore(path)
        names = [store.names[row] for row in image_rows(store)]
        paths = [path / name for name in names]
    elif path.is_file():
        paths, names = [path], [path.name]
    else:
        raise FileNotFoundError(f"there is neither a folder nor a file at {path}")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the name {name!r} is not Unicode and cannot go into a table; rename the file") from error
    channels, height, width = shape
    sizes = []
    for file in paths:
        with open_image(file) as image:
            sizes.append(image.size)
            check_mode(image, file, MODES[channels], convert)
    if not resize:
        _check_sizes(names, sizes, (width, height))
    values = torch.empty(len(paths), channels, height, width, dtype=torch.uint8)
    for row, file in enumerate(paths):
        with open_image(file) as image:
            picture = as_mode(image, file, MODES[channels])
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            values[row] = torch.from_numpy(np.array(picture)).reshape(height, width, channels).permute(2, 0, 1)
    return ImageFiles(values, names)


@contextmanager
def open_image(path: str | Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """An image file; whatever Pillow's decoders raise within the context says which file it was.

    Args:
        path: The file.
        content: What it holds, where it is no file of its own; ``path`` is then its name.

    Raises:
        ValueError: If it cannot be read as an image.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
            yield image
    except _UnfitError:
        raise
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(
            f"{path} cannot be read as an image ({error}); it is corrupt, truncated or of another type: repair or "
            "remove it"
        ) from error


class _UnfitError(ValueError):
    """An image that can be read and does not fit."""


def check_mode(image: Image.Image, path: str | Path, wanted: str, convert: bool) -> None:
    """Refuse an image of several pictures, of more than 8 bits a value, or of a mode that may not become ``wanted``.

    Raises:
        ValueError: Says the file, its mode, and what to do.
    """
    if getattr(image, "n_frames", 1) > 1:
        raise _UnfitError(f"{path} holds {image.n_frames} pictures; files of one picture are expected")  # type: ignore[attr-defined]
    if image.mode.startswith(("I", "F")) or _is_narrowed(image):
        raise _UnfitError(f"{path} has more than 8 bits a value (mode {image.mode}); 8-bit images are expected")
    if image.mode == wanted:
        return
    if image.mode not in CONVERTIBLE:
        raise _UnfitError(
            f"{path} has mode {image.mode}; {wanted} images are expected ({', '.join(CONVERTIBLE)} convert)"
        )
    if not convert:
        raise _UnfitError(
            f"{path} has mode {image.mode}, but the model is for mode {wanted} ({KINDS[wanted]}); convert the files, "
            "or say --convert true (convert=True)"
        )


def _is_narrowed(image: Image.Image) -> bool:
    """Whether Pillow brings 16 bits of a colour to 8: it says so only in how it decodes, before it has."""
    for codec, _, _, arguments in getattr(image, "tile", ()):
        highest = arguments[-1] if codec.startswith("ppm") and isinstance(arguments, tuple) else 0
        if re.search(r";16[BLN]", str(arguments)) or highest > 255:
            return True
    return False


def as_mode(image: Image.Image, path: str | Path, wanted: str) -> Image.Image:
    """An image in Pillow's mode ``wanted``, decoded.

    Raises:
        ValueError: If transparent pixels would get a colour.
    """
    if image.mode == wanted:
        image.load()
        return image
    transparent = image.mode in ALPHA or "transparency" in image.info
    if transparent and wanted not in ALPHA and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise _UnfitError(f"{path} has transparent pixels, whose colour is undefined; put it on a background first")
    return image.convert(wanted)


def _check_sizes(names: Sequence[str], sizes: Sequence[tuple[int, int]], wanted: tuple[int, int]) -> None:
    if all(size == wanted for size in sizes):
        return
    first = sizes[0]
    other = next((i for i, size in enumerate(sizes) if size != first), None)
    if other is not None:
        came = f"{names[0]} is {_by(first)} and {names[other]} is {_by(sizes[other])}"
    else:
        listed = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
        came = f"{listed} {'are' if len(names) > 1 else 'is'} {_by(first)}"
    raise ValueError(
        f"{came} (width x height), but the model is for {_by(wanted)}; crop or resize the files, or say --resize true "
        "(resize=True)"
    )


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
