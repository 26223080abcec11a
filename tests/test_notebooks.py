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
import torch

import sample
from convert import load_model, load_prior
from data import held_out_batches, open_dataset
from metrics import pre_error

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]_*.py"))
MOST_CELLS, MOST_LINES, MOST_PLOT_LINES = 20, 12, 15
MOST_BYTES, MOST_BYTES_TOGETHER = 500_000, 2_500_000
SECONDS, RELATIVE = 240, 0.05        # 60 s where nothing else runs
ALLOWED = {"torch", "numpy", "matplotlib", "PIL", "check", "scipy"} | set(sys.stdlib_module_names)
# Runs the cells of an .ipynb or a source in one namespace, as a kernel does, then the exercises
# once more, as readers do who run all cells first.
RUNNER = """
import json, re, sys
import matplotlib; matplotlib.use("Agg")
path, space = sys.argv[1], {"__name__": "__main__"}
text = open(path, encoding="utf-8").read()
cells = (["".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
         if path.endswith(".ipynb") else re.split("^# %%.*", text, flags=re.M))
exercises = [cell for cell in cells if re.search("^check", cell, re.M)]
for cell in cells + ["print('once more')"] + exercises:
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


def written():
    return {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*")
            if path.is_file() and path.name != "film.gif" and "__pycache__" not in path.parts}


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
    before = written()
    text, again = run(source).split("once more")
    assert written() == before, "a student's run changes a file of the repository"
    assert not re.search("[✗○]", text + again)
    assert text.count("✓") == source.read_text(encoding="utf-8").count("\ncheck(") >= 3
    assert again.count("✓") == text.count("✓")
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


def test_a_check_tells_right_and_unwritten_and_wrong_apart_and_names_the_wrong_value(
        capsys, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    from check import check
    for yours in (lambda: (1, 2), lambda: None, lambda: (1, 3), lambda: 1 / 0):
        check("pair", yours, (1.0, torch.tensor(2)), "look there")
    right, unwritten, wrong, why, raising, error = capsys.readouterr().out.splitlines()
    assert (right, unwritten) == ("✓ pair", "○ pair: not written yet")
    assert wrong == raising == "✗ pair: look there"
    assert "value 2:" in why
    assert "ZeroDivisionError" in error


# ---------------------------------------------------------------- the small run


@torch.no_grad()
def test_the_small_run_has_the_figures_of_its_readme():
    model, test = load_model(FOLDER / "run"), open_dataset("signs", None, "test", 64)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    own, ours, codes = [], [], []
    for batch in held_out_batches(test, 64, 16, torch.device("cpu")):
        z = model.encode(batch.x)
        codes.append(model.first_stage.indices(batch.x).unique())
        own.append(pre_error(model.first_stage.decode(z), batch.x, batch.mask))
        ours.append(pre_error(model.decode(z, image=batch.x, mask=batch.mask), batch.x, batch.mask))
    text = (FOLDER / "run" / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    for values, written in ((own, r"error of ([\d.]+) at"), (ours, r"with a mask ([\d.]+\d)\.")):
        found = 1e5 * torch.cat(values).mean().item()
        assert found == pytest.approx(float(re.search(written, text)[1]), rel=0.01)
    assert f"use {torch.cat(codes).unique().numel()} codes of 128" in text


def test_the_small_run_has_a_finished_prior_and_samples_are_drawn_from_it_by_default(
        tmp_path, monkeypatch, capsys):
    assert load_prior(FOLDER / "run").finished
    monkeypatch.setattr(sys, "argv", ["sample.py", "-n", "1", "--steps", "1", "-o",
                                      str(tmp_path / "s.png")])
    sample.main()
    assert (tmp_path / "s.png").exists()


def test_the_small_run_is_small_and_has_no_paths():
    files = [path for path in (FOLDER / "run").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 7_000_000
    for path in files:
        assert not re.search(rb"/(home|root|Users|tmp|work)/", path.read_bytes())
