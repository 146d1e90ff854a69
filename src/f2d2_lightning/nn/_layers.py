"""What the blocks of networks are made of, so that it also has a derivative in forward mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from f2d2_lightning.flows.maps import is_transformed


def has_tangent(*tensors: Tensor) -> bool:
    """Whether any of the tensors is being differentiated in forward mode, or is inside a transform of ``torch.func``.

    Code that forward mode cannot pass (fused kernels, activation checkpointing) asks before it is used.
    """
    if torch.compiler.is_compiling():
        return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    return any(is_transformed(x) or forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    r"""Scaled dot-product attention, :math:`\operatorname{softmax}(q k^\top / \sqrt{c})\, v`, ``(B, heads, N, c)``.

    Torch's fused kernels never hold the matrix of weights, but have no rule for forward mode, which the divergence is
    taken with. Where a tangent comes in the formula is written out, at the cost of that matrix; elsewhere the kernels
    answer. Weights are computed in float32 or better, also where the tensors are of half precision.
    """
    if not has_tangent(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # written out: the tangent of torch's softmax cannot be differentiated again in reverse mode
    powers = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    weights = powers / powers.sum(-1, keepdim=True)
    return weights.to(v.dtype) @ v


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm``, computed in float32 or better and answered in the type that came.

    On the CPU torch gives a half-precision value with a float32 tangent, which the next convolution refuses.
    """

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        return super().forward(input.to(wide)).to(input.dtype)


def run_block(block: nn.Module, h: Tensor, time: Tensor, recompute: bool) -> Tensor:
    """``block(h, time)``; with ``recompute`` its inner activations are computed again in the backward pass.

    Forward-mode derivatives do not pass through a checkpoint, and without gradients there is nothing to save.
    """
    if recompute and torch.is_grad_enabled() and not has_tangent(h, time):
        return checkpoint(block, h, time, use_reentrant=False)
    return block(h, time)
