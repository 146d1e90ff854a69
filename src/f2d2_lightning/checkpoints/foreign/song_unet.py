"""The network called SongUNet in NVlabs/edm and in what is derived from it, as our :class:`UNet`.

It is the DDPM++ of Song et al., 2021, https://arxiv.org/abs/2011.13456, in the form of Karras et al., 2022,
https://arxiv.org/abs/2206.00364. Its names say the resolution and the place (``enc.32x32_block0.conv0.weight``), its
shapes the sizes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from f2d2_lightning.checkpoints.foreign.weights import Weights
from f2d2_lightning.nn.unet import UNet

# our names of a block's parts, and theirs
_PARTS = {"norm_in": "norm0", "conv_in": "conv0", "affine": "affine", "norm_out": "norm1", "conv_out": "conv1",
          "skip": "skip", "norm_attention": "norm2", "qkv": "qkv", "mix": "proj"}  # fmt: skip

_FILTER = ".resample_filter"


@dataclass(frozen=True)
class SongLayout:
    """Sizes of the network, as names and shapes of its weights tell them."""

    shape: tuple[int, int, int]  # of one image, (C, H, W)
    width: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]  # heights at which blocks attend
    taps: tuple[int, ...]

    @classmethod
    def read(cls, weights: Weights) -> SongLayout:
        """The layout of weights; a ``ValueError`` if they are of no such network."""
        names = weights.names()
        inlets = [match for name in names if (match := re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", name))]
        if len(inlets) != 1:
            raise ValueError(
                f"{weights.source} is no SongUNet: it has {len(inlets)} first convolutions enc.NxN_conv; only the "
                "DDPM++ networks of this family are read"
            )
        size = int(inlets[0][1])
        width, channels = weights.shape(inlets[0][0])[:2]
        known, at = set(names), [f"enc.{_at(size, level)}_block" for level in range(size.bit_length() + 1)]
        first = list(itertools.takewhile(known.__contains__, (f"{place}0.conv0.weight" for place in at)))
        multipliers = [max(1, weights.shape(name)[0] // width) for name in first]
        attention = [size >> level for level in range(len(first)) if f"{at[level]}0.qkv.weight" in known]
        blocks = next(count for count in itertools.count() if f"{at[0]}{count}.conv0.weight" not in known)
        if not multipliers:
            raise ValueError(f"{weights.source} has no residual blocks, enc.{_at(size, 0)}_block0")
        lengths = {weights.shape(name)[-1] for name in names if name.endswith(_FILTER)}
        taps = (1, 3, 3, 1) if lengths == {4} else (1, 1)
        shape = (channels, size, size)
        return cls(shape, width, tuple(multipliers), blocks, tuple(attention), taps)

    def places(self) -> Iterator[tuple[str, str]]:
        """Names of all blocks: ours and theirs."""
        size, last = self.shape[1], len(self.multipliers) - 1
        down, up = 0, 0
        for level in range(last + 1):
            for name in (["down"] if level else []) + [f"block{i}" for i in range(self.blocks)]:
                yield f"down.{down}", f"enc.{_at(size, level)}_{name}"
                down += 1
        for index in range(2):
            yield f"middle.{index}", f"dec.{_at(size, last)}_in{index}"
        for level in reversed(range(last + 1)):
            for name in (["up"] if level < last else []) + [f"block{i}" for i in range(self.blocks + 1)]:
                yield f"up.{up}", f"dec.{_at(size, level)}_{name}"
                up += 1


def _at(size: int, level: int) -> str:
    return f"{size >> level}x{size >> level}"


def song_unet(
    weights: Weights,
    embedding: nn.Module,
    layout: SongLayout,
    *,
    directions: str,
    second_affine: bool = False,
    interleaved: bool = False,
    dropout: float = 0.0,
) -> UNet:
    """Our network with their weights; the embedding is filled by the caller, and so is :meth:`Weights.finish` called.

    ``second_affine`` says whether blocks have a second layer for a second embedding, ``affine_s``; ``interleaved``,
    whether queries, keys and values alternate from channel to channel, or come one after the other. Weights do not say
    ``dropout``.
    """
    sizes = (layout.shape, layout.width, layout.multipliers, layout.blocks, layout.attention)
    unet = UNet(*sizes, dropout=dropout, directions=directions, embedding=embedding, taps=layout.taps)
    size = _at(layout.shape[1], 0)
    places = dict(layout.places())
    ends = {"inlet": f"enc.{size}_conv", "norm": f"dec.{size}_aux_norm", "outlet": f"dec.{size}_aux_conv"}
    for name in unet.state_dict():
        if name.startswith("embedding."):
            continue
        owner, _, kind = name.rpartition(".")
        block, _, part = owner.rpartition(".")
        theirs = ends[owner] if owner in ends else f"{places[block]}.{_PARTS[part]}"

        def changed(value: Tensor, theirs: str = theirs, kind: str = kind, part: str = part) -> Tensor:
            if part == "qkv" and interleaved:
                return value.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
            second = weights.take(f"{theirs}_s.{kind}") if part == "affine" and second_affine else None
            if second is None or second.shape != value.shape:
                return value
            # a linear layer of both embeddings together, in place of one for each
            return torch.cat((value, second), 1) if kind == "weight" else value + second

        weights.fill(unet, name, f"{theirs}.{kind}", changed)
    line = torch.tensor(layout.taps, dtype=torch.float32)
    expected = (torch.outer(line, line) / line.sum() ** 2)[None, None]
    for name in [name for name in weights.names() if name.endswith(_FILTER)]:
        value = weights.take(name)
        if value is None or value.shape != expected.shape or not torch.allclose(value.float(), expected):
            weights.complain(f"{name} is another filter than {layout.taps}")
    # augmentation is told to the network in training alone; without it this layer, which has no bias, adds nothing
    weights.drop(lambda name: name.endswith("map_augment.weight"))
    return unet
