"""report.json as tables to read: all columns, the bins of mask area, and the papers' own tables.

    report --table--> one row a decoder --bucket_table--> one row a decoder and bin
           --paper_table(report, "2")--> columns and rows as the paper prints them, its own below

Everything is Markdown with aligned columns, which reads as well in a terminal. [AVQ Tab. 2]
"""

from dataclasses import dataclass

from report import SHARED

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


@dataclass(frozen=True)
class PaperTable:
    """What a table of the paper has: its columns, its rows, and the figures it prints."""

    title:    str
    cells:    tuple      # (bucket, measure) of each column
    decoders: tuple      # the rows of report.json that belong into it
    paper:    dict       # {method: figures}, as printed


_ALL_FID, _ALL_LPIPS, _ALL_ERROR = ("all", "fid"), ("all", "lpips"), ("all", "pre_error")
_CLIP = ("all", "clip_score")
_OURS = ("asym", "asym-nomask")

PAPER_TABLES = {
    # [AVQ Tab. 1]
    "1": PaperTable("inpainting on Places, 30k of 512 px, LaMa's protocol",
                    (("40-50", "fid"), ("40-50", "lpips"), _ALL_FID, _ALL_LPIPS),
                    ("files", "vanilla", "asym"),
                    {"LaMa": (12.0, 0.24, 2.21, 0.14), "CoModGAN": (10.4, 0.26, 1.82, 0.15),
                     "StableDiffusion": (8.26, 0.324, 2.27, 0.245),
                     "ours": (6.80, 0.244, 1.03, 0.141)}),
    # [AVQ Tab. 2]
    "2": PaperTable("the modules, inpainting on ImageNet", (_ALL_FID, _ALL_LPIPS, _ALL_ERROR),
                    ("files", "vanilla", *_OURS),
                    {"StableDiffusion": (9.57, 0.255, 1082.8e-5),
                     "base w/ mask": (7.604, 0.137, 5.7e-5),
                     "base w/o mask": (9.48, 0.248, 1078.6e-5),
                     "large w/ mask": (7.55, 0.136, 2.6e-5),
                     "large w/o mask": (9.17, 0.243, 1047.7e-5)}),
    # [AVQ Tab. 3]
    "3": PaperTable("ways of blending, ImageNet", (_ALL_FID, _ALL_LPIPS, _ALL_ERROR), ("asym",),
                    {"base add": (7.60, 0.137, 5.7e-5), "base concat": (7.64, 0.138, 5.3e-5),
                     "large add": (7.55, 0.136, 2.6e-5), "large concat": (7.56, 0.137, 4.4e-5)}),
    # [AVQ Tab. 4]
    "4": PaperTable("paint by example, COCOEE", (_CLIP, _ALL_ERROR), ("files", "vanilla", "asym"),
                    {"Paint-by-Example": (85.67, 588.86e-5), "ours": (86.35, 0.76e-5)}),
    # [AVQ Tab. 5]
    "5": PaperTable("the modules, paint by example on COCOEE", (_CLIP, _ALL_ERROR),
                    ("files", "vanilla", *_OURS),
                    {"Paint-by-Example": (85.67, 588.86e-5), "base": (86.24, 1.37e-5),
                     "base w/o mask": (86.15, 478.47e-5), "large": (86.35, 0.76e-5),
                     "large w/o mask": (86.32, 451.67e-5)}),
    # [AVQ Tab. 9]
    "9": PaperTable("larger decoders, ImageNet", (_ALL_FID, _ALL_LPIPS, _ALL_ERROR), ("asym",),
                    {"base": (7.60, 0.137, 5.7e-5), "large": (7.55, 0.136, 2.6e-5),
                     "large2": (7.49, 0.134, 2.1e-5)}),
}
ABOUT_PAPER = ("The paper's own figures are of other pictures and of inpainted holes; it states no "
               "range for Pre_error, and Tables 4 and 5 print it without e-5, taken here as meant.")


# -- all columns -----------------------------------------------------------------------------------


def table(report):
    """The rows over all masks, all columns that were asked for; what runs share stands once."""
    rows = [row for row in report["rows"] if row["bucket"] == "all"]
    pasted = [row for row in rows if row["decoder"] == "paste"][-1:]
    several = len({row["run"] for row in rows}) > 1
    names, vanilla = shown_measures(report), rows[0] if rows[0]["decoder"] == "vanilla" else None
    timed = any(row["images_per_s"] is not None for row in rows)
    lines = [["decoder"]]
    for name in names:
        lines[0].append(COLUMNS[name][0])
        if name == "pre_error":
            lines[0] += ["in [-1,1]", *["gain"] * (vanilla is not None)]
    lines[0] += ["images/s"] * timed
    for row in rows:
        if row["decoder"] in SHARED and row is not vanilla and row not in pasted:
            continue
        lines.append([row_name(row, several)])
        for name in names:
            lines[-1].append(cell(row, name))
            if name == "pre_error":
                lines[-1] += _range_and_gain(row, vanilla)
        lines[-1] += [_speed(row["images_per_s"])] * timed
    return aligned(lines)


def shown_measures(report):
    """The columns with a value somewhere, or without one though asked for ("n/a: ...")."""
    rows, notes = report["rows"], report["notes"]
    return [name for name in COLUMNS
            if any(row[name] is not None for row in rows) or notes.get(name, "").startswith("n/a")]


def cell(row, name):
    """One number as the tables write it."""
    value = row[name]
    if value is None:
        return "∞" if name == "psnr_known" and row["pre_error"] == 0 else "n/a"
    text = COLUMNS[name][1](value)
    return f"{text} ± {row['is_std']:.2f}" if name == "is_mean" else text


def _range_and_gain(row, vanilla):
    """pre_error for images in [-1,1]; and, where vanilla is there, how much larger its own is."""
    error = row["pre_error"]
    cells = ["n/a" if error is None else short(4e5 * error)]
    if vanilla is not None:
        known = None not in (error, vanilla["pre_error"])
        cells.append("n/a" if not known else "∞" if error == 0
                     else f"{short(vanilla['pre_error'] / error)}x")
    return cells


def row_name(row, several=False):
    """What the tables call a row; with the run where there are several."""
    if row["decoder"] == "files":
        return row["run"]
    if row["decoder"] in SHARED:
        return {"vanilla": "first stage's own decoder (vanilla)",
                "paste": "vanilla, known pixels pasted (paste)"}[row["decoder"]]
    mask = "w/ mask" if row["decoder"] == "asym" else "w/o mask"
    size = row["size"] or "own size"
    return f"ours ({size}, {row['blend']}) {mask}" + (f": {row['run']}" if several else "")


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


def _speed(value):
    return "n/a" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


# -- by area, and as the paper ---------------------------------------------------------------------


def bucket_table(report):
    """One row for each decoder and bin of the masks' area; "" where there are no bins."""
    rows = [row for row in report["rows"] if row["bucket"] != "all"]
    names = [name for name in shown_measures(report) if name != "is_mean"]
    several = len({row["run"] for row in rows}) > 1
    lines, seen = [["decoder", "area, %", "n", *(COLUMNS[name][0] for name in names)]], set()
    for row in rows:
        place = (row_name(row, several), row["bucket"])
        if place not in seen:                    # what runs share stands once
            lines.append([*place, f"{row['n']:,}", *(cell(row, name) for name in names)])
        seen.add(place)
    return aligned(lines) if rows else ""


def paper_table(report, number):
    """Table `number` of the paper: its columns, our rows, its rows below."""
    paper = PAPER_TABLES[number]
    chosen = {(row["run"], row["decoder"], row["bucket"]): row for row in report["rows"]
              if row["decoder"] in paper.decoders}
    several = len({run for run, _, _ in chosen}) > 1
    heads = [(f"{bucket} %: " if bucket != "all" else "") + COLUMNS[name][0]
             for bucket, name in paper.cells]
    lines, seen = [["method", "n", *heads]], set()
    for (run, decoder, bucket), row in chosen.items():
        name = row_name(row, several)
        if bucket == "all" and name not in seen:
            seen.add(name)
            cells = [chosen.get((run, decoder, place)) for place, _ in paper.cells]
            lines.append([name, f"{row['n']:,}", *("n/a" if own is None else cell(own, measure)
                          for own, (_, measure) in zip(cells, paper.cells))])
    for method, figures in paper.paper.items():
        lines.append([f"paper: {method}", "", *(COLUMNS[name][1](value) for value, (_, name)
                                                in zip(figures, paper.cells))])
    return f"Table {number}: {paper.title}\n\n{aligned(lines)}\n\n{ABOUT_PAPER}"


# -- the whole text --------------------------------------------------------------------------------


def report_text(report, about, number=None):
    """Everything a reader needs: which pictures, which units, the tables, why a column is empty.

    about: the pictures, a line, with their masks where these were given; number: of a table of
    the paper, or None.
    """
    masks, row, notes = report["masks"], report["rows"][0], report["notes"]
    drawn = (f"{report['n']:,} of {about}, {masks['size']} px; {masks['kind']} masks of at most "
             f"half the picture, seed {masks['seed']}")
    lines = [f"{drawn if masks['size'] else about}; {report['device']}.",
             "pre_error: mean squared error of known pixels for images in [0,1], in units of 1e-5 "
             "as the paper prints it; 4 times that in [-1,1]; gain: vanilla's over the row's.",
             "PSNR in dB on known pixels; seam in [0,1]"
             + (f"; LPIPS by {row['lpips_net']}" if row["lpips_net"] else "") + ".",
             "", table(report)]
    if number:
        lines += ["", paper_table(report, number)]
    if bins := bucket_table(report):
        lines += ["", "By the share of the picture that is to be generated:", "", bins]
    empty = {}                                   # one line for columns that lack the same file
    for name, reason in notes.items():
        if reason.startswith(("n/a", "not computed")) and name in COLUMNS:
            empty.setdefault(reason, []).append(COLUMNS[name][0])
    lines += [""] * bool(empty) + [f"{', '.join(heads)}: {why}" for why, heads in empty.items()]
    own = [notes[key] for key in ("run", "n") if key in notes]
    return "\n".join(lines + [""] * bool(own) + own)
