"""The plan of the package: what may import what, and what lies where."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import f2d2_lightning as f2

PACKAGE = Path(f2.__file__).parent
FLOORS = (
    *("utils", "flows", "nn", "divergence", "likelihood", "objectives", "adapters", "checkpoints", "metrics", "plots"),
    *("training", "data", "modules", "callbacks", "cli"),
)
CORE = FLOORS[: FLOORS.index("training")]
OUTSIDE = ("lightning", "pytorch_lightning", "rich", "jsonargparse")
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imported(path):
    """Modules that a file imports, anywhere in it, those for type checkers left out."""
    tree = ast.parse(path.read_text())
    for branch in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING":
            branch.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield from (f"{node.module}.{name.name}" for name in node.names)


def floor_of(path):
    return path.relative_to(PACKAGE).parts[0]


def test_every_folder_has_a_floor():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == {*FLOORS}
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    floor = FLOORS.index(floor_of(path))
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package != "f2d2_lightning":
            assert not (floor_of(path) in CORE and package in OUTSIDE), f"the core imports {name}"
            assert package not in ("matplotlib", "mpl_toolkits") or floor_of(path) == "plots", f"{name} is for plots"
            continue
        of = rest.split(".")[0]
        assert of in ("_moved", "__version__") or FLOORS.index(of) <= floor, f"{name} is further up"


def test_the_core_imports_no_lightning():
    code = (
        f"import sys, importlib; [importlib.import_module('f2d2_lightning.' + name) for name in {CORE!r}]\n"
        f"assert not [name for name in sys.modules if name.split('.')[0] in {OUTSIDE!r}]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_at_the_door_are_there():
    assert len(f2.__all__) <= 28
    for name in dir(f2):
        assert getattr(f2, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = f2.nothing


@pytest.mark.parametrize("folder", [path.parent for path in FILES if path.name == "__init__.py"], ids=lambda p: p.name)
def test_folders_list_what_is_for_users(folder):
    tree = ast.parse((folder / "__init__.py").read_text())
    # what is imported when it is asked for is imported for type checkers
    lazy = [node for branch in tree.body if isinstance(branch, ast.If) for node in branch.body]
    brought = [
        name.asname or name.name for node in tree.body + lazy if isinstance(node, ast.ImportFrom) for name in node.names
    ]
    listed = [node for node in tree.body if isinstance(node, ast.Assign)]
    assert sorted(set(brought) - {"annotations", "Any", "TYPE_CHECKING"}) == sorted(
        ast.literal_eval(listed[0].value) if listed else []
    )
