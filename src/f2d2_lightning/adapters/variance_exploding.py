r"""Networks of the variance-exploding process, ``x_ve = x_1 + sigma eps``: denoisers, consistency models, CTM.

With :math:`\tau = 1 / (1 + \sigma)` the state :math:`\tau x_{ve}` lies on the linear path at our time :math:`\tau`.
A network that answers a clean image :math:`g` moves along the straight line to it, :math:`u = (g - x) / (1 - \tau)`.
That is the velocity of a denoiser, the map to data of a consistency model, and, with an end time :math:`\sigma'`, the
map :math:`G = (\sigma' / \sigma)\,x + (1 - \sigma' / \sigma)\,g` of a consistency trajectory model.

Karras et al., 2022, https://arxiv.org/abs/2206.00364; Song et al., 2023, https://arxiv.org/abs/2303.01469;
Kim et al., 2023, https://arxiv.org/abs/2310.02279
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from f2d2_lightning.adapters.adapter import SHARED, Adapter
from f2d2_lightning.flows.maps import Direction
from f2d2_lightning.flows.paths import like
from f2d2_lightning.utils.checks import one_of
from f2d2_lightning.utils.conditions import Cond

PRECONDITIONINGS = ("none", "edm", "consistency")


class VarianceExploding(Adapter):
    """A network that takes ``x_ve`` and noise levels and answers a clean image.

    Beyond the noise levels that the network knows, the nearest one is used: at our ``t = 0`` it sees
    ``sigma_max * x``, as its own sampler starts, and at ``t = 1`` it sees the state itself at ``sigma_min``.

    Args:
        call: The call; ``x`` is the state as the network wants it, ``s`` and ``t`` are noise levels sigma.
        directions: Orders of time that the network was trained for.
        precondition: ``"none"`` if the network answers the clean image itself; ``"edm"`` if it is the inner network of
            Karras et al., whose state is multiplied with c_in and whose answer goes through c_skip and c_out;
            ``"consistency"`` for the same with sigma - sigma_min in place of sigma in c_skip and c_out, so that the
            answer at sigma_min is the state.
        answer: ``"clean"``, or ``"state"`` if the network answers the state at the end, as CTM's G does.
        sigma_min: Smallest noise level that it knows.
        sigma_max: Largest noise level that it knows.
        sigma_data: Of the preconditioning.
        kwargs: ``output``, ``channels_last``, ``null_label``, ``classes``, ``time_axes``, ``shortest`` (a share of the
            noise level here) as :class:`Adapter`.

    Raises:
        ValueError: If an argument is none of the above.
    """

    _arguments: ClassVar[tuple[str, ...]] = (
        *("call", "directions", "precondition", "answer", "sigma_min", "sigma_max", "sigma_data"),
        *(*SHARED, "shortest"),
    )
    readings: ClassVar[tuple[str, tuple[str, ...]]] = "precondition", PRECONDITIONINGS
    """The argument that says how a clean image follows from the answer, and its values."""

    def __init__(
        self,
        call: str = "net(x, s, cond)",
        directions: Direction | str = "none",
        precondition: str = "none",
        answer: str = "clean",
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        **kwargs: Any,
    ) -> None:
        self._refuse_unfit(kwargs)
        one_of("precondition", precondition, PRECONDITIONINGS)
        one_of("answer", answer, ("clean", "state"))
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min={sigma_min} and sigma_max={sigma_max}; they are positive and in this order")
        super().__init__(call, directions=directions, **kwargs)
        self.answer = answer
        self._check_end()
        self.precondition = precondition
        self.leaves_data = precondition != "consistency"
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def _refuse_unfit(self, kwargs: Mapping[str, Any]) -> None:
        unfit = kwargs.keys() - {*self._arguments}
        if unfit:
            raise ValueError(
                f"{type(self).__name__} has no {', '.join(sorted(unfit))}: its times are noise levels and its prior is "
                "their largest; for a network with times of its own take Adapter"
            )

    def foreign_time(self, t: Tensor) -> Tensor:
        """Noise level of our time, within what the network knows, ``(B,)``."""
        # the clamp is of time, so that nothing is infinite, derivatives included
        t = t.clamp(1 / (1 + self.sigma_max), 1 / (1 + self.sigma_min))
        return (1 - t) / t

    def average_velocity(
        self, network: Callable[..., Any], x: Tensor, s: Tensor, t: Tensor, cond: Cond | None
    ) -> Tensor:
        """``u(x, s, t)``: along the straight line to the clean image that the network answers."""
        sigma, sigma_end = self.foreign_time(s), self.foreign_time(t)
        # x / s, and near noise, where that would be infinite, what the network's own sampler would hold
        state = x / like(torch.maximum(s, (1 - s) / self.sigma_max), x)
        if self.answer == "state":
            # where start and end fall together G is the state, and only a level a little lower tells the clean image
            short = (sigma_end - sigma).abs() < self.shortest * sigma
            sigma = torch.where(short, sigma.clamp(min=self.sigma_min / (1 - self.shortest)), sigma)
            sigma_end = torch.where(short, sigma * (1 - self.shortest), sigma_end)
            answer = self._ask(network, state, sigma, sigma_end, cond)
            share = like(sigma_end / sigma, x)
            clean = (answer - share * state) / (1 - share)
        else:
            clean = self._clean(network, state, sigma, sigma_end, cond)
        # past sigma_min the state counts as one at sigma_min: at s = 1 nothing is left of the line to divide by
        latest = 1 / (1 + self.sigma_min)
        return (clean - like(latest / s.clamp(min=latest), x) * x) / like(1 - s.clamp(max=latest), x)

    def _clean(
        self, network: Callable[..., Any], state: Tensor, sigma: Tensor, sigma_end: Tensor, cond: Cond | None
    ) -> Tensor:
        if self.precondition == "none":
            return self._ask(network, state, sigma, sigma_end, cond)
        data = self.sigma_data
        shifted = sigma - self.sigma_min if self.precondition == "consistency" else sigma
        norm = (sigma.square() + data**2).sqrt()
        c_skip, c_out = data**2 / (shifted.square() + data**2), shifted * data / norm
        answer = self._ask(network, state / like(norm, state), sigma, sigma_end, cond)
        return like(c_skip, state) * state + like(c_out, state) * answer


class Denoiser(VarianceExploding):
    """An EDM denoiser, as a teacher: ``net(x, sigma, class_labels) -> clean`` (NVlabs/edm, edm2).

    Labels are one-hot there: give ``classes``. ``precondition="edm"`` for the inner network.
    """


class Consistency(VarianceExploding):
    """A consistency model: from any noise level to data, no end time.

    ``precondition="consistency"`` and ``call="net(x, 250 * log(s), cond)"`` for the inner network of
    openai/consistency_models; ``precondition="none"``, ``classes=`` and ``sigma_min=0.003`` for
    locuslab/ect, in evaluation mode: in training mode its network is preconditioned otherwise.

    Such a model goes to data only, in one jump; towards an inner time it follows the straight line to its endpoint.
    Give it ``interval=`` (see :class:`~f2d2_lightning.adapters.AdaptedFlowMap`) to fine-tune it into a map between
    any two times. Without it the map has no instantaneous velocity to integrate or to distil.
    """

    endpoint_only = True

    def __init__(self, call: str = "net(x, s, cond)", directions: Direction | str = "to_data", **kwargs: Any) -> None:
        super().__init__(call, directions, **kwargs)


class CTM(VarianceExploding):
    """A consistency trajectory model that answers a clean image of ``(x, sigma, cond, s=sigma_end)``.

    The networks of sony/ctm take ``call="net(x, 250 * log(s), y=cond, s=250 * log(t))", precondition="edm"`` (without
    ``y=cond`` where there are no labels).

    By default the network answers g, the clean image of ``G = (sigma_end / sigma) x + (1 - sigma_end / sigma) g``;
    ``answer="state"`` if it answers G itself.
    """

    def __init__(
        self, call: str = "net(x, s, cond, s=t)", directions: Direction | str = "to_data", **kwargs: Any
    ) -> None:
        super().__init__(call, directions, **kwargs)
