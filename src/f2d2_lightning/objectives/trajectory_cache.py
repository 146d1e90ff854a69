"""Integrated trajectories on disk, so that a resumed run, or the next student of the same teacher, need not wait."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from f2d2_lightning.flows.gaussian import GaussianBaseline
from f2d2_lightning.objectives.integrator import VERSION
from f2d2_lightning.objectives.sources import TeacherSource, VelocitySource
from f2d2_lightning.utils.files import whole_file
from f2d2_lightning.utils.fingerprints import fingerprint


class TrajectoryCache:
    """A folder of integrated chunks, each named by a fingerprint of all that decides its numbers.

    Those are the teacher's weights, the divergence estimator, the starting points, the seed of the probes, the times,
    the baseline, the kind of device, torch's version and the integrator's. What is read is therefore what would have
    been computed, and training goes on to the same numbers with and without. Files are never removed; the folder may be
    at any time. A trajectory takes ``4 * nodes * d`` bytes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._sources: dict[int, tuple[VelocitySource, str]] = {}

    def path(
        self,
        source: VelocitySource,
        entry: Mapping[str, Any],
        times: Sequence[float],
        baseline: GaussianBaseline | None,
    ) -> Path:
        """File of one chunk: starting points ``x``, their ``node``, ``cond`` and ``seed``.

        A source without weights that could be told apart, or one that changes in training, is a ``ValueError``.
        """
        x = entry["x"]
        where = (x.device.type, torch.__version__, VERSION)
        parts = (self._of(source), entry["node"], entry["seed"], list(times), where, x, entry["cond"], baseline)
        return self.folder / f"{fingerprint(parts)}.safetensors"

    def read(self, path: Path, x: Tensor, nodes: int) -> tuple[Tensor, Tensor] | None:
        """States ``(B, nodes, ...)`` and changes of log-density ``(B, nodes)`` of a chunk, type and device as ``x``.

        ``None`` if it is not there, with a warning if the file is damaged or of something else.
        """
        if not path.exists():
            return None
        try:
            shapes = {"change": (len(x), nodes), "states": (len(x), nodes, *x.shape[1:])}
            change, states = _checked(path, x.dtype, shapes)
            return states.to(x.device), change.to(x.device)
        # safetensors names several errors for a damaged file, depending on where the damage is
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(f"{path} cannot be read ({what:.300}); its trajectories are integrated again", stacklevel=2)
            return None

    def write(self, path: Path, states: Tensor, change: Tensor) -> None:
        """Keep a chunk; only a warning where the folder cannot be written, or the disk is full."""
        content = {"change": change.cpu().contiguous(), "states": states.cpu().contiguous()}
        try:
            with whole_file(path) as partial:
                partial.write_bytes(save(content, {"checksum": fingerprint(*content.values())}))
        except OSError as error:
            warnings.warn(
                f"trajectories cannot be kept in {self.folder} ({error}) and will be integrated again by the next run; "
                "make room there if the disk is full, or choose another folder: cache=...",
                stacklevel=2,
            )

    def _of(self, source: VelocitySource) -> str:
        # the source itself is held, so that its id is not given to another
        if id(source) not in self._sources:
            self._sources[id(source)] = (source, _fingerprint(source))
        return self._sources[id(source)][1]


def _checked(path: Path, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """The tensors of a file; a ``ValueError`` if they are others than they should be, or others than were written."""
    with safe_open(path, "pt") as file:
        said = (file.metadata() or {}).get("checksum")
        found = {name: file.get_tensor(name) for name in sorted(file.keys())}
    came, wanted = (
        {name: f"{v.dtype} {tuple(v.shape)}" for name, v in found.items()},
        {name: f"{dtype} {shape}" for name, shape in shapes.items()},
    )
    if came != wanted:
        raise ValueError(f"it holds {came}; expected is {wanted}")
    tensors = list(found.values())
    if fingerprint(*tensors) != said:
        raise ValueError("its checksum is another: its content was changed or damaged")
    if not all(bool(value.isfinite().all()) for value in tensors):
        raise ValueError("it holds values that are not finite")
    return tensors


def _fingerprint(source: VelocitySource) -> str:
    if not isinstance(source, TeacherSource) or not source.stationary:
        raise ValueError(
            f"cache= is for the trajectories of a teacher that stays as it is, and {type(source).__name__} changes in "
            "training; leave cache out"
        )
    network = getattr(source.velocity, "__self__", source.velocity)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"cache= tells teachers apart by their weights, and {network!r} is no torch.nn.Module; wrap it in one, or "
            "leave cache out"
        )
    return fingerprint(network, source.estimator)
