"""Every benchmark runs, at its smallest sizes, and prints a Markdown table. No time is asserted."""

import copy
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from tiny_reports import example_report
from tiny_runs import SIZE, TINY, write_first_stage, write_prior, write_run

import data
import train_autoencoder
from asym_decoder import AsymDecoder
from convert import load_first_stage, load_model, load_prior
from metrics import seam
from pictures import image_grid
from refit import install_codebook

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
    return module


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_benchmark_has_its_smallest_sizes_here():
    others = ["code_start", "fake_cuda", "faults", "figures", "gpu", "known_pixels", "last_layer",
              "paste", "seeds"]
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


def table_of(capsys):
    """The last table that a benchmark printed: {first cell: the other cells}."""
    *_, text = capsys.readouterr().out.split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_error_of_a_path_set_by_hand_falls_with_the_fourth_power_of_its_constants(
        monkeypatch, capsys):
    run("known_pixels", ["--constants", "-n", "4", "--size", "32"], monkeypatch)
    errors = [float(cells[0].split()[0]) for name, cells in table_of(capsys).items()
              if name[0].isdigit()]
    assert 13 < errors[-2] / errors[-1] < 17                 # from D = 4 to 8: 2^4
    assert errors[0] < 200                                   # 1e-5: the path shows the picture


def test_changes_of_the_decoders_start_are_trained_and_told_apart(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tiny_runs, "TINY", replace(tiny_runs.TINY, norm_groups=2))   # of 4 channels
    write_first_stage(tmp_path / "first", finished=True)
    monkeypatch.setattr(sys, "argv", ["known_pixels.py"])    # which it changes
    names = ["plain (the paper's code)", "rates only", "pinned: both"]
    argv = ["--run", tmp_path / "first", "-o", tmp_path / "out", "-n", "3", "--steps", "1",
            "--variants", *names]
    run("known_pixels", list(map(str, argv)), monkeypatch)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()
            if line.startswith(("| plain", "| rates", "| pinned"))]
    assert [row[1].strip() for row in rows] == names
    spreads = [float(row[7]) for row in rows]
    assert spreads[2] < min(spreads[:2])
    assert (tmp_path / "out" / "pinned.png").exists()


@torch.no_grad()
def test_only_a_gated_concatenation_switches_the_latent_off_at_known_pixels(monkeypatch):
    module = run("known_pixels", ["--constants", "-n", "2", "--size", "32"], monkeypatch)
    x, known = torch.rand(1, 3, SIZE, SIZE), torch.zeros(1, 1, SIZE, SIZE)
    z = torch.randn(2, TINY.z_channels, SIZE // TINY.f, SIZE // TINY.f)
    for name, off in {"concat": False, "concat, f passed": False, "concat, gated": True,
                      "concat, gated, f passed": True}.items():
        decoder = module.VARIANTS[name][1].get("AsymDecoder", AsymDecoder)(TINY, 8, 1, "concat")
        a, b = (decoder.blended(one[None], x, known) for one in z)
        assert torch.equal(a, b) == off


def test_starts_of_a_prior_are_compared_map_by_map(monkeypatch, tmp_path, capsys):
    _, parent = write_first_stage(tmp_path / "run")

    def trained(args, config, seed, code_start):
        out = tmp_path / f"{seed}-{code_start}"
        write_first_stage(out)
        write_prior(out, parent, seed=2 * seed + code_start)
        return load_prior(out)

    argv = ["--run", tmp_path / "run", "-n", 3, "--seeds", 1, 2]
    module = run("code_start", list(map(str, argv)), monkeypatch, trained=trained)
    rows, dataset = table_of(capsys), data.Signs("val", SIZE)
    for seed in (1, 2):
        ours, random = (module.bounds(load_prior(tmp_path / f"{seed}-{start}"), dataset, 3)
                        for start in (True, False))
        assert not torch.equal(ours, random)
        assert float(rows[str(seed)][2].split(" ")[0]) == pytest.approx(
            (ours - random).mean().item(), rel=0.01)


def test_refits_halves_are_told_apart_on_the_same_pictures(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(data.SIGNS_LENGTH, "val", 6)
    monkeypatch.setattr("train.curves", lambda *_: None)             # half of the time
    monkeypatch.setattr(sys, "argv", ["refit.py"])           # which it changes
    first, _ = write_first_stage(tmp_path / "run")
    argv = ["--run", tmp_path / "run", "-o", tmp_path / "out", "--steps", 2, "--samples", 9]
    run("refit", list(map(str, argv)), monkeypatch)
    rows = table_of(capsys)
    tuned, both, half = (load_first_stage(tmp_path / "out" / name).model
                         for name in ("fine-tuned", "both", "both-half"))
    assert torch.equal(tuned.quantize.embedding.weight, first.quantize.embedding.weight)
    assert (both.config.K, half.config.K) == (8, 4)
    bare = copy.deepcopy(first)
    install_codebook(bare, both.quantize.embedding.weight)
    x = torch.cat([batch.x for batch in data.held_out_batches(
        data.Signs("val", SIZE), 6, 6, torch.device("cpu"))])
    expected = {"as it is": first, "rebuilt only": bare, "fine-tuned only": tuned,
                "both (ReFiT)": both, "K/2, both": half}
    with torch.no_grad():
        base = (first.decode_indices(first.indices(x)) - x).abs().mean((1, 2, 3))
        for name, model in expected.items():
            z_e, indices = model.moments(x), model.indices(x)
            z_q = model.quantize.lookup(indices)
            L1 = (model.decode(z_q) - x).abs().mean((1, 2, 3))
            assert rows[name][:2] == [str(model.config.K), str(len(indices.unique()))]
            found = [cell.split(" ± ") for cell in rows[name][3:]]
            exact = [(z_e - z_q).square().sum(1).mean((1, 2)), L1, L1 - base]
            for (mean, error), values in zip(found, exact, strict=True):
                assert float(mean) == pytest.approx(values.mean().item(), abs=1e-4)
                assert float(error) == pytest.approx(values.std().item() / 6**0.5, abs=1e-4)
    assert len(rows) == 2 + 6
    assert (tmp_path / "out" / "refit.png").exists()


def test_priors_of_other_codebooks_are_compared_in_the_holes_of_pictures(
        monkeypatch, tmp_path, capsys):
    for seed, name in enumerate("ab"):
        _, parent = write_first_stage(tmp_path / name, seed)
        write_prior(tmp_path / name, parent, seed=seed)
    monkeypatch.chdir(tmp_path)
    run("refit", ["--priors", "a", "b", "-o", "out", "-n", "3", "--steps", "2"], monkeypatch)
    rows, x_hat = table_of(capsys), {}
    (batch,) = data.held_out_batches(data.Signs("val", SIZE), 3, 3, torch.device("cpu"))
    for name in "ab":
        first = load_first_stage(name).model
        with torch.no_grad():
            x_hat[name] = first.decode_indices(first.indices(batch.x)).clamp(-1, 1)
    L1 = {name: torch.stack([(one - x).abs()[:, hole[0] == 1].mean() for one, x, hole in
                             zip(each, batch.x, batch.mask)]) for name, each in x_hat.items()}
    mean, paired = (float(cell.split(" ")[0]) for cell in rows["b: the picture's codes"])
    assert mean == pytest.approx(L1["b"].mean().item(), abs=1e-4)
    assert paired == pytest.approx((L1["b"] - L1["a"]).mean().item(), abs=1e-4)
    drawn, difference = (float(rows[f"b: {codes}"][0].split(" ")[0])
                         for codes in ("drawn", "difference"))
    assert difference == pytest.approx(drawn - mean, abs=2e-4)
    assert rows["a: drawn"][1] == "0.0000 ± 0.0000"
    assert (tmp_path / "out" / "priors.png").exists()


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
    for size in (64, 128):
        for name, across in (("report", 8), ("inpainting", 4)):
            # Image `row` of column `n` is of the colour 10 n + row, its upper left quarter white.
            columns = {f"{n}": [torch.full((3, size, size), (10 * n + row) / 127.5 - 1)
                                for row in range(3)] for n in range(across)}
            for images in columns.values():
                for image in images:
                    image[:, :size // 2, :size // 2] = 1
            image_grid(columns, tmp_path / f"{size}" / f"{name}.png")
        report = {"masks": {"size": size}}
        (tmp_path / f"{size}" / "report.json").write_text(json.dumps(report))
    small, large = (str(tmp_path / f"{size}") for size in (64, 128))
    run("figures", ["known", str(tmp_path / "known.png"), "--rows", small, "3", "1", "--rows",
                    large, "2", "--shifted", small, "1", "--holes", large, "2"], monkeypatch)
    picture = np.asarray(Image.open(tmp_path / "known.png"))
    assert picture.shape[1] == 6 * 134 + 6
    found = [[int(value) for value in row[70:806:134]] for row in picture[..., 0]
             if (row[6:70] == 255).all() and row[70] < 255 and len({*row[70:134]}) == 1]
    lines = [row for k, row in enumerate(found) if not k or row != found[k - 1]]
    assert lines == [[2, 12, 22, 32, 42, 52], [0, 10, 20, 30, 40, 50], [1, 11, 21, 31, 41, 51],
                     [0, 10, 60, 70, 255, 255], [1, 11, 21, 31, 255, 255]]
    (tmp_path / "64" / "report.json").write_text('{"masks": {"size": 96}}')
    with pytest.raises(ValueError, match="images of 96 px"):
        run("figures", ["known", str(tmp_path / "x.png"), "--rows", small, "1"], monkeypatch)

    (tmp_path / "decoder").mkdir()
    terms = {"pixel": 0.2, "disc": 1.0, "lambda": 0.5, "grad_norm": 3.0, "val_pre_error": 0.01}
    lines = [json.dumps({"step": step, **terms}) for step in range(1, 4)]
    (tmp_path / "decoder" / "log.jsonl").write_text("\n".join(lines))
    run("figures", ["curves", *[str(tmp_path)] * 2, str(tmp_path / "curves.png")], monkeypatch)
    assert Image.open(tmp_path / "curves.png").size[0] == 900


def test_seeds_have_their_mean_their_range_and_their_gains(tmp_path, monkeypatch, capsys):
    for name, errors in (("a", (4e-3, 1e-4)), ("b", (2e-3, 2e-4))):
        report = example_report()
        for row in report["rows"]:
            row |= {"split": "test", "pre_error": errors[row["decoder"].startswith("asym")]}
        report["prior"] = {"vlb_nats": 700.0 if name == "a" else 800.0}
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    run("seeds", [str(tmp_path / name) for name in "ab"], monkeypatch)
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in capsys.readouterr().out.splitlines()}
    # Each report has two runs, add and concat, on one first stage.
    assert rows["pre_error, first stage's own"] == ["300.0", "200.0 to 400.0", "400.0, 200.0"]
    assert rows["ours, with mask"] == ["15.00", "10.00 to 20.00", "10.00, 10.00, 20.00, 20.00"]
    assert rows["gain"] == ["25.00", "10.00 to 40.00", "40.00, 40.00, 10.00, 10.00"]
    assert rows["bound of a map, nats"] == ["750.0", "700.0 to 800.0", "700.0, 800.0"]
    assert len(rows["seam, full: ours minus pasted"][2].split(",")) == 4


def test_seeds_of_different_pictures_are_refused(tmp_path, monkeypatch, capsys):
    for name, n in (("a", 6), ("b", 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(example_report() | {"n": n}))
    with pytest.raises(SystemExit) as ended:
        run("seeds", [str(tmp_path / name) for name in "ab"], monkeypatch)
    assert ended.value.code == 2
    assert "not of the same pictures" in capsys.readouterr().err


def test_pasting_is_measured_over_both_decoders(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run")
    run("paste", ["--run", str(tmp_path / "run"), "-n", "3"], monkeypatch)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(lines) == 6
    model = load_model(tmp_path / "run")
    (batch,) = data.held_out_batches(data.Signs("val", SIZE), 3, 3, torch.device("cpu"))
    with torch.no_grad():
        z = model.encode(batch.x)
        pasted = torch.where(batch.mask == 1, model.decode(z), batch.x)
        ours = model.decode(z, image=batch.x, mask=batch.mask)
    difference = (seam(ours, batch.x, batch.mask) - seam(pasted, batch.x, batch.mask)).mean()
    (row,) = [line for line in lines if line[:2] == ["ours without mask, pasted", "full"]]
    assert float(row[3].split(" ± ")[0]) == pytest.approx(difference.item(), abs=1e-3)
    hole = (batch.mask * (pasted.clamp(-1, 1) - batch.x).abs()).sum((1, 2, 3))
    hole = (hole / (3 * batch.mask.sum((1, 2, 3)))).mean()
    assert float(row[4].split(" ± ")[0]) == pytest.approx(hole.item(), abs=1e-2)


def test_the_last_layer_fitted_to_known_pixels_is_the_best_one_there(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run")
    module = run("last_layer", [str(tmp_path / "run"), "-n", "3"], monkeypatch)
    cells = capsys.readouterr().out.splitlines()[-1].split("|")[2:-1]
    assert [cell.count("±") for cell in cells] == [1, 1, 1]
    model, dataset = load_model(tmp_path / "run"), data.Signs("val", SIZE)
    with torch.no_grad():
        layers = module.fitted(model, dataset, 3)
        (batch,) = data.held_out_batches(dataset, 3, 3, torch.device("cpu"))
        seen, near = module.inputs(model, batch)
        layers["as trained"] = torch.cat([model.decoder.conv_out.weight.flatten(1),
                                          model.decoder.conv_out.bias[:, None]], 1).T.double()
        z = model.encode(batch.x)
        error = {}
        for name, weight in layers.items():
            x_hat = (seen @ weight).transpose(1, 2).unflatten(2, batch.x.shape[2:])
            if name == "as trained":
                torch.testing.assert_close(
                    x_hat.float(), model.decode(z, image=batch.x, mask=batch.mask))
            error[name] = ((x_hat - batch.x).square() * (1 - near)).sum().item()
    assert error["known pixels"] < 0.99 * min(error["all pixels"], error["as trained"])
