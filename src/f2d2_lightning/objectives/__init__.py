"""What ``(u, D)`` is regressed on."""

from f2d2_lightning.objectives._pool import TrajectoryPool
from f2d2_lightning.objectives.base import Batch, Examples, Objective, Terms, Weighting
from f2d2_lightning.objectives.identities import Consistency, Eulerian, Identity, Lagrangian, Semigroup
from f2d2_lightning.objectives.intervals import Intervals
from f2d2_lightning.objectives.sources import ConditionalSource, DiagonalSource, TeacherSource, VelocitySource
from f2d2_lightning.objectives.trajectories import TrajectoryRegression
from f2d2_lightning.objectives.volume import VolumeRegression

__all__ = [
    "Batch",
    "ConditionalSource",
    "Consistency",
    "DiagonalSource",
    "Eulerian",
    "Examples",
    "Identity",
    "Intervals",
    "Lagrangian",
    "Objective",
    "Semigroup",
    "TeacherSource",
    "Terms",
    "TrajectoryPool",
    "TrajectoryRegression",
    "VelocitySource",
    "VolumeRegression",
    "Weighting",
]
