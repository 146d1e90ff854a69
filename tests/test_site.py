"""The site is built without a warning; ``test_documents`` runs its notebooks' code, ``make site`` executes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import f2d2_lightning as f2
from launching import output_of

HOUSE = Path(__file__).parent.parent


def test_the_reference_lists_every_name_at_the_door_and_every_folder():
    listed = set((HOUSE / "docs/API.md").read_text().split())
    assert set(dir(f2)) - {"cli"} <= listed


def test_the_site_is_built_without_a_warning(tmp_path):
    for name in ("sphinx", "furo", "myst_nb"):
        pytest.importorskip(name)
    # the reference's pages are written beside their sources, so these are a copy
    shutil.copytree(HOUSE / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("_build", "api"))
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(HOUSE / name, tmp_path)
    for name in ("src", "examples", "configs", "benchmarks"):
        (tmp_path / name).symlink_to(HOUSE / name)
    build = ["-m", "sphinx", "-W", "--keep-going", "-q", "docs", "html"]
    output_of(build, tmp_path, timeout=600, F2D2_DOCS_EXECUTE="off")
    for page in ("index", "CONCEPTS", "notebooks/density", "api/f2d2_lightning.F2D2Module"):
        assert (tmp_path / f"html/{page}.html").exists(), page
