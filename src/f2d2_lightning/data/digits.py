"""scikit-learn's digits."""

from __future__ import annotations

import torch
from torch import Tensor

from f2d2_lightning.data.module import FlowDataModule
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.utils.checks import checked


class Digits(FlowDataModule):
    """scikit-learn's digits: 1,797 scans of 8 x 8 pixels with 17 grey levels, dequantized to [-1, 1].

    The data come with scikit-learn (Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998,
    https://doi.org/10.24432/C50P49). The split is fixed: 1,297 to train, 200 to validate, 300 to test.

    Args:
        labels: Give batches ``(states, labels)`` with the digit, for class-conditional models.
        levels: Number of grey levels; the data have 17.
        batch_size: Samples per training batch.
        eval_batch_size: Samples per validation and test batch.
        num_workers: Processes that load; the data are in memory, so 0 is best.
        seed: Of order and noise; the split does not depend on it.
    """

    shape = (1, 8, 8)

    @checked
    def __init__(
        self,
        labels: bool = False,
        levels: int = 17,
        batch_size: int = 256,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, Quantization(levels))
        self.with_labels = labels

    def splits(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        from sklearn.datasets import load_digits

        images, digits = load_digits(return_X_y=True)
        values = torch.from_numpy(images).to(torch.uint8).reshape(-1, 1, 8, 8)
        classes = torch.from_numpy(digits).long()
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
        parts = dict(zip(("train", "val", "test"), order.split([1297, 200, 300]), strict=True))
        return {name: (values[rows], classes[rows] if self.with_labels else None) for name, rows in parts.items()}
