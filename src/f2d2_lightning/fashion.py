"""Fashion-MNIST, which is in :mod:`f2d2_lightning.image_data`; this name of the module stays."""

from __future__ import annotations

from f2d2_lightning.image_data.fashion import FashionMNIST

__all__ = ["FashionMNIST"]
