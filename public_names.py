"""Names and sizes of first stages and decoders, ours and the public ones: pure functions.

    any state dict --taming_names--> our names --tidy--> nothing dead in it, nothing lacking
      --first_stage_config, asym_decoder_size--> what to build --check_keys--> it fits, key by key
    our names --diffusers_names--> diffusers' names, beside a diffusers_config

taming-transformers, latent-diffusion and the authors name their weights alike, and so do we;
diffusers has other names for the same layers, and two generations of them for attention. Sizes are
read from the shapes of the weights. What cannot be built here is a ValueError that says why. No
file is touched: reading public ones is weight_files.py's affair, models are made in convert.py.
"""

from dataclasses import replace
from itertools import count

import torch

from asym_decoder import ASYM_PRESETS
from vqgan import VQGAN_PRESETS, VQGANConfig

# The published first stages: latent-diffusion's by its names, taming's larger codebook by ours.
_F16 = VQGAN_PRESETS["vq-f16"]
PLANS = VQGAN_PRESETS | {
    "vq-f16-k16384": replace(_F16, K=16384),
    "vq-f16-z8":     replace(_F16, z_channels=8, embed_dim=8, K=16384),
    "vq-f8-n256":    replace(VQGAN_PRESETS["vq-f8"], K=256),
    "vq-f4":         replace(_F16, ch_mult=(1, 2, 4), attn_levels=(), z_channels=3, embed_dim=3,
                             K=8192),
    "kl-f4":         VQGANConfig("kl", ch_mult=(1, 2, 4), attn_levels=(), z_channels=3,
                                 embed_dim=3),
    "kl-f16":        VQGANConfig("kl", z_channels=16, embed_dim=16),
    "kl-f32":        VQGANConfig("kl", ch_mult=(1, 1, 2, 2, 4, 4), attn_levels=(4, 5),
                                 z_channels=64, embed_dim=64),
}


def plan_name(config):
    """The name in PLANS of a VQGANConfig with these sizes, or "own"."""
    sizes = _sizes(config)
    return next((name for name, plan in PLANS.items() if _sizes(plan) == sizes), "own")


def _sizes(config):
    """The config without what only training needs, and a KL latent's without a codebook."""
    K = config.K if config.latent == "vq" else 0
    return replace(config, K=K, beta=0.0, legacy_beta=False, code_range=None)


# -- names -----------------------------------------------------------------------------------------

TAMING, DIFFUSERS = 0, 1                        # columns of the two tables

# Inside encoder and decoder; both columns are read. `up` counts levels from the highest resolution,
# `up_blocks` from the lowest.
MODULES = (
    ("mid.block_1",        "mid_block.resnets.0"),
    ("mid.attn_1",         "mid_block.attentions.0"),
    ("mid.block_2",        "mid_block.resnets.1"),
    ("down.{i}.block.{j}", "down_blocks.{i}.resnets.{j}"),
    ("down.{i}.attn.{j}",  "down_blocks.{i}.attentions.{j}"),
    ("down.{i}.downsample", "down_blocks.{i}.downsamplers.0"),
    ("up.{i}.block.{j}",   "up_blocks.{i}.resnets.{j}"),
    ("up.{i}.attn.{j}",    "up_blocks.{i}.attentions.{j}"),
    ("up.{i}.upsample",    "up_blocks.{i}.upsamplers.0"),
    ("norm_out",           "conv_norm_out"),
    ("encoder.layers",     "condition_encoder.layers"),
)
# Inside those; the last four are diffusers' older names, which are only read.
LAYERS = (
    ("nin_shortcut", "conv_shortcut"),
    ("norm",     "group_norm"),
    ("q",        "to_q"),
    ("k",        "to_k"),
    ("v",        "to_v"),
    ("proj_out", "to_out.0"),
    ("q",        "query"),
    ("k",        "key"),
    ("v",        "value"),
    ("proj_out", "proj_attn"),
)
PROJECTIONS = {"q", "k", "v", "proj_out"}       # 1x1 convolutions here, linear layers in diffusers


def taming_names(state):
    """A state dict with taming's or diffusers' names -> taming's, attention as 1x1 convolutions.

    Names that neither has pass through; what is right already stays. Raises ValueError where two
    keys are two names of one weight.
    """
    renamed, levels = {}, _up_levels(state, "up_blocks")
    for name, value in state.items():
        new = _rename(name, DIFFUSERS, TAMING, levels)
        if _is_projection(new) and value.ndim in (2, 3):            # linear, or a 1-D convolution
            value = value.reshape(*value.shape[:2], *value.shape[2:] or (1,), 1)
        if new in renamed:
            raise ValueError(f"{name} and another key both stand for {new}")
        renamed[new] = value
    return renamed


def diffusers_names(state):
    """The inverse: a VQGAN's or a self-contained decoder's names -> those of diffusers' models."""
    levels = _up_levels(state, "up")
    return {_rename(name, TAMING, DIFFUSERS, levels):
            value.flatten(1) if _is_projection(name) else value for name, value in state.items()}


def _up_levels(state, module):
    """How many levels the decoder has."""
    numbers = [_match(["decoder", module, "{i}"], name.split(".")) for name in state]
    return 1 + max((int(found["{i}"]) for found in numbers if found), default=-1)


def _is_projection(name):
    *_, attention, _, layer, kind = ["", "", "", "", *name.split(".")]
    return layer in PROJECTIONS and kind == "weight" and attention in ("attn", "mid")


def _rename(name, source, target, levels):
    """One key from column `source` of the tables to column `target`."""
    half, *parts = name.split(".")
    if half not in ("encoder", "decoder"):
        return name
    for row in MODULES:
        pattern = row[source].split(".")
        numbers = _match(pattern, parts)
        if numbers is not None:
            if row[TAMING].startswith("up."):
                numbers["{i}"] = str(levels - 1 - int(numbers["{i}"]))
            module = [numbers.get(part, part) for part in row[target].split(".")]
            return ".".join([half, *module, *_layer(parts[len(pattern):], source, target)])
    return name


def _match(pattern, parts):
    """{"{i}": number as text, ...} where `parts` begin as the pattern says, else None."""
    numbers = {}
    for wanted, part in zip(pattern, [*parts, *[""] * len(pattern)]):
        if wanted in ("{i}", "{j}") and part.isdecimal():
            numbers[wanted] = part
        elif part != wanted:
            return None
    return numbers


def _layer(parts, source, target):
    for row in LAYERS:
        pattern = row[source].split(".")
        if parts[:len(pattern)] == pattern:
            return [*row[target].split("."), *parts[len(pattern):]]
    return parts


# -- what is in a file -----------------------------------------------------------------------------

# Parts of names that tell of what cannot be built here.
FOREIGN = {
    "quantize.embed.weight": "a Gumbel-softmax quantiser",
    "quantize.proj.":        "a Gumbel-softmax quantiser",
    "quantize.used":         "a codebook with remapped indices",
    "norm1.conv_y.":         "normalisation by the latent (MoVQ)",
    "norm1.norm_layer.":     "normalisation by the latent (MoVQ)",
}
UNUSED = {                                       # parts of names that no forward pass looks at
    "decoder.up_layers.":    "which the authors' decoder never uses",
    ".cluster_size":         "a running mean of the codebook's training",
    ".embed_avg":            "a running mean of the codebook's training",
}


def tidy(state):
    """A public state dict with taming's names -> (the weights to use, notes on the others).

    Weights that no forward pass uses are dropped. Where the 1x1 convolutions around the latent are
    missing, as in diffusers' newer autoencoders, identities stand for them, which is exact. Raises
    ValueError for what cannot be built here.
    """
    _refuse_foreign(state)
    unused = {part: [name for name in state if part in name] for part in UNUSED}
    notes = [f"keys dropped: {len(names)} with {part.strip('.')}, {UNUSED[part]}"
             for part, names in unused.items() if names]
    gone = {name for names in unused.values() for name in names}
    kept = {name: value for name, value in state.items() if name not in gone}
    outer = {"quant_conv": _shape(state, "encoder.conv_out.weight")[0],
             "post_quant_conv": _shape(state, "decoder.conv_in.weight")[1]}
    for name, width in outer.items():
        if not any(key.startswith(f"{name}.") for key in state):
            kept[f"{name}.weight"] = torch.eye(width)[:, :, None, None]             # (w, w, 1, 1)
            kept[f"{name}.bias"] = torch.zeros(width)
            notes.append(f"no {name} in it; an identity stands for it, which is exact")
    return kept, notes


def _refuse_foreign(state):
    for part, what in FOREIGN.items():
        if any(part in name for name in state):
            raise ValueError(f"it has {what} ({part.strip('.')}), which cannot be built here")
    if any(value.ndim == 5 for value in state.values()):
        raise ValueError("its convolutions are three-dimensional (a video autoencoder), which "
                         "cannot be built here")
    for name, colours in (("encoder.conv_in.weight", 1), ("decoder.conv_out.weight", 0)):
        channels = _shape(state, name)[colours]
        if channels != 3:
            raise ValueError(f"{name} is for images of {channels} channels, not 3, which cannot be "
                             "built here")
    for half in ("encoder", "decoder"):
        if not any(name.startswith(f"{half}.mid.attn_1.") for name in state):
            raise ValueError(f"the middle of its {half} has no attention ({half}.mid.attn_1, as in "
                             "vq-f4-noattn), which cannot be built here")


def _shape(state, name):
    """The four sizes of a convolution's weight. Raises ValueError where there is no such thing."""
    if name not in state or state[name].ndim != 4 or not state[name].numel():
        some = ", ".join(list(state)[:3])
        raise ValueError(f"no convolution {name} in it, so it is no autoencoder of this kind "
                         f"(its {len(state)} keys begin with {some or 'none'})")
    return tuple(state[name].shape)


def first_stage_config(state, stated=None):
    """The VQGANConfig of a tidied state dict, from its shapes.

    stated: diffusers' config.json, where there is one. Only the number of GroupNorm's groups is
    taken from it, as no shape tells it (32 without); the rest must agree. Raises ValueError where
    it does not, and for sizes that cannot be built here.
    """
    latent = "vq" if "quantize.embedding.weight" in state else "kl"
    twice = 2 if latent == "kl" else 1
    ch = _shape(state, "encoder.conv_in.weight")[0]
    blocks = _blocks(state, "encoder.down")
    if not blocks:
        raise ValueError("no encoder.down.0.block.0 in it, so it is no autoencoder of this kind")
    widths = [_shape(state, f"encoder.down.{i}.block.0.conv1.weight")[0]
              for i in range(len(blocks))]
    if any(width % ch for width in widths):
        raise ValueError(f"its levels are {_listed(widths)} wide, not multiples of the first "
                         f"layer's {ch}, which cannot be built here")
    K, d = state["quantize.embedding.weight"].shape if latent == "vq" else (
        VQGANConfig.K, _shape(state, "quant_conv.weight")[0] // 2)
    config = VQGANConfig(
        latent=latent, ch=ch, ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=blocks[0],
        attn_levels=tuple(i for i in range(len(blocks))
                          if f"encoder.down.{i}.attn.0.q.weight" in state),
        z_channels=_shape(state, "encoder.conv_out.weight")[0] // twice, embed_dim=d, K=K,
        norm_groups=_norm_groups(widths, stated))
    _compare(stated, config)
    return config


def _blocks(state, where):
    """[ResBlocks of level 0, of level 1, ...] of encoder.down or decoder.up."""
    return [_length(state, f"{where}.{i}.block.{{}}.conv1.weight")
            for i in range(_length(state, f"{where}.{{}}.block.0.conv1.weight"))]


def _length(state, name):
    """How many of `name` there are, from number 0 on."""
    return next(n for n in count() if name.format(n) not in state)


def _norm_groups(widths, stated):
    groups = (stated or {}).get("norm_num_groups") or 32
    if not isinstance(groups, int) or groups < 1 or any(width % groups for width in widths):
        raise ValueError(f"its levels, {_listed(widths)} wide, cannot be normalised in {groups} "
                         "groups, and no shape tells how many there are; say norm_num_groups in "
                         "a diffusers config.json beside the file")
    return groups


def _compare(stated, config):
    """Raise ValueError where diffusers' config.json says something else than the shapes do."""
    ours = {"latent_channels": config.z_channels, "layers_per_block": config.num_res_blocks,
            "layers_per_down_block": config.num_res_blocks, "block_out_channels": config.widths,
            "down_block_out_channels": config.widths, "act_fn": "silu", "norm_type": "group"}
    if config.latent == "vq":
        ours |= {"num_vq_embeddings": config.K, "vq_embed_dim": config.embed_dim}
    if "down_block_out_channels" in (stated or {}):
        del ours["block_out_channels"]              # there it repeats the decoder's
    _agree(stated, ours)


def _agree(stated, ours):
    for name, value in ours.items():
        theirs = (stated or {}).get(name)
        if theirs not in (None, value, tuple(value) if isinstance(value, list) else value):
            raise ValueError(f"config.json says {name} {theirs}, the network is built for {value}")


def asym_decoder_size(state, config, stated=None):
    """{"preset", "ch", "num_res_blocks", "blend"} of a state dict's asymmetric decoder, or None.

    config: of the first stage; stated: as in first_stage_config. `preset` is the name in
    ASYM_PRESETS, or "own". Raises ValueError where config.json contradicts the shapes.
    """
    if not any(name.startswith("decoder.encoder.") for name in state):
        return None
    blocks = _blocks(state, "decoder.up")
    size = {"ch": _shape(state, "decoder.conv_out.weight")[1] // config.ch_mult[0],
            "num_res_blocks": max(blocks, default=0) - 1,
            "blend": "concat" if any(name.startswith("decoder.fuse.") for name in state) else "add"}
    _agree(stated, {"up_block_out_channels": [size["ch"] * m for m in config.ch_mult],
                    "layers_per_up_block": size["num_res_blocks"]})
    return {"preset": asym_preset(config, size), **size}


def asym_preset(config, size):
    """The row of ASYM_PRESETS that `size` is on a first stage of `config`, or "own"."""
    sizes = {name: (round(factor * config.ch), blocks)
             for name, (factor, blocks) in ASYM_PRESETS.items()}
    wanted = size["ch"], size["num_res_blocks"]
    return next((name for name, found in sizes.items() if found == wanted), "own")


def check_keys(state, expected):
    """Raise ValueError, one line, unless `state` has the names and shapes of `expected`, in floats.

    Both are state dicts.
    """
    wrong = [f"{name} is {tuple(state[name].shape)}, not {tuple(value.shape)}"
             for name, value in expected.items()
             if name in state and state[name].shape != value.shape]
    wrong += [f"{name} holds {value.dtype}" for name, value in state.items()
              if name in expected and not value.is_floating_point()]
    complaints = {"missing": [name for name in expected if name not in state],
                  "unexpected": [name for name in state if name not in expected],
                  "of another shape or type": wrong}
    told = [f"{len(names)} {kind}: {_listed(names[:3])}{', ...' if len(names) > 3 else ''}"
            for kind, names in complaints.items() if names]
    if told:
        raise ValueError(f"its keys do not fit the network that their shapes tell of; "
                         f"{'; '.join(told)}")


def _listed(items):
    return ", ".join(str(item) for item in items)


# -- out to diffusers ------------------------------------------------------------------------------


def diffusers_config(config, size=None, scaling_factor=0.18215, sample_size=256):
    """The config.json with which diffusers builds this model: a dict.

    config: the first stage's VQGANConfig, for an AutoencoderKL or a VQModel; with `size`, as from
    asym_decoder_size, for an AsymmetricAutoencoderKL. Raises ValueError, with the reason, for what
    none of the three can be.
    """
    if config.latent == "kl" and config.z_channels != config.embed_dim:
        raise ValueError(f"diffusers' KL autoencoders have one latent width, this one has two: "
                         f"z_channels {config.z_channels}, embed_dim {config.embed_dim}")
    levels = range(len(config.ch_mult))
    down = [f"{'Attn' * (i in config.attn_levels)}DownEncoderBlock2D" for i in levels]
    up = [f"{'Attn' * (i in config.attn_levels)}UpDecoderBlock2D" for i in reversed(levels)]
    common = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "down_block_types": down,
              "up_block_types": up, "latent_channels": config.z_channels,
              "norm_num_groups": config.norm_groups, "sample_size": sample_size,
              "scaling_factor": scaling_factor}
    if size:
        return {"_class_name": "AsymmetricAutoencoderKL", **common, **_asymmetric(config, size)}
    common |= {"block_out_channels": config.widths, "layers_per_block": config.num_res_blocks}
    if config.latent == "kl":
        return {"_class_name": "AutoencoderKL", **common}
    return {"_class_name": "VQModel", **common, "num_vq_embeddings": config.K,
            "vq_embed_dim": config.embed_dim}


def _asymmetric(config, size):
    """The fields that only AsymmetricAutoencoderKL has. Raises ValueError as diffusers_config.

    Its branch has five layers, twice as wide from one to the next until the lowest level's width,
    and finds features by their shape.
    """
    widths = [size["ch"] * multiplier for multiplier in config.ch_mult]
    theirs = [min(widths[0] * 2**i, widths[-1]) for i in range(4)]
    reasons = [
        (config.latent != "kl", "it has a KL latent, and this model a codebook"),
        (size["blend"] != "add", f"it blends by addition, and this decoder by {size['blend']}"),
        (len(widths) != 4, f"its branch is for four levels (f = 8), and here are {len(widths)}"),
        (widths != theirs, f"its branch is for levels {_listed(theirs)} wide, and here they are "
                           f"{_listed(widths)}"),
        (theirs[0] == theirs[1], "its branch tells features apart by their width, and the two "
                                 f"highest levels are both {widths[0]} wide")]
    for wrong, reason in reasons:
        if wrong:
            raise ValueError(f"diffusers' AsymmetricAutoencoderKL cannot be this model: {reason}")
    return {"down_block_out_channels": config.widths,
            "layers_per_down_block": config.num_res_blocks,
            "up_block_out_channels": widths, "layers_per_up_block": size["num_res_blocks"]}
