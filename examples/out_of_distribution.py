"""Out-of-distribution detection by the likelihood, in one to eight evaluations instead of hundreds.

Scans of digits are told from altered ones by their log-likelihood under a few-step student, and under its teacher on
the same dequantized points. The area under the ROC curve (AUROC) is the chance that an altered image gets the higher
score: once for ``-log p``, once for ``|log p - mean|`` with the mean of validation images.

The likelihood is a weak detector where the altered images are as smooth as the data or smoother: a model may find
them as likely or MORE likely (Nalisnick et al., "Do Deep Generative Models Know What They Don't Know?", 2019,
https://arxiv.org/abs/1810.09136), and AUROC is one half or less, as for averages of two digits here. To be too likely
is untypical as well, which the second score uses (Nalisnick et al., "Detecting Out-of-Distribution Inputs to Deep
Generative Models Using Typicality", 2019, https://arxiv.org/abs/1906.02994); for single images it does not help here.
What this shows is not that the score is good, but that few evaluations give the score that many would.

A student follows its teacher where its trajectories were, and detection asks what lies elsewhere. So they also start
from blends of images and from changed contrast (:class:`Widened`), which the teacher never sees. With ``--widen 0``
they start from the data, and the student finds just such images more likely than its teacher does.

Takes about three minutes on one core; ``--steps 20`` shows that it runs, ``--ckpt`` takes a trained student of
digits.

    python examples/out_of_distribution.py
    python examples/out_of_distribution.py --ckpt runs/digits/student/checkpoints/last.ckpt
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

import f2d2_lightning as f2
from f2d2_lightning.nn import PreconditionedMLP

SHAPE, LEVELS, STEPS = (1, 8, 8), 17, (1, 2, 4, 8)


def alterations() -> dict[str, Callable[[Tensor], Tensor]]:
    """What is done to images, ``(N, 1, 8, 8)`` integers 0 to 16, to the same."""
    generator = torch.Generator().manual_seed(0)

    def shuffle(k: Tensor) -> Tensor:
        order = torch.rand(len(k), 64, generator=generator).argsort(1)
        return k.flatten(1).gather(1, order).reshape(k.shape)

    return {
        "rotated by 90 degrees": lambda k: k.rot90(1, (-2, -1)),
        "mirrored": lambda k: k.flip(-1),
        "upside down": lambda k: k.flip(-2),
        "average of two": lambda k: (k.int() + k.roll(1, 0).int()).div(2, rounding_mode="floor").to(k.dtype),
        "pixels shuffled": shuffle,
        "grey levels inverted": lambda k: LEVELS - 1 - k,
        "half contrast": lambda k: k.div(2, rounding_mode="floor"),
    }


class Widened(f2.data.Digits):
    """Training images for the student: some as they are, some blended with another one, some of less contrast.

    Args:
        widen: Share of images that are altered, in [0, 1]; two blends to one change of contrast.
    """

    def __init__(self, widen: float, batch_size: int = 512) -> None:
        super().__init__(batch_size=batch_size)
        self.widen = widen

    def splits(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Four times as many training images, so that an image comes in several forms."""
        splits = super().splits()
        k = splits["train"][0].repeat(4, 1, 1, 1).float()
        generator = torch.Generator().manual_seed(1)
        other = k[torch.randperm(len(k), generator=generator)]
        share, kind = torch.rand(2, len(k), 1, 1, 1, generator=generator)
        widened = torch.where(kind < 2 / 3 * self.widen, (1 - share) * k + share * other, (0.2 + 0.8 * share) * k)
        values = torch.where(kind < self.widen, widened, k).round().to(torch.uint8)
        return splits | {"train": (values, None)}


def train(steps: int, widen: float) -> f2.F2D2Module:
    """A small teacher and its student."""

    def fit(module: f2.modules.FlowModule, data: f2.data.Digits) -> None:
        trainer = L.Trainer(
            max_steps=steps,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=data)

    backbone = PreconditionedMLP(SHAPE, width=256, dropout=0.4)
    teacher = f2.FlowMatchingModule(
        backbone,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-3, weight_decay=2.0, betas=(0.9, 0.99)),
        ema_decay=0.998,
    )
    fit(teacher, f2.data.Digits(batch_size=256))
    student = f2.F2D2Module(
        PreconditionedMLP(SHAPE, width=256),
        teacher=teacher,
        head=f2.DivergenceHead(256, layers=0, per_axis=True, baseline=copy.deepcopy(backbone.baseline)),
        objective=f2.TrajectoryRegression(
            nodes=40,
            capacity=6000,
            starts={"data": 0.6, "perturbed": 0.1, "mixed": 0.1, "path": 0.05, "noise": 0.15},
            unroll=0.5,
        ),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.99)),
        warmup=100,
        ema_decay=0.998,
    )
    fit(student, Widened(widen))
    return student


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Chance that an outside score, ``(M,)``, exceeds an inside one, ``(N,)``; ties count half."""
    # as ranks in [0, 1]: torchmetrics puts other numbers through a sigmoid, where large scores become equal
    ranks = torch.cat((inside, outside)).unique(return_inverse=True)[1].double()
    target = torch.cat((torch.zeros(len(inside)), torch.ones(len(outside)))).long()
    return float(binary_auroc(ranks / ranks.max(), target))


def scores(log_prob: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Higher is more out of distribution: ``-log p``, and how far from what is usual, ``(N,)`` each."""
    return -log_prob, (log_prob - mean).abs()


def main() -> None:
    """Train, score, and compare with the teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1800, help="training steps, of teacher and of student")
    parser.add_argument("--widen", type=float, default=0.75, help="share of the student's images that are altered")
    parser.add_argument("--ckpt", type=str, help="a student's checkpoint instead, whose teacher is where it was")
    parser.add_argument("--seed", type=int, default=0, help="of everything random but the noise on test images")
    options = parser.parse_args()
    L.seed_everything(options.seed, verbose=False)
    if options.ckpt is None:
        student = train(options.steps, options.widen)
    else:
        student = f2.load(options.ckpt)
    velocity, reference = student.teacher_velocity(), f2.Reference(steps=100, probes=1)

    methods: dict[str, Callable[[Tensor], Tensor]] = {
        f"{steps} step{'s' if steps > 1 else ''}": lambda x, steps=steps: student.log_prob(x, steps).value
        for steps in STEPS
    }
    methods["teacher"] = lambda x: reference(velocity, x).value

    def evaluate(values: Tensor, seed: int) -> dict[str, Tensor]:
        points = f2.data.DequantizedDataset(values, quantization=f2.Quantization(LEVELS), seed=seed)
        x = points.__getitems__(list(range(len(points))))
        with torch.no_grad():
            return {name: method(x) for name, method in methods.items()}

    data = f2.data.Digits()
    # a short run shows that it runs, on a few images; the teacher's likelihoods are most of the time
    count = 300 if options.ckpt or options.steps >= 100 else 20
    test = data.dataset("test").values[:count]
    inside = evaluate(test, 0)
    usual = {name: value.mean() for name, value in evaluate(data.dataset("val").values[:count], 1).items()}
    table: dict[str, list[dict[str, float]]] = {}
    for row, (altered, alter) in enumerate(alterations().items()):
        outside = evaluate(alter(test), 2 + row)
        both = {n: zip(scores(inside[n], usual[n]), scores(outside[n], usual[n]), strict=True) for n in methods}
        found = {n: [auroc(*pair) for pair in pairs] for n, pairs in both.items()}
        table[altered] = [{name: values[score] for name, values in found.items()} for score in range(2)]

    for score, title in enumerate(("AUROC of -log p", "AUROC of |log p - mean|")):
        print(f"\n{title:24}" + "".join(f"{name:>9}" for name in methods))
        for altered, rows in table.items():
            print(f"{altered:24}" + "".join(f"{value:9.3f}" for value in rows[score].values()))
    print(
        f"\n{len(test)} test images and as many of each alteration; the teacher takes {2 * reference.steps} evaluations"
    )
    for name in list(methods)[:-1]:
        worst = [max(abs(rows[score][name] - rows[score]["teacher"]) for rows in table.values()) for score in range(2)]
        print(
            f"{name}: log p {float(inside[name].mean()):.2f} (teacher {float(inside['teacher'].mean()):.2f}), AUROC at "
            f"most {worst[0]:.4f} from the teacher's, {worst[1]:.4f} for |log p - mean|"
        )


if __name__ == "__main__":
    main()
