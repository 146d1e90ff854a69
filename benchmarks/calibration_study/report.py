"""The study's table and figure, from the runs that are there."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from calibration_study.choices import CHOICES
from calibration_study.problems import Problem
from calibration_study.running import STEPS, run_folder

__all__ = ["Row", "figure", "rows_of", "table"]

ORDER = tuple(str(k) for k in sorted(STEPS, reverse=True))
"""Step counts as the tables list them."""


class Row(NamedTuple):
    """One line of the table: a choice and a way to ask, over seeds."""

    group: str
    name: str
    runs: list[dict[str, Any]]
    """What was kept of each run."""
    query: str | None
    """Which of its likelihoods; ``None`` where the student has none."""

    def over_seeds(self, measure: str, steps: str) -> list[float]:
        """A measure of the likelihoods, per seed; none where the student has no likelihood, or not this measure."""
        if self.query is None:
            return []
        found = [run["queries"][self.query][steps] for run in self.runs]
        return [values[measure] for values in found if measure in values]

    @property
    def errors(self) -> list[float]:
        """Mean error per test point, the mean over step counts, per seed."""
        per_steps = [self.over_seeds("error", k) for k in ORDER]
        return [statistics.fmean(values) for values in zip(*per_steps, strict=True)]


def rows_of(problem: Problem, seeds: Sequence[int], steps: int) -> list[Row]:
    """Rows of a problem that have a run at least, in the order of the choices."""

    def found() -> Iterator[Row]:
        for choice in CHOICES:
            paths = [run_folder(problem, choice, seed, steps) / "result.json" for seed in seeds]
            runs = [json.loads(path.read_text()) for path in paths if path.exists()]
            if problem.name not in choice.problems or not runs:
                continue
            for query in runs[0]["queries"] or (None,):
                yield Row(choice.group, choice.name + (query or ""), runs, query)

    return list(found())


def _spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return ""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"


def _in_steps(row: Row, measure: str, form: str) -> str:
    values = [row.over_seeds(measure, k) for k in ORDER]
    if not all(values):
        return ""
    return " / ".join(_plain(statistics.fmean(v), form) for v in values)


def _plain(value: float, form: str) -> str:
    """A number without the zero before its point."""
    return format(value, form).replace("0.", ".", 1) if abs(value) < 1 else format(value, form)


def table(rows: Sequence[Row], problem: Problem) -> str:
    """Markdown: one line per choice, means over seeds; the spread of gaps is the largest over step counts."""
    (start,) = [r for r in rows if r.group == "starting point" and r.query == ""]
    cost = statistics.fmean(run["milliseconds"] for run in start.runs)
    lines = [
        f"| | | error per point, {problem.unit} | gap at 8 / 4 / 2 / 1 steps | ± | r at 8 / 4 / 2 / 1 | "
        "round trip at 8 / 1 | samples at 8 / 1 | step time | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spreads = [statistics.stdev(v) for k in ORDER if len(v := row.over_seeds("gap", k)) > 1]
        unconverged = [1 - min(row.over_seeds("share", k)) for k in ORDER if row.query is not None]
        mark = f" ({max(unconverged):.0%} unconverged)" if unconverged and max(unconverged) > 0 else ""
        trips = [statistics.fmean(v) for k in ("8", "1") if (v := row.over_seeds("round_trip", k))]
        samples = [statistics.fmean(run["samples"][k]["distance"] for run in row.runs) for k in ("8", "1")]
        milliseconds = statistics.fmean(run["milliseconds"] for run in row.runs)
        cells = (
            row.group,
            row.name + mark,
            _spread(row.errors, ".3f"),
            _in_steps(row, "gap", "+.3f"),
            _plain(max(spreads), ".3f") if spreads else "",
            _in_steps(row, "r", ".3f"),
            " / ".join(_plain(v, ".3f") for v in trips),
            " / ".join(f"{v:.1f}" for v in samples),
            f"{milliseconds / cost:.2f}",
            str(len(row.runs)),
        )
        lines.append("| " + " | ".join(cells) + " |")
    teacher = rows[0].runs[0]["samples"]["teacher"]["distance"]
    lines += ["", f"Samples of the teacher: {teacher:.1f}. A step of the starting point: {cost:.0f} ms."]
    return "\n".join(lines)


def _label(group: str, name: str) -> str:
    return name if name.startswith(group) or group == "official" else f"{group}: {name}"


def figure(found: dict[str, list[Row]], unit: Callable[[str], str]) -> Figure:
    """Every choice's error per point, a dot per seed and a bar at their mean, beside the starting point's range.

    Args:
        found: Rows by problem.
        unit: Unit of a problem's likelihoods.
    """
    order = {(choice.group, choice.name): place for place, choice in enumerate(CHOICES)}
    mine = {
        (row.group, row.name): order[row.group, row.name.removesuffix(row.query)]
        for rows in found.values()
        for row in rows
        if row.query is not None
    }
    names = sorted(mine, key=lambda name: mine[name])
    places = {name: -index for index, name in enumerate(names)}
    groups = list(dict.fromkeys(group for group, _ in names))
    figure = Figure(figsize=(3.2 + 2.3 * len(found), 0.165 * len(names) + 1.1), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for ax, (problem, rows) in zip(axes, found.items(), strict=True):
        (start,) = [r for r in rows if r.group == "starting point" and r.query == ""]
        low, high = min(start.errors), max(start.errors)
        ax.axvspan(low, max(high, low * 1.01), color="0.85", linewidth=0)
        for row in rows:
            if row.query is None or not all(math.isfinite(e) for e in row.errors):
                continue
            y, color = places[row.group, row.name], f"C{groups.index(row.group) % 10}"
            ax.plot(row.errors, [y] * len(row.errors), "o", color=color, markersize=2.6, alpha=0.7, markeredgewidth=0)
            ax.plot([statistics.fmean(row.errors)], [y], "|", color=color, markersize=8, markeredgewidth=1.4)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(axis="y", color="0.93", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.set_title(problem, fontsize=9)
        ax.set_xlabel(f"error per point, {unit(problem)}", fontsize=7)
        ax.tick_params(labelsize=6)
    axes[0].set_yticks([places[name] for name in names], [_label(group, name) for group, name in names], fontsize=6)
    for label, (group, _) in zip(axes[0].get_yticklabels(), names, strict=True):
        label.set_color(f"C{groups.index(group) % 10}")
    axes[0].set_ylim(-len(names) + 0.3, 0.7)
    return figure
