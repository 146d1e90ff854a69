"""Fingerprints of tensors, networks and settings: what was computed from equal ones can be kept and found again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(*values: Any) -> str:
    """Fingerprint of values by what they hold, hexadecimal: equal values give equal ones in any process.

    Of a tensor type, shape and content count, of a network its structure (as it prints), weights and buffers, of other
    objects class and attributes. Networks that differ in none of that can still differ in code; who keeps figures by a
    fingerprint compares some of the network's answers.
    """
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, values)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous()
        digest.update(f"{content.dtype} {tuple(content.shape)}".encode())
        digest.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, nn.Module):
        state = {name: part for name, part in value.state_dict().items() if isinstance(part, Tensor)}
        _feed(digest, (repr(value), state))
    elif isinstance(value, Mapping):
        _feed(digest, [(str(name), value[name]) for name in sorted(value)])
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)} values;".encode())
        for one in value:
            _feed(digest, one)
    elif isinstance(value, type):
        digest.update(f"{value.__module__}.{value.__qualname__};".encode())
    elif value is None or isinstance(value, (str, bytes, int, float, bool)):
        digest.update(f"{value!r};".encode())
    else:
        # an estimator inside an estimator
        _feed(digest, (type(value), vars(value)))
