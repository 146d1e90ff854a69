"""How the site is built: pages as they lie here, the reference from the docstrings, notebooks executed."""

import os
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

import f2d2_lightning as f2

project = "f2d2-lightning"
author = "the f2d2-lightning authors"
copyright = "the f2d2-lightning authors, Apache-2.0"
release = version = f2.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
templates_path = ["_templates"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "f2d2-lightning"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4

# off, or what is executed anew only where a notebook has changed
nb_execution_mode = os.environ.get("F2D2_DOCS_EXECUTE", "cache")
nb_execution_in_temp = True
nb_execution_timeout = 3600  # seconds a cell, on a busy machine
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_output_stderr = "remove"  # progress and notices of the Trainer

# what a folder lists is what it documents, and a name at the door is documented there alone
autosummary_ignore_module_all = False
autosummary_context = {
    "door": f2.__all__,
    "theirs": ["Figure"],
    # of what models inherit, what users call
    "answers": ["log_prob", "sample", "nll", "error_bar", "calibrate", "diagnose", "export"],
}
autodoc_inherit_docstrings = False  # Lightning's and torch's are theirs
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # arguments are described in words, with shapes
autodoc_class_signature = "mixed"
add_module_names = False


def _resolve_short_name(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Link the name of a class or function to its page, wherever in the package the docstring stands."""
    if node.get("refdomain") != "py" or node["reftype"] not in ("class", "func", "exc"):
        return None
    ending = "." + node["reftarget"].rpartition(".")[2]
    objects = env.domains["py"].objects
    pages = [name for name, entry in objects.items() if name.endswith(ending) and entry.docname.endswith(name)]
    if len(pages) != 1:
        return None
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", pages[0], node, content)


def _link_inside(app: Sphinx, name: str, text: list[str]) -> None:
    """Files of the repository that are pages here."""
    text[0] = text[0].replace("](../CHANGELOG.md)", "](CHANGES.md)")


def setup(app: Sphinx) -> None:
    """Add what is not an extension of its own."""
    app.connect("source-read", _link_inside)
    app.connect("missing-reference", _resolve_short_name)
