"""What data are, seen by looking at some of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2d2_lightning.cli._common import imported
from f2d2_lightning.cli._points import DATA
from f2d2_lightning.data.images._files import decoded
from f2d2_lightning.data.images._stores import image_rows, open_store
from f2d2_lightning.data.table import Table

LOOKED_AT, LARGEST = 64, 64
"""Images that are opened to see what they are, and the side to which larger ones are resized."""


@dataclass(frozen=True)
class Found:
    """What data are."""

    shape: tuple[int, ...]
    count: int
    """To train on."""
    levels: int | None
    data: dict[str, Any]
    """The data module, as a configuration says it."""
    said: str
    """In words."""


def look_at(data: str, size: int | None) -> Found:
    """What data are, by the name of a data module, or a file or folder; ``size`` is the side that images get.

    Raises:
        ValueError: If they are none, or have no density.
    """
    path = Path(data)
    if data in DATA and not path.exists():
        module = imported(DATA[data], "--data")()
        count = len(module.dataset("train"))
        what = {"class_path": DATA[data], "init_args": {}}
        return Found(tuple(module.shape), count, module.levels, what, f"states of shape {tuple(module.shape)}")
    if path.is_dir() or path.suffix.lower() == ".zip":
        return _look_at_images(path, size)
    if path.suffix.lower() in (".csv", ".npy", ".npz"):
        return _look_at_rows(path)
    raise ValueError(
        f"--data is {data}; a folder of images, a .csv, .npy or .npz file, or one of {', '.join(DATA)} is needed"
    )


def _look_at_rows(path: Path) -> Found:
    table = Table(str(path))
    parts = [values for values, _ in table.splits().values()]
    floating, highest = parts[0].is_floating_point(), max(int(part.max()) for part in parts)
    count, shape = sum(map(len, parts)), table.shape
    if not floating and len(shape) != 3:
        raise ValueError(
            f"{path} holds integers of shape {(count, *shape)}; images are (N, channels, height, width). A "
            "table of counts has no density: give floating numbers, with noise added over each count's width"
        )
    # 8 bits, unless the numbers say otherwise
    eight_bit = floating or 128 <= highest < 256
    levels = None if floating else 256 if eight_bit else highest + 1
    arguments: dict[str, Any] = {"path": str(path)} | ({} if eight_bit else {"levels": levels})
    what = {"class_path": "f2d2_lightning.data.Table", "init_args": arguments}
    more = "standardised by those to train on" if floating else f"{levels} levels"
    said = f"{count:,} {'rows' if floating else 'images'} of shape {shape}, {more}"
    return Found(shape, len(parts[0]), levels, what, "; ".join((said, *table.said)))


def _look_at_images(path: Path, size: int | None) -> Found:
    store = open_store(path)
    rows = image_rows(store)
    sizes, colours = set(), False
    with store.opened() as read:
        for row in rows[:: max(1, len(rows) // LOOKED_AT)]:
            image = decoded(read(row), store.where(row), "RGB", convert=True)
            sizes.add(image.size)
            # grey images may be stored as RGB
            red, green, blue = image.split()
            colours = colours or not red.tobytes() == green.tobytes() == blue.tobytes()
    smallest = min(min(pair) for pair in sizes)
    # sides that a network can halve twice
    side = size or max(4, min(LARGEST, smallest) // 4 * 4)
    init: dict[str, Any] = {"folder": str(path), "size": side, "channels": 3 if colours else 1}
    resized = ""
    if sizes != {(side, side)}:
        init |= {"crop": "square", "resize": "bicubic"}
        resized = f", their middle brought to {side} x {side} pixels (--size says another)"
    init |= {"convert": True}
    held_out = max(1, min(1000, len(rows) // 10))
    if len(rows) < 3:
        raise ValueError(f"{path} holds {len(rows)} images; at least 3 are needed, to train, validate and test on")
    init |= {"val": held_out, "test": held_out}
    shape = (init["channels"], side, side)
    said = f"{len(rows):,} {'colour' if colours else 'grey'} images{resized}"
    what = {"class_path": "f2d2_lightning.data.ImageFolder", "init_args": init}
    return Found(shape, len(rows) - 2 * held_out, 256, what, said)
