"""Image files in the mode that is asked for, read as they are or refused.

What a file holds reaches the likelihood unchanged: nothing is cropped, rotated (EXIF orientation is not applied),
rescaled or converted unless asked for, because a likelihood of altered pixels is that of another picture.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's name of 8-bit images by number of channels."""
KINDS = {"L": "grey", "LA": "grey with alpha", "RGB": "colour", "RGBA": "colour with alpha"}
CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
ALPHA = ("LA", "PA", "RGBA")
DAMAGES = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow's decoders raise."""


@contextmanager
def open_image(path: str, content: bytes) -> Iterator[Image.Image]:
    """The image in a file's content; whatever Pillow's decoders raise within the context says which file it was.

    Raises:
        ValueError: If it cannot be read as an image.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            yield image
    except _UnfitError:
        raise
    except DAMAGES as error:
        raise ValueError(
            f"{path} cannot be read as an image ({error}); it is corrupt, truncated or of another type: repair or "
            "remove it"
        ) from error


class _UnfitError(ValueError):
    """An image that can be read and does not fit."""


def check_mode(image: Image.Image, path: str, wanted: str, convert: bool) -> None:
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


def as_mode(image: Image.Image, path: str, wanted: str) -> Image.Image:
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
