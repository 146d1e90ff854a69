"""A fixed amount of memory for what is made once and drawn many times."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Ring:
    """Rows of several tensors in a fixed number of places, where new ones take those of the oldest."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        """Places that are taken."""
        self.next = 0
        """The place that is written next."""
        self._held: dict[str, Tensor | None] = {}

    def __getitem__(self, name: str) -> Tensor:
        value = self._held[name]
        assert value is not None
        return value

    def get(self, name: str) -> Tensor | None:
        """Places ``(capacity, ...)``, or ``None`` where the rows came without."""
        return self._held.get(name)

    @property
    def full(self) -> bool:
        """Whether every place is taken."""
        return self.count == self.capacity

    def add(self, **values: Tensor | None) -> None:
        """Take in rows ``(N, ...)``, the last that fit: two writes of one place would race between threads."""
        came = next(len(value) for value in values.values() if value is not None)
        for name, value in values.items():
            if value is None:
                self._held[name] = None
                continue
            places = (self.next + torch.arange(came, device=value.device)) % self.capacity
            held = self._held.get(name)
            held = value.new_zeros(self.capacity, *value.shape[1:]) if held is None else held
            held[places[-self.capacity :]] = value[-self.capacity :]
            self._held[name] = held
        self.next = (self.next + came) % self.capacity
        self.count = min(self.count + came, self.capacity)

    def to(self, device: torch.device | str | None) -> None:
        """Move what is held to a device."""
        self._held = {name: None if value is None else value.to(device) for name, value in self._held.items()}

    def state_dict(self) -> dict[str, Tensor | None]:
        """The places that are taken, on the CPU."""
        return {name: None if v is None else v[: self.count].cpu().clone() for name, v in self._held.items()}

    def load_state_dict(self, state: Mapping[str, Tensor | None]) -> None:
        """Take over rows; ``next`` is told apart."""
        place, self._held, self.count, self.next = self.next, {}, 0, 0
        if state:
            self.add(**state)
        self.next = place
