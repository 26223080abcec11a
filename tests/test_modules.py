"""The modules as a whole: their imports, and the files that they point to."""

import ast
import graphlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(ROOT.glob("*.py"))
SOURCES = MODULES + sorted(ROOT.glob("benchmarks/*.py"))
MOST_FLOORS, MOST_MODULES, MOST_LINES = 8, 31, 8_000


def imports_of(path):
    """The names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_the_modules_are_few_and_their_imports_go_one_way_up_few_floors():
    names = {path.stem for path in MODULES}
    graph = {path.stem: names & set(imports_of(path)) for path in MODULES}
    assert graph["train"] >= {"data", "run_folder"}              # the graph is not an empty one
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")
    floor = {}                                                   # one above all that it imports
    for name in order:
        floor[name] = 1 + max((floor[other] for other in graph[name]), default=0)
    lines = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    for number in range(1, max(floor.values()) + 1):             # shown by pytest -s
        print(number, *(f"{name} {lines[name]}" for name in sorted(names) if floor[name] == number))
    print(f"{len(names)} modules, {max(floor.values())} floors, {sum(lines.values()):,} lines")
    assert max(floor.values()) <= MOST_FLOORS
    assert len(names) <= MOST_MODULES
    assert sum(lines.values()) <= MOST_LINES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_module_points_to_exists(path):
    named = set(re.findall(r"\b\w+(?:/\w+)*\.py\b", path.read_text(encoding="utf-8")))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing, f"{path.name} points to {missing}"


def test_the_run_time_dependencies_are_what_the_modules_import():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"\w+", line).group() for line in project["dependencies"]}
    imported = {name.split(".")[0] for path in MODULES for name in imports_of(path)}
    foreign = imported - sys.stdlib_module_names - {path.stem for path in MODULES}
    assert {"pillow" if name == "PIL" else name for name in foreign} == names
    pinned = re.findall(r"^(\w+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    tests = {re.match(r"\w+", line).group() for line in project["optional-dependencies"]["test"]}
    assert set(pinned) == names | tests
