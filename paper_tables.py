"""Set ours beside the papers' own figures: report.json, and Markdown to read. [AVQ Tab. 2]

    rows of metrics.py --make_report--> report.json's contents: numbers or null, and notes
    report --table, bucket_table, paper_table--> AVQ's tables, the paper's own rows below ours
    codebooks --codebook_table--> DDM's Table 1; its "prior" --prior_table, steps_table--> two more

report.json holds no NaN and no infinity: null is what is missing or infinite, `notes` says why.
"""

import math
import shlex
import subprocess
import sys
from pathlib import Path

import torch

# {measure: (head, how a number is written)}; pre_error in units of 1e-5 as in the paper.
COLUMNS = {
    "pre_error": ("pre_error/1e-5", lambda v: short(1e5 * v)),
    "psnr_known": ("PSNR known", "{:.2f}".format),
    "lpips": ("LPIPS", "{:.4f}".format),
    "fid": ("FID", "{:.2f}".format),
    "is_mean": ("IS", "{:.2f}".format),
    "clip_score": ("CLIP score", "{:.2f}".format),
    "seam": ("seam", "{:+.4f}".format),
}

ABOUT_PAPER = ("The paper's own figures are of other pictures and of inpainted holes; it states no "
               "range for Pre_error, and Tables 4 and 5 print it without e-5, taken here as meant.")
ABOUT_SAMPLES = ("Ours are samples of VQ-DDM, compared with the run's own data set, not COCO's "
                 "captions painted by Stable Diffusion: compare the decoders with one another.")
_HARD = ("40-50", "fid"), ("40-50", "lpips"), ("all", "fid"), ("all", "lpips")
_INPAINTED = ("all", "fid"), ("all", "lpips"), ("all", "pre_error")
_EXAMPLE = ("all", "clip_score"), ("all", "pre_error")
_SAMPLED = ("all", "fid"), ("all", "is_mean")
_MODULES = "files", "vanilla", "asym", "asym-nomask"

# {number: (title, (bucket, measure) of each column, decoders that belong into it, {row: figures})}
PAPER_TABLES = {
    # [AVQ Tab. 1] [AVQ Tab. 2] [AVQ Tab. 3] [AVQ Tab. 4] [AVQ Tab. 5]
    "1": ("inpainting on Places, 30k of 512 px, LaMa's protocol", _HARD, _MODULES[:3], {
        "LaMa": (12.0, 0.24, 2.21, 0.14), "CoModGAN": (10.4, 0.26, 1.82, 0.15),
        "StableDiffusion": (8.26, 0.324, 2.27, 0.245), "ours": (6.80, 0.244, 1.03, 0.141)}),
    "2": ("the modules, inpainting on ImageNet", _INPAINTED, _MODULES, {
        "StableDiffusion": (9.57, 0.255, 1082.8e-5),
        "base w/ mask": (7.604, 0.137, 5.7e-5), "base w/o mask": (9.48, 0.248, 1078.6e-5),
        "large w/ mask": (7.55, 0.136, 2.6e-5), "large w/o mask": (9.17, 0.243, 1047.7e-5)}),
    "3": ("ways of blending, ImageNet", _INPAINTED, ("asym",), {
        "base add": (7.60, 0.137, 5.7e-5), "base concat": (7.64, 0.138, 5.3e-5),
        "large add": (7.55, 0.136, 2.6e-5), "large concat": (7.56, 0.137, 4.4e-5)}),
    "4": ("paint by example, COCOEE", _EXAMPLE, _MODULES[:3], {
        "Paint-by-Example": (85.67, 588.86e-5), "ours": (86.35, 0.76e-5)}),
    "5": ("the modules, paint by example on COCOEE", _EXAMPLE, _MODULES, {
        "Paint-by-Example": (85.67, 588.86e-5),
        "base": (86.24, 1.37e-5), "base w/o mask": (86.15, 478.47e-5),
        "large": (86.35, 0.76e-5), "large w/o mask": (86.32, 451.67e-5)}),
    # [AVQ Tab. 6] [AVQ Tab. 9] [AVQ Tab. 10]
    "6": ("the modules without a mask; samples of our generator, not COCO", _SAMPLED, ("files",), {
        "StableDiffusion": (19.88, 37.55), "base w/o mask": (19.92, 37.52),
        "large w/o mask": (19.75, 37.64)}),
    "9": ("larger decoders, ImageNet", _INPAINTED, ("asym",), {
        "base": (7.60, 0.137, 5.7e-5), "large": (7.55, 0.136, 2.6e-5),
        "large2": (7.49, 0.134, 2.1e-5)}),
    "10": ("larger decoders without a mask; samples of our generator, not COCO", _SAMPLED,
           ("files",), {"base w/o mask": (19.92, 37.52), "large w/o mask": (19.75, 37.64),
                        "large2 w/o mask": (19.68, 37.74)}),
}

# What report.json's columns mean, and why they may be null.
NOTES = {
    "pre_error": "mean squared error on known pixels, images in [0,1]; 4 times that in [-1,1]",
    "psnr_known": "dB, mean over images; null where infinite, because the pixels are exact copies",
    "seam": "images in [0,1]; 0 for the original, negative is smoother than it",
    "clip_score": "100 x cosine of the edited region's bounding box and the reference, by --clip",
    "fid": "of all pictures and of the bin 40-50, as the paper prints it; null for fewer than two",
    "is_mean": "over 10 splits in order, or as many as there are pictures; of all pictures only",
    "is_std": "population standard deviation over the splits",
    "images_per_s": "decoding alone, of all images, each process; paste costs what vanilla does",
    "codebook": "not computed: the pictures are not of a run's data set",
    "prior": "not computed: no run here has one",
}


def make_report(rows, n, device, masks, seed=None, notes=None, codebook=None, prior=None):
    """Make report.json's contents of metrics.report_rows, eval.codebook_row and eval.draw.

    n: images measured; masks: {"kind", "size", "seed"}; notes: {column: reason} besides NOTES.
    """
    name = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True,
                                check=False).stdout.strip()
    except OSError:                      # no git
        commit = ""
    return {"version": 1, "command": shlex.join(["python", *sys.argv]), "commit": commit or None,
            "device": name, "seed": seed, "n": n, "range": "[0,1]", "masks": masks, "rows": rows,
            "codebook": codebook, "prior": prior, "notes": NOTES | (notes or {})}


def table(report, missing=()):
    """Write the rows over all masks; the columns with a number and those asked for in vain."""
    rows = [row for row in _distinct(report) if row["bucket"] == "all"]
    rows.sort(key=lambda row: row["decoder"] == "paste")                        # it comes last
    first = rows[0]["pre_error"] if rows[0]["decoder"] == "vanilla" else None
    columns = {"decoder": lambda row: row_name(report, row)}
    for name in _shown(report, missing):
        columns[COLUMNS[name][0]] = lambda row, name=name: cell(row, name)
        if name == "pre_error":
            columns["in [-1,1]"] = lambda row: _written(row["pre_error"], lambda v: short(4e5 * v))
            if first is not None:
                columns["gain"] = lambda row: _written(
                    row["pre_error"], lambda v: f"{short(first / v)}x" if v else "∞")
    if any(row["images_per_s"] is not None for row in rows):
        columns["images/s"] = lambda row: _written(row["images_per_s"], short)
    return markdown(columns, [[write(row) for write in columns.values()] for row in rows])


def bucket_table(report, missing=()):
    """Write a row for each decoder and bucket of the masks' area; "" without buckets."""
    names = [name for name in _shown(report, missing) if name != "is_mean"]
    rows = [[row_name(report, row), row["bucket"], f"{row['n']:,}", *(cell(row, k) for k in names)]
            for row in _distinct(report) if row["bucket"] != "all"]
    heads = ["decoder", "area, %", "n", *(COLUMNS[name][0] for name in names)]
    return markdown(heads, rows) if rows else ""


def paper_table(report, number):
    """Write table `number` of the paper: its columns, our rows, its rows below."""
    (title, columns, decoders, figures), rows = PAPER_TABLES[number], []
    found = {(row["run"], row["decoder"], row["bucket"]): row for row in _distinct(report)}
    for (run, decoder, bucket), row in found.items():
        if bucket == "all" and decoder in decoders:
            own = [(found.get((run, decoder, place)), name) for place, name in columns]
            rows.append([row_name(report, row), f"{row['n']:,}",
                         *(cell(other, name) if other else "n/a" for other, name in own)])
    for method, values in figures.items():
        written = [COLUMNS[name][1](value) for value, (_, name) in zip(values, columns)]
        rows.append([f"paper: {method}", "", *written])
    heads = [(f"{bucket} %: " if bucket != "all" else "") + COLUMNS[name][0]
             for bucket, name in columns]
    about = ABOUT_SAMPLES if columns == _SAMPLED else ABOUT_PAPER
    return f"Table {number}: {title}\n\n{markdown(['method', 'n', *heads], rows)}\n\n{about}"


def report_text(report, about, missing, off, number=None):
    """Write images (`about`), units, tables (AVQ's `number` too), and why columns are empty.

    missing, off: metrics.Networks'."""
    masks, net = report["masks"], report["rows"][0]["lpips_net"]
    if masks["size"]:
        about = (f"{report['n']:,} of {about}, {masks['size']} px; {masks['kind']} masks of at "
                 f"most half the image, seed {masks['seed']}")
    lines = [f"{about}; {report['device']}."]
    if masks["kind"]:
        lines += ["pre_error: mean squared error of known pixels in [0,1], in the paper's 1e-5; 4 "
                  "times that in [-1,1]; gain: vanilla's over the row's.",
                  "PSNR in dB on known pixels; seam in [0,1]."]
    if net:
        lines.append(f"LPIPS by {net}.")
    lines += ["", table(report, missing), ""]
    if number in PAPER_TABLES:
        lines += [paper_table(report, number), ""]
    if buckets := bucket_table(report, missing):
        lines += ["By the share of the image that is to be generated:", "", buckets, ""]
    empty = {}                                   # one line for columns that lack the same file
    for word, reasons in (("n/a", missing), ("not computed", off)):
        for name in filter(COLUMNS.get, reasons):
            empty.setdefault(f"{word}: {reasons[name]}", []).append(COLUMNS[name][0])
    lines += [f"{', '.join(heads)}: {why}" for why, heads in empty.items()]
    return "\n".join([*lines, report["notes"].get("run", "")]).rstrip()


def row_name(report, row):
    """Name a row, with the run where there are several."""
    names = {"files": row["run"], "vanilla": "first stage's own decoder (vanilla)",
             "paste": "vanilla, known pixels pasted (paste)"}
    if row["decoder"] in names:
        return names[row["decoder"]]
    mask = "w/ mask" if row["decoder"] == "asym" else "w/o mask"
    run = f": {row['run']}" if len({other["run"] for other in report["rows"]}) > 1 else ""
    return f"ours ({row['size'] or 'own size'}, {row['blend']}) {mask}{run}"


def cell(row, name):
    """Write one number as the tables do."""
    if name == "psnr_known" and row["pre_error"] == 0:
        return "∞"
    text = _written(row[name], COLUMNS[name][1])
    return f"{text} ± {row['is_std']:.2f}" if name == "is_mean" and row[name] is not None else text


def markdown(head, rows):
    """Align a head and rows of texts as a Markdown table: the first column left, others right."""
    widths = [max(3, *map(len, column)) for column in zip(head, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
             for row in ([*head], rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}" if value >= 1 else f"{value:.3g}"


def _written(value, how):
    return "n/a" if value is None else how(value)


def _distinct(report):
    """The rows, those that runs share only once."""
    rows = report["rows"]
    return [row for row in rows
            if row["decoder"] not in ("vanilla", "paste") or row["run"] == rows[0]["run"]]


def _shown(report, missing):
    return [name for name in COLUMNS
            if name in missing or any(row[name] is not None for row in report["rows"])]


DDM_TABLE_1 = (          # [DDM Tab. 1]
    ("paper", "latent", "K", "usage, CelebA-HQ", "usage, ImageNet", "rFID, CelebA-HQ",
     "rFID, ImageNet"),
    ("VQ-VAE-2", "cascade", "512", "~65 %", "-", "-", "~10"),
    ("DALL-E", "32x32", "8,192", "-", "-", "-", "32.01"),
    ("VQ-GAN", "16x16", "16,384", "-", "5.96 %", "-", "4.98"),
    ("VQ-GAN", "16x16", "1,024", "31.85 %", "33.67 %", "10.18", "7.94"),
    ("ReFiT, P = 100k", "16x16", "1,024", "-", "100 %", "-", "4.98"),
    ("ReFiT, P = 20k", "16x16", "1,024", "97.07 %", "100 %", "5.59", "5.99"),
    ("ReFiT, P = 20k", "16x16", "512", "93.06 %", "100 %", "5.64", "6.95"))
HOURS_FOR = 50_000       # samples, as in DDM's Figs. 5 and 6


def codebook_table(rows):
    """Write the columns of DDM's Table 1: one row a codebook, as eval.codebook_row. [DDM Tab. 1]"""
    return markdown(
        ["codebook", "latent", "K", "usage, train", "usage, held out", "perplexity, held out",
         "rFID"],
        [[row["name"], row["latent"], f"{row['K']:,}", _written(row["usage_train"], _percent),
          _written(row["usage_val"], _percent), _written(row["perplexity_val"], "{:,.1f}".format),
          _written(row["rfid"], "{:.2f}".format)] for row in rows])


def ddm_table_1():
    """Write the rows that the paper prints."""
    return markdown(DDM_TABLE_1[0], DDM_TABLE_1[1:]) + (
        "\n\nThe paper counts usage on \"the test set or training set\", CelebA-HQ's FID against "
        "training pictures, ImageNet's against held-out ones; ours is against held-out ones.")


def prior_table(prior, K):
    """Write what a held-out map of codes costs by the prior and by simpler models."""
    cells = round(prior["uniform_nats"] / math.log(K))
    models = {"all codes alike": prior["uniform_nats"],
              "how often each occurs at each cell": prior["histogram_nats"],
              "VQ-DDM, an upper bound": prior["vlb_nats"]}
    return markdown(["model of the codes", "nats a map", "bits a code", "of the histogram's"], [
        [name, f"{nats:,.1f}", f"{nats / cells / math.log(2):.3f}",
         _percent(nats / prior["histogram_nats"])] for name, nats in models.items()])


def steps_table(steps, batch_size):
    """Write rows of sample.measure: time, the prior's bound by steps. [DDM Fig. 5] [DDM Fig. 6]"""
    heads = ["steps", f"seconds for {batch_size}", f"hours for {HOURS_FOR:,}", "nats a map"]
    hours = HOURS_FOR / batch_size / 3600
    return markdown(heads, [[f"{row['n']:,}", short(row["seconds"]), short(row["seconds"] * hours),
                             f"{row['nats']:,.1f}"] for row in steps])


def _percent(share):
    return f"{100 * share:.1f} %"
