"""Fingerprints of tensors and networks: what was computed from equal ones can be kept and found again."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["network_hash", "update_with"]


def update_with(digest: Any, value: Tensor) -> None:
    """Feed a tensor's type, shape and content to a digest of ``hashlib``."""
    content = value.detach().cpu().contiguous()
    digest.update(f"{content.dtype} {tuple(content.shape)}".encode())
    digest.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())


def network_hash(network: nn.Module) -> str:
    """Fingerprint of a network's structure (as it prints) and of its weights and buffers, hexadecimal.

    Networks that differ in neither can still differ in code; who keeps figures by this hash compares some features.
    """
    digest = hashlib.blake2b(repr(network).encode(), digest_size=16)
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} ".encode())
            update_with(digest, value)
    return digest.hexdigest()
