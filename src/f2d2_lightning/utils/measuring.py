"""What is measured before something is chosen: spreads and seconds."""

from __future__ import annotations

import time

import torch
from torch import Tensor


def spread_of(values: Tensor) -> float:
    """Interquartile range / 1.35: the standard deviation of a normal distribution, and deaf to outliers."""
    first, third = torch.quantile(values.double(), torch.tensor([0.25, 0.75]).to(values.device, torch.float64))
    return float(third - first) / 1.35


def clock(device: torch.device) -> float:
    """Seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
