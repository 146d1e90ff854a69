"""Going on with a run: what its folder says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from f2d2_lightning.callbacks.last_checkpoint import NAMES, LastCheckpoint
from f2d2_lightning.training.loading import look_into

_MISSING = object()
SHOWING = ("enable_progress_bar", "enable_model_summary")
SHOWN = ("ProgressBar", "RunProgress", "ModelSummary", "JointSummary", "TestReport")
"""Arguments of a Trainer, and ends of names of callbacks, that change nothing of what is trained."""


def newest_checkpoint(checkpoints: Path, requeued: Path) -> Path | None:
    """The checkpoint of a run that was written last, or ``None`` where there is none.

    It is in ``checkpoints``, or in ``requeued``, where Lightning saves ``hpc_ckpt_N.ckpt`` when SLURM requeues a job.
    """
    found = [checkpoints / name for name in NAMES] + sorted(requeued.glob("hpc_ckpt_*.ckpt"))
    # of equal times the first one, which is the last checkpoint
    return max((path for path in found if path.exists()), key=lambda path: path.stat().st_mtime, default=None)


def is_finished(path: Path) -> bool:
    """Whether training was complete when a checkpoint was written; ``ValueError`` if it is damaged."""
    return bool(look_into(path).get("callbacks", {}).get(LastCheckpoint.__qualname__, {}).get("finished"))


def of_the_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what a run only shows of itself, which another start may show or not."""
    trainer = {name: value for name, value in (config.get("trainer") or {}).items() if name not in SHOWING}
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    kept = [c for c in callbacks if not str(c.get("class_path") if isinstance(c, dict) else c).endswith(SHOWN)]
    return {**config, "trainer": {**trainer, "callbacks": kept or None}}


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two configurations, as ``name: before -> now``, nested names joined by dots."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*before, *now)):
            yield from differences(before.get(key, _MISSING), now.get(key, _MISSING), f"{name}.{key}" if name else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from differences(one, other, f"{name}[{index}]")
    elif before != now:
        shown = ("not there" if value is _MISSING else f"{value!s:.80}" for value in (before, now))
        yield f"{name}: {' -> '.join(shown)}"
