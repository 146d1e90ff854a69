"""ImageNet at 64 x 64 pixels: 1.28 million colour images of a thousand classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from f2d2_lightning.data.dataset import StoredValues
from f2d2_lightning.data.images._cache import cached, digest, write_array, write_once
from f2d2_lightning.data.images._reader import Framing, ImageReader
from f2d2_lightning.data.images._stores import first_of, image_rows, open_store
from f2d2_lightning.data.images.base import ImageDataModule, LabeledImages, checked_batch, divide
from f2d2_lightning.utils.arrays import read_numbers
from f2d2_lightning.utils.checks import checked
from f2d2_lightning.utils.files import whole_file
from f2d2_lightning.utils.pickles import read_arrays

HOME = "https://image-net.org/download-images"
CLASSES = 1000
BATCHES = {"train": tuple(f"train_data_batch_{number}" for number in range(1, 11)), "valid": ("val_data",)}
BATCH_COUNTS = {"train": 1_281_167, "valid": 50_000}
"""Images of the version of 2017."""
PICTURE_COUNTS = {"train": 1_281_149, "valid": 49_999}
"""Images of the version of 2016."""
NEEDS = {
    "batches": "train_data_batch_1 to train_data_batch_10 and val_data, each with .npz or as a pickle without an "
    f"ending: get 'ImageNet64 (downsampled)' from {HOME} with an account, unpack the zip files",
    "pictures": "train_64x64 and valid_64x64, folders of PNG files or the same as .zip: the site that had them, "
    "http://image-net.org/small/, is gone; get them from who has them",
}


class ImageNet64(ImageDataModule):
    """Downsampled ImageNet, dequantized to [-1, 1]. There are two, whose bits per dimension DO NOT COMPARE.

    ``version="batches"``: Chrabaszcz, Loshchilov and Hutter, "A Downsampled Variant of ImageNet as an Alternative to
    the CIFAR datasets", 2017, https://arxiv.org/abs/1707.08819: resized with a box filter; ten batches
    ``train_data_batch_1`` to ``_10`` and ``val_data``, each ``.npz`` or a pickle, with labels (1 to 1000 in the files,
    0 to 999 here, in these authors' own order of the classes).

    ``version="pictures"``: van den Oord, Kalchbrenner and Kavukcuoglu, "Pixel Recurrent Neural Networks", 2016,
    https://arxiv.org/abs/1601.06759: other pixels, resized without antialiasing, which makes them harder to compress
    (said in Zheng et al., "Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs", 2023,
    https://arxiv.org/abs/2305.03935); folders or zip files ``train_64x64`` and ``valid_64x64`` of PNG files, without
    labels. Most bits per dimension published before about 2022 are of these; ImageNet's site no longer offers them.

    The official validation images are the test set, and ``val`` training images, drawn once and for all, validate.
    Nothing is downloaded: the files are behind a free account of ImageNet's site. Training images are 15.7 GB as
    pixels and never in memory as a whole: batches are converted once into a memory-mapped array, PNG files are decoded
    when they are asked for, or converted likewise if ``cache`` is given.

    Args:
        folder: Where the batches, or ``train_64x64`` and ``valid_64x64``, are.
        version: ``"batches"`` or ``"pictures"``.
        labels: Give batches ``(states, labels)``, labels 0 to 999.
        val: Validation images.
        cache: Folder for the arrays (16 GB); by default, for batches, ``folder/cache``. Under a Trainer one process
            makes them while the others wait, as long as its time-out lets them: call ``setup()`` once beforehand.
        **kwargs: As :class:`ImageDataModule`; ``num_workers`` had better be several.

    Raises:
        FileNotFoundError: When the data are first asked for, if a file is missing.
        ValueError: If a file is corrupt, truncated or another one; of a PNG file, when it is read.
    """

    shape = (3, 64, 64)

    @checked
    def __init__(
        self,
        folder: str = "data/imagenet64",
        version: Literal["batches", "pictures"] = "batches",
        labels: bool = False,
        val: int = 10_000,
        cache: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(labels, val=val, **kwargs)
        if version not in ("batches", "pictures"):
            raise ValueError(f"version={version!r}; 'batches' (2017) or 'pictures' (2016) is expected")
        if labels and version == "pictures":
            raise ValueError(
                "the pictures of 2016 have no labels; set labels=False, or version='batches' (whose bits per dimension "
                "do not compare)"
            )
        self.folder, self.version = Path(folder).expanduser(), version
        self.cache = cache if cache is not None or version == "pictures" else str(self.folder / "cache")

    def splits(self) -> dict[str, LabeledImages]:
        read = self._batches if self.version == "batches" else self._pictures
        # the small one first: what is wrong with it is said before sixteen gigabytes are converted
        valid, train = (read(part) for part in ("valid", "train"))
        return divide(train, None, valid, count=self.count, val=self.val, test=self.test, draw=True)

    def _found(self, *names: str) -> Path:
        if path := first_of(self.folder, *names):
            return path
        raise FileNotFoundError(
            f"{self.folder} lacks {' and '.join(names)}; version={self.version!r} needs {NEEDS[self.version]}, and say "
            "where they are (ImageNet64(folder=...), --data.init_args.folder)"
        )

    def _pictures(self, part: str) -> LabeledImages:
        name = f"{part}_64x64"
        store = open_store(self._found(name, f"{name}.zip"))
        rows = image_rows(store)
        if len(rows) != PICTURE_COUNTS[part]:
            raise ValueError(
                f"{store.path} holds {len(rows)} images; {PICTURE_COUNTS[part]} are expected: it is incomplete or "
                "another data set (for any folder of images there is ImageFolder)"
            )
        return cached(ImageReader(store, rows, 3, Framing(64)), self.cache, name), None

    def _batches(self, part: str) -> LabeledImages:
        paths = [self._found(f"{name}.npz", name) for name in BATCHES[part]]
        status = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        images = Path(self.cache or "").expanduser() / f"{part}-{digest(status)}.npy"
        labels = images.with_name(f"{images.stem}-labels.npy")
        write_once(images, lambda: _convert(paths, images, labels, BATCH_COUNTS[part]))
        values, classes = StoredValues(images), StoredValues(labels)[:]
        return values, classes if self.with_labels else None


def _convert(paths: list[Path], images: Path, labels: Path, count: int) -> None:
    """Batches as two arrays; that of the images, whose presence says that both are there, comes last."""
    classes: list[Tensor] = []

    def parts() -> Iterator[np.ndarray]:
        for path in paths:
            pixels, numbers = _read(path)
            classes.append(torch.from_numpy(numbers))
            yield pixels
        came = sum(len(part) for part in classes)
        if came != count:
            raise ValueError(
                f"{paths[0]} to {paths[-1].name} hold {came} images; {count} are expected: they are incomplete or "
                f"another data set; get them again from {HOME}"
            )
        with whole_file(labels) as partial, partial.open("wb") as file:
            np.save(file, torch.cat(classes).numpy())

    write_array(images, (count, 3, 64, 64), parts())


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(N, 3, 64, 64)``, ``uint8``, and labels from 0 ``(N,)``, ``int64``, of one batch."""
    found: Mapping[str, Any]
    if path.suffix == ".npz":
        found = read_numbers(path, ("data", "labels"), f"it is truncated or corrupt, get it again from {HOME}")
    else:
        found = read_arrays(path.read_bytes(), str(path), HOME)
    return checked_batch(found, str(path), (3, 64, 64), range(1, CLASSES + 1), HOME)
