"""Probability paths and flow maps, and those whose answers are known."""

from f2d2_lightning.flows.gaussian import GaussianBaseline, GaussianFlow
from f2d2_lightning.flows.maps import Direction, FlowMap, Joint, JointMap, Jump, Velocity, as_flow_map
from f2d2_lightning.flows.mixture import MixtureFlow
from f2d2_lightning.flows.paths import LinearPath, Path, Point, TrigonometricPath

__all__ = [
    "Direction",
    "FlowMap",
    "GaussianBaseline",
    "GaussianFlow",
    "Joint",
    "JointMap",
    "Jump",
    "LinearPath",
    "MixtureFlow",
    "Path",
    "Point",
    "TrigonometricPath",
    "Velocity",
    "as_flow_map",
]
