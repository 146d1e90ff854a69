"""Boltzmann generators in one to eight evaluations: two clusters of particles, reweighed to their energy.

The systems are those of ``boltzmann_systems.py``. Samples of Markov chains train a flow, whose network knows that the
particles are alike and that space has no directions (Satorras et al., "E(n) Equivariant Graph Neural Networks", 2021,
https://arxiv.org/abs/2102.09844, and Schütt et al., "PaiNN", 2021, https://arxiv.org/abs/2102.03150), and its few-step
student. For the student at each step count, with the density of its own jumps (exact determinants) and with what its
head says, and for the teacher's ODE: the effective sample size as a share of the samples, ``log Z`` beside that of
annealed populations, the same with the largest weights clipped, the mean energy, and the time a sample takes. Half an
hour on one core for ``dw4``; ``--steps 20`` shows that it runs. What was measured is in ``docs/BOLTZMANN.md``.

    python examples/boltzmann.py --system lj13
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import lightning as L
import torch
from boltzmann_systems import SYSTEMS, Chains, System
from torch import Tensor, nn

import f2d2_lightning as f2
from f2d2_lightning.flows import Direction, FlowMap
from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.flows.paths import expand_time
from f2d2_lightning.likelihood import ImportanceWeights
from f2d2_lightning.nn.preconditioned import AngleEmbedding, GaussianPreconditioned


class Messages(nn.Module):
    """One round: each particle hears from all, and its numbers and vectors change."""

    def __init__(self, embedded: int, features: int, vectors: int, bumps: int) -> None:
        super().__init__()
        self.when, self.pair = nn.Linear(embedded, features), nn.Linear(bumps, features)
        self.sent, self.got = (nn.Linear(features, features, bias=False) for _ in range(2))
        self.pull, self.mix = nn.Linear(features, vectors), nn.Linear(vectors, vectors, bias=False)
        self.change = nn.Sequential(
            nn.Linear(2 * features + vectors, features), nn.SiLU(), nn.Linear(features, features)
        )

    def forward(self, h: Tensor, arrows: Tensor, seen: Tensor, apart: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers ``(B, n, F)`` and vectors ``(B, n, axes, V)``, by distances ``(B, n, n, bumps)`` and directions."""
        own = self.got(h) + self.when(moment)[:, None]
        message = nn.functional.silu(self.pair(seen) + own[:, :, None] + self.sent(h)[:, None])
        arrows = arrows + apart @ self.pull(message)
        lengths = (self.mix(arrows).square().sum(-2) + 0.01).sqrt()
        return h + self.change(torch.cat((h, message.mean(2), lengths), -1)), arrows


class Particles(FlowMap):
    """Average velocity of particles ``(B, dim)``: messages between all pairs, with numbers and vectors at each.

    Samples and their densities only go one way.

    Args:
        system: Whose particles.
        embedding: Of both times.
        features: Numbers at each particle, and in each message.
        vectors: Vectors at each particle.
        rounds: Of messages.
        bumps: That a distance is seen through, from 0 to 6 deviations.
    """

    directions = Direction.TO_DATA

    def __init__(
        self,
        system: System,
        embedding: AngleEmbedding,
        features: int,
        vectors: int = 16,
        rounds: int = 3,
        bumps: int = 24,
    ) -> None:
        super().__init__()
        self.system, self.embedding, self.features = system, embedding, features
        self.register_buffer("bumps", torch.linspace(0, 6, bumps))
        self.start, self.outlet = nn.Linear(embedding.features, features), nn.Linear(features, vectors)
        self.rounds = nn.ModuleList(Messages(embedding.features, features, vectors, bumps) for _ in range(rounds))

    def forward_features(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: object = None
    ) -> tuple[Tensor, Tensor]:
        """As for any flow map; the features are the particles' mean ``(B, features)``."""
        places = self.system.positions(x)
        apart = places[:, :, None] - places[:, None]
        distance = (apart.square().sum(-1, keepdim=True) + 0.01).sqrt()
        seen = (-((distance - self.bumps) * (len(self.bumps) / 6)).square() / 2).exp()
        apart = (apart / (1 + distance)).mT
        moment = nn.functional.silu(self.embedding(expand_time(s, x), expand_time(t, x)))
        h = self.start(moment)[:, None].expand(len(x), places.shape[1], -1)
        arrows = torch.zeros_like(places[..., None])
        for part in self.rounds:
            h, arrows = part(h, arrows, seen, apart, moment)
        return self.system.states((arrows * self.outlet(h)[:, :, None]).sum(-1)), h.mean(1)


def train(module: f2.modules.FlowModule, data: Chains, steps: int) -> None:
    """Train quietly."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    trainer = L.Trainer(max_steps=steps, gradient_clip_val=1.0, limit_val_batches=0, num_sanity_val_steps=0, **off)
    trainer.fit(module, datamodule=data)


def generator(system: System, features: int) -> GaussianPreconditioned:
    """The network, on the Gaussian fit of states that may be turned and reordered: one variance."""
    fit = GaussianBaseline((system.dim,), "isotropic")
    return GaussianPreconditioned(Particles(system, AngleEmbedding(fit), features), fit)


def weighed(system: System, draw: Callable[[Tensor], tuple[Tensor, Tensor]], count: int, rounds: int) -> str:
    """What weights make of ``rounds`` of ``count`` samples and their log-densities, ``draw(noise)``."""
    found, begin = [], time.perf_counter()
    for seed in range(rounds):
        noise = torch.randn(count, system.dim, generator=torch.Generator().manual_seed(seed))
        x, log_q = draw(noise)
        energy = system.energy(x.double())
        weights = ImportanceWeights(-energy, log_q)
        both = (weights, weights.clipped(0.999))
        shares = [float(each.effective_sample_size) / count for each in both]
        offs = [float(each.log_normalizer.value) - system.log_z[0] for each in both]
        found.append((float(log_q.mean()), *shares, *offs, abs(offs[0]), float(weights.mean(energy).value)))
    seconds = time.perf_counter() - begin
    log_q, ess, cut, off, cut_off, size, energy = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    text = f"log p {log_q:.3f}, ESS {ess:.3f}, log Z off by {off:+.4f} ({size:.4f} a round), "
    text += f"clipped ESS {cut:.3f} and {cut_off:+.4f}, energy {energy:.2f}"
    return f"{text}, {1e3 * seconds / (rounds * count):.3f} ms a sample"


def main() -> None:
    """Train teacher and student, reweigh their samples, and compare with annealed populations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=SYSTEMS, default="dw4")
    parser.add_argument("--steps", type=int, default=8000, help="training steps, of the teacher")
    parser.add_argument("--student", type=int, default=20_000, help="training steps, of the student")
    parser.add_argument("--own", type=int, default=4000, help="training steps, of a head for the jumps' own density")
    parser.add_argument("--states", type=int, default=50_000, help="of Markov chains, to train on")
    parser.add_argument("--features", type=int, default=64, help="of the network")
    parser.add_argument("--count", type=int, default=10_000, help="samples that are reweighed in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--teacher", type=int, default=2000, help="samples of the teacher in a round")
    options = parser.parse_args()
    if options.steps < 100:
        options.student = options.own = options.steps
        options.states, options.count, options.teacher, options.rounds = 1000, 100, 20, 2
    L.seed_everything(0, verbose=False)
    system = SYSTEMS[options.system]
    data = Chains(system, options.states)
    adam = lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99))  # noqa: E731
    teacher = f2.FlowMatchingModule(
        generator(system, options.features), optimizer=adam, ema_decay=0.998, coupling=system.aligned
    )
    train(teacher, data, options.steps)
    student = f2.F2D2Module(
        teacher=teacher,
        objective=f2.TrajectoryRegression(starts={"noise": 1.0}),
        optimizer=adam,
        ema_decay=0.998,
    )
    train(student, data, options.student)
    # samples stay as they are; the head goes on, from the teacher's density to that of the jumps themselves
    own = f2.F2D2Module(
        student.average,
        frozen=True,
        objective=f2.objectives.VolumeRegression(capacity=100_000, chunk=512),
        optimizer=adam,
        ema_decay=0.998,
    )
    train(own, data, options.own)
    print(f"log Z {system.log_z[0]} ± {system.log_z[1]}, energy {float(system.energy(data.test.double()).mean()):.2f}")

    def ode(noise: Tensor) -> tuple[Tensor, Tensor]:
        x = f2.reference_sample(teacher.average.velocity, noise, steps=20).state
        return x, f2.reference_log_prob(teacher.average.velocity, x, steps=20).value

    def jumps(noise: Tensor, module: f2.F2D2Module, steps: int, determinant: str | None) -> tuple[Tensor, Tensor]:
        made = module.sample(noise, steps, with_log_prob=True, determinant=determinant)
        return made.state, made.log_prob

    with torch.no_grad():
        for k in (1, 2, 4, 8):
            for source, module, how in (
                ("head", student, None),
                ("own head", own, None),
                ("determinants", own, "exact"),
            ):
                draw = partial(jumps, module=module, steps=k, determinant=how)
                told = weighed(system, draw, options.count, options.rounds)
                print(f"{k} step{'s' * (k > 1)}: by the {source} {told}", flush=True)
        print(f"teacher, 40 evaluations, and 40 for log q: {weighed(system, ode, options.teacher, options.rounds)}")


if __name__ == "__main__":
    main()
