r"""Snapshots of the official PyTorch code of F2D2 (Keely-Ai/F2D2), in this package's convention.

Ai et al., "Joint Distillation for Fast Likelihood Evaluation and Sampling in Flow-based Models", 2025,
https://arxiv.org/abs/2512.02636. Facts: their time runs up, as ours; the network sees the state divided by
:math:`\sqrt{s^2 + 1/4}`, the time as :math:`\frac14 \log s` and the length of the interval as
:math:`\frac14 \log(t - s)`; what stands for the diagonal is the length 1/1024; the head reads the last block's output
at one fixed resolution, and its answer is the divergence divided by 20000. All are trained to data only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from f2d2_lightning.adapters.features import FeatureTap
from f2d2_lightning.checkpoints.foreign.embeddings import LogTimeEmbedding
from f2d2_lightning.checkpoints.foreign.files import read_checkpoint
from f2d2_lightning.checkpoints.foreign.song_unet import SongLayout, song_unet
from f2d2_lightning.checkpoints.foreign.weights import Weights, record_weights
from f2d2_lightning.flows.maps import FlowMap
from f2d2_lightning.flows.paths import expand_time, like
from f2d2_lightning.nn.head import Head, JointFlowMap
from f2d2_lightning.nn.unet import UNet
from f2d2_lightning.utils.pickles import Record

_PLACE = "training.experimental.networks."
_TEACHER, _STUDENT = "FM_Net", "ShortCut_Net"
_ENCODERS = {_TEACHER: "SongUNet", _STUDENT: "SongUNet_ctm_scalar"}
_HEAD, _HEAD_SCALE = "scalar_head.", 20000.0


class OfficialFlowMap(FlowMap):
    r"""A network that sees the state divided by :math:`\sqrt{s^2 + \delta^2}`.

    Features are the output of its last block, before the last normalisation, which the official head reads.

    Args:
        network: The network.
        data_deviation: :math:`\delta`, their standard deviation of the data.
    """

    def __init__(self, network: UNet, data_deviation: float = 0.5) -> None:
        super().__init__()
        self.network = network
        self.data_deviation = data_deviation
        self.directions, self.shape, self.features = network.directions, network.shape, network.features
        self._tap = FeatureTap(network, f"up.{len(network.up) - 1}")

    @property
    def conditional(self) -> bool | None:
        return self.network.conditional

    def forward(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Tensor | None = None) -> Tensor:
        s = expand_time(s, x)
        return self.network(x / like((s.square() + self.data_deviation**2).sqrt(), x), s, t, cond)

    def forward_features(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._tap.call(lambda: self(x, s, t, cond), len(x))


class FlattenedHead(Head):
    """The official head: every feature of every pixel into one multilayer perceptron, at one resolution.

    Args:
        shape: Shape of the features, ``(F, H, W)``.
        widths: Hidden layers.
        scale: Factor of the answer, nats per unit of time.
    """

    def __init__(self, shape: Sequence[int], widths: Sequence[int] = (128, 64), scale: float = _HEAD_SCALE) -> None:
        super().__init__()
        self.shape = tuple(shape)
        sizes = [torch.Size(self.shape).numel(), *widths, 1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.scale.fill_(scale)

    def residual(self, x: Tensor, s: Tensor, t: Tensor, cond: Tensor | None, features: Tensor | None) -> Tensor:
        if features is None or tuple(features.shape[1:]) != self.shape:
            came = "none" if features is None else f"shape {tuple(features.shape)}"
            raise ValueError(f"the head reads features of shape (B, {', '.join(map(str, self.shape))}), and got {came}")
        h = features.flatten(1)
        for layer in self.layers[:-1]:
            h = nn.functional.silu(layer(h))
        return self.layers[-1](h).squeeze(-1)


def load_official(path: str | Path, dropout: float = 0.0) -> OfficialFlowMap:
    """The averaged network of an official snapshot ``network-snapshot-*.pkl``; no code of the file is run.

    A teacher (``FM_Net``) comes as an instantaneous velocity, to be integrated or distilled; a shortcut or joint
    student (``ShortCut_Net``) as a map to data, without its head: see :func:`load_official_joint`.

    Args:
        path: Snapshot.
        dropout: Probability of dropping a hidden unit, for training on; weights do not say it.

    Returns:
        The map in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is none, asks for code to be run, or is of another network.
    """
    flow_map, weights, _ = _load(path, dropout)
    weights.drop(lambda name: name.startswith(_HEAD))
    weights.finish()
    return flow_map


def load_official_joint(path: str | Path, dropout: float = 0.0) -> JointFlowMap:
    """A jointly distilled snapshot with its head, for samples and log-likelihoods.

    It was trained to data only, and at one resolution: likelihoods of data come by inversion, or by training on in both
    directions. All else is as :func:`load_official` says.

    Raises:
        ValueError: Also if the head is missing or was never trained.
    """
    flow_map, weights, loss = _load(path, dropout)
    if loss is not None and loss != "LikelihoodLoss":
        raise ValueError(
            f"{path} was trained with {loss}, which does not train the head for the divergence; load the map alone "
            "(load_official), and train a head for it (F2D2Module(frozen=True))"
        )
    if not any(name.startswith(_HEAD) for name in weights.names()):
        raise ValueError(f"{path} has no head for the divergence; load_official gives the map alone")
    head = FlattenedHead((flow_map.features, *flow_map.shape[1:]))
    weights.fill_layers(head, {f"layers.{index}": f"{_HEAD}{2 * index + 1}" for index in range(len(head.layers))})
    weights.finish()
    # its dtype is that of the features it reads
    head.scale = head.scale.to(next(head.layers.parameters()).dtype)
    return JointFlowMap(flow_map, head).eval()


def _load(path: str | Path, dropout: float) -> tuple[OfficialFlowMap, Weights, str | None]:
    content = read_checkpoint(path, [_PLACE + _TEACHER, _PLACE + _STUDENT])
    network = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(network, Record):
        raise ValueError(f"{path} is no snapshot of the official code: it holds no network 'ema'")
    modules = network.state.get("_modules")
    encoder = modules.get("encoder") if isinstance(modules, dict) else None
    kind, inner = network.kind.rpartition(".")[2], encoder.kind if isinstance(encoder, Record) else None
    if kind not in _ENCODERS or inner != _ENCODERS[kind]:
        came = f"{kind} of a {inner}" if inner else kind
        known = ", ".join(f"{k} of a {v}" for k, v in _ENCODERS.items())
        raise ValueError(f"{path} holds a {came}; read are {known}")
    labels, deviation = network.state.get("label_dim"), network.state.get("sigma_data")
    if type(labels) is not int or labels != 0 or not isinstance(deviation, (int, float)):
        raise ValueError(
            f"{path} is of {labels} classes and sigma_data {deviation}; only networks without classes are read"
        )
    loss = content.get("loss_fn")
    trained = loss.kind.rpartition(".")[2] if isinstance(loss, Record) else None
    weights = Weights(record_weights(encoder), str(path))
    return _flow_map(weights, kind == _STUDENT, float(deviation), dropout), weights, trained


def _flow_map(weights: Weights, student: bool, deviation: float, dropout: float) -> OfficialFlowMap:
    layout = SongLayout.read(weights)
    width, channels = weights.shape("map_layer0.weight")
    embedding = LogTimeEmbedding(channels, width, interval=student)
    names = {"time.start": "map_layer0", "time.project": "map_layer1"}
    if student:
        names |= {"interval.start": "map_layer0_s", "interval.project": "map_layer1_s"}
    weights.fill_layers(embedding, names)
    unet = song_unet(
        *(weights, embedding, layout),
        directions="to_data" if student else "none",
        second_affine=student,
        interleaved=True,
        dropout=dropout,
    )
    return OfficialFlowMap(unet, deviation).eval()
