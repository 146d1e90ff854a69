"""LightningModules: a flow-matching teacher and the few-step student that F2D2 makes of it."""

from __future__ import annotations

from f2d2_lightning.modules.base import FlowModule
from f2d2_lightning.modules.loading import load
from f2d2_lightning.modules.student import F2D2Module
from f2d2_lightning.modules.teacher import FlowMatchingModule

__all__ = ["F2D2Module", "FlowMatchingModule", "FlowModule", "load"]
