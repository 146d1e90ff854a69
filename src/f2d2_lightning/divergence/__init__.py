"""Estimators of the divergence of a velocity, and the derivatives that they take."""

from f2d2_lightning.divergence._tangents import DerivativeError
from f2d2_lightning.divergence.estimators import Conditional, Divergence, DivergenceEstimator, Exact, Hutchinson

__all__ = ["Conditional", "DerivativeError", "Divergence", "DivergenceEstimator", "Exact", "Hutchinson"]
