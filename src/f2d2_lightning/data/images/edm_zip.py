"""Zip files of images as NVIDIA's generators keep their data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from f2d2_lightning.data.images._cache import cached
from f2d2_lightning.data.images._reader import Framing, ImageReader
from f2d2_lightning.data.images._stores import Store, image_rows, open_store
from f2d2_lightning.data.images.base import ImageDataModule, LabeledImages, divide
from f2d2_lightning.utils.checks import checked

TOOL = "https://github.com/NVlabs/edm (dataset_tool.py)"
AGAIN = f"make it again with {TOOL}"
LIST = "dataset.json"


class EDMZip(ImageDataModule):
    """Data sets of EDM and StyleGAN: PNG files in a zip file and their labels in ``dataset.json``.

    Karras, Aittala, Aila and Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364; made by its ``dataset_tool.py``, https://github.com/NVlabs/edm. Such a file has no
    test part; ``test_path`` names another one, or ``test`` images are taken from it. Images are in the order of their
    names, from which those of each split are drawn, once and for all.

    Args:
        path: The zip file, or a folder of the same content.
        resolution: Height and width of the images, which are square and read as they are.
        channels: 3 for RGB, 1 for grey.
        labels: Give batches ``(states, labels)``, from ``dataset.json``.
        test_path: Zip file or folder of test images; ``None`` to take ``test`` images of ``path``, as many as ``val``
            if that is not given.
        cache: Folder for the decoded images as a memory-mapped array, made once; ``None`` decodes them anew.
        **kwargs: As :class:`ImageDataModule`; ``num_workers`` had better be several, without a cache.

    Raises:
        FileNotFoundError: When the data are first asked for, if there is no such file.
        ValueError: If a file is corrupt, truncated or does not fit; of an image, when it is read.
    """

    @checked
    def __init__(
        self,
        path: str,
        resolution: int,
        channels: int = 3,
        labels: bool = False,
        test_path: str | None = None,
        cache: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(labels, **kwargs)
        self.path = Path(path).expanduser()
        self.test_path = None if test_path is None else Path(test_path).expanduser()
        self.framing, self.channels, self.cache = Framing(resolution), channels, cache
        self.shape = (channels, resolution, resolution)
        if self.test is None and test_path is None:
            self.test = self.val

    def splits(self) -> dict[str, LabeledImages]:
        train = self._examples(self.path)
        held_out = None if self.test_path is None else self._examples(self.test_path)
        return divide(train, None, held_out, count=self.count, val=self.val, test=self.test, draw=True)

    def _examples(self, path: Path) -> LabeledImages:
        if not path.exists():
            raise FileNotFoundError(
                f"there is no {path}; make the zip file with {TOOL} and say where it is (EDMZip(path=...), "
                "--data.init_args.path)"
            )
        store = open_store(path)
        rows = image_rows(store, others=(LIST,))
        labels = _labels(store, [store.names[row] for row in rows]) if self.with_labels else None
        return cached(ImageReader(store, rows, self.channels, self.framing), self.cache, path.stem), labels


def _labels(store: Store, names: list[str]) -> Tensor:
    """Labels of images, ``(N,)``, ``int64``."""
    path = f"{store.path}/{LIST}"
    if LIST not in store.names:
        raise ValueError(f"{store.path} has no {LIST}, so no labels; set labels=False, or {AGAIN}")
    try:
        found = json.loads(store.content(store.names.index(LIST)))["labels"]
        of = None if found is None else {str(name).replace("\\", "/"): label for name, label in found}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        came = f"{type(error).__name__}: {error}"
        raise ValueError(f'{path} is not {{"labels": [[name, number], ...]}} ({came}); {AGAIN}') from error
    if of is None:
        raise ValueError(f"{path} says that there are no labels; set labels=False")
    if missing := [name for name in names if name not in of]:
        lacks = f"{len(missing)} of {len(names)} images ({missing[0]}, ...)"
        raise ValueError(f"{path} has no label for {lacks}; {AGAIN}")
    labels = [of[name] for name in names]
    if wrong := [label for label in labels if type(label) is not int or not 0 <= label < 2**31]:
        raise ValueError(f"{path} has the label {wrong[0]!r}; whole numbers from 0 are expected")
    return torch.tensor(labels)
