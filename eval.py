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

import run_folder
from asym_decoder import AsymVQGAN
from convert import chosen_steps, load, load_first_stage, load_prior, run_of
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
from metrics import (
    MEASURES,
    REAL,
    Networks,
    decode_all,
    first_stage_of,
    measure,
    open_networks,
    over_ranks,
    report_rows,
    summary,
)
from paper_tables import (
    PAPER_TABLES,
    codebook_table,
    ddm_table_1,
    make_report,
    prior_table,
    report_text,
    steps_table,
)
from pictures import image_grid, image_rows, show_masked
from quantize import code_statistics
from sample import decoder_name, open_decoder
from sample import measure as measure_samples

EXAMPLES, SAMPLES, STEPS = 6, 16, 25             # of the report's pictures
WORKERS = 2                                      # that decode where a whole split is counted
FOLDERS = {"kind": None, "size": None, "seed": None}
CAPTIONS = {"asym": "ours, with mask", "asym-nomask": "ours, without"}


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
    networks = open_networks(device, weights or config.get("weights"),
                             lpips or config.get("perceptual", "vgg"), lpips is not None, fid, clip,
                             refs=pairs is not None and pairs.refs)
    first_stage = first_stage_of(models.values())
    vq = first_stage.config.latent == "vq"
    if table == "ddm1" and not vq:
        raise UserError("--table ddm1: a KL latent has no codes to count; give a run with a VQ "
                        "first stage")

    # Choose the images.
    if pairs is None:
        where = data or config.get("data", "imagenet"), root or config.get("root")
        size = size or config.get("size", 256)
        dataset, asked = open_dataset(*where, "val", size), n
        n = min(n or (500 if isinstance(dataset, Signs) else 1000), len(dataset))
        batch_size = batch_size or max(1, min(16, 2**18 // size**2))
        batches = held_out(dataset, n, batch_size, device, rank(), world_size())
        about, masks = dataset.describe(), {"kind": "thick", "size": size, "seed": 0}
    else:
        n, about, masks = len(pairs), pairs.describe(), _masks_of(pairs)
        batches = pairs.batches(batch_size or 4, device)
    if out is None:
        out = run_of(paths[0]) if len(paths) == 1 else run_of(paths[0]) / "compare"
    out = run_folder.make_folder(Path(out))
    print0(f"evaluating {', '.join(runs)} on {n:,} of {about}; the report goes to {out}")

    # Decode the same latents by every decoder, and measure: a row for each image and decoder.
    rows, shown = [], {}
    counts = torch.zeros(first_stage.config.K if vq else 0, dtype=torch.int64)
    with exact_float32(), torch.inference_mode():
        for number, batch in enumerate(_with_progress(batches, n)):
            z, indices = _latents(first_stage, batch.x)                 # (B, d, h, w), (B, h, w)
            if vq:
                counts += indices.flatten().cpu().bincount(minlength=len(counts))
            if number == 0:        # warm-up: the first call would be timed with its allocations
                decode_all(models, z, batch.x, batch.mask)
            outputs = decode_all(models, z, batch.x, batch.mask)
            rows += measure(batch.x, batch, networks, None, REAL)
            for (run, decoder), (x_hat, seconds) in outputs.items():
                rows += measure(x_hat, batch, networks, run, decoder, seconds)
            shown |= _examples(batch, outputs, len(runs) > 1)
        rows = over_ranks(rows)
        sizes = {name: run.config.get("decoder") for name, run in runs.items()}
        means = on_rank0(lambda: report_rows(rows, sizes, networks.lpips_net))

        # Of the codes: which are in use, and what their prior makes.
        codebooks, notes, prior, texts, pictures = [], _unfinished(runs), None, [], {}
        if pairs is None and vq and table == "ddm1":
            splits = [dataset, open_dataset(*where, "train", size)]
            codebooks = count_codebooks(paths[0], first_stage, splits, asked, batch_size,
                                        networks.inception)
            notes["codebook"] = "; ".join(f"{name}: {min(asked or len(split), len(split)):,} images"
                                          for name, split in zip(("held out", "train"), splits))
        elif pairs is None and vq:
            rfid = [row["fid"] for row in means
                    if row["decoder"] == "vanilla" and row["bucket"] == "all"]
            used = code_statistics(sum(gather_objects(counts)))
            codebooks = refit_codebooks(paths[0], runs)
            codebooks.append(codebook_row("in use", first_stage, size, used, None, *rfid[:1]))
            notes["codebook"] = f"held out: {n:,} images; train: not counted, --table ddm1 does"
        elif not vq:
            notes["codebook"] = "not computed: a KL latent has no codes"
        folder = next((path for path in paths if run_folder.latest(path / "prior")), None)
        if pairs is None and folder:
            prior, notes["prior"], pictures = on_rank0(lambda: draw(folder, dataset, device, out))

    # Tell it.
    codebook = codebooks and {key: codebooks[-1][key] for key in (
        "K", "usage_train", "usage_val", "perplexity_val", "rfid")}
    report = make_report(means, n, device, masks, config.get("seed"), networks.reasons() | notes,
                         codebook or None, prior)
    texts = [report_text(report, about, networks.missing, networks.off,
                         table if table != "ddm1" else None)]
    if codebooks:
        texts += [f"Codes in use ({notes['codebook']}):", codebook_table(codebooks)]
    if table == "ddm1":
        texts.append(ddm_table_1())
    if prior and prior["uniform_nats"]:
        texts += ["What a held-out map of them costs, as training measured it last:",
                  prior_table(prior, first_stage.config.K)]
    if prior:
        texts += ["Drawing such maps:", steps_table(prior["steps"], SAMPLES)]
    elif "prior" in notes:
        texts.append(f"prior: {notes['prior']}")
    columns = _columns(shown)
    if rank() == 0:
        image_grid(columns, out / "report.png")
        pictures = {"report.png": "the first images"} | pictures
        write_report(out, report, "\n\n".join(texts), pictures, rows, per_image)
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
            raise UserError(f"{name} and {first} stand on different first-stage weights, so their "
                            "decoders read different latents; evaluate them one by one, or train "
                            f"one on the other's: train.py --vqgan {first}")
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


def _examples(batch, outputs, several):
    """{position: {caption: (3,H,W)}} of those of a batch that report.png shows."""
    shown = {}
    for i, index in enumerate(batch.index):
        if index < EXAMPLES:
            shown[index] = {"original": batch.x[i].cpu()}
            if batch.mask is not None:
                shown[index]["masked"] = show_masked(batch.x[i].cpu(), batch.mask[i].cpu())
            for (run, decoder), (x_hat, _) in outputs.items():
                if decoder != "paste":
                    name = f"\n{run}" if several and run else ""
                    caption = CAPTIONS.get(decoder, decoder) + name
                    shown[index][caption] = x_hat[i].to("cpu", copy=True)
    return shown


def _columns(shown):
    """Columns for image_grid: the examples of all processes, those of the first one's size."""
    every = [image for part in gather_objects(shown) for image in sorted(part.items())]
    images = [images for _, images in sorted(every, key=lambda pair: pair[0])]
    alike = [own for own in images if own["original"].shape == images[0]["original"].shape]
    return {caption: [own[caption] for own in alike] for caption in alike[0]}


def _unfinished(runs):
    """{"run": which runs are not finished}, or nothing."""
    names = [f"{name} (step {run.step})" for name, run in runs.items() if not run.finished]
    return {"run": f"training is not finished: {', '.join(names)}"} if names else {}


# -- the codes and their prior ---------------------------------------------------------------------


def codebook_row(name, first_stage, size, val, train=None, rfid=None):
    """A row of paper_tables.codebook_table; val, train: quantize.code_statistics of each split."""
    side = size // first_stage.config.f
    return {"name": name, "latent": f"{side}x{side}", "K": val["K"],
            "usage_train": train and train["usage"], "usage_val": val["usage"],
            "perplexity_val": val["perplexity"], "rfid": rfid}


def refit_codebooks(path, runs):
    """What ReFiT counted of all held-out images when it began, before and after: up to two rows."""
    state = run_folder.latest(run_of(path) / "refit")
    loaded = next(iter(runs.values()))
    if state is None or "val" not in state["extra"] or (
            run_folder.weights_hash(state["model"]) != loaded.parent):
        return []
    size = state["config"]["size"]
    return [codebook_row(f"{name} ReFiT", loaded.model.first_stage, size, facts)
            for name, facts in state["extra"]["val"].items()]


def count_codebooks(path, first_stage, splits, n, batch_size, inception):
    """DDM's Table 1 of a run: its codes counted in both splits, before and after. [DDM Tab. 1]

    splits: the held-out images and those of training; n: the first of each, None for all;
    inception: for the FID of what the codes of the held-out images decode to, or None.
    """
    device = first_stage.quantize.embedding.weight.device
    run, stages = run_of(path), {"the first stage's": first_stage}
    if run_folder.latest(run / "refit") and run_folder.latest(run / "vqgan"):
        stages = {"before ReFiT": load_first_stage(run / "vqgan" / "last.pt").model.to(device),
                  "after ReFiT": load_first_stage(run / "refit" / "last.pt").model.to(device)}
    rows = []
    for name, model in stages.items():
        counted, table, networks = [], [], Networks(inception=inception)
        for split in splits:
            total = min(n or len(split), len(split))
            counts = torch.zeros(model.config.K, dtype=torch.int64)
            batches = held_out(split, total, batch_size, device, rank(), world_size(), masks=False,
                               workers=WORKERS)
            for batch in _with_progress(batches, total):
                z, indices = _latents(model, batch.x)
                counts += indices.flatten().cpu().bincount(minlength=len(counts))
                if split is splits[0] and inception and model.decoder is not None:
                    table += measure(batch.x, batch, networks, None, REAL)
                    table += measure(model.decode(z), batch, networks, None, "vanilla")
            counted.append(code_statistics(sum(gather_objects(counts))))
        table = over_ranks(table)
        rfid = summary(table, None, "vanilla")["fid"] if table else None
        rows.append(codebook_row(name, model, splits[0].size, *counted, rfid))
    return rows


def draw(folder, dataset, device, out):
    """What a run's prior makes: (report.json's "prior" or None, a note, {file name: title}).

    Writes samples, completions and, with a decoder of ours, inpainted images into `out`.
    """
    try:
        prior = load_prior(folder, device)
        model = open_decoder(folder, prior)
    except UserError as error:
        return None, f"n/a: {error}", {}
    if not prior.finished:
        return None, f"not computed: its training is not finished (step {prior.step})", {}
    side = prior.grid[0] * prior.first_stage.config.f
    if dataset.size != side:
        return None, f"not computed: it makes pictures of {side} px, not of {dataset.size}", {}
    steps = chosen_steps(None, prior.diffusion.T, STEPS)
    row, samples = measure_samples(prior, model, steps, SAMPLES, batch_size=SAMPLES)
    image_rows([(f"{SAMPLES} samples ({steps} steps), decoded by {decoder_name(model)}",
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


def evaluate_pairs(args, device):
    """As evaluate_runs, of pictures made by anything, each with its original."""
    pairs = _pairs(args)
    networks = open_networks(device, args.weights, args.lpips or "vgg", args.lpips is not None,
                             args.fid, args.clip, pairs.refs)
    out = run_folder.make_folder(Path(args.out or f"{pairs.name.rstrip('/')}-report"))
    print0(f"measuring {pairs.describe()}; the report goes to {out}")
    table = []
    with exact_float32(), torch.inference_mode():
        batches = pairs.batches(args.batch_size or 8, device)
        for batch in _with_progress(batches, len(pairs)):
            table += measure(batch.x, batch, networks, None, REAL)
            table += measure(batch.pred, batch, networks, pairs.name, "files")
    return _finish(args, networks, table, pairs.name, pairs.describe(), _masks_of(pairs), out)


def evaluate_sets(args, device):
    """FID and inception score of a folder against images that are no pairs of its own.

    These are in the folder --real, or as many held-out ones of --data. [AVQ Tab. 6] [AVQ Tab. 10]
    """
    pred, batch_size = PictureFolder("--pred", args.pred, args.n), args.batch_size or 8
    if args.real:
        real = PictureFolder("--real", args.real)
        n, about, others = len(real), real.name, real.batches(batch_size, device)
    else:
        dataset = open_dataset(args.data, args.root, "val", args.size or pred.read(0).shape[-1])
        n, about = min(len(pred), len(dataset)), dataset.describe()
        others = held_out(dataset, n, batch_size, device, rank(), world_size(), masks=False)
    networks = open_networks(device, args.weights, "none", fid=True)
    networks.off |= dict.fromkeys(("lpips", "clip_score"), "no pairs")
    about = f"{len(pred):,} pictures in {pred.name} against {n:,} of {about}"
    out = run_folder.make_folder(Path(args.out or f"{pred.name.rstrip('/')}-report"))
    print0(f"measuring {about}; the report goes to {out}")
    table = []
    with exact_float32(), torch.inference_mode():
        for batch in _with_progress(others, n):
            table += measure(batch.x, batch, networks, None, REAL)
        for batch in _with_progress(pred.batches(batch_size, device), len(pred)):
            table += measure(batch.x, batch, networks, pred.name, "files")
    return _finish(args, networks, table, pred.name, about, FOLDERS, out)


def _finish(args, networks, table, name, about, masks, out):
    """The report on one folder of pictures."""
    table = over_ranks(table)
    rows = on_rank0(lambda: report_rows(table, {name: None}, networks.lpips_net))
    report = make_report(rows, rows[0]["n"], torch.device(args.device), masks,
                         notes=networks.reasons())
    if rank() == 0:
        text = report_text(report, about, networks.missing, networks.off, args.table)
        write_report(out, report, text, {}, table, args.per_image)
    return report


def _pairs(args):
    return MatchedFolders(args.real, args.pred, args.masks, args.refs,
                          invert_mask=args.invert_mask, limit=args.n)


def _masks_of(pairs):
    return FOLDERS | {"kind": "files" if pairs.masks else None}


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


def write_report(out, report, text, pictures, table, per_image=None):
    """Print the tables and write report.md, report.json and, if asked, the table of images.

    pictures: {file name: title} of those that are in `out` already.
    """
    print0("\n" + text)
    title = "Known pixels" if report["masks"]["kind"] else "Pictures"
    links = "".join(f"![{title}]({name})\n\n" for name, title in pictures.items())
    run_folder.write_text(out / "report.md", f"# {title}\n\n{text}\n\n`{report['command']}`, "
                                             f"commit {report['commit']}\n\n{links}")
    run_folder.write_text(out / "report.json", json.dumps(
        report, indent=1, sort_keys=True, allow_nan=False) + "\n")
    made = [out / "report.md", out / "report.json", *(out / name for name in pictures)]
    if per_image:
        with open(per_image, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["index", "file", "run", "decoder", "bucket", *MEASURES],
                                    extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in table if row["decoder"] != REAL)
        made.append(per_image)
    print0("wrote " + ", ".join(str(path) for path in made))


# -- the program -----------------------------------------------------------------------------------


def main():
    args = _parser().parse_args()
    _check(args)
    args.device = device = setup(args.device)
    if args.unpaired:
        evaluate_sets(args, device)
    elif args.pred:
        evaluate_pairs(args, device)
    else:
        evaluate_runs(args.runs, device=device, n=args.n, data=args.data, root=args.root,
                      size=args.size, pairs=_pairs(args) if args.real else None,
                      batch_size=args.batch_size, lpips=args.lpips, weights=args.weights,
                      fid=args.fid, clip=args.clip, table=args.table, per_image=args.per_image,
                      out=args.out)


def _check(args):
    """Raise UserError for flags that contradict one another or lack one another."""
    for flag, value in (("-n", args.n), ("--batch-size", args.batch_size), ("--size", args.size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: give a number from 1 on")
    table = f"--table {args.table}"
    mistakes = [
        (bool(args.runs) == bool(args.pred),
         "give either runs, as in eval.py RUN, or pictures, as in eval.py --pred DIR --real DIR"),
        (args.unpaired and not args.pred, "--unpaired needs --pred DIR, a folder of pictures"),
        (args.unpaired and bool(args.real) == bool(args.data),
         "--unpaired compares --pred DIR with one other set: give --real DIR or --data"),
        (args.unpaired and (args.masks or args.refs or args.lpips or not args.fid),
         "--unpaired is for FID and inception score alone: leave out --masks, --refs, --lpips and "
         "--no-fid"),
        (args.pred and not args.real and not args.unpaired,
         "--pred needs --real DIR, the originals; or --unpaired"),
        (args.masks and not args.real, "--masks needs --real DIR, the original pictures"),
        (args.refs and not args.masks, "--refs needs --masks DIR: the CLIP score is of the hole"),
        (args.real and (args.data or args.root or args.size),
         "--data, --root and --size are about a data set: leave them out with --real"),
        (args.table in ("6", "10") and not args.unpaired,
         f"{table} is about samples: write them with sample.py -o FOLDER/, then eval.py --pred "
         "FOLDER --data DATA --unpaired"),
        (args.unpaired and args.table not in (None, "6", "10"), f"{table} is about pairs"),
        (args.table == "ddm1" and (args.pred or args.real),
         "--table ddm1 is about a run and its own data set: eval.py RUN --table ddm1"),
        (args.table in ("1", "4", "5") and not args.pred,
         f"{table} is about pictures that a generator made: give them with --pred DIR --real DIR"),
        (args.table and args.real and not args.unpaired and not args.masks,
         f"{table} needs --masks DIR"),
        (args.table in ("4", "5") and not args.refs,
         f"{table} has a CLIP score: give the reference pictures with --refs DIR"),
    ]
    for wrong, what in mistakes:
        if wrong:
            raise UserError(what)


def _parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="The papers' tables: what decoders do to known pixels, and FID, inception "
                    "score, LPIPS and CLIP score of pictures made by anything.")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN",
        help="run folders of train.py, their stage files, or public checkpoints, on one first "
             "stage")
    add("--pred", metavar="DIR", help="pictures made by anything, instead of runs")
    add("--real", metavar="DIR", help="the originals, matched by file name")
    add("--masks", metavar="DIR", help="masks of the same names; white = generated")
    add("--refs", metavar="DIR", help="what the holes were to look like, for the CLIP score")
    add("--invert-mask", action="store_true", help="the masks are black where generated")
    add("--unpaired", action="store_true",
        help="PRED is compared with the set REAL, or with held-out pictures of --data: FID and "
             "inception score alone")
    add("--data", choices=("signs", "imagenet", "folder"),
        help="held-out pictures (default: the run's --data; else imagenet)")
    add("--root", metavar="DIR", help="folder of these pictures (default: the run's --root)")
    add("--size", type=int, metavar="PX",
        help="their size (default: the run's --size; else 256; with --pred that of its pictures)")
    add("-n", "--n", type=int, metavar="N",
        help="pictures (default: all given ones; of a run's held-out ones at most 1000, signs 500; "
             "--table ddm1 looks at all)")
    add("--table", choices=(*PAPER_TABLES, "ddm1"),
        help="print this table of the AVQ paper as well; ddm1: DDM's Table 1, codes in use")
    add("--lpips", choices=(*TRUNKS, "none"),
        help="network of the LPIPS column (default: the run's --perceptual; else vgg)")
    add("--weights", metavar="DIR",
        help="folder of the networks' files (default: the run's --weights, else torch hub's cache)")
    add("--clip", metavar="DIR",
        help="folder of CLIP's image tower (config.json and its weights), for the CLIP score")
    add("--no-fid", dest="fid", action="store_false",
        help="leave out FID and inception score, the slowest columns without a GPU")
    add("--per-image", metavar="FILE", help="write the measures of each picture as a CSV table")
    add("--batch-size", type=int, metavar="B",
        help="pictures at once (default: 16 up to 128 px, 4 at 256, 1 at 512; of folders 8, of "
             "folders with runs 4)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    add("--out", metavar="DIR",
        help="where the report goes (default: RUN; of several: RUN/compare; of pictures: "
             "PRED-report)")
    return parser


if __name__ == "__main__":
    exit_on_user_error(main)
