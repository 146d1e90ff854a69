"""Families of few-step models and of velocity models, as their public repositories call them.

Each is an :class:`~f2d2_lightning.adapters.Adapter` with other defaults, which all can be changed.
"""

from __future__ import annotations

from typing import Any

from f2d2_lightning.adapters.adapter import Adapter
from f2d2_lightning.flows.maps import Direction
from f2d2_lightning.utils.checks import one_of


class Shortcut(Adapter):
    """Shortcut models: time runs up, the second time is the length of the step.

    Frans et al., "One Step Diffusion via Shortcut Models", 2024, https://arxiv.org/abs/2410.12557

    The official network of F2D2 (Keely-Ai/F2D2) takes the logarithm of the length and answers ``(u, D / 20000)``:
    ``second_time="length", output=0``, with ``classes=`` if it has any.

    Args:
        second_time: ``"interval"``, the signed interval ``t - s``; ``"length"``, its size, for networks that take its
            logarithm or its square root; or ``"index"``, ``-log2`` of its size (0 is a full step, as in
            kvfrans/shortcut-models).
        largest_index: Index of the shortest step, also used on the diagonal.
        shortest_length: Length that stands for shorter ones with ``second_time="length"``.
        call: Instead of the above, the whole call.
        directions: ``"to_data"`` as such models are trained; others where you trained, or will train, them.
        kwargs: As :class:`Adapter`; kvfrans/shortcut-models needs ``channels_last=True, null_label=num_classes``, the
            official F2D2 network ``second_time="length", output=0, classes=num_classes``, and for both directions the
            call of the adapter ``interval="encoder.map_layer1"``.
    """

    def __init__(
        self,
        second_time: str = "interval",
        largest_index: int = 7,
        shortest_length: float = 1 / 1024,
        call: str | None = None,
        directions: Direction | str = "to_data",
        **kwargs: Any,
    ) -> None:
        # a size has no logarithm at zero; 2 ** -20 is below any index
        calls = {
            "interval": "net(x, s, t - s, cond)",
            "length": f"net(x, s, clamp(abs(t - s), {shortest_length}, 1.0), cond)",
            "index": f"net(x, s, clamp(-log2(clamp(abs(t - s), {2.0**-20}, 1.0)), 0.0, {float(largest_index)}), cond)",
        }
        if call is None:
            one_of("second_time", second_time, calls)
        super().__init__(call or calls[second_time], directions=directions, **kwargs)


class MeanFlow(Adapter):
    """MeanFlow: time runs down, ``z_r = z - (t - r) u(z, r, t)``.

    Geng et al., "Mean Flows for One-step Generative Modeling", 2025, https://arxiv.org/abs/2505.13447

    Our ``s``, start, is their ``t``; our ``t``, end, is their ``r``. The default is Gsunshine/py-meanflow's
    ``net(x, (t, h), aug_cond)``. Others (docs/FOREIGN.md says which were run, and against which commit):

    - haidog-yaqub/MeanFlow: ``call="net(x, s, t, cond)", output=0, null_label=num_classes``. Its embedder multiplies
      times by a thousand itself.
    - zhuyu-cs/MeanFlow, r first, class 0 without labels: ``call="net(x, t, s, cond)", null_label=num_classes``.
    - kyungmnlee/dmf: ``call="net(x, s, t, cond)", null_label=1000``.
    - rectified-flow-pytorch: ``call="net(x, s, s - t)"``.
    - NVlabs/FastGen, ``schedule_type="rf"``: ``call="net(x, s, cond, r=t, fwd_pred_type='flow')", classes=...``.
    - Lyy-iiis/imeanflow, in JAX, guidance scale and interval are inputs: ``call="net(x, s, s - t, full(1.0, s),
      full(0.0, s), full(1.0, s), cond)", output=0, channels_last=True, null_label=num_classes``.

    Args:
        call: The call, with ``s`` and ``t`` in their time.
        noise_time: Their time of noise.
        data_time: Their time of data.
        directions: ``"to_data"`` as such models are trained; others where you trained, or will train, them.
        kwargs: As :class:`Adapter`, such as ``null_label`` and ``output``.
    """

    def __init__(
        self,
        call: str = "net(x, (s, s - t), None)",
        noise_time: float = 1.0,
        data_time: float = 0.0,
        directions: Direction | str = "to_data",
        **kwargs: Any,
    ) -> None:
        super().__init__(call, noise_time, data_time, directions, **kwargs)


class TwoTime(Adapter):
    """Flow maps of Boffi et al.: time runs up, the second time is the end.

    https://arxiv.org/abs/2505.18825. The default asks for the velocity; ``call="net(s, t, x, cond)", answer="state"``
    for a network that answers the state, as EDM2FlowMap of Keely-Ai/JAX-F2D2 does, whose images have a prior of
    deviation .5, ``prior_std=0.5``. It makes labels one-hot itself.

    Args:
        call: The call.
        directions: Orders of time it was trained for.
        kwargs: As :class:`Adapter`.
    """

    def __init__(
        self, call: str = "net(s, t, x, cond)", directions: Direction | str = "to_data", **kwargs: Any
    ) -> None:
        super().__init__(call, directions=directions, **kwargs)


class FlowMatching(Adapter):
    """An instantaneous velocity, as a teacher: ``net(x, t)`` with time up (the paths of flow_matching).

    ``call="net(x=x, t=s)"`` for a ``ModelWrapper`` of flow_matching. The image network of
    facebookresearch/flow_matching takes ``extra``: ``call="net(x, s, extra={'label': cond})"``, or ``"net(x, s,
    extra={})"`` without labels. ``call="net(x, clamp(s, 1e-9, 1.0))"`` for a teacher of Keely-Ai/F2D2, which takes the
    logarithm of time.
    """

    def __init__(self, call: str = "net(x, s)", directions: Direction | str = "none", **kwargs: Any) -> None:
        super().__init__(call, directions=directions, **kwargs)


class TorchCFM(Adapter):
    """An instantaneous velocity, as a teacher: ``net(t, x, y)``, time first (UNetModel of torchcfm).

    torchcfm's ``MLP`` takes time as the last column of its input: ``call="net(cat(x, s))"``. Its ``torch_wrapper``
    takes one time for all states, and adapters give one per state.
    """

    def __init__(self, call: str = "net(s, x, cond)", directions: Direction | str = "none", **kwargs: Any) -> None:
        super().__init__(call, directions=directions, **kwargs)
