"""Checkpoints of Gsunshine/py-meanflow, in this package's convention.

Geng et al., "Mean Flows for One-step Generative Modeling", 2025, https://arxiv.org/abs/2505.13447. Facts: their time
runs down (1 is noise), the network takes it and the interval ``t - r``, and answers the average velocity with respect
to it; so ours is its negative, which is taken into the weights of the last layer.
"""

from __future__ import annotations

from pathlib import Path

import torch

from f2d2_lightning.checkpoints.foreign.embeddings import MeanFlowEmbedding
from f2d2_lightning.checkpoints.foreign.files import read_checkpoint
from f2d2_lightning.checkpoints.foreign.song_unet import SongLayout, song_unet
from f2d2_lightning.checkpoints.foreign.weights import Weights
from f2d2_lightning.nn.unet import UNet


def load_py_meanflow(path: str | Path, ema: str = "net_ema", dropout: float = 0.0) -> UNet:
    """The network of a checkpoint ``checkpoint-*.pth`` as a map to data; no code of the file is run.

    Args:
        path: Checkpoint, as ``torch.save`` wrote it.
        ema: Which of its copies: an average (``"net_ema"``, ``"net_ema1"``, ...), or ``"net"``, the weights in
            training.
        dropout: Probability of dropping a hidden unit, for training on.

    Returns:
        The map in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is none, asks for code to be run, has no such copy, or is of another network.
    """
    content = read_checkpoint(path, ["argparse.Namespace"])
    model = content.get("model") if isinstance(content, dict) else None
    named = {str(name): value for name, value in model.items()} if isinstance(model, dict) else {}
    mine = {name: value for name, value in named.items() if name.startswith(f"{ema}.")}
    stored = {name[len(ema) + 1 :]: value for name, value in mine.items() if isinstance(value, torch.Tensor)}
    if not stored:
        names = sorted({name.partition(".")[0] for name in named if "." in name})
        there = f"it has {', '.join(map(repr, names[:12]))}" if names else "it is no checkpoint of py-meanflow"
        raise ValueError(f"{path} has no network {ema!r}; {there}")
    weights = Weights(stored, f"{path} ({ema})")
    layout = SongLayout.read(weights)
    width, channels = weights.shape("map_layer0.weight")
    if channels % 2:
        raise ValueError(f"{weights.source} embeds {channels} numbers, which are not two times")
    embedding = MeanFlowEmbedding(channels // 2, width)
    weights.fill_layers(embedding, {"layers.start": "map_layer0", "layers.project": "map_layer1"})
    unet = song_unet(weights, embedding, layout, directions="to_data", dropout=dropout)
    weights.finish()
    with torch.no_grad():
        for parameter in unet.outlet.parameters():
            parameter.neg_()
    return unet.eval()
