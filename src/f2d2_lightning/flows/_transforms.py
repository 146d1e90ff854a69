"""The one question to torch for which it has no public answer."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_transformed"]


def is_transformed(x: Tensor) -> bool:
    """Whether a tensor is inside of a transform of ``torch.func``: it then has no values, and may have a tangent."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)
