"""A fixed amount of memory for what is made once and drawn many times."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from f2d2_lightning.utils.conditions import Cond, mapped, tensors


class Ring:
    """Rows of several tensors in a fixed number of places, where new ones take those of the oldest."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        """Places that are taken."""
        self.next = 0
        """The place that is written next."""
        self._held: dict[str, Cond | None] = {}

    def __getitem__(self, name: str) -> Tensor:
        value = self._held[name]
        assert value is not None
        return value

    def get(self, name: str) -> Cond | None:
        """Places ``(capacity, ...)``, in the form that the rows had; ``None`` where they came without."""
        return self._held.get(name)

    @property
    def full(self) -> bool:
        """Whether every place is taken."""
        return self.count == self.capacity

    def add(self, **values: Cond | None) -> None:
        """Take in rows ``(N, ...)``, the last that fit: two writes of one place would race between threads.

        Raises:
            ValueError: If a row requires gradients, whose graph ends with the step.
        """
        came = len(next(tensors(values)))
        for name, value in values.items():
            if any(tensor.requires_grad for tensor in tensors(value)):
                raise ValueError(
                    f"{name} requires gradients, and is kept for later steps: detach() it. A network that makes "
                    "conditions is trained along as condition= of the map's network"
                )

        def write(value: Tensor, held: Tensor | None = None) -> Tensor:
            places = (self.next + torch.arange(came, device=value.device)) % self.capacity
            held = value.new_zeros(self.capacity, *value.shape[1:]) if held is None else held
            held[places[-self.capacity :]] = value[-self.capacity :]
            return held

        for name, value in values.items():
            held = self._held.get(name)
            self._held[name] = mapped(write, value) if held is None else mapped(write, value, held)
        self.next = (self.next + came) % self.capacity
        self.count = min(self.count + came, self.capacity)

    def to(self, device: torch.device | str | None) -> None:
        """Move what is held to a device."""
        self._held = mapped(lambda value: value.to(device), self._held) or {}

    def state_dict(self) -> dict[str, Cond | None]:
        """The places that are taken, on the CPU."""
        return mapped(lambda value: value[: self.count].cpu().clone(), self._held) or {}

    def load_state_dict(self, state: Mapping[str, Cond | None]) -> None:
        """Take over rows; ``next`` is told apart."""
        place, self._held, self.count, self.next = self.next, {}, 0, 0
        if state:
            self.add(**state)
        self.next = place
