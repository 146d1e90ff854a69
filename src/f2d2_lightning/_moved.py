"""Places of version 0.1 that go on: its modules, and the names that were at the door, each with a warning.

Python, configurations and saved files may name either. The public names of a module of then are those of a folder now.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Container, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["argument", "current", "described", "from_door", "option"]

_MODULES = {
    "flows": "paths flow_map baseline analytic",
    "nn": "heads nn.transformer nn.precondition nn.two_times",
    "divergence": "tangents",
    "likelihood": "sampling inversion reference guidance mirror quantisation bounds pixels",
    "objectives": "intervals sources volume trajectory",
    "adapters": "adapters.adapted",
    "checkpoints": "pretrained export",
    "checkpoints.trust": "trust",
    "checkpoints.foreign": (
        "foreign_checkpoints foreign_checkpoints.embeddings foreign_checkpoints.files foreign_checkpoints.mean_flow "
        "foreign_checkpoints.official"
    ),
    "metrics": "evaluation feature_statistics feature_networks feature_distances ranks",
    "data": (
        "fashion image_data image_data.base image_data.cifar image_data.celeba image_data.edm_zip image_data.fashion "
        "image_data.folder image_data.imagenet"
    ),
    "modules": "modules.f2d2 modules.flow_matching",
    "callbacks": "callback sample_quality pictures report summary loggers last_checkpoint",
    "cli": "commands",
}
_DOOR = {
    "flows": "GaussianFlow Joint Jump LinearPath MixtureFlow Path TrigonometricPath",
    "divergence": "Conditional Divergence DivergenceEstimator Exact",
    "likelihood": "GuidedSamples LogProb Samples mirrored_log_prob",
    "objectives": (
        "ConditionalSource Consistency DiagonalSource Eulerian Lagrangian Objective Semigroup TeacherSource Terms "
        "TrajectoryPool VelocitySource VolumeRegression"
    ),
    "checkpoints.foreign": "load_official load_official_joint load_py_meanflow",
    "data": (
        "CIFAR10 CelebA64 Checkerboard Digits EDMZip FashionMNIST FlowDataModule GaussianMixture ImageFolder ImageNet64"
    ),
    "modules": "FlowModule",
    "callbacks": "JointSummary Pictures SampleQuality",
}
_RENAMED = {
    "Quantisation": "Quantization",
    "DequantisationBounds": "DequantizationBounds",
    "dequantisation_bounds": "dequantization_bounds",
}
_ARGUMENTS = {"quantisation": "quantization"}

_PACKAGE = __name__.partition(".")[0]
_FOLDER = {f"{_PACKAGE}.{old}": f"{_PACKAGE}.{new}" for new, names in _MODULES.items() for old in names.split()}
_FOLDER |= {f"{_PACKAGE}.{name}": f"{_PACKAGE}.{new}" for new, names in _DOOR.items() for name in names.split()}


def current(module: str, name: str) -> tuple[str, str]:
    """Where a name of a module is today: its module and itself, which are those given unless it has moved."""
    name = _RENAMED.get(name, name) if module.partition(".")[0] == _PACKAGE else name
    if module == _PACKAGE:
        return _FOLDER.get(f"{module}.{name}", module), name
    return _FOLDER.get(module, module), name


def argument(name: str, accepted: Container[str]) -> str:
    """Name of an argument today, where it is none of those that a class takes."""
    return name if name in accepted else _ARGUMENTS.get(name, name)


def described(value: Any) -> Any:
    """A configuration of version 0.1 as one of today: classes of this package, and their arguments, by their names."""
    if isinstance(value, Mapping):
        new = {key: described(item) for key, item in value.items()}
        path = new.get("class_path")
        # a command line takes short names of classes as well
        if isinstance(path, str) and (path.startswith(f"{_PACKAGE}.") or "." not in path):
            module, _, name = path.rpartition(".")
            new["class_path"] = ".".join(current(module, name)) if module else _RENAMED.get(name, name)
            if isinstance(new.get("init_args"), dict):
                new["init_args"] = {argument(key, ()): item for key, item in new["init_args"].items()}
        return new
    return [described(item) for item in value] if isinstance(value, list) else value


def option(text: str) -> str:
    """An option of a command line of version 0.1, ``--a.b=c``, by the names of today."""
    name, equals, value = text.partition("=")
    if not name.startswith("--"):
        return text
    return ".".join(_ARGUMENTS.get(part, part) for part in name.split(".")) + equals + value


def from_door(name: str) -> Any:
    """A name that was at the door; an ``AttributeError`` if it never was."""
    return _forward(_PACKAGE, name)


def _forward(module: str, name: str) -> Any:
    place, now = current(module, name)
    if (place, now) == (module, name) or name.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(place), now)
    warnings.warn(f"{module}.{name} is {place}.{now} now", DeprecationWarning, stacklevel=3)
    return found


class _OldModules(MetaPathFinder, Loader):
    """Finds the modules of then: empty ones, whose names are looked for where they are now."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _FOLDER or name.rpartition(".")[2][0].isupper():
            return None
        return ModuleSpec(name, self, is_package=any(other.startswith(f"{name}.") for other in _FOLDER))

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: _forward(module.__name__, name)  # type: ignore[method-assign]


sys.meta_path.append(_OldModules())
