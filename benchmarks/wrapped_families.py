"""Likelihoods of few-step models that were trained without any: four families, before and after wrapping, on digits.

For each family a plain network (``examples/third_party_models.py``) is trained on scikit-learn's digits in its own
calling convention, then wrapped by an adapter, and bits per dimension of the 300 test images in 8, 4, 2 and 1 steps are
compared with a fine reference of the same model:

- before: Euler steps of the model's own instantaneous velocity from data to noise, one divergence each;
- joint: fine-tuned in both directions with a divergence head;
- frozen: only the head is trained, the likelihood is found by inverting the model's own jumps. What the sampler, as it
  is, really gives the images is known too: the logarithm of its jumps' full Jacobian determinant, on 100 of them.

Samples from the same noise are scored by Frechet's distance on features of a small classifier, and by the reference.
Every stage is kept under ``--out`` and not repeated. About 10 minutes a family on one core.

    python benchmarks/wrapped_families.py --families shortcut meanflow consistency flow_map
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import f2d2_lightning as f2
import measuring
from f2d2_lightning.adapters import AdaptedFlowMap, Consistency, Denoiser, MeanFlow, Shortcut, TwoTime
from measuring import kept, quiet_trainer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import third_party_models as third_party

SHAPE, LEVELS, DIM = (1, 8, 8), 17, 64
STEPS = (8, 4, 2, 1)
INTERVAL = "perceptron.time_embedding"
RECIPE: dict[str, Any] = {
    "nodes": 20, "capacity": 12_000, "chunk": 512, "unroll": 0.25, "quantization": f2.Quantization(LEVELS),
    "starts": {"data": 0.1, "perturbed": 0.1, "mixed": 0.25, "path": 0.05, "noise": 0.5},
    "intervals": f2.Intervals("both", diagonal=0.1, grid=0.6, to_noise=0.7),
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How a family is made and wrapped; ``networks`` are what ``train`` gives, the sampler first."""

    networks: tuple[type[nn.Module], ...]
    train: Callable[[Callable[[], Tensor], Tensor, Tensor, int], tuple[nn.Module, ...]]
    wrap: Callable[[nn.Module, bool], AdaptedFlowMap]
    teacher: Callable[[tuple[nn.Module, ...]], AdaptedFlowMap]
    own_sampler: Callable[[nn.Module, Tensor, int], Tensor] | None = None


def shortcut(network: nn.Module, both: bool) -> AdaptedFlowMap:
    # the network was trained for steps of 1/128 and longer, and the logarithm of a length has no sign
    return Shortcut(second_time="length", shortest_length=1 / 128)(network, interval=INTERVAL if both else None)


def meanflow(network: nn.Module, both: bool) -> AdaptedFlowMap:
    return MeanFlow()(network, directions="both" if both else None)


def flow_map(network: nn.Module, both: bool) -> AdaptedFlowMap:
    return TwoTime("net(s, t, x)")(network, directions="both" if both else None)


def consistency(network: nn.Module, both: bool) -> AdaptedFlowMap:
    return Consistency("net(x, s)")(network, interval=INTERVAL if both else None)


def train_consistency(draw: Callable[[], Tensor], mean: Tensor, std: Tensor, steps: int) -> tuple[nn.Module, nn.Module]:
    each = math.ceil(steps / 1.2)
    denoiser = third_party.train_denoiser(draw, mean, std, each)
    return third_party.train_consistency(draw, denoiser, each), denoiser


def single(train: Callable[..., nn.Module]) -> Callable[..., tuple[nn.Module, ...]]:
    return lambda *arguments: (train(*arguments),)


FAMILIES = {
    "shortcut": Family(
        (third_party.ShortcutNet,), single(third_party.train_shortcut), shortcut, lambda nets: shortcut(nets[0], False)
    ),
    "meanflow": Family(
        (third_party.MeanFlowNet,), single(third_party.train_meanflow), meanflow, lambda nets: meanflow(nets[0], False)
    ),
    "consistency": Family(
        (third_party.ConsistencyNet, third_party.ConsistencyNet),
        train_consistency,
        consistency,
        # a consistency model has no velocity; what it was distilled from has
        lambda nets: Denoiser("net(x, s)")(nets[1]),
        third_party.sample_consistency,
    ),
    "flow_map": Family(
        (third_party.FlowMapNet,), single(third_party.train_flow_map), flow_map, lambda nets: flow_map(nets[0], False)
    ),
}


def pretrained(family: Family, data: f2.data.Digits, steps: int, path: Path) -> tuple[nn.Module, ...]:
    """The family's networks, trained without a likelihood in mind."""
    images = data.dataset("train").values
    quantization = f2.Quantization(LEVELS)

    def draw() -> Tensor:
        return quantization.dequantize(images[torch.randint(len(images), (256,))])

    def make() -> dict[str, Any]:
        many = torch.cat([draw() for _ in range(40)])
        mean, std = many.mean(0), many.std(0)
        networks = family.train(draw, mean, std, steps)
        return {"mean": mean, "std": std, "networks": [network.state_dict() for network in networks]}

    saved = kept(path, make)
    networks = tuple(kind(saved["mean"], saved["std"]) for kind in family.networks)
    for network, state in zip(networks, saved["networks"], strict=True):
        network.load_state_dict(state)
        network.eval().requires_grad_(False)
    return networks


def joint_map(family: Family, networks: tuple[nn.Module, ...], frozen: bool) -> f2.JointFlowMap:
    """The wrapped model, its head not trained yet."""
    network = networks[0]
    if not frozen:
        network = copy.deepcopy(network).requires_grad_(True)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    wrapped = family.wrap(network, not frozen)
    features = wrapped.probe(torch.zeros(2, *SHAPE))
    baseline = f2.GaussianBaseline(SHAPE, "diagonal")
    # features that stay as they are ask for a larger head
    head = f2.DivergenceHead(features, hidden=256, layers=2 if frozen else 0, per_axis=True, baseline=baseline)
    return f2.JointFlowMap(wrapped, head, frozen)


def fine_tuned(
    family: Family, networks: tuple[nn.Module, ...], frozen: bool, data: f2.data.Digits, steps: int, path: Path
) -> f2.JointFlowMap:
    """The wrapped model after fine-tuning; with ``frozen`` of the head only."""
    joint = joint_map(family, networks, frozen)

    def make() -> dict[str, Any]:
        module = f2.F2D2Module(
            joint.flow_map,
            SHAPE,
            teacher=family.teacher(networks),  # type: ignore[arg-type]
            head=joint.head,
            frozen=frozen,
            levels=LEVELS,
            objective=f2.objectives.VolumeRegression(chunk=256) if frozen else f2.TrajectoryRegression(**RECIPE),
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99)),
            warmup=100,
            ema_decay=0.998,
        )
        quiet_trainer(steps).fit(module, datamodule=data)
        return module.average.state_dict()

    joint.load_state_dict(kept(path, make))
    return joint.eval().requires_grad_(False)


# --- scores ---


def bits(log_prob: Tensor) -> Tensor:
    return f2.bits_per_dim(log_prob, DIM, LEVELS)


def agreement(value: Tensor, reference: Tensor) -> dict[str, float]:
    """Of log-likelihoods in nats, as of bits/dim."""
    return measuring.agreement(bits(value), bits(reference))


def classifier(data: f2.data.Digits, path: Path) -> nn.Sequential:
    """A small classifier of the dequantized training images; its last hidden layer gives features."""
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(DIM, 128), nn.SiLU(), nn.Dropout(0.2), nn.Linear(128, 32), nn.SiLU(), nn.Linear(32, 10)
    )

    def make() -> dict[str, Any]:
        labelled = f2.data.Digits(labels=True).dataset("train")
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        for _ in range(2000):
            rows = torch.randint(len(labelled.values), (128,))
            x = f2.Quantization(LEVELS).dequantize(labelled.values[rows])
            loss = nn.functional.cross_entropy(network(x), labelled.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return network.state_dict()

    network.load_state_dict(kept(path, make))
    return network.eval().requires_grad_(False)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet's distance of the Gaussian fits of two sets of features, ``(N, F)`` and ``(M, F)``.

    Heusel et al., 2017, https://arxiv.org/abs/1706.08500
    """
    a, b = a.double(), b.double()
    first, second = a.T.cov(), b.T.cov()
    values = torch.linalg.eigvals(first @ second).real.clamp(min=0)
    return float((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * values.sqrt().sum())


class Scorer:
    """Scores samples: distance of features to all real images, and likelihood under a velocity."""

    def __init__(self, data: f2.data.Digits, velocity: nn.Module, path: Path) -> None:
        self.network = classifier(data, path)[:-1]
        self.velocity = velocity
        real = torch.cat([data.dataset(split).values for split in ("train", "val", "test")])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.real = self.network(f2.Quantization(LEVELS).dequantize(real))
        self.noise = torch.randn(4000, *SHAPE, generator=torch.Generator().manual_seed(1))

    def __call__(self, samples: Tensor) -> dict[str, float]:
        reference = f2.Reference(steps=100, probes=1)(self.velocity, samples[:200])
        return {"frechet": frechet(self.network(samples), self.real), "log_prob": float(reference.value.mean())}


@torch.no_grad()
def measure(
    family: Family,
    networks: tuple[nn.Module, ...],
    joint: f2.JointFlowMap,
    frozen: f2.JointFlowMap,
    data: f2.data.Digits,
    folder: Path,
) -> dict[str, Any]:
    """All the table's figures of one family."""
    teacher, original = family.teacher(networks), family.wrap(networks[0], False)
    x = next(iter(data.test_dataloader()))
    reference = f2.Reference(steps=250, probes=2)(teacher, x)
    error = float(reference.standard_error.square().mean().sqrt() / len(x) ** 0.5 / DIM / math.log(2))
    result: dict[str, Any] = {"reference": {"nll": float(bits(reference.value).mean()), "probe_error": error}}
    train = data.dataset("train").__getitems__(list(range(300)))
    train_reference = f2.Reference(steps=100, probes=1)(teacher, train)
    result["reference"]["nll_train"] = float(bits(train_reference.value).mean())

    def own_velocity(state: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        # of a consistency model, which has none, the straight line to its answer
        return original(state, t, t, cond)

    scorer = Scorer(data, teacher, folder.parent / "classifier.pt")
    made = f2.reference_sample(teacher, scorer.noise, steps=100).state
    result["reference"] |= scorer(made)
    for k in STEPS:
        row: dict[str, Any] = {}
        torch.manual_seed(0)
        euler = f2.reference_log_prob(own_velocity, x, divergence=f2.Hutchinson(16), method="euler", steps=k)
        row["before"] = agreement(euler.value, reference.value) | {"evaluations": euler.evaluations}
        own = family.own_sampler
        before = f2.sample(original, scorer.noise, k).state
        row["before"] |= scorer(before if own is None else own(networks[0], scorer.noise, k))

        answer = f2.log_prob(joint, x, k)
        row["joint"] = agreement(answer.value, reference.value) | {"evaluations": answer.evaluations}
        row["joint"] |= scorer(f2.sample(joint, scorer.noise, k).state)
        answer = f2.log_prob(joint, train, k)
        row["joint"]["gap_train"] = agreement(answer.value, train_reference.value)["gap"]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = f2.log_prob(frozen, x, k, inversion=f2.Inversion(max_iterations=60))
        row["frozen"] = agreement(answer.value, reference.value) | {"evaluations": answer.evaluations}
        row["frozen"]["same_samples"] = bool(torch.equal(f2.sample(frozen, scorer.noise, k).state, before))
        result[str(k)] = row
    return result


@torch.no_grad()
def own_density(frozen: f2.JointFlowMap, reference: Tensor, x: Tensor) -> dict[str, Any]:
    """The head's figure and the reference beside the sampler's own density, by change of variables with every jump."""
    inversion, result = f2.Inversion(max_iterations=60), {}
    for k in STEPS:
        head = f2.log_prob(frozen, x, k, inversion=inversion)
        exact = f2.sample(frozen, head.noise, k, with_log_prob=True, determinant="exact").log_prob
        exact = torch.where(head.value.isfinite(), exact, math.nan)
        result[str(k)] = {"head": agreement(head.value, exact), "exact": agreement(exact, reference)}
    return result


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All stages of one family, each only if it is not kept."""
    family, folder = FAMILIES[name], Path(options.out) / f"seed{options.seed}_steps{options.steps}" / name
    path = folder / "result.pt"
    data = f2.data.Digits(batch_size=512, eval_batch_size=300, seed=options.seed)

    def stage(text: str) -> None:
        L.seed_everything(options.seed, verbose=False)
        print(f"{time.strftime('%H:%M:%S')} {name}: {text}", file=sys.stderr, flush=True)

    stage("its own training")
    networks = pretrained(family, data, math.ceil(1.2 * options.steps), folder / "networks.pt")
    stage("fine-tuning in both directions")
    joint = fine_tuned(family, networks, False, data, options.steps, folder / "joint.pt")
    stage("training the head of the frozen model")
    frozen = fine_tuned(family, networks, True, data, math.ceil(0.6 * options.steps), folder / "frozen.pt")
    stage("measuring")
    result = kept(path, lambda: measure(family, networks, joint, frozen, data, folder))

    def own() -> dict[str, Any]:
        x = next(iter(data.test_dataloader()))[:100]
        reference = f2.Reference(steps=250, probes=1)(family.teacher(networks), x).value
        return own_density(frozen, reference, x)

    stage("measuring the frozen sampler's own density")
    result["own_density"] = kept(folder / "own_density.pt", own)
    stage("done")
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: likelihoods, then samples."""

    def joined(rows: list[dict[str, Any]], key: str, form: str) -> str:
        return " / ".join(format(row[key], form) for row in rows)

    likelihoods, samples = [], []
    for name, result in results.items():
        fine, own = result["reference"], result["own_density"]
        for mode in ("before", "joint", "frozen"):
            rows = [result[str(k)][mode] for k in STEPS]
            head, share = (f"{name} ({fine['nll']:.3f})" if mode == "before" else ""), joined(rows, "share", ".0%")
            cells = joined(rows, "gap", "+.3f"), joined(rows, "r", ".3f"), joined(rows, "evaluations", "")
            likelihoods.append([head, mode, *cells, share if mode == "frozen" else ""])
            if mode != "frozen":
                cells = joined(rows, "frechet", ".2f"), joined(rows, "log_prob", ".1f")
                samples.append([name if mode == "before" else "", mode, *cells])
        for what, key in (
            ("frozen, to the sampler's own density", "head"),
            ("that density, to the reference", "exact"),
        ):
            rows = [own[str(k)][key] for k in STEPS]
            likelihoods.append(["", what, joined(rows, "gap", "+.3f"), joined(rows, "r", ".3f"), "", ""])
        samples.append(["", "velocity, 200 evaluations", f"{fine['frechet']:.2f}", f"{fine['log_prob']:.1f}"])
        same = all(result[str(k)]["frozen"]["same_samples"] for k in STEPS)
        samples.append(["", "frozen", "the same to the bit" if same else "NOT the same", ""])
    first = ["family (reference, bits/dim)", "", "gap at 8 / 4 / 2 / 1 steps", "r, likewise", "evaluations"]
    first.append("converged")
    second = ["family, samples", "", "Frechet distance at 8 / 4 / 2 / 1 steps", "reference log p of samples, nats"]
    return f"{measuring.markdown(first, likelihoods)}\n\n{measuring.markdown(second, samples)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=2500, help="fine-tuning steps; the others are in proportion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/wrapped")
    options = parser.parse_args()
    print(table({name: run(name, options) for name in options.families}))


if __name__ == "__main__":
    main()
