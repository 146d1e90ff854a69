"""Random numbers that are a function of where they are used, not of how many were drawn before.

Dequantization noise drawn this way is the same for a given seed, epoch and sample, whatever the batch size, the number
of workers or processes, and however often a run was interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def own_random_state(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Random states of the CPU and of a device are afterwards what they were; within they begin at ``seed``, if any."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed integer that torch holds it in."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN, _MIX1, _MIX2 = (_signed(v) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask clears the copies of the sign
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def hashed(counters: Tensor, seed: int) -> Tensor:
    """64 random bits for each of the counters, ``int64``, any shape: SplitMix64 at that position of stream ``seed``.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014,
    https://doi.org/10.1145/2660193.2660195
    """
    z = counters * _GOLDEN + _signed(mix_seed(seed))
    z = (z ^ _shift_right(z, 30)) * _MIX1
    z = (z ^ _shift_right(z, 27)) * _MIX2
    return z ^ _shift_right(z, 31)


def counter_uniform(counters: Tensor, seed: int) -> Tensor:
    """Uniform numbers in [0, 1), one for each counter, float32 with 24 random bits; arguments as :func:`hashed`."""
    return _shift_right(hashed(counters, seed), 40).to(torch.float32) * 2.0**-24


def counter_normal(counters: Tensor, seed: int) -> Tensor:
    """Standard normal numbers, one for each counter, float32; arguments as :func:`hashed`."""
    uniform = counter_uniform(counters, seed) + 2.0**-25  # in (0, 1)
    return math.sqrt(2) * torch.erfinv(2 * uniform - 1)


def row_keys(x: Tensor, seed: int = 0) -> Tensor:
    """A number for each sample that is a function of its own values, ``(B, ...) -> (B,)``, ``int64``.

    It hashes where the sample lies along three fixed random directions, on a grid: what another machine rounds
    otherwise (a relative 1e-7) changes it once in ten thousand samples, other samples of a batch never.
    """
    flat = x.detach().double().reshape(len(x), -1)
    dim = flat.shape[1]
    scale = flat.square().sum(1).sqrt().clamp(min=1e-30)
    keys = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for axis in range(3):
        direction = counter_normal(torch.arange(dim, device=x.device), mix_seed("direction", axis)).double()
        # not a matrix product, whose rounding depends on the size of the batch
        along = (flat * direction).sum(1) / scale
        keys = hashed(keys + (along * 2**8).round().long(), mix_seed(seed, axis))
    return keys


def mix_seed(*parts: int | str) -> int:
    """One seed below 2^63 from several numbers, the same on every machine.

    >>> mix_seed(0, 1) != mix_seed(1, 0)
    True
    """
    # a number of NumPy's or torch's is written otherwise than Python's
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
