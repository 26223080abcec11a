"""Load models from runs, files of ours and public checkpoints; write them for us and for diffusers.

    a run, or its stage file: a decoder and the first stage it stands on --------------+
    a file that -o wrote: all of one model --------------------------------------------+--> Loaded
    Stable Diffusion's, taming's, the authors', diffusers' --weight_files, public_names-+
    RUN/prior/last.pt, and the first stage that it was trained on --load_prior------------> Prior

    python convert.py CHECKPOINT                       says what it is
    python convert.py CHECKPOINT --layers              lists its layers as AVQ's Tables 7 and 8 do
    python convert.py CHECKPOINT -o FILE               makes one file of ours of it
    python convert.py CHECKPOINT --to-diffusers DIR    makes a folder that from_pretrained opens

A run's decoder file holds the decoder only. Its first stage is the run's own, or the one that
`--vqgan` named, and must still be the very weights that the decoder was trained on.
"""

import argparse
import json
import re
import zipfile
from dataclasses import asdict, dataclass, field
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
from vqgan import VQGAN, AttnBlock, Downsample, ResBlock, Upsample, VQGANConfig
from weight_files import diffusers_folder, read_public, write_safetensors

FIRST_STAGES = ("refit", "vqgan")       # the order in which a run's first stage is looked for
STAGES = ("decoder", *FIRST_STAGES)
SCALING_FACTOR = 0.18215                # Stable Diffusion's; a diffusion model's, not the weights'
# What each stage trains, by the start of its layers' names.
TRAINS = {"vqgan": "", "refit": ("decoder", "post_quant_conv"), "decoder": "decoder"}
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


def load(path, device="cpu", stages=STAGES):
    """Load the VQGAN or AsymVQGAN at `path`, strictly: a Loaded. Raises UserError.

    path: a run folder (of the first of `stages` that it has; a refit must be finished), one of our
    files, a public file, or a folder of diffusers. A public asymmetric one has no vanilla decoder.
    """
    path = Path(path)
    if _is_public(path):
        loaded = _public(path)
        _check_stage(path, loaded.stage, stages)
    else:
        state, first_stage = _read(path, stages), None
        config = VQGANConfig(**_tuples(state["config"]["first_stage"]))
        size = state["config"]["decoder"] if state["stage"] == "decoder" else None
        if size and all(name.startswith("decoder.") for name in state["model"]):
            first_stage = first_stage_of(state, path).model      # -o writes it into the same file
            config = first_stage.config
        loaded = _loaded(_network(path, state["model"], config, size, first_stage), state)
    loaded.model.to(device)
    return loaded


def load_model(path, device="cpu"):
    """Load the VQGAN or AsymVQGAN at `path`, as `load` does."""
    return load(path, device).model


def load_first_stage(path):
    """Load the first stage at `path`, as `load` does; a decoder's file is refused by UserError."""
    return load(path, stages=FIRST_STAGES)


def _read(path, stages):
    """The contents of a stage file, or of the first of `stages` that a run folder has."""
    if not path.exists():
        raise UserError(f"{path}: no such run folder or checkpoint")
    if path.is_file():
        state = run_folder.load(path)
        _check_stage(path, state["stage"], stages)
        return state
    for stage in stages:
        state = run_folder.latest(path / stage)
        if state is not None and (stage != "refit" or state["extra"].get("finished")):
            return state
    names = " or ".join(f"{stage}/last.pt" for stage in stages)
    raise UserError(f"{path}: {names} is not in it; give a folder that has one, or run train.py "
                    f"with --stage {stages[-1]} as this run was made")


def _check_stage(path, stage, stages):
    if stage not in stages:
        raise UserError(f"{path} is a {stage}, not a {' or '.join(stages)}; give such a file, or a "
                        "run folder that has one")


def _tuples(fields):
    """Turn the lists that a checkpoint keeps into tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


def first_stage_of(state, source):
    """Load the first stage that `state`, of `source`, stands on; UserError: missing or changed."""
    stage, where = state["stage"], state["config"].get("vqgan") or run_of(source)
    if not Path(where).exists():
        raise UserError(f"the {stage} in {source} stands on the first stage {where}, which is not "
                        "there; bring it back, or start from the folder of the training")
    first_stage = load_first_stage(where)
    if first_stage.parent != state["parent"]:
        raise UserError(f"the {stage} in {source} was trained on other first-stage weights than "
                        f"{where} holds; bring those back, or train a {stage} on these: "
                        f"train.py --stage {stage} --vqgan {where} --out NEW_RUN")
    return first_stage


def run_of(source):
    """Find the run folder of a stage file, RUN/decoder/last.pt -> RUN, or of itself."""
    return source if source.is_dir() else source.parent.parent


def _is_public(path):
    """Say whether others wrote `path`: a file that is not ours, a folder of diffusers."""
    if not path.is_file():
        return diffusers_folder(path)[0] is not None
    try:                        # the pickles of all our files begin with these two keys
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                head = file.read(100)
    except Exception:           # whatever is wrong with it, read_public says so
        return True
    return not (b"format" in head and b"stage" in head)


def _public(path):
    public = read_public(path)
    stated = public.config or {}                    # diffusers' own settings
    try:
        weights, notes = public_names.tidy(public_names.taming_names(public.state))
        groups = stated.get("norm_num_groups") or 32
        config = public_names.first_stage_config(weights, groups)
        size = public_names.asym_decoder_size(weights, config)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{public.path}: no autoencoder of this kind "
                        f"({type(error).__name__}: {error})") from None
    model = _network(public.path, weights, config, size)
    settings = {"first_stage": asdict(config), "decoder": size}
    if stated.get("scaling_factor"):
        settings["scaling_factor"] = stated["scaling_factor"]
    state = {"stage": "decoder" if size else "vqgan", "config": settings, "step": 0,
             "extra": {"finished": True}}
    return _loaded(model, state, notes=public.notes + notes)


def _loaded(model, state, notes=()):
    """Make the Loaded of a model and its stage file's `state`."""
    model.eval().requires_grad_(False)
    weights = model.first_stage.state_dict()
    encodes = {name: value for name, value in weights.items()
               if name.startswith(("encoder.", "quant_conv.", "quantize."))}
    return Loaded(model, state["stage"], state["config"], state["step"],
                  bool(state["extra"].get("finished")), run_folder.weights_hash(weights),
                  run_folder.weights_hash(encodes), list(notes))


def _network(source, weights, config, size, first_stage=None):
    """Build a VQGAN, or with a decoder's `size` an AsymVQGAN; no random number is drawn.

    weights: by the names of _file_names; where a VQGAN is given, only the decoder's.
    """
    if size:
        weights = {name if name.startswith("decoder.") else f"first_stage.{name}": value
                   for name, value in weights.items()}
    if first_stage:
        weights |= {f"first_stage.{name}": value
                    for name, value in first_stage.state_dict().items()}
    try:
        with torch.device("meta"):
            model = VQGAN(config, own_decoder=size is None or first_stage is not None)
            if size:
                model = AsymVQGAN(model, AsymDecoder(config, size["ch"], size["num_res_blocks"],
                                                     size["blend"]))
        model.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _misfit(source, error) from None
    return model


def _misfit(source, error):
    reason = " ".join(str(error).split())[:400]
    return UserError(f"{source}: its weights do not fit the network of its sizes; it is damaged or "
                     f"of another version: get it or train it again ({reason})")


def _file_names(model):
    """List the model's weights by the authors' names; of two decoders the asymmetric one."""
    return {name.removeprefix("first_stage."): value for name, value in model.state_dict().items()
            if not name.startswith("first_stage.decoder.")}


@dataclass
class Prior:
    """VQ-DDM's prior, ready to be sampled from, and what its file says about it."""
    unet:        UNet                   # the averaged weights; eval mode, no gradients
    diffusion:   MultinomialDiffusion
    first_stage: VQGAN                  # likewise, on the same device
    grid:        tuple                  # (h, w) of the maps that it was trained on
    config:      dict                   # the resolved settings of the run
    step:        int
    finished:    bool                   # whether its training came to its end
    parent:      str                    # weights_hash of the first stage
    facts:       dict                   # "score": held-out bound in nats a map, "maps", "K", "grid"

    @property
    def device(self):
        return self.first_stage.quantize.embedding.weight.device


def denoiser(settings, K):
    """Build a UNet and its process for K codes; UserError: a kind that is no longer here."""
    for name, ours in (("schedule", "cosine"), ("form", "theta")):
        if settings.get(name, ours) != ours:
            raise UserError(f"this prior was trained with {name} {settings[name]!r}, which is no "
                            f"longer here; train one with {ours!r}, as train.py does")
    net = _tuples(settings["net"])
    if net.pop("layout", "multinomial") == "ddpm" or net.pop("attention", "linear") == "full":
        raise UserError("this prior's network has DDPM's layout, which is no longer here: train "
                        "one of the presets")
    T = settings["T"]
    return UNet(UNetConfig(**net), K, T), MultinomialDiffusion(K, T, settings["residual"])


def load_prior(path, device="cpu"):
    """Load the Prior at `path`, a run folder or a prior's file, with its first stage: as `load`."""
    path = Path(path)
    state = _read(path, ("prior",))
    config, extra, first_stage = state["config"], state["extra"], first_stage_of(state, path)
    try:
        unet, diffusion = denoiser(config["prior"], extra["K"])
        unet.load_state_dict(state["ema"]["weights"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _misfit(path, error) from None
    return Prior(unet.to(device).eval().requires_grad_(False), diffusion,
                 first_stage.model.to(device), tuple(extra["grid"]), config, state["step"],
                 bool(extra.get("finished")), state["parent"], extra)


def chosen_steps(asked, T, most=STEPS):
    """Check that `asked` steps of T can be taken; None is `most`, or T if that is less."""
    if asked is not None and not 1 <= asked <= T:
        raise UserError(f"--steps: give numbers from 1 to T = {T}, which this prior has")
    return asked or min(most, T)


def save_model(loaded, path):
    """Write a Loaded's model, of two decoders the asymmetric one, to a new file; or UserError."""
    _check_new(path)
    state = {"format": run_folder.FORMAT, "stage": loaded.stage,
             "config": loaded.config | {"vqgan": None}, "model": _file_names(loaded.model),
             "ema": None, "optimizers": {}, "images": 0, "step": loaded.step, "parent": None,
             "extra": {"finished": loaded.finished}}
    run_folder.save(path, state)


def _check_new(path):
    """Raise UserError unless nothing is at `path`, or an empty folder."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already and is not overwritten; choose another name, or "
                        "remove it first")


def to_diffusers(model, folder, scaling_factor=SCALING_FACTOR, sample_size=256):
    """Write a VQGAN or AsymVQGAN into `folder` for diffusers' from_pretrained; the paths made.

    scaling_factor: what the diffusion model multiplies latents by; sample_size: px. Raises
    UserError: a model that diffusers cannot build, a folder that is not empty, a full disk.
    """
    folder, weights = Path(folder), _file_names(model)
    try:
        size = public_names.asym_decoder_size(weights, model.config)
        fields = public_names.diffusers_config(model.config, size, scaling_factor, sample_size)
    except ValueError as error:
        raise UserError(f"--to-diffusers: {error}") from None
    _check_new(folder)
    made = [folder / "diffusion_pytorch_model.safetensors", folder / "config.json"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(made[0], public_names.diffusers_names(weights))
        run_folder.write_text(made[1], json.dumps(fields, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; make room or choose "
                        "another folder") from None
    return made


def count(model, run):
    """Count what run() does in each module of `model`: {module: (output shape, multiplications)}.

    Only convolutions, linear layers and attention's two products are counted. The model moves to
    the meta device, where only shapes are computed: it costs nothing, but its weights are gone.
    """
    shapes, counts = {}, {}

    def before(module, inputs):
        counts[module] = -counter.get_total_flops()

    def after(module, inputs, output):
        counts[module] += counter.get_total_flops()
        shapes[module] = (output if isinstance(output, torch.Tensor) else output[0]).shape[1:]
    for module in model.to("meta").modules():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    # torch counts a multiplication and the addition after it as two operations.
    return {module: (shape, counts[module] // 2) for module, shape in shapes.items()}


def count_prior(unet, grid):
    """Count a UNet's multiplications for one map: in plain convolutions, in all. [DDM Tab. 2]"""
    counted = count(unet, lambda: unet(torch.zeros(1, *grid, dtype=torch.int64), torch.ones(1)))
    plain = sum(number for module, (_, number) in counted.items() if isinstance(module, nn.Conv2d))
    return plain, counted[unet][1]


def layers(module, name):
    """Yield (name, layer) below `module`. A block is a layer; those of one level share a name."""
    if isinstance(module, ResBlock | AttnBlock | Downsample | Upsample):
        yield re.sub(r"\.\d+$", "", name), module
    elif list(module.parameters(recurse=False)):
        yield name, module
    else:
        for child, layer in module.named_children():
            yield from layers(layer, f"{name}.{child}".lstrip("."))


def list_layers(model, stage, size):
    """List the layers of a model that `stage` trained. [AVQ Tab. 7] [AVQ Tab. 8]

    {part: [(l, name, layer, output shape, parameters, multiplications, "trained" or "frozen")]} for
    one image of size x size, in the tables' order. Blends and the search for codes have no
    multiplications, None. The weights of `model` are gone afterwards.
    """
    first_stage, asym = model.first_stage, model is not model.first_stage
    where, levels = "first_stage." if asym else "", len(model.config.ch_mult)

    def run():
        x, mask = torch.zeros(1, 3, size, size), torch.zeros(1, 1, size, size)
        latent = first_stage.moments(x)
        z = latent.mode() if model.config.latent == "kl" else latent        # (1, d, h, w)
        if first_stage.decoder is not None:
            first_stage.decode(z)
        if asym:
            model.decoder(first_stage.post_quant_conv(z), x, mask)
    counted, named, rows = count(model, run), {}, {}
    # Make a row for each name, and for each blend.
    for name, layer in layers(model, ""):
        named.setdefault(name, []).append(layer)
    for name, same in named.items():
        kernel = "x".join(map(str, getattr(same[0], "kernel_size", ())))
        ran = [counted[layer] for layer in same if layer in counted]        # a codebook never does
        detail = f"x {len(same)}" if len(same) > 1 else kernel
        rows[name] = (f"{type(same[0]).__name__} {detail}".rstrip(),
                      ran[-1][0] if ran else same[0].weight.shape,
                      sum(p.numel() for layer in same for p in layer.parameters()),
                      sum(number for _, number in ran) if ran else None,
                      "trained" if name.startswith(TRAINS[stage]) else "frozen")
    for i, layer in enumerate(model.decoder.encoder.layers if asym else ()):
        (C, h, w), add = counted[layer][0], model.decoder.blend == "add"
        rows[f"decoder._blend({i})"] = ("add" if add else "Concat", (C if add else 2 * C + 1, h, w),
                                        0, None, "")
    # Order the rows by the starts of their names, each with its l.
    condition = [(i, f"encoder.layers.{i}") for i in range(levels + 1)]
    main = [("Out", start) for start in ("_blend(0)", "fuse.0", "norm_out", "conv_out")]
    for i in range(levels):
        main += [(i, f"_blend({i + 1})"), (i, f"fuse.{i + 1}"), (i, f"up.{i}.")]
    main += [(levels, "conv_in"), (levels, "mid.")]
    latent = [("", start) for start in ("quant_conv", "quantize", "post_quant_conv")]
    parts = [("first stage, encoder", f"{where}encoder.", [("", "")]),
             ("first stage, latent", where, latent)]
    if first_stage.decoder is not None:
        parts.append(("first stage, decoder", f"{where}decoder.", main))
    if asym:
        parts = [("Condition", "decoder.", condition), ("Main", "decoder.", main), *parts]
    return {part: [(place, name.removeprefix(within), *row) for place, start in order
                   for name, row in rows.items() if name.startswith(within + start)]
            for part, within, order in parts}


def print_layers(parts, size):
    """Print what list_layers gave, and the totals of each part."""
    def show(*cells):
        line = "{:>3}  {:18} {:17}  {:>13} {:>12} {:>18}  {}".format(*cells)
        print0(line.rstrip())
    print0(f"\nOne image of {size} x {size} px; l and the order as in AVQ's Tables 7 and 8")
    show("l", "name", "layer", "output", "parameters", "multiplications", "")
    for part, rows in parts.items():
        print0(f"\n{part}")
        for place, name, layer, shape, parameters, number, state in rows:
            show(place, name, layer, "x".join(map(str, shape)), f"{parameters:,}",
                 "" if number is None else f"{number:,}", state)
        sums = {"total": rows} | ({"both": parts["Condition"] + rows} if part == "Main" else {})
        for name, some in sums.items():
            show("", name, "", "", f"{sum(row[4] for row in some):,}",
                 f"{sum(row[5] or 0 for row in some):,}", "")


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="What a checkpoint is; if asked for, the same as a file of "
                                        "ours or as a folder for diffusers.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="a run folder, a file of ours, or a public checkpoint: a .ckpt, .pt, "
                             ".bin or .safetensors file, or a folder of diffusers")
    parser.add_argument("-o", metavar="FILE", dest="output",
                        help="write all of the model into one file of ours")
    parser.add_argument("--to-diffusers", metavar="DIR",
                        help="write a folder that diffusers' from_pretrained opens")
    parser.add_argument("--layers", action="store_true",
                        help="print the network as AVQ's Tables 7 and 8 do, for the run's --size "
                             "(of public weights 256), and count the run's prior as DDM's Table 2")
    args = parser.parse_args()
    # Say what it is.
    loaded, made = load(args.checkpoint), []
    side = loaded.config.get("size") or 256
    trained = f"step {loaded.step}{'' if loaded.finished else ', not finished'}"
    print0(f"{args.checkpoint}: {loaded.stage}, {trained if loaded.step else 'public weights'}")
    model, config, first_stage = loaded.model, loaded.model.config, loaded.model.first_stage
    kind = f"K {config.K}" if config.latent == "vq" else "KL latent"
    levels = f", attention in levels {config.attn_levels}" if config.attn_levels else ""
    absent = ", without a decoder of its own" if first_stage.decoder is None else ""
    print0(f"  first stage  {kind}, d {config.embed_dim}, f {config.f}, ch {config.ch}, ch_mult "
           f"{config.ch_mult}, num_res_blocks {config.num_res_blocks}{levels}; "
           f"{sum(p.numel() for p in first_stage.parameters()):,} parameters{absent}")
    if model is not first_stage:
        size = public_names.asym_decoder_size(_file_names(model), config)
        print0(f"  decoder      {size['preset']}, {size['blend']}: ch {size['ch']}, num_res_blocks "
               f"{size['num_res_blocks']}; {sum(p.numel() for p in model.decoder.parameters()):,} "
               "parameters")
    print0(f"  latents      {loaded.latents[:16]}, equal wherever they are the same")
    for note in loaded.notes:
        print0(f"  note         {note}")
    # Write what is asked for, or nothing.
    if args.output:
        _check_new(args.output)
    if args.to_diffusers:
        made += to_diffusers(model, args.to_diffusers,
                             loaded.config.get("scaling_factor", SCALING_FACTOR), side)
    if args.output:
        save_model(loaded, args.output)
        made.append(args.output)
    if made and loaded.stage == "decoder" and first_stage.decoder is not None:
        print0("  left out     the first stage's own decoder, as only one has these names")
    if made:
        print0("wrote " + ", ".join(str(path) for path in made))
    if args.layers:
        print_layers(list_layers(model, loaded.stage, side), side)
        prior = run_folder.latest(Path(args.checkpoint) / "prior")
        if prior:
            settings, grid = prior["config"]["prior"], prior["extra"]["grid"]
            with torch.device("meta"):
                unet, _ = denoiser(settings, prior["extra"]["K"])
            plain, total = count_prior(unet, grid)
            print0(f"\nprior, {settings['unet']}: {sum(p.numel() for p in unet.parameters()):,} "
                   f"parameters\nOne map of {grid[0]} x {grid[1]} codes: {plain:,} multiplications "
                   f"in plain convolutions, as in DDM's Table 2,\nand {total:,} in all")


if __name__ == "__main__":
    exit_on_user_error(main)
