"""Tables with one row a sample: CSV, or Parquet with units and settings in its schema."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from f2d2_lightning.utils.files import check_output, whole_file

SUFFIXES = (".csv", ".parquet")


class Column(NamedTuple):
    """A named column of a table."""

    name: str
    values: Sequence[int] | Sequence[float] | Sequence[str]
    """One entry a row, all of one type."""
    unit: str | None = None
    """Unit of the entries, such as ``"nats"``; a Parquet file keeps it with the column."""


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ModuleNotFoundError(
            f"Parquet files need pyarrow ({error}): pip install 'f2d2-lightning[parquet]', or write a .csv file",
            name="pyarrow",
        ) from error
    return pyarrow


def check_table_path(path: Path, overwrite: bool = False) -> None:
    """An error where no table can be written at ``path``: to be asked before the hours that fill it."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a table cannot be written as {path.name!r}; its name ends in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file in it")
    check_output(path, overwrite)
    if path.suffix == ".parquet":
        _parquet()


def write_table(
    path: Path, columns: Sequence[Column], metadata: Mapping[str, str] | None = None, overwrite: bool = False
) -> None:
    """Write a table of columns of equal length, making its folder. It appears whole or not at all.

    ``metadata`` is kept in a Parquet file's schema; a CSV file has no place for it.
    """
    check_table_path(path, overwrite)
    lengths = {column.name: len(column.values) for column in columns}
    if len(lengths) != len(columns) or len(set(lengths.values())) != 1:
        raise ValueError(f"columns have the lengths {lengths}; names must differ and lengths must be equal")
    with whole_file(path) as partial:
        if path.suffix == ".csv":
            with partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(column.name for column in columns)
                writer.writerows(zip(*(column.values for column in columns), strict=True))
            return
        arrow = _parquet()
        arrays = [arrow.array(column.values) for column in columns]
        units = [None if column.unit is None else {"unit": column.unit} for column in columns]
        fields = [arrow.field(c.name, a.type, metadata=unit) for c, a, unit in zip(columns, arrays, units, strict=True)]
        schema = arrow.schema(fields, metadata=dict(metadata or {}))
        arrow.parquet.write_table(arrow.Table.from_arrays(arrays, schema=schema), partial)
