"""The error of a student's whole path, through all its jumps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch.utils.checkpoint import checkpoint

from f2d2_lightning.flows.gaussian import baseline_of
from f2d2_lightning.flows.maps import JointMap
from f2d2_lightning.flows.paths import expand_time
from f2d2_lightning.likelihood.sampling import normal_log_prob
from f2d2_lightning.objectives._pool import Trajectories
from f2d2_lightning.objectives.base import Terms, Weighting, unit_baseline


def whole_path_terms(
    student: JointMap, teacher: Trajectories, grid: Sequence[float], weighting: Weighting, recompute: bool
) -> Terms:
    """Error of a path through all times of a grid, in either order, in natural units whatever the weighting's."""
    states, steps, to_noise = teacher.states, len(grid) - 1, grid[0] > grid[-1]
    x, log_change = states[:, 0], states.new_zeros(len(states))
    baseline = baseline_of(student) or unit_baseline(x)
    position_error, velocity_error = states.new_zeros(len(states)), states.new_zeros(len(states))
    for step, (s, t) in enumerate(itertools.pairwise(grid), start=1):
        if recompute and steps > 1:
            x, delta = checkpoint(student.jump, x, s, t, teacher.cond, use_reentrant=False)
        else:
            x, delta = student.jump(x, s, t, teacher.cond)
        log_change = log_change + delta
        error = x - states[:, step]
        position_error = position_error + baseline.deviations(error, expand_time(t, x)).square().sum(-1) / steps
        velocity_error = velocity_error + (error.detach() / (t - s)).flatten(1).square().mean(-1) / steps
    difference = log_change - teacher.change[:, -1]
    if to_noise:
        # the whole error of the log-likelihood, the prior's share included
        difference = difference + normal_log_prob(states[:, -1]) - normal_log_prob(x)
    velocity_loss = weighting.adapt(position_error)
    divergence_loss = weighting.adapt(weighting.of_divergence(x[0].numel()) * difference.square())
    return Terms(
        velocity_loss + divergence_loss,
        velocity_loss,
        divergence_loss,
        velocity_error.mean(),
        difference.detach().square().mean(),
    )
