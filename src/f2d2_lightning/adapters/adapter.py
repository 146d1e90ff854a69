r"""Conventions of other people's networks, converted to this package's.

An :class:`Adapter` says how a family of networks is called; called with a network, it gives an
:class:`AdaptedFlowMap`, which adds features for the head and, where the network lacks one, a second time. Foreign time
runs linearly from ``noise_time`` to ``data_time``, so with :math:`\tau = \tau_0 + (\tau_1 - \tau_0)\,t` a foreign
average velocity :math:`\Delta x / \Delta\tau` is ours after multiplication with :math:`\tau_1 - \tau_0`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from f2d2_lightning.adapters.call import Call, ConventionError
from f2d2_lightning.adapters.features import FeatureTap, find_submodule
from f2d2_lightning.adapters.interval import AddedInterval
from f2d2_lightning.flows._held import evaluating
from f2d2_lightning.flows.maps import Direction, FlowMap, check_interval
from f2d2_lightning.flows.paths import expand_time, like
from f2d2_lightning.utils.checks import one_of
from f2d2_lightning.utils.conditions import Cond, dtype_beside, kind_of, mapped, some_of, tensors
from f2d2_lightning.utils.configured import Configured
from f2d2_lightning.utils.seeding import own_random_state

SHARED = ("output", "channels_last", "null_label", "classes", "time_axes")
"""Arguments that adapters of every kind have."""
# times and labels become tensors of so many axes and columns, whoever says the number
MOST_AXES, MOST_CLASSES = 64, 10**6


class Adapter(Configured):
    """How a network is called and what it answers.

    The families of :mod:`f2d2_lightning.adapters` are this with other defaults; an unlisted model needs one line:

    >>> shrink = lambda x, times: -x * times[1][:, None]  # time runs down, the second time is the interval
    >>> adapter = Adapter("net(x, (s, s - t))", noise_time=1.0, data_time=0.0, directions="to_data")
    >>> flow_map = adapter(shrink)
    >>> flow_map(torch.ones(1, 2), 0.0, 0.5)
    tensor([[0.5000, 0.5000]])

    Args:
        call: The call as the other author writes it; ``net`` is the network, ``x`` the state, ``s`` and ``t`` the
            times of start and end in the other author's time, ``cond`` the conditioning. Order, keywords, the form of
            the second time (``t``, ``t - s``, ``s - t``), scales (``1000 * s``), guidance inputs (``w=1.0``) are said
            here. A call without ``t`` is of a network that takes no second time.
        noise_time: Foreign time of noise.
        data_time: Foreign time of data: ``0.0, 1.0`` for flow matching and shortcut models, ``1.0, 0.0`` for MeanFlow.
        directions: Orders of time that the network was, or will be, trained for: ``"to_data"``, ``"to_noise"``,
            ``"both"``, or ``"none"`` for an instantaneous velocity, which can be a teacher.
        answer: ``"velocity"``, the average velocity in foreign time, or ``"state"``, the state at the end.
        velocity_scale: Factor from the answered velocity to ours; by default ``data_time - noise_time``. For networks
            whose velocity does not point along their own time.
        output: Which part of the answer counts, if it is a tuple (an index), a dictionary or an object (a name).
        channels_last: Whether the network takes and gives images ``(B, H, W, C)``.
        null_label: Class label that stands for "no class", used where ``cond`` is ``None``.
        classes: Number of classes, if the network takes labels as one-hot vectors; ``cond`` stays integers, ``(B,)``.
        time_axes: Axes of the times that the network takes: 1 for ``(B,)``, 2 for ``(B, 1)``, and so on.
        prior_std: Standard deviation of the foreign prior. Our states are the foreign ones divided by it, and so must
            the data be; log-densities then are those of the divided data.
        shortest: Shortest interval, in our time, that a ``"state"`` answer is divided by; the diagonal is the limit.

    Raises:
        ValueError: If an argument is none of the above.
    """

    endpoint_only: ClassVar[bool] = False
    """Whether such networks answer the jump to data and nothing else."""

    _arguments: ClassVar[tuple[str, ...]] = (
        *("call", "noise_time", "data_time", "directions", "answer", "velocity_scale"),
        *(*SHARED, "prior_std", "shortest"),
    )

    def __init__(
        self,
        call: str = "net(x, s, t, cond)",
        noise_time: float = 0.0,
        data_time: float = 1.0,
        directions: Direction | str = "both",
        answer: str = "velocity",
        velocity_scale: float | None = None,
        output: int | str | None = None,
        channels_last: bool = False,
        null_label: int | None = None,
        classes: int | None = None,
        time_axes: int = 1,
        prior_std: float = 1.0,
        shortest: float = 1e-3,
    ) -> None:
        if noise_time == data_time:
            raise ValueError(f"noise_time and data_time are both {noise_time}; time must run between them")
        one_of("answer", answer, ("velocity", "state"))
        if time_axes < 1 or not prior_std > 0 or not 0 < shortest < 1:
            raise ValueError(
                f"time_axes={time_axes} is at least 1, prior_std={prior_std} positive, shortest={shortest} in (0, 1)"
            )
        self.call = Call(call)
        self.directions = Direction.parse(directions)
        self.sees_end = "t" in self.call.names
        self.noise_time, self.data_time = noise_time, data_time
        self.answer = answer
        self._check_end()
        self.velocity_scale = data_time - noise_time if velocity_scale is None else velocity_scale
        self.output = output
        self.channels_last = channels_last
        self.null_label, self.classes = null_label, classes
        self.time_axes = time_axes
        self.prior_std = prior_std
        self.shortest = shortest
        self.leaves_data = True

    def _check_end(self) -> None:
        """Refuse a network that is to answer the state at an end that it is not told."""
        if self.answer == "state" and not self.sees_end:
            raise ValueError(f"{self.call.text!r} passes no end time t, so there is no end to answer the state at")

    def __call__(
        self,
        network: Callable[..., Any],
        features: str | None = None,
        interval: str | None = None,
        directions: Direction | str | None = None,
    ) -> AdaptedFlowMap:
        """A flow map of ``network``; arguments as :class:`~f2d2_lightning.adapters.AdaptedFlowMap`."""
        return AdaptedFlowMap(network, self, features=features, interval=interval, directions=directions)

    @property
    def conditional(self) -> bool:
        """Whether the call passes conditioning."""
        return "cond" in self.call.names

    # --- what a family may override ---

    def average_velocity(
        self, network: Callable[..., Any], x: Tensor, s: Tensor, t: Tensor, cond: Cond | None
    ) -> Tensor:
        """``u(x, s, t)``, shape of ``x``, in this package's convention and times, ``(B,)``."""
        if self.answer == "velocity":
            return self.velocity_scale / self.prior_std * self.ask(network, self.prior_std * x, s, t, cond)
        # a state that had no time to move says nothing about the velocity: the shortest interval is taken there, and
        # one that would leave [0, 1] starts a little off
        h, short = self.shortest, (t - s).abs() < self.shortest
        up = (t > s) | ((t == s) & (Direction.TO_DATA in self.directions))
        start = torch.where(short, torch.where(up, s.clamp(max=1 - h), s.clamp(min=h)), s)
        end = torch.where(short, torch.where(up, start + h, start - h), t)
        state = self.ask(network, self.prior_std * x, start, end, cond) / self.prior_std
        return (state - x) / like(end - start, x)

    def ask(self, network: Callable[..., Any], x: Tensor, s: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        """Call the network at foreign state ``x`` and our times ``s``, ``t``; its answer, shape of ``x``."""
        return self._ask(network, x, self.foreign_time(s), self.foreign_time(t), cond)

    def foreign_time(self, t: Tensor) -> Tensor:
        """Our time, ``(B,)``, as the network's."""
        return self.noise_time + (self.data_time - self.noise_time) * t

    # --- the call itself ---

    def _ask(self, network: Callable[..., Any], x: Tensor, s: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        axes = (len(x), *(1 for _ in range(self.time_axes - 1)))
        dtype = compute_dtype(network, x)
        state = x.movedim(1, -1) if self.channels_last else x
        # copies: a network may write into what it is given (x.mul_(2), t.mul_(1000)), and these are the caller's
        names: Mapping[str, Any] = {
            "x": state.to(dtype, copy=True),
            "s": s.reshape(axes).to(dtype, copy=True),
            "t": t.reshape(axes).to(dtype, copy=True),
            "cond": self._labels(x, cond, dtype),
        }
        answer = self._part(self.call(network, names))
        if answer.shape != state.shape:
            raise ConventionError(
                f"{self.describe(network)} was called as {self.call.text!r} with a state of shape "
                f"{tuple(state.shape)} and answered shape {tuple(answer.shape)}; the answer must have the "
                "state's shape: check the call, output= and channels_last= of the adapter"
            )
        # autocast, and networks of lower precision, do not lower the precision of the state
        return (answer.movedim(-1, 1) if self.channels_last else answer).to(x.dtype)

    def _labels(self, x: Tensor, cond: Cond | None, dtype: torch.dtype) -> Cond | None:
        check_conditioning(cond)
        if "cond" not in self.call.names:
            return None
        if cond is None:
            if self.null_label is None:
                return None
            cond = torch.full((len(x),), self.null_label, device=x.device)
        if self.classes is not None:
            if not isinstance(cond, Tensor) or torch.is_floating_point(cond) or cond.ndim != 1:
                raise ValueError(
                    f"cond is {kind_of(cond)}; with classes={self.classes} it is "
                    "integer labels (B,), which the adapter makes one-hot"
                )
            cond = nn.functional.one_hot(cond.long(), self.classes).to(dtype)
        return mapped(lambda part: part.to(dtype_beside(part, dtype), copy=True), cond)

    def _part(self, answer: Any) -> Tensor:
        output = self.output
        if isinstance(output, int) and isinstance(answer, (tuple, list)) and -len(answer) <= output < len(answer):
            answer = answer[output]
        elif isinstance(output, str) and (output in answer if isinstance(answer, Mapping) else hasattr(answer, output)):
            answer = answer[output] if isinstance(answer, Mapping) else getattr(answer, output)
        elif output is not None:
            raise ConventionError(f"the network answered {_kind(answer)}, which has no part output={output!r}")
        if not isinstance(answer, Tensor):
            raise ConventionError(
                f"the network answered {_kind(answer)}, not a tensor; say which part is the velocity: output=0, or "
                "output='name'"
            )
        return answer

    # --- a description for checkpoints ---

    def configuration(self) -> dict[str, Any]:
        """Arguments of the constructor as the adapter is now, a family's defaults too: they may be others later."""
        values = {name: getattr(self, name) for name in self._arguments}
        return values | {"call": self.call.text, "directions": self.directions.label}

    def config(self) -> dict[str, Any]:
        """Class and arguments in plain values, from which :func:`adapter_from_config` makes an equal adapter.

        An adapter of your own class names that class; it is not made again from here, give the object instead.
        """
        cls = type(self)
        ours = cls.__module__.startswith(__name__.rpartition(".")[0] + ".")
        return {"class": cls.__name__ if ours else f"{cls.__module__}.{cls.__qualname__}", **self.configuration()}

    @staticmethod
    def describe(network: Callable[..., Any]) -> str:
        """Name of a network for messages."""
        return type(network).__name__ if isinstance(network, nn.Module) else getattr(network, "__name__", "a function")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.call.text!r}, directions={self.directions.name})"


class AdaptedFlowMap(FlowMap, Configured):
    """A network in a foreign convention as a flow map.

    Args:
        network: The network, a module (compiled or not) or any function that ``adapter`` can call.
        adapter: How it is called; the generic one by default.
        features: Name of the submodule whose output a divergence head reads; by default the input of the last layer.
        interval: Name of the submodule that embeds the network's time. An :class:`AddedInterval` is added to its
            output, so that the map can be fine-tuned to go between any two times, in both directions.
        directions: Orders of time that it was, or will be, trained for; by default the adapter's, and both with
            ``interval``.

    Raises:
        ValueError: If a named submodule or method does not exist, or a way from data is to be added to a
            preconditioning that leaves the data as they are.
    """

    any_dtype = True

    def __init__(
        self,
        network: Callable[..., Any],
        adapter: Adapter | None = None,
        features: str | None = None,
        interval: str | None = None,
        directions: Direction | str | None = None,
    ) -> None:
        super().__init__()
        # forward-mode derivatives and hooks do not pass through compiled code: the network's own code is called
        network = getattr(network, "_orig_mod", network)
        if not callable(network):
            raise ValueError(f"the network is {network!r:.120}; a torch.nn.Module or a function is needed")
        self.network = network
        self.adapter = adapter or Adapter()
        if self.adapter.time_axes > MOST_AXES or (self.adapter.classes or 0) > MOST_CLASSES:
            raise ValueError(
                f"the adapter has time_axes={self.adapter.time_axes:,} and classes={self.adapter.classes}; up to "
                f"{MOST_AXES} and {MOST_CLASSES:,} are made into tensors"
            )
        self.tap: FeatureTap | None = None
        self.interval_name = interval
        self.interval: AddedInterval | None = None
        self._compiled = False
        if interval is not None and not self.adapter.leaves_data:
            raise ValueError(
                "precondition='consistency' multiplies the network's answer with zero at sigma_min, so it cannot learn "
                "to leave the data; fine-tune with precondition='edm', which differs near sigma_min only"
            )
        if isinstance(network, nn.Module):
            self.adapter.call.check(network)
            self._compiled = any(
                hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in network.modules()
            )
            self.tap = FeatureTap(network, features, self.adapter.channels_last)
            self.interval = None if interval is None else AddedInterval.for_submodule(network, interval)
        elif features is not None or interval is not None:
            raise ValueError(f"features= and interval= name submodules, and {Adapter.describe(network)} has none")
        if directions is None:
            directions = self.adapter.directions if interval is None else Direction.BOTH
        self.directions = Direction.parse(directions)
        self._features: int | None = None

    def configuration(self) -> dict[str, Any]:
        """Arguments of the constructor, as the map is now."""
        return {
            "network": self.network,
            "adapter": self.adapter,
            "features": None if self.tap is None else self.tap.name,
            "interval": self.interval_name,
            "directions": self.directions.label,
        }

    @property
    def answerable(self) -> Direction:
        """``directions``, or none if the network is told no end time: it then knows instantaneous velocities only."""
        sees_end = self.adapter.sees_end or self.adapter.endpoint_only or self.interval is not None
        return self.directions if sees_end else Direction.NONE

    @property
    def endpoint_only(self) -> bool:
        """Whether the network knows no other end than data, as a consistency model without ``interval=``."""
        return self.adapter.endpoint_only and self.interval is None

    @property
    def conditional(self) -> bool:
        """Whether the network is told conditioning."""
        return self.adapter.conditional

    @property
    def probed(self) -> bool:
        """Whether :attr:`features` are known."""
        return self._features is not None

    @property
    def features(self) -> int:
        """Channels of the features, known once :meth:`probe` or a call of :meth:`forward_features` has shown them.

        Raises:
            ValueError: If neither has happened yet.
        """
        if self._features is None:
            raise ValueError(
                "how many feature channels the network gives is known only from a call: probe(x, cond), with a batch "
                "of states, first"
            )
        return self._features

    def probe(self, x: Tensor, cond: Cond | None = None) -> int:
        """Channels ``F`` for ``DivergenceHead(features=F)``, found by one call on states ``(B, ...)``.

        The call is without training mode and gradients.
        """
        with evaluating(self), torch.no_grad():
            low, high = (0.25, 0.75) if self.directions != Direction.TO_NOISE else (0.75, 0.25)
            self.forward_features(x, low, low if self.answerable == Direction.NONE else high, cond)
        return self.features

    def forward(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        directions = self.answerable
        if directions != Direction.BOTH:
            check_interval(s, t, directions, what=Adapter.describe(self.network))
        s, t = expand_time(s, x), expand_time(t, x)
        with self.eager(), self._interval_added(s, t):
            return self.adapter.average_velocity(self.network, x, s, t, cond)

    def velocity(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Instantaneous velocity ``u(x, t, t)``, shape of ``x``.

        Raises:
            ValueError: If the network knows no other end than data: on its diagonal it answers the jump to data.
        """
        if self.endpoint_only:
            raise ValueError(
                f"{Adapter.describe(self.network)} maps to data only (a consistency model), and that jump is not its "
                "instantaneous velocity; give a teacher that has one (TeacherSource, Denoiser), or interval='name of "
                "the time embedding' and fine-tune it into a map between any two times"
            )
        return super().velocity(x, t, cond)

    def forward_features(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.tap is None:
            raise ValueError(
                f"{Adapter.describe(self.network)} is a function and gives no features; give the head its own network: "
                "DivergenceHead(network=...)"
            )
        if self.tap.layer is None and self.adapter.output is not None:
            self._find_layer(x, s, t, cond)
        u, features = self.tap.call(lambda: self(x, s, t, cond), len(x))
        self._features = features.shape[1]
        return u, features.to(x.dtype)

    def _find_layer(self, x: Tensor, s: Tensor | float, t: Tensor | float, cond: Cond | None) -> None:
        """Which of several outputs' last layers the velocity comes from, by one more call on one state."""
        assert self.tap is not None
        check_conditioning(cond)
        s, t = expand_time(s, x)[:1], expand_time(t, x)[:1]
        cond = some_of(cond, slice(1))
        with own_random_state(x.device), evaluating(self):
            self.tap.find(lambda: self(x[:1], s, t, cond))

    def eager(self) -> contextlib.AbstractContextManager[Any]:
        """Run compiled parts of the network as they were written."""
        compiled = self._compiled and not torch.compiler.is_compiling()
        return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()

    @contextlib.contextmanager
    def _interval_added(self, s: Tensor, t: Tensor) -> Iterator[None]:
        if self.interval is None:
            yield
            return
        added, ran = self.interval, False

        def add(module: nn.Module, arguments: Any, output: Any) -> Tensor:
            nonlocal ran
            ran = True
            return added.added_to(output, s, t)

        assert isinstance(self.network, nn.Module)
        with find_submodule(self.network, str(self.interval_name)).register_forward_hook(add):
            yield
        if not ran:
            raise ValueError(
                f"{Adapter.describe(self.network)} did not run {self.interval_name!r}, so the pair of times was added "
                "nowhere; name the submodule of the time embedding that runs in every call: interval='...'"
            )

    def extra_repr(self) -> str:
        return f"{self.adapter!r}, directions={self.directions.name}"


def check_conditioning(cond: Any) -> None:
    """Refuse conditioning that is neither a tensor nor of tensors: a ``ValueError`` says what came."""
    if wrong := [part for part in tensors(cond) if not isinstance(part, Tensor)]:
        raise ValueError(
            f"cond {'is' if wrong[0] is cond else 'holds'} {_kind(wrong[0])}, and conditioning is a tensor (B, ...), "
            "such as labels (B,) or embeddings (B, E), or a tuple or dictionary of tensors, or None; make it so "
            "(data_to_state= of the callback, data_to_state of the module), and put the rest of what the network takes "
            "into the adapter's call=, as in call=\"net(x, s, extra={'y': cond})\""
        )


def compute_dtype(network: Callable[..., Any], x: Tensor) -> torch.dtype:
    """What a network computes in: the type of its first floating weights, else that of the state."""
    if isinstance(network, nn.Module):
        for parameter in network.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return x.dtype


def _kind(answer: Any) -> str:
    if isinstance(answer, (tuple, list)):
        return f"a {type(answer).__name__} of {len(answer)} ({', '.join(type(item).__name__ for item in answer)})"
    if isinstance(answer, Mapping):
        return f"a mapping with {', '.join(map(repr, answer))}"
    return f"a {type(answer).__name__}"


def adapter_from_config(config: Mapping[str, Any]) -> Adapter:
    """An adapter from what :meth:`Adapter.config` gave.

    Args:
        config: ``"class"``, a name in :mod:`f2d2_lightning.adapters`, and its arguments.

    Raises:
        ValueError: If the class is none of this package's, or the arguments are not its own.

    >>> adapter_from_config({"class": "MeanFlow", "output": 0})
    MeanFlow('net(x, (s, s - t), None)', directions=TO_DATA)
    """
    import f2d2_lightning.adapters as package

    arguments = dict(config)
    name = arguments.pop("class", None)
    cls = getattr(package, name, None) if isinstance(name, str) and name in package.__all__ else None
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise ValueError(
            f"the adapter's class is {name!r}, which is none of f2d2_lightning.adapters, and no other code is run from "
            "a file; make the adapter yourself and pass the object"
        )
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{name} does not take these arguments: {error}; give what {name}.config() gave") from error
