"""report.json: what eval.py found, in one fixed form. [AVQ Tab. 2]

    tally.Tally, names of its decoders --make_report--> {"rows": [one for each (run, decoder,
                                                         bucket)], "codebook": ..., "prior": ...,
                                                         "notes": ..., ...}

report.json holds numbers or null, never NaN or infinity: null is what was not computed or is not
finite, and `notes` says why. Nothing is measured here; how rows are printed is in tables.py.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from tally import BUCKETS, MEASURES, SETS

DECODERS = ("vanilla", "asym", "asym-nomask", "paste", "files")
SHARED = ("vanilla", "paste")            # the same for all runs on one first stage

REPORT_KEYS = {"version", "command", "commit", "device", "seed", "n", "range", "masks", "rows",
               "codebook", "prior", "notes"}
ROW_KEYS = {"run", "decoder", "blend", "size", "bucket", "n", *MEASURES, *SETS, "lpips_net",
            "images_per_s"}
CODEBOOK_KEYS = {"K", "usage_train", "usage_val", "perplexity_val", "rfid"}
PRIOR_KEYS = {"vlb_nats", "uniform_nats", "histogram_nats", "steps"}       # nats a map of codes
STEP_KEYS = {"n", "sampler", "seconds", "fid"}
NOTES = {
    "pre_error": "mean squared error on known pixels, images in [0,1]; 4 times that in [-1,1]",
    "psnr_known": "dB, mean over images; null where infinite, because the pixels are exact copies",
    "seam": "images in [0,1]; 0 for the original, negative is smoother than it",
    "clip_score": "100 x cosine of the edited region's bounding box and the reference, at 224 px",
    "fid": "against the same originals, of the same bin; null for fewer than two pictures",
    "is_mean": "over 10 splits in order, or as many as there are pictures; of all pictures only",
    "is_std": "population standard deviation over the splits",
    "images_per_s": "decoding alone, of all images, each process; paste costs what vanilla does",
    "codebook": "not computed: the pictures are not of a run's data set",
    "prior": "not computed: no run here has one",
}


def make_report(rows, n, device, masks, seed=None, notes=None, codebook=None, prior=None):
    """report.json's contents. Raises ValueError as `validate`.

    rows: from `rows_of`; n: pictures measured; device: a torch.device; masks: {"kind", "size",
    "seed"}; seed: the run's; notes: {column: reason} besides NOTES; codebook, prior: dicts with
    CODEBOOK_KEYS and PRIOR_KEYS, of which "steps" lists dicts with STEP_KEYS.
    """
    report = {"version": 1, "command": shlex.join(["python", *sys.argv]), "commit": _commit(),
              "device": _describe(device), "seed": seed, "n": n, "range": "[0,1]", "masks": masks,
              "rows": rows, "codebook": codebook, "prior": prior, "notes": NOTES | (notes or {})}
    validate(report)
    return report


def rows_of(runs, tally, lpips_net=None):
    """One row for each (run, decoder, bucket) that occurs in `tally`; what runs share is repeated.

    runs: [(name, {"preset", "blend"} or None)], in the table's order.
    """
    rows = []
    for name, size in runs:
        for decoder in DECODERS:
            key = (None if decoder in SHARED else name, decoder)
            own = {} if decoder in (*SHARED, "files") else size or {}
            if key in tally.seconds:
                rows += [{"run": name, "decoder": decoder, "blend": own.get("blend"),
                          "size": own.get("preset"), "lpips_net": lpips_net,
                          **tally.row(key, bucket)} for bucket in tally.buckets(key)]
    return rows


def validate(report):
    """Raise ValueError unless `report` has the right keys, one row a cell and finite numbers."""
    if report.keys() != REPORT_KEYS:
        raise ValueError(f"report.json: wrong keys {sorted(report.keys() ^ REPORT_KEYS)}")
    cells = [(row["run"], row["decoder"], row["bucket"]) for row in report["rows"]]
    if len(set(cells)) < len(cells):
        raise ValueError("report.json: two rows for one (run, decoder, bucket)")
    for row in report["rows"]:
        if row.keys() != ROW_KEYS:
            raise ValueError(f"report.json: wrong keys in a row {sorted(row.keys() ^ ROW_KEYS)}")
        if row["decoder"] not in DECODERS or row["bucket"] not in BUCKETS:
            raise ValueError(f"report.json: no such row {row['decoder']}, {row['bucket']}")
    codebook, prior = report["codebook"], report["prior"]
    parts = [(codebook, CODEBOOK_KEYS), (prior, PRIOR_KEYS),
             *((step, STEP_KEYS) for step in (prior or {}).get("steps", ()))]
    for part, keys in parts:
        if part is not None and part.keys() != keys:
            raise ValueError(f"report.json: wrong keys {sorted(part.keys() ^ keys)}")
    json.dumps(report, allow_nan=False)


def _commit():
    """The commit of this checkout, marked where files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True,
                                check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None


def _describe(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
