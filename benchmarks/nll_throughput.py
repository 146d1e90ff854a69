"""Likelihoods per second: a few steps of a joint map beside the teacher's 1,000 evaluations, and what the head costs.

Medians taken in turn within one run, on networks of random weights: time does not depend on them. The teacher's cost is
linear in its evaluations, so ``--measured`` Euler steps with one Hutchinson probe each are timed and the time of 1,000
is extrapolated. The second table compares a joint map with its bare backbone, evaluated on a grid and trained.

    python benchmarks/nll_throughput.py
    python benchmarks/nll_throughput.py --device cuda --networks unet --batch 256 --dtype bf16 --compile --channels-last
"""

from __future__ import annotations

import argparse

import torch

from f2d2_lightning import FlowMap, JointFlowMap, Reference, log_prob
from f2d2_lightning.modules._compile import compile_network
from measuring import NETWORKS, dtype_of, make_joint, markdown, medians, wake

STEPS = (1, 2, 4, 8)
EVALUATIONS = 1000  # of the teacher's likelihood


def forward_and_backward(flow_map: FlowMap | JointFlowMap, x: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> None:
    answer = flow_map(x, s, t)
    parts = answer if isinstance(answer, tuple) else (answer,)
    flow_map.zero_grad()
    sum(part.square().sum() for part in parts).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=("digits", "resnet"))
    parser.add_argument("--batch", type=int, help="images at a time; 256 for digits, 8 otherwise")
    parser.add_argument("--resolution", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--measured", type=int, default=20, help="evaluations of the teacher that are timed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bf16", "fp16"), default="float32", help="autocast, of both sides"
    )
    parser.add_argument(
        "--compile", action="store_true", help="of the joint map; derivatives do not pass compiled code"
    )
    parser.add_argument("--channels-last", action="store_true", help="of both sides")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), dtype_of(options.dtype)
    extras = [option for option in ("compile", "channels_last") if getattr(options, option)]
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, "
        f"{', '.join([options.dtype, *extras])}; the teacher's {EVALUATIONS} evaluations from {options.measured}"
    )
    speeds, costs = [], []
    for name in options.networks:
        torch.manual_seed(0)
        batch = options.batch or (256 if name == "digits" else 8)
        joint = make_joint(name, options.resolution, options.channels, options.width).to(device).eval()
        wake(joint)
        if options.channels_last:
            joint.to(memory_format=torch.channels_last)
        assert joint.head.baseline is not None
        x = torch.randn(batch, *joint.head.baseline.shape, device=device)
        s, t = torch.rand(2, batch, device=device)
        one, less = torch.tensor([1.0, 0.75], device=device)
        teacher = Reference(method="euler", steps=options.measured, probes=1)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            with torch.inference_mode():
                (reference,) = medians([lambda: teacher(joint.velocity, x)], 3, device, warm=1)
            if options.compile:
                compile_network(joint.flow_map)
            with torch.inference_mode():
                few = medians([lambda k=k: log_prob(joint, x, k) for k in STEPS], options.repeats, device)
                bare, whole = medians(
                    [lambda: joint.flow_map(x, one, less), lambda: joint(x, one, less)], 2 * options.repeats, device
                )
            bare_step, whole_step = medians(
                [lambda: forward_and_backward(joint.flow_map, x, s, t), lambda: forward_and_backward(joint, x, s, t)],
                options.repeats,
                device,
            )
        reference *= EVALUATIONS / options.measured
        label = f"{name}, {sum(p.numel() for p in joint.parameters()) / 1e6:.2f} M parameters, batch {batch}"
        for k, value in zip(STEPS, few, strict=True):
            speeds.append([f"{label}: {k} step{'s' if k > 1 else ''}", f"{batch / value:,.0f}",
                           f"{1e3 * value:.1f}", f"{reference / value:.0f}"])  # fmt: skip
        speeds.append([f"{label}: teacher", f"{batch / reference:,.2f}", f"{1e3 * reference:.0f}", "1"])
        costs.append([label, f"{whole / bare - 1:+.1%}", f"{whole_step / bare_step - 1:+.1%}"])
    print("\n" + markdown(["log-likelihood", "images/s", "ms a batch", "times the teacher's speed"], speeds))
    print("\n" + markdown(["head over bare backbone", "evaluation on a grid", "forward and backward"], costs))


if __name__ == "__main__":
    main()
