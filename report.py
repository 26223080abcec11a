"""report.json and the table of report.md: what eval.py found, in one fixed form. [AVQ Tab. 2]

    runs, eval.Tally --make_report--> {"rows": [a row for each (run, decoder, bucket)], ...}
                     --table--> aligned Markdown, one row a decoder, as the paper prints it

report.json holds numbers or null, never NaN or infinity: null is what was not computed or is not
finite, and `notes` says why. Nothing is measured here; pictures are figures.py's.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch

DECODERS = ("vanilla", "asym", "asym-nomask", "paste")
SHARED = ("vanilla", "paste")            # the same for all runs on one first stage
BUCKETS = ("all", *(f"{low}-{low + 10}" for low in range(0, 100, 10)))
MEASURES = ("pre_error", "psnr_known", "lpips", "seam")

REPORT_KEYS = {"version", "command", "commit", "device", "seed", "n", "range", "masks", "rows",
               "codebook", "prior", "notes"}
ROW_KEYS = {"run", "decoder", "blend", "size", "bucket", "n", *MEASURES, "lpips_net", "fid",
            "is_mean", "is_std", "images_per_s"}
NOTES = {
    "pre_error": "mean squared error on known pixels, images in [0,1]; 4 times that in [-1,1]",
    "psnr_known": "dB, mean over images; null where infinite, because the pixels are exact copies",
    "seam": "images in [0,1]; 0 for the original, negative is smoother than it",
    "images_per_s": "decoding alone, of all images; paste costs what vanilla does",
    "fid": "not computed: this version has no Inception network",
    "is_mean": "not computed: this version has no Inception network",
    "is_std": "not computed: this version has no Inception network",
    "codebook": "not computed: about the first stage, not its decoders",
    "prior": "not computed: this version has no prior",
}


def make_report(runs, tally, n, device, lpips_net=None, notes=None):
    """report.json's contents: one row for each (run, decoder, bucket) that occurs in `tally`.

    runs: eval.Run's; device: a torch.device; notes: {column: reason} besides NOTES.
    """
    config, rows = runs[0].loaded.config, []
    for run in runs:
        for decoder in DECODERS if run.decodes else SHARED:
            key = (None if decoder in SHARED else run.name, decoder)
            size = {} if decoder in SHARED else run.loaded.config["decoder"]
            for bucket in BUCKETS:
                if (bucket, key) in tally.counts:
                    rows.append({"run": run.name, "decoder": decoder, "blend": size.get("blend"),
                                 "size": size.get("preset"), "lpips_net": lpips_net, "fid": None,
                                 "is_mean": None, "is_std": None, **tally.row(key, bucket)})
    report = {"version": 1, "command": shlex.join(["python", *sys.argv]), "commit": _commit(),
              "device": _describe(device), "seed": config["seed"], "n": n, "range": "[0,1]",
              "masks": {"kind": "thick", "size": config["size"], "seed": 0}, "rows": rows,
              "codebook": None, "prior": None, "notes": NOTES | (notes or {})}
    validate(report)
    return report


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


def table(report):
    """The rows over all masks as aligned Markdown; what all runs share stands there once."""
    rows = [row for row in report["rows"] if row["bucket"] == "all"]
    first, last, vanilla = rows[0], rows[-1], rows[0]["pre_error"]
    several = first["run"] != last["run"]
    lines = [["decoder", "pre_error/1e-5", "in [-1,1]", "gain", "PSNR known", "LPIPS", "seam",
              "images/s"]]
    for row in rows:
        if row["decoder"] not in SHARED or row is first or row is last:
            lines.append([row_name(row, several), *_cells(row, vanilla)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(_line(cells, widths) for cells in lines)


def _line(cells, widths):
    padded = [cell.rjust(width) for cell, width in zip(cells, widths)]
    return "| " + " | ".join([cells[0].ljust(widths[0]), *padded[1:]]) + " |"


def _cells(row, vanilla):
    error = row["pre_error"]
    return [_short(1e5 * error), _short(4e5 * error),
            f"{_short(vanilla / error)}x" if error else "∞",
            "∞" if row["psnr_known"] is None else f"{row['psnr_known']:.2f}",
            "n/a" if row["lpips"] is None else f"{row['lpips']:.4f}",
            f"{row['seam']:+.4f}", _speed(row["images_per_s"])]


def row_name(row, several):
    """What the table calls a row; with the run where there are several."""
    if row["decoder"] in SHARED:
        return {"vanilla": "first stage's own decoder (vanilla)",
                "paste": "vanilla, known pixels pasted (paste)"}[row["decoder"]]
    mask = "w/ mask" if row["decoder"] == "asym" else "w/o mask"
    return f"ours ({row['size']}, {row['blend']}) {mask}" + (f": {row['run']}" if several else "")


def _short(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}" if value >= 1 else f"{value:.3g}"


def _speed(value):
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def report_text(report, data):
    """The table with what it is about: which pictures, which units, and why a column is empty."""
    masks, row, notes = report["masks"], report["rows"][0], report["notes"]
    lines = [f"{report['n']:,} of {data}, {masks['size']} px; {masks['kind']} masks of at most "
             f"half the picture, seed {masks['seed']}; {report['device']}.",
             "pre_error: mean squared error of known pixels for images in [0,1], in units of 1e-5 "
             "as the paper prints it; 4 times that in [-1,1]; gain: vanilla's over the row's.",
             "PSNR in dB on known pixels; seam in [0,1]; LPIPS "
             + (f"({row['lpips_net']})" if row["lpips_net"] else f"is {notes['lpips']}") + ".",
             "", table(report)]
    about = [notes[key] for key in ("run", "n") if key in notes]
    return "\n".join(lines + [""] * bool(about) + about)
