r"""Maximum-likelihood self-guidance: move the noise uphill in the model's own likelihood, then sample.

The likelihood of the sample that noise ``z`` leads to is known to a joint map in a single evaluation, so its gradient
costs one evaluation forward and one backward:

.. math:: z \leftarrow z + \eta \, \nabla_z \log p\big(X_{0 \to 1}(z)\big).

Ai et al., "Joint Distillation for Fast Likelihood Evaluation and Sampling in Flow-based Models", 2025,
https://arxiv.org/abs/2512.02636; their released code takes one step of Adam (``method="adam"``), which moves every
dimension by about the same length. What comes out is no longer distributed as the model: it is more likely, and less
diverse.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from f2d2_lightning.flows.maps import FlowMap, JointMap
from f2d2_lightning.flows.paths import like
from f2d2_lightning.likelihood._inputs import Array, as_cond, as_states, check_cond
from f2d2_lightning.likelihood.sampling import Samples, normal_log_prob, sample
from f2d2_lightning.likelihood.time_grids import time_grid
from f2d2_lightning.utils.checks import at_least, check_fields, checked, one_of
from f2d2_lightning.utils.conditions import Cond, mapped


@dataclass(frozen=True, repr=False)
class GuidedSamples(Samples):
    """Samples from guided noise, and what guidance did and cost.

    ``noise`` is the moved noise, ``evaluations`` counts all evaluations forward: guidance, sampling, and the check of
    the likelihood after guidance where it was asked for.
    """

    backward_evaluations: int = 0
    """Backward passes through the network per sample."""
    unguided_noise: Tensor | None = None
    """The noise before guidance, ``(B, ...)``."""
    log_prob_before: Tensor | None = None
    """Log-likelihood of what the unguided noise leads to in ``likelihood_steps``, ``(B,)``, nats."""
    log_prob_after: Tensor | None = None
    """The same of the guided noise; ``None`` unless measured."""


@dataclass(frozen=True)
class SelfGuidance:
    """A sampler that wraps any joint map.

    Args:
        scale: Step size ``eta`` of a gradient step; 0 for none, negative for less likely samples.
        steps: Gradient steps, one evaluation forward and one backward each (times ``likelihood_steps``).
        likelihood_steps: Evaluations of the likelihood whose gradient is taken.
        keep_norm: Put the moved noise back at the distance from the origin that it had. The prior pulls noise inwards,
            where no typical noise lies; with this, guidance chooses a direction and leaves the typical distance alone.
        method: ``"ascent"``, along the gradient; or ``"adam"``, the paper's: steps of Adam with the learning rate
            ``scale``, the first of which is ``scale`` times the gradient's sign.
        measure: Also evaluate the guided noise's likelihood as before guidance, ``likelihood_steps`` evaluations more
            unless sampling takes as many steps.

    Raises:
        ValueError: If a number is out of range.

    >>> from f2d2_lightning.flows import GaussianBaseline, GaussianFlow
    >>> flow = GaussianFlow(GaussianBaseline.from_covariance(torch.zeros(1), torch.eye(1)))
    >>> SelfGuidance(scale=0.5)(flow, torch.ones(1, 1), steps=1).noise  # the gradient is -z
    tensor([[0.5000]])
    """

    scale: float = 0.1
    steps: int = 1
    likelihood_steps: int = 1
    keep_norm: bool = False
    measure: bool = False
    method: str = "ascent"

    def __post_init__(self) -> None:
        check_fields(self)
        one_of("method", self.method, ("ascent", "adam"))
        at_least(1, steps=self.steps, likelihood_steps=self.likelihood_steps)

    @checked
    def __call__(
        self,
        joint_map: JointMap | FlowMap,
        noise: Array,
        steps: int | Sequence[float] = 1,
        cond: Cond | None = None,
        *,
        with_log_prob: bool = False,
    ) -> GuidedSamples:
        """Guide the noise, then sample; arguments as :func:`f2d2_lightning.sample`.

        The gradient is taken whatever the caller's mode (``torch.no_grad``, ``torch.inference_mode``), with respect to
        the noise alone: no parameter gets one.

        Raises:
            ValueError: If the map has no divergence, does not go to data, gives no gradient, or the noise is unfit.
            FloatingPointError: If guidance makes noise or samples NaN or infinite.
        """
        if not isinstance(joint_map, JointMap):
            raise ValueError(
                f"self-guidance needs a joint map, and {type(joint_map).__name__} has no divergence; "
                "wrap it: JointFlowMap(flow_map, DivergenceHead(...))"
            )
        noise = as_states(noise, "noise", joint_map)
        cond = as_cond(cond, noise)
        check_cond(cond, len(noise), joint_map)
        moved, before = noise, None
        adapt = _Adam(noise) if self.method == "adam" else None
        for _ in range(self.steps):
            gradient, value = self._gradient(joint_map, moved, cond)
            before = value if before is None else before
            moved = moved + self.scale * (gradient if adapt is None else adapt(gradient))
            if self.keep_norm:
                moved = moved * _norm(noise) / _norm(moved).clamp_min(torch.finfo(noise.dtype).tiny)
        self._check(moved, "noise")
        guided_forward = self.steps * self.likelihood_steps
        same = time_grid(steps) == time_grid(self.likelihood_steps)
        made = sample(joint_map, moved, steps, cond, with_log_prob=with_log_prob or (self.measure and same))
        self._check(made.state, "samples")
        after, checked = made.log_prob if same else None, 0
        if self.measure and not same:
            after = sample(joint_map, moved, self.likelihood_steps, cond, with_log_prob=True).log_prob
            checked = self.likelihood_steps
        return GuidedSamples(
            made.state,
            moved,
            made.evaluations + guided_forward + checked,
            made.log_prob if with_log_prob else None,
            backward_evaluations=guided_forward,
            unguided_noise=noise,
            log_prob_before=before,
            log_prob_after=after,
        )

    def _check(self, x: Tensor, what: str) -> None:
        if not bool(x.isfinite().all()):
            raise FloatingPointError(
                f"guidance with scale={self.scale} and steps={self.steps} made {what} NaN or infinite; lower the scale"
            )

    def _gradient(self, joint_map: JointMap, noise: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        """Gradient of the summed log-likelihood in the noise, and the log-likelihoods ``(B,)``."""
        # tensors made under inference_mode take part in no graph; a copy made outside of it does
        with torch.inference_mode(False), torch.enable_grad():
            start = noise.detach().clone().requires_grad_(True)
            cond = mapped(torch.clone, cond)
            x, change = start, start.new_zeros(len(start))
            for s, t in itertools.pairwise(time_grid(self.likelihood_steps)):
                u, divergence = joint_map(x, s, t, cond)
                if not u.requires_grad and any(True for _ in joint_map.parameters()):
                    # the prior's gradient alone would be left, and would look like an answer
                    raise ValueError(f"{type(joint_map).__name__} runs without a graph; guidance needs its gradient")
                x, change = x + (t - s) * u, change - (t - s) * divergence
            value = normal_log_prob(start) + change
            (gradient,) = torch.autograd.grad(value.sum(), start)
        return gradient.detach(), value.detach()


def _norm(x: Tensor) -> Tensor:
    return like(x.flatten(1).norm(dim=1), x)


class _Adam:
    """What Adam, in its usual numbers, makes of one gradient after the other: torch's step from zero at unit rate."""

    def __init__(self, like: Tensor) -> None:
        # what was made in inference mode cannot be changed in place outside of it
        with torch.inference_mode(False):
            self.step = torch.zeros_like(like.detach().clone())
            self.optimizer = torch.optim.Adam([self.step], lr=1.0, maximize=True)

    def __call__(self, gradient: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            self.step.zero_()
            self.step.grad = gradient
            self.optimizer.step()
            return self.step.clone()
