"""The code of a Markdown page, and how it is run in seconds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(
    r"(<!-- not run: [^\n]+ -->\n+)?^( *)```(?:\{code-cell\} )?(\w+)\n(?::tags:[^\n]*\n)?(.*?)^\2```$"
    r"|<!-- first:\n(.*?)-->",
    re.DOTALL | re.MULTILINE,
)
SHORT = """
import functools, lightning
import f2d2_lightning.modules.distillation as _distillation, f2d2_lightning.modules.evaluation as _evaluation

_distillation.MEASURED, _evaluation.IN_TRAINING = 8, 16
_made = lightning.Trainer.__init__

@functools.wraps(_made)
def _short(self, *args, **given):
    few = dict(max_steps=2, max_epochs=None, limit_train_batches=2, limit_val_batches=1, limit_test_batches=1)
    few |= dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    few |= dict(num_sanity_val_steps=0)
    _made(self, *args, **{**given, **few})

lightning.Trainer.__init__ = _short
"""
"""Makes every training two steps long, and what is measured on data before and beside it small."""


class Block(NamedTuple):
    """Of code."""

    line: int
    """Where it begins."""
    language: str
    """As the page says, or ``first`` for what a page needs to be run and does not show: ``<!-- first: ... -->``.

    What follows ``<!-- not run: reason -->`` is none."""
    code: str


def blocks(page: Path) -> list[Block]:
    """Of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        spared, indent, language, code, first = match.groups()
        if spared:
            continue
        line = text.count("\n", 0, match.start()) + 1
        code = first if code is None else re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        found.append(Block(line, language or "first", code))
    return found


def python_of(page: Path) -> str:
    """A program of all Python blocks of a page, one after the other; errors name the page's own lines."""
    parts = [SHORT]
    for line, language, code in blocks(page):
        if language in ("python", "first"):
            padded = "\n" * line + code
            parts.append(f"exec(compile({padded!r}, {str(page)!r}, 'exec'))")
    return "\n".join(parts) + "\n" if len(parts) > 1 else ""


def commands_of(page: Path) -> list[tuple[int, str]]:
    """Lines of the shell blocks of a page, continued ones joined, without comments."""
    found = []
    for line, language, code in blocks(page):
        if language not in ("bash", "sh", "console"):
            continue
        joined = re.sub(r"\\\n\s*", " ", code)
        for offset, text in enumerate(joined.splitlines(), start=1):
            command = re.sub(r"\s+#.*$|^#.*$", "", text).strip()
            if command:
                found.append((line + offset, command))
    return found
