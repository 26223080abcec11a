"""Measure trained runs, or pictures made by any program, and write the papers' tables.

    python eval.py RUN [RUN ...]                   what each decoder does to known pixels
    python eval.py RUN --table ddm1                which codes are in use, before and after ReFiT
    python eval.py --pred DIR --real DIR --masks DIR --table 1      pictures of any program
    python eval.py --pred DIR --data signs --unpaired --table 6     samples that sample.py wrote

    images --encode--> z --decode_protocols--> x_hat --metrics.measure--> a row for each image
    the table of images --metrics.report_rows--> means, FID --paper_tables.py--> Markdown, JSON

Writes report.md, report.json and, for runs, pictures beside them. [AVQ Tab. 2] [AVQ Tab. 3]
"""

import argparse
import csv
import json
import os
from pathlib import Path

import numpy as np
import torch

import distributed
import metrics
import paper_tables as tables
import run_folder
import sample
from asym_decoder import AsymVQGAN
from convert import chosen_steps, load, load_first_stage, load_prior
from data import DATASETS, Signs, held_out_batches, open_dataset
from distributed import UserError, exit_on_user_error, print0
from image_pairs import MatchedFolders, PictureFolder
from inpaint import COMPLETIONS, RESAMPLE, completion_rows, inpainting_columns
from losses import TRUNKS
from pictures import image_grid, image_rows, show_masked
from quantize import code_statistics, exact_float32
from seeding import SHIFT, numpy_generator

EXAMPLES, SAMPLES, REPORT_STEPS = 6, 16, 25      # images in report.png; samples, steps of each
MOST_PIXELS, MOST_CELLS = 2**22, 2**16           # of an image that runs decode
WORKERS = 2                                      # that read photos for a GPU or --table ddm1
CAPTIONS = {"paste": "vanilla, pasted", "asym": "ours w/ mask", "asym-nomask": "ours w/o mask"}


def evaluate(runs=(), *, pred=None, real=None, masks=None, refs=None, n=None,
             unpaired=False, invert_mask=False, data=None, split=None, root=None, size=None,
             table=None, lpips=None, weights=None, clip=None, fid=True, per_image=None,
             batch_size=None, device="cpu", out=None):
    """Measure runs, or pictures of any program; print the tables; write and return the report.

    The arguments are the flags; None stands for the run's own setting. Raises UserError.
    """
    # Open the runs, and the networks that measure.
    device, paths = torch.device(device), [Path(path) for path in runs]
    runs = open_runs(paths, device)
    models = {name: run.model for name, run in runs.items()}
    config = next((run.config for run in runs.values() if "data" in run.config), {})
    first_stage = metrics.first_stage_of(models.values()) if models else None
    vq = bool(models) and first_stage.config.latent == "vq"
    if table == "ddm1" and not vq:
        raise UserError("--table ddm1: a KL latent has no codes; give a run with a VQ first stage")
    net = "none" if unpaired else lpips or config.get("perceptual", "vgg")     # deviation D55
    networks = metrics.open_networks(device, weights or config.get("weights"), net,
                                     lpips is not None, fid, clip, bool(refs))

    # Choose the images: two sets, pairs of files, or a data set's held-out images.
    split = None if real else split or "val"
    masks_drawn = {"kind": "files" if masks else None, "size": None, "seed": None}
    dataset, limit = None, n
    if unpaired:       # sets, by FID and inception score  [AVQ Sec. 4.3] [AVQ Tab. 6] [AVQ Tab. 10]
        images = PictureFolder("--pred", pred, n)
        others = (PictureFolder("--real", real) if real else
                  open_dataset(data, root, split, size or images.read(0)[0].shape[-1]))
        n_others = len(others) if real else min(len(images), len(others))
        about = (f"{len(images):,} pictures in {pred} against {n_others:,} of "
                 f"{real or others.describe()}")
        networks.empty |= dict.fromkeys(("lpips", "clip_score"), "not computed: no pairs")
    elif real:
        images = MatchedFolders(real, pred, masks, refs, invert_mask=invert_mask, limit=n)
        about = images.about
    else:
        data, root = data or config.get("data", "imagenet"), root or config.get("root")
        size = size or config.get("size", 256)
        images = dataset = open_dataset(data, root, split, size)
        n = n or (500 if isinstance(dataset, Signs) else 1000)
        about, masks_drawn = dataset.describe(), {"kind": "thick", "size": size, "seed": 0}
    n = min(n or len(images), len(images))
    # Check the sizes that the networks will meet.
    sides = [] if unpaired else [*images.sizes()] if real else [(f"--size {size}", size, size)]
    f, least = models and first_stage.config.f, networks.lpips.least_side if networks.lpips else 0
    for name, w, h in sides if models else ():
        at_once = min(MOST_PIXELS, MOST_CELLS * f**2)
        if w % f or h % f or w * h > at_once:
            raise UserError(f"{name}: {w} x {h} px; sides must be multiples of {f} and the area at "
                            f"most {at_once:,} px for this first stage: crop photo and mask alike")
    if small := [name for name, *side in sides if min(side) < least]:
        networks.empty["lpips"] = (f"n/a: {net} needs {least} px: {len(small):,} images are "
                                   f"smaller and left out, the first is {small[0]}")
        print0(f"warning: LPIPS: {networks.empty['lpips']}")
    area = max((w * h for _, w, h in sides), default=1)
    more = 4 if device.type == "cuda" else 1                     # which holds and needs more
    batch_size = batch_size or min(16 * more, max(1, 2**18 * more // area))

    def batches(images, n, *ranks):
        if isinstance(images, MatchedFolders):
            return images.batches(batch_size, device)
        return held_out_batches(images, n, batch_size, device, *ranks, masks=not unpaired,
                                workers=WORKERS if device.type == "cuda" else 0)

    # Choose the report's folder.
    if pred:
        place = f"{os.path.abspath(pred)}-report"            # also of "." and ".."
    else:
        home = paths[0] if paths[0].is_dir() else paths[0].parent
        place = home if len(paths) == 1 else home / "compare"
        place = place / "test" if split == "test" else place
    out = run_folder.make_folder(Path(out or place))
    print0(f"evaluating {', '.join(runs) or pred}: {n:,} of {about}; the report goes to {out}")

    with exact_float32(), torch.inference_mode():
        # Decode the first images for report.png, which also warms up the device before the timing.
        columns = first_images(batches(images, n), models) if models else {}
        # Decode the same latents by every decoder, and measure.
        ranks = distributed.rank(), distributed.world_size()
        rows, counts = tabulate(batches(images, n, *ranks), n, networks, models, pred)
        if unpaired:
            rows += tabulate(batches(others, n_others, *ranks), n_others, networks)[0]
        sizes = {name: run.config.get("decoder") for name, run in runs.items()} or {pred: None}
        means, pairs = distributed.on_rank0(lambda: (
            metrics.report_rows(rows, sizes, networks.lpips and net), metrics.differences(rows)))
        means, notes = [row | {"split": split} for row in means], networks.empty
        if networks.inception and means[0]["fid"] is None:
            notes["fid"] = f"n/a: below {metrics.FEWEST_FOR_FID:,} images it is mostly bias"
        # Count the codes in use.
        found = []                           # (name, statistics held out, of training, rFID) each
        if models and not vq:
            notes["codebook"] = "not computed: a KL latent has no codes"
        elif table == "ddm1":
            splits = {"held out": dataset, "train": open_dataset(data, root, "train", size)}
            found = count_codebooks(home, first_stage, splits.values(), limit, batch_size,
                                    networks.inception)
            notes["codebook"] = "; ".join(f"{name}: {min(limit or len(split), len(split)):,} images"
                                          for name, split in splits.items())
        elif dataset:
            refit = run_folder.latest(home / "refit") or {"extra": {}}
            found = [(f"{name} ReFiT", facts, None, None)
                     for name, facts in refit["extra"].get("val", {}).items()]
            rfid = next((row["fid"] for row in means if row["decoder"] == "vanilla"), None)
            found.append(("in use", code_statistics(counts), None, rfid))
            notes["codebook"] = f"held out: {n:,} images; train: not counted, --table ddm1 does"
        codebooks = [{"name": name, "latent": f"{size // f}x{size // f}", "K": val["K"],
                      "usage_train": train and train["usage"], "usage_val": val["usage"],
                      "perplexity_val": val["perplexity"], "rfid": rfid}
                     for name, val, train, rfid in found]
        # Draw samples and completions by the prior.
        prior, links = None, {}                                     # links: {file: title}
        folder = next((path for path in paths if (path / "prior").is_dir()), None)
        if dataset and folder:
            prior, notes["prior"], links = distributed.on_rank0(
                lambda: draw_by_prior(folder, dataset, n, device, out))
    unfinished = [f"{name} (step {run.step})" for name, run in runs.items() if not run.finished]
    if unfinished:
        notes["run"] = f"training is not finished: {', '.join(unfinished)}"

    # Make the tables.
    report = tables.make_report(
        device, notes, n=n, seed=config.get("seed"), masks=masks_drawn, rows=means,
        differences=pairs, codebook=codebooks[-1] if codebooks else None, prior=prior)
    if distributed.rank() > 0:
        return report
    texts = [tables.report_text(report, about, table)]
    if codebooks:
        texts += [f"Codes in use ({notes['codebook']}):", tables.codebook_table(codebooks)]
    if table in tables.DDM_TABLES:
        texts.append(tables.DDM_TABLES[table])
    if prior:
        texts += [f"-log p of a held-out map of codes ({prior['maps']:,} maps):",
                  tables.prior_table(prior, first_stage.config.K)]
        texts += ["Drawing such maps by the prior:", tables.steps_table(prior["steps"], SAMPLES)]
    elif "prior" in notes:
        texts.append(f"prior: {notes['prior']}")
    text = "\n\n".join(texts)

    # Write the report and its pictures, then print it.
    if columns:
        image_grid(columns, out / "report.png")
        links = {"report.png": "the first images by each decoder"} | links
    run_folder.write_text(out / "report.md", "\n\n".join([
        "# Known pixels" if masks_drawn["kind"] else "# Pictures", text,
        f"`{report['command']}`, commit {report['commit']}",
        *(f"![{title}]({name})" for name, title in links.items())]) + "\n")
    run_folder.write_text(out / "report.json", json.dumps(
        report, indent=1, sort_keys=True, allow_nan=False) + "\n")
    if per_image:
        with open(per_image, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            head = ["index", "file", "run", "decoder", "protocol", "bucket", "area", "group",
                    "seconds", *metrics.MEASURES]
            writer = csv.DictWriter(file, head, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if row["decoder"] != metrics.REAL)
    print0(f"\n{text}")
    written = [*(out / name for name in ("report.md", "report.json", *links)), per_image]
    print0(f"wrote {', '.join(str(path) for path in written if path)}")
    return report


def open_runs(paths, device):
    """Open {path: convert.Loaded}. Raises UserError for runs that one table cannot compare."""
    runs = {}
    for name in map(str, paths):
        if name in runs:
            raise UserError(f"{name} is given twice")
        run = runs[name] = load(name, device)
        first, one = next(iter(runs.items()))
        if run.latent_hash != one.latent_hash:
            raise UserError(f"{name} and {first} have different first-stage weights; evaluate "
                            f"them one by one, or train one on the other's: --vqgan {first}")
        for key in ("data", "size"):
            ours, theirs = run.config.get(key), one.config.get(key)
            if None not in (ours, theirs) and ours != theirs:
                raise UserError(f"--{key} of {name} is {ours}, of {first} {theirs}; give one alone")
    return runs


def shift_hole(x, mask, index):
    """Change the colours of the hole of x (B,3,H,W) in [-1,1], as a generator might.

    Each channel has a gain of 0.9 to 1.1 and an offset of -0.1 to 0.1, drawn from the image's index
    alone, and is clamped. Known pixels, where the mask (B,1,H,W) is 0, stay as they are.
    """
    drawn = np.stack([numpy_generator(SHIFT, i).uniform(-0.1, 0.1, (2, 3)) for i in index])
    gain, offset = torch.from_numpy(drawn)[..., None, None].float().to(x.device).unbind(1)
    return torch.where(mask == 1, (x * (1 + gain) + offset).clamp(-1, 1), x)        # (B, 3, H, W)


def decode_protocols(models, z, batch):
    """Decode the latents of each protocol: {(run, decoder, protocol): (x_hat, seconds)}.

    "full": z (B,d,h,w), of the image. "shifted", only with a mask: z of the image after shift_hole,
    so that the hole does not match the known pixels, which decoders get from the image itself. Ours
    without a mask, which has nothing to match, is left out there.  deviation D52  [AVQ Fig. 4]
    """
    x, mask, latents = batch.x, batch.mask, {"full": z}
    if mask is not None:
        first_stage = metrics.first_stage_of(models.values())
        latents["shifted"] = first_stage.encode(shift_hole(x, mask, batch.index))   # (B, d, h, w)
    return {(*key, protocol): output for protocol, z in latents.items()
            for key, output in metrics.decode_all(models, z, x, mask, protocol == "full").items()}


def first_images(batches, models):
    """Decode the first images, of one size, by each decoder: {caption: [(3,H,W), ...]}."""
    columns = {}
    for batch in batches:
        if columns and columns["original"][0].shape != batch.x.shape[1:]:
            continue
        z = metrics.first_stage_of(models.values()).encode(batch.x)         # (B, d, h, w)
        shown = {"original": batch.x}
        if batch.mask is not None:
            shown["masked"] = show_masked(batch.x, batch.mask)
        for (run, decoder, protocol), (x_hat, _) in decode_protocols(models, z, batch).items():
            if (protocol, decoder) != ("shifted", "vanilla"):
                name = f"\n{run}" if len(models) > 1 and run else ""
                other = "hole shifted: " if protocol == "shifted" else ""
                shown[other + CAPTIONS.get(decoder, decoder) + name] = x_hat
        for caption, images in shown.items():
            columns.setdefault(caption, []).extend(images.cpu())
        if len(columns["original"]) >= EXAMPLES:
            break
    return {caption: images[:EXAMPLES] for caption, images in columns.items()}


def tabulate(batches, n, networks, models=None, files=None):
    """Measure all batches over all processes: (the table of images, counts of codes (K,)).

    n: images in all; networks: None counts codes only. models: {run: model} that decode the images.
    files: name of pictures made elsewhere, which are each batch's `pred` or, without one, its `x`.
    """
    table, counts, done = [], 0, 0
    progress = run_folder.Progress("evaluation", 0, n, 1)
    for batch in batches:
        outputs = {(None, metrics.REAL, "full"): (batch.x, 0)}          # (image, seconds) of each
        if models:
            first_stage = metrics.first_stage_of(models.values())
            if first_stage.config.latent == "vq":
                z, indices, _ = first_stage.quantize(first_stage.moments(batch.x))
                counts += indices.flatten().cpu().bincount(minlength=first_stage.config.K)  # (K)
            else:
                z = first_stage.encode(batch.x)                         # (B, d, h, w)
            if networks:
                outputs |= decode_protocols(models, z, batch)
        elif files and batch.pred is None:
            outputs = {(files, "files", "full"): (batch.x, 0)}
        elif files:
            outputs[files, "files", "full"] = (batch.pred, 0)
        if networks:
            for (run, decoder, protocol), (x_hat, seconds) in outputs.items():
                table += metrics.measure(x_hat, batch, networks, run, decoder, seconds, protocol)
        done += len(batch.x) * distributed.world_size()      # the others are about as far as rank 0
        progress.show(min(done, n), {})
    progress.close()
    return metrics.over_ranks(table), sum(distributed.gather_objects(counts))


def count_codebooks(home, first_stage, splits, n, batch_size, inception):
    """Count a run's codes before and after ReFiT: (name, *statistics, rFID) each. [DDM Tab. 1]

    splits: held-out images, on which `inception` gives rFID, and those of training; n: of each.
    """
    stages, rows = {"the first stage's": first_stage}, []
    device = first_stage.quantize.embedding.weight.device
    if (home / "refit").is_dir() and (home / "vqgan").is_dir():
        stages = {name: load_first_stage(home / stage / "last.pt").model.to(device)
                  for name, stage in (("before ReFiT", "vqgan"), ("after ReFiT", "refit"))}
    for name, model in stages.items():
        statistics, rfid = [], None
        for split in splits:
            total = min(n or len(split), len(split))
            batches = held_out_batches(split, total, batch_size, device, distributed.rank(),
                               distributed.world_size(), masks=False, workers=WORKERS)
            decodes = inception and not statistics and model.decoder is not None     # if held out
            networks = metrics.Networks(inception=inception) if decodes else None
            table, counts = tabulate(batches, total, networks, {name: model})
            statistics.append(code_statistics(counts))
            if networks:
                rfid = metrics.summary(table, None, "vanilla")["fid"]
        rows.append((name, *statistics, rfid))
    return rows


def draw_by_prior(folder, dataset, n, device, out):
    """Draw samples and completions by a run's prior into `out`; measure its bound on n images.

    Returns (the report's "prior" or None, the note on it, {file: title}).
    """
    try:
        prior = load_prior(folder, device)
        model = sample.open_decoder(folder, prior)
    except UserError as error:
        return None, f"n/a: {error}", {}
    side = prior.grid[0] * prior.first_stage.config.f
    if not prior.finished:
        return None, f"not computed: its training is not finished (step {prior.step})", {}
    if dataset.size != side:
        return None, f"not computed: it draws images of {side} px, not of {dataset.size}", {}
    steps = chosen_steps(None, prior.diffusion.T, REPORT_STEPS)
    rows, (samples,) = sample.measure_steps(prior, model, [steps], SAMPLES, batch_size=SAMPLES)
    title = f"{SAMPLES} samples ({steps} steps), decoded by {sample.decoder_name(model)}"
    image_rows([(title, list(samples))], out / "samples.png", across=8)
    image_rows(completion_rows(prior, dataset, steps), out / "completions.png", 2 + COMPLETIONS)
    links = {"samples.png": title, "completions.png": "completions"}
    if isinstance(model, AsymVQGAN):
        image_grid(inpainting_columns(prior, model, dataset, steps), out / "inpainting.png")
        links["inpainting.png"] = f"full inpainting ({steps} steps, resample {RESAMPLE})"
    kept = folder / "codes" / prior.facts.get("codes", "maps")
    codes = np.load(kept, mmap_mode="r") if kept.exists() else None
    facts = sample.measure_bound(prior, codes, dataset, n) | {"steps": rows}
    note = f"se: standard error over maps; seconds: of {SAMPLES} maps at once" + (
        f"; rows that need the maps of training are left out, as {kept} is not there"
        if codes is None else "")
    return facts, note, links


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(
        "Print the papers' tables; write report.md, report.json and pictures. Give RUN to decode "
        "held-out images by each decoder from the same latents. Give --pred with --real to measure "
        "pictures that any program made, or with --unpaired to compare two sets of pictures."))
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN",
        help="run folders, stage files or public checkpoints with one first stage")
    add("--pred", metavar="DIR", help="pictures made by any program, instead of runs")
    add("--real", metavar="DIR", help="originals of --pred, matched by name, or what RUN decodes")
    add("--masks", metavar="DIR", help="masks, white = generated (default: no errors, no seam)")
    add("--refs", metavar="DIR", help="references for the CLIP score (default: no CLIP score)")
    add("--invert-mask", action="store_true", help="black = generated (default: white)")
    add("--unpaired", action="store_true",
        help="compare --pred as a set with --real or --data (default: in pairs with --real)")
    add("--data", choices=DATASETS, help="measure on its held-out images (default: the run's data, "
        "else imagenet)")
    add("--split", choices=("val", "test"), help="which of them: recipes were chosen on val, so "
        "publish test (default: val)")
    add("--root", metavar="DIR", help="folder of these images (default: the run's)")
    add("--size", type=int, metavar="PX", help="side (default: the run's, --pred's, else 256)")
    add("-n", "--n", type=int, metavar="N", help="number of images (default: all of --pred and "
        "--real; of --data at most 1000, signs 500; --table ddm1 counts all)")
    add("--table", choices=(*tables.PAPER_TABLES, *tables.DDM_TABLES), help="add a table of AVQ "
        "with its own rows, or DDM's 1 on codes in use or 2 on samples (default: none)")
    add("--lpips", choices=(*TRUNKS, "none"), help="LPIPS network (default: the run's, else vgg)")
    add("--weights", metavar="DIR", help="the networks' files (default: the run's or torch hub's)")
    add("--clip", metavar="DIR", help="folder of a CLIP model for that score (default: none)")
    add("--no-fid", dest="fid", action="store_false", help="leave out FID and inception score "
        "(default: both, if the network's file can be had)")
    add("--per-image", metavar="FILE", help="write each image's measures as CSV (default: do not)")
    add("--batch-size", type=int, metavar="B", help="images at once (default: 16 up to 128 px, 4 "
        "at 256, 1 from 512 on, on CUDA four times as many)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    add("--out", metavar="DIR", help="the report's folder (default: RUN, RUN/compare for several, "
        "test/ in it for --split test; PRED-report)")
    args = parser.parse_args()
    table = f"--table {args.table}"
    samples = args.table in ("6", "10", "ddm2")          # tables about samples, not about pairs
    for wrong, sentence in (
        (any(number is not None and number < 1 for number in (args.n, args.batch_size, args.size)),
         "-n, --batch-size and --size are at least 1"),
        (bool(args.runs) == bool(args.pred), "give either runs or --pred DIR --real DIR"),
        (args.unpaired and (not args.pred or bool(args.real) == bool(args.data)),
         "--unpaired compares --pred DIR with one other set: give --real DIR or --data"),
        (args.unpaired and (args.masks or args.refs or args.lpips or not args.fid),
         "--unpaired gives only FID and inception score: leave out the flags of pairs"),
        (args.pred and not args.real and not args.unpaired, "--pred needs --real DIR"),
        (args.masks and not args.real, "--masks needs --real DIR, the original pictures"),
        (args.refs and not args.masks, "--refs needs --masks DIR: the CLIP score is of the hole"),
        (args.real and (args.data or args.split or args.root or args.size),
         "--data, --split, --root and --size are about a data set: leave them out with --real"),
        (samples and not args.unpaired, f"{table} is about samples: write them with sample.py -o "
         "FOLDER/, then eval.py --pred FOLDER --data DATA --unpaired"),
        (args.table and args.unpaired and not samples, f"{table} is about pairs"),
        (args.table == "ddm1" and (args.pred or args.real), f"{table} is about a run alone"),
        (args.table in ("1", "4", "5") and not args.pred,
         f"{table} is about pictures that a generator made: give --pred DIR --real DIR"),
        (args.table and args.pred and not samples and not args.masks, f"{table} needs --masks DIR"),
        (args.table in ("4", "5") and not args.refs, f"{table} has a CLIP score: give --refs DIR"),
    ):
        if wrong:
            raise UserError(sentence)
    args.device = distributed.setup(args.device)
    distributed.end_at_once()
    if args.per_image:
        run_folder.make_folder(Path(args.per_image).parent, "--per-image")
    evaluate(**vars(args))


if __name__ == "__main__":
    exit_on_user_error(main)
