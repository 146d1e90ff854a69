"""Any folder of images, cropped and resized as asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from f2d2_lightning.data.images._cache import cached
from f2d2_lightning.data.images._reader import Filter, Framing, ImageReader
from f2d2_lightning.data.images._stores import image_rows, open_store
from f2d2_lightning.data.images.base import ImageDataModule, LabeledImages, divide
from f2d2_lightning.utils.checks import checked


class ImageFolder(ImageDataModule):
    """A folder of image files (a zip file of one will do), searched recursively, dequantized to [-1, 1].

    Crop and resize come first, dequantization last. EXIF orientation is not applied. Images are in the order of their
    names, from which those of each split are drawn, once and for all, unless folders for the splits are named.

    Args:
        folder: The images.
        size: Height and width that they have, or get by ``crop`` and ``resize``.
        channels: 3 for RGB, 1 for grey.
        crop: Side of a square about the centre that is cut out first; ``"square"`` for the largest there is, ``None``
            for no crop.
        resize: Filter that brings other sizes to ``size``, with antialiasing (``bicubic``, ``bilinear``, ``lanczos``
            or ``box``); ``None`` refuses them.
        convert: Convert grey images to RGB, or colour to luma; else they are refused.
        labels: Give batches ``(states, labels)``: the topmost folders, one for each class, counted from 0 in the order
            of their names as text (``"10"`` comes before ``"2"``), which ``classes`` gives. A model keeps the names:
            where it is resumed or tested on another folder, labels follow it (:meth:`relabel`).
        val_folder: Folder of validation images; ``None`` to take ``val`` images of ``folder``.
        test_folder: Folder of test images; ``None`` to take ``test`` images of ``folder``.
        val: Validation images; ``None`` for all of ``val_folder``, or 1000. Likewise for ``test``.
        cache: Folder for the decoded images as a memory-mapped array, made once; ``None`` decodes them anew.
        **kwargs: As :class:`ImageDataModule`; ``num_workers`` had better be several, without a cache.

    Raises:
        FileNotFoundError: When the data are first asked for, if there is no such folder.
        ValueError: If there are no images or files of other types; of an image that is corrupt or of another size or
            mode, when it is read.
    """

    @checked
    def __init__(
        self,
        folder: str,
        size: int,
        channels: int = 3,
        crop: int | Literal["square"] | None = None,
        resize: Filter | None = None,
        convert: bool = False,
        labels: bool = False,
        val_folder: str | None = None,
        test_folder: str | None = None,
        val: int | None = None,
        cache: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(labels, val=val, **kwargs)
        self.folder, self.val_folder, self.test_folder = Path(folder).expanduser(), val_folder, test_folder
        self.framing, self.channels, self.convert, self.cache = Framing(size, crop, resize), channels, convert, cache
        self.shape = (channels, size, size)

    def state_dict(self) -> dict[str, Any]:
        """How files become images, for a checkpoint: ``f2d2 nll`` does the same to others."""
        return {"crop": self.framing.crop, "resize": self.framing.resize, "convert": self.convert}

    def splits(self) -> dict[str, LabeledImages]:
        train, classes = self._examples(self.folder, None)
        self.classes = classes or None
        held_out = [
            None if folder is None else self._examples(Path(folder).expanduser(), classes)[0]
            for folder in (self.val_folder, self.test_folder)
        ]
        wanted = zip((self.val, self.test), held_out, strict=True)
        val, test = (1000 if number is None and part is None else number for number, part in wanted)
        return divide(train, *held_out, count=self.count, val=val, test=test, draw=True)

    def _examples(self, path: Path, classes: list[str] | None) -> tuple[LabeledImages, list[str]]:
        """Images and labels of a folder, and the names of the classes, those of the training folder if given."""
        store = open_store(path)
        rows = image_rows(store)
        labels: Tensor | None = None
        if self.with_labels:
            folders = [name.partition("/")[0] if "/" in name else "" for name in (store.names[row] for row in rows)]
            classes = classes or sorted({*folders} - {""})
            if wrong := [row for row, folder in zip(rows, folders, strict=True) if folder not in classes]:
                known = f" ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})" if classes else ""
                raise ValueError(
                    f"{store.where(wrong[0])} is in no folder of a class{known}; put each image into the folder of its "
                    "class, or set labels=False"
                )
            number = {name: place for place, name in enumerate(classes)}
            labels = torch.tensor([number[folder] for folder in folders])
        values = cached(ImageReader(store, rows, self.channels, self.framing, self.convert), self.cache, path.stem)
        return (values, labels), classes or []
