"""The notebooks' sources run, their exercises can be solved, and the built files are not stale.

Neither jupytext nor Jupyter is needed: a source is Python, and an .ipynb is JSON.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]_*.py"))
MOST_CELLS, MOST_LINES, MOST_PLOT_LINES = 20, 12, 15
MOST_BYTES, MOST_BYTES_TOGETHER = 500_000, 2_500_000
SECONDS, RELATIVE = 60, 0.05
ALLOWED = {"torch", "numpy", "matplotlib", "PIL", "check", "scipy"} | set(sys.stdlib_module_names)
# Runs the code cells of an .ipynb or a source in one namespace, as a kernel does.
RUNNER = """
import json, re, sys
import matplotlib; matplotlib.use("Agg")
path, space = sys.argv[1], {"__name__": "__main__"}
text = open(path, encoding="utf-8").read()
cells = (["".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
         if path.endswith(".ipynb") else [text])
for cell in cells:
    exec(compile(cell, path, "exec"), space)
"""


def cells(source):
    """[(kind, text)] of a source: kind is "markdown" or "code"."""
    parts = re.split(r"^# %%", source.read_text(encoding="utf-8"), flags=re.M)[1:]
    return [("markdown" if "[markdown]" in part.split("\n")[0] else "code",
             part.partition("\n")[2].strip()) for part in parts]


def student(code):
    return re.sub(r"^( *)# solution\n.*?^ *# end$", r"\1...", code, flags=re.M | re.S)


def run(path):
    done = subprocess.run([sys.executable, "-c", RUNNER, str(path)], cwd=FOLDER, timeout=SECONDS,
                          capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def built(source):
    return json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))


def printed(notebook):
    return "".join("".join(output["text"]) for cell in notebook["cells"]
                   for output in cell.get("outputs", ()) if output["output_type"] == "stream")


def numbers(text):
    """The numbers of each line; lines of checks, of seconds and of what is chaotic are left out."""
    number = re.compile(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?")
    return [[float(word.replace(",", "")) for word in number.findall(line)]
            for line in text.splitlines()
            if not re.match("[✓○✗]| +[(]", line) and not re.search(r"\d s\b|chaotic", line)]


every = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


@every
def test_a_source_runs_and_its_exercises_are_solved_and_its_notebook_prints_the_same(source):
    text = run(source)
    assert not re.search("[✗○]", text)
    assert text.count("✓") == source.read_text(encoding="utf-8").count("\ncheck(") >= 3
    new, old = numbers(text), numbers(printed(built(source)))
    assert len(new) == len(old)
    for a, b in zip(new, old):
        assert a == pytest.approx(b, rel=RELATIVE, abs=1e-6)


@pytest.mark.slow
@every
def test_a_notebook_runs_as_it_is_with_its_exercises_unwritten(source):
    text = run(source.with_suffix(".ipynb"))
    assert not re.search("[✓✗]", text)
    assert text.count("○") >= 3


@every
def test_a_notebook_has_the_cells_of_its_source(source):
    of_source = [(kind, re.sub(r"^# ?", "", text, flags=re.M) if kind == "markdown"
                  else student(text)) for kind, text in cells(source)]
    assert of_source == [(cell["cell_type"], "".join(cell["source"]))
                         for cell in built(source)["cells"]]


@every
def test_a_notebook_is_small_and_names_no_machine(source):
    path, notebook = source.with_suffix(".ipynb"), built(source)
    assert path.stat().st_size <= MOST_BYTES
    assert "widgets" not in notebook["metadata"]
    texts = "".join("".join(output.get("text", "")) for cell in notebook["cells"]
                    for output in cell.get("outputs", ())) + source.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|Users|tmp|work)/", texts)


def test_all_notebooks_together_are_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) <= MOST_BYTES_TOGETHER


@every
def test_cells_are_few_and_short(source):
    code = [text for kind, text in cells(source) if kind == "code"]
    assert len(code) <= MOST_CELLS
    for text in code:
        most = MOST_PLOT_LINES if "plt." in text else MOST_LINES
        assert len(student(text).splitlines()) <= most, text


@every
def test_every_claim_is_followed_by_an_assertion(source):
    found = cells(source)
    claims = [number for number, (kind, text) in enumerate(found)
              if kind == "markdown" and "**Claim" in text]
    assert len(claims) >= 3
    for number in claims:
        assert "assert" in next(text for kind, text in found[number + 1:] if kind == "code"), \
            found[number][1]


@every
def test_readers_predict_three_times_and_break_something(source):
    text = source.read_text(encoding="utf-8")
    assert text.count("**Predict first") == 3
    assert "**Break it" in text


@every
def test_a_source_imports_and_defines_only_what_is_its_own(source):
    tree = ast.parse(source.read_text(encoding="utf-8"))
    rooms = {path.stem for path in ROOT.glob("*.py")}
    theirs = {node.name for room in ROOT.glob("*.py")
              for node in ast.parse(room.read_text(encoding="utf-8")).body
              if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= ALLOWED | rooms
    assert not theirs & {node.name for node in ast.walk(tree)
                         if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@every
def test_formulas_have_no_sign_that_breaks_on_github(source):
    for kind, text in cells(source):
        if kind == "markdown":
            assert "align}" not in text
            assert not re.search(r"\$[^$\n]*~[^$\n]*\$", text)
