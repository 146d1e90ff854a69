r"""Attention that also has a derivative in forward mode.

.. math:: \operatorname{softmax}(q k^\top / \sqrt{c})\, v

Torch's fused kernels never hold the matrix of weights, but have no rule for forward mode, which the divergence is
taken with. Where a tangent comes in the formula is written out, at the cost of that matrix; elsewhere the kernels
answer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from f2d2_lightning.flows._transforms import is_transformed

__all__ = ["attention", "has_tangent"]


def has_tangent(*tensors: Tensor) -> bool:
    """Whether any of the tensors is being differentiated in forward mode, or is inside a transform of ``torch.func``.

    Code that forward mode cannot pass (fused kernels, activation checkpointing) asks before it is used.
    """
    if torch.compiler.is_compiling():
        return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    return any(is_transformed(x) or forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention, differentiable in reverse and in forward mode.

    Args:
        q: Queries, ``(B, heads, N, c)``.
        k: Keys, ``(B, heads, M, c)``.
        v: Values, ``(B, heads, M, c)``.

    Returns:
        ``(B, heads, N, c)``. Weights are computed in float32 or better, also where the tensors are of half precision.
    """
    if not has_tangent(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # written out: the tangent of torch's softmax cannot be differentiated again in reverse mode
    powers = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    weights = powers / powers.sum(-1, keepdim=True)
    return weights.to(v.dtype) @ v
