"""A second time for a network that was trained with one, without changing what it has learned."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from f2d2_lightning.flows.maps import Direction, FlowMap
from f2d2_lightning.flows.paths import distinct
from f2d2_lightning.nn.embedding import IntervalEmbedding, SlowWaves
from f2d2_lightning.nn.preconditioned import AngleEmbedding, GaussianPreconditioned
from f2d2_lightning.utils.configured import Configured


class OneTimeEmbedding(SlowWaves):
    """Embedding of the time ``s`` of the state alone, for teachers; their answer is the same for every ``t``.

    Args:
        features: Width of the output.
        frequencies: Sinusoids.
    """

    def __init__(self, features: int, frequencies: int = 8) -> None:
        super().__init__(features, frequencies, times=1)

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        """``(B,), (B,) -> (B, features)``, or ``(1, features)`` where all samples share ``s``."""
        (s,) = distinct(s)
        return self.embed(s[:, None])


class AddedTime(nn.Module, Configured):
    r"""An embedding of one time, and what the second one adds to it.

    .. math:: e(s, s) + W\,\big(h(s, t) - h(s, s)\big), \qquad W = 0 \text{ at first}

    ``e`` is the embedding of the teacher. The added part starts at nothing, so that a student starts as its teacher at
    time ``s`` whatever ``t`` is; it is nothing at ``s = t`` for good, so that the diagonal moves only with the
    teacher's own weights. ``W`` has a gradient from the first step on, ``h`` from the second.

    Args:
        embedding: Module ``(s, t) -> (B, E)`` with an attribute ``features`` ``= E``; only asked for ``s = t``.
        hidden: Width of ``h``, an :class:`~f2d2_lightning.nn.IntervalEmbedding`; ``E`` by default.
    """

    def __init__(self, embedding: nn.Module, hidden: int | None = None) -> None:
        super().__init__()
        self.embedding = embedding
        self.features = int(embedding.features)  # type: ignore[arg-type]
        self.interval = IntervalEmbedding(self.features if hidden is None else hidden)
        self.added = nn.Linear(self.interval.features, self.features, bias=False)
        nn.init.zeros_(self.added.weight)

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        """``(B,), (B,) -> (B, E)``, or ``(1, E)`` where all samples share both times."""
        difference = nn.functional.silu(self.interval(s, t)) - nn.functional.silu(self.interval(s, s))
        return self.embedding(s, s) + self.added(difference)


def with_second_time(
    network: FlowMap, hidden: int | None = None, diagonal_only: bool = False, directions: str = "both"
) -> FlowMap:
    """A copy of a one-time network that takes two times and starts with the same answers.

    At first the copy is blind to ``t``: ``u(x, s, t)`` is the velocity of ``network`` at ``s``, on the diagonal and off
    it. Inside :class:`~f2d2_lightning.nn.GaussianPreconditioned` this holds for the inner network, in whitened
    coordinates: off the diagonal the Gaussian map around it is then right already.

    Args:
        network: Flow map whose times go through an attribute ``embedding``, a module ``(s, t) -> (B, E)`` with an
            attribute ``features``: :class:`~f2d2_lightning.nn.MLP`, ``ResNet``, ``UNet``, ``DiT``, your own, or one of
            them in a ``GaussianPreconditioned``. It is left as it is.
        hidden: Width of the added part, see :class:`AddedTime`.
        diagonal_only: Say that the network takes two times but was only trained with both the same, as a teacher is:
            what it answers off the diagonal is then noise, and is dropped.
        directions: Orders of time that the copy is to be trained for.

    Returns:
        The copy, in training mode and with gradients, as a student needs it. A network with an ``AngleEmbedding`` is
        only copied: that one starts blind to ``t`` by itself.

    Raises:
        ValueError: If there is no such embedding, or it sees ``t`` already.
    """
    student = copy.deepcopy(network)
    inner: nn.Module = student
    while isinstance(inner, GaussianPreconditioned):
        inner.directions = Direction.parse(directions)
        inner = inner.network
    inner.directions = Direction.parse(directions)  # type: ignore[assignment]
    embedding = getattr(inner, "embedding", None)
    if not isinstance(embedding, nn.Module) or not isinstance(getattr(embedding, "features", None), int):
        raise ValueError(
            f"{type(inner).__name__} has no attribute embedding, a module (s, t) -> (B, E) with an attribute features; "
            "a second time is added to MLP, ResNet, UNet, DiT and networks built like them. For others see the "
            "adapters' interval='times'"
        )
    if isinstance(embedding, AddedTime):
        raise ValueError(f"{type(inner).__name__} has a second time already, an AddedTime; copy it as it is")
    blind = _blind(embedding)
    if isinstance(embedding, AngleEmbedding):
        if not blind:
            raise ValueError(
                f"{type(inner).__name__} has a second time already: its AngleEmbedding starts blind to t and has "
                "learned to see it; copy it as it is"
            )
    elif blind or diagonal_only:
        inner.embedding = AddedTime(embedding, hidden).to(next(inner.parameters()))
    else:
        raise ValueError(
            f"{type(inner).__name__} has a second time already, its {type(embedding).__name__} answers to t; copy it "
            "as it is, or say diagonal_only=True if it was only ever trained with s = t"
        )
    return student.requires_grad_(True).train()


def one_time_state(student: nn.Module, teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A teacher's weights under the names that they have in a student with an added time, as a whole ``state_dict``.

    That is an :class:`AddedTime`, or in an adapted network an :class:`~f2d2_lightning.adapters.AddedInterval`, and all
    that the two differ in, if in anything. Where the teacher has none, the student's own is taken over as it is.
    """
    state = dict(teacher)
    for place, module in student.named_modules():
        prefix = f"{place}." if place else ""
        if getattr(module, "added_whole", False) and not any(name.startswith(prefix) for name in teacher):
            state |= module.state_dict(prefix=prefix)
        if not isinstance(module, AddedTime) or any(name.startswith(f"{prefix}added.") for name in teacher):
            continue
        own = module.state_dict(prefix=prefix)
        added = (f"{prefix}interval.", f"{prefix}added.")
        for name in [name for name in state if name.startswith(prefix)]:
            state[f"{prefix}embedding.{name.removeprefix(prefix)}"] = state.pop(name)
        state |= {name: value for name, value in own.items() if name.startswith(added)}
    return state


@torch.no_grad()
def _blind(embedding: nn.Module) -> bool:
    """Whether an embedding gives the same for every ``t``."""
    probed = copy.deepcopy(embedding).eval()
    like = next(embedding.parameters(), torch.zeros(()))
    s, t = (torch.tensor(times, dtype=like.dtype, device=like.device) for times in ((0.3, 0.8, 0.0), (0.7, 0.1, 1.0)))
    return torch.equal(probed(s, t), probed(s, s))
