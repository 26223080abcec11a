"""Load models from runs, converted files and public checkpoints; convert them; list their layers.

    a run, a stage file of it, or a file that -o wrote           --load--> Loaded
    a public checkpoint --weight_files.py--> --public_names.py--> --load--> Loaded
    a run with a prior, or RUN/prior/last.pt               --load_prior--> Prior

Only files of -o and public ones hold a whole model. A run's decoder or prior is loaded with its
first stage, the run's own or that of `--vqgan`, whose weights must be those it was trained on.
"""

import argparse
import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import public_names
import run_folder
from asym_decoder import AsymDecoder, AsymVQGAN
from diffusion import MultinomialDiffusion
from distributed import UserError, exit_on_user_error, print0
from unet import UNet, UNetConfig
from vqgan import VQGAN, VQGANConfig
from weight_files import diffusers_folder, read_public, unreadable, write_safetensors

FIRST_STAGES = ("refit", "vqgan")       # in the order of preference
IMAGE_STAGES = ("decoder", *FIRST_STAGES)
# The names of modules that have a row in --layers.
ROW = re.compile(r".*(\.(block|attn)\.\d+|mid\.\w+|sample|(layers|fuse)\.\d+|conv_in|conv_out|"
                 r"norm_out|quant_conv|embedding)")
DEFAULT_STEPS = 100                     # reverse steps that draw a map of codes
SMALL_RUN = str(Path(__file__).parent / "notebooks" / "run")    # the demo's, in every clone


@dataclass
class Loaded:
    """Hold a model that is ready for use, and the facts in its file."""
    model:       nn.Module   # VQGAN or AsymVQGAN; eval mode, no gradients
    stage:       str         # "vqgan", "refit" or "decoder"
    config:      dict        # a run's settings; of a public file only "first_stage", "decoder"
    step:        int         # 0 for a public file
    finished:    bool        # whether the stage was trained to its end
    parent:      str         # weights_hash of the first stage
    latent_hash: str         # weights_hash of encoder, quant_conv and codebook
    notes:       list        # of weights that were dropped, added or cast


def load(path, device="cpu", stages=IMAGE_STAGES):
    """Load the VQGAN or AsymVQGAN at `path`: a Loaded. Raises UserError.

    path: a run folder, a file of train.py or convert.py, a public file, or a folder of diffusers.
    A run folder gives the first of `stages` that it has; an unfinished refit is skipped. The first
    stage in a public asymmetric model has no decoder.
    """
    path = Path(path)
    state, first_stage = _read(path, stages), None
    config, weights = VQGANConfig(**_tuples(state["config"]["first_stage"])), state["model"]
    size = state["config"]["decoder"] if state["stage"] == "decoder" else None
    if size and all(name.startswith("decoder.") for name in weights):    # other files hold it all
        parent = load_parent(state, path)
        first_stage, config = parent.model, parent.model.config
        state["config"] = public_names.stated(parent.config) | state["config"]
        weights = weights | first_stage.state_dict(prefix="first_stage.")
    elif size:
        weights = {name if name.startswith("decoder.") else f"first_stage.{name}": value
                   for name, value in weights.items()}
    # Build it without drawing random numbers.
    try:
        with torch.device("meta"):
            model = VQGAN(config, own_decoder=size is None or first_stage is not None)
            if size:
                model = AsymVQGAN(model, AsymDecoder(config, size["ch"], size["num_res_blocks"],
                                                     size["blend"]))
        model.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _misfit(path, error) from None
    model.float().eval().requires_grad_(False)   # notebooks/run and others are in half precision
    weights = model.first_stage.state_dict()
    encodes = {name: value for name, value in weights.items()
               if name.startswith(("encoder.", "quant_conv.", "quantize."))}
    return Loaded(model.to(device), state["stage"], state["config"], state["step"],
                  bool(state["extra"].get("finished")), run_folder.weights_hash(weights),
                  run_folder.weights_hash(encodes), state.get("notes", []))


def load_model(path, device="cpu"):
    """Load the VQGAN or AsymVQGAN at `path`, as `load` does."""
    return load(path, device).model


def load_first_stage(path):
    """Load the first stage at `path`, as `load` does. Raises UserError for a decoder's file."""
    return load(path, stages=FIRST_STAGES)


def _read(path, stages):
    """Read a file, or that of the first of `stages` in a run folder, as a stage file's contents."""
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such run folder or checkpoint")
    public = _is_public(path)
    if public or not path.is_dir():
        state = _read_public(path) if public else run_folder.load(path)
        if state["stage"] not in stages:
            raise UserError(f"{path} is a {state['stage']}; give a {' or '.join(stages)}")
        return state
    for stage in stages:
        state = run_folder.latest(path / stage)
        if state is not None and (stage != "refit" or state["extra"].get("finished")):
            return state
    names = " or ".join(f"{stage}/last.pt" for stage in stages)
    raise UserError(f"{path}: {names} is not in it; give a folder that has one, or run train.py "
                    f"with --stage {stages[-1]} as this run was made")


def _tuples(fields):
    """Turn the lists that a checkpoint keeps into tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


def load_parent(state, source):
    """Load the first stage that `source` (contents: `state`) was trained on, or raise UserError."""
    stage, where = state["stage"], state["config"].get("vqgan") or run_of(source)
    if not Path(where).exists():
        raise UserError(f"the {stage} in {source} needs the first stage {where}, which does not "
                        "exist; bring it back, or start from the folder of the training")
    first_stage = load_first_stage(where)
    if first_stage.parent != state["parent"]:
        raise UserError(f"the {stage} in {source} was trained on other first-stage weights than "
                        f"those in {where}; restore them, or train a new {stage}: "
                        f"train.py --stage {stage} --vqgan {where} --out NEW_RUN")
    return first_stage


def run_of(source):
    """Find the run folder: RUN/decoder/last.pt -> RUN, RUN -> RUN."""
    return source if source.is_dir() else source.parent.parent


def _is_public(path):
    """Tell whether `path` is a folder of diffusers, or a file that no program here wrote."""
    if not path.is_file():
        return diffusers_folder(path)[0] is not None
    with suppress(Exception):                    # read_public tells what is wrong with the file
        state = torch.load(path, map_location="meta", weights_only=True,
                           mmap=str(path).isprintable())         # as in read_tensors
        return not state.keys() >= {"format", "stage"}           # run_folder.save's
    return True


def _read_public(path):
    """Read a public model as a stage file's contents, with the sizes that the shapes tell."""
    public = read_public(path)
    try:
        stated = public_names.stated(public.config or {})        # diffusers' config.json
        weights, notes = public_names.complete(public_names.taming_names(public.state),
                                               public.config)
        groups = (public.config or {}).get("norm_num_groups") or 32
        config = public_names.first_stage_config(weights, groups)
        size = public_names.asym_decoder_size(weights, config)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise unreadable(public.path, error, "no autoencoder of this kind", "") from None
    return {"stage": "decoder" if size else "vqgan", "model": weights, "step": 0,
            "config": {"first_stage": asdict(config), "decoder": size, **stated},
            "extra": {"finished": True}, "notes": public.notes + notes}


def _misfit(source, error):
    reason = " ".join(str(error).split())[:400]
    return UserError(f"{source}: its weights do not fit the network of its sizes; it is of another "
                     f"kind, of another version or damaged: get it or train it again ({reason})")


def _file_names(model):
    """Name the weights as the authors do: {name: tensor}, without the vanilla of two decoders."""
    return {name.removeprefix("first_stage."): value for name, value in model.state_dict().items()
            if not name.startswith("first_stage.decoder.")}


@dataclass
class Prior:
    """Hold VQ-DDM's prior, ready to be sampled from, and the facts in its file."""
    unet:        UNet                   # the averaged weights; eval mode, no gradients
    diffusion:   MultinomialDiffusion
    first_stage: VQGAN                  # eval mode, no gradients, on the same device
    grid:        tuple                  # (h, w) of the maps that it was trained on
    config:      dict                   # the run's settings
    step:        int
    finished:    bool                   # whether it was trained to its end
    parent:      str                    # weights_hash of the first stage
    facts:       dict                   # the checkpoint's "extra": "K", "grid", "codes", ...

    @property
    def device(self):
        return self.first_stage.quantize.embedding.weight.device


def denoiser(settings, K):
    """Build the UNet and the diffusion of a run's settings["prior"], for K codes."""
    unet = UNet(UNetConfig(**_tuples(settings["net"])), K, settings["T"])
    return unet, MultinomialDiffusion(K, settings["T"], settings["residual"])


def load_prior(path, device="cpu"):
    """Load the Prior in a run folder or a prior's file, with its first stage. Raises UserError."""
    path = Path(path)
    state = _read(path, ("prior",))
    extra, first_stage = state["extra"], load_parent(state, path)
    try:
        unet, diffusion = denoiser(state["config"]["prior"], extra["K"])
        unet.load_state_dict(state["ema"]["weights"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _misfit(path, error) from None
    return Prior(unet.to(device).eval().requires_grad_(False), diffusion,
                 first_stage.model.to(device), tuple(extra["grid"]), state["config"], state["step"],
                 bool(extra.get("finished")), state["parent"], extra)


def chosen_steps(asked, T, most=DEFAULT_STEPS):
    """Give the number of steps: `asked`, or by default `most` but at most T. Raises UserError."""
    if asked is not None and not 1 <= asked <= T:
        raise UserError(f"--steps: give numbers from 1 to T = {T}, which this prior has")
    return asked or min(most, T)


def save_model(loaded, path):
    """Write a Loaded's weights, named by _file_names, to a new file. Raises UserError."""
    _check_new(path)
    state = {"format": run_folder.FORMAT, "stage": loaded.stage,
             "config": loaded.config | {"vqgan": None}, "model": _file_names(loaded.model),
             "ema": None, "optimizers": {}, "images": 0, "step": loaded.step, "parent": None,
             "extra": {"finished": loaded.finished}}
    run_folder.save(path, state)


def _check_new(path):
    """Raise UserError if `path` exists and is not an empty folder."""
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise UserError(f"{path} exists already: remove it, or choose another name")


def to_diffusers(model, folder, **stated):
    """Write a VQGAN or AsymVQGAN into `folder` for diffusers' from_pretrained: the two new paths.

    stated: fields of config.json, as public_names.diffusers_config takes them. Raises UserError
    for a model that diffusers cannot build and a folder that is not empty.
    """
    folder, weights = Path(folder), _file_names(model)
    try:
        size = public_names.asym_decoder_size(weights, model.config)
        fields = public_names.diffusers_config(model.config, size, **stated)
    except ValueError as error:
        raise UserError(f"--to-diffusers: {error}") from None
    _check_new(folder)
    made = [folder / "diffusion_pytorch_model.safetensors", folder / "config.json"]
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(made[0], public_names.diffusers_names(weights))
    run_folder.write_text(made[1], json.dumps(fields, indent=2) + "\n")
    return made


def count(model, run):
    """Count what run() does in each module of `model`: {module: (output shape, multiplications)}.

    Only convolutions, linear layers and attention's two products are counted. The model moves to
    the meta device, where only shapes are computed: it costs nothing, but its weights are gone.
    """
    started, counted = {}, {}

    def before(module, inputs):
        started[module] = counter.get_total_flops()

    def after(module, inputs, output):
        # torch counts a multiplication and the addition after it as two operations.
        number = (counter.get_total_flops() - started[module]) // 2
        output = output if isinstance(output, torch.Tensor) else output[0]
        counted[module] = output.shape[1:], number
    for module in model.to("meta").modules():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counted


def count_prior(unet, grid):
    """Count one call's multiplications for one map: in plain convolutions, in all. [DDM Tab. 2]"""
    counted = count(unet, lambda: unet(torch.zeros(1, *grid, dtype=torch.int64), torch.ones(1)))
    plain = sum(number for module, (_, number) in counted.items() if isinstance(module, nn.Conv2d))
    return plain, counted[unet][1]


def list_layers(model, size):
    """List a model's layers, for an image of size x size pixels. [AVQ Tab. 7] [AVQ Tab. 8]

    A row: part, l, name, layer, output shape, parameters, multiplications. Decoders are in the
    tables' order. Blends and the search for codes are not counted. `model` loses its weights.
    """
    first_stage, asym = model.first_stage, model is not model.first_stage

    def run():
        x, mask = torch.zeros(1, 3, size, size), torch.zeros(1, 1, size, size)
        latent = first_stage.moments(x)
        z = (latent.mode() if model.config.latent == "kl" else
             first_stage.quantize.lookup(latent[:, 0].long()))   # any codes; (1, d, h, w)
        z = first_stage.post_quant_conv(z)
        if first_stage.decoder is not None:
            first_stage.decoder(z)
        if asym:
            model.decoder(z, x, mask)
    counted, named, rows = count(model, run), {}, {}
    for name, module in model.named_modules(prefix="" if asym else "first_stage"):
        if ROW.fullmatch(name):                            # the blocks of a level share a row
            named.setdefault(re.sub(r"(block|attn)\.\d+$", r"\1", name), []).append(module)
    for name, same in named.items():
        kernel = "x".join(map(str, getattr(same[0], "kernel_size", ())))
        rows[name] = (f"{type(same[0]).__name__} {kernel or f'x {len(same)}'}".removesuffix(" x 1"),
                      counted[same[-1]][0],
                      sum(p.numel() for module in same for p in module.parameters()),
                      sum(counted[module][1] for module in same))
    for i, layer in enumerate(model.decoder.encoder.layers if asym else ()):
        (C, h, w), concat = counted[layer][0], model.decoder.blend == "concat"
        rows[f"decoder._blend({i})"] = ("Concat" if concat else "add",
                                        (2 * C + 1 if concat else C, h, w), 0, 0)
    # Order the rows: part, l, the start of their names.
    n = len(model.config.ch_mult)
    main = [("Out", start) for start in ("_blend(0)", "fuse.0", "norm_out", "conv_out")]
    main += [(i, start) for i in range(n)
             for start in (f"_blend({i + 1})", f"fuse.{i + 1}", f"up.{i}.")]
    main += [(n, "conv_in"), (n, "mid.")]
    latent = [("", start) for start in ("encoder.", "quant_conv", "quantize.", "post_quant_conv")]
    parts = (("Condition", "decoder.encoder.layers.", [(i, str(i)) for i in range(n + 1)]),
             ("Main", "decoder.", main), ("First stage's decoder", "first_stage.decoder.", main),
             ("First stage's encoder and latent", "first_stage.", latent))
    return [(part, place, name, *row) for part, whole, order in parts for place, start in order
            for name, row in rows.items() if name.startswith(whole + start)]


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Tell what a checkpoint is, list its layers, convert it.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a run folder, one of its files, a file that -o "
        "wrote, or a public one: .ckpt, .pt, .bin, .safetensors, or a folder of diffusers")
    add("-o", dest="output", metavar="FILE", help="write the whole model into one file that all "
        "programs here read")
    add("--to-diffusers", metavar="DIR", help="write a folder for diffusers' from_pretrained")
    add("--layers", action="store_true", help="print the network as AVQ's Tables 7 and 8 do, at "
        "the run's --size (public weights: 256), and count its prior as DDM's Table 2 does")
    args = parser.parse_args()
    # Load it. A folder with a prior only has its first stage elsewhere.
    path, made = Path(args.checkpoint), []
    prior = run_folder.latest(path / "prior") if args.layers else None
    alone = prior is not None and not any((path / stage).exists() for stage in IMAGE_STAGES)
    loaded = load_parent(prior, path) if alone else load(path)
    # Tell what it is.
    side = loaded.config.get("size") or 256
    trained = f"step {loaded.step}{'' if loaded.finished else ', not finished'}"
    stage = f"a prior on a {loaded.stage}" if alone else loaded.stage
    print0(f"{path}: {stage}, {trained if loaded.step else 'public weights'}")
    model, config, first_stage = loaded.model, loaded.model.config, loaded.model.first_stage
    kind = f"K {config.K}" if config.latent == "vq" else "KL latent"
    levels = f", attention in levels {config.attn_levels}" if config.attn_levels else ""
    absent = ", without a decoder of its own" if first_stage.decoder is None else ""
    print0(f"  first stage  {kind}, d {config.embed_dim}, f {config.f}, ch {config.ch}, ch_mult "
           f"{config.ch_mult}, num_res_blocks {config.num_res_blocks}{levels}; "
           f"{sum(p.numel() for p in first_stage.parameters()):,} parameters{absent}")
    if model is not first_stage:
        size = loaded.config["decoder"]
        print0("  decoder      {preset}, {blend}: ch {ch}, num_res_blocks {num_res_blocks}; {:,} "
               "parameters".format(sum(p.numel() for p in model.decoder.parameters()), **size))
    print0(f"  latents      hash {loaded.latent_hash[:16]}; equal hashes, equal latents")
    stated = public_names.stated(loaded.config)
    maps = ", ".join(f"{name} {value}" for name, value in stated.items() if name != "sample_size")
    if config.latent == "kl":
        unstated = f"scaling_factor {public_names.SCALING_FACTOR}, as none is stated"
        print0("  for a diffusion model: "
               + (maps or (unstated if config.z_channels == 4 else "no scaling_factor is stated")))
    for note in loaded.notes:
        print0(f"  note         {note}")
    # Write what is asked for. to_diffusers refuses before -o writes anything.
    if args.output:
        _check_new(args.output)
    if args.to_diffusers:
        pixels = loaded.config.get("size") or stated.get("sample_size", side)    # a run's own first
        made += to_diffusers(model, args.to_diffusers, **stated | {"sample_size": pixels})
    if args.output:
        save_model(loaded, args.output)
        made.append(args.output)
    if made and loaded.stage == "decoder" and first_stage.decoder is not None:
        print0("  left out     the first stage's own decoder, which has the same names")
    if made:
        print0("wrote " + ", ".join(str(path) for path in made))
    if args.layers:
        line = "{:>3} {:25} {:17} {:>12} {:>11} {:>17}"
        print0(f"\nOne image of {side} x {side} px; l and the order of AVQ's Tables 7 and 8; "
               "multiplications of\nconvolutions, linear layers and attention\n" + line.format(
                   "l", "name", "layer", "output", "parameters", "multiplications"))
        for part, rows in groupby(list_layers(model, side), lambda row: row[0]):
            parameters = total = 0
            print0(f"\n{part}")
            for _, place, name, layer, shape, n, number in rows:
                print0(line.format(place, name.partition(".")[2], layer, "x".join(map(str, shape)),
                                   f"{n:,}", f"{number:,}"))
                parameters, total = parameters + n, total + number
            print0(line.format("", "total", "", "", f"{parameters:,}", f"{total:,}"))
        if prior:
            grid, name = prior["extra"]["grid"], prior["config"]["prior"]["unet"]
            with torch.device("meta"):
                unet, _ = denoiser(prior["config"]["prior"], prior["extra"]["K"])
            plain, total = count_prior(unet, grid)
            print0(f"\nPrior {name}: {sum(p.numel() for p in unet.parameters()):,} parameters; one "
                   f"call for {grid[0]} x {grid[1]} codes:\n{plain:,} multiplications in plain "
                   f"convolutions, as in DDM's Table 2, {total:,} in all")


if __name__ == "__main__":
    exit_on_user_error(main)
