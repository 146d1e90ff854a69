"""Adapters against the code that they are for: real network classes, small and with random weights.

    pip install torchcfm flow_matching diffusers timm rectified-flow-pytorch scipy
    python benchmarks/foreign_networks.py --repositories FOLDER

Repositories that are on no package index are read from ``--repositories``, where ``OWNER/NAME`` is a clone that you
made; rows without their code say "not checked". Per network:

- *map*: ``u(x, s, t)`` of the adapter line, against the network called here as its authors call it, times and signs
  converted by hand (largest difference over largest value).
- *divergence*: ours, exact and Hutchinson's, against reverse-mode autograd through that same call.
- *log p*: ``reference_log_prob`` against ``scipy.integrate.solve_ivp`` (DOP853) on state and exact trace, in nats.
- *student*: 200 steps of flow matching on digits of 4 x 4 pixels, and 200 of :class:`F2D2Module` from there; mean
  difference in nats and correlation of four-step likelihoods with the reference. That it runs is what counts.

Networks compute in double precision, those that name single precision in their code as well: there the name ``torch``
is one that says ``float64`` instead. Layers that start at zero get noise, else every divergence would be zero.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.machinery
import importlib.metadata
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning
import numpy as np
import torch
from scipy.integrate import solve_ivp
from sklearn.datasets import load_digits
from torch import Tensor, nn

import f2d2_lightning as f2
from f2d2_lightning import adapters
from f2d2_lightning.flows.paths import like as column
from measuring import markdown, quiet_trainer

LOGS = ("wandb", "ftfy", "imageio", "imageio.v3")
ABSENT = (
    *("flash_attn", "flash_attn.flash_attention", "flash_attn.flash_attn_interface", "flash_attn.bert_padding"),
    *("flash_attn_2_cuda", "flash_attn_3", "flash_attn_3._C", "pytest", "triton", "triton.language"),
    *("xformers", "xformers.components", "xformers.components.attention", "blobfile"),
)
"""Modules that repositories import for logs, GPUs and clusters, and that the networks run without."""


# --- importing and running other people's code ---


@contextlib.contextmanager
def repository(folder: Path | None, without: tuple[str, ...] = ()) -> Iterator[None]:
    """Import from a clone for a while; its modules, whose names others have too, are forgotten afterwards."""
    if folder is None:
        yield
        return
    absent = {name: mock.MagicMock() for name in without if not _there(name)}
    for name, module in absent.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    if "flash_attn.flash_attention" in absent:
        absent["flash_attn.flash_attention"].FlashAttention = PlainAttention
    before = set(sys.modules)
    sys.modules.update(absent)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            places = [getattr(sys.modules[name], "__file__", None) or "", *_folders(sys.modules[name])]
            if name in absent or any(Path(str(place)).is_relative_to(folder) for place in places):
                del sys.modules[name]


def _there(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _folders(module: Any) -> list[str]:
    """Of a package, also one without ``__init__.py``."""
    try:
        return list(module.__path__)
    except (AttributeError, TypeError):
        return []


class PlainAttention(nn.Module):
    """In place of flash-attn's layer, which needs a GPU: the same attention written out."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, qkv: Tensor, **_: Any) -> tuple[Tensor, None]:
        q, k, v = qkv.movedim(2, 0).transpose(2, 3)
        weight = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weight @ v).transpose(1, 2), None


class Doubled(types.ModuleType):
    """The module ``torch``, whose single precision is double."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, {"float32": "float64", "float": "float64"}.get(name, name))


@contextlib.contextmanager
def doubled(network: nn.Module) -> Iterator[nn.Module]:
    """The network in double precision for a while, also where its code says otherwise."""
    changed = []
    for module in network.modules():
        name = type(module).__module__
        namespace = vars(sys.modules[name])
        for alias in ("torch", "th"):
            ours = name == __name__ or name.startswith(("torch.", "timm", "diffusers"))
            if namespace.get(alias) is torch and not ours:
                namespace[alias] = Doubled("torch")
                changed.append((namespace, alias))
        if isinstance(vars(module).get("dtype"), torch.dtype):
            module.dtype = torch.float64  # type: ignore[assignment]
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield network.double()
    finally:
        for namespace, alias in changed:
            namespace[alias] = torch


@torch.no_grad()
def wake(network: nn.Module) -> nn.Module:
    """Noise in parameters that are all nearly zero; a gain gets one half."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.numel() and float(parameter.abs().max()) < 1e-3:
            if parameter.ndim:
                parameter.normal_(std=0.03, generator=generator)
            else:
                parameter.fill_(0.5)
    return network


# --- the networks ---

SIZE = 4
IMAGE = (1, SIZE, SIZE)
SONG = {"img_resolution": SIZE, "model_channels": 16, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": []}
TRANSFORMER = {"input_size": SIZE, "patch_size": 2, "in_channels": 1, "num_heads": 2}
OPENAI = {
    "in_channels": 1, "model_channels": 32, "out_channels": 1, "num_res_blocks": 1, "attention_resolutions": (),
    "channel_mult": (1,), "num_classes": 10, "use_scale_shift_norm": True, "resblock_updown": True,
}  # fmt: skip
DIFFUSERS = {
    "sample_size": SIZE, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (16, 16),
    "norm_num_groups": 2,
}  # fmt: skip


def made(place: str, **arguments: Any) -> Callable[[], nn.Module]:
    """Makes a network of a class ``MODULE:NAME``, imported when it is made."""
    module, _, name = place.partition(":")
    return lambda: getattr(importlib.import_module(module), name)(**arguments)


@dataclass
class Case:
    """A network, the adapter line that a user writes for it, and how its authors call it.

    ``jump(net, x, s, t, y)`` is the average velocity in our convention: times run from noise at 0 to data at 1, all
    ``(B,)``. ``s == t`` asks for the instantaneous one. It is written without our adapters.
    """

    name: str
    source: str
    line: str
    build: Callable[[], nn.Module]
    jump: Callable[..., Tensor]
    train: str = "directions='both'"
    """Arguments of the adapter line for a student, beside the network."""
    classes: bool = False
    label: Callable[[Tensor], Tensor] | None = None
    """Conditioning from labels 0 to 9."""
    shape: tuple[int, ...] = IMAGE
    mode: str = "forward"
    """Of differentiation; reverse where the code has operations of its own without a forward rule."""
    tolerance: float = 1e-5
    """Of both solvers."""
    times: tuple[tuple[float, float], ...] = ((0.0, 1.0), (0.1, 0.35), (0.5, 0.9), (0.9, 1.0))
    """Where the map is compared."""
    fine_tuned: str | None = None
    """Adapter line of the student, where the network cannot learn both ways as it is."""
    teacher: str | None = None
    """A consistency model's student learns from a denoiser: its adapter line, on the same class."""
    without: tuple[str, ...] = LOGS
    """Modules that the code imports and does not need here."""

    def condition(self, labels: Tensor) -> Tensor | None:
        """Conditioning of digits with these labels."""
        return self.label(labels) if self.label is not None else labels if self.classes else None


def one_hot(y: Tensor | None, x: Tensor) -> Tensor | None:
    return None if y is None else nn.functional.one_hot(y, 10).to(x.dtype)


def cases() -> list[Case]:
    """All rows, in order."""
    return [*velocities(), *mean_flows(), *shortcuts(), *exploding()]


class Tokens(nn.Module):
    """Patches of an image as tokens, with time added, through a stack of layers."""

    def __init__(self, layers: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.inlet = nn.Linear(4, width)
        self.place = nn.Parameter(0.5 * torch.randn(1, 4, width))
        self.time_embedding = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.layers, self.outlet = layers, nn.Linear(width, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = x.reshape(-1, 2, 2, 2, 2).transpose(2, 3).flatten(1, 2).flatten(2)
        h = self.inlet(tokens) + self.place + self.time_embedding(t[:, None])[:, None]
        h = self.outlet(self.layers(h))
        return h.reshape(-1, 2, 2, 2, 2).transpose(2, 3).reshape(x.shape)


class Perceptron(nn.Module):
    """A velocity of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(17, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 16))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat((x, t.reshape(-1, 1).expand(len(x), 1)), -1))


# tables of arguments, one network a line or two
# fmt: off
def velocities() -> list[Case]:
    """Networks of packages, and velocities of flow matching: the second time is no matter."""

    def torchcfm(labels: bool) -> Callable[[], nn.Module]:
        return made("torchcfm.models.unet:UNetModel", dim=IMAGE, num_channels=32, num_res_blocks=1, channel_mult=(1,),
                    attention_resolutions="1", num_heads=2, class_cond=labels, num_classes=10)  # fmt: skip

    def wrapped() -> nn.Module:
        from flow_matching.utils import ModelWrapper

        return type("Wrapped", (ModelWrapper,), {})(Perceptron())

    def timm_blocks() -> nn.Module:
        from timm.models.vision_transformer import Block

        return Tokens(nn.Sequential(*(Block(16, 2, mlp_ratio=2, qk_norm=True) for _ in range(2))))

    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
        return Tokens(nn.TransformerEncoder(layer, 2))

    def prompts(labels: Tensor) -> Tensor:
        return torch.randn(10, 3, 12, generator=torch.Generator().manual_seed(5))[labels]

    down = "Adapter('net(x, 1000 * s, cond)', noise_time=1.0, data_time=0.0, directions='none', output='sample')"
    image = made("models.unet:UNetModel", **OPENAI, num_heads=2, use_new_attention_order=True)
    unet_2d = made("diffusers:UNet2DModel", **DIFFUSERS, attention_head_dim=8, num_class_embeds=10,
                   down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"))
    dit = made("diffusers:DiTTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=1,
               out_channels=1, num_layers=2, sample_size=SIZE, patch_size=2, num_embeds_ada_norm=10)
    prompted = made("diffusers:UNet2DConditionModel", **DIFFUSERS, attention_head_dim=2, cross_attention_dim=12,
                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))

    def noise_minus_data(net: Any, x: Tensor, s: Tensor, t: Tensor, y: Any) -> Tensor:
        return -net(x, 1000 * (1 - s), y, return_dict=False)[0]

    def plain(net: Any, x: Tensor, s: Tensor, t: Tensor, y: Any) -> Tensor:
        return net(x, s)

    one: dict[str, Any] = {"times": ((0.0, 0.0), (0.3, 0.3), (0.95, 0.95))}
    inlet, embedding = "interval='time_embed'", "interval='time_embedding'"
    emb_dit = "interval='transformer_blocks.0.norm1.emb.timestep_embedder'"
    return [
        Case("UNetModel", "torchcfm", "TorchCFM()", torchcfm(False), lambda net, x, s, t, y: net(s, x), inlet, **one),
        Case("UNetModel, labels", "torchcfm", "TorchCFM()", torchcfm(True),
             lambda net, x, s, t, y: net(s, x, y), inlet, True, **one),
        Case("a perceptron in ModelWrapper", "flow_matching", "FlowMatching('net(x=x, t=s)')", wrapped,
             lambda net, x, s, t, y: net(x=x, t=s), "interval='model.layers.0'", shape=(16,), **one),
        Case("UNetModel, labels", "facebookresearch/flow_matching:examples/image",
             """FlowMatching("net(x, s, extra={'label': cond})")""", image,
             lambda net, x, s, t, y: net(x, s, extra={"label": y}), inlet, True, **one),
        Case("UNet2DModel, labels", "diffusers", down, unet_2d, noise_minus_data, embedding, True, tolerance=1e-4,
             **one),
        Case("DiTTransformer2DModel", "diffusers", down, dit, noise_minus_data, emb_dit, True, tolerance=1e-4, **one),
        Case("UNet2DConditionModel, prompts", "diffusers", down, prompted, noise_minus_data, embedding, label=prompts,
             tolerance=1e-4, **one),
        Case("two Blocks of VisionTransformer", "timm", "FlowMatching()", timm_blocks, plain, embedding, **one),
        Case("TransformerEncoder", "torch", "FlowMatching()", encoder, plain, embedding, **one),
    ]


def mean_flows() -> list[Case]:
    """MeanFlow: their time runs down, theirs of the end is ``r``."""
    song = made("models.unet:SongUNet", **SONG, in_channels=1, out_channels=1, channel_mult_noise=2, dropout=0.0,
                resample_filter=[1, 3, 3, 1])
    mfdit = made("models.dit:MFDiT", **TRANSFORMER, dim=32, depth=2, num_classes=10)
    sit = made("sit:SiT", **TRANSFORMER, hidden_size=32, decoder_hidden_size=32, depth=2, num_classes=10, qk_norm=False)
    dmft = made("models.dmft:DMFT", **TRANSFORMER, hidden_size=32, depth=3, num_classes=1000, dmf_depth=2)
    edm = made("fastgen.networks.EDM.network:EDMPrecond", **SONG, img_channels=1, label_dim=10, model_type="SongUNet",
               drop_precond="both", net_pred_type="flow", schedule_type="rf", dropout=0.0, r_timestep=True)
    unet = made("rectified_flow_pytorch.rectified_flow:Unet", dim=16, dim_mults=(1, 2), channels=1, attn_dim_head=8,
                attn_heads=2, accept_dest_time=True)
    return [
        Case("SongUNet", "Gsunshine/py-meanflow:meanflow", "MeanFlow()", song,
             lambda net, x, s, t, y: -net(x, (1 - s, (1 - s) - (1 - t)), None)),
        Case("MFDiT, labels", "haidog-yaqub/MeanFlow", "MeanFlow('net(x, s, t, cond)', output=0, null_label=10)",
             mfdit, lambda net, x, s, t, y: -net(x, 1 - s, 1 - t, y=y)[0], classes=True, tolerance=1e-4),
        Case("SiT, labels", "zhuyu-cs/MeanFlow", "MeanFlow('net(x, t, s, cond)', null_label=10)", sit,
             lambda net, x, s, t, y: -net(x, 1 - t, 1 - s, y=y), classes=True),
        Case("DMFT, labels", "kyungmnlee/dmf", "MeanFlow('net(x, s, t, cond)', null_label=1000)", dmft,
             lambda net, x, s, t, y: -net(x, 1 - s, 1 - t, y), classes=True, without=ABSENT),
        Case("EDMPrecond as MeanFlow, labels", "NVlabs/FastGen",
             """MeanFlow("net(x, s, cond, r=t, fwd_pred_type='flow')", classes=10)""", edm,
             lambda net, x, s, t, y: -net(x, 1 - s, condition=one_hot(y, x), r=1 - t, fwd_pred_type="flow"),
             classes=True),
        Case("Unet in MeanFlow", "rectified-flow-pytorch", "MeanFlow('net(x, s, s - t)')", unet,
             lambda net, x, s, t, y: -net(x, 1 - s, t - s)),
    ]


def shortcuts() -> list[Case]:
    """The official code of F2D2: time runs up, the second one is a length."""

    def network(name: str, **arguments: Any) -> Callable[[], nn.Module]:
        return made(f"training.experimental.networks:{name}", **SONG, img_channels=3, dropout=0.0, **arguments)

    def jump(net: Any, x: Tensor, s: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return net(x, s, torch.clamp(t - s, min=1 / 1024), one_hot(y, x))[0]

    student = {"model_type": "SongUNet_ctm_scalar"}
    # in training their networks drop an axis of length one, so there is no one channel
    same: dict[str, Any] = {"train": "interval='encoder.map_layer1'", "shape": (3, SIZE, SIZE), "mode": "reverse"}
    return [
        Case("ShortCut_Net", "Keely-Ai/F2D2", "Shortcut(second_time='length', output=0)",
             network("ShortCut_Net", **student, label_dim=0), jump, **same),
        Case("ShortCut_Net, labels", "Keely-Ai/F2D2", "Shortcut(second_time='length', output=0, classes=10)",
             network("ShortCut_Net", **student, label_dim=10), jump, classes=True, **same),
        Case("FM_Net, a teacher", "Keely-Ai/F2D2", "FlowMatching('net(x, clamp(s, 1e-9, 1.0))')",
             network("FM_Net", model_type="SongUNet"), lambda net, x, s, t, y: net(x, s.clamp(min=1e-9)),
             times=((0.0, 0.0), (0.3, 0.3), (0.95, 0.95)), **same),
    ]


LOWEST, HIGHEST = 0.002, 80.0


def clean_velocity(
    clean: Callable[..., Tensor], x: Tensor, s: Tensor, t: Tensor, lowest: float = LOWEST
) -> Tensor:
    """Velocity in our convention from an answer ``clean(x_ve, sigma, sigma_end)``, within the noise levels known."""
    sigma = ((1 - s) / s.clamp(min=1e-12)).clamp(lowest, HIGHEST)
    end = ((1 - t) / t.clamp(min=1e-12)).clamp(lowest, HIGHEST)
    factor = torch.where(s < 1 / (1 + HIGHEST), HIGHEST / (1 - s), 1 / s.clamp(min=1e-12))
    answer = clean(column(factor, x) * x, sigma, end)
    latest = 1 / (1 + lowest)
    late = s > latest
    start = torch.where(late, latest / s.clamp(min=0.5), torch.ones_like(s))
    return (answer - column(start, x) * x) / column(torch.where(late, torch.full_like(s, 1 - latest), 1 - s), x)


def exploding() -> list[Case]:
    """Denoisers, consistency models and CTM."""
    song = {**SONG, "img_channels": 1, "dropout": 0.0}
    edm = made("training.networks:EDMPrecond", model_type="SongUNet", label_dim=10, **song)
    edm2 = made("training.networks_edm2:Precond", **SONG | {"attn_resolutions": [2]}, img_channels=1, label_dim=10,
                channels_per_head=8)
    ect = made("training.networks:ECMPrecond", model_type="SongUNet", label_dim=10, **song)
    openai = {**OPENAI, "image_size": SIZE, "num_head_channels": 16}

    def ctm_unet() -> nn.Module:
        network = made("cm.unet:UNetModel", **openai, training_mode="ctm", attention_type="legacy")()
        for module in network.modules():
            if hasattr(module, "use_attention_checkpoint"):
                # recomputing in an operation of its own has no forward rule and allows one backward pass
                module.use_attention_checkpoint = False  # type: ignore[assignment]
        return network

    def denoised(net: Any, x: Tensor, s: Tensor, t: Tensor, y: Any, lowest: float = LOWEST) -> Tensor:
        return clean_velocity(lambda z, sigma, end: net(z, sigma, one_hot(y, z)), x, s, t, lowest)

    def inner(net: Any, z: Tensor, sigma: Tensor, shift: float, **more: Any) -> Tensor:
        total = (sigma**2 + 0.25).sqrt()
        weights = 0.25 / ((sigma - shift) ** 2 + 0.25), (sigma - shift) * 0.5 / total, 1 / total
        skip, out, inward = (column(w, z) for w in weights)
        return skip * z + out * net(inward * z, 250 * torch.log(sigma + 1e-44), **more)

    def consistency(net: Any, x: Tensor, s: Tensor, t: Tensor, y: Any) -> Tensor:
        return clean_velocity(lambda z, sigma, end: inner(net, z, sigma, LOWEST, y=y), x, s, t)

    def trajectory(net: Any, x: Tensor, s: Tensor, t: Tensor, y: Any) -> Tensor:
        more = {} if y is None else {"y": y}

        def ask(z: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
            return inner(net, z, sigma, 0.0, s=250 * torch.log(end + 1e-44), **more)

        if torch.equal(s, t):
            return clean_velocity(ask, x, s, t)
        # their G, from one noise level to another, as a jump of ours
        tau, tau_end = (v.clamp(1 / (1 + HIGHEST), 1 / (1 + LOWEST)) for v in (s, t))
        sigma, end = (1 - tau) / tau, (1 - tau_end) / tau_end
        z = x / column(tau, x)
        state = column(end / sigma, x) * z + column(1 - end / sigma, x) * ask(z, sigma, end)
        return (column(tau_end, x) * state - x) / column(tau_end - tau, x)

    one: dict[str, Any] = {"times": ((0.0, 0.0), (0.3, 0.3), (0.95, 0.95))}
    # to the end alone; and within the noise levels known, beyond which a map of ours is no call of theirs
    end_only: dict[str, Any] = {"times": ((0.0, 1.0), (0.3, 1.0), (0.8, 1.0))}
    known: dict[str, Any] = {"times": ((0.05, 0.35), (0.5, 0.9), (0.9, 0.99)), "without": ABSENT}
    layer = "interval='model.map_layer1'"
    return [
        Case("EDMPrecond, labels", "NVlabs/edm", "Denoiser(classes=10)", edm, denoised, layer, True, mode="reverse",
             **one),
        Case("Precond, labels", "NVlabs/edm2", "Denoiser(classes=10)", edm2, denoised, "interval='unet.emb_noise'",
             True, **one),
        Case("ECMPrecond, labels", "locuslab/ect", "Consistency(classes=10, sigma_min=0.003)", ect,
             lambda net, x, s, t, y: denoised(net, x, s, t, y, 0.003), layer, True, mode="reverse",
             teacher="Denoiser(classes=10)", **end_only),
        Case("UNetModel, labels", "openai/consistency_models",
             "Consistency('net(x, 250 * log(s), cond)', precondition='consistency')",
             made("cm.unet:UNetModel", **openai), consistency, "interval='time_embed'", True, tolerance=1e-4,
             fine_tuned="Consistency('net(x, 250 * log(s), cond)', precondition='edm')",
             teacher="Denoiser('net(x, 250 * log(s), cond)', precondition='edm')", without=ABSENT, **end_only),
        Case("EDMPrecond_CTM", "sony/ctm:code", "CTM('net(x, 250 * log(s), s=250 * log(t))', precondition='edm')",
             made("cm.networks:EDMPrecond_CTM", training_mode="ctm", arch="ddpmpp", label_dim=0, **song), trajectory,
             layer, mode="reverse", **known),
        Case("UNetModel, labels", "sony/ctm:code",
             "CTM('net(x, 250 * log(s), y=cond, s=250 * log(t))', precondition='edm')", ctm_unet, trajectory,
             "interval='time_embed'", True, tolerance=1e-4, **known),
    ]


# fmt: on
# --- what is measured ---


def trace(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of the Jacobian at ``(B, ...)`` by reverse-mode autograd, ``(B,)``: copies of a state, one per row."""
    dim = x[0].numel()
    copies = x.detach().repeat_interleave(dim, 0).requires_grad_(True)
    with torch.enable_grad():
        total = function(copies).reshape(len(x), dim, dim).diagonal(dim1=1, dim2=2).sum()
        (slope,) = torch.autograd.grad(total, copies)
    return slope.reshape(len(x), dim, dim).diagonal(dim1=1, dim2=2).sum(-1)


def repeated(y: Tensor | None, count: int) -> Tensor | None:
    """Conditioning of copies."""
    return None if y is None else y.repeat_interleave(count, 0)


def independent_log_prob(case: Case, network: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
    """Log-likelihood in nats by scipy, with nothing of ours."""
    batch, dim = len(x), x[0].numel()

    def right_side(t: float, flat: Any) -> Any:
        state = torch.from_numpy(flat[:-batch].copy()).reshape(x.shape)
        at = lambda z: torch.full((len(z),), min(max(t, 0.0), 1.0), dtype=z.dtype)  # noqa: E731
        with torch.no_grad():
            v = case.jump(network, state, at(state), at(state), y)
        slope = trace(lambda z: case.jump(network, z, at(z), at(z), repeated(y, dim)), state)
        return np.concatenate((v.reshape(-1).numpy(), slope.numpy()))

    start = np.concatenate((x.reshape(-1).numpy(), np.zeros(batch)))
    tolerance = {"rtol": case.tolerance, "atol": case.tolerance}
    answer = solve_ivp(right_side, (1.0, 0.0), start, method="DOP853", **tolerance).y[:, -1]
    noise = torch.from_numpy(answer[:-batch]).reshape(batch, dim)
    prior = -0.5 * noise.square().sum(-1) - 0.5 * dim * float(np.log(2 * np.pi))
    # from data to noise the integral of the divergence is that from noise to data with the other sign
    return prior + torch.from_numpy(answer[-batch:])


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference over largest value."""
    a, b = torch.stack(ours), torch.stack(theirs)
    return float((a - b).abs().max() / b.abs().max())


def compared(case: Case, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The columns that need no training: ours against the network itself."""
    torch.manual_seed(0)
    with doubled(case.build()) as network:
        return measured(case, wake(network).eval().requires_grad_(False), images, labels)


def measured(case: Case, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    flow_map = eval(case.line, vars(adapters).copy())(network)
    x, y = images[:3], case.condition(labels[:3])
    y = y.double() if y is not None and y.is_floating_point() else y
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    results: dict[str, float] = {}

    def states(*moments: float) -> tuple[Tensor, ...]:
        """Times, and states at the first."""
        at = [torch.full((3,), moment, dtype=x.dtype) for moment in moments]
        return column(at[0], x) * x + column(1 - at[0], x) * noise, *at

    ours, theirs = [], []
    for pair in case.times:
        state, start, end = states(*pair)
        with torch.no_grad():
            jumps = pair[0] < pair[1]
            ours.append(flow_map(state, start, end, y) if jumps else flow_map.velocity(state, start, y))
            theirs.append(case.jump(network, state, start, end, y))
    results["map"] = difference(ours, theirs)
    if case.line.startswith("Consistency"):
        return results

    dim = x[0].numel()
    exact, random = f2.divergence.Exact(dim, mode=case.mode), f2.Hutchinson(1, mode=case.mode)
    probe = torch.randint(0, 2, (1, *x.shape), generator=torch.Generator().manual_seed(2)).to(x) * 2 - 1
    ours, theirs = [], []
    for moment in (0.05, 0.4, 0.75, 0.95):
        state, at = states(moment)
        with torch.no_grad():
            ours.append(exact(flow_map.velocity, f2.flows.Point(state, at, y)).divergence)
            ours.append(random.per_probe(flow_map.velocity, f2.flows.Point(state, at, y), probe)[1][0])
        copies = at.repeat_interleave(dim)
        theirs.append(
            trace(lambda z, copies=copies: case.jump(network, z, copies, copies, repeated(y, dim)), state)  # type: ignore[misc]
        )
        leaf = state.clone().requires_grad_(True)
        (line,) = torch.autograd.grad((case.jump(network, leaf, at, at, y) * probe[0]).sum(), leaf)
        theirs.append((line * probe[0]).reshape(3, -1).sum(-1))
    results["divergence"] = difference(ours, theirs)

    one = None if y is None else y[:1]
    reference = f2.reference_log_prob(
        flow_map, x[:1], one, divergence=exact, method="dopri5", rtol=case.tolerance, atol=case.tolerance
    )
    independent = independent_log_prob(case, network, x[:1], one)
    results["log_prob"] = float(independent[0])
    results["log_prob_difference"] = float((reference.value - independent).abs().max())
    return results


def fitted(flow_map: Any, loader: Any, steps: int) -> Any:
    """The network's velocity trained by flow matching, so that there is something to distil."""
    optimizer = torch.optim.AdamW(flow_map.parameters(), 2e-3)
    batches: Iterator[Any] = iter(())
    for _ in range(steps):
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        x, y = batch if len(batch) == 2 else (batch[0], None)
        t, noise = torch.rand(len(x)), torch.randn_like(x)
        state = column(t, x) * x + column(1 - t, x) * noise
        loss = (flow_map.velocity(state, t, y) - (x - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow_map.parameters(), 1.0)
        optimizer.step()
    return flow_map.eval().requires_grad_(False)


def trained(case: Case, images: Tensor, labels: Tensor, steps: int) -> dict[str, float]:
    """A velocity of some steps from the authors' initial weights, and a student of as many steps from that."""
    lightning.seed_everything(0, verbose=False)
    images, condition = images.float(), case.condition(labels)
    parts = [images] if condition is None else [images, condition]
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*parts), 32, shuffle=True)
    network = case.build()
    teacher = fitted(eval(case.teacher or case.line, vars(adapters).copy())(network), data, steps)
    scope = {**vars(adapters), "network": copy.deepcopy(network).requires_grad_(True)}
    student_map = eval(f"{case.fine_tuned or case.line}(network, {case.train})", scope)
    student_map.probe(images[:4], None if condition is None else condition[:4])
    student = f2.F2D2Module(
        student_map, case.shape, teacher=teacher, estimator=f2.Hutchinson(1, mode=case.mode),
        objective=f2.TrajectoryRegression(nodes=8, capacity=256, chunk=64), warmup=20, ema_decay=0.97,
    )  # fmt: skip
    quiet_trainer(steps).fit(student, data)
    x, y = images[:64], None if condition is None else condition[:64]
    student.eval()
    with torch.no_grad():
        value = student.log_prob(x, 4, y).value
        estimator = f2.Hutchinson(2, mode=case.mode)
        reference = f2.reference_log_prob(teacher, x, y, divergence=estimator, steps=32).value
    return {"gap": float((value - reference).mean()), "r": float(torch.corrcoef(torch.stack((value, reference)))[0, 1])}


# --- the table ---


def version(source: str, repositories: Path | None) -> str:
    """Release of a package, or commit of a clone."""
    name = source.partition(":")[0]
    if "/" not in name or repositories is None:
        return f"{name} {importlib.metadata.version(name)}"
    ask = ["git", "-C", str(repositories / name), "rev-parse", "HEAD"]
    done = subprocess.run(ask, capture_output=True, text=True)
    return f"{name} {done.stdout.strip()[:10] or 'of no known commit'}"


def row(case: Case, results: dict[str, Any]) -> list[str]:
    """One line of the table."""
    cells = ["{map:.0e}", "{divergence:.0e}", "{log_prob_difference:.0e} of {log_prob:.1f}", "{gap:+.1f}, {r:.2f}"]
    found = []
    for index, cell in enumerate(cells):
        try:
            found.append(cell.format(**results))
        except KeyError:
            # not measured, or failed: what it says then
            found.append(results.get("student_error" if index == 3 else "error", "-"))
    return [f"{case.name} ({case.source.partition(':')[0]})", f"`{case.line}`", *found, case.mode]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repositories", type=Path, help="folder of clones, OWNER/NAME in it")
    parser.add_argument("--only", nargs="+", help="rows whose source and name contain one of these")
    parser.add_argument("--steps", type=int, default=200, help="training steps of students")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repositories = None if options.repositories is None else options.repositories.resolve()
    pixels, labels = load_digits(return_X_y=True)
    values = torch.from_numpy(pixels).double().reshape(-1, SIZE, 8 // SIZE, SIZE, 8 // SIZE).mean((2, 4))
    noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values, labels = (values + noise) / 17 * 2 - 1, torch.from_numpy(labels).long()
    rows, failures, sources = [], 0, {"torch": None}
    for case in cases():
        if options.only and not any(part in f"{case.source} {case.name}" for part in options.only):
            continue
        started, results = time.perf_counter(), {}
        # several channels are several digits
        channels = case.shape[0] if len(case.shape) == 3 else 1
        images = torch.stack([values.roll(i, 0) for i in range(channels)], 1).reshape(-1, *case.shape)
        name, _, inner = case.source.partition(":")
        folder = None if repositories is None or "/" not in name else repositories / name / inner
        if "/" in name and (folder is None or not folder.is_dir()):
            results |= {"error": "not checked", "student_error": "not checked"}
        else:
            sources[case.source] = None
            with repository(folder, case.without):
                steps = (("error", compared, ()), ("student_error", trained, (options.steps,)))
                for key, measure, more in steps:
                    try:
                        results |= measure(case, images, labels, *more)  # type: ignore[operator]
                    except Exception as error:
                        failures += 1
                        results[key] = type(error).__name__
                        traceback.print_exc()
        rows.append(row(case, results))
        print(f"{rows[-1]}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print(markdown(["network", "adapter", "map", "divergence", "log p, nats", "student: gap, r", "derivative"], rows))
    print("\n" + "; ".join(dict.fromkeys(version(name, repositories) for name in sources)))
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
