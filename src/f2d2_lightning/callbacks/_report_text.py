"""The text of a test's report, in Markdown and HTML, and the numbers that go into it."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from f2d2_lightning.callbacks.summary import Part
from f2d2_lightning.metrics.diagnosis import Diagnosis
from f2d2_lightning.plots._figure import number

PACKAGES = ("f2d2-lightning", "torch", "lightning", "torchmetrics", "numpy", "matplotlib")
Cell = Callable[[Mapping[str, Any]], str]
"""What stands in a column, for a row."""
IN_TABLE = (
    *("nll", "nll_standard_error", "reference_nll", "gap", "absolute_error", "correlation", "rank_correlation"),
    *("round_trip", "unconverged", "reference_error", "doubtful"),
)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
td:last-child { white-space: normal; }
img { max-width: 100%; height: auto; }
code { background: #f4f4f4; padding: 0 .2rem; }
"""


@dataclass(frozen=True)
class Report:
    """What a test has shown."""

    title: str
    run: Path
    """Folder of the run, to which the checkpoint's path is relative."""
    checkpoint: str | Path | None
    samples: int
    """Test samples, of all processes."""
    device: str
    unit: str  # of negative log-likelihoods
    reference_name: str
    parts: Sequence[Part]
    rows: Sequence[Mapping[str, Any]]
    """One per step count, and the reference's, whose ``steps`` is ``None``."""
    metrics: Mapping[str, float]
    """What else was logged in the test, by name."""
    figures: Sequence[str]
    """Names of the PNG files beside the report."""
    ranked_by: int
    """Step count whose likelihoods rank images."""
    diagnosis: Diagnosis | None = None
    log_scale: float = 0.0
    """Of a table's own units, nats (:attr:`~f2d2_lightning.data.Table.log_scale`)."""
    command: Sequence[str] = field(default_factory=lambda: list(sys.argv))
    date: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    def markdown(self) -> str:
        """The report; its figures are referred to by their names, beside it."""
        parts = [[p.name, f"`{p.kind}`", f"{p.trainable:,}", f"{p.frozen:,}", p.note] for p in self.parts]
        sections = [f"# {self.title}", self._origin(), "## Likelihoods", self._likelihoods()]
        sections += [*self._diagnosis(), *self._others(), "## Model"]
        sections.append(_table(["part", "class", "trainable parameters", "frozen parameters", ""], parts))
        sections += ["## Figures"] if self.figures else []
        for name in self.figures:
            sections += [f"![{name.replace('_', ' ')}]({name}.png)", f"*{self._caption(name)}*"]
        return "\n\n".join(sections) + "\n"

    def _origin(self) -> str:
        command = shlex.join([Path(self.command[0]).name, *self.command[1:]]) if self.command else ""
        checkpoint = "none: the weights in memory"
        if self.checkpoint is not None:
            path = _short(Path(self.checkpoint).resolve(), self.run.resolve(), Path.cwd())
            checkpoint = f"`{path}`, relative to the run's folder"
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
        about = {
            "date": f"{self.date:%Y-%m-%d %H:%M} {self.date.tzname() or ''}".strip(),
            "command": f"`{without_machine_paths(command, Path.cwd())}`",
            "checkpoint": checkpoint,
            "test samples": f"{self.samples:,}",
            "device": self.device,
            "versions": f"Python {sys.version.split()[0]}, {versions}",
        }
        return _table(["", ""], [[name, text] for name, text in about.items()])

    def _likelihoods(self) -> str:
        unit, whose = self.unit, self.reference_name
        few = [row for row in self.rows if row["steps"] is not None]
        # NaN, or nothing at all, for a map that does not come back
        trips = any(math.isfinite(row.get("round_trip", math.nan)) for row in few)
        failures = any(row.get("unconverged", 0.0) > 0 for row in few)
        more: dict[str, Cell] = {}
        if trips:
            more["round trip"] = lambda row: f"{row['round_trip']:.3g}"
        if failures:
            more["unconverged"] = lambda row: f"{100 * row['unconverged']:.1f} %"
        head, lines = likelihood_table(self.rows, f"NLL, {unit}", whose, more)
        bound = "" if unit == "nats" else " (an upper bound: uniform dequantization)"
        notes = [
            f"NLL{bound}, gap and mean absolute error are in {unit}, ± standard errors over samples. The gap is "
            f"few-step less {whose}, on the same samples; r and rank r are Pearson's and Spearman's correlation."
        ]
        if any(abs(row["nll"] - row["reference_nll"] - row["gap"]) > 1e-4 for row in few):
            notes.append(f"Few-step NLL is over all samples; the {whose}'s, and what is compared with it, over fewer.")
        if trips:
            notes.append(
                "The round trip is the root mean square, per dimension and in units of the state, of data to noise and "
                "back in as many steps."
            )
        error = few[-1].get("reference_error", math.nan) if few else math.nan
        if error > 0:
            notes.append(
                f"The {whose}'s own likelihood of a sample has a standard error of {number(error)}, root mean square "
                "over samples, from its random probes."
            )
        notes += [said_of_units(self.log_scale)] if self.log_scale else []
        notes += [f"**In {row['steps']} steps doubtful**: {row['doubt']}." for row in few if row.get("doubt")]
        if failures:
            notes.append("Unconverged is the share of samples whose inversion failed; other columns leave them out.")
        return _table(head, lines) + "\n\n" + " ".join(notes)

    def _diagnosis(self) -> list[str]:
        if self.diagnosis is None:
            return []
        names = ("error", "targets", "probes", "head", "map")
        head = ["steps", f"mean error, {self.unit}", "by the targets", "by their probes", "by the head", "by the map"]
        lines = [[str(row.steps), *(number(getattr(row, name)) for name in names)] for row in self.diagnosis.rows]
        return ["## Where the error comes from", str(self.diagnosis), _table(head, lines)]

    def _others(self) -> list[str]:
        by_steps: dict[str, dict[int, float]] = {}
        plain = []
        for name, value in sorted(self.metrics.items()):
            if found := re.fullmatch(r"(.+)_(\d+)", name):
                by_steps.setdefault(found[1], {})[int(found[2])] = value
            else:
                plain.append([name, f"{value:.4g}"])
        parts = []
        if by_steps:
            columns = sorted({k for values in by_steps.values() for k in values})
            lines = [[n, *(f"{of[k]:.4g}" if k in of else "" for k in columns)] for n, of in sorted(by_steps.items())]
            parts.append(_table(["by steps", *map(str, columns)], lines))
        if plain:
            parts.append(_table(["", ""], plain))
        return ["## Other metrics of the test", *parts] if parts else []

    def _caption(self, name: str) -> str:
        reference, unit = self.reference_name, self.unit
        captions = {
            "samples": f"Samples from the same noise at each number of steps, and by integrating the {reference}; data "
            "beside them.",
            "calibration": f"Few-step NLL against that of the {reference}, {unit}, one point per test sample; on the "
            "grey line both are equal. Titles: mean difference and Pearson's correlation.",
            "nll_steps": f"Mean NLL in {unit} against the number of steps. The line is the {reference}, the band its "
            "standard error over samples; bars are standard errors of the difference, over the same samples.",
            "ranked": f"The test images that {self.ranked_by} step{'s' if self.ranked_by > 1 else ''} find most and "
            f"least likely. Beneath each: NLL in {unit}, few-step above, {reference} below.",
            "density": "Log-density in the plane, nats, in one colour scale.",
            "training": "Losses as they were logged, against the optimiser's step.",
        }
        return captions.get(name, name)


def likelihood_table(
    rows: Sequence[Mapping[str, Any]], nll: str, reference_name: str, more: Mapping[str, Cell] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the evaluation's table, as text, with ``nll`` over the negative log-likelihoods.

    ``more`` are columns that only step counts have, beside those that there always are.
    """
    compared: dict[str, Cell] = {
        f"gap to {reference_name}": lambda row: f"{number(row['gap'], True)} ± {number(row['gap_standard_error'])}",
        "r": lambda row: number(row["correlation"]),
        "rank r": lambda row: number(row["rank_correlation"]),
        "mean error": lambda row: number(row["absolute_error"]),
        **(more or {}),
    }
    if any(row.get("doubt") for row in rows):
        compared["doubt"] = lambda row: "doubtful, see below" if row.get("doubt") else ""
    lines = []
    for row in rows:
        of_steps = row["steps"] is not None
        lines.append(
            [
                str(row["steps"]) if of_steps else reference_name,
                f"{row['evaluations']:,}",
                f"{number(row['nll'])} ± {number(row['nll_standard_error'])}",
                *(cell(row) if of_steps else "" for cell in compared.values()),
                f"{row['milliseconds']:.3g}",
            ]
        )
    return ["steps", "evaluations", nll, *compared, "ms per sample"], lines


def said_of_units(log_scale: float) -> str:
    """How likelihoods of standardised rows are those of a table's own."""
    return (
        f"NLL is of standardized rows; in the table's own units, those of f2d2 nll, it is {log_scale:+.4f} nats more."
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _short(path: Path, *folders: Path) -> str:
    """``path`` from the first of the folders that it is in, else its name alone."""
    inside = [path.relative_to(folder).as_posix() for folder in folders if path.is_relative_to(folder)]
    return inside[0] if inside else path.name


def without_machine_paths(text: str, folder: Path) -> str:
    """A command line in which absolute paths are relative to ``folder``, or cut to their names if they are elsewhere.

    >>> here = Path.cwd()
    >>> without_machine_paths(f"f2d2 test --config={here}/work/a.yaml --ckpt {here.parent}/b.ckpt s3://c/d", here)
    'f2d2 test --config=work/a.yaml --ckpt b.ckpt s3://c/d'
    """
    absolute = r"(?<![\w.~/-])(?:[A-Za-z]:[\\/]|/(?!/))[^\s\"',=:;\]}]+"
    return re.sub(absolute, lambda found: _short(Path(found[0]), folder), text)


def other_metrics(metrics: Mapping[str, Any], steps: Sequence[int]) -> dict[str, float]:
    """What was logged as ``test/NAME`` and is not in the table of likelihoods, by ``NAME``."""
    known = {*IN_TABLE, *(f"{name}_{k}" for name in IN_TABLE for k in steps)}
    named = {name.removeprefix("test/"): float(value) for name, value in metrics.items() if name.startswith("test/")}
    return {name: value for name, value in named.items() if name not in known}


def read_curves(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Losses that a CSV logger has written to ``metrics.csv``, ``metrics-1.csv`` and so on: steps and values by name.

    Where the sessions of a resumed run overlap, the later one counts.
    """
    files = [p for p in folder.glob("metrics*.csv") if re.fullmatch(r"metrics(-\d+)?", p.stem)]
    curves: dict[str, dict[int, float]] = {}
    for path in sorted(files, key=lambda path: int(path.stem.partition("-")[2] or 0)):
        found: dict[str, dict[int, float]] = {}
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and re.fullmatch(r"(train|val)/(\w*_)?loss(_epoch)?", name or ""):
                        found.setdefault(name, {})[int(row["step"])] = float(value)
        for name, points in found.items():
            before = {step: v for step, v in curves.get(name, {}).items() if step < min(points)}
            curves[name] = before | points
    # the loss itself first, then its parts
    names = sorted(curves, key=lambda name: (not name.startswith("train/"), not name.endswith("/loss"), name))
    return {name: ([*sorted(curves[name])], [v for _, v in sorted(curves[name].items())]) for name in names}


def to_json(value: Any) -> str:
    """JSON that any parser reads: NaN and infinity, which it has no numbers for, become ``null``."""
    plain = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(plain, indent=2) + "\n"


def page(markdown: str, folder: Path) -> str:
    """The text of a report as HTML, its pictures, files of ``folder``, within it.

    Tags in the text stay text, so that names of columns or paths cannot become a page's own.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for token in tokens:
        for part in token.children or ():
            if part.type == "image":
                content = base64.b64encode((folder / str(part.attrs["src"])).read_bytes()).decode()
                part.attrs["src"] = f"data:image/png;base64,{content}"
    title = escape(markdown.splitlines()[0].lstrip("# "))
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = parser.renderer.render(tokens, parser.options, {})
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'
