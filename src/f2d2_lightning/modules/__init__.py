"""LightningModules: a flow-matching teacher and the few-step student that F2D2 makes of it."""

from f2d2_lightning.modules.base import FlowModule
from f2d2_lightning.modules.f2d2 import F2D2Module
from f2d2_lightning.modules.flow_matching import FlowMatchingModule

__all__ = ["F2D2Module", "FlowMatchingModule", "FlowModule"]
