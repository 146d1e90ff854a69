"""How somebody's network is probably called, by what its ``forward`` takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn

STATES = {
    *("x", "xt", "x_t", "z", "zt", "z_t", "sample", "samples", "state", "states", "input", "inputs", "img", "image"),
    *("images", "data", "point", "points", "latent", "latents", "noisy", "hidden_states"),
}
STARTS = {"s", "t", "time", "times", "timestep", "timesteps", "tau", "start", "t_start", "t0", "t_cur", "t_emb"}
ENDS = {"r", "end", "stop", "t_end", "t_next", "t1", "t2", "target_time", "time_end"}
LENGTHS = {"dt", "d", "h", "delta", "delta_t", "step", "step_size", "length"}
TIMES = STARTS | ENDS | LENGTHS
THOUSANDS = {"timestep", "timesteps"}
"""Names of times that run to 1000 where they are used."""
MAPPINGS = {"extra"}


def likely_calls(network: nn.Module) -> list[str]:
    """Calls as text, the likeliest first: by the names of the arguments, then by their number.

    >>> class Net(nn.Module):
    ...     def forward(self, sample, timestep, class_labels=None):
    ...         return sample
    >>> likely_calls(Net())
    ['net(x, 1000 * s)', 'net(x, s, t)', 'net(s, t, x)', 'net(x, s)', 'net(s, x)', 'net(x, s, None)', 'net(s, x, None)']
    """
    signature = inspect.signature(network.forward)
    named = _by_names(list(signature.parameters.values()))
    forms = (("x", "s", "t"), ("s", "t", "x"), ("x", "s"), ("s", "x"), ("x", "s", "None"), ("s", "x", "None"))
    numbered = [f"net({', '.join(form)})" for form in forms if _takes(signature, len(form))]
    return list(dict.fromkeys([*named, *numbered]))


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _by_names(parameters: list[inspect.Parameter]) -> Iterator[str]:
    """The call of parameters of which one is a state, and one or two are times."""
    parameters = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    times = _times([p.name for p in parameters if p.name in TIMES])
    if times is None or sum(p.name in STATES for p in parameters) != 1:
        return
    arguments, skipped = [], False
    for parameter in parameters:
        name, optional = parameter.name, parameter.default is not parameter.empty
        if name not in TIMES and name not in STATES and optional:
            skipped = True
            continue
        value = "x" if name in STATES else times.get(name, "{}" if name in MAPPINGS else "None")
        by_name = skipped or parameter.kind is parameter.KEYWORD_ONLY
        arguments.append(f"{name}={value}" if by_name else value)
    yield f"net({', '.join(arguments)})"


def _times(names: list[str]) -> dict[str, str] | None:
    """What is passed for one or two parameters that are times, by their names; ``None`` for more, or none."""
    if len(names) == 1:
        passed = {names[0]: "s"}
    elif len(names) == 2:
        first, second = names
        # s and t are start and end in any order, as are t and r
        if second == "s" or first in ENDS | LENGTHS:
            first, second = second, first
        passed = {first: "s", second: "t - s" if second in LENGTHS else "t"}
    else:
        return None
    scaled = {"s": "1000 * s", "t": "1000 * t"}
    return {name: scaled.get(value, value) if name in THOUSANDS else value for name, value in passed.items()}
