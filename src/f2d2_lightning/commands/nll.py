"""``f2d2 nll``: the log-likelihood of every sample of a data set."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import track
from torch import Tensor

from f2d2_lightning.checkpoints import load_module
from f2d2_lightning.commands.common import find_device, refuse_to_overwrite, run
from f2d2_lightning.data import Checkerboard, DequantisedDataset, Digits, FlowDataModule, GaussianMixture
from f2d2_lightning.modules import F2D2Module
from f2d2_lightning.quantisation import Quantisation, bits_per_dim

__all__ = ["nll_command"]

DATA: dict[str, Callable[..., FlowDataModule]] = {
    "digits": Digits,
    "checkerboard": Checkerboard,
    "mixture": GaussianMixture,
}


def nll_command(arguments: list[str]) -> None:
    """``f2d2 nll``: one row a sample, and a summary with standard errors."""
    parser = ArgumentParser(prog="f2d2 nll", description="Log-likelihood of every sample of a data set.")
    parser.add_argument("--ckpt", type=str, required=True, help="checkpoint of an F2D2Module")
    parser.add_argument(
        "--data",
        type=str,
        required=True,
        help=f"{', '.join(DATA)} (its test split; digits:train, digits:val for others), or a .npy or .npz file of "
        "integers (dequantised here) or of states",
    )
    parser.add_argument("--steps", type=int, default=4, help="evaluations per sample")
    parser.add_argument("--out", type=str, default="nll.csv", help="CSV, one row a sample")
    parser.add_argument("--batch_size", type=int, default=512, help="samples at a time")
    parser.add_argument("--reference", type=bool, default=False, help="add the reference likelihood of the diagonal")
    parser.add_argument("--seed", type=int, default=0, help="of the dequantisation of a file")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--overwrite", type=bool, default=False, help="write over an existing file")
    options = parser.parse_args(arguments)
    run(lambda: _nll(options))


def _load_data(name: str, module: F2D2Module, seed: int) -> DequantisedDataset:
    kind, _, split = name.partition(":")
    if kind in DATA:
        data = DATA[kind]()
        if data.shape != module.shape or data.levels != module.levels:
            raise ValueError(
                f"--data {name} has shape {data.shape} and levels {data.levels}, but the checkpoint is of a model for "
                f"shape {module.shape} and levels {module.levels}"
            )
        return data.dataset(split or "test")
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"--data is {name}: neither one of {', '.join(DATA)} nor a file that exists")
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"--data is {name}; .npy and .npz files can be read (an .npz holds its data as 'x')")
    try:
        loaded = np.load(path, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a NumPy file of plain numbers: {error}") from error
    if not isinstance(loaded, np.ndarray):
        if "x" not in loaded:
            raise ValueError(f"{path} holds {', '.join(loaded.files)}; the data must be called 'x'")
        loaded = loaded["x"]
    values = torch.from_numpy(loaded)
    if tuple(values.shape[1:]) != module.shape or len(values) == 0:
        raise ValueError(f"{path} has shape {tuple(values.shape)}; (N, {', '.join(map(str, module.shape))}) is needed")
    if torch.is_floating_point(values):
        _check_range(values, module)
        return DequantisedDataset(values.float())
    if module.levels is None:
        raise ValueError(f"{path} holds integers, but the model is for continuous data")
    quantisation = Quantisation(module.levels, module.low, module.high)
    quantisation.check_range_of(values)
    return DequantisedDataset(values, quantisation=quantisation, seed=seed)


def _check_range(values: Tensor, module: F2D2Module) -> None:
    if module.levels is not None and (float(values.min()) < module.low or float(values.max()) > module.high):
        raise ValueError(
            f"states lie in [{float(values.min()):.4g}, {float(values.max()):.4g}], but the model is for "
            f"[{module.low}, {module.high}]; give integers 0 to {module.levels - 1}, or rescale"
        )


@torch.no_grad()
def _nll(options: Any) -> None:
    out = Path(options.out)
    refuse_to_overwrite(out, options.overwrite)
    module = load_module(options.ckpt, F2D2Module).to(find_device(options.device))
    data = _load_data(options.data, module, options.seed)
    starts: Iterable[int] = range(0, len(data), options.batch_size)
    rows: list[tuple[float, ...]] = []
    for start in track(list(starts), description="log-likelihood", transient=True):
        x, cond = module.data_to_state(
            data.__getitems__(list(range(start, min(start + options.batch_size, len(data)))))
        )
        x, cond = x.to(module.device), None if cond is None else cond.to(module.device)
        columns = [module.log_prob(x, options.steps, cond).value]
        if options.reference:
            columns.append(module.reference(module.average.velocity, x, cond).value)
        for column in list(columns):
            columns.append(bits_per_dim(column, module.dim, module.levels, module.low, module.high))
        rows += torch.stack(columns, -1).cpu().tolist()
    names = ["log_prob", "reference_log_prob"] if options.reference else ["log_prob"]
    names += [name.replace("log_prob", "bits_per_dim") for name in names]
    out.parent.mkdir(parents=True, exist_ok=True)
    # beside its place first: an interrupted run leaves no half-written table
    partial = out.with_name(out.name + ".part")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", *names])
        writer.writerows([index, *row] for index, row in enumerate(rows))
    partial.replace(out)
    table = torch.tensor(rows, dtype=torch.float64)
    console = Console()
    for name, column in zip(names, table.T, strict=True):
        error = float(column.std()) / math.sqrt(len(column)) if len(column) > 1 else math.nan
        unit = "nats" if name.endswith("log_prob") else "bits/dim"
        console.print(f"{name}: {float(column.mean()):.4f} ± {error:.4f} {unit}", highlight=False)
    bound = " (an upper bound: uniform dequantisation)" if module.levels is not None else ""
    console.print(f"{len(table)} samples, {options.steps} evaluations each{bound}; wrote {out}", soft_wrap=True)
