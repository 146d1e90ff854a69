"""How large the package is: lines, modules, names at the door, longest class and most arguments.

    python benchmarks/size.py [CHECKOUT ...]

With several checkouts, side by side.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

CORE_UNTIL = ("training", "data", "modules", "callbacks", "cli")


def parsed(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(folder.rglob("*.py")):
        yield path.relative_to(folder), ast.parse(path.read_text())


def lines(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    a = function.args
    names = [argument.arg for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def measure(checkout: Path) -> dict[str, str]:
    package = checkout / "src" / "f2d2_lightning"
    door = ast.parse((package / "__init__.py").read_text())
    names = next(n for n in door.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__")
    classes: list[tuple[int, str]] = []
    functions: list[tuple[int, str, bool]] = []
    imports = 0
    for path, tree in parsed(package):
        core = path.parts[0] not in CORE_UNTIL
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("f2d2_lightning"):
                imports += 1
            if isinstance(node, ast.ClassDef):
                classes.append(((node.end_lineno or 0) - node.lineno + 1, node.name))
                functions += [
                    (arguments(part), f"{node.name}.{part.name}", core)
                    for part in node.body
                    if isinstance(part, ast.FunctionDef)
                ]
        functions += [(arguments(n), n.name, core) for n in tree.body if isinstance(n, ast.FunctionDef)]
    most, most_core = max(functions), max(function for function in functions if function[2])
    longest = max(classes)
    return {
        "lines of source": f"{lines(package):,}",
        "lines of tests": f"{lines(checkout / 'tests'):,}",
        "lines of benchmarks": f"{lines(checkout / 'benchmarks'):,}",
        "files of source": str(len(list(package.rglob("*.py")))),
        "files at the top": str(len(list(package.glob("*.py")))),
        "names at the door": str(len(ast.literal_eval(names.value))),
        "imports inside the package": str(imports),
        "longest class": f"{longest[1]}, {longest[0]} lines",
        "classes over 300 lines": str(sum(length > 300 for length, _ in classes)),
        "most arguments": f"{most[1]}, {most[0]}",
        "most arguments in the core": f"{most_core[1]}, {most_core[0]}",
    }


def main() -> None:
    checkouts = [Path(name) for name in sys.argv[1:] or [Path(__file__).parents[1]]]
    tables = [measure(checkout) for checkout in checkouts]
    for name in tables[0]:
        print(f"| {name} | {' | '.join(table[name] for table in tables)} |")


if __name__ == "__main__":
    main()
