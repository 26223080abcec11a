"""The papers' tables, on trained runs or on pictures made by anything.

    python eval.py RUN [RUN ...]                   what each decoder does to known pixels
    python eval.py RUN --table ddm1                which codes are in use, before and after ReFiT
    python eval.py --pred DIR --real DIR ...       pictures of Stable Diffusion, of anything
    python eval.py --pred DIR --data signs --unpaired --table 6     samples that sample.py wrote

    images --encode--> z --metrics.decode_all--> x_hat --metrics.measure--> a row for each image
    the table of images --metrics.report_rows--> means, FID --paper_tables.py--> Markdown, JSON

Writes report.md, report.json and, of runs, report.png: the first images by each decoder. Of a run
with a prior its samples and completions are shown as well. [AVQ Tab. 2] [AVQ Tab. 3]
"""

import argparse
import csv
import json
import math
from pathlib import Path

import torch

import metrics
import paper_tables as tables
import run_folder
import sample
from asym_decoder import AsymVQGAN
from convert import chosen_steps, load, load_first_stage, load_prior
from data import Signs, held_out, open_dataset
from distributed import (
    UserError,
    exact_float32,
    exit_on_user_error,
    gather_objects,
    on_rank0,
    print0,
    rank,
    setup,
    world_size,
)
from image_pairs import MatchedFolders, PictureFolder
from inpaint import COMPLETIONS, RESAMPLE, completion_rows, inpainting_columns
from losses import TRUNKS
from pictures import image_grid, image_rows, show_masked
from quantize import code_statistics

EXAMPLES, SAMPLES, STEPS = 6, 16, 25             # of the report's pictures
WORKERS = 2                                      # that decode where a whole split is counted
CAPTIONS = {"asym": "ours, with mask", "asym-nomask": "ours, without"}
CODEBOOK = ("K", "usage_train", "usage_val", "perplexity_val", "rfid")


# -- on runs ---------------------------------------------------------------------------------------


def evaluate_runs(paths, *, device="cpu", n=None, data=None, root=None, size=None, pairs=None,
                  batch_size=None, lpips=None, weights=None, fid=True, clip=None, table=None,
                  per_image=None, out=None):
    """Evaluate, print the tables, write the report and its pictures; returns what report.json has.

    paths: run folders, stage files or public checkpoints on one first stage. n, data, root, size:
    which held-out images; None stands for the run's own. pairs: a MatchedFolders of photos and
    masks to be used instead. The rest: as the flags. Raises UserError.
    """
    device, paths = torch.device(device), [Path(path) for path in paths]
    runs = open_runs(paths, device)
    models = {name: run.model for name, run in runs.items()}
    config = next((run.config for run in runs.values() if "data" in run.config), {})
    networks = metrics.open_networks(device, weights or config.get("weights"),
                             lpips or config.get("perceptual", "vgg"), lpips is not None, fid, clip,
                             refs=bool(pairs and pairs.refs))
    first_stage = metrics.first_stage_of(models.values())
    vq = first_stage.config.latent == "vq"
    if table == "ddm1" and not vq:
        raise UserError("--table ddm1: a KL latent has no codes to count; give a run with a VQ "
                        "first stage")

    # Choose the images.
    dataset, asked = None, n
    if pairs:
        batch_size, n, about = batch_size or 4, len(pairs), pairs.describe()
        masks = {"kind": "files" if pairs.masks else None, "size": None, "seed": None}
    else:
        where = data or config.get("data", "imagenet"), root or config.get("root")
        size = size or config.get("size", 256)
        dataset = open_dataset(*where, "val", size)
        batch_size = batch_size or max(1, min(16, 2**18 // size**2))
        n = min(n or (500 if isinstance(dataset, Signs) else 1000), len(dataset))
        about, masks = dataset.describe(), {"kind": "thick", "size": size, "seed": 0}

    def batches(n, *ranks):
        return (pairs.batches(batch_size, device) if pairs
                else held_out(dataset, n, batch_size, device, *ranks))

    home = paths[0] if paths[0].is_dir() else paths[0].parent
    out = run_folder.make_folder(Path(out or (home if len(paths) == 1 else home / "compare")))
    print0(f"evaluating {', '.join(runs)} on {n:,} of {about}; the report goes to {out}")

    # Decode the same latents by every decoder, and measure: a row for each image and decoder.
    rows = []
    counts = torch.zeros(first_stage.config.K if vq else 0, dtype=torch.int64)
    with exact_float32(), torch.inference_mode():
        for number, batch in enumerate(_with_progress(batches(n, rank(), world_size()), n)):
            z, indices = _latents(first_stage, batch.x)                 # (B, d, h, w), (B, h, w)
            if vq:
                counts += indices.flatten().cpu().bincount(minlength=len(counts))
            if number == 0:        # warm-up: the first call would be timed with its allocations
                metrics.decode_all(models, z, batch.x, batch.mask)
            rows += metrics.measure(batch.x, batch, networks, None, metrics.REAL)
            outputs = metrics.decode_all(models, z, batch.x, batch.mask)
            for (run, decoder), (x_hat, seconds) in outputs.items():
                rows += metrics.measure(x_hat, batch, networks, run, decoder, seconds)
        rows, counts = metrics.over_ranks(rows), sum(gather_objects(counts))
        sizes = {name: run.config.get("decoder") for name, run in runs.items()}
        means = on_rank0(lambda: metrics.report_rows(rows, sizes, networks.lpips_net))

        # Of the codes: which are in use, and what their prior makes.
        codebooks, notes, prior, pictures = [], networks.reasons(), None, {}
        if vq and table == "ddm1":
            splits = [dataset, open_dataset(*where, "train", size)]
            codebooks = count_codebooks(home, first_stage, splits, asked, batch_size,
                                        networks.inception)
            notes["codebook"] = "; ".join(f"{name}: {min(asked or len(split), len(split)):,} images"
                                          for name, split in zip(("held out", "train"), splits))
        elif vq and dataset:
            rfid = [row["fid"] for row in means
                    if (row["decoder"], row["bucket"]) == ("vanilla", "all")]
            codebooks = refit_codebooks(home, first_stage, size)
            codebooks.append(codebook_row("in use", first_stage, size, code_statistics(counts),
                                          None, *rfid[:1]))
            notes["codebook"] = f"held out: {n:,} images; train: not counted, --table ddm1 does"
        elif not vq:
            notes["codebook"] = "not computed: a KL latent has no codes"
        folder = next((path for path in paths if (path / "prior").is_dir()), None)
        if dataset and folder:
            prior, notes["prior"], pictures = on_rank0(lambda: draw(folder, dataset, device, out))
        unfinished = [f"{name} (step {run.step})" for name, run in runs.items() if not run.finished]
        if unfinished:
            notes["run"] = f"training is not finished: {', '.join(unfinished)}"

        # Show the first images by each decoder.
        columns = {}
        for batch in batches(EXAMPLES) if rank() == 0 else ():
            z, _ = _latents(first_stage, batch.x)
            _add_examples(columns, batch, metrics.decode_all(models, z, batch.x, batch.mask))
            if len(columns["original"]) >= EXAMPLES:
                break

    # Tell it.
    codebook = {key: codebooks[-1][key] for key in CODEBOOK} if codebooks else None
    report = tables.make_report(means, n, device, masks, config.get("seed"), notes, codebook,
                                prior)
    if rank() == 0:
        texts = [tables.report_text(report, about, networks.missing, networks.off,
                             None if table == "ddm1" else table)]
        if codebooks:
            texts += [f"Codes in use ({notes['codebook']}):", tables.codebook_table(codebooks)]
        if table == "ddm1":
            texts.append(tables.ddm_table_1())
        if prior and prior["uniform_nats"]:
            texts += ["What a held-out map of them costs, as training measured it last:",
                      tables.prior_table(prior, first_stage.config.K)]
        if prior:
            texts += ["Drawing such maps:", tables.steps_table(prior["steps"], SAMPLES)]
        elif "prior" in notes:
            texts.append(f"prior: {notes['prior']}")
        image_grid({caption: images[:EXAMPLES] for caption, images in columns.items()},
                   out / "report.png")
        pictures = {"report.png": "the first images by each decoder"} | pictures
        write_report(out, report, "\n\n".join(texts), rows, per_image, pictures)
    return report


def open_runs(paths, device):
    """{name: convert.Loaded} of each path. UserError where they cannot stand in one table."""
    runs = {}
    for path in paths:
        if str(path) in runs:
            raise UserError(f"{path} is given twice")
        runs[str(path)] = load(path, device)
    (first, one), *others = runs.items()
    for name, run in others:
        if run.latents != one.latents:
            raise UserError(f"{name} and {first} stand on different first-stage weights; evaluate "
                            f"them one by one, or train one on the other's: --vqgan {first}")
        for key in ("data", "size"):
            ours, theirs = run.config.get(key), one.config.get(key)
            if None not in (ours, theirs) and ours != theirs:
                raise UserError(f"--{key} of {name} is {ours}, of {first} {theirs}; evaluate them "
                                "one by one")
    return runs


def _latents(first_stage, x):
    """z (B,d,h,w) of x (B,3,H,W), and its indices (B,h,w), None of a KL latent."""
    f, (H, W) = first_stage.config.f, x.shape[2:]
    if H % f or W % f:
        raise UserError(f"an image of {W} x {H} px: both sides must be multiples of {f} for this "
                        "first stage; crop or resize originals and masks alike")
    if first_stage.config.latent == "kl":
        return first_stage.encode(x), None
    z, indices, _ = first_stage.quantize(first_stage.moments(x))
    return z, indices


def _add_examples(columns, batch, outputs):
    """Append a batch to the columns of report.png, unless its images have another size."""
    shown = {"original": batch.x}
    if columns and columns["original"][0].shape != batch.x.shape[1:]:
        return
    if batch.mask is not None:
        shown["masked"] = show_masked(batch.x, batch.mask)
    several = len({run for run, _ in outputs if run}) > 1
    for (run, decoder), (x_hat, _) in outputs.items():
        if decoder != "paste":
            name = f"\n{run}" if several and run else ""
            shown[CAPTIONS.get(decoder, decoder) + name] = x_hat
    for caption, images in shown.items():
        columns.setdefault(caption, []).extend(images.cpu())


# -- the codes and their prior ---------------------------------------------------------------------


def codebook_row(name, first_stage, size, val, train=None, rfid=None):
    """A row of tables.codebook_table; val, train: quantize.code_statistics of each split."""
    side = size // first_stage.config.f
    return {"name": name, "latent": f"{side}x{side}", "K": val["K"],
            "usage_train": train and train["usage"], "usage_val": val["usage"],
            "perplexity_val": val["perplexity"], "rfid": rfid}


def refit_codebooks(home, first_stage, size):
    """Rows of what ReFiT counted of all held-out images when it began, before and after; or []."""
    state = run_folder.latest(home / "refit") or {"extra": {}}
    return [codebook_row(f"{name} ReFiT", first_stage, size, facts)
            for name, facts in state["extra"].get("val", {}).items()]


def count_codebooks(home, first_stage, splits, n, batch_size, inception):
    """DDM's Table 1 of a run: its codes counted in both splits, before and after. [DDM Tab. 1]

    splits: the held-out images and those of training; n: the first of each, None for all;
    inception: for the FID of what the codes of the held-out images decode to, or None.
    """
    device = first_stage.quantize.embedding.weight.device
    stages = {"the first stage's": first_stage}
    if (home / "refit").is_dir() and (home / "vqgan").is_dir():
        stages = {name: load_first_stage(home / stage / "last.pt").model.to(device)
                  for name, stage in (("before ReFiT", "vqgan"), ("after ReFiT", "refit"))}
    rows = []
    for name, model in stages.items():
        counted, table, networks = [], [], metrics.Networks(inception=inception)
        for split in splits:
            total = min(n or len(split), len(split))
            counts = torch.zeros(model.config.K, dtype=torch.int64)
            batches = held_out(split, total, batch_size, device, rank(), world_size(), masks=False,
                               workers=WORKERS)
            for batch in _with_progress(batches, total):
                z, indices = _latents(model, batch.x)
                counts += indices.flatten().cpu().bincount(minlength=len(counts))
                if split is splits[0] and inception and model.decoder is not None:
                    table += metrics.measure(batch.x, batch, networks, None, metrics.REAL)
                    table += metrics.measure(model.decode(z), batch, networks, None, "vanilla")
            counted.append(code_statistics(sum(gather_objects(counts))))
        table = metrics.over_ranks(table)
        rfid = metrics.summary(table, None, "vanilla")["fid"] if table else None
        rows.append(codebook_row(name, model, splits[0].size, *counted, rfid))
    return rows


def draw(folder, dataset, device, out):
    """What a run's prior makes: (report.json's "prior" or None, a note, {file name: title}).

    Writes samples, completions and, with a decoder of ours, inpainted images into `out`.
    """
    try:
        prior = load_prior(folder, device)
        model = sample.open_decoder(folder, prior)
    except UserError as error:
        return None, f"n/a: {error}", {}
    if not prior.finished:
        return None, f"not computed: its training is not finished (step {prior.step})", {}
    side = prior.grid[0] * prior.first_stage.config.f
    if dataset.size != side:
        return None, f"not computed: it makes pictures of {side} px, not of {dataset.size}", {}
    steps = chosen_steps(None, prior.diffusion.T, STEPS)
    row, samples = sample.measure(prior, model, steps, SAMPLES, batch_size=SAMPLES)
    image_rows([(f"{SAMPLES} samples ({steps} steps), decoded by {sample.decoder_name(model)}",
                 list(samples))], out / "samples.png", across=8)
    image_rows(completion_rows(prior, dataset, steps), out / "completions.png",
               across=2 + COMPLETIONS)
    pictures = {"samples.png": f"{SAMPLES} samples", "completions.png": "completions"}
    if isinstance(model, AsymVQGAN):
        image_grid(inpainting_columns(prior, model, dataset, steps), out / "inpainting.png")
        pictures["inpainting.png"] = f"full inpainting ({steps} steps, resample {RESAMPLE})"
    facts = prior.facts
    figures = {"vlb_nats": facts.get("score"), "uniform_nats": facts.get("uniform_nats"),
               "histogram_nats": facts.get("histogram_nats"), "steps": [row]}
    note = f"vlb_nats: of held-out maps, when training ended; seconds: of {SAMPLES} maps at once"
    return figures, note, pictures


# -- on folders ------------------------------------------------------------------------------------


def evaluate_folder(args, device):
    """As evaluate_runs, of pictures made by anything: main's flags, with --pred.

    Each is measured beside its original; or, with --unpaired, by FID and inception score alone
    against another folder, or as many held-out images. [AVQ Tab. 6] [AVQ Tab. 10]
    """
    batch_size = args.batch_size or 8
    if args.unpaired:
        pred = PictureFolder("--pred", args.pred, args.n)
        if args.real:
            others = PictureFolder("--real", args.real)
            n, about, real = len(others), others.name, others.batches(batch_size, device)
        else:
            others = open_dataset(args.data, args.root, "val", args.size or pred.read(0).shape[-1])
            n, about = min(len(pred), len(others)), others.describe()
            real = held_out(others, n, batch_size, device, rank(), world_size(), masks=False)
        about = f"{len(pred):,} pictures in {pred.name} against {n:,} of {about}"
        networks = metrics.open_networks(device, args.weights, "none")
        networks.off |= dict.fromkeys(("lpips", "clip_score"), "no pairs")
    else:
        pred = _pairs(args)
        about, networks = pred.describe(), metrics.open_networks(
            device, args.weights, args.lpips or "vgg", args.lpips is not None, args.fid, args.clip,
            refs=bool(args.refs))
    out = run_folder.make_folder(Path(args.out or f"{pred.name.rstrip('/')}-report"))
    print0(f"measuring {about}; the report goes to {out}")
    table = []
    with exact_float32(), torch.inference_mode():
        if args.unpaired:
            for batch in _with_progress(real, n):
                table += metrics.measure(batch.x, batch, networks, None, metrics.REAL)
            for batch in _with_progress(pred.batches(batch_size, device), len(pred)):
                table += metrics.measure(batch.x, batch, networks, pred.name, "files")
        else:
            for batch in _with_progress(pred.batches(batch_size, device), len(pred)):
                table += metrics.measure(batch.x, batch, networks, None, metrics.REAL)
                table += metrics.measure(batch.pred, batch, networks, pred.name, "files")
    table = metrics.over_ranks(table)
    rows = on_rank0(lambda: metrics.report_rows(table, {pred.name: None}, networks.lpips_net))
    masks = {"kind": "files" if args.masks else None, "size": None, "seed": None}
    report = tables.make_report(rows, len(pred), device, masks, notes=networks.reasons())
    if rank() == 0:
        text = tables.report_text(report, about, networks.missing, networks.off, args.table)
        write_report(out, report, text, table, args.per_image)


def _pairs(args):
    return MatchedFolders(args.real, args.pred, args.masks, args.refs,
                          invert_mask=args.invert_mask, limit=args.n)


# -- the report ------------------------------------------------------------------------------------


def _with_progress(batches, n):
    """The batches, with a progress line; n: images in all, over all processes."""
    progress = None
    for done, batch in enumerate(batches, 1):
        if progress is None:
            size = len(batch.x)
            steps = math.ceil(n / size / world_size())
            progress = run_folder.Progress("evaluation", 0, steps, size)
        yield batch
        progress.show(min(done, progress.steps), {})
    if progress:
        progress.close()


def write_report(out, report, text, table, per_image=None, pictures=()):
    """Print the tables and write report.md, report.json and, if asked, the table of images.

    pictures: {file name: title} of those that are in `out` already.
    """
    print0("\n" + text)
    links = "".join(f"![{pictures[name]}]({name})\n\n" for name in pictures)
    title = "Known pixels" if report["masks"]["kind"] else "Pictures"
    run_folder.write_text(out / "report.md", f"# {title}\n\n{text}\n\n`{report['command']}`, "
                                             f"commit {report['commit']}\n\n{links}")
    run_folder.write_text(out / "report.json", json.dumps(
        report, indent=1, sort_keys=True, allow_nan=False) + "\n")
    made = [out / "report.md", out / "report.json", *(out / name for name in pictures)]
    if per_image:
        with open(per_image, "w", newline="", encoding="utf-8") as file:
            columns = ["index", "file", "run", "decoder", "bucket", *metrics.MEASURES]
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in table if row["decoder"] != metrics.REAL)
        made.append(per_image)
    print0("wrote " + ", ".join(map(str, made)))


# -- the program -----------------------------------------------------------------------------------


def main():
    args = _parser().parse_args()
    for wrong, what in _mistakes(args):
        if wrong:
            raise UserError(what)
    device = setup(args.device)
    if args.per_image:
        run_folder.make_folder(Path(args.per_image).parent, "--per-image")
    if args.pred:
        evaluate_folder(args, device)
    else:
        pairs = _pairs(args) if args.real else None
        evaluate_runs(args.runs, device=device, n=args.n, data=args.data, root=args.root,
                      size=args.size, pairs=pairs, batch_size=args.batch_size, lpips=args.lpips,
                      weights=args.weights, fid=args.fid, clip=args.clip, table=args.table,
                      per_image=args.per_image, out=args.out)


def _mistakes(args):
    """[(whether the flags contradict or lack one another so, what to do), ...]."""
    table, samples = f"--table {args.table}", args.table in ("6", "10")
    numbers = {"-n": args.n, "--batch-size": args.batch_size, "--size": args.size}
    small = [flag for flag, value in numbers.items() if value is not None and value < 1]
    return [
        (small, f"{', '.join(small)}: give a number from 1 on"),
        (bool(args.runs) == bool(args.pred),
         "give either runs, as in eval.py RUN, or pictures, as in eval.py --pred DIR --real DIR"),
        (args.unpaired and not args.pred, "--unpaired needs --pred DIR, a folder of pictures"),
        (args.unpaired and bool(args.real) == bool(args.data),
         "--unpaired compares --pred DIR with one other set: give --real DIR or --data"),
        (args.unpaired and (args.masks or args.refs or args.lpips or not args.fid),
         "--unpaired is for FID and inception score alone: leave the flags of pairs out"),
        (args.pred and not args.real and not args.unpaired, "--pred needs --real DIR"),
        (args.masks and not args.real, "--masks needs --real DIR, the original pictures"),
        (args.refs and not args.masks, "--refs needs --masks DIR: the CLIP score is of the hole"),
        (args.real and (args.data or args.root or args.size),
         "--data, --root and --size are about a data set: leave them out with --real"),
        (samples and not args.unpaired, f"{table} is about samples: write them with sample.py -o "
         "FOLDER/, then eval.py --pred FOLDER --data DATA --unpaired"),
        (args.table and args.unpaired and not samples, f"{table} is about pairs"),
        (args.table == "ddm1" and (args.pred or args.real), f"{table} is about a run alone"),
        (args.table in ("1", "4", "5") and not args.pred,
         f"{table} is about pictures that a generator made: give --pred DIR --real DIR"),
        (args.table and args.pred and not args.unpaired and not args.masks,
         f"{table} needs --masks DIR"),
        (args.table in ("4", "5") and not args.refs, f"{table} has a CLIP score: give --refs DIR"),
    ]


def _parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="The papers' tables: what decoders do to known pixels, and FID, inception "
                    "score, LPIPS and CLIP score of pictures made by anything.")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN",
        help="run folders, their stage files, or public checkpoints, on one first stage")
    add("--pred", metavar="DIR", help="pictures made by anything, instead of runs")
    add("--real", metavar="DIR", help="the originals, matched by file name")
    add("--masks", metavar="DIR", help="masks of the same names; white = generated")
    add("--refs", metavar="DIR", help="what the holes were to look like, for the CLIP score")
    add("--invert-mask", action="store_true", help="the masks are black where generated")
    add("--unpaired", action="store_true",
        help="compare the set PRED with the set REAL, or with held-out pictures of --data")
    add("--data", choices=("signs", "imagenet", "folder"),
        help="held-out pictures (default: the run's --data; else imagenet)")
    add("--root", metavar="DIR", help="folder of these pictures (default: the run's --root)")
    add("--size", type=int, metavar="PX",
        help="their size (default: the run's --size; else 256; with --pred that of its pictures)")
    add("-n", "--n", type=int, metavar="N",
        help="pictures (default: all given ones; of a run's held-out ones at most 1000, signs 500; "
             "--table ddm1 looks at all)")
    add("--table", choices=(*tables.PAPER_TABLES, "ddm1"),
        help="print this table of the AVQ paper as well; ddm1: DDM's Table 1, codes in use")
    add("--lpips", choices=(*TRUNKS, "none"),
        help="network of the LPIPS column (default: the run's --perceptual; else vgg)")
    add("--weights", metavar="DIR",
        help="folder of the networks' files (default: the run's --weights, else torch hub's cache)")
    add("--clip", metavar="DIR", help="folder of a CLIP model, for the CLIP score")
    add("--no-fid", dest="fid", action="store_false",
        help="leave out FID and inception score, the slowest columns without a GPU")
    add("--per-image", metavar="FILE", help="write the measures of each picture as a CSV table")
    add("--batch-size", type=int, metavar="B",
        help="pictures at once (default: 16 up to 128 px, 4 at 256, 1 at 512; of --pred 8; of runs "
             "with --real 4)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    add("--out", metavar="DIR",
        help="folder of the report (default: RUN; of several RUN/compare; of pictures PRED-report)")
    return parser


if __name__ == "__main__":
    exit_on_user_error(main)
