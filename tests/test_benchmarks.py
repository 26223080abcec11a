"""Every benchmark runs, at its smallest sizes, and prints a Markdown table. No time is asserted."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_autoencoder
from pictures import image_grid

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SMALLEST = {
    "diffusion": ["--presets", "tiny", "--rounds", "1"],
    "fid": ["--dim", "12", "--images", "5", "40", "--rounds", "1"],
    "nearest_code": ["--rows", "64", "--cases", "16x4", "32x8", "--rounds", "1"],
    "pconv": ["--size", "8", "--rounds", "1", "--system-malloc"],
    "refit": ["--rows", "200", "--codes", "8", "--width", "4", "--passes", "1", "--rounds", "1"],
    "signs": ["--size", "32", "--pictures", "2", "--rounds", "1"],
    "step": ["--size", "32", "--batch-size", "2", "--rounds", "1", "--threads", "1"],
}


def run(name, argv, monkeypatch, **constants):
    """benchmarks/NAME.py as a program, in this process, with other values for its constants."""
    monkeypatch.syspath_prepend(FOLDER)                      # as Python itself does with a script
    # step.py replaces it in its own process; here the tests after it need the original.
    original = train_autoencoder.trained_first_stage
    monkeypatch.setattr(train_autoencoder, "trained_first_stage", original)
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(constants)
    module.main(argv)


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_benchmark_has_its_smallest_sizes_here():
    others = ["figures", "gpu"]              # the documents' pictures; tested below
    assert sorted([*SMALLEST, *others]) == sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_prints_a_full_table(name, monkeypatch, capsys):
    run(name, SMALLEST[name], monkeypatch)
    head, blank, *table = capsys.readouterr().out.splitlines()
    assert head.startswith(f"torch {torch.__version__}")
    assert blank == ""
    assert len(table) >= 4
    assert len({line.count("|") for line in table}) == 1
    assert "nan" not in "".join(table)


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_explains_itself(name, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(name, ["--help"], monkeypatch)
    assert "--rounds" in capsys.readouterr().out


def test_nearest_code_is_never_wrong_where_the_fields_expression_is(monkeypatch, capsys):
    argv = ["--rows", "256", "--cases", "16384x256", "--rounds", "1"]
    run("nearest_code", argv, monkeypatch)
    ours, theirs = map(int, capsys.readouterr().out.splitlines()[-1].split("|")[-3:-1])
    assert ours == 0
    assert theirs > 0


def gpu_rows(capfd):
    """The rows that benchmarks/gpu.py printed: [part, measured, found] each."""
    head, rule, *rows = capfd.readouterr().out.splitlines()
    assert (head, rule) == ("| part | measured | found |", "|---|---|---|")
    return [row.strip("| ").split(" | ") for row in rows]


@pytest.mark.slow
def test_each_part_of_the_gpu_benchmark_ends_well_at_its_smallest_size(monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run("gpu", ["--device", "cpu"], monkeypatch)
    rows = gpu_rows(capfd)
    ends = {part: found.split(",")[0] for part, name, found in rows if name == "end"}
    assert ends == dict.fromkeys(["env", "speed", "prior", "search", "loader", "parity", "compile",
                                  "e2e"], "well")
    assert [row for row in rows if row[2].startswith("error")] == []


def test_a_part_of_the_gpu_benchmark_that_takes_too_long_still_has_its_row(monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run("gpu", ["--device", "cpu", "--parts", "env", "search"], monkeypatch, CPU_LIMIT=0.5)
    assert [(part, found.split(",")[0]) for part, _, found in gpu_rows(capfd)] == [
        ("env", "at its time limit"), ("search", "at its time limit")]


def test_the_figures_are_drawn_from_the_files_of_a_run(monkeypatch, tmp_path):
    images = [torch.full((3, 64, 64), level) for level in (-1.0, 0.0, 1.0)]
    for name, across in (("report", 5), ("inpainting", 4)):
        image_grid({f"{n}": images for n in range(across)}, tmp_path / f"{name}.png")
    run("figures", ["known", str(tmp_path), str(tmp_path / "known.png"), "--rows", "3", "1",
                    "--holes", "2"], monkeypatch)
    picture = np.asarray(Image.open(tmp_path / "known.png"))
    assert picture.shape[1] == 5 * 198 + 6
    assert [picture[y, 100].tolist() for y in (100, 300, 550)] == [[255] * 3, [0] * 3, [128] * 3]

    (tmp_path / "decoder").mkdir()
    terms = {"pixel": 0.2, "disc": 1.0, "lambda": 0.5, "grad_norm": 3.0, "val_pre_error": 0.01}
    lines = [json.dumps({"step": step, **terms}) for step in range(1, 4)]
    (tmp_path / "decoder" / "log.jsonl").write_text("\n".join(lines))
    run("figures", ["curves", *[str(tmp_path)] * 2, str(tmp_path / "curves.png")], monkeypatch)
    assert Image.open(tmp_path / "curves.png").size[0] == 900
