"""The papers' own figures, and ours beside them: report.json, and Markdown to read.

    rows of metrics.py --make_report--> report.json's contents: numbers or null, and notes
    report --table--> one row a decoder --bucket_table--> one row a decoder and bucket
           --paper_table(report, "2")--> columns and rows as AVQ prints them, its own below
    codebooks --codebook_table--> DDM's Table 1; its "prior" --prior_table, steps_table--> two more

report.json holds no NaN and no infinity: null is what was not computed or is not finite, and
`notes` says why. Everything else is Markdown with aligned columns. [AVQ Tab. 2]
"""

import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

# Columns: (head, measure, how a number is written). pre_error in units of 1e-5 as in the paper.
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
ABOUT_SAMPLES = ("Our pictures are samples of VQ-DDM, our generator, not COCO's captions painted "
                 "by Stable Diffusion, and are compared with the run's own data set: what can be "
                 "compared are the decoders with one another.")


@dataclass(frozen=True)
class PaperTable:
    """What a table of the paper has: its columns, its rows, and the figures it prints."""

    title:    str
    cells:    tuple      # (bucket, measure) of each column
    decoders: tuple      # the rows of report.json that belong into it
    paper:    dict       # {method: figures}, as printed
    about:    str = ABOUT_PAPER    # what to bear in mind when comparing


_FID, _LPIPS, _ERROR = ("all", "fid"), ("all", "lpips"), ("all", "pre_error")
_CLIP, _IS = ("all", "clip_score"), ("all", "is_mean")
_MODULES = ("files", "vanilla", "asym", "asym-nomask")

PAPER_TABLES = {
    # [AVQ Tab. 1]
    "1": PaperTable("inpainting on Places, 30k of 512 px, LaMa's protocol",
                    (("40-50", "fid"), ("40-50", "lpips"), _FID, _LPIPS),
                    ("files", "vanilla", "asym"),
                    {"LaMa": (12.0, 0.24, 2.21, 0.14), "CoModGAN": (10.4, 0.26, 1.82, 0.15),
                     "StableDiffusion": (8.26, 0.324, 2.27, 0.245),
                     "ours": (6.80, 0.244, 1.03, 0.141)}),
    # [AVQ Tab. 2]
    "2": PaperTable("the modules, inpainting on ImageNet", (_FID, _LPIPS, _ERROR), _MODULES,
                    {"StableDiffusion": (9.57, 0.255, 1082.8e-5),
                     "base w/ mask": (7.604, 0.137, 5.7e-5),
                     "base w/o mask": (9.48, 0.248, 1078.6e-5),
                     "large w/ mask": (7.55, 0.136, 2.6e-5),
                     "large w/o mask": (9.17, 0.243, 1047.7e-5)}),
    # [AVQ Tab. 3]
    "3": PaperTable("ways of blending, ImageNet", (_FID, _LPIPS, _ERROR), ("asym",),
                    {"base add": (7.60, 0.137, 5.7e-5), "base concat": (7.64, 0.138, 5.3e-5),
                     "large add": (7.55, 0.136, 2.6e-5), "large concat": (7.56, 0.137, 4.4e-5)}),
    # [AVQ Tab. 4]
    "4": PaperTable("paint by example, COCOEE", (_CLIP, _ERROR), ("files", "vanilla", "asym"),
                    {"Paint-by-Example": (85.67, 588.86e-5), "ours": (86.35, 0.76e-5)}),
    # [AVQ Tab. 5]
    "5": PaperTable("the modules, paint by example on COCOEE", (_CLIP, _ERROR), _MODULES,
                    {"Paint-by-Example": (85.67, 588.86e-5), "base": (86.24, 1.37e-5),
                     "base w/o mask": (86.15, 478.47e-5), "large": (86.35, 0.76e-5),
                     "large w/o mask": (86.32, 451.67e-5)}),
    # [AVQ Tab. 6]
    "6": PaperTable("the modules without a mask; samples of our generator, not COCO",
                    (_FID, _IS), ("files",),
                    {"StableDiffusion": (19.88, 37.55), "base w/o mask": (19.92, 37.52),
                     "large w/o mask": (19.75, 37.64)}, ABOUT_SAMPLES),
    # [AVQ Tab. 9]
    "9": PaperTable("larger decoders, ImageNet", (_FID, _LPIPS, _ERROR), ("asym",),
                    {"base": (7.60, 0.137, 5.7e-5), "large": (7.55, 0.136, 2.6e-5),
                     "large2": (7.49, 0.134, 2.1e-5)}),
    # [AVQ Tab. 10]
    "10": PaperTable("larger decoders without a mask; samples of our generator, not COCO",
                     (_FID, _IS), ("files",),
                     {"base w/o mask": (19.92, 37.52), "large w/o mask": (19.75, 37.64),
                      "large2 w/o mask": (19.68, 37.74)}, ABOUT_SAMPLES),
}


# -- report.json -----------------------------------------------------------------------------------

NOTES = {
    "pre_error": "mean squared error on known pixels, images in [0,1]; 4 times that in [-1,1]",
    "psnr_known": "dB, mean over images; null where infinite, because the pixels are exact copies",
    "seam": "images in [0,1]; 0 for the original, negative is smoother than it",
    "clip_score": "100 x cosine of the edited region's bounding box and the reference, by --clip",
    "fid": "against the same originals, of the same bin; null for fewer than two pictures",
    "is_mean": "over 10 splits in order, or as many as there are pictures; of all pictures only",
    "is_std": "population standard deviation over the splits",
    "images_per_s": "decoding alone, of all images, each process; paste costs what vanilla does",
    "codebook": "not computed: the pictures are not of a run's data set",
    "prior": "not computed: no run here has one",
}


def make_report(rows, n, device, masks, seed=None, notes=None, codebook=None, prior=None):
    """report.json's contents.

    rows: metrics.report_rows'; n: images measured; device: a torch.device; masks: {"kind", "size",
    "seed"}; seed: the run's; notes: {column: reason} besides NOTES; codebook: {"K", "usage_train",
    "usage_val", "perplexity_val", "rfid"}; prior: {"vlb_nats", "uniform_nats", "histogram_nats",
    "steps": a list of rows of sample.py}, in nats a map of codes.
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


# -- AVQ's tables ----------------------------------------------------------------------------------


def table(report, missing=()):
    """The rows over all masks; of the columns those with a number, and those asked for in vain."""
    rows = [row for row in _distinct(report) if row["bucket"] == "all"]
    rows.sort(key=lambda row: row["decoder"] == "paste")                        # it comes last
    first = rows[0]["pre_error"] if rows[0]["decoder"] == "vanilla" else None
    columns = {"decoder": partial(row_name, report)}
    for name in _shown(report, missing):
        columns[COLUMNS[name][0]] = partial(cell, name=name)
        if name == "pre_error":
            columns["in [-1,1]"] = lambda row: _written(row["pre_error"], lambda v: short(4e5 * v))
            if first is not None:
                columns["gain"] = lambda row: _written(
                    row["pre_error"], lambda v: f"{short(first / v)}x" if v else "∞")
    if any(row["images_per_s"] is not None for row in rows):
        columns["images/s"] = lambda row: _written(row["images_per_s"], short)
    return aligned([list(columns), *([write(row) for write in columns.values()] for row in rows)])


def bucket_table(report, missing=()):
    """One row for each decoder and bucket of the masks' area; "" where there are no buckets."""
    rows = [row for row in _distinct(report) if row["bucket"] != "all"]
    names = [name for name in _shown(report, missing) if name != "is_mean"]
    lines = [["decoder", "area, %", "n", *(COLUMNS[name][0] for name in names)]]
    for row in rows:
        lines.append([row_name(report, row), row["bucket"], f"{row['n']:,}",
                      *(cell(row, name) for name in names)])
    return aligned(lines) if rows else ""


def paper_table(report, number):
    """Table `number` of the paper: its columns, our rows, its rows below."""
    paper = PAPER_TABLES[number]
    lines = [["method", "n", *((f"{bucket} %: " if bucket != "all" else "") + COLUMNS[name][0]
                               for bucket, name in paper.cells)]]
    found = {(row["run"], row["decoder"], row["bucket"]): row for row in _distinct(report)}
    for (run, decoder, bucket), row in found.items():
        if bucket == "all" and decoder in paper.decoders:
            own = [(found.get((run, decoder, place)), name) for place, name in paper.cells]
            lines.append([row_name(report, row), f"{row['n']:,}",
                          *("n/a" if other is None else cell(other, name) for other, name in own)])
    for method, figures in paper.paper.items():
        lines.append([f"paper: {method}", "", *(COLUMNS[name][1](value) for value, (_, name)
                                                in zip(figures, paper.cells))])
    return f"Table {number}: {paper.title}\n\n{aligned(lines)}\n\n{paper.about}"


def report_text(report, about, missing, off, number=None):
    """Everything a reader needs: which images, which units, the tables, why a column is empty.

    about: the images, a line; missing, off: {column: reason}, asked for in vain, or not asked for;
    number: of a table of the paper, or None.
    """
    masks, net = report["masks"], report["rows"][0]["lpips_net"]
    if masks["size"]:
        about = (f"{report['n']:,} of {about}, {masks['size']} px; {masks['kind']} masks of at "
                 f"most half the image, seed {masks['seed']}")
    lines = [f"{about}; {report['device']}."]
    if masks["kind"]:
        lines += ["pre_error: mean squared error of known pixels for images in [0,1], in units of "
                  "1e-5 as the paper prints it; 4 times that in [-1,1]; gain: vanilla's over the "
                  "row's.", "PSNR in dB on known pixels; seam in [0,1]."]
    if net:
        lines.append(f"LPIPS by {net}.")
    lines += ["", table(report, missing)]
    if number:
        lines += ["", paper_table(report, number)]
    if buckets := bucket_table(report, missing):
        lines += ["", "By the share of the image that is to be generated:", "", buckets]
    empty = {}                                   # one line for columns that lack the same file
    for word, reasons in (("n/a", missing), ("not computed", off)):
        for name, reason in reasons.items():
            if name in COLUMNS:
                empty.setdefault(f"{word}: {reason}", []).append(COLUMNS[name][0])
    lines += ["", *(f"{', '.join(heads)}: {why}" for why, heads in empty.items())]
    lines += [report["notes"][key] for key in ("run", "n") if key in report["notes"]]
    return "\n".join(lines).rstrip()


def row_name(report, row):
    """What the tables call a row; with the run where there are several."""
    if row["decoder"] == "files":
        return row["run"]
    if row["decoder"] == "vanilla":
        return "first stage's own decoder (vanilla)"
    if row["decoder"] == "paste":
        return "vanilla, known pixels pasted (paste)"
    mask = "w/ mask" if row["decoder"] == "asym" else "w/o mask"
    several = len({other["run"] for other in report["rows"]}) > 1
    return f"ours ({row['size'] or 'own size'}, {row['blend']}) {mask}" + (
        f": {row['run']}" if several else "")


def cell(row, name):
    """One number as the tables write it."""
    if name == "psnr_known" and row["pre_error"] == 0:
        return "∞"
    text = _written(row[name], COLUMNS[name][1])
    return f"{text} ± {row['is_std']:.2f}" if name == "is_mean" and row[name] is not None else text


def aligned(lines):
    """[[cell, ...], ...], the head first -> Markdown; the first column left, the others right."""
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    rows = [lines[0], rule, *lines[1:]]
    return "\n".join("| " + " | ".join([row[0].ljust(widths[0]),
                                        *(text.rjust(width) for text, width
                                          in zip(row[1:], widths[1:]))]) + " |" for row in rows)


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


# -- DDM's tables ----------------------------------------------------------------------------------

# Model, latent size, K; usage on CelebA-HQ and ImageNet, FID of the reconstructions of each.
# [DDM Tab. 1]
DDM_TABLE_1 = (
    ("VQ-VAE-2", "cascade", "512", "~65 %", "-", "-", "~10"),
    ("DALL-E", "32x32", "8,192", "-", "-", "-", "32.01"),
    ("VQ-GAN", "16x16", "16,384", "-", "5.96 %", "-", "4.98"),
    ("VQ-GAN", "16x16", "1,024", "31.85 %", "33.67 %", "10.18", "7.94"),
    ("ReFiT, P = 100k", "16x16", "1,024", "-", "100 %", "-", "4.98"),
    ("ReFiT, P = 20k", "16x16", "1,024", "97.07 %", "100 %", "5.59", "5.99"),
    ("ReFiT, P = 20k", "16x16", "512", "93.06 %", "100 %", "5.64", "6.95"),
)
ABOUT_TABLE_1 = ("The paper counts usage on \"the test set or training set\", CelebA-HQ's FID "
                 "against training pictures, ImageNet's against held-out ones; ours is against "
                 "held-out ones.")
HOURS_FOR = 50_000       # samples, as in DDM's Figs. 5 and 6


def codebook_table(rows):
    """The columns of DDM's Table 1: one row a codebook, as eval.codebook_row. [DDM Tab. 1]"""
    heads = ["codebook", "latent", "K", "usage, train", "usage, held out", "perplexity, held out",
             "rFID"]
    return aligned([heads, *([
        row["name"], row["latent"], f"{row['K']:,}", _written(row["usage_train"], _percent),
        _written(row["usage_val"], _percent), _written(row["perplexity_val"], "{:,.1f}".format),
        _written(row["rfid"], "{:.2f}".format)] for row in rows)])


def ddm_table_1():
    """The rows that the paper prints."""
    head = ["paper", "latent", "K", "usage, CelebA-HQ", "usage, ImageNet", "rFID, CelebA-HQ",
            "rFID, ImageNet"]
    return f"{aligned([head, *DDM_TABLE_1])}\n\n{ABOUT_TABLE_1}"


def prior_table(prior, K):
    """What a held-out map of codes costs by report.json's "prior", beside what it costs others."""
    cells = round(prior["uniform_nats"] / math.log(K))
    models = {"all codes alike": prior["uniform_nats"],
              "how often each occurs at each cell": prior["histogram_nats"],
              "VQ-DDM, an upper bound": prior["vlb_nats"]}
    return aligned([["model of the codes", "nats a map", "bits a code", "of the histogram's"], *(
        [name, f"{nats:,.1f}", f"{nats / cells / math.log(2):.3f}",
         _percent(nats / prior["histogram_nats"])] for name, nats in models.items())])


def steps_table(steps, batch_size):
    """Time and the prior's own bound by the number of reverse steps. [DDM Fig. 5] [DDM Fig. 6]

    steps: as sample.measure gives them; batch_size: samples that "seconds" is the time for.
    """
    lines = [["steps", f"seconds for {batch_size}", f"hours for {HOURS_FOR:,}", "nats a map"]]
    for row in steps:
        hours = row["seconds"] / batch_size * HOURS_FOR / 3600
        lines.append([f"{row['n']:,}", short(row["seconds"]), short(hours), f"{row['nats']:,.1f}"])
    return aligned(lines)


def _percent(share):
    return f"{100 * share:.1f} %"
