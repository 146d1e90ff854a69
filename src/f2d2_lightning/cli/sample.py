"""``f2d2 sample``: samples from a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from rich.progress import track
from torch import Tensor

from f2d2_lightning.cli._common import check_labels, load_model, model_parser, say
from f2d2_lightning.cli._mistakes import in_a_line, parsed
from f2d2_lightning.cli._points import Reading, reading_of
from f2d2_lightning.likelihood.guidance import GuidedSamples, SelfGuidance
from f2d2_lightning.likelihood.model import LikelihoodModel
from f2d2_lightning.likelihood.quantization import bits_per_dim
from f2d2_lightning.likelihood.sampling import Samples, draw_noise
from f2d2_lightning.metrics.likelihood import said_of_bits, said_of_values
from f2d2_lightning.nn._backbone import Backbone
from f2d2_lightning.plots import sample_figure, save_figure
from f2d2_lightning.plots._figure import plural
from f2d2_lightning.plots.samples import is_shown
from f2d2_lightning.utils.files import check_output, whole_file


def sample_command(arguments: list[str]) -> None:
    """``f2d2 sample``: draw samples, as a picture or as an array with their log-likelihoods."""
    parser = model_parser("sample", "Draw samples from a student's checkpoint.")
    parser.add_argument("--steps", type=int, default=4, help="evaluations per sample")
    parser.add_argument("--num", type=PositiveInt, default=64, help="samples")
    kinds = ".png: picture; .npz: arrays x, noise, log_prob, of a table in its units"
    parser.add_argument("--out", type=str, default="samples.png", help=kinds)
    for name, default, meaning in (
        ("scale", 0.0, "step size of a gradient step towards higher likelihood; 0 for no guidance"),
        ("steps", 1, "gradient steps towards higher likelihood, 0 for none"),
        ("keep_norm", False, "leave guided noise at its distance from the origin"),
        ("method", "ascent", "ascent, along the gradient, or adam, the paper's"),
    ):
        option = f"--guidance_{name}"
        parser.add_argument(option, option.replace("_", "-"), type=type(default), default=default, help=meaning)
    label = "class of the samples, for such models: its name, or its label"
    parser.add_argument("--label", type=str | None, default=None, help=label)
    parser.add_argument("--batch_size", type=PositiveInt, default=256, help="samples at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--overwrite", type=bool, default=False, help="write over an existing file")
    with in_a_line():
        _sample(parsed(parser, arguments))


def _label(given: str, module: LikelihoodModel) -> int:
    """Label of the class that was asked for: by its name where classes have names, else the number itself."""
    names = module.class_names or []
    if given in names:
        return names.index(given)
    numbered = any(name.isdecimal() for name in names)
    if numbered or not given.lstrip("-").isdecimal():
        known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "labels, which are whole numbers"
        raise ValueError(f"--label is {given!r}, and the model has {known}; say one of them")
    check_labels(module, torch.tensor([int(given)]), "--label")
    return int(given)


@torch.no_grad()
def _sample(options: Any) -> None:
    out = Path(options.out)
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out is {out}; .png (a picture) and .npz (arrays) can be written")
    given = {name: options[f"guidance_{name}"] for name in ("scale", "steps", "keep_norm", "method")}
    guidance: SelfGuidance | None = SelfGuidance(**given, measure=True)
    if given["scale"] == 0 or given["steps"] == 0:
        guidance = None
    check_output(out, options.overwrite)
    module = load_model(options)
    if out.suffix == ".png" and not is_shown(module.shape):
        raise ValueError(
            f"--out is {out}, and states of shape {module.shape} are neither images of one or three channels nor "
            f"points in the plane, which a picture shows; --out {out.with_suffix('.npz')} takes their numbers"
        )
    units = reading_of(options.ckpt, Reading()).units
    below = 0.0 if units is None else units.log_scale
    # drawn on the CPU, so that a seed gives the same samples on any device
    noise = draw_noise(options.num, module.shape, seed=options.seed)
    if any(isinstance(part, Backbone) and part.condition is not None for part in module.joint_map.modules()):
        raise ValueError(
            "the model is conditioned on more than a class, which no option says; draw its samples in Python: "
            "f2.load(checkpoint).sample(number, cond=...)"
        )
    if (options.label is None) == bool(module.conditional):
        raise ValueError(
            f"--label is {options.label}, and the model {'needs a class' if module.conditional else 'has no classes'}; "
            f"{'say which' if module.conditional else 'leave it out'}"
        )
    label = None if options.label is None else _label(options.label, module)
    made = []
    for chunk in track(noise.split(options.batch_size), description="sampling", transient=True):
        cond = None if label is None else torch.full((len(chunk),), label, device=module.device)
        made.append(module.sample(chunk.to(module.device), options.steps, cond, with_log_prob=True, guidance=guidance))
    state, log_prob = _joined(made, "state"), _joined(made, "log_prob") - below
    rows = state if units is None else units.rows(state)
    if out.suffix == ".npz":
        # the noise that led to x, which guidance has moved
        with whole_file(out) as partial, partial.open("wb") as file:
            np.savez(file, x=rows.numpy(), noise=_joined(made, "noise").numpy(), log_prob=log_prob.numpy())
    else:
        columns = math.ceil(math.sqrt(options.num))
        shown = rows if rows.ndim == 2 else state  # the range of pixels is that of states
        save_figure(sample_figure({plural(options.steps, "step"): shown}, module.low, module.high, columns), out)
    if guidance is not None:
        before, after = (float(_joined(made, f"log_prob_{when}").mean()) - below for when in ("before", "after"))
        say(
            f"guided in {plural(guidance.steps, 'step')} of scale {guidance.scale:g}: one-step log p {before:.3f} "
            f"before, {after:.3f} nats after"
        )
    bits = bits_per_dim(log_prob.double(), module.dim, module.quantization)
    for flag in (said_of_values(log_prob, "log_prob"), said_of_bits(bits, "bits_per_dim", module.quantization)):
        if flag is not None:
            say(f"warning: {flag}")
    backward = f" and {made[0].backward_evaluations} backward" if isinstance(made[0], GuidedSamples) else ""
    cost = f"{made[0].evaluations} evaluations{backward} each"
    say(f"{options.num} samples, {cost}, mean log p {float(log_prob.mean()):.3f} nats; wrote {out}")


def _joined(made: list[Samples], name: str) -> Tensor:
    return torch.cat([getattr(part, name).cpu() for part in made])
