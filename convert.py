"""Load models from runs, files of ours and public checkpoints; write them for us and for diffusers.

    a run, or its stage file: a decoder and the first stage it stands on --------------+
    a file that -o wrote: all of one model --------------------------------------------+--> Loaded
    Stable Diffusion's, taming's, the authors', diffusers' --weight_files, public_names-+
    RUN/prior/last.pt, and the first stage that it was trained on --load_prior------------> Prior

    python convert.py CHECKPOINT                       says what it is
    python convert.py CHECKPOINT -o FILE               makes one file of ours of it
    python convert.py CHECKPOINT --to-diffusers DIR    makes a folder that from_pretrained opens

A run's decoder file holds the decoder only. Its first stage is the run's own, or the one that
`--vqgan` named, and must still be the very weights that the decoder was trained on: the latents of
others mean nothing to it. Loading is strict: no weight is missing, none is left over.
"""

import argparse
import json
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

import run_folder
from asym_decoder import AsymDecoder, AsymVQGAN
from diffusion import MultinomialDiffusion
from distributed import UserError, exit_on_user_error, print0
from public_names import (
    asym_decoder_size,
    diffusers_config,
    diffusers_names,
    first_stage_config,
    taming_names,
    tidy,
)
from unet import UNet, UNetConfig
from vqgan import VQGAN, VQGANConfig
from weight_files import diffusers_folder, read_public, write_safetensors

FIRST_STAGES = ("refit", "vqgan")       # the order in which a run's first stage is looked for
STAGES = ("decoder", *FIRST_STAGES)
SCALING_FACTOR = 0.18215                # Stable Diffusion's; a diffusion model's, not the weights'
STEPS = 100                             # that a map is drawn in, where nobody says


@dataclass
class Loaded:
    """A model, ready to be used, and what its file says about it."""

    model:    nn.Module      # VQGAN or AsymVQGAN; eval mode, no gradients
    stage:    str            # "vqgan", "refit" or "decoder"
    config:   dict           # a run's resolved settings; of public ones "first_stage", "decoder"
    step:     int            # 0 for public ones
    finished: bool           # whether that stage's training came to its end
    parent:   str            # weights_hash of the first stage
    latents:  str            # the same of what makes latents: equal ones mean the same latents
    notes:    list = field(default_factory=list)     # what was dropped, stood in for or cast


# -- from files to models --------------------------------------------------------------------------


def load_model(path, device="cpu"):
    """The VQGAN or AsymVQGAN at `path`, in eval mode, without gradients.

    path: a run folder (its decoder, where it has one; else its first stage), one of our files, or a
    public checkpoint: a file, or a folder of diffusers. An asymmetric one of these comes with a
    first stage that has no decoder of its own. Raises UserError: nothing there, nothing that can be
    built here, or a decoder whose first stage is missing or has changed.
    """
    return load(path, device).model


def load(path, device="cpu"):
    """As load_model, together with what the file says: a Loaded."""
    path = Path(path)
    loaded = _public(path) if _is_public(path) else _ours(*_read(path, STAGES))
    loaded.model.to(device)
    return loaded


def load_first_stage(path):
    """The first stage at `path`, which may be what load_model takes: a Loaded, its model a VQGAN.

    In eval mode, without gradients, on the CPU. A finished refit goes before the vqgan that it came
    from. Raises UserError as load_model does, and for a file with an asymmetric decoder.
    """
    path = Path(path)
    if _is_public(path):
        loaded = _public(path)
        if loaded.stage != "decoder":
            return loaded
    else:
        state, source = _read(path, FIRST_STAGES)
        if state["stage"] != "decoder":
            return _ours(state, source)
    raise UserError(f"{path} is a decoder, not a first stage; give the run or the file that has "
                    "the first stage's own decoder, such as Stable Diffusion's")


def _read(path, stages):
    """(contents, Path) of a stage file, or of the first of `stages` that a run folder has."""
    if not path.exists():
        raise UserError(f"{path}: no such run folder or checkpoint")
    if path.is_file():
        state = run_folder.load(path)
        if state["stage"] not in STAGES:
            raise UserError(f"{path}: a {state['stage']} file makes no pictures; "
                            "give a vqgan or decoder file")
        return state, path
    for stage in stages:
        state = run_folder.latest(path / stage)
        if state is not None and (stage != "refit" or state["extra"].get("finished")):
            return state, path
    names = ", ".join(f"{stage}/last.pt" for stage in stages)
    raise UserError(f"{path}: none of {names} is in it; give a folder that train.py wrote to, or "
                    "one of diffusers")


def _ours(state, source):
    """The Loaded of a stage file's contents."""
    size = state["config"]["decoder"] if state["stage"] == "decoder" else None
    if size and all(name.startswith("decoder.") for name in state["model"]):
        first_stage = first_stage_of(state, source)
        weights = {name.removeprefix("decoder."): value for name, value in state["model"].items()}
        decoder = _filled(source, weights, lambda: AsymDecoder(
            first_stage.model.config, size["ch"], size["num_res_blocks"], size["blend"]))
        return _loaded(AsymVQGAN(first_stage.model, decoder), state, first_stage)
    fields = state["config"]["first_stage"].items()
    config = VQGANConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields})
    return _loaded(_network(source, state["model"], config, size), state)


def first_stage_of(state, source):
    """The Loaded first stage that a decoder's or prior's file, `state`, was trained on.

    source: that file, or its run folder. Raises UserError where it is missing or has changed.
    """
    stage, where = state["stage"], state["config"].get("vqgan") or run_of(source)
    if not Path(where).exists():
        raise UserError(f"the {stage} in {source} stands on the first stage {where}, which is not "
                        f"there; bring it back, or start from the folder where the {stage} was "
                        "trained")
    first_stage = load_first_stage(where)
    if first_stage.parent != state["parent"]:
        raise UserError(f"the {stage} in {source} was trained on other first-stage weights than "
                        f"{where} holds; bring those back, or train a {stage} on these: "
                        f"train.py --stage {stage} --vqgan {where} --out NEW_RUN")
    return first_stage


def run_of(source):
    """The run folder of a stage file, RUN/decoder/last.pt -> RUN, or of itself."""
    return source if source.is_dir() else source.parent.parent


def _is_public(path):
    """Whether others wrote `path`: a file that is not ours, a folder of diffusers."""
    if path.is_dir():
        return diffusers_folder(path) is not None
    if not path.exists():
        return False
    try:                        # the pickles of all our files begin with these two keys
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                head = file.read(100)
    except Exception:           # whatever is wrong with it, read_public says so
        return True
    return not (b"format" in head and b"stage" in head)


def _public(path):
    """The Loaded of a public checkpoint."""
    public = read_public(path)
    stated = public.config or {}
    try:
        weights, notes = tidy(taming_names(public.state))
        config = first_stage_config(weights, stated.get("norm_num_groups") or 32)
        size = asym_decoder_size(weights, config)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{public.path}: no autoencoder of this kind "
                        f"({type(error).__name__}: {error})") from None
    model = _network(public.path, weights, config, size)
    if public.dropped:
        counts = ", ".join(f"{family} ({count})" for family, count in public.dropped.items())
        notes.insert(0, f"keys that are no first stage's, left out: {counts}")
    settings = {"first_stage": asdict(config), "decoder": size}
    if stated.get("scaling_factor"):
        settings["scaling_factor"] = stated["scaling_factor"]
    state = {"stage": "decoder" if size else "vqgan", "config": settings, "step": 0,
             "extra": {"finished": True}}
    return _loaded(model, state, notes=public.notes + notes)


def _loaded(model, state, first_stage=None, notes=()):
    """first_stage: its Loaded, where there is one, whose hashes are known."""
    model.eval().requires_grad_(False)
    if first_stage is None:
        weights = model.first_stage.state_dict()
        parent, latents = run_folder.weights_hash(weights), run_folder.weights_hash(
            {name: value for name, value in weights.items()
             if name.startswith(("encoder.", "quant_conv.", "quantize."))})
    else:
        parent, latents = first_stage.parent, first_stage.latents
    return Loaded(model, state["stage"], state["config"], state["step"],
                  bool(state["extra"].get("finished")), parent, latents, list(notes))


def _network(source, weights, config, size):
    """A VQGAN; with an asymmetric decoder's size, an AsymVQGAN that has no other decoder.

    weights: with the authors' names, as in _file_names.
    """
    if size is None:
        return _filled(source, weights, lambda: VQGAN(config))
    inner = {name if name.startswith("decoder.") else f"first_stage.{name}": value
             for name, value in weights.items()}
    return _filled(source, inner, lambda: AsymVQGAN(
        VQGAN(config, own_decoder=False),
        AsymDecoder(config, size["ch"], size["num_res_blocks"], size["blend"])))


def _filled(source, weights, build):
    """`build()`'s module with `weights` in it, strictly; no random number is drawn on the way."""
    try:
        with torch.device("meta"):
            module = build()
        module.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"{source}: its weights do not fit the network of its sizes; it is damaged "
                        f"or of another kind ({reason})") from None
    return module


def _file_names(model):
    """The model's weights with the authors' names; of two decoders the asymmetric one."""
    return {name.removeprefix("first_stage."): value for name, value in model.state_dict().items()
            if not name.startswith("first_stage.decoder.")}


# -- the prior -------------------------------------------------------------------------------------


@dataclass
class Prior:
    """VQ-DDM's prior, ready to be sampled from, and what its file says about it.

    `diffusion.sample(unet, (B, *grid), ...)` gives codes for `first_stage.decode_indices`.
    """

    unet:        UNet                   # the averaged weights; eval mode, no gradients
    diffusion:   MultinomialDiffusion
    first_stage: VQGAN                  # likewise, on the same device
    grid:        tuple                  # (h, w) of the maps that it was trained on
    config:      dict                   # the resolved settings of the run
    step:        int
    finished:    bool                   # whether its training came to its end
    parent:      str                    # weights_hash of the first stage
    facts:       dict                   # "score": bound on held-out maps in nats a map, "maps": how
                                        # many pictures it has learnt, "K", "grid", ...

    @property
    def device(self):
        """Where the network and the first stage are."""
        return self.first_stage.quantize.embedding.weight.device


def denoiser(settings, K):
    """The network and the process that a run's settings["prior"] name, for K codes.

    -> (UNet with random weights, MultinomialDiffusion). Raises UserError for a process that is not
    the papers'.
    """
    for name, ours in (("schedule", "cosine"), ("form", "theta")):
        if settings.get(name, ours) != ours:
            raise UserError(f"this prior was trained with {name} {settings[name]!r}, which is no "
                            f"longer here; train one with {ours!r}, as train.py does")
    net = {name: tuple(value) if isinstance(value, list) else value
           for name, value in settings["net"].items()}
    if net.pop("layout", "multinomial") == "ddpm" or net.pop("attention", "linear") == "full":
        raise UserError("this prior's network has DDPM's layout, which is no longer here: both "
                        "presets have the paper's; train it anew")
    T = settings["T"]
    return UNet(UNetConfig(**net), K, T), MultinomialDiffusion(K, T, settings["residual"])


def load_prior(path, device="cpu"):
    """The Prior at `path`, a run folder or a prior's file.

    Codes mean nothing without the first stage that they are of, so it comes along. Raises
    UserError: nothing there, a file of another stage, or a prior whose first stage is missing or
    has changed.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run folder or checkpoint")
    state = run_folder.load(path) if path.is_file() else run_folder.latest(path / "prior")
    if state is None:
        raise UserError(f"{path}: prior/last.pt is not in it; train one: "
                        f"train.py --stage prior --vqgan {path} --out NEW_RUN, or with the command "
                        "that made this run")
    if state["stage"] != "prior":
        raise UserError(f"{path}: a {state['stage']} file, not a prior's; give its run folder")
    config, extra = state["config"], state["extra"]
    first_stage = first_stage_of(state, path)
    try:
        unet, diffusion = denoiser(config["prior"], extra["K"])
        unet.load_state_dict(state["ema"]["weights"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"{path}: the prior's weights do not fit its network; another version made "
                        f"it, train it again ({reason})") from None
    return Prior(unet.to(device).eval().requires_grad_(False), diffusion,
                 first_stage.model.to(device), tuple(extra["grid"]), config, state["step"],
                 bool(extra.get("finished")), state["parent"], extra)


def chosen_steps(asked, T, most=STEPS):
    """The number of steps where `asked` of T are wanted; None for `most`, or T if that is less."""
    if asked is not None and not 1 <= asked <= T:
        raise UserError(f"--steps: give numbers from 1 to T = {T}, which this prior has")
    return asked or min(most, T)


# -- from models to files --------------------------------------------------------------------------


def save_model(loaded, path):
    """Write all of a Loaded's model into one file of ours, which load and load_model read.

    Of a run with a decoder, the first stage's own decoder is left behind: the names of the two are
    the same. Raises UserError where `path` exists already, and where the disk refuses.
    """
    _check_new(path)
    state = {"format": run_folder.FORMAT, "stage": loaded.stage,
             "config": loaded.config | {"vqgan": None}, "model": _file_names(loaded.model),
             "ema": None, "optimizers": {}, "images": 0, "step": loaded.step, "parent": None,
             "extra": {"finished": loaded.finished}}
    run_folder.save(path, state, keep_previous=False)


def _check_new(path):
    """Raise UserError unless nothing is at `path`, or an empty folder."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already and is not overwritten; choose another name, or "
                        "remove it first")


def to_diffusers(model, folder, scaling_factor=SCALING_FACTOR, sample_size=256):
    """Write a VQGAN or AsymVQGAN into `folder` for diffusers' from_pretrained; the paths made.

    An AsymVQGAN becomes an AsymmetricAutoencoderKL, a VQGAN an AutoencoderKL or a VQModel.
    scaling_factor: what the diffusion model multiplies latents by; sample_size: px. Raises
    UserError: a model that diffusers cannot build, a folder that is not empty, a full disk.
    """
    folder, weights = Path(folder), _file_names(model)
    try:
        fields = diffusers_config(model.config, asym_decoder_size(weights, model.config),
                                  scaling_factor, sample_size)
    except ValueError as error:
        raise UserError(f"--to-diffusers: {error}") from None
    _check_new(folder)
    made = [folder / "diffusion_pytorch_model.safetensors", folder / "config.json"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(made[0], diffusers_names(weights))
        run_folder.write_text(made[1], json.dumps(fields, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; make room or choose "
                        "another folder") from None
    return made


# -- the program -----------------------------------------------------------------------------------


def describe(loaded):
    """What a Loaded is, in lines of text."""
    model, first_stage = loaded.model, loaded.model.first_stage
    config = model.config
    kind = f"K {config.K}" if config.latent == "vq" else "KL latent"
    levels = f", attention in levels {config.attn_levels}" if config.attn_levels else ""
    absent = ", without a decoder of its own" if first_stage.decoder is None else ""
    lines = [("first stage", f"{kind}, d {config.embed_dim}, f {config.f}, ch {config.ch}, ch_mult "
              f"{config.ch_mult}, num_res_blocks {config.num_res_blocks}{levels}; "
              f"{_parameters(first_stage)}{absent}")]
    if model is not first_stage:
        size = asym_decoder_size(_file_names(model), config)
        lines.append(("decoder", f"{size['preset']}, {size['blend']}: ch {size['ch']}, "
                      f"num_res_blocks {size['num_res_blocks']}; {_parameters(model.decoder)}"))
    lines.append(("latents", f"{loaded.latents[:16]}, equal wherever they are the same"))
    lines += [("note", note) for note in loaded.notes]
    return "\n".join(f"  {title:12} {text}" for title, text in lines)


def _parameters(module):
    return f"{sum(p.numel() for p in module.parameters()):,} parameters"


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="What a checkpoint is; and, if asked for, the same as a file of ours or as a "
                    "folder for diffusers.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="a run folder, a file of ours, or a public checkpoint: a .ckpt, .pt, "
                             ".bin or .safetensors file, or a folder of diffusers")
    parser.add_argument("-o", metavar="FILE", dest="output",
                        help="write all of the model into one file of ours")
    parser.add_argument("--to-diffusers", metavar="DIR",
                        help="write a folder that diffusers' from_pretrained opens")
    args = parser.parse_args()
    loaded, made = load(args.checkpoint), []
    trained = f"step {loaded.step}{'' if loaded.finished else ', not finished'}"
    print0(f"{args.checkpoint}: {loaded.stage}, {trained if loaded.step else 'public weights'}")
    print0(describe(loaded))
    if args.output:
        _check_new(args.output)          # before anything is written
    if args.to_diffusers:
        made += to_diffusers(loaded.model, args.to_diffusers,
                             loaded.config.get("scaling_factor", SCALING_FACTOR),
                             loaded.config.get("size") or 256)
    if args.output:
        save_model(loaded, args.output)
        made.append(args.output)
    if made and loaded.stage == "decoder" and loaded.model.first_stage.decoder is not None:
        print0("  left out     the first stage's own decoder, as only one has these names")
    if made:
        print0("wrote " + ", ".join(str(path) for path in made))


if __name__ == "__main__":
    exit_on_user_error(main)
