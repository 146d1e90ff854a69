"""States as 8-bit images, the form in which feature networks see real data and samples alike."""

from __future__ import annotations

import torch
from torch import Tensor

from f2d2_lightning.likelihood.quantization import Quantization

__all__ = ["state_images"]


def state_images(x: Tensor, levels: int | None = None, low: float = -1.0, high: float = 1.0) -> Tensor:
    """States as 8-bit images: ``low`` becomes 0 and ``high`` 255, what lies outside is clipped.

    With ``levels`` states are brought to the level whose bin they lie in first, as the data were before they were
    dequantized, and the levels 0 to ``levels - 1`` are spread over 0 to 255: dequantized data become the images that
    they were made from, and samples get the same levels as the data.

    Args:
        x: States, floating ``(B, C, H, W)``.
        levels: Levels of discrete data, ``None`` for continuous data.
        low: Lower edge of the range.
        high: Upper edge.

    Returns:
        ``uint8``, ``(B, C, H, W)``.

    Raises:
        ValueError: If the states are no images, are not finite, or the range is empty.

    >>> state_images(torch.tensor([[[[-1.0, 0.0, 0.999, 3.0]]]]), levels=2)
    tensor([[[[  0, 255, 255, 255]]]], dtype=torch.uint8)
    """
    if not torch.is_floating_point(x) or x.ndim != 4:
        raise ValueError(
            f"states have dtype {x.dtype} and shape {tuple(x.shape)}; images are floating (B, C, H, W). Sample quality "
            "is of images; for other data compare likelihoods"
        )
    if not high > low:
        raise ValueError(f"the range is [{low}, {high}]; low < high is needed")
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        raise ValueError(f"{bad} of {len(x)} states hold NaN or infinity and are no images")
    if levels is None:
        share = (x.double() - low) / (high - low)
    else:
        share = Quantization(levels, low, high).quantize(x).double() / (levels - 1)
    return (255 * share).round().clamp(0, 255).to(torch.uint8)
