"""Tables of numbers as text."""

from __future__ import annotations

import csv
import math
import re
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np

SEPARATORS = ("\t", ";", "|", ",")
"""The first of them that the second line has: the first one may be names, in which they mean nothing."""

DECIMAL_COMMA = re.compile(r"\s*[-+]?\d+,\d+\s*")


def read_csv(path: Path) -> tuple[np.ndarray, list[str] | None]:
    """Rows of numbers ``(N, columns)``, and the names of the columns where the first line has them.

    Lines above that begin with ``#`` are comments, but for one with the names right above the rows. Names may be
    numbers that count the columns, as pandas gives them: see :func:`_counts`.
    A ``ValueError`` names row, column and remedy of a cell that is no number.
    """
    numbers, lines, separator = [], [], ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            typical = ["", *islice((line for line in file if line.strip() and not line.startswith("#")), 2)][-1]
            separator = next((mark for mark in SEPARATORS if mark in typical), " " if _in_words(typical) else ",")
            file.seek(0)
            # of spaces there may be several
            reader = csv.reader(file, delimiter=separator, skipinitialspace=separator == " ")
            for line in reader:
                if any(text.strip() for text in line):
                    numbers.append(reader.line_num)
                    lines.append(line)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} cannot be read as text with commas: {error}; save it as UTF-8") from error
    while len(lines) > 1 and lines[0][0].startswith("#"):
        said = [text for text in (lines[0][0].lstrip("# "), *lines[0][1:]) if text]
        if len(said) == len(lines[1]) and any(map(_stands_for_one, lines[1])):  # as numpy.savetxt writes them
            lines[0] = said
            break
        del lines[0], numbers[0]
    named = bool(lines) and (not any(map(_stands_for_one, lines[0])) or _counts(lines[0], lines[1:]))
    names = lines[0] if named else None
    start = int(names is not None)
    rows, width = lines[start:], len(lines[0]) if lines else 0
    with suppress(ValueError):
        array = np.array(rows, dtype=np.float64).reshape(len(rows), width)
        if np.isfinite(array).all() and not any("_" in text for row in rows for text in row):
            return array, names
    for number, row in zip(numbers[start:], rows, strict=True):
        where = f"{path}, row {number}"
        if len(row) != width:
            raise ValueError(f"{where}: {len(row)} columns for {width}; every row needs the same columns of numbers")
        for place, text in enumerate(row):
            if not _is_number(text):
                remedy = _remedy(text, [other[place] for other in rows if place < len(other)])
                raise ValueError(f"{where}: {text!r} in column {names[place] if names else place + 1}; {remedy}")
    return np.array(rows, dtype=np.float64).reshape(len(rows), width), names


def _in_words(line: str) -> bool:
    """Whether a line is several numbers with spaces between them, as ``numpy.savetxt`` writes by default."""
    return len(line.split()) > 1 and all(map(_is_number, line.split()))


def _counts(first: list[str], others: list[list[str]]) -> bool:
    """Whether a first line counts the columns: from 0 after an empty cell, or where no other row has a whole number."""
    if len(first) < 2 or not all(text.strip().isdecimal() for text in first[1:]):
        return False
    numbers = [int(text) for text in first if text.strip().isdecimal()]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return False
    if not first[0].strip():
        return numbers[0] == 0
    return len(numbers) == len(first) and not any(text.strip("+- ").isdecimal() for row in others for text in row)


def _is_number(text: str) -> bool:
    try:
        # Python allows 2024_01_31, which is no number in a table
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False


def _stands_for_one(text: str) -> bool:
    """Whether it is a number, or what a table has in the place of one, which is no name of a column."""
    return _is_number(text) or bool(DECIMAL_COMMA.fullmatch(text)) or text.strip().lower() in ("nan", "inf", "-inf")


def _remedy(text: str, column: list[str]) -> str:
    """What to do about a cell that is no number."""
    if not text.strip() or text.strip().lower() in ("nan", "na", "n/a", "null", "none", "inf", "-inf"):
        return "a density needs every number: leave out rows, or columns, with missing values, or fill them in"
    if DECIMAL_COMMA.fullmatch(text):
        return "write decimals with a point"
    if not any(map(_is_number, column)):
        return "every row needs numbers, and this column holds words: leave the column out"
    return "every row needs numbers: correct it, or leave out the row, or the column"
