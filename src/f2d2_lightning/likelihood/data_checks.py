"""Whether data can have a density at all, seen before a model learns one.

The density of a flow is with respect to volume. Copies, single values that come often and columns that are functions of
others have none: the longer a model trains, the higher the likelihood that it gives them, without a bound. What is said
here is sure, or nearly so: data that merely correlate, repeat a value now and then, or have tails are left alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from f2d2_lightning.likelihood.quantization import MOST_ALIKE, Quantization

MOST_STATES = 2**16
"""States that are looked at."""
MOST_BYTES = 2**25
"""Memory that they may take."""
MOST_SECONDS = 20.0
"""Time after which no more are read."""
FEWEST = 16
"""States below which no density is learned."""
OFTEN = 16
"""Repetitions from which a value comes often."""
ENOUGH = 64
"""States from which each column is looked at by itself."""
MOST_COPIES = 0.01
"""Share of states that may be copies of others."""
MOST_AXES = 1024
"""Columns up to which linear relations are looked for."""
MOST_PAIRS = 64
"""Columns up to which functions of a single other column are looked for."""
DEGENERATE = 1e-5
"""What is left of a column given the others, in its standard deviations, that is none. Single precision has less than a
hundred numbers within it; a condition number of 1e8 leaves ten times as much."""
COARSEST = 3e-5
"""The same where a curve is interpolated."""
UNITS = (1e-2, 1e2)
"""Standard deviations of a column that go with noise of variance one."""
NARROWEST = 1 / 20
"""Width of the middle half of a column, as a normal distribution's, in its standard deviations: less is outliers."""
SHOWN = 4
"""Columns whose functions are said."""
NORMAL_QUARTILES = 1.349
"""Standard deviations between the quartiles of a normal distribution."""


@dataclass(frozen=True)
class Finding:
    """Something about data of which a likelihood will not mean what it should."""

    kind: str
    """``"few"``, ``"not_finite"``, ``"constant"``, ``"copies"``, ``"discrete"``, ``"function"``, ``"outliers"`` or
    ``"units"``."""
    message: str
    """What was found, and what to do."""
    columns: tuple[int, ...] = ()
    """Columns that it is about, of the flattened state."""
    error: bool = False
    """Whether training makes no sense at all."""


def check_data(
    batches: Iterable[Tensor], quantization: Quantization | None = None, *, copies: bool = True
) -> list[Finding]:
    """Look at data before a density is learned of them.

    Up to 65,536 states, 32 MiB and 20 seconds of reading are looked at. No random numbers are drawn.

    Args:
        batches: States ``(B, ...)``, as in training. A single tensor goes in as ``[x]``.
        quantization: Levels and range of dequantized data; ``None`` for continuous data.
        copies: Whether states that are the same stand for copies in the data; else they are taken as one, as where the
            batches repeat data.

    Returns:
        What was found, errors first; none for data that are fine.

    >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    >>> check_data([x])
    []
    >>> [(found.kind, found.columns) for found in check_data([torch.cat((x, x[:, :1] - 2 * x[:, 1:2]), 1)])]
    [('function', (3,))]
    """
    x, shape, complete = _take(batches)
    count = len(x)
    if count == 0:
        return [Finding("few", "there are no training data", error=True)]
    if (bad := ~x.isfinite()).any():
        columns = bad.any(0).nonzero().flatten().tolist()
        message = (
            f"the training data hold NaN or infinity in {int(bad.any(1).sum()):,} of {count:,} states "
            f"({_named(columns, shape)}); remove these states, or fill in what is missing"
        )
        return [Finding("not_finite", message, tuple(columns), error=True)]
    if not copies:
        x = x[_distinct(x)]
        count = len(x)
    low, high = x.amin(0), x.amax(0)
    size = torch.maximum(low.abs(), high.abs()).double()
    rounding = torch.finfo(x.dtype).eps * size
    still = (high - low).double() <= 4 * rounding
    if still.all():
        message = (
            f"the {count:,} training states are all the same, and such data have no density; look at what the data "
            "set returns"
        )
        return [Finding("constant", message, tuple(range(x.shape[1])), error=True)]
    found = list(_few(count, shape)) if complete else []
    if still.any():
        columns = still.nonzero().flatten().tolist()
        found.append(
            Finding(
                "constant",
                f"all training states hold one and the same number in {_named(columns, shape)}, along which the "
                "density has no bound: leave them out",
                tuple(columns),
            )
        )
    live = (~still).nonzero().flatten().tolist()
    smooth = live
    if quantization is None:
        discrete = list(find_discrete(x.reshape(count, *shape), still.nonzero().flatten().tolist()))
        rough = {column for one in discrete for column in one.columns or live}
        smooth = [column for column in live if column not in rough]
        found += discrete
        # states that are discrete have copies, and need no word of them
        if copies and smooth:
            found += _copies(x)
    deviation = x.double().std(0)
    if len(live) <= MOST_AXES:
        found += _linear(x, live, deviation, rounding, shape)
    if len(shape) == 1 and quantization is None and count >= ENOUGH:
        known = {column for one in found if one.kind == "function" for column in one.columns}
        far = list(_outliers(x, [column for column in smooth if column not in known], deviation))
        known |= {column for one in far for column in one.columns}
        smooth = [column for column in smooth if column not in known]
        if len(smooth) <= MOST_PAIRS:
            found += _curves(x, smooth, deviation, rounding)
        found += far
        found += _units(x, [column for column in live if column not in known], deviation)
    return found


def find_discrete(x: Tensor, skip: Collection[int] = ()) -> Iterator[Finding]:
    """Columns of continuous states ``(B, ...)``, but for some, that take few values, or one of them often.

    Images are looked at as a whole.
    """
    x, table = x.detach(), x.ndim == 2 and len(x) >= ENOUGH
    kept = [column for column in range(x.shape[1]) if column not in skip] if x.ndim == 2 else []
    parts = {column: x[:, column] for column in kept}
    if not table:
        parts = {0: (x[:, kept] if kept else x).reshape(-1)[: 2**14]}
    seen = {}
    for column, values in parts.items():
        if len(values) < ENOUGH:
            continue
        different, counts = values.unique(return_counts=True)
        often = int(counts.argmax())
        if OFTEN * len(different) <= min(len(values), 2**14):
            seen[column] = f"{len(different)} values{_apart(different)}"
        elif float(counts[often]) > max(OFTEN - 1, MOST_ALIKE * len(values)):
            seen[column] = f"{100 * float(counts[often]) / len(values):.0f} % are {float(different[often]):.4g}"
    if not seen:
        return
    columns = tuple(seen) if table else ()
    where = "the states" if not columns else f"columns {', '.join(map(str, columns[:8]))} of the states"
    shown = [f"{f'{column}: ' if columns else ''}{said}" for column, said in list(seen.items())[:8]]
    yield Finding(
        "discrete",
        f"{where} take few different values, or one of them often ({'; '.join(shown)}): these data look discrete, "
        "and the density of discrete data has no bound. Say levels=, low= and high=, and give dequantized states; "
        "of a table, add uniform noise as wide as the values are apart, and leave columns of two values out, or "
        "give them as cond",
        columns,
    )


def _apart(different: Tensor) -> str:
    """How far sorted values on a grid are apart."""
    if len(different) < 3:
        return ""
    gaps = different.diff()
    steps = gaps / gaps.min()
    return f", {float(gaps.min()):.4g} apart" if bool(((steps - steps.round()).abs() < 0.05).all()) else ""


def _take(batches: Iterable[Tensor]) -> tuple[Tensor, tuple[int, ...], bool]:
    """Flat states ``(N, dim)`` on the CPU, the shape of one, and whether they are all that there are."""
    parts: list[Tensor] = []
    shape: tuple[int, ...] = ()
    count, started = 0, time.monotonic()
    for batch in batches:
        shape = tuple(batch.shape[1:])
        flat = batch.detach().flatten(1).cpu()
        flat = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
        most = max(FEWEST, min(MOST_STATES, MOST_BYTES // (max(1, flat.shape[1]) * flat.element_size())))
        parts.append(flat[: most - count])
        count += len(parts[-1])
        if count >= most or time.monotonic() - started > MOST_SECONDS:
            return torch.cat(parts), shape, False
    return (torch.cat(parts) if parts else torch.zeros(0, 1)), shape, True


def _named(columns: Sequence[int], shape: tuple[int, ...], most: int = 8) -> str:
    """``columns 3, 5``; of images ``places (0, 1, 2), (0, 1, 3)``."""
    what = "column" if len(shape) == 1 else "place"
    more = f" and {len(columns) - most:,} more" if len(columns) > most else ""
    return f"{what}{'s' * (len(columns) > 1)} {', '.join(_place(one, shape) for one in columns[:most])}{more}"


def _place(column: int, shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return str(column)
    return str(tuple(int(i) for i in torch.unravel_index(torch.tensor(column), shape)))


def _few(count: int, shape: tuple[int, ...]) -> Iterator[Finding]:
    # what a network makes of neighbouring pixels is learned of few images as well
    dim = math.prod(shape) if len(shape) == 1 else 0
    if count < FEWEST or count <= dim:
        yield Finding(
            "few",
            f"there are {count:,} training states of {math.prod(shape):,} dimensions: a model learns so few by heart, "
            "and fresh data get far too low a likelihood. Give more data, or fewer columns",
        )


def _distinct(x: Tensor) -> list[int]:
    """One row of each kind."""
    # minus zero is zero
    return list({row.tobytes(): place for place, row in enumerate((x + 0.0).numpy())}.values())


def _copies(x: Tensor) -> Iterator[Finding]:
    copies = len(x) - len(_distinct(x))
    if copies > MOST_COPIES * len(x):
        yield Finding(
            "copies",
            f"{100 * copies / len(x):.1f} % of {len(x):,} training states are exact copies of others, where a density "
            "has no bound. Remove the copies; if the data are discrete, say levels=, low= and high=, and give "
            "dequantized states",
        )


def _linear(
    x: Tensor, live: list[int], deviation: Tensor, rounding: Tensor, shape: tuple[int, ...]
) -> Iterator[Finding]:
    """Columns that are linear functions of those before them, up to rounding."""
    if len(live) < 2 or len(x) < 2 * len(live):
        return
    # a relation of all rows is one of some, evenly spaced
    rows = torch.linspace(0, len(x) - 1, min(len(x), max(4 * len(live), 1024))).round().long()
    z = x[rows][:, live].double()
    z = (z - z.mean(0)) / deviation[live]
    left = torch.linalg.qr(z, mode="r").R.diagonal().abs() / math.sqrt(len(z))
    gone = left <= DEGENERATE + 8 * rounding[live] / deviation[live]
    if not gone.any():
        return
    dependent = gone.nonzero().flatten().tolist()
    kept = (~gone).nonzero().flatten()
    weights = torch.linalg.lstsq(z[:, kept], z[:, dependent]).solution
    said = {}
    for weight, place in list(zip(weights.T, dependent, strict=True))[:SHOWN]:
        said[live[place]] = [live[int(kept[i])] for i in (weight.abs() > 1e-3).nonzero().flatten()]
    yield _function("linear", [live[place] for place in dependent], said, shape)


def _function(kind: str, columns: Sequence[int], said: Mapping[int, Sequence[int]], shape: tuple[int, ...]) -> Finding:
    of = "; ".join(f"{_named([one], shape)} is one of {_named(others, shape)}" for one, others in said.items())
    return Finding(
        "function",
        f"some of the training data's columns are {kind} functions of others, to rounding ({of}): the data fill no "
        f"volume, and their density has no bound. Leave out {_named(columns, shape)}",
        tuple(columns),
    )


def _curves(x: Tensor, columns: list[int], deviation: Tensor, rounding: Tensor) -> Iterator[Finding]:
    """Columns that are smooth functions of one other: between its neighbours, in the other's order, each is midway."""
    rows = torch.linspace(0, len(x) - 1, min(len(x), 2048)).round().long()
    z = x[rows][:, columns].double()
    scale = deviation[columns]
    pairs: dict[int, int] = {}
    for place, column in enumerate(columns):
        ordered = z[z[:, place].argsort()]
        before, here, after = ordered[:-2], ordered[1:-1], ordered[2:]
        gap = (after - before)[:, place, None]
        moves = gap.flatten() > 0
        share = ((here - before)[:, place, None] / gap)[moves]
        apart = (here[moves] - before[moves] - share * (after - before)[moves]).abs().quantile(0.5, 0)
        small = apart <= COARSEST * scale + 8 * rounding[columns]
        for other in small.nonzero().flatten().tolist():
            if other != place and columns[other] not in pairs and pairs.get(column) != columns[other]:
                pairs[columns[other]] = column
    if pairs:
        said = {one: [other] for one, other in list(pairs.items())[:SHOWN]}
        yield _function("smooth", tuple(pairs), said, (x.shape[1],))


def _outliers(x: Tensor, columns: list[int], deviation: Tensor) -> Iterator[Finding]:
    found = []
    for column in columns:
        low, high = x[:, column].double().quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
        if 0 < high - low < NARROWEST * NORMAL_QUARTILES * float(deviation[column]):
            found.append(column)
    if found:
        yield Finding(
            "outliers",
            f"a few numbers far out make up the spread of {_named(found, (x.shape[1],))} of the training data, beside "
            "which the rest is a point. Remove numbers that stand for missing ones (-999), and take the logarithm, or "
            "asinh, of columns with such tails (log p then changes by the logarithm of its derivative)",
            tuple(found),
        )


def _units(x: Tensor, live: list[int], deviation: Tensor) -> Iterator[Finding]:
    found = [column for column in live if not UNITS[0] <= float(deviation[column]) <= UNITS[1]]
    if found:
        spread = deviation[live]
        yield Finding(
            "units",
            f"the standard deviations of the training data's columns go from {float(spread.min()):.2g} to "
            f"{float(spread.max()):.2g} ({_named(found, (x.shape[1],))}), and the noise that they come from has 1: "
            "subtract each column's mean and divide by its deviation (log p then changes by the sum of the deviations' "
            "logarithms)",
            tuple(found),
        )
