"""A recipe: everything that decides how one student is trained and asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

import f2d2_lightning as f2
from calibration_study.problems import Problem
from calibration_study.variants import AveragedTargets, WithoutGradient
from f2d2_lightning.likelihood import LogProb
from official.module import official_log_prob

__all__ = ["Query", "Recipe", "StudyModule", "inverted", "official", "own"]

Query = Callable[[f2.JointFlowMap, torch.Tensor, Any], LogProb]
"""How a log-likelihood is asked for: ``(joint map, x, steps)``."""


def own(joint: f2.JointFlowMap, x: torch.Tensor, steps: Any) -> LogProb:
    """The map's own way to noise."""
    return f2.log_prob(joint, x, steps)


def inverted(joint: f2.JointFlowMap, x: torch.Tensor, steps: Any) -> LogProb:
    """Its way to data, inverted step by step."""
    return f2.log_prob(joint, x, steps, inversion=f2.Inversion(max_iterations=60))


def official(joint: f2.JointFlowMap, x: torch.Tensor, steps: Any) -> LogProb:
    """The official script's query."""
    return official_log_prob(joint, x, steps)


@dataclass
class Recipe:
    """How a student is trained. :meth:`of` gives a problem's starting point; choices change a copy.

    Args:
        problem: Teacher and data.
        make_objective: Makes the objective from the finished recipe.
        directions: That are trained.
        trajectories: Arguments of :class:`TrajectoryRegression`.
        intervals: Arguments of :class:`Intervals`.
        weighting: How errors become a loss.
        estimator: Divergence estimator of targets.
        head: Arguments of the head; ``network`` for one of its own.
        covariance: Of the head's baseline; ``None`` for no baseline.
        detached: The head's gradients stop at the backbone's features.
        frozen: Only the head is trained, on the backbone that was trained without one.
        ema_decay: Of the weight average.
        precision: Lightning's.
        cache: Folder of trajectories that students share.
    """

    problem: Problem
    make_objective: Callable[[Recipe], f2.objectives.Objective]
    directions: str = "both"
    trajectories: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, Any] = field(default_factory=dict)
    weighting: f2.Weighting = field(default_factory=f2.Weighting)
    estimator: f2.divergence.DivergenceEstimator = field(default_factory=f2.Hutchinson)
    head: dict[str, Any] = field(default_factory=dict)
    covariance: str | None = None
    detached: bool = False
    frozen: bool = False
    ema_decay: float = 0.998
    precision: Any = "32-true"
    cache: str | None = None

    @classmethod
    def of(cls, problem: Problem) -> Recipe:
        """What the study starts from: the recipe before it, at the study's budget."""
        return cls(
            problem,
            lambda recipe: recipe.regression(),
            trajectories=copy.deepcopy(problem.trajectories),
            intervals={"diagonal": 0.1, "grid": 0.6, "to_noise": 0.7},
            weighting=f2.Weighting(**problem.weighting),
            estimator=problem.estimator(),
            head=dict(problem.head),
            covariance=problem.covariance,
        )

    def make_intervals(self, **changes: Any) -> f2.Intervals:
        return f2.Intervals(directions=self.directions, **(self.intervals | changes))

    def regression(
        self, kind: type[f2.TrajectoryRegression] = f2.TrajectoryRegression, **changes: Any
    ) -> f2.objectives.Objective:
        """Trajectory regression with the recipe's settings, some of them changed."""
        intervals = changes.pop("intervals", None) or self.make_intervals()
        weighting = changes.pop("weighting", self.weighting)
        arguments = self.trajectories | changes
        return kind(intervals=intervals, weighting=weighting, cache=self.cache, **arguments)

    def bootstrap(self, kind: type[f2.objectives.Objective], **arguments: Any) -> f2.objectives.Objective:
        """An objective that bootstraps, half of it on the diagonal, where the teacher comes in."""
        intervals = self.make_intervals(diagonal=0.5, grid=0.25)
        return kind(intervals=intervals, weighting=self.weighting, **arguments)

    def make_head(self) -> f2.DivergenceHead:
        baseline = None if self.covariance is None else f2.GaussianBaseline(self.problem.shape, self.covariance)
        arguments = dict(self.head)
        if "network" not in arguments:
            arguments["features"] = self.problem.features
        return f2.DivergenceHead(baseline=baseline, **arguments)

    def make_module(self, steps: int) -> StudyModule:
        """The LightningModule, in the random state that the caller has set."""
        problem = self.problem
        network: Any = problem.network(directions=self.directions)
        objective = self.make_objective(self)
        return StudyModule(
            WithoutGradient(network) if self.detached else network,
            problem.shape,
            problem.teacher,
            self.make_head(),
            objective,
            self.estimator,
            self.frozen,
            levels=problem.levels,
            optimizer=lambda groups: torch.optim.AdamW(
                groups, lr=problem.rate, weight_decay=0.01, betas=(0.9, 0.99), foreach=True
            ),
            warmup=min(100, steps // 10),
            ema_decay=self.ema_decay,
        )

    def but(self, **changes: Any) -> Recipe:
        """A copy with fields replaced."""
        return replace(self, **changes)


class StudyModule(f2.F2D2Module):
    """Starts variants of the backbone that the package does not know."""

    backbone: dict[str, torch.Tensor] | None = None
    """Weights of a few-step backbone to start from in place of the teacher's."""

    def prepare(self) -> None:
        """As the package, with the wrapped network in the wrapper's place."""
        if isinstance(self.objective, AveragedTargets):
            self.objective.average = self.average
        network: nn.Module = self.joint.flow_map
        if self.backbone is not None:
            network.load_state_dict(self.backbone)
            self.warm_start = False
        elif isinstance(network, WithoutGradient):
            network.network.load_state_dict(self.teacher.average.state_dict())  # type: ignore[union-attr]
            self.warm_start = False
        super().prepare()
