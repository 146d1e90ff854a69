"""Whether a trained network's velocity is that of the adapter's convention, or clearly that of another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from f2d2_lightning.adapters.adapted import AdaptedFlowMap
from f2d2_lightning.adapters.adapter import Adapter
from f2d2_lightning.adapters.asking import TIMES, called
from f2d2_lightning.adapters.call import ConventionError
from f2d2_lightning.adapters.variance_exploding import VarianceExploding
from f2d2_lightning.paths import LinearPath, expand_time

__all__ = ["FEWEST_SAMPLES", "check_velocity"]

FEWEST_SAMPLES = 8
"""Below this nothing is judged."""

CLEARLY_BETTER = 0.75
"""Share of the declared convention's squared error that another one must stay below."""

CERTAIN = 4.0
"""Standard errors that the difference must be away from zero."""


class _Variant(NamedTuple):
    what: str
    sign: float
    mirrored: bool


DECLARED = _Variant("as declared", 1.0, False)
VARIANTS = (
    _Variant("with the opposite sign", -1.0, False),
    _Variant("with time running the other way", 1.0, True),
    _Variant("with time running the other way and the opposite sign", -1.0, True),
)


def check_velocity(flow_map: AdaptedFlowMap, x: Tensor, noise: Tensor, cond: Tensor | None) -> None:
    """Compare."""
    if len(x) < FEWEST_SAMPLES:
        return
    target = (x - noise).reshape(len(x), -1)
    energy = target.square().mean(-1)
    answers, linear = {}, []
    for time in TIMES:
        state = LinearPath().sample(x, noise, expand_time(time, x))
        for mirrored in (False, True):
            at = 1 - time if mirrored else time
            to = 1.0 if flow_map.endpoint_only else at
            u = called(flow_map, lambda state=state, at=at, to=to: flow_map(state, at, to, cond), x.device)  # type: ignore[misc]
            answers[time, mirrored] = u.reshape(len(x), -1)
        flat = state.reshape(len(x), -1)
        # the best multiple of the state: what a network has learned when it has learned hardly anything
        factor = (flat * target).sum() / flat.square().sum()
        linear.append((factor * flat - target).square().mean())

    def errors(variant: _Variant) -> Tensor:
        """Mean squared error, ``(times, B)``."""
        return torch.stack(
            [(variant.sign * answers[time, variant.mirrored] - target).square().mean(-1) for time in TIMES]
        )

    declared = errors(DECLARED)
    # a map's endpoint is a draw, not a mean, so it is less close to this one's target than a velocity
    known = (2.5 if flow_map.endpoint_only else 1.25) * torch.stack(linear)
    for variant in sorted(VARIANTS, key=lambda v: float(errors(v).sum())):
        other = errors(variant)
        gain = (declared - other).mean(0)
        if (
            float(other.sum()) < CLEARLY_BETTER * float(declared.sum())
            and bool((other.mean(1) < known).all())
            and float(gain.mean()) > CERTAIN * float(gain.std() / len(gain) ** 0.5)
        ):
            share = [float(e.mean() / energy.mean()) for e in (declared, other)]
            raise ConventionError(
                f"{Adapter.describe(flow_map.network)}, called as {flow_map.adapter.call.text!r}, points the wrong "
                f"way: on {len(x)} noised data its velocity leaves {share[0]:.2f} of the mean square of data - noise "
                f"as declared, and {share[1]:.2f} {variant.what}; {_remedy(flow_map.adapter, variant)}"
            )


def _remedy(adapter: Adapter, variant: _Variant) -> str:
    if isinstance(adapter, VarianceExploding):
        return (
            "the network must take noise levels sigma and answer the clean image (not the noise, and not a velocity): "
            "check call=, precondition= and answer=, or take another adapter"
        )
    noise_time, data_time = adapter.noise_time, adapter.data_time
    scale = variant.sign * adapter.velocity_scale
    changes = []
    if variant.mirrored:
        noise_time, data_time = data_time, noise_time
        changes.append(f"noise_time={noise_time}, data_time={data_time}")
    if scale != data_time - noise_time:
        changes.append(f"velocity_scale={scale}")
    return (
        f"give the adapter {', '.join(changes) or f'velocity_scale={scale}'} (it has noise_time={adapter.noise_time}, "
        f"data_time={adapter.data_time}, velocity_scale={adapter.velocity_scale})"
    )
