"""``f2d2 nll``: the log-likelihood of every sample of a data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from rich.progress import track
from torch import Tensor

from f2d2_lightning.cli._common import check_labels, load_model, model_parser, say
from f2d2_lightning.cli._mistakes import in_a_line, parsed
from f2d2_lightning.cli._points import DATA, Points, Reading, load_points, reading_of
from f2d2_lightning.cli._tables import Column, check_table_path, write_table
from f2d2_lightning.data.images._reader import Framing
from f2d2_lightning.flows.maps import Direction
from f2d2_lightning.likelihood._log_prob import LogProb
from f2d2_lightning.likelihood.mirror import mirrored_log_prob
from f2d2_lightning.likelihood.model import LikelihoodModel
from f2d2_lightning.likelihood.quantization import bits_per_dim, dequantization_bounds
from f2d2_lightning.metrics.likelihood import percentile_rank, said_of_bits, said_of_values
from f2d2_lightning.training.batches import check_values
from f2d2_lightning.utils.class_names import as_names
from f2d2_lightning.utils.conditions import Cond, moved
from f2d2_lightning.utils.seeding import mix_seed

REFERENCE_ERROR = "reference_standard_error"
DATA_HELP = (
    f"{', '.join(DATA)}, or the class path of a data module (test split; digits:train, my.Data:val for others); "
    ".npy or .npz: integers (dequantized here) or states as x, labels as y, or parameters as theta and their "
    "conditions as x; .csv: rows; for a model of a Table or of Pairs they are in its units; an image, or a folder of "
    "images (PNG, JPEG, BMP, WebP, PPM, TIFF; recursive, in the order of their paths)"
)


def nll_command(arguments: list[str]) -> None:
    """``f2d2 nll``: one row a sample, and a summary with standard errors."""
    parser = model_parser("nll", "Log-likelihood of every sample of a data set.")
    parser.add_argument("--data", type=str, required=True, help=DATA_HELP)
    parser.add_argument("--data_args", type=dict, default=None, help="arguments of the data module, as JSON")
    classes = (
        "names of the model's classes in the order of their labels, with commas between them: for folders of classes, "
        "and checkpoints that do not hold the names"
    )
    parser.add_argument("--classes", type=str, default=None, help=classes)
    parser.add_argument("--steps", type=int, default=4, help="evaluations per sample")
    parser.add_argument("--out", type=str, default="nll.csv", help=".csv or .parquet, one row a sample")
    draws = (
        "dequantization draws per sample: log_prob is their mean (the bound), log_prob_sd their standard deviation, "
        "log_prob_iw the logarithm of their mean density (the tighter, importance-weighted bound)"
    )
    parser.add_argument("--draws", type=PositiveInt, default=1, help=draws)
    parser.add_argument("--reference", type=bool, default=False, help="add the reference likelihood of the diagonal")
    compare = (
        "another data set, as --data: adds each sample's percentile among its log-likelihoods. One that the model has "
        "not seen (digits:val) says more than the training data"
    )
    parser.add_argument("--compare", type=str, default=None, help=compare)
    parser.add_argument("--compare_args", type=dict, default=None, help="arguments of that data module, as JSON")
    parser.add_argument("--convert", type=bool, default=False, help="convert images to the model's channels")
    resize = "resize images, before dequantization; by default they are cropped and resized as in training"
    parser.add_argument("--resize", type=bool, default=False, help=resize)
    requantize = "bring 8-bit values to the model's levels: floor(v levels / 256)"
    parser.add_argument("--requantize", type=bool, default=False, help=requantize)
    mirrored = (
        "the likelihood of the model whose samples a fair coin mirrors left to right, for models trained with flips: "
        "another model, at twice the evaluations. Published figures are without"
    )
    parser.add_argument("--mirrored", type=bool, default=False, help=mirrored)
    parser.add_argument("--batch_size", type=PositiveInt, default=512, help="samples at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the dequantization of files")
    parser.add_argument("--overwrite", type=bool, default=False, help="write over an existing file")
    with in_a_line():
        _nll(parsed(parser, arguments))


@dataclass(frozen=True)
class _Likelihoods:
    """Of samples: each draw of each, ``(D, N)``, or those of a batch, ``(B,)``; float64, nats."""

    value: Tensor
    evaluations: int
    """Of the network, a sample."""
    error: Tensor | None = None
    """Standard errors of ``value`` over probes, where they are known."""


@torch.no_grad()
def _nll(options: Any) -> None:
    out = Path(options.out)
    check_table_path(out, options.overwrite)
    if options.compare is None and options.compare_args:
        raise ValueError("--compare_args are arguments of the data module that --compare names, and it names none")
    module = load_model(options)
    if options.mirrored and len(module.shape) < 2:
        raise ValueError(
            f"--mirrored is for images, and the model is for vectors {module.shape}, whose columns would change "
            "places; leave it out"
        )
    if options.classes is not None:
        if module.conditional is False:
            raise ValueError(f"--classes are {options.classes}, and the model has no classes; leave --classes out")
        names = as_names(options.classes.split(","), "--classes")
        if module.class_names and names != module.class_names:
            raise ValueError(f"--classes are {names}, and the checkpoint has {module.class_names}; leave --classes out")
        module.class_names = names
    framing = Framing(1, resize="bicubic") if options.resize else None
    reading = reading_of(options.ckpt, Reading(options.seed, options.convert, framing, options.requantize))
    points, others = load_points(options.data, options.data_args, module, reading), None
    if options.compare is not None:
        reading = replace(reading, seed=mix_seed(options.seed, "compare"))
        others = load_points(options.compare, options.compare_args, module, reading)
    for given in (points, others):
        if given is not None and options.draws > 1 and not given.dequantized:
            raise ValueError(
                f"--draws {options.draws} needs data that are dequantized here, and {given.source} gives states; give "
                "integers, or leave --draws out"
            )
    # the one that is compared with first: what is wrong with it is then known before the longer wait
    among = None if others is None else _evaluate(module, others, options, reference=False)[0].value.mean(0)
    if among is not None and bool(among.isnan().all()):
        raise ValueError(f"no sample of {options.compare} has a likelihood, no inversion converged; take more --steps")
    found = _evaluate(module, points, options, reference=options.reference)
    columns = _columns(module, points, found, among)
    metadata = {
        "checkpoint": options.ckpt,
        "data": options.data,
        **{name: str(options[name]) for name in ("steps", "draws", "mirrored")},
        "levels": str(module.levels),
        "range": f"[{module.low}, {module.high}]",
        "unit": "log_prob: nats per sample; bits_per_dim: bits per dimension",
    } | ({} if options.compare is None else {"compare": options.compare})
    write_table(out, columns, metadata, options.overwrite)
    _summarize(columns, options, module)
    bound = " (an upper bound: uniform dequantization)" if module.levels is not None else ""
    draws = f", {options.draws} draws" if options.draws > 1 else ""
    say(f"{found[0].value.shape[1]} samples, {found[0].evaluations} evaluations each{draws}{bound}; wrote {out}")


def _evaluate(module: LikelihoodModel, points: Points, options: Any, reference: bool) -> list[_Likelihoods]:
    """Few-step likelihoods of all samples, and with ``reference`` its own besides."""
    velocity = module.joint_map.velocity
    kinds: list[Callable[[Tensor, Cond | None], LogProb]] = [lambda x, cond: module.log_prob(x, options.steps, cond)]
    kinds += [lambda x, cond: module.reference_log_prob(velocity, x, cond)] if reference else []
    found: list[list[_Likelihoods]] = [[] for _ in kinds]
    batches = (batch for draw in range(options.draws) for batch in points.batches(options.batch_size, draw))
    total = None if points.count is None else options.draws * math.ceil(points.count / options.batch_size)
    for batch in track(batches, description=f"log-likelihood of {points.source}", total=total, transient=True):
        x, cond = module.data_to_state(batch)
        if not points.dequantized and not found[0] and torch.is_floating_point(x):
            check_values(x, module.quantization)
        if module.conditional and cond is None:
            raise ValueError(f"the model is conditional, and {points.source} has no labels: {points.no_labels}")
        if module.conditional and cond is not None:
            check_labels(module, cond, points.source)
        x, cond = x.to(module.device), moved(cond, module.device)
        if reference and getattr(module.reference, "open", False) and not found[0]:
            # what a run chose was for its teacher
            module.reference_choice = module.reference.chosen(velocity, x, cond)
            answers = (1 + options.mirrored) * options.draws
            say(module.reference_choice.said(math.nan if points.count is None else answers * points.count))
        for parts, kind in zip(found, kinds, strict=True):
            parts.append(_likelihoods(lambda state: kind(state, cond), x, options.mirrored))  # noqa: B023
    if not found[0]:
        raise ValueError(f"{points.source} gives no samples")
    return [_joined(parts, options.draws, points.log_scale) for parts in found]


def _joined(parts: list[_Likelihoods], draws: int, log_scale: float) -> _Likelihoods:
    value = torch.cat([part.value for part in parts]).reshape(draws, -1) - log_scale
    errors = [part.error for part in parts if part.error is not None]
    error = torch.cat(errors).reshape(draws, -1) if len(errors) == len(parts) else None
    return _Likelihoods(value, max(part.evaluations for part in parts), error)


def _likelihoods(log_prob: Callable[[Tensor], LogProb], x: Tensor, mirrored: bool) -> _Likelihoods:
    answers: list[LogProb] = []

    def once(state: Tensor) -> Tensor:
        answers.append(log_prob(state))
        return answers[-1].value.cpu().double()

    value = mirrored_log_prob(once, x) if mirrored else once(x)
    errors = [answer.standard_error for answer in answers if answer.standard_error is not None]
    error = None
    if len(errors) == len(answers):
        # of both images the probes are the same, so that their errors may go together
        share = torch.stack([answer.value.cpu().double() for answer in answers]).softmax(0)
        error = (share * torch.stack(errors).cpu().double()).sum(0)
    return _Likelihoods(value, sum(answer.evaluations for answer in answers), error)


def _columns(module: LikelihoodModel, points: Points, found: list[_Likelihoods], among: Tensor | None) -> list[Column]:
    def both(name: str, value: Tensor) -> list[Column]:
        bits = bits_per_dim(value, module.dim, module.quantization)
        renamed = name.replace("log_prob", "bits_per_dim")
        return [Column(name, value.tolist(), "nats"), Column(renamed, bits.tolist(), "bits/dim")]

    few_step, *references = found
    bounds = dequantization_bounds(few_step.value)
    columns = [Column("index", list(range(len(bounds.mean))))]
    if points.names is not None:
        columns.append(Column("name", points.names))
    columns += both("log_prob", bounds.mean)
    if len(few_step.value) > 1:
        columns.append(Column("log_prob_sd", bounds.deviation.tolist(), "nats"))
        columns += both("log_prob_iw", bounds.importance_weighted)
    for reference in references:
        columns += both("reference_log_prob", reference.value.mean(0))
        if reference.error is not None:
            # as with mirror images, draws share the probes
            columns.append(Column(REFERENCE_ERROR, reference.error.mean(0).tolist(), "nats"))
    if among is not None:
        columns.append(Column("percentile", percentile_rank(bounds.mean, among).tolist(), "percent"))
    return columns


def _summarize(columns: list[Column], options: Any, module: LikelihoodModel) -> None:
    inverted = Direction.TO_NOISE not in module.directions
    for name, values, unit in columns:
        if unit is None:
            continue
        value = torch.tensor(values, dtype=torch.float64)
        known = value[~value.isnan()]
        if name == REFERENCE_ERROR:
            say(f"{name}: {float(value.square().mean().sqrt()):.4f} nats a sample, of the reference's probes")
            continue
        may_lack = inverted and not name.startswith("reference")
        if len(known) < len(value) and may_lack:
            say(f"{name}: {len(value) - len(known)} of {len(value)} samples have none (an inversion did not converge)")
        flag = None
        if unit == "nats" and not name.endswith("_sd"):
            flag = said_of_values(value, name, may_lack)
        elif unit == "bits/dim":
            flag = said_of_bits(value, name, module.quantization)
        if flag is not None:
            say(f"warning: {flag}")
        known = known[known.isfinite()]
        if len(known) == 0:
            continue
        if name == "percentile":
            below = f"{int((known < 1).sum())} of {len(known)} below 1"
            say(f"percentile among {options.compare}: median {float(known.median()):.1f}; {below}")
        else:
            error = float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else math.nan
            say(f"{name}: {float(known.mean()):.4f} ± {error:.4f} {unit}")
