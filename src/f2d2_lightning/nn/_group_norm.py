"""Group normalisation that keeps its derivative in forward mode under autocast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["GroupNorm"]


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm``, computed in float32 or better and answered in the type that came.

    On the CPU torch gives a half-precision value with a float32 tangent, which the next convolution refuses.
    """

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        return super().forward(input.to(wide)).to(input.dtype)
