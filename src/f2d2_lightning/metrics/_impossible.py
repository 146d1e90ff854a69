"""Likelihoods that no model can have: something else is wrong, and the figures must say so."""

from __future__ import annotations

from torch import Tensor

from f2d2_lightning.metrics.likelihood import MOST_NEGATIVE

__all__ = ["said_of_bits", "said_of_values"]


def said_of_bits(bits: Tensor, name: str, levels: int | None, low: float, high: float) -> str | None:
    """What to say of bits per dimension of discrete data that are below 0; ``None`` if they are not.

    Args:
        bits: Of each sample, or means, any shape; those that are not finite are left out.
        name: What they are called.
        levels: Levels of the data; ``None`` for continuous data, whose densities have no bound.
        low: Lower edge of the range that the levels fill.
        high: Upper edge.
    """
    known = bits[bits.isfinite()]
    if levels is None or len(known) == 0:
        return None
    mean, below = float(known.mean()), int((known < 0).sum())
    if mean >= 0 and below <= MOST_NEGATIVE * len(known):
        return None
    return (
        f"{name} cannot be right: mean {mean:.4f}, {below} of {len(known)} below 0 bits/dim, and no code of discrete "
        f"data is shorter than that; check levels ({levels}), range ([{low:g}, {high:g}]) and dequantization, of the "
        "data and of the model's training"
    )


def said_of_values(values: Tensor, name: str, inverted: bool = False) -> str | None:
    """What to say of log-likelihoods that are NaN or infinite; ``None`` if none is.

    Args:
        values: Log-likelihoods, nats.
        name: What they are called.
        inverted: Leave out NaN: they are inversions that did not converge, which is said elsewhere.
    """
    wrong = values.isinf() if inverted else ~values.isfinite()
    if not bool(wrong.any()):
        return None
    return (
        f"{name} cannot be right: {int(wrong.sum())} of {values.numel()} are NaN or infinite; check that the data are "
        "in the range of training (levels, range, dequantization), and that the model has not diverged"
    )
