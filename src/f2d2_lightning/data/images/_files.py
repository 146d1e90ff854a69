"""Image files in the mode that is asked for, read as they are or refused.

What a file holds reaches the likelihood unchanged: nothing is cropped, rotated (EXIF orientation is not applied),
rescaled or converted unless asked for, because a likelihood of altered pixels is that of another picture.
"""

from __future__ import annotations

import io
import re

from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's name of 8-bit images by number of channels."""
KINDS = {"L": "grey", "LA": "grey with alpha", "RGB": "colour", "RGBA": "colour with alpha"}
CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
ALPHA = ("LA", "PA", "RGBA")


def decoded(content: bytes, path: str, wanted: str, convert: bool) -> Image.Image:
    """The image in a file's content, in Pillow's mode ``wanted``; of another mode only where it may be converted."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            unfit = _unfit(image, wanted, convert)
            picture = image.convert(wanted) if unfit is None else None
    except Exception as error:  # decoders raise whatever a damaged byte leads to
        raise ValueError(
            f"{path} cannot be read as an image ({error}); it is corrupt, truncated or of another type: repair or "
            "remove it"
        ) from error
    if picture is None:
        raise ValueError(f"{path} {unfit}")
    return picture


def _unfit(image: Image.Image, wanted: str, convert: bool) -> str | None:
    """Why an image that can be read does not fit, if it does not."""
    mode = image.mode
    if (pictures := getattr(image, "n_frames", 1)) > 1:
        return f"holds {pictures} pictures; files of one picture are expected"
    if mode.startswith(("I", "F")) or _is_narrowed(image):
        return f"has more than 8 bits a value (mode {mode}); 8-bit images are expected"
    if mode == wanted:
        return None
    if mode not in CONVERTIBLE:
        return f"has mode {mode}; {wanted} images are expected ({', '.join(CONVERTIBLE)} convert)"
    if not convert:
        return (
            f"has mode {mode}, but the model is for mode {wanted} ({KINDS[wanted]}); convert the files, or say "
            "--convert true (convert=True)"
        )
    transparent = mode in ALPHA or "transparency" in image.info
    if transparent and wanted not in ALPHA and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        return "has transparent pixels, whose colour is undefined; put it on a background first"
    return None


def _is_narrowed(image: Image.Image) -> bool:
    """Whether Pillow brings 16 bits of a colour to 8: it says so only in how it decodes, before it has."""
    for codec, _, _, arguments in getattr(image, "tile", ()):
        highest = arguments[-1] if codec.startswith("ppm") and isinstance(arguments, tuple) else 0
        if re.search(r";16[BLN]", str(arguments)) or highest > 255:
            return True
    return False
