"""What a few-step likelihood costs beside the teacher's, and a divergence head beside its bare backbone.

Ratios of medians measured in one run, the two sides in turn, on the networks of the digits configuration (random
weights: time does not depend on them) and on a small convolutional network for 28 x 28 images.

    python benchmarks/likelihood_cost.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from f2d2_lightning import DivergenceHead, FlowMap, GaussianBaseline, JointFlowMap, Reference, log_prob
from f2d2_lightning.nn import PreconditionedMLP, ResNet


def digits_map() -> tuple[JointFlowMap, tuple[int, ...]]:
    shape = (1, 8, 8)
    backbone = PreconditionedMLP(shape, "diagonal", width=512, blocks=2)
    head = DivergenceHead(512, layers=0, per_axis=True, baseline=GaussianBaseline(shape, "diagonal"))
    return JointFlowMap(backbone, head).eval(), shape


def image_map() -> tuple[JointFlowMap, tuple[int, ...]]:
    shape = (1, 28, 28)
    backbone = ResNet(shape, width=32)
    return JointFlowMap(
        backbone, DivergenceHead(32, hidden=32, baseline=GaussianBaseline(shape, "isotropic"))
    ).eval(), shape


def seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def medians(calls: list[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Median seconds of each, taken in turn, after one warm-up round."""
    for call in calls:
        call()
    rounds = [[seconds(call, device) for call in calls] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def forward_and_backward(flow_map: FlowMap | JointFlowMap, x: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> None:
    answer = flow_map(x, s, t)
    if isinstance(answer, tuple):
        loss = answer[0].square().sum() + answer[1].square().sum()
    else:
        loss = answer.square().sum()
    flow_map.zero_grad()
    loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    runs = (("digits MLP", digits_map, options.batch), ("28 x 28 residual network", image_map, options.batch // 8))
    for name, make, batch in runs:
        torch.manual_seed(0)
        joint, shape = make()
        joint.to(device)
        x = torch.randn(batch, *shape, device=device)
        s, t = torch.rand(2, batch, device=device)
        one, less = torch.tensor([1.0, 0.75], device=device)
        steps = (1, 2, 4, 8)
        # the teacher's cost is linear in its evaluations: a fiftieth of them is timed
        fiftieth = Reference(method="euler", steps=20, probes=1)
        with torch.no_grad():
            few = medians([lambda k=k: log_prob(joint, x, k) for k in steps], options.repeats, device)
            (reference,) = medians([lambda: fiftieth(joint.velocity, x)], 3, device)
            bare, whole = medians(
                [lambda: joint.flow_map(x, one, less), lambda: joint(x, one, less)], 4 * options.repeats, device
            )
        bare_step, whole_step = medians(
            [lambda: forward_and_backward(joint.flow_map, x, s, t), lambda: forward_and_backward(joint, x, s, t)],
            2 * options.repeats,
            device,
        )
        print(f"\n{name}, {sum(p.numel() for p in joint.parameters()) / 1e6:.2f} M parameters, batch {batch}")
        for k, value in zip(steps, few, strict=True):
            print(
                f"  log p in {k} step{'s' if k > 1 else ' '}: {1e3 * value:8.2f} ms, "
                f"{50 * reference / value:6.0f} times cheaper than 1,000 Hutchinson evaluations"
            )
        on_grid, at_random = whole / bare - 1, whole_step / bare_step - 1
        print(f"  head over bare backbone: evaluation on a grid {on_grid:+.1%}")
        print(f"  head over bare backbone: forward and backward at random times {at_random:+.1%}")


if __name__ == "__main__":
    main()
