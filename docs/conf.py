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
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_output_stderr = "remove"  # progress and notices of the Trainer

# what a folder lists is what it documents, and a name at the door is documented there alone
autosummary_ignore_module_all = False
autosummary_context = {"door": f2.__all__}
autodoc_inherit_docstrings = False  # Lightning's and torch's are theirs
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # arguments are described in words, with shapes
autodoc_class_signature = "mixed"
add_module_names = False


def _resolve_short_name(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Link a name to the documented object of that name, wherever in the package the docstring stands."""
    if node.get("refdomain") != "py":
        return None
    last = "." + node["reftarget"].rpartition(".")[2]
    found = {name for name, _, kind, *_ in env.domains["py"].get_objects() if name.endswith(last) and kind != "module"}
    # a method is found by its class, which the domain has tried
    found = {name for name in found if name.rpartition(".")[0].islower()}
    if len(found) != 1 or node["reftype"] not in ("class", "func", "obj", "exc"):
        return None
    role = "obj"
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, role, found.pop(), node, content)


def _link_inside(app: Sphinx, name: str, text: list[str]) -> None:
    """Files of the repository that are pages here."""
    text[0] = text[0].replace("](../CHANGELOG.md)", "](CHANGES.md)")


def setup(app: Sphinx) -> None:
    """Add what is not an extension of its own."""
    app.connect("source-read", _link_inside)
    app.connect("missing-reference", _resolve_short_name)
