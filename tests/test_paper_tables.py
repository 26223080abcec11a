"""The tables that people read, and report.json."""

import json
import math

import pytest
import torch
from tiny_reports import CPU, EMPTY, example_report, example_table

from metrics import report_rows
from paper_tables import (
    DDM_TABLES,
    NOTES,
    PAPER_TABLES,
    bucket_table,
    codebook_table,
    difference_table,
    make_report,
    paper_table,
    prior_table,
    readings,
    report_text,
    steps_table,
    table,
    with_error,
)

PRIOR = {"maps": 5, "uniform_nats": 256 * math.log(64), "unigram_nats": 850.0, "unigram_se": 3.14,
         "histogram_nats": 800.0, "histogram_se": 2.72, "vlb_nats": 600.0, "vlb_se": 1.62,
         "train_vlb_nats": 560.0, "train_vlb_se": None}
CODEBOOKS = [{"name": "before ReFiT", "latent": "16x16", "K": 16384, "usage_train": None,
              "usage_val": 0.0596, "perplexity_val": 1234.56, "rfid": 4.98},
             {"name": "after ReFiT", "latent": "16x16", "K": 1024, "usage_train": 1.0,
              "usage_val": 0.9707, "perplexity_val": 900.0, "rfid": None}]


def _cells(text, row):
    return [cell.strip() for cell in text.split("\n")[row].split("|")[1:-1]]


def _of(report, decoder):
    return next(row for row in report["rows"]
                if row["decoder"] == decoder and row["bucket"] == "all")


def test_what_runs_share_stands_once_first_and_last():
    text = table(example_report()).split("\n\n")[0]
    lines = text.split("\n")
    assert len(lines) == 2 + 6
    assert text.count("vanilla (first") == text.count("pasted") == 1
    assert "vanilla (first stage's own)" in lines[2]
    assert "vanilla, known pixels pasted" in lines[-1]
    assert "ours (base, concat) w/o mask: concat" in text
    assert len({len(line) for line in lines}) == 1               # aligned


def test_the_table_gives_both_ranges_and_how_much_better_than_vanilla():
    report = example_report()
    _of(report, "vanilla").update(pre_error=1082.8e-5, pre_error_se=71.26e-5,
                                  pre_error_median=843.21e-5)
    _of(report, "asym").update(pre_error=5.7e-5, pre_error_se=None, psnr_known=42.4412,
                               psnr_known_se=0.1234)
    text = table(report).split("\n\n")[0]
    assert _cells(text, 0)[1:] == ["pre_error/1e-5", "median", "in [-1,1]", "gain", "PSNR known/dB"]
    assert _cells(text, 2)[1:5] == ["1,083 ± 71", "843.2", "4,330 ± 290", "1.000x"]
    assert _cells(text, 3)[1:2] + _cells(text, 3)[3:] == ["5.700", "22.80", "190.0x",
                                                          "42.44 ± 0.12"]
    assert _cells(text, -1)[1:] == ["0", "0", "0", "∞", "∞"]     # pasted: no error at all


@pytest.mark.parametrize(("value", "error", "written"), [
    (173.21, 4.12, "173.2 ± 4.1"), (6983.2, 127, "6,980 ± 130"), (0.04401, 0.00213,
    "0.0440 ± 0.0021"), (17.6, 0.0996, "17.60 ± 0.10"), (-0.3, 25.0, "0 ± 25"),
    (-12.34, 1.0, "-12.3 ± 1.0"), (5.0, 0.0, "five"), (5.0, None, "five")])
def test_a_mean_has_as_many_digits_as_two_digits_of_its_standard_error(value, error, written):
    assert with_error(value, error, lambda value: "five") == written
    if error:
        assert with_error(value, error, None, "+").lstrip("+") == written


def test_a_column_that_was_asked_for_in_vain_says_na_and_others_are_left_out():
    report = example_report()
    report["notes"] |= EMPTY
    text = table(report).split("\n\n")[1]
    heads = _cells(text, 0)
    assert "FID" in heads
    assert "IS" in heads
    assert "LPIPS" not in heads
    assert "CLIP score" not in heads
    assert _cells(text, 2)[heads.index("FID")] == "n/a"
    text = report_text(report, "6 of these")
    assert "FID, IS: n/a: x.pth is not in y" in text             # one line for one file
    assert "LPIPS: not computed: --lpips none" in text


def test_the_inception_score_stands_with_its_deviation_and_fid_with_its_number_of_images():
    text = table(example_report(is_mean=37.55, is_std=0.321, fid=9.571)).split("\n\n")[1]
    heads = _cells(text, 0)
    assert _cells(text, 2)[heads.index("IS")] == "37.55 ± 0.32"
    assert _cells(text, 2)[heads.index("FID")] == "9.57 (n=6)"


def test_the_bins_are_listed_with_their_numbers_of_pictures():
    text = bucket_table(example_report())
    assert _cells(text, 0)[:3] == ["decoder", "area, %", "n"]
    assert [_cells(text, row)[1:3] for row in (2, 3)] == [["20-30", "3"], ["40-50", "3"]]
    assert len(text.split("\n")) == 2 + 6 * 2                    # shared rows once
    report = example_report()
    assert bucket_table(report | {"rows": [_of(report, "asym")]}) == ""


def test_differences_name_both_decoders_and_show_their_signs():
    report = example_report()
    text, found = difference_table(report), report["differences"]
    assert _cells(text, 0) == ["decoder", "minus", "latents", "n", "pre_error/1e-5", "seam"]
    lines = [_cells(text, row)[:4] for row in range(2, 2 + len(found))]
    add, concat = "ours (base, add) w/ mask: add", "ours (base, concat) w/ mask: concat"
    assert lines == [[add, "vanilla", "full", "6"], [add, "paste", "full", "6"],
                     [concat, "vanilla", "full", "6"], [concat, "paste", "full", "6"],
                     [concat, add, "full", "6"]]
    assert _cells(text, 6)[4].startswith("+")
    assert text in report_text(report, "6 of these")
    assert difference_table(report | {"differences": []}) == ""


ROWS = {"1": 7, "2": 5, "3": 4, "4": 6, "5": 5, "6": 3, "9": 3, "10": 3}     # that AVQ prints


def test_the_papers_tables_are_whole():
    assert {number: len(figures) for number, (*_, figures) in PAPER_TABLES.items()} == ROWS
    lines = {name: text.split("\n\n")[0].split("\n") for name, text in DDM_TABLES.items()}
    assert {name: len(rows) - 2 for name, rows in lines.items()} == {"ddm1": 7, "ddm2": 10}


def test_figures_that_avq_prints_twice_agree():
    figures = {number: {method: values.split() for method, values in rows.items()}
               for number, (*_, rows) in PAPER_TABLES.items()}
    for number, row, other, twin in (
            ("2", "Ours (large) w/ mask", "3", "Ours (large) add."),
            ("3", "Ours (base) add.", "9", "Base decoder"),
            ("3", "Ours (large) add.", "9", "Large1 decoder"),
            ("4", "Paint-by-Example*", "5", "Paint-by-Example*"),
            ("4", "Ours", "5", "Ours (large)"),
            ("6", "Ours (base) w/o mask", "10", "Base decoder w/o mask"),
            ("6", "Ours (large) w/o mask", "10", "Large decoder w/o mask")):
        assert figures[number][row] == figures[other][twin]
    fid = [float(figures["1"][method][2]) for method in ("StableDiffusion*", "Ours")]
    assert fid[0] - fid[1] == pytest.approx(1.24)                # Sec. 4.1


@pytest.mark.parametrize("number", PAPER_TABLES)
def test_a_table_of_the_paper_has_its_columns_ours_above_and_its_figures_below(number):
    report = example_report(fid=7.5, lpips=0.125, clip_score=86.0, is_mean=9.0, is_std=0.5)
    text, (_, columns, decoders, figures) = paper_table(report, number), PAPER_TABLES[number]
    lines = [line for line in text.split("\n") if line.startswith("|")]
    own = [line for line in lines[2:] if "paper:" not in line]
    expected = {(row["run"] if row["decoder"].startswith("asym") else "", row["decoder"])
                for row in report["rows"] if row["decoder"] in decoders}
    assert len(own) == len(expected)
    errors = sum(name == "pre_error" for _, name in columns)     # of three readings each
    for line, (method, values) in zip(lines[2 + len(own):], figures.items(), strict=True):
        values = values.split()
        three = readings(values.pop()) if errors else []
        assert _cells(line, 0) == [f"paper: {method}", "", *values, *three]
    assert {len(_cells(line, 0)) for line in lines} == {2 + len(columns) + 2 * errors}
    assert "n/a" not in text
    assert ("*: reproduced" in text) == ("*" in "".join(figures))


def test_pre_error_stands_in_both_ranges_and_in_db_beside_both_readings_of_the_papers():
    report = example_report()
    _of(report, "vanilla").update(pre_error=250e-5, pre_error_se=10e-5)
    text = paper_table(report, "2")
    lines = text.split("\n\n")[1].split("\n")
    assert _cells(lines[0], 0)[-3:] == ["pre_error/1e-5", "in [-1,1]", "dB"]
    assert _cells(lines[2], 0)[2:] == [                          # no FID, no LPIPS here
        "n/a", "n/a", "250 ± 10", "1,000 ± 40", "26.0"]
    assert _cells(lines[-4], 0)[2:] == ["7.604", "0.137", "5.7 or 1.425", "22.8 or 5.7",
                                        "42.4 or 48.5"]
    assert "The paper states no range" in text
    for value, written in ((0, ["0", "0", "∞"]), (None, 3 * ["n/a"])):
        _of(report, "vanilla").update(pre_error=value, pre_error_se=value)
        assert _cells(paper_table(report, "2").split("\n\n")[1], 2)[-3:] == written


def test_the_tables_of_one_run_fit_a_terminal_of_115_columns():
    report = example_report(lpips=0.1234, lpips_se=0.0012)
    report["rows"] = [row for row in report["rows"] if row["run"] == "add"]
    report["differences"] = report["differences"][:2]
    for text in (table(report), bucket_table(report), difference_table(report),
                 *(paper_table(report, number) for number in PAPER_TABLES)):
        assert max(len(line) for line in text.split("\n") if line.startswith("|")) <= 115


def test_the_readings_of_a_figure_of_the_papers_are_the_errors_and_decibels_of_either_range():
    assert readings("-") == ["-", "-", "-"]
    unit, wide, decibels = readings("2.1")
    assert unit.split(" or ") == ["2.1", f"{2.1 / 4:.4g}"]
    assert wide.split(" or ") == [f"{2.1 * 4:.4g}", "2.1"]
    assert [float(dB) for dB in decibels.split(" or ")] == pytest.approx(
        [10 * math.log10(1 / 2.1e-5), 10 * math.log10(2 ** 2 / 2.1e-5)], abs=0.05)


def test_table_1_takes_the_hard_masks_from_their_bin():
    report = example_report(lpips=0.1, fid=3.0)
    for row in report["rows"]:
        if row["bucket"] == "40-50":
            row["lpips"], row["fid"] = 0.3, 9.0
    cells = _cells(paper_table(report, "1").split("\n\n")[1], 2)
    assert cells[1:] == ["6", "9.00 (n=3)", "0.3000", "3.00 (n=6)", "0.1000"]


def test_pictures_of_another_program_bear_their_folders_name_and_have_no_gain():
    rows = report_rows(example_table([("sd-results", "files")], seconds=0), {"sd-results": None})
    assert {(row["run"], row["decoder"], row["size"]) for row in rows} == {
        ("sd-results", "files", None)}
    report = make_report(CPU, {}, n=6, rows=rows, differences=[],
                         masks={"kind": "files", "size": None, "seed": None})
    text = report_text(report, "6 pictures of sd-results")
    assert text.startswith("6 pictures of sd-results; cpu")
    assert "| sd-results" in text
    assert "gain" not in text
    assert "images/s" not in table(report)


def test_tables_about_samples_say_whose_they_are():
    text = paper_table(example_report(fid=7.5, is_mean=9.0, is_std=0.5), "6")
    rows = [_cells(line, 0) for line in text.split("\n") if "(base)" in line]
    assert rows == [["paper: Ours (base) w/o mask", "", "19.92", "37.52"]]
    assert text.endswith("compare our decoders with one another only.")
    assert "pre_error" not in text
    assert "pre_error" in paper_table(example_report(), "2")


def test_pre_error_and_seam_are_explained_below_the_table_where_there_are_masks():
    report = example_report()
    text = report_text(report, "6 of these")
    assert text.index("pasted") < text.index("gain: ") < text.index("pre_error: mean squared")
    assert "±: standard error of the mean over images, clustered by equal masks; of IS" in text
    assert "seam: mean absolute error of the step across the mask's border" in text
    report["masks"] = {"kind": None, "size": None, "seed": None}
    report["rows"][0]["lpips_net"] = "alex"
    text = report_text(report, "6 of these")
    assert "pre_error: mean" not in text
    assert "seam: " not in text
    assert "LPIPS: by alex, over the whole image." in text


def test_codebooks_have_the_columns_of_ddms_table_1():
    text = codebook_table(CODEBOOKS)
    assert _cells(text, 2) == ["before ReFiT", "16x16", "16,384", "n/a", "6.0%", "1,234.6", "4.98"]
    assert _cells(text, 3) == ["after ReFiT", "16x16", "1,024", "100.0%", "97.1%", "900.0", "n/a"]
    assert _cells(DDM_TABLES["ddm1"], 7) == ["ours (P = 20k)", "16x16", "1024", "97.07%", "100%",
                                            "5.59", "5.99"]


def test_ddms_table_2_has_vq_ddm_with_and_without_refit():
    text = DDM_TABLES["ddm2"]
    assert _cells(text, 0) == ["paper", "FID", "Params", "FLOPs"]
    assert _cells(text, 4) == ["ours (K = 1024 w/o ReFiT)", "22.6", "117 M", "1.06 G"]
    assert _cells(text, 8) == ["ours (K = 1024 w/ ReFiT)", "13.2", "117 M", "1.06 G"]


def test_a_priors_bound_stands_between_what_knows_less_and_the_bound_of_training():
    text = prior_table(PRIOR, 64)
    assert _cells(text, 2)[1:] == ["1,064.7", "6.000", "133.1%"]  # log2 64 bits per code
    assert _cells(text, 3)[1:] == ["850.0 ± 3.1", f"{850 / 256 / math.log(2):.3f}", "106.2%"]
    assert _cells(text, 4)[1:] == ["800.0 ± 2.7", f"{800 / 256 / math.log(2):.3f}", "100.0%"]
    assert _cells(text, 5)[1:] == ["600.0 ± 1.6", f"{600 / 256 / math.log(2):.3f}", "75.0%"]
    assert _cells(text, 6)[1:] == ["560.0", f"{560 / 256 / math.log(2):.3f}", "70.0%"]
    bare = prior_table({name: PRIOR[name] for name in ("uniform_nats", "vlb_nats", "vlb_se")}, 64)
    assert [_cells(bare, row)[3] for row in (2, 3)] == ["100.0%", f"{600 / 256 / math.log(64):.1%}"]


def test_the_table_of_steps_gives_the_papers_hours_and_the_bound():
    row = {"n": 1000, "maps": 64, "seconds": 11.52, "nats": 321.06, "nats_se": 4.04, "more": 0.0,
           "more_se": 0.0}
    text = steps_table([row], 16)
    assert _cells(text, 0) == ["steps", "samples", "seconds for 16", "hours for 50,000",
                               "nats per map"]
    assert _cells(text, 2) == ["1,000", "64", "11.52", "10.00", "321.1 ± 4.0"]
    text = steps_table([row | {"n": 10, "more": 12.34, "more_se": 1.26}, row], 16)
    assert _cells(text, 0)[5] == "more than in 1,000"
    assert [_cells(text, place)[5] for place in (2, 3)] == ["12.3 ± 1.3", "0.0"]


def test_a_report_has_its_keys_and_survives_json_without_nan():
    def refuse(word):
        raise ValueError(word)

    report = example_report()
    assert json.loads(json.dumps(report), parse_constant=refuse) == report
    assert report.keys() == {"version", "command", "commit", "device", "seed", "n", "range",
                             "masks", "rows", "differences", "codebook", "prior", "notes"}
    means = {"pre_error", "psnr_known", "seam", "lpips", "clip_score"}
    assert all(row.keys() == {name + end for name in means for end in ("", "_se", "_median")} | {
        "run", "decoder", "blend", "size", "protocol", "bucket", "n", "lpips_net", "fid",
        "is_mean", "is_std", "images_per_s"}
               for row in report["rows"])
    means -= {"psnr_known", "clip_score"}
    assert all(row.keys() == means | {f"{name}_se" for name in means} | {
        "run", "decoder", "other_run", "other", "protocol", "n"} for row in report["differences"])
    assert report["version"] == 2
    assert report["notes"].keys() >= NOTES.keys()
    assert report["device"] == f"cpu, {torch.get_num_threads()} threads"
