"""Levels and range of the data: said to a model, or found in its teacher, data module or checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from f2d2_lightning.likelihood.model import LikelihoodModel
from f2d2_lightning.likelihood.quantization import Quantization
from f2d2_lightning.utils.checks import at_least

RANGE = ("levels", "low", "high")


class RangedModel(LikelihoodModel):
    """A model in training, which is told levels and range of its data, or finds them."""

    _from_data = False
    """Whether they are those of a data module."""

    def say_range(self, levels: int | None, low: float | None, high: float | None) -> None:
        """Keep what was said; ``None`` leaves it to be found. To be called by ``__init__``."""
        if levels is not None:
            at_least(2, levels=levels)
        self._edges = {name: value for name, value in (("low", low), ("high", high)) if value is not None}
        self._set_range(levels, low, high)
        if not self.low < self.high:
            raise ValueError(
                f"low={self.low} and high={self.high} are the edges of the data's range; low < high is needed"
            )

    def _set_range(self, levels: int | None, low: float | None, high: float | None) -> None:
        # numbers of NumPy too, which a checkpoint of plain values cannot hold
        self.levels = None if levels is None else int(levels)
        self.low = float(self._edges.get("low", -1.0 if low is None else low))
        self.high = float(self._edges.get("high", 1.0 if high is None else high))

    def quantize(self, levels: int | None, low: float | None, high: float | None) -> None:
        """Take over what was found; edges that were said stay, and are compared by who found it."""
        self._set_range(levels, low, high)

    def agree_with_data(self, data: Any, shape: tuple[int, ...] | None = None, take: bool = True) -> None:
        """Take over levels and range of a data module where none were said; one that says others is a ``ValueError``.

        It has ``quantization``, or some of ``levels``, ``low``, ``high`` and ``shape``, which are compared only, the
        ``shape`` if the model's is given; anything else says nothing. A model that was trained without levels may not
        ``take`` any over.
        """
        theirs = getattr(data, "quantization", None)
        if take and self.levels is None and isinstance(theirs, Quantization):
            self._from_data = True
            self.quantize(theirs.levels, theirs.low, theirs.high)
        for name in (*RANGE, "shape"):
            came = getattr(data, name, getattr(theirs, name, None))
            came = tuple(came) if name == "shape" and came is not None else came
            mine = shape if name == "shape" else getattr(self.quantization, name, None)
            # a range is that of levels, and continuous data have none
            if came is None or came == mine or (mine is None and name != "levels"):
                continue
            raise ValueError(
                f"{self.title} has {name}={mine}, but {type(data).__name__} has {name}={came}; make them agree, such "
                f"as by {name}={came} (in a configuration: model.init_args.{name})"
            )

    def agree_with_checkpoint(self, said: Mapping[str, Any]) -> None:
        """Take over levels and range that a checkpoint says where none were said; others are a ``ValueError``."""
        if self.levels is None and said.get("levels") is not None:
            self.quantize(*(said.get(name) for name in RANGE))
        for name in RANGE:
            came, mine = said.get(name), getattr(self, name)
            # of a module that was told its levels, older checkpoints do not always say them
            unsaid = came is None and (name != "levels" or not self._from_data)
            if self.levels is not None and not unsaid and came != mine:
                remedy = f"give it {name}={came} (in a configuration: model.init_args.{name})"
                raise ValueError(
                    f"the checkpoint is of a model with {name}={came}, and {self.title} has {name}={mine}: bits per "
                    f"dimension would be others; {'take the data of that model' if self._from_data else remedy}"
                )
