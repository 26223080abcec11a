"""A stage's state: what a checkpoint holds of it, and going on from there.

    Trainee, record, extra --save--> STAGE/last.pt, best.pt
    STAGE/last.pt --start_or_resume--> Trainee, steps done, extra

The state of a stage is its weights, its optimisers, its discriminator or its average and history,
and the number of steps done; everything random is a function of the seed, the stage and an image's
position in the run. Not here: how a file is written so that a kill cannot harm it (run_folder.py).
"""

import math

import run_folder
from distributed import UserError, gather_objects
from stages import load_stage_weights, stage_weights


def start_or_resume(run, name, build):
    """(Trainee, steps done, extra); -1 steps where nothing was ever saved.

    build: (name, run, state or None) -> the Trainee at its start. Every process reads the
    checkpoint for itself. Raises UserError where they do not find the same one, and where what the
    stage stands on has changed.
    """
    folder = run.out / name
    state = run_folder.latest(folder)
    found = gather_objects(state["step"] if state else -1)
    if len(set(found)) > 1:
        raise UserError(f"{folder}: the processes find different checkpoints there (steps {found});"
                        " --out must be on a file system that all machines share")
    trainee = build(name, run, state)
    if state is None:
        return trainee, -1, {"finished": False}
    if state["parent"] != trainee.parent:
        where = trainee.config.get("vqgan") or run.settings["vqgan"] or run.out
        raise UserError(f"{folder} was trained on another first stage than {where} holds now; "
                        f"bring the old one back, or train a {name} on the new one: "
                        f"--stage {name} --vqgan {where} --out NEW_RUN")
    _load(trainee, state)
    return trainee, state["step"], state["extra"]


def _load(trainee, state):
    """Everything of the state but `extra`, from which what was loaded is taken out."""
    load_stage_weights(trainee, state["model"])
    for key, optimizer in trainee.optimizers.items():
        kept = state["optimizers"][key]
        for group in kept["param_groups"]:            # another device may be in use now
            group["fused"] = optimizer.param_groups[0]["fused"]
        optimizer.load_state_dict(kept)
    if trainee.discriminator is not None:
        trainee.discriminator.load_state_dict(state["extra"].pop("discriminator"))
    if trainee.ema is not None:
        trainee.ema.load_state_dict(state["ema"])
        trainee.timesteps.load_state_dict(state["extra"].pop("timesteps"))


def save(folder, settings, trainee, record, extra):
    """last.pt; and best.pt where the held-out score is lowest.

    The score: the L1, for a decoder with mask plus without; a prior's bound. extra: what a resumed
    stage must know besides; the scores are noted in it.
    """
    score = sum(value for key, value in record.items() if key.startswith(("val_pixel", "val_vlb")))
    extra["score"] = score
    extra.setdefault("first_score", score)
    better = score < extra.get("best", math.inf)
    extra["best"] = score if better else extra["best"]
    own = {}
    if trainee.discriminator is not None:
        own["discriminator"] = trainee.discriminator.state_dict()
    if trainee.ema is not None:
        own["timesteps"] = trainee.timesteps.state_dict()
    optimizers = {key: optimizer.state_dict() for key, optimizer in trainee.optimizers.items()}
    state = {"format": run_folder.FORMAT, "stage": trainee.stage,
             "config": settings | trainee.config, "model": stage_weights(trainee),
             "ema": trainee.ema.state_dict() if trainee.ema else None, "optimizers": optimizers,
             "images": record["images"], "step": record["step"], "parent": trainee.parent,
             "extra": {**extra, **own}}
    if better:              # first: a kill in between repeats the steps after last.pt, and this one
        run_folder.save(folder / "best.pt", state, keep_previous=False)
    run_folder.save(folder / "last.pt", state)


def stop_unless_finite(name, step, terms):
    """Raise UserError, on every rank, where any rank's number is not finite: nothing is saved."""
    broken = [term for term, value in terms.items() if not math.isfinite(value)]
    if broken:
        raise UserError(f"{name} step {step}: {', '.join(broken)} not finite; the last checkpoint "
                        "is good, the weights that led here are not saved. Begin anew with a lower "
                        "--lr (--restart), or with --precision fp32")
