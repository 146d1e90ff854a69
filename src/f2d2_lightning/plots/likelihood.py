"""Few-step likelihoods beside a reference: per sample, and on average against the number of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

from f2d2_lightning.plots._figure import BLUE, GRAY, column, label, limits, new_figure, number, panels, plural


def calibration_figure(
    values: Mapping[int, Tensor], reference: Tensor, unit: str, reference_name: str = "teacher"
) -> Figure:
    """Few-step negative log-likelihood against the reference's, one panel per step count.

    A title says the mean difference ``few-step - reference`` and Pearson's correlation, over the samples that have
    both values; those that have not (an inversion did not converge) are counted.

    Args:
        values: Step count to negative log-likelihoods ``(N,)``, in the unit named; NaN where there is none.
        reference: The reference's on the same points, ``(N,)``.
        unit: Name of the unit, for the labels: ``"nats"``, ``"bits/dim"``.
        reference_name: What the reference is called.

    Raises:
        ValueError: If there is no step count, or shapes differ.
    """
    x = column(reference, "the reference")
    pairs = {steps: column(value, f"values at {plural(steps, 'step')}") for steps, value in values.items()}
    for steps, y in pairs.items():
        if len(y) != len(x):
            raise ValueError(
                f"there are {len(y)} values at {plural(steps, 'step')} and {len(x)} of the reference; both are of the "
                "same samples, with NaN for a sample that has none"
            )
    shown = [torch.stack((x, y))[:, (x + y).isfinite()] for y in pairs.values()]
    low, high = limits(torch.cat(shown, 1)) if shown else (0.0, 1.0)
    titles = [
        "\n".join([_summary(steps, a, b), *_left_out(len(x) - len(a), len(x), torch.stack((a, b)), low, high)])
        for steps, (a, b) in zip(pairs, shown, strict=True)
    ]
    figure, axes = panels(titles, 2.6, 3.05, sharex=True, sharey=True)
    for ax, (a, b) in zip(axes, shown, strict=True):
        ax.plot([low, high], [low, high], color=GRAY, linewidth=0.8)
        ax.scatter(a.numpy(), b.numpy(), s=6, alpha=0.5, linewidths=0, color=BLUE)
        ax.set_xlim(low, high)
        ax.set_ylim(low, high)
        ax.set_aspect("equal")
        ax.tick_params(labelsize=7)
        ax.locator_params(nbins=5)
    figure.supylabel(f"few-step NLL, {unit}", fontsize=8)
    figure.supxlabel(f"{reference_name} NLL, {unit}", fontsize=8)
    return figure


def _summary(steps: int, reference: Tensor, value: Tensor) -> str:
    if len(value) == 0:
        return f"{plural(steps, 'step')}: no values"
    varies = len(value) > 1 and float(value.std()) > 0 and float(reference.std()) > 0
    correlation = f"= {float(torch.corrcoef(torch.stack((reference, value)))[0, 1]):.3f}" if varies else "undefined"
    return f"{plural(steps, 'step')}: gap {number(float((value - reference).mean()), sign=True)}, r {correlation}"


def _left_out(missing: int, count: int, shown: Tensor, low: float, high: float) -> list[str]:
    notes = [f"{missing} of {count} without a value"] if missing else []
    if outside := int(((shown < low) | (shown > high)).any(0).sum()):
        notes.append(f"{plural(outside, 'point')} outside")
    return notes


def nll_steps_figure(
    values: Mapping[int, float],
    errors: Mapping[int, float],
    unit: str,
    *,
    reference: float = math.nan,
    reference_error: float = math.nan,
    reference_name: str = "teacher",
    error_of: str = "mean",
) -> Figure:
    """Mean negative log-likelihood against the number of steps, with the reference's as a horizontal line.

    Args:
        values: Step count to the mean, in the unit named; NaN leaves a gap.
        errors: Step count to its standard error; NaN, as of a single sample, draws no bar.
        unit: Name of the unit, for the labels.
        reference: The reference's mean over the same samples; NaN for no line.
        reference_error: Its standard error, drawn as a band.
        reference_name: What the reference is called.
        error_of: What the bars are the standard error of, for the legend: ``"mean"`` over samples, or ``"gap"`` to the
            reference, which is smaller, as both are of the same samples.

    Raises:
        ValueError: If there is no step count, one is below 1, or values and errors have different ones.
    """
    steps = sorted(values)
    if not steps or steps[0] < 1 or set(steps) != set(errors):
        raise ValueError(
            f"values are for the step counts {steps} and errors for {sorted(errors)}; both are for the same ones, at "
            "least one, from 1"
        )
    figure = new_figure(4.4, 3.2)
    ax = figure.subplots()
    if math.isfinite(reference):
        ax.axhline(reference, color=GRAY, linewidth=1.2, label=f"{reference_name}: {number(reference)}")
        if math.isfinite(reference_error):
            ends, band = (reference - reference_error, reference + reference_error), "± standard error of the mean"
            ax.axhspan(*ends, color=GRAY, alpha=0.25, linewidth=0, label=f"{reference_name}, {band}")
    bars = [errors[k] if math.isfinite(errors[k]) else 0.0 for k in steps]
    line = {"color": BLUE, "marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 3}
    said = f"few-step, ± standard error of the {error_of}"
    ax.errorbar(steps, [values[k] for k in steps], yerr=bars, label=said, **line)  # type: ignore[arg-type]
    ax.set_xscale("log", base=2)
    ax.set_xlim(steps[0] / 2**0.5, steps[-1] * 2**0.5)
    ax.set_xticks(steps, labels=[str(k) for k in steps])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.ticklabel_format(axis="y", useOffset=False)
    label(ax, "steps", f"NLL, {unit}")
    figure.legend(loc="outside upper center", fontsize=7, frameon=False)
    return figure
