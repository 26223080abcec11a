"""report.json keeps to its schema."""

import json
import math

import pytest
import torch
from tiny_reports import CPU, example_report, example_tally

from report import DECODERS, NOTES, make_report, rows_of, validate

MASKS = {"kind": "thick", "size": 64, "seed": 0}
CODEBOOK = {"K": 8, "usage_train": None, "usage_val": 0.5, "perplexity_val": 2.0, "rfid": None}
STEP = {"n": 25, "sampler": "strided", "seconds": 0.5, "fid": None}
PRIOR = {"vlb_nats": 1.0, "uniform_nats": 3.0, "histogram_nats": 2.0, "steps": [STEP]}


def test_each_decoder_has_one_row_a_bin_and_all_and_what_runs_share_is_repeated():
    rows = example_report()["rows"]
    every = [(row["run"], row["decoder"]) for row in rows if row["bucket"] == "all"]
    assert every == [(run, decoder) for run in ("add", "concat") for decoder in DECODERS[:4]]
    first, second = ([row | {"run": ""} for row in rows
                      if row["run"] == run and row["decoder"] == "vanilla"]
                     for run in ("add", "concat"))
    assert first == second
    assert {(row["size"], row["blend"]) for row in rows if row["decoder"] == "asym"} == {
        ("base", "add"), ("base", "concat")}
    assert {row["blend"] for row in rows if row["decoder"] in ("vanilla", "paste")} == {None}


def test_a_report_survives_json_without_nan():
    def refuse(word):
        raise ValueError(word)

    report = example_report()
    assert json.loads(json.dumps(report), parse_constant=refuse) == report
    assert report["notes"].keys() >= NOTES.keys()


def test_a_broken_report_is_not_made():
    report = example_report()
    row = report["rows"][0]
    broken = [{"rows": [*report["rows"], row]}, {"rows": [{**row, "speed": 1}]},
              {"rows": [{**row, "seam": math.nan}]}, {"rows": [{**row, "bucket": "5-15"}]},
              {"rows": [{**row, "decoder": "best"}]}, {"extra": 1},
              {"codebook": {**CODEBOOK, "size": 1}}, {"codebook": {**CODEBOOK, "rfid": math.inf}},
              {"prior": {**PRIOR, "bits": 1.0}},
              {"prior": {**PRIOR, "steps": [{**STEP, "nats": 1}]}}]
    for change in broken:
        with pytest.raises(ValueError, match=r"report.json|JSON"):
            validate(report | change)


def test_codebook_and_prior_stand_in_the_report_as_they_were_given():
    report = make_report([], 4, CPU, MASKS, codebook=CODEBOOK, prior=PRIOR)
    assert (report["codebook"], report["prior"]) == (CODEBOOK, PRIOR)
    assert example_report()["codebook"] is example_report()["prior"] is None
    assert example_report()["notes"]["prior"].startswith("not computed")


def test_pictures_of_another_program_are_one_decoder_called_files():
    tally = example_tally([("sd", "files")])
    report = make_report(rows_of([("sd", None)], tally), 4, CPU, MASKS)
    assert {row["decoder"] for row in report["rows"]} == {"files"}
    assert report["seed"] is None


def test_the_device_says_how_many_threads_a_cpu_used():
    assert example_report()["device"] == f"cpu, {torch.get_num_threads()} threads"
