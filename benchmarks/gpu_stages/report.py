"""What the stages found, in Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_stages.fashion import STUDENTS
from gpu_stages.kept import DONE
from measuring import markdown

__all__ = ["write"]


KINDS = ("backbone", "estimator", "objective", "adapter")
"""Checks by the first word of their names; all others are of likelihoods."""


def _largest(found: list[dict[str, float | None]], setting: str) -> str:
    """Of the errors in a setting that not every check has; those that raised are among what failed."""
    errors = [e for e in (row.get(setting) for row in found) if e is not None]
    return f"{max(errors):.1e}" if errors else ""


def _failures(result: dict[str, Any]) -> list[str]:
    if not result["failures"]:
        return ["Nothing failed.", ""]
    return ["Failed then:", "", *(f"- {name}: {why.splitlines()[0]}" for name, why in result["failures"].items()), ""]


def _devices(result: dict[str, Any]) -> list[str]:
    rows = result["rows"]
    settings = list(dict.fromkeys(setting for errors in rows.values() for setting in errors))
    kinds: dict[str, list[dict[str, float | None]]] = {}
    for name, errors in rows.items():
        first = name.split()[0]
        kinds.setdefault(first if first in KINDS else "likelihood", []).append(errors)
    table = [[f"{kind} ({len(found)})", *(_largest(found, s) for s in settings)] for kind, found in kinds.items()]
    return [
        "Largest relative error against float64 on the CPU, same weights, states and random numbers:",
        "",
        markdown(["checks", *settings], table),
        "",
        *_failures(result),
    ]


def _training(result: dict[str, Any]) -> list[str]:
    table = [
        [name, f"{row['error']:.1e}" if "error" in row else "", f"{row['seconds']:.1f}"]
        for name, row in result["rows"].items()
    ]
    return [
        "How far 8 steps moved the weights, against the same steps on the CPU in float32, relative; of resumed runs "
        "the largest difference of a weight to an uninterrupted run (a callback's host draws its own random numbers, "
        "which Lightning does not restore):",
        "",
        markdown(["run", "error", "s"], table),
        "",
        *_failures(result),
    ]


def _speed(result: dict[str, Any]) -> list[str]:
    parts = [line for name, text in result["tables"].items() for line in (f"**{name}**", "", text.strip(), "")]
    for name, table in result.get("profile", {}).items():
        parts += [f"Where a step goes ({name}):", "", "```", table.strip(), "```", ""]
    return parts


def _fashion(results: dict[str, dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    distances = {stage: result["Frechet distance"] for stage, result in results.items()}
    if distances:
        steps = sorted({k for found in distances.values() for k in found}, key=int)
        table = [
            [f"{stage} ({results[stage]['parameters'] / 1e6:.2f} M, {results[stage]['steps']:,} steps, "
             f"{results[stage]['seconds']:.0f} s)", *(f"{found[k]:.1f}" if k in found else "" for k in steps)]
            for stage, found in distances.items()
        ]  # fmt: skip
        lines += ["Frechet distance to the training images, own features, by evaluations:", ""]
        lines += [markdown(["trained", *steps], table), ""]
    teacher = results.get("teacher", {})
    if "reference" in teacher:
        lines += [f"Reference: {teacher['reference']}, {teacher['seconds of the reference']:.0f} s.", ""]
    columns = ("nll", "gap", "gap_error", "error", "r")
    rows = []
    for stage, result in results.items():
        for k, row in result.get("likelihood", {}).items():
            own = result["own density"].get(k)
            beside = [f"{own['gap']:+.4f}", f"{own['error']:.4f}"] if own else ["", ""]
            rows.append([stage, k, *(f"{row[c]:.4f}" for c in columns), *beside])
    if rows:
        lines += [
            "Likelihood of test images in bits/dim, beside the teacher's "
            f"({teacher['reference, bits/dim']:.4f}, spread {teacher['spread of the reference, bits/dim']:.3f}) and, "
            "of 64 images, beside the change of volume of the map's own jumps (estimated by Arnoldi's iteration):",
            "",
            markdown(
                ["trained", "steps", "NLL", "gap", "± its error", "mean error", "r", "own gap", "own error"],
                rows,
            ),
            "",
        ]
    return lines


def write(folder: Path, out: Path) -> None:
    """Write the report on the results of a folder."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    lines = ["# On a GPU", "", "Made by `python benchmarks/gpu.py report`.", ""]
    sections = {"devices": ("Everything that computes", _devices), "training": ("Training", _training)}
    sections["speed"] = ("Time and memory", _speed)
    for stage, (title, text) in sections.items():
        if stage in found:
            lines += [f"## {title}", "", _where(found[stage]), "", *text(found[stage])]
    fashion = {stage: found[stage] for stage in ("teacher", *STUDENTS) if stage in found}
    if fashion:
        lines += ["## Fashion-MNIST at full size", "", _where(next(iter(fashion.values()))), "", *_fashion(fashion)]
        pictures = [path.name for path in sorted(folder.glob("fashion_*.png"))]
        lines += [f"![{name}]({name})" for name in pictures]
    out.write_text("\n".join(lines).rstrip() + "\n")
    print(out)


def _where(result: dict[str, Any]) -> str:
    small = "; small sizes, which show that it runs" if result["tiny"] else ""
    took = f"{result[DONE]:.0f} s" if DONE in result else "cut off, and not all of it is here"
    return f"{result['machine']}, torch {result['torch']}; {took}{small}."
