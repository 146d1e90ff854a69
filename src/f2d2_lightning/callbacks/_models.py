"""The models of a trainer that have samples or likelihoods: its module, and what callbacks added to one."""

from __future__ import annotations

import copy

import lightning as L

from f2d2_lightning.callbacks.f2d2 import F2D2Callback
from f2d2_lightning.likelihood.model import LikelihoodModel
from f2d2_lightning.likelihood.ode import FIXED
from f2d2_lightning.modules import FlowMatchingModule


def _models(trainer: L.Trainer, module: L.LightningModule) -> tuple[list[LikelihoodModel], list[F2D2Callback]]:
    own: list[LikelihoodModel] = [module] if isinstance(module, LikelihoodModel) else []
    added = [c for c in trainer.callbacks if isinstance(c, F2D2Callback)]  # type: ignore[attr-defined]
    for callback in added:
        callback.name = callback.flow_map if len(own) + len(added) > 1 else ""
        callback.attach(module)
    return own, added


def find_models(trainer: L.Trainer, module: L.LightningModule) -> list[LikelihoodModel]:
    """The module itself, if it is of this package, and what each F2D2Callback added; neither is a ``ValueError``."""
    own, added = _models(trainer, module)
    if not (own or added):
        raise ValueError(
            f"{type(module).__name__} is neither F2D2Module nor FlowMatchingModule, and the trainer has no "
            "F2D2Callback; add one (Trainer(callbacks=[F2D2Callback(...), ...])), or take pictures and report out of "
            "the callbacks"
        )
    return [*own, *added]


def find_sampler(
    trainer: L.Trainer, module: L.LightningModule, flow_map: str | None = None, method: str = "euler"
) -> LikelihoodModel:
    """The one model that samples are drawn from: the module itself, else what a callback added on ``flow_map``.

    ``method`` is a teacher's solver. That nothing here draws samples, several do, or the method has no fixed steps, is
    a :class:`ValueError`.
    """
    own, added = _models(trainer, module)
    chosen = own if own and flow_map is None else [c for c in added if flow_map in (None, c.flow_map)]
    if len(chosen) != 1:
        if added:
            names = ", ".join(repr(c.flow_map) for c in added)
            raise ValueError(f"there are F2D2Callbacks on {names}, and flow_map={flow_map!r}; say which: flow_map=...")
        raise ValueError(
            f"{type(module).__name__} draws no samples that are known here; sample quality is of an F2D2Module, a "
            "FlowMatchingModule, or any module with an F2D2Callback in the same Trainer"
        )
    (model,) = chosen
    if isinstance(model, FlowMatchingModule):
        if method not in FIXED:
            raise ValueError(f"method is {method!r}; step counts need one with fixed steps: {', '.join(FIXED)}")
        # the module's own solver stays as it is
        model = copy.copy(model)
        model.method = method
    if not model.draws_samples:
        raise ValueError(
            f"{model.title} has a map of {model.directions}, which does not go to data and draws no samples"
        )
    return model
