"""What is wrong with a checkpoint, or with a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from f2d2_lightning.modules._ranges import RANGE
from f2d2_lightning.utils.processes import gather_states
from f2d2_lightning.utils.sharding import all_finite

if TYPE_CHECKING:
    from f2d2_lightning.modules.base import FlowModule


def check_same_model(module: FlowModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse, with a ``ValueError``, a checkpoint of another model; levels and range that were not said are its."""
    kept = checkpoint.get("f2d2", {}).get("range")
    said = checkpoint.get(module.CHECKPOINT_HYPER_PARAMS_KEY, {}) if kept is None else dict(zip(RANGE, kept))
    module.agree_with_checkpoint(said)
    mine, theirs = module.state_dict(), checkpoint.get("state_dict", {})
    if theirs and not mine.keys() & theirs.keys():
        name = checkpoint.get("hyper_parameters", {}).get("_class_path", "another class")
        raise ValueError(
            f"the checkpoint is of {name}: none of its weights ({next(iter(theirs))}, ...) is one of this "
            f"{type(module).__name__}; give the checkpoint of this model, or the configuration of that one"
        )
    wrong = [
        f"{name}: checkpoint {tuple(value.shape)}, module {tuple(mine[name].shape)}"
        # a sharded checkpoint's weights are read later, into place
        for name, value in theirs.items()
        if name in mine and value.shape != mine[name].shape
    ]
    if wrong:
        raise ValueError(
            f"the checkpoint is of another model ({len(wrong)} tensors differ in shape; first: {wrong[0]}); "
            "use the configuration that was saved beside the checkpoint"
        )


def not_finite(module: FlowModule, batch: Any, batch_index: int) -> str:
    """What to say of a gradient that is NaN or infinite."""
    bad = [name for name, p in module.live.named_parameters() if p.grad is not None and not all_finite(p.grad)]
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    data = any(isinstance(part, Tensor) and not all_finite(part) for part in parts)
    cause = (
        "the batch itself holds NaN or infinity: look at the data"
        if data
        else "the batch is finite: lower the learning rate, clip gradients (trainer.gradient_clip_val), or look at "
        "the teacher's samples"
    )
    where = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "") or "their norm overflows"
    step, epoch = module.trainer.global_step + 1, module.trainer.current_epoch
    return (
        f"training stopped before optimiser step {step} (epoch {epoch}, batch {batch_index}): the gradient "
        f"is NaN or infinite in {len(bad)} parameters ({where}), and {cause}. The weights are as they were before "
        "it, and so is the last checkpoint"
    )


def check_finite(module: nn.Module) -> None:
    """Refuse, with a ``FloatingPointError``, to save weights that are NaN or infinite over good ones."""
    bad = [name for name, value in module.state_dict().items() if isinstance(value, Tensor) and not all_finite(value)]
    # all processes stop where one holds a share that is bad
    if bad := [name for names in gather_states(bad) for name in names]:
        raise FloatingPointError(
            f"nothing was saved: {len(bad)} weights or buffers are NaN or infinite, first {bad[0]}; the last "
            "checkpoint is from before that. Lower the learning rate or clip gradients (trainer.gradient_clip_val)"
        )
