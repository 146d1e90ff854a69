"""Self-guidance: what a step uphill in the model's own likelihood does to samples.

Frechet distance of features and mean log-likelihoods against the scale of guidance, at 1, 2 and 4 steps, with and
without keeping the noise's norm; beside it the plain samplers and the teacher's many evaluations. From the folder of
the runs:

    python benchmarks/self_guidance.py --ckpt runs/digits/student/checkpoints/last.ckpt --data digits \
        --features features_digits.pt --out self_guidance_digits
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import f2d2_lightning as f2
from f2d2_lightning.likelihood import state_images
from f2d2_lightning.metrics import SmallFeatures
from f2d2_lightning.metrics.image import ImageDistance
from f2d2_lightning.metrics.networks import extract_features
from f2d2_lightning.plots import sample_figure, save_figure
from f2d2_lightning.training.loading import load_module

STEPS = (1, 2, 4)
SCALES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


class Study:
    """Samples of one student, scored."""

    def __init__(
        self, module: f2.F2D2Module, network: SmallFeatures, real: Tensor, noise: Tensor, options: argparse.Namespace
    ) -> None:
        self.module, self.network, self.noise, self.judged = module, network, noise, options.judged
        self.scales, self.teacher_steps, self.near_data = options.scales, options.teacher_steps, options.near_data
        self.reference = f2.Reference(steps=100, probes=1, near_data=options.near_data)
        self.distance = ImageDistance(network.num_features)
        self.update(real, True)

    def update(self, states: Tensor, real: bool) -> None:
        module = self.module
        for part in states.split(256):
            images = state_images(part, module.levels, module.low, module.high)
            self.distance.update(extract_features(self.network, images), real)

    def bits(self, log_prob: Tensor) -> float:
        module = self.module
        return float(f2.bits_per_dim(log_prob, module.dim, module.levels, module.low, module.high).mean())

    @torch.no_grad()
    def score(self, states: Tensor) -> dict[str, float]:
        """Frechet distance; bits per dimension under the teacher, and under the student in 8 steps."""
        # what is judged is an image: its levels, dequantized afresh
        module = self.module
        quantization = f2.Quantization(module.levels, module.low, module.high)
        torch.manual_seed(0)
        some = quantization.dequantize(quantization.quantize(states[: self.judged])).float()
        teacher = self.reference(module.teacher_velocity(), some).value
        student = module.log_prob(some, 8).value
        self.distance.reset()
        self.update(states, False)
        return {
            "fid": self.distance.compute()["fid"],
            "teacher": self.bits(teacher),
            "student": self.bits(student),
        }

    def rows(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for steps in STEPS:
            for keep_norm in (False, True):
                for scale in self.scales:
                    if scale == 0 and keep_norm:
                        continue
                    guidance = f2.SelfGuidance(scale, keep_norm=keep_norm) if scale else None
                    with torch.no_grad():
                        made = [self.module.sample(z, steps, guidance=guidance) for z in self.noise.split(1000)]
                    states = torch.cat([part.state for part in made])
                    backward = getattr(made[0], "backward_evaluations", 0)
                    row = {"sampler": f"{steps}", "scale": scale, "keep_norm": keep_norm}
                    yield row | {"forward": made[0].evaluations, "backward": backward} | self.score(states), states
        with torch.no_grad():
            plain = torch.cat([self.module.sample(z, 8).state for z in self.noise.split(1000)])
        yield {"sampler": "8", "scale": 0.0, "keep_norm": False, "forward": 8, "backward": 0} | self.score(plain), plain
        with torch.no_grad():
            velocity, settings = (
                self.module.teacher_velocity(),
                {"steps": self.teacher_steps, "near_data": self.near_data},
            )
            made = [f2.reference_sample(velocity, z, **settings) for z in self.noise.split(500)]
        states = torch.cat([part.state for part in made])
        row = {"sampler": "teacher", "scale": 0.0, "keep_norm": False, "forward": made[0].evaluations, "backward": 0}
        yield row | self.score(states), states


def figure_of(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    axes = figure.subplots(1, 2)
    names = {"fid": "Frechet distance, own features", "teacher": "bits/dim under the teacher"}
    for ax, (name, what) in zip(axes, names.items(), strict=True):
        for index, steps in enumerate(STEPS):
            for keep_norm, style in ((False, "-o"), (True, "--s")):
                mine = [r for r in rows if r["sampler"] == str(steps)]
                line = [r for r in mine if r["keep_norm"] == keep_norm or not r["scale"]]
                label = f"{steps} step{'s' if steps > 1 else ''}{', norm kept' if keep_norm else ''}"
                x, y = [r["scale"] for r in line], [r[name] for r in line]
                ax.plot(x, y, style, color=f"C{index}", label=label, markersize=3, linewidth=1)
        for sampler, style, title in (("8", ":", "8 steps, plain"), ("teacher", "-.", "teacher, {:,} evaluations")):
            (row,) = [r for r in rows if r["sampler"] == sampler]
            ax.axhline(row[name], linestyle=style, color="0.4", linewidth=1, label=title.format(row["forward"]))
        ax.set_xlabel("guidance scale", fontsize=8)
        ax.set_ylabel(what, fontsize=8)
        ax.tick_params(labelsize=7)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", required=True, choices=["digits", "fashion"])
    parser.add_argument("--features", required=True, help="weights from benchmarks/train_features.py")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--judged", type=int, default=200, help="samples whose likelihood the teacher evaluates")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="scales of guidance, 0 among them")
    parser.add_argument("--teacher_steps", type=int, default=500, help="the teacher's, two evaluations each")
    parser.add_argument("--near_data", type=float, default=0.0, help="share of them close to the data")
    parser.add_argument("--out", default="self_guidance")
    options = parser.parse_args()
    module = load_module(options.ckpt, f2.F2D2Module).eval()
    data = f2.data.Digits() if options.data == "digits" else f2.data.FashionMNIST()
    values = data.dataset("train").values[: max(options.samples, 1297)]
    real = f2.Quantization(module.levels, module.low, module.high).dequantize(values).float()
    noise = torch.randn(options.samples, *module.shape, generator=torch.Generator().manual_seed(0))
    study = Study(module, SmallFeatures.load(options.features), real, noise, options)
    rows, pictures = [], {}
    print("| steps | scale | norm kept | evaluations | Frechet distance | bits/dim, teacher | bits/dim, student |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for row, states in study.rows():
        rows.append(row)
        cost = f"{row['forward']:,}" + (f" + {row['backward']} backward" if row["backward"] else "")
        kept = "yes" if row["keep_norm"] else "no"
        print(f"| {row['sampler']} | {row['scale']:g} | {kept} | {cost} | {row['fid']:.3f} | {row['teacher']:.3f} | "
              f"{row['student']:.3f} |", flush=True)  # fmt: skip
        if row["sampler"] in ("2", "8", "teacher") and row["scale"] in (0.0, 0.1, 0.3):
            name = "teacher" if row["sampler"] == "teacher" else f"{row['sampler']} steps"
            scale = f"\nscale {row['scale']:g}" if row["scale"] else "\nplain"
            pictures[name + scale + (", norm kept" if row["keep_norm"] else "")] = states[:36]
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    save_figure(figure_of(rows), out.with_suffix(".png"))
    save_figure(sample_figure(pictures, module.low, module.high, 6), out.with_name(out.name + "_samples.png"))


if __name__ == "__main__":
    main()
