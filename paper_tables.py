"""Write the tables of our measurements, the papers' own figures beside them. [AVQ Tab. 2]

    rows of metrics.py --make_report--> the contents of report.json
    report --table, bucket_table, paper_table--> our tables, and AVQ's with our rows above its own
    codebooks --codebook_table--> DDM's Table 1; prior --prior_table, steps_table--> two more

report.json holds no NaN and no infinity: such a value is null, and `notes` gives the reason.
"""

import math
import shlex
import subprocess
import sys
from pathlib import Path

import torch

# {measure: (head, unit, how a number without standard error is written)}, unit as in the papers.
COLUMNS = {
    "pre_error": ("pre_error/1e-5", 1e-5, lambda v: short(v)),
    "pre_error_median": ("median", 1e-5, lambda v: short(v)),
    "psnr_known": ("PSNR known/dB", 1, "{:.2f}".format),
    "seam": ("seam", 1, "{:.4f}".format),
    "lpips": ("LPIPS", 1, "{:.4f}".format),
    "fid": ("FID", 1, "{:.2f}".format),
    "is_mean": ("IS", 1, "{:.2f}".format),
    "clip_score": ("CLIP score", 1, "{:.2f}".format),
    "images_per_s": ("images/s", 1, lambda v: short(v)),
}

ABOUT_PAPER = "The paper measured other images, whose holes a generator had filled."
ABOUT_SHIFTED = ("The same with the latents of images whose hole has other colours, as a generated "
                 "one has (shifted).\nMeasured against the images themselves:")
ABOUT_SAMPLES = ("The paper's images are Stable Diffusion's for COCO's captions, ours VQ-DDM's of "
                 "other data: compare our decoders with one another only.")
ABOUT_ERROR = ("pre_error: for images in [0,1], in [-1,1], and in dB. The paper states no range: "
               "its rows say what its figure\nis if it is for [0,1], or if it is for [-1,1]. It is "
               "undecided which (PAPERS.md, D17).")
_ERRORS = "pre_error", "pre_error_median", "psnr_known"
_OF_ALL = *_ERRORS[1:], "is_mean", "images_per_s"                # not by the masks' area
_HARD = ("40-50", "fid"), ("40-50", "lpips"), ("all", "fid"), ("all", "lpips")
_INPAINTED = ("all", "fid"), ("all", "lpips"), ("all", "pre_error")
_EXAMPLE = ("all", "clip_score"), ("all", "pre_error")
_SAMPLED = ("all", "fid"), ("all", "is_mean")
_MODULES = "files", "vanilla", "asym", "asym-nomask"

# {number: (title, (bucket, measure) of each column, our decoders to show, {row: its figures})}, all
# rows and figures as the paper prints them, Pre_error in 1e-5. "*": reproduced by AVQ's authors.
PAPER_TABLES = {
    # [AVQ Tab. 1] [AVQ Tab. 2] [AVQ Tab. 3]
    "1": ("inpainting on Places, 30k of 512 px, LaMa's protocol", _HARD, _MODULES[:3], {
        "LaMa": "12.0 0.24 2.21 0.14", "CoModGAN": "10.4 0.26 1.82 0.15",
        "RegionWise": "21.3 0.27 4.75 0.15", "DeepFill v2": "22.1 0.28 5.20 0.16",
        "EdgeConnect": "30.5 0.28 8.37 0.16", "StableDiffusion*": "8.26 0.324 2.27 0.245",
        "Ours": "6.80 0.244 1.03 0.141"}),
    "2": ("the modules, inpainting on ImageNet", _INPAINTED, _MODULES, {
        "StableDiffusion": "9.57 0.255 1082.8",
        "Ours (base) w/ mask": "7.604 0.137 5.7", "Ours (base) w/o mask": "9.48 0.248 1078.6",
        "Ours (large) w/ mask": "7.55 0.136 2.6", "Ours (large) w/o mask": "9.17 0.243 1047.7"}),
    "3": ("ways of blending, inpainting on ImageNet", _INPAINTED, ("asym",), {
        "Ours (base) add.": "7.60 0.137 5.7", "Ours (base) concat.": "7.64 0.138 5.3",
        "Ours (large) add.": "7.55 0.136 2.6", "Ours (large) concat.": "7.56 0.137 4.4"}),
    # [AVQ Sec. 4.2] [AVQ Tab. 4] [AVQ Tab. 5]
    "4": ("paint by example, COCOEE", _EXAMPLE, _MODULES[:3], {
        "Blended Diffusion": "80.65 -", "DCCF": "82.18 -", "StableDiffusion": "75.33 -",
        "Paint-by-Example": "84.97 -", "Paint-by-Example*": "85.67 588.86", "Ours": "86.35 0.76"}),
    "5": ("the modules, paint by example on COCOEE", _EXAMPLE, _MODULES, {
        "Paint-by-Example*": "85.67 588.86",
        "Ours (base)": "86.24 1.37", "Ours (base) w/o mask": "86.15 478.47",
        "Ours (large)": "86.35 0.76", "Ours (large) w/o mask": "86.32 451.67"}),
    # [AVQ Tab. 6] [AVQ Tab. 9] [AVQ Tab. 10]
    "6": ("the modules without a mask, text-to-image on MSCOCO", _SAMPLED, ("files",), {
        "StableDiffusion": "19.88 37.55", "Ours (base) w/o mask": "19.92 37.52",
        "Ours (large) w/o mask": "19.75 37.64"}),
    "9": ("larger decoders, inpainting", _INPAINTED, ("asym",), {
        "Base decoder": "7.60 0.137 5.7", "Large1 decoder": "7.55 0.136 2.6",
        "Large x2 decoder": "7.49 0.134 2.1"}),
    "10": ("larger decoders without a mask, text-to-image", _SAMPLED, ("files",), {
        "Base decoder w/o mask": "19.92 37.52", "Large decoder w/o mask": "19.75 37.64",
        "Large x2 decoder w/o mask": "19.68 37.74"}),
}

# What report.json's columns mean, and why they may be null.
NOTES = {
    "<measure>_se": "standard error of the mean over images, clustered by equal masks",
    "differences": "decoder minus other on the same images, image by image",
    "pre_error": "mean squared error of known pixels, images in [0,1]; 4 times as large in [-1,1]",
    "psnr_known": "dB, mean over images; null where infinite, because the pixels are exact copies",
    "seam": "mean absolute error of the step across the mask's border, [0,1]; 0 for the original",
    "clip_score": "100 x cosine of the edited region's bounding box and the reference, by --clip",
    "fid": "over all images and the bin 40-50, as in Table 1; null below 2,048 images: mostly bias",
    "is_mean": "over all images in torch-fidelity's random order, in 10 splits, or n if fewer",
    "is_std": "population standard deviation over the splits",
    "images_per_s": "decoding alone, all images, for each process; paste is timed as vanilla",
    "codebook": "not computed: the images are not of a run's data set",
    "prior": "not computed: no run here has a prior",
}


def make_report(device, notes, **fields):
    """Collect report.json: the caller's fields, notes {column: reason}, and what made them."""
    name = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True,
                                check=False).stdout.strip()
    except OSError:                      # no git
        commit = ""
    return {"version": 2, "command": shlex.join(["python", *sys.argv]), "commit": commit or None,
            "device": name, "range": "[0,1]", "notes": NOTES | notes, **fields}


def table(report, protocol="full"):
    """Write the rows over all masks of one protocol, in two tables, as one would be too wide."""
    rows = [row for row in _distinct(report, protocol) if row["bucket"] == "all"]
    rows.sort(key=lambda row: row["decoder"] == "paste")                        # paste comes last
    errors, others = {}, {}                                             # {head: texts of a column}
    for name in _shown(report):
        columns = errors if name in _ERRORS else others
        columns[COLUMNS[name][0]] = [cell(row, name) for row in rows]
        if name == "pre_error_median":
            columns["in [-1,1]"] = [cell(row, "pre_error", factor=4) for row in rows]
            if rows[0]["decoder"] == "vanilla":
                means = [row["pre_error"] for row in rows]
                columns["gain"] = [f"{short(means[0] / one)}x" if one else "∞" for one in means]
    names = [row_name(report, row) for row in rows]
    return "\n\n".join(markdown(["decoder", *part], [*zip(names, *part.values())])
                       for part in (errors, others) if part)


def bucket_table(report):
    """Write a row for each decoder and bucket of the masks' area; "" without buckets."""
    names = [name for name in _shown(report) if name not in _OF_ALL]
    rows = [[row_name(report, row), row["bucket"], f"{row['n']:,}", *(cell(row, k) for k in names)]
            for row in _distinct(report) if row["bucket"] != "all"]
    heads = ["decoder", "area, %", "n", *(COLUMNS[name][0] for name in names)]
    return markdown(heads, rows) if rows else ""


def difference_table(report):
    """Write a row for each pair of decoders on the same images; "" without pairs."""
    pairs = report["differences"]
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in pairs)]
    ours = {(row["run"], row["decoder"]): row_name(report, row) for row in report["rows"]}
    rows = [[ours[row["run"], row["decoder"]],
             ours.get((row["other_run"], row["other"]), row["other"]), row["protocol"],
             f"{row['n']:,}", *(cell(row, k, sign="+") for k in names)] for row in pairs]
    heads = ["decoder", "minus", "latents", "n", *(COLUMNS[name][0] for name in names)]
    return markdown(heads, rows) if rows else ""


def paper_table(report, number):
    """Write table `number` of the paper: its columns, our rows, and its rows below them."""
    (title, columns, decoders, figures), rows = PAPER_TABLES[number], []
    errors = ("all", "pre_error") in columns             # the last one, written in three ways
    found = {(row["run"], row["decoder"], row["bucket"]): row for row in _distinct(report)}
    for (run, decoder, bucket), row in found.items():
        if bucket == "all" and decoder in decoders:
            cells = [cell(found.get((run, decoder, place)), name) for place, name in columns]
            if errors:
                cells += [cell(row, "pre_error", 4), decibels(row["pre_error"])]
            rows.append([row_name(report, row), f"{row['n']:,}", *cells])
    for method, values in figures.items():
        *cells, last = values.split()
        rows.append([f"paper: {method}", "", *cells, *(readings(last) if errors else [last])])
    heads = [(f"{bucket} %: " if bucket != "all" else "") + COLUMNS[name][0]
             for bucket, name in columns] + (["in [-1,1]", "dB"] if errors else [])
    about = [ABOUT_SAMPLES if columns == _SAMPLED else ABOUT_PAPER]
    if errors:
        about.append(ABOUT_ERROR)
    if columns == _EXAMPLE:
        about.append("The paper prints Pre_error here without e-5, taken as meant.")
    if any("*" in method for method in figures):
        about.append("*: reproduced by AVQ's authors.")
    return "\n\n".join([f"Table {number}: {title}", markdown(["method", "n", *heads], rows),
                        "\n".join(about)])


def report_text(report, about, number=None):
    """Write what was measured (`about`), the tables, AVQ's `number`, and why columns are empty."""
    masks, net = report["masks"], report["rows"][0]["lpips_net"]
    if masks["size"]:
        about = (f"{report['n']:,} of {about}, {masks['size']} px; {masks['kind']} masks of at "
                 f"most half the image, seed {masks['seed']}")
    lines = [f"{about}; {report['device']}.", "", table(report), ""]
    if any(row["protocol"] == "shifted" for row in report["rows"]):
        lines += [ABOUT_SHIFTED, "", table(report, "shifted"), ""]
    # Explain the columns, below the table.
    if masks["kind"]:
        if report["rows"][0]["decoder"] == "vanilla":
            lines.append("gain: vanilla's pre_error divided by the row's.")
        lines += [f"pre_error: {NOTES['pre_error']}.", f"seam: {NOTES['seam']}."]
    if net:
        lines.append(f"LPIPS: by {net}, over the whole image.")
    lines += [f"±: {NOTES['<measure>_se']}; of IS: deviation over the splits.", ""]
    if pairs := difference_table(report):
        lines += ["Differences on the same images, image by image:", "", pairs, ""]
    # Add the paper's table and the one by mask area.
    if number in PAPER_TABLES:
        lines += [paper_table(report, number), ""]
    if buckets := bucket_table(report):
        lines += ["By the share of the image that is to be generated:", "", buckets, ""]
    # Say why columns are empty, in one line for all that lack the same file.
    empty = {}
    for name, (head, *_) in COLUMNS.items():
        if (why := report["notes"].get(name, "")).startswith(("n/a: ", "not computed: ")):
            empty.setdefault(why, []).append(head)
    lines += [f"{', '.join(heads)}: {why}" for why, heads in empty.items()]
    return "\n".join([*lines, report["notes"].get("run", "")]).rstrip()


def row_name(report, row):
    """Name a row, with the run where there are several."""
    names = {"files": row["run"], "vanilla": "vanilla (first stage's own)",
             "paste": "vanilla, known pixels pasted"}
    if row["decoder"] in names:
        return names[row["decoder"]]
    mask = "w/ mask" if row["decoder"] == "asym" else "w/o mask"
    run = f": {row['run']}" if len({other["run"] for other in report["rows"]}) > 1 else ""
    return f"ours ({row['size'] or 'own size'}, {row['blend']}) {mask}{run}"


def cell(row, name, factor=1, sign=""):
    """Write a mean of a row, times `factor`, and its error; FID with its number of images."""
    _, unit, how = COLUMNS[name]
    if not row or row[name] is None:
        return "∞" if name == "psnr_known" and row["pre_error"] == 0 else "n/a"
    value, error = row[name], row["is_std"] if name == "is_mean" else row.get(f"{name}_se")
    text = with_error(factor * value / unit, error and factor * error / unit, how, sign)
    return f"{text} (n={row['n']:,})" if name == "fid" else text


def with_error(value, error, how="{:,.1f}".format, sign=""):
    """Write "value ± error" with two digits of the error; without error how(value)."""
    if not error:
        return how(value)
    digits = 1 - math.floor(math.log10(float(f"{error:.1e}")))
    value, error = (round(number, digits) + 0.0 for number in (value, error))
    return f"{value:{sign},.{max(0, digits)}f} ± {error:,.{max(0, digits)}f}"


def decibels(error):
    return "n/a" if error is None else f"{-10 * math.log10(error):.1f}" if error else "∞"


def readings(value):
    """Write a Pre_error of the paper in [0,1], in [-1,1], in dB, by either unit.  deviation D17"""
    if value == "-":
        return 3 * [value]
    error = float(value)
    return [f"{value} or {error / 4:.4g}", f"{4 * error:.4g} or {value}",
            f"{decibels(1e-5 * error)} or {decibels(1e-5 * error / 4)}"]


def markdown(head, rows):
    """Align a head and rows of texts as a Markdown table: the first column left, others right."""
    widths = [max(3, *map(len, column)) for column in zip(head, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
             for row in ([*head], rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short(value):
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:#.4g}" if size >= 1 else f"{value:.3g}"


def _distinct(report, protocol="full"):
    """List the report's rows of a protocol, those that runs share only once."""
    rows = [row for row in report["rows"] if row["protocol"] == protocol]
    return [row for row in rows
            if row["decoder"] not in ("vanilla", "paste") or row["run"] == rows[0]["run"]]


def _shown(report):
    """List the columns that have a number, or should have had one."""
    return [name for name in COLUMNS if report["notes"].get(name, "").startswith("n/a: ")
            or any(row[name] is not None for row in report["rows"])]


# {--table: DDM's own table, and what to know}
DDM_TABLES = {
    # [DDM Tab. 1]
    "ddm1": markdown(
        ("paper", "latent", "K", "usage, CelebA-HQ", "usage, ImageNet", "rFID, CelebA-HQ",
         "rFID, ImageNet"),
        (("VQ-VAE-2", "Cascade", "512", "~65%", "-", "-", "~10"),
         ("DALL-E", "32x32", "8192", "-", "-", "-", "32.01"),
         ("VQ-GAN", "16x16", "16384", "-", "5.96%", "-", "4.98"),
         ("VQ-GAN", "16x16", "1024", "31.85%", "33.67%", "10.18", "7.94"),
         ("ours (P = 100k)", "16x16", "1024", "-", "100%", "-", "4.98"),
         ("ours (P = 20k)", "16x16", "1024", "97.07%", "100%", "5.59", "5.99"),
         ("ours (P = 20k)", "16x16", "512", "93.06%", "100%", "5.64", "6.95")))
    + "\n\nThe paper counts usage on \"the test set or training set\". Its rFID is against training"
      " images of CelebA-HQ, validation images of ImageNet; ours against held-out ones.",
    # [DDM Tab. 2]
    "ddm2": markdown(
        ("paper", "FID", "Params", "FLOPs"),
        (("GLOW", "60.9", "220 M", "540 G"), ("NVAE", "40.3", "1.26 G", "185 G"),
         ("ours (K = 1024 w/o ReFiT)", "22.6", "117 M", "1.06 G"),
         ("VAEBM", "20.4", "127 M", "8.22 G"),
         ("ours (K = 512 w/ ReFiT)", "18.8", "117 M", "1.04 G"), ("DC-VAE", "15.8", "-", "-"),
         ("ours (K = 1024 w/ ReFiT)", "13.2", "117 M", "1.06 G"),
         ("DDIM(T=100)", "10.9", "114 M", "124 G"),
         ("VQ-GAN + Transformer", "10.2", "802 M", "102 G"), ("PG-GAN", "8.0", "46.1 M", "14.1 G")))
    + "\n\nThe paper's FID is of CelebA-HQ at 256 px. convert.py RUN --layers counts a run's prior;"
      " VQ-DDM's FLOPs fit the multiplications of one of its T reverse steps (PAPERS.md, D37).",
}
HOURS_FOR = 50_000       # samples, for which DDM's Figs. 5 and 6 give hours


def codebook_table(rows):
    """Write one row for each codebook of eval.evaluate, as DDM's Table 1 does. [DDM Tab. 1]"""
    columns = {"name": ("codebook", "{}"), "latent": ("latent", "{}"), "K": ("K", "{:,}"),
               "usage_train": ("usage, train", "{:.1%}"),
               "usage_val": ("usage, held out", "{:.1%}"),
               "perplexity_val": ("perplexity, held out", "{:,.1f}"), "rfid": ("rFID", "{:.2f}")}
    return markdown([head for head, _ in columns.values()], [
        ["n/a" if row[name] is None else how.format(row[name])
         for name, (_, how) in columns.items()] for row in rows])


def prior_table(prior, K):
    """Compare -log p of a map of K codes under the models that sample.measure_bound measured."""
    cells = round(prior["uniform_nats"] / math.log(K))
    names = {"uniform": "uniform", "unigram": "frequency of each code",
             "histogram": "frequency at each cell, shrunk towards it",
             "vlb": "VQ-DDM, an upper bound", "train_vlb": "the same, of training's maps"}
    found = {key: prior[f"{key}_nats"] for key in names if f"{key}_nats" in prior}
    best = min(found[key] for key in ("uniform", "unigram", "histogram") if key in found)
    return markdown(["model of the codes", "nats per map", "bits per code", "of best baseline"], [
        [names[key], with_error(nats, prior.get(f"{key}_se")), f"{nats / cells / math.log(2):.3f}",
         f"{nats / best:.1%}"] for key, nats in found.items()])


def steps_table(steps, batch_size):
    """Write the rows of sample.measure_steps, one per number of steps. [DDM Fig. 5] [DDM Fig. 6]"""
    heads = ["steps", "samples", f"seconds for {batch_size}", f"hours for {HOURS_FOR:,}",
             "nats per map", f"more than in {max(row['n'] for row in steps):,}"]
    hours, shown = HOURS_FOR / batch_size / 3600, 5 + (len(steps) > 1)
    return markdown(heads[:shown], [[
        f"{row['n']:,}", f"{row['maps']:,}", short(row["seconds"]), short(row["seconds"] * hours),
        *(with_error(row[name], row[f"{name}_se"]) for name in ("nats", "more"))][:shown]
        for row in steps])
