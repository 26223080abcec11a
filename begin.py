"""What each stage starts from, and what it looks at: networks, training items, held-out batches.

    vqgan     random weights                                            pictures
    refit     RUN/vqgan (or --vqgan), its codebook built anew           pictures
    decoder   the first stage, frozen, and its own decoder as trunk     pictures and masks
    prior     the first stage, frozen                                   its codes of the pictures

"The first stage" is RUN/refit where that is finished, else what --vqgan names, else RUN/vqgan; its
hash goes into the checkpoint as `parent`. A stage begins the same however often it is begun, but a
refit that goes on takes the codebook from its own checkpoint. Not here: the table of stages and the
loop (train.py), what a step is (stages.py).
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

import run_folder
from codes import CodeItems, code_maps
from convert import denoiser, load_first_stage
from data import TrainingItems, pixels, validation_batches, views
from diffusion import histogram_nats
from distributed import UserError, gather_objects, on_rank0, print0, rank, world_size
from losses import LPIPS
from quantize import code_statistics, count_codes, nearest_code
from refit import install_codebook, rebuild_codebook, sample_features
from seeding import STAGE_IDS, stage_seed
from stages import (
    CodeBatch,
    Recipe,
    build_decoder,
    build_prior,
    build_refit,
    build_vqgan,
    validation_batch,
)
from vqgan import VQGANConfig

VALIDATION_IMAGES, VALIDATION_MAPS, SAMPLE_IMAGES = 64, 256, 6
ENCODED = 32            # pictures at once where codes are counted


@dataclass
class Run:
    """What all stages of one call of train.py share."""

    settings:      dict             # what the flags resolved to, the run's config.json
    out:           Path
    device:        torch.device
    channels_last: bool
    workers:       int
    micro_batch:   int | None       # as asked for
    save_every:    int              # steps
    deadline:      float            # on time.monotonic's clock
    signals:       list             # that asked this process to leave
    train_set:     object           # data.Signs or data.ImageFiles
    val_set:       object


# -- networks --------------------------------------------------------------------------------------


def _options(run, name):
    """What all stages.build_* take."""
    return {"recipe": Recipe(**run.settings["recipes"][name]), "device": run.device,
            "precision": run.settings["precision"], "channels_last": run.channels_last}


def _perceptual(run):
    net = run.settings["perceptual"]
    return None if net == "none" else LPIPS(net, run.settings["weights"]).to(run.device)


def begin_vqgan(run, state):
    """A Trainee; state: the stage's last checkpoint, whose weights it is about to get, or None."""
    config = VQGANConfig(**run.settings["first_stage"])
    trainee = build_vqgan(config, perceptual=_perceptual(run), **_options(run, "vqgan"))
    trainee.model.decoder.checkpointing = run.settings["checkpointing"]
    return trainee


def begin_refit(run, state):
    """As begin_vqgan. The codebook is built only where there is no checkpoint yet."""
    source = Path(run.settings["vqgan"] or run.out / "vqgan" / "last.pt")
    first_stage = load_first_stage(source)
    _warn_unless_finished(run, "refit", first_stage, source)
    model, facts = first_stage.model.to(run.device), {}
    if state is None:
        codebook, facts = _new_codes(run, model)
    else:
        codebook = state["model"]["quantize.embedding.weight"]
    install_codebook(model, codebook)
    trainee = build_refit(model, perceptual=_perceptual(run), **_options(run, "refit"))
    trainee.model.decoder.checkpointing = run.settings["checkpointing"]
    trainee.parent, trainee.facts = first_stage.parent, facts
    trainee.config = {"first_stage": asdict(model.config)}        # with the new K
    if state is None:
        _continue_discriminator(trainee, source)
    return trainee


def begin_decoder(run, state):
    """As begin_vqgan."""
    first_stage, where = _first_stage(run, "decoder")
    size = run.settings["decoder"]
    trainee = build_decoder(first_stage.model, size["preset"], size["blend"],
                            perceptual=_perceptual(run), **_options(run, "decoder"))
    trainee.model.decoder.checkpointing = run.settings["checkpointing"]
    trainee.parent, trainee.config = first_stage.parent, {"vqgan": where}
    return trainee


def begin_prior(run, state):
    """As begin_vqgan."""
    first_stage, where = _first_stage(run, "prior")
    settings = run.settings["prior"]
    unet, diffusion = denoiser(settings, first_stage.model.config.K)
    options = _options(run, "prior")
    if options["recipe"].code_start:
        start_from_codes(unet, first_stage.model.quantize.embedding.weight)
    trainee = build_prior(unet, diffusion, settings["ema"], first_stage.model, **options)
    trainee.parent, trainee.config = first_stage.parent, {"vqgan": where}
    return trainee


@torch.no_grad()
def start_from_codes(unet, codebook):
    """Let codes that look alike start alike: in and out, by their places in the codebook (K,d).

    deviation D48
    As many of the codebook's principal axes as there are columns, with variance 1 over all; the
    embedding keeps a tenth of its noise, the last layer, which was zero, gets a tenth of the
    places, so that x̂0 is still nearly uniform. Without, all codes are equally far from each other,
    and what is learnt of one says nothing of its neighbours.
    """
    centred = codebook - codebook.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh                # (n, d)
    places = centred @ axes.T                                               # (K, n)
    places = places / places.std()
    embedding, logits = unet.embedding.weight, unet.logits.weight           # (K, C), (K, C', 1, 1)
    into, out = (min(places.shape[1], weight.shape[1]) for weight in (embedding, logits))
    embedding.mul_(0.1)
    embedding[:, :into] += places[:, :into]
    logits[:, :out, 0, 0] += 0.1 * places[:, :out]


def _first_stage(run, name):
    """(convert.Loaded, where) that the stage `name` stands on; where: None is the run itself."""
    refit = run_folder.latest(run.out / "refit")
    if refit is not None and refit["extra"].get("finished"):
        return load_first_stage(run.out), None
    where = run.settings["vqgan"]
    first_stage = load_first_stage(where or run.out)
    _warn_unless_finished(run, name, first_stage, where or run.out)
    if refit is not None:
        print0(f"{name}: warning: the refit in {run.out} is not finished, and this {name} stands "
               "on the first stage before it: finish it first, with the command that began it")
    return first_stage, where


def _warn_unless_finished(run, name, first_stage, where):
    if not first_stage.finished:
        print0(f"{name}: warning: the first stage in {where} is not finished (step "
               f"{first_stage.step}), and a {name} is bound to these very weights: finish it "
               "first, with the command that began it")


# -- new codes -------------------------------------------------------------------------------------


def _pictures(run, dataset, batches):
    """x of each list of indices."""
    for image, _ in views(dataset, batches, run.workers):
        yield pixels(image, run.device, run.channels_last)


def _new_codes(run, model):
    """(codebook (K,d), what the checkpoint tells of it). [DDM Sec. 3.2]"""
    K, P = run.settings["refit"]["K"], run.settings["refit"]["samples"]
    print0(f"\nrefit: sampling {P:,} features of {len(run.train_set):,} pictures for {K:,} codes")
    if run.channels_last:
        model.to(memory_format=torch.channels_last)
    key = run.settings["seed"], STAGE_IDS["refit"]
    features = sample_features(model.moments, partial(_pictures, run, run.train_set),
                               len(run.train_set), P, key).to(run.device)
    generator = torch.Generator().manual_seed(stage_seed(run.settings["seed"], "refit"))
    # Once for all, as other processors may round otherwise.
    codebook, inertia = on_rank0(lambda: _on_cpu(rebuild_codebook(features, K,
                                                                  generator=generator)))
    usage = _usage(run, model, codebook)
    facts = {"K": K, "samples": P, "inertia": [inertia[0], inertia[-1]],
             "moves": len(inertia) - 1, "val": usage}
    before, after = usage["before"], usage["after"]
    print0(f"refit: inertia {inertia[0]:.5g} at the seeds, {inertia[-1]:.5g} after "
           f"{len(inertia) - 1} moves; held out, {100 * before['usage']:.1f} % of {before['K']:,} "
           f"codes in use before (perplexity {before['perplexity']:.1f}), "
           f"{100 * after['usage']:.1f} % of {after['K']:,} after ({after['perplexity']:.1f})")
    return codebook, facts


def _on_cpu(codes_and_inertia):
    codebook, inertia = codes_and_inertia
    return codebook.cpu(), inertia


@torch.no_grad()
def _usage(run, model, codebook):
    """{"before", "after"}: code_statistics of both codebooks over all held-out pictures."""
    books = {"before": model.quantize.embedding.weight, "after": codebook.to(run.device)}
    counts = {when: torch.zeros(len(book), dtype=torch.int64) for when, book in books.items()}
    starts = range(0, len(run.val_set), ENCODED)[rank()::world_size()]
    batches = (range(i, min(i + ENCODED, len(run.val_set))) for i in starts)
    for x in _pictures(run, run.val_set, batches):
        z_e = model.moments(x).permute(0, 2, 3, 1).flatten(0, 2)            # (b·h·w, d)
        for when, book in books.items():
            counts[when] += count_codes([nearest_code(z_e, book)], len(book))
    return {when: code_statistics(sum(gather_objects(share))) for when, share in counts.items()}


def _continue_discriminator(trainee, source):
    """Where `source` is of a run of ours, its discriminator goes on: it knows the pictures.

    deviation D45
    """
    try:
        state = run_folder.latest(source / "vqgan") if source.is_dir() else run_folder.load(source)
    except UserError:                        # a file of others
        state = None
    kept = state["extra"].get("discriminator") if state else None
    new = trainee.discriminator.state_dict()
    if kept and {k: v.shape for k, v in kept.items()} == {k: v.shape for k, v in new.items()}:
        trainee.discriminator.load_state_dict(kept)
    else:
        print0(f"refit: {source} has no discriminator of this size; it starts anew")


# -- what a stage looks at -------------------------------------------------------------------------


def picture_items(run, trainee, steps, masks):
    """The pictures of training, of which every position of the run has one."""
    r = trainee.recipe
    return TrainingItems(run.train_set, run.settings["seed"], STAGE_IDS[trainee.stage], masks,
                         r.p_full, r.mask_kind)


def code_items(run, trainee, steps):
    """The codes of training; of no more pictures than `steps` steps will look at."""
    r, K = trainee.recipe, trainee.first_stage.config.K
    n = min(len(run.train_set), steps * r.batch_size, r.max_maps or math.inf)
    print0(f"\nprior: learns the codes of {n:,} pictures, kept in {run.out / 'codes'}")
    codes = code_maps(partial(_indices, run, trainee), run.train_set, n, K, trainee.parent,
                      run.out / "codes", run.workers)
    return CodeItems(codes, run.settings["seed"], STAGE_IDS["prior"])


@torch.no_grad()
def _indices(run, trainee, image):
    """uint8 (b,3,H,W) -> codes (b,h,w), in float32 as whoever asks for codes later."""
    return trainee.first_stage.indices(pixels(image, run.device, run.channels_last))


def held_out_pictures(run, trainee, items, size):
    """The first held-out pictures with their evaluation masks: a list of Batches."""
    return [validation_batch(batch, run.device, run.channels_last)
            for batch in validation_batches(run.val_set, VALIDATION_IMAGES, size)]


def held_out_codes(run, trainee, items, size):
    """The first held-out pictures and their codes: a list of CodeBatches.

    Notes in trainee.facts what those maps cost a model that knows nothing and one that knows only
    how often each code occurs at each cell, both in nats a map.
    """
    n, K = min(VALIDATION_MAPS, len(run.val_set)), trainee.first_stage.config.K
    ranges = (range(i, min(i + size, n)) for i in range(0, n, size))
    batches = [CodeBatch(_indices(run, trainee, image), None, pixels(image, run.device))
               for image, _ in views(run.val_set, ranges)]
    maps = torch.cat([batch.indices for batch in batches]).cpu().numpy()    # (n, h, w)
    trainee.facts |= {"K": K, "grid": list(maps.shape[1:]), "maps": len(items.codes),
                      "uniform_nats": maps[0].size * math.log(K),
                      "histogram_nats": histogram_nats(items.codes, maps, K)}
    return batches
