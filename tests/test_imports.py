"""Imports run one way, those in functions and under TYPE_CHECKING included, and never in a circle."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fastprompt

ROOT = Path(fastprompt.__file__).parent
# A folder imports those of later rows; a single module beside the folders imports none.
ROWS = (
    ("cli",),
    ("bench",),
    ("demo", "experiments"),
    ("inference",),
    ("export",),
    ("training",),
    ("tasks",),
    ("data",),
)
ROWS += (("models",), ("nn",), ("ops",))
OF_ROOT = 2  # the package itself hands out, when asked, what stands in later rows
MAY = {"fastprompt.info", "fastprompt.__main__"}  # the one takes the version from the package, the other is the cli


def modules(root: Path) -> dict[str, Path]:
    """The modules of the package in `root`, by their names."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = [root.name, *file.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, known: dict[str, Path]) -> set[str]:
    """The modules that one imports, wherever in it; a package that it is in itself does not count."""
    package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            inside = {f"{source}.{alias.name}" for alias in node.names}
            found |= inside & known.keys()
            if inside - known.keys():
                found.add(source)
    return {each for each in found & known.keys() if each != name}


def row_of(name: str) -> int:
    """The row of a module's folder; for a single module beside the folders one more."""
    _, folder, *_ = *name.split("."), None
    if folder is None:
        return OF_ROOT
    return next((n for n, row in enumerate(ROWS) if folder in row), len(ROWS))


def faults(root: Path) -> list[str]:
    """What does not run one way."""
    known = modules(root)
    graph = {name: imports(name, known) for name in known}
    found = []
    for name, targets in graph.items():
        for target in sorted(targets):
            same = name.split(".")[:2] == target.split(".")[:2] or row_of(name) == row_of(target) == len(ROWS)
            if not same and row_of(target) <= row_of(name) and name not in MAY:
                found.append(f"{name} imports {target}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(" imports ".join(reversed(error.args[1])))
    return found


def test_they_run_one_way():
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("nn/pooling.py", "from fastprompt.models.config import PromptConfig", "fastprompt.nn.pooling imports"),
        ("ops/gated.py", "if TYPE_CHECKING:\n    from ..nn import pooling", "fastprompt.ops.gated imports"),
        ("models/config.py", "def late():\n    from . import fuse", "fastprompt.models.config imports"),
        ("ops/gated.py", "import fastprompt", "fastprompt.ops.gated imports fastprompt"),
    ],
)
def test_a_fault_is_found(file, line, fault, tmp_path):
    package = tmp_path / "fastprompt"
    for name in ("__init__", "nn/__init__", "nn/pooling", "ops/__init__", "ops/gated", "models/__init__"):
        place = package / f"{name}.py"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("")
    (package / "models/config.py").write_text("")
    (package / "models/fuse.py").write_text("from .config import PromptConfig")
    assert faults(package) == []
    (package / file).write_text(line)
    (found,) = faults(package)
    assert fault in found


def test_extras_are_those_of_the_package():
    """What an error tells to install is there to be installed."""
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    extras = project[project.index("[project.optional-dependencies]") : project.index("[project.scripts]")]
    asked = {
        node.args[1].value
        for file in modules(ROOT).values()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "require"
    }
    assert "train" in asked and asked <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))
