"""Whom a student learns from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from f2d2_lightning.modules.ema import kept_apart
from f2d2_lightning.modules.teacher import FlowMatchingModule
from f2d2_lightning.training.loading import read_checkpoint, restore_module

if TYPE_CHECKING:
    from f2d2_lightning.modules.student import F2D2Module


class KeptTeacher:
    """A teacher that is neither saved nor trained with the student.

    It is ``given`` as module, flow map or velocity, as the path of a checkpoint whose classes ``trust`` allows, or not;
    anything else is a ``ValueError``.
    """

    def __init__(self, given: Any, trust: Sequence[str] = ()) -> None:
        if given is not None and not isinstance(given, (str, Path)) and not callable(given):
            raise ValueError(
                f"the teacher is a {type(given).__name__}; a FlowMatchingModule, a flow map, any velocity "
                "(x, t, cond) -> v, or the path of a teacher's checkpoint is needed"
            )
        self.path = str(given) if isinstance(given, (str, Path)) else None
        self.known = None if self.path else given
        """The teacher, as far as it is known: not loaded yet where it is a file."""
        self.trust = tuple(trust)
        self.described_network: dict[str, Any] = {}
        """``{"flow_map": ...}`` as a file that was loaded says it; a script's does not."""

    @property
    def there(self) -> bool:
        """Whether there is one, loaded or not."""
        return self.known is not None or self.path is not None

    def keep_apart(self, network: nn.Module) -> None:
        """See to it that training ``network`` does not change the teacher: one that holds it stays as it is now."""
        self.known = None if self.known is None else kept_apart(self.known, network)

    def get(self, device: torch.device, dtype: Any = None) -> Any:
        """The teacher, loaded on first use and moved; ``None`` if there is none."""
        if self.known is None and self.path is not None:
            checkpoint = read_checkpoint(self.path)
            self.known = restore_module(checkpoint, self.path, FlowMatchingModule, self.trust, None, {})
            said = checkpoint.get(FlowMatchingModule.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("flow_map")
            self.described_network = {"flow_map": said} if isinstance(said, dict) else {}
        # nothing is differentiated with respect to its weights, whose owner may want to train them elsewhere
        return self.known.to(device=device, dtype=dtype).eval() if isinstance(self.known, nn.Module) else self.known


def check_teacher(teacher: FlowMatchingModule, student: F2D2Module) -> None:
    """Raise a ValueError for a teacher of other data, another path, or with ``cond`` that the student does not take."""
    if teacher.shape != student.shape:
        raise ValueError(
            f"the teacher was trained on states of shape {teacher.shape}, the student is for {student.shape}; "
            "use the teacher of these data"
        )
    mine, theirs = type(student.objective.path), type(teacher.path)
    if mine is not theirs:
        raise ValueError(
            f"the teacher was trained on {theirs.__name__}, the objective is on {mine.__name__}: its states would be "
            "none that the teacher knows; give both the same path"
        )
    if teacher.conditional and student.conditional is False:
        raise ValueError(
            "the teacher needs cond, and the student's backbone takes none: it would be taught without; give "
            "it classes, or distil an unconditional teacher"
        )
