"""What README and docs show runs as it stands there, its trainings cut to two steps."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from documents import commands_of, python_of
from f2d2_lightning.cli._configs import config_names
from launching import output_of

HOUSE = Path(__file__).parent.parent
PAGES = [
    *(HOUSE / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(page for folder in ("docs", "docs/notebooks", "docs/neighbours") for page in (HOUSE / folder).glob("*.md")),
]


def title(page: Path) -> str:
    return str(page.relative_to(HOUSE).with_suffix(""))


def run(command: list[str], folder: Path) -> str:
    return output_of(command, folder, timeout=600, F2D2_DOCS_STEPS="2", MPLBACKEND="agg")


@pytest.mark.parametrize("page", [p for p in PAGES if python_of(p)], ids=title)
def test_the_python_code_of_a_page_runs(page, tmp_path):
    """Of what is not installed by ``make test``, ``make neighbours`` runs the pages."""
    for package in re.findall(r"<!-- needs: (\w+) -->", page.read_text(encoding="utf-8")):
        pytest.importorskip(package)
    run(["-c", python_of(page)], tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        other = page if not path else (page.parent / path)
        assert other.exists(), target
        if anchor and other.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


NOT_RUN = ("make", "pip", "torchrun", "srun", "python")
"""What installs, runs for hours, or needs machines; of the package's own scripts the options are looked at."""
SHORT = {
    "fit": ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"],
    "test": ["--trainer.limit_test_batches=1", "--trainer.accelerator=cpu"],
    "sample": ["--device=cpu"],
    "nll": ["--device=cpu"],
}


def made(folder: Path) -> None:
    """The files that pages speak of."""
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(generator.integers(0, 256, (9, 12, 3)).astype(np.uint8)).save(folder / f"images/{index}.png")
    np.savetxt(folder / "wines.csv", generator.normal(size=(100, 3)), delimiter=",", header="a,b,c", comments="")


@pytest.mark.parametrize("page", [HOUSE / "README.md", HOUSE / "docs/OWN_DATA.md"], ids=title)
def test_the_commands_of_a_page_run(page, tmp_path):
    made(tmp_path)
    for _, command in commands_of(page):
        words = shlex.split(command)
        if words[0] == "f2d2":
            run(["-m", "f2d2_lightning", *words[1:], *SHORT.get(words[1], [])], tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_commands_are_known(page):
    for line, command in commands_of(page):
        words = [word for word in shlex.split(command) if "=" not in word or word.startswith("-")]
        assert words[0] == "f2d2" or words[0] in NOT_RUN, (line, command)
        assert all((HOUSE / word).exists() for word in words if word.endswith(".py")), (line, command)
        if words[0] == "f2d2":
            configs = [following for word, following in itertools.pairwise(words) if word == "--config"]
            for config in configs:
                assert config == "..." or "/" in config or config.removesuffix(".yaml") in config_names(), (
                    line,
                    command,
                )
