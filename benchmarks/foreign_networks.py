"""Adapters against the code that they are for: real network classes, small and with random weights.

    python benchmarks/foreign_networks.py --env FOLDER --repositories FOLDER

makes a virtual environment in ``--env``, installs ``PACKAGES`` there and runs itself inside. Repositories that are on
no package index are read from ``--repositories``, where ``OWNER/NAME`` is a clone that you made; rows without their
code say "not checked". Per network:

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
import os
import subprocess
import sys
import tempfile
import time
import traceback
import types
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

PACKAGES = ("torchcfm", "flow_matching", "diffusers", "timm", "rectified-flow-pytorch", "scipy")
LOGS = ("wandb", "ftfy", "imageio", "imageio.v3")
ABSENT = (
    *("flash_attn", "flash_attn.flash_attention", "flash_attn.flash_attn_interface", "flash_attn.bert_padding"),
    *("flash_attn_2_cuda", "flash_attn_3", "flash_attn_3._C", "pytest", "triton", "triton.language"),
    *("xformers", "xformers.components", "xformers.components.attention", "blobfile"),
)
"""Modules that repositories import for logs, GPUs and clusters, and that the networks run without."""

HERE = Path(__file__).resolve()


# --- the environment ---


def outside(options: argparse.Namespace) -> int:
    """Make the environment and run this file in it."""
    folder = Path(options.env or Path(tempfile.gettempdir()) / "f2d2-foreign-networks").absolute()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    if options.system_site_packages:
        import torch

        # what this interpreter imports, a virtual environment's packages included, is seen from the new one
        ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        target = Path(subprocess.check_output(ask, text=True).strip())
        (target / "outer.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    project = [] if options.system_site_packages else ["--editable", str(HERE.parents[1])]
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES, *project], check=True)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src")}
    return subprocess.call([str(python), str(HERE), "--inside", *sys.argv[1:]], env=environment)


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
        absent["flash_attn.flash_attention"].FlashAttention = plain_attention()
    before = set(sys.modules)
    sys.modules.update(absent)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            path = getattr(sys.modules[name], "__file__", None) or ""
            if name in absent or Path(str(path)).is_relative_to(folder) or _is_namespace(sys.modules[name], folder):
                del sys.modules[name]


def _there(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _is_namespace(module: Any, folder: Path) -> bool:
    """Whether it is a folder without ``__init__.py`` of the clone."""
    try:
        return any(Path(path).is_relative_to(folder) for path in module.__path__)
    except (AttributeError, TypeError):
        return False


def plain_attention() -> type:
    """In place of flash-attn's layer, which needs a GPU: the same attention written out."""
    import torch

    class Attention(torch.nn.Module):
        def __init__(self, **_: Any) -> None:
            super().__init__()

        def forward(self, qkv: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
            q, k, v = qkv.movedim(2, 0).transpose(2, 3)
            weight = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            return (weight @ v).transpose(1, 2), None

    return Attention


class Doubled(types.ModuleType):
    """The module ``torch``, whose single precision is double."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch, {"float32": "float64", "float": "float64"}.get(name, name))


@contextlib.contextmanager
def doubled(network: Any) -> Iterator[Any]:
    """The network in double precision for a while, also where its code says otherwise."""
    import torch

    changed = []
    for module in network.modules():
        name = type(module).__module__
        namespace = vars(sys.modules[name])
        for alias in ("torch", "th"):
            if namespace.get(alias) is torch and not name.startswith(("torch.", "timm", "diffusers")):
                namespace[alias] = Doubled("torch")
                changed.append((namespace, alias))
        if isinstance(vars(module).get("dtype"), torch.dtype):
            module.dtype = torch.float64
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield network.double()
    finally:
        for namespace, alias in changed:
            namespace[alias] = torch


def wake(network: Any) -> Any:
    """Noise in parameters that are all nearly zero; a gain gets one half."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
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


@dataclass
class Case:
    """A network, the adapter line that a user writes for it, and how its authors call it.

    ``jump(net, x, s, t, y)`` is the average velocity in our convention: times run from noise at 0 to data at 1, all
    ``(B,)``. ``s == t`` asks for the instantaneous one. It is written without our adapters.
    """

    name: str
    source: str
    line: str
    build: Callable[[], Any]
    jump: Callable[..., Any]
    train: str = "directions='both'"
    """Arguments of the adapter line for a student, beside the network."""
    shape: tuple[int, ...] = IMAGE
    classes: int | None = None
    label: Callable[[Any], Any] | None = None
    """Conditioning from labels 0 to 9."""
    mode: str = "forward"
    """Of differentiation; reverse where the code has operations of its own without a forward rule."""
    tolerance: float = 1e-5
    """Of both solvers."""
    times: tuple[tuple[float, float], ...] = ((0.0, 1.0), (0.1, 0.35), (0.5, 0.9), (0.9, 1.0))
    """Where the map is compared."""
    endpoint_only: bool = False
    fine_tuned: str | None = None
    """Adapter line of the student, where the network cannot learn both ways as it is."""
    teacher: str | None = None
    """A consistency model's student learns from a denoiser: its adapter line, on the same class."""
    two_times: bool = True
    without: tuple[str, ...] = LOGS
    """Modules that the code imports and does not need here."""

    @property
    def repository(self) -> bool:
        """Whether the code is a clone, and not on a package index."""
        return "/" in self.source

    def condition(self, labels: Any) -> Any:
        """Conditioning of digits with these labels."""
        return self.label(labels) if self.label is not None else labels if self.classes else None


def column(t: Any, x: Any) -> Any:
    """Times ``(B,)`` to multiply states with."""
    return t.reshape(-1, *(1 for _ in x.shape[1:]))


def cases() -> list[Case]:
    """All rows, in order."""
    return [*packaged(), *mean_flows(), *shortcuts(), *exploding()]


def packaged() -> list[Case]:
    """Networks of packages, and velocities of flow matching."""
    import torch
    from torch import nn

    def torchcfm(classes: int | None = None) -> Any:
        from torchcfm.models.unet import UNetModel

        return UNetModel(
            dim=IMAGE,
            num_channels=32,
            num_res_blocks=1,
            channel_mult=(1,),
            attention_resolutions="1",
            num_heads=2,
            class_cond=classes is not None,
            num_classes=classes or 10,
        )

    def wrapped() -> Any:
        from flow_matching.utils import ModelWrapper

        class Perceptron(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.Sequential(
                    nn.Linear(17, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 16)
                )

            def forward(self, x: Any, t: Any) -> Any:
                return self.layers(torch.cat((x, t.reshape(-1, 1).expand(len(x), 1)), -1))

        class Wrapped(ModelWrapper):
            pass

        return Wrapped(Perceptron())

    def image_unet() -> Any:
        from models.unet import UNetModel

        return UNetModel(
            in_channels=1,
            model_channels=32,
            out_channels=1,
            num_res_blocks=1,
            attention_resolutions=(),
            channel_mult=(1,),
            num_classes=10,
            num_heads=2,
            use_scale_shift_norm=True,
            resblock_updown=True,
            use_new_attention_order=True,
        )

    def unet_2d() -> Any:
        from diffusers import UNet2DModel

        return UNet2DModel(
            sample_size=SIZE,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(16, 16),
            norm_num_groups=2,
            attention_head_dim=8,
            down_block_types=("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D"),
            num_class_embeds=10,
        )

    def dit() -> Any:
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=1,
            out_channels=1,
            num_layers=2,
            sample_size=SIZE,
            patch_size=2,
            num_embeds_ada_norm=10,
        )

    def unet_condition() -> Any:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(16, 16),
            norm_num_groups=2,
            attention_head_dim=2,
            cross_attention_dim=12,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )

    class Tokens(nn.Module):
        """Patches of an image as tokens, with time added, through a stack of layers."""

        def __init__(self, layers: nn.Module, width: int = 16) -> None:
            super().__init__()
            self.inlet = nn.Linear(4, width)
            self.place = nn.Parameter(0.5 * torch.randn(1, 4, width))
            self.time_embedding = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
            self.layers, self.outlet = layers, nn.Linear(width, 4)

        def forward(self, x: Any, t: Any) -> Any:
            tokens = x.reshape(-1, 2, 2, 2, 2).transpose(2, 3).flatten(1, 2).flatten(2)
            h = self.inlet(tokens) + self.place + self.time_embedding(t[:, None])[:, None]
            h = self.outlet(self.layers(h))
            return h.reshape(-1, 2, 2, 2, 2).transpose(2, 3).reshape(x.shape)

    def timm_blocks() -> Any:
        from timm.models.vision_transformer import Block

        return Tokens(nn.Sequential(*(Block(16, 2, mlp_ratio=2, qk_norm=True) for _ in range(2))))

    def encoder() -> Any:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
        return Tokens(nn.TransformerEncoder(layer, 2))

    def prompts(labels: Any) -> Any:
        table = torch.randn(10, 3, 12, generator=torch.Generator().manual_seed(5))
        return table[labels]

    down = "Adapter('net(x, 1000 * s, cond)', noise_time=1.0, data_time=0.0, directions='none', output='sample')"

    def noise_minus_data(net: Any, x: Any, s: Any, t: Any, y: Any) -> Any:
        return -net(x, 1000 * (1 - s), y, return_dict=False)[0]

    def plain(net: Any, x: Any, s: Any, t: Any, y: Any) -> Any:
        return net(x, s)

    def labelled(classes: int | None) -> Callable[..., Any]:
        return lambda net, x, s, t, y: net(s, x) if classes is None else net(s, x, y)

    one = {"two_times": False}
    embedding = "interval='time_embed'"
    image = "facebookresearch/flow_matching:examples/image"
    keyword = lambda net, x, s, t, y: net(x=x, t=s)  # noqa: E731
    extra = lambda net, x, s, t, y: net(x, s, extra={"label": y})  # noqa: E731
    return [
        Case("UNetModel", "torchcfm", "TorchCFM()", torchcfm, labelled(None), embedding, **one),
        Case(
            "UNetModel, labels",
            "torchcfm",
            "TorchCFM()",
            lambda: torchcfm(10),
            labelled(10),
            embedding,
            classes=10,
            **one,
        ),
        Case(
            "a perceptron in ModelWrapper",
            "flow_matching",
            "FlowMatching('net(x=x, t=s)')",
            wrapped,
            keyword,
            "interval='model.layers.0'",
            shape=(16,),
            **one,
        ),
        Case(
            "UNetModel, labels",
            image,
            """FlowMatching("net(x, s, extra={'label': cond})")""",
            image_unet,
            extra,
            embedding,
            classes=10,
            **one,
        ),
        Case(
            "UNet2DModel, labels",
            "diffusers",
            down,
            unet_2d,
            noise_minus_data,
            "interval='time_embedding'",
            classes=10,
            tolerance=1e-4,
            **one,
        ),
        Case(
            "DiTTransformer2DModel",
            "diffusers",
            down,
            dit,
            noise_minus_data,
            "interval='transformer_blocks.0.norm1.emb.timestep_embedder'",
            classes=10,
            tolerance=1e-4,
            **one,
        ),
        Case(
            "UNet2DConditionModel, prompts",
            "diffusers",
            down,
            unet_condition,
            noise_minus_data,
            "interval='time_embedding'",
            label=prompts,
            tolerance=1e-4,
            **one,
        ),
        Case(
            "two Blocks of VisionTransformer",
            "timm",
            "FlowMatching()",
            timm_blocks,
            plain,
            "interval='time_embedding'",
            **one,
        ),
        Case("TransformerEncoder", "torch", "FlowMatching()", encoder, plain, "interval='time_embedding'", **one),
    ]


def mean_flows() -> list[Case]:
    """MeanFlow: their time runs down, theirs of the end is ``r``."""
    both = "directions='both'"

    def py_meanflow() -> Any:
        from models.unet import SongUNet

        return SongUNet(
            img_resolution=SIZE,
            in_channels=1,
            out_channels=1,
            model_channels=16,
            channel_mult=[1, 1],
            channel_mult_noise=2,
            num_blocks=1,
            attn_resolutions=[],
            dropout=0.0,
            resample_filter=[1, 3, 3, 1],
        )

    def haidog() -> Any:
        from models.dit import MFDiT

        return MFDiT(input_size=SIZE, patch_size=2, in_channels=1, dim=32, depth=2, num_heads=2, num_classes=10)

    def zhuyu() -> Any:
        from sit import SiT

        return SiT(
            input_size=SIZE,
            patch_size=2,
            in_channels=1,
            hidden_size=32,
            decoder_hidden_size=32,
            depth=2,
            num_heads=2,
            num_classes=10,
            qk_norm=False,
        )

    def dmf() -> Any:
        from models.dmft import DMFT

        return DMFT(
            input_size=SIZE,
            patch_size=2,
            in_channels=1,
            hidden_size=32,
            depth=3,
            num_heads=2,
            num_classes=1000,
            dmf_depth=2,
        )

    def fastgen() -> Any:
        from fastgen.networks.EDM.network import EDMPrecond

        return EDMPrecond(
            img_resolution=SIZE,
            img_channels=1,
            label_dim=10,
            model_type="SongUNet",
            drop_precond="both",
            net_pred_type="flow",
            schedule_type="rf",
            model_channels=16,
            channel_mult=[1, 1],
            num_blocks=1,
            attn_resolutions=[],
            dropout=0.0,
            r_timestep=True,
        )

    def lucidrains() -> Any:
        from rectified_flow_pytorch.rectified_flow import Unet

        return Unet(dim=16, dim_mults=(1, 2), channels=1, attn_dim_head=8, attn_heads=2, accept_dest_time=True)

    def one_hot(y: Any, x: Any) -> Any:
        import torch

        return torch.nn.functional.one_hot(y, 10).to(x.dtype)

    return [
        Case(
            "SongUNet",
            "Gsunshine/py-meanflow:meanflow",
            "MeanFlow()",
            py_meanflow,
            lambda net, x, s, t, y: -net(x, (1 - s, (1 - s) - (1 - t)), None),
            both,
        ),
        Case(
            "MFDiT, labels",
            "haidog-yaqub/MeanFlow",
            "MeanFlow('net(x, s, t, cond)', output=0, null_label=10)",
            haidog,
            lambda net, x, s, t, y: -net(x, 1 - s, 1 - t, y=y)[0],
            both,
            classes=10,
            tolerance=1e-4,
        ),
        Case(
            "SiT, labels",
            "zhuyu-cs/MeanFlow",
            "MeanFlow('net(x, t, s, cond)', null_label=10)",
            zhuyu,
            lambda net, x, s, t, y: -net(x, 1 - t, 1 - s, y=y),
            both,
            classes=10,
        ),
        Case(
            "DMFT, labels",
            "kyungmnlee/dmf",
            "MeanFlow('net(x, s, t, cond)', null_label=1000)",
            dmf,
            lambda net, x, s, t, y: -net(x, 1 - s, 1 - t, y),
            both,
            classes=10,
            without=ABSENT,
        ),
        Case(
            "EDMPrecond as MeanFlow, labels",
            "NVlabs/FastGen",
            """MeanFlow("net(x, s, cond, r=t, fwd_pred_type='flow')", classes=10)""",
            fastgen,
            lambda net, x, s, t, y: -net(x, 1 - s, condition=one_hot(y, x), r=1 - t, fwd_pred_type="flow"),
            both,
            classes=10,
        ),
        Case(
            "Unet in MeanFlow",
            "rectified-flow-pytorch",
            "MeanFlow('net(x, s, s - t)')",
            lucidrains,
            lambda net, x, s, t, y: -net(x, 1 - s, t - s),
            both,
        ),
    ]


def shortcuts() -> list[Case]:
    """The official code of F2D2: time runs up, the second one is a length."""
    import torch

    # in training their networks drop an axis of length one, so there is no one channel
    shape = (3, SIZE, SIZE)
    sizes = {
        "img_resolution": SIZE,
        "img_channels": 3,
        "model_channels": 16,
        "channel_mult": [1, 1],
        "num_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }

    def student(label_dim: int) -> Any:
        from training.experimental.networks import ShortCut_Net

        return ShortCut_Net(model_type="SongUNet_ctm_scalar", label_dim=label_dim, **sizes)

    def teacher() -> Any:
        from training.experimental.networks import FM_Net

        return FM_Net(model_type="SongUNet", **sizes)

    def jump(net: Any, x: Any, s: Any, t: Any, y: Any) -> Any:
        one_hot = None if y is None else torch.nn.functional.one_hot(y, 10).to(x.dtype)
        return net(x, s, torch.clamp(t - s, min=1 / 1024), one_hot)[0]

    interval = "interval='encoder.map_layer1'"
    return [
        Case(
            "ShortCut_Net",
            "Keely-Ai/F2D2",
            "Shortcut(second_time='length', output=0)",
            lambda: student(0),
            jump,
            interval,
            shape=shape,
            mode="reverse",
        ),
        Case(
            "ShortCut_Net, labels",
            "Keely-Ai/F2D2",
            "Shortcut(second_time='length', output=0, classes=10)",
            lambda: student(10),
            jump,
            interval,
            classes=10,
            shape=shape,
            mode="reverse",
        ),
        Case(
            "FM_Net, a teacher",
            "Keely-Ai/F2D2",
            "FlowMatching('net(x, clamp(s, 1e-9, 1.0))')",
            teacher,
            lambda net, x, s, t, y: net(x, s.clamp(min=1e-9)),
            interval,
            shape=shape,
            mode="reverse",
            two_times=False,
        ),
    ]


LOWEST, HIGHEST = 0.002, 80.0


def clean_velocity(clean: Callable[[Any, Any, Any], Any], x: Any, s: Any, t: Any, lowest: float = LOWEST) -> Any:
    """Velocity in our convention from an answer ``clean(x_ve, sigma, sigma_end)``, within the noise levels known."""
    import torch

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
    import torch

    def one_hot(y: Any, x: Any) -> Any:
        return None if y is None else torch.nn.functional.one_hot(y, 10).to(x.dtype)

    song = {
        "img_resolution": SIZE,
        "img_channels": 1,
        "label_dim": 10,
        "model_channels": 16,
        "channel_mult": [1, 1],
        "num_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }

    def edm() -> Any:
        from training.networks import EDMPrecond

        return EDMPrecond(model_type="SongUNet", **song)

    def edm2() -> Any:
        from training.networks_edm2 import Precond

        return Precond(
            img_resolution=SIZE,
            img_channels=1,
            label_dim=10,
            model_channels=16,
            channel_mult=[1, 1],
            num_blocks=1,
            attn_resolutions=[2],
            channels_per_head=8,
        )

    def ect() -> Any:
        from training.networks import ECMPrecond

        return ECMPrecond(model_type="SongUNet", **song)

    def openai(module: str, **more: Any) -> Any:
        unet = importlib.import_module(module).UNetModel
        return unet(
            image_size=SIZE,
            in_channels=1,
            model_channels=32,
            out_channels=1,
            num_res_blocks=1,
            attention_resolutions=(),
            channel_mult=(1,),
            num_classes=10,
            num_head_channels=16,
            use_scale_shift_norm=True,
            resblock_updown=True,
            **more,
        )

    def ctm_unet() -> Any:
        network = openai("cm.unet", training_mode="ctm", attention_type="legacy")
        for module in network.modules():
            if hasattr(module, "use_attention_checkpoint"):
                # recomputing in an operation of its own has no forward rule and allows one backward pass
                module.use_attention_checkpoint = False
        return network

    def ctm_song() -> Any:
        from cm.networks import EDMPrecond_CTM

        return EDMPrecond_CTM(training_mode="ctm", arch="ddpmpp", **{**song, "label_dim": 0})

    def denoised(net: Any, x: Any, s: Any, t: Any, y: Any, lowest: float = LOWEST) -> Any:
        return clean_velocity(lambda z, sigma, end: net(z, sigma, one_hot(y, z)), x, s, t, lowest)

    def weights(sigma: Any, shift: float) -> tuple[Any, Any, Any]:
        total = (sigma**2 + 0.25).sqrt()
        return 0.25 / ((sigma - shift) ** 2 + 0.25), (sigma - shift) * 0.5 / total, 1 / total

    def inner(net: Any, z: Any, sigma: Any, shift: float, **more: Any) -> Any:
        skip, out, inward = (column(w, z) for w in weights(sigma, shift))
        return skip * z + out * net(inward * z, 250 * torch.log(sigma + 1e-44), **more)

    def consistency(net: Any, x: Any, s: Any, t: Any, y: Any) -> Any:
        return clean_velocity(lambda z, sigma, end: inner(net, z, sigma, LOWEST, y=y), x, s, t)

    def trajectory(net: Any, x: Any, s: Any, t: Any, y: Any) -> Any:
        more = {} if y is None else {"y": y}

        def ask(z: Any, sigma: Any, end: Any) -> Any:
            return inner(net, z, sigma, 0.0, s=250 * torch.log(end + 1e-44), **more)

        if torch.equal(s, t):
            return clean_velocity(ask, x, s, t)
        # their G, from one noise level to another, as a jump of ours
        tau, tau_end = s.clamp(1 / (1 + HIGHEST), 1 / (1 + LOWEST)), t.clamp(1 / (1 + HIGHEST), 1 / (1 + LOWEST))
        sigma, end = (1 - tau) / tau, (1 - tau_end) / tau_end
        z = x / column(tau, x)
        state = column(end / sigma, x) * z + column(1 - end / sigma, x) * ask(z, sigma, end)
        return (column(tau_end, x) * state - x) / column(tau_end - tau, x)

    slow = {"mode": "reverse"}
    # beyond the noise levels known, a map of ours is a convention and no call of theirs
    inner_times = ((0.05, 0.35), (0.5, 0.9), (0.9, 0.99))
    return [
        Case(
            "EDMPrecond, labels",
            "NVlabs/edm",
            "Denoiser(classes=10)",
            edm,
            denoised,
            "interval='model.map_layer1'",
            classes=10,
            two_times=False,
            **slow,
        ),
        Case(
            "Precond, labels",
            "NVlabs/edm2",
            "Denoiser(classes=10)",
            edm2,
            denoised,
            "interval='unet.emb_noise'",
            classes=10,
            two_times=False,
        ),
        Case(
            "ECMPrecond, labels",
            "locuslab/ect",
            "Consistency(classes=10, sigma_min=0.003)",
            ect,
            lambda net, x, s, t, y: denoised(net, x, s, t, y, 0.003),
            "interval='model.map_layer1'",
            classes=10,
            endpoint_only=True,
            teacher="Denoiser(classes=10)",
            **slow,
        ),
        Case(
            "UNetModel, labels",
            "openai/consistency_models",
            "Consistency('net(x, 250 * log(s), cond)', precondition='consistency')",
            lambda: openai("cm.unet"),
            consistency,
            "interval='time_embed'",
            classes=10,
            endpoint_only=True,
            fine_tuned="Consistency('net(x, 250 * log(s), cond)', precondition='edm')",
            teacher="Denoiser('net(x, 250 * log(s), cond)', precondition='edm')",
            tolerance=1e-4,
            without=ABSENT,
        ),
        Case(
            "EDMPrecond_CTM",
            "sony/ctm:code",
            "CTM('net(x, 250 * log(s), s=250 * log(t))', precondition='edm')",
            ctm_song,
            trajectory,
            "interval='model.map_layer1'",
            times=inner_times,
            without=ABSENT,
            **slow,
        ),
        Case(
            "UNetModel, labels",
            "sony/ctm:code",
            "CTM('net(x, 250 * log(s), y=cond, s=250 * log(t))', precondition='edm')",
            ctm_unet,
            trajectory,
            "interval='time_embed'",
            times=inner_times,
            classes=10,
            tolerance=1e-4,
            without=ABSENT,
        ),
    ]


# --- what is measured ---


def probed(function: Callable[[Any], Any], x: Any) -> Any:
    """Trace of the Jacobian at ``(B, ...)`` by reverse-mode autograd, ``(B,)``: copies of a state, one per row."""
    import torch

    dim = x[0].numel()
    copies = x.detach().repeat_interleave(dim, 0).requires_grad_(True)
    with torch.enable_grad():
        value = function(copies).reshape(len(x), dim, dim)
        total = value.diagonal(dim1=1, dim2=2).sum()
        (slope,) = torch.autograd.grad(total, copies)
    return slope.reshape(len(x), dim, dim).diagonal(dim1=1, dim2=2).sum(-1)


def repeated(y: Any, count: int) -> Any:
    """Conditioning of copies."""
    return None if y is None else y.repeat_interleave(count, 0)


def independent_log_prob(case: Case, network: Any, x: Any, y: Any) -> Any:
    """Log-likelihood in nats by scipy, with nothing of ours."""
    import numpy as np
    import torch
    from scipy.integrate import solve_ivp

    batch, dim = len(x), x[0].numel()

    def right_side(t: float, flat: Any) -> Any:
        state = torch.from_numpy(flat[:-batch].copy()).reshape(x.shape)
        at = lambda z: torch.full((len(z),), min(max(t, 0.0), 1.0), dtype=z.dtype)  # noqa: E731
        with torch.no_grad():
            v = case.jump(network, state, at(state), at(state), y)
        trace = probed(lambda z: case.jump(network, z, at(z), at(z), repeated(y, dim)), state)
        return np.concatenate((v.reshape(-1).numpy(), trace.numpy()))

    start = np.concatenate((x.reshape(-1).numpy(), np.zeros(batch)))
    tolerance = {"rtol": case.tolerance, "atol": case.tolerance}
    answer = solve_ivp(right_side, (1.0, 0.0), start, method="DOP853", **tolerance).y[:, -1]
    noise = torch.from_numpy(answer[:-batch]).reshape(batch, dim)
    prior = -0.5 * noise.square().sum(-1) - 0.5 * dim * float(np.log(2 * np.pi))
    # from data to noise the integral of the divergence is that from noise to data with the other sign
    return prior + torch.from_numpy(answer[-batch:])


def make_estimator(mode: str, probes: int = 1, dim: int = 0) -> Any:
    """Ours, of the mode that the network needs; the exact trace where ``dim``, of the states, is given."""
    import f2d2_lightning as f2

    return f2.divergence.Exact(dim, mode=mode) if dim else f2.Hutchinson(probes, mode=mode)


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference over largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def compared(case: Case, images: Any, labels: Any) -> dict[str, float]:
    """The columns that need no training."""
    import torch

    torch.manual_seed(0)
    with doubled(case.build()) as network:
        return measured(case, wake(network).eval().requires_grad_(False), images, labels)


def measured(case: Case, network: Any, images: Any, labels: Any) -> dict[str, float]:
    """Ours against the network itself."""
    import torch

    import f2d2_lightning as f2
    from f2d2_lightning import adapters

    adapter = eval(case.line, vars(adapters).copy())
    flow_map = adapter(network)
    x, y = images[:3], case.condition(labels[:3])
    y = y.double() if y is not None and y.is_floating_point() else y
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    results = {"parameters": sum(p.numel() for p in network.parameters())}

    pairs = case.times if case.two_times else ((0.0, 0.0), (0.3, 0.3), (0.95, 0.95))
    pairs = ((0.0, 1.0), (0.3, 1.0), (0.8, 1.0)) if case.endpoint_only else pairs
    ours, theirs = [], []
    for s, t in pairs:
        start, end = (torch.full((3,), value, dtype=x.dtype) for value in (s, t))
        state = column(start, x) * x + column(1 - start, x) * noise
        with torch.no_grad():
            ours.append(flow_map(state, start, end, y) if s < t else flow_map.velocity(state, start, y))
            theirs.append(case.jump(network, state, start, end, y))
    results["map"] = difference(torch.stack(ours), torch.stack(theirs))
    if case.endpoint_only:
        return results

    dim = x[0].numel()
    exact, ours, theirs = make_estimator(case.mode, dim=dim), [], []
    random = make_estimator(case.mode)
    probe = torch.randint(0, 2, (1, *x.shape), generator=torch.Generator().manual_seed(2)).to(x) * 2 - 1
    for moment in (0.05, 0.4, 0.75, 0.95):
        at = torch.full((3,), moment, dtype=x.dtype)
        state = column(at, x) * x + column(1 - at, x) * noise
        with torch.no_grad():
            ours.append(exact(flow_map.velocity, state, at, y).divergence)
            ours.append(random.per_probe(flow_map.velocity, f2.flows.Point(state, at, y), probe)[1][0])
        copies = at.repeat_interleave(dim)
        theirs.append(probed(lambda z: case.jump(network, z, copies, copies, repeated(y, dim)), state))
        leaf = state.clone().requires_grad_(True)
        (row,) = torch.autograd.grad((case.jump(network, leaf, at, at, y) * probe[0]).sum(), leaf)
        theirs.append((row * probe[0]).reshape(3, -1).sum(-1))
    results["divergence"] = difference(torch.stack(ours), torch.stack(theirs))

    one = None if y is None else y[:1]
    reference = f2.reference_log_prob(
        flow_map, x[:1], one, divergence=exact, method="dopri5", rtol=case.tolerance, atol=case.tolerance
    )
    independent = independent_log_prob(case, network, x[:1], one)
    results["log_prob"] = float(independent[0])
    results["log_prob_difference"] = float((reference.value - independent).abs().max())
    return results


def fitted(flow_map: Any, loader: Any, conditional: bool, steps: int) -> Any:
    """The network's velocity trained by flow matching, so that there is something to distil."""
    import torch

    optimizer = torch.optim.AdamW(flow_map.parameters(), 2e-3)
    done = 0
    while done < steps:
        for x, *rest in loader:
            y = rest[0] if conditional else None
            t, noise = torch.rand(len(x)), torch.randn_like(x)
            state = column(t, x) * x + column(1 - t, x) * noise
            loss = (flow_map.velocity(state, t, y) - (x - noise)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow_map.parameters(), 1.0)
            optimizer.step()
            done += 1
            if done == steps:
                break
    return flow_map.eval().requires_grad_(False)


def trained(case: Case, images: Any, labels: Any, steps: int) -> dict[str, float]:
    """A velocity of some steps from the authors' initial weights, and a student of as many steps from that."""
    import lightning
    import torch

    import f2d2_lightning as f2
    from f2d2_lightning import adapters

    lightning.seed_everything(0, verbose=False)
    images, condition = images.float(), case.condition(labels)
    parts = [images] if condition is None else [images, condition]
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*parts), 32, shuffle=True)
    network = case.build()
    teacher = eval(case.teacher or case.line, vars(adapters).copy())(network)
    fitted(teacher, data, condition is not None, steps)
    scope = {**vars(adapters), "network": copy.deepcopy(network).requires_grad_(True)}
    student_map = eval(f"{case.fine_tuned or case.line}(network, {case.train})", scope)
    student_map.probe(images[:4], None if condition is None else condition[:4])
    student = f2.F2D2Module(
        student_map,
        case.shape,
        teacher=teacher,
        estimator=make_estimator(case.mode),
        objective=f2.TrajectoryRegression(nodes=8, capacity=256, chunk=64),
        warmup=20,
        ema_decay=0.97,
    )
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(student, data)
    x, y = images[:64], None if condition is None else condition[:64]
    student.eval()
    with torch.no_grad():
        value = student.log_prob(x, 4, y).value
        estimator = make_estimator(case.mode, 2)
        reference = f2.reference_log_prob(teacher, x, y, divergence=estimator, steps=32).value
    pair = torch.stack((value, reference))
    return {"gap": float((value - reference).mean()), "r": float(torch.corrcoef(pair)[0, 1])}


# --- the table ---


def where(case: Case, repositories: Path | None) -> Path | None:
    """The folder to import from."""
    name, _, inner = case.source.partition(":")
    folder = None if repositories is None else repositories / name / inner
    return folder if folder is not None and folder.is_dir() else None


def version(source: str, repositories: Path | None) -> str:
    """Release of a package, or commit of a clone."""
    name = source.partition(":")[0]
    if "/" not in name:
        return f"{name} {importlib.metadata.version(name)}"
    if repositories is None or not (repositories / name).is_dir():
        return f"{name}: not there"
    ask = ["git", "-C", str(repositories / name), "rev-parse", "HEAD"]
    done = subprocess.run(ask, capture_output=True, text=True)
    return f"{name} {done.stdout.strip()[:10] or 'of no known commit'}"


def row(case: Case, results: dict[str, Any]) -> str:
    """One line of the table."""

    def number(name: str, form: str) -> str:
        return format(results[name], form) if name in results else "-"

    state = results.get("state")
    log_prob = (
        f"{number('log_prob_difference', '.0e')} of {number('log_prob', '.1f')}" if "log_prob" in results else "-"
    )
    student = f"{number('gap', '+.1f')}, {number('r', '.2f')}" if "gap" in results else "-"
    if "student_error" in results:
        student = results["student_error"]
    cells = [f"{case.name} ({case.source.partition(':')[0]})", f"`{case.line}`"]
    cells += [state] * 4 if state else [number("map", ".0e"), number("divergence", ".0e"), log_prob, student]
    return "| " + " | ".join(cells) + f" | {case.mode} |"


def inside(options: argparse.Namespace) -> int:
    """Measure and print."""
    import torch
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    repositories = None if options.repositories is None else Path(options.repositories).resolve()
    pixels, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(3)
    values = torch.from_numpy(pixels).double().reshape(-1, SIZE, 8 // SIZE, SIZE, 8 // SIZE).mean((2, 4))
    values = (values + torch.rand(values.shape, generator=generator, dtype=torch.float64)) / 17 * 2 - 1
    labels = torch.from_numpy(labels).long()
    lines, failures, sources = [], 0, []
    for case in cases():
        if options.only and not any(part in f"{case.source} {case.name}" for part in options.only):
            continue
        started, results = time.perf_counter(), {}
        # several channels are several digits
        channels = case.shape[0] if len(case.shape) == 3 else 1
        images = torch.stack([values.roll(i, 0) for i in range(channels)], 1).reshape(-1, *case.shape)
        folder = where(case, repositories)
        if case.repository and folder is None:
            results["state"] = "not checked"
        else:
            sources.append(case.source)
            with repository(folder, case.without):
                try:
                    results.update(compared(case, images, labels))
                except Exception as error:
                    failures += 1
                    results["state"] = f"{type(error).__name__}"
                    traceback.print_exc()
                try:
                    results.update(trained(case, images, labels, options.steps))
                except Exception as error:
                    failures += 1
                    results["student_error"] = f"{type(error).__name__}"
                    traceback.print_exc()
        lines.append(row(case, results))
        spent = time.perf_counter() - started
        print(f"{lines[-1]}  [{results.get('parameters', 0)} parameters, {spent:.0f} s]", file=sys.stderr, flush=True)
    print("| network | adapter | map | divergence | log p, nats | student: gap, r | derivative |")
    print("|---|---|---:|---:|---:|---:|---|")
    print("\n".join(lines))
    names = dict.fromkeys(["torch", *sources])
    print("\n" + "; ".join(dict.fromkeys(version(name, repositories) for name in names)))
    return min(failures, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", help="folder of the virtual environment; made if it is not there")
    parser.add_argument("--repositories", help="folder of clones, OWNER/NAME in it")
    parser.add_argument("--system-site-packages", action="store_true", help="see this interpreter's packages from it")
    parser.add_argument("--only", nargs="+", help="rows whose source and name contain one of these")
    parser.add_argument("--steps", type=int, default=200, help="training steps of students")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    return inside(options) if options.inside else outside(options)


if __name__ == "__main__":
    sys.exit(main())
