"""Translate weights' names and read sizes from their shapes: pure functions, no files.

    state dict --taming_names--> taming's names --complete--> exactly the weights that are used
      --first_stage_config, asym_decoder_size--> the sizes to build
    taming's names --diffusers_names--> diffusers' names, with a diffusers_config

Taming, latent-diffusion, the authors and this code share names. Diffusers has newer and older ones.
"""

import re
from itertools import count

import torch

from asym_decoder import ASYM_PRESETS
from vqgan import VQGANConfig

SCALING_FACTOR = 0.18215                # Stable Diffusion 1 and 2 multiply latents by it
TAMING, DIFFUSERS = 0, 1                        # columns of the two tables

# In encoder and decoder. `up` counts levels from the highest one, `up_blocks` from the lowest.
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
# Inside these modules. The last four are diffusers' older names, which are read but not written.
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
# Attention's weights by taming's names: 1x1 convolutions in taming, linear layers in diffusers.
PROJECTION = re.compile(r".*\.(attn\.\d+|attn_1)\.(q|k|v|proj_out)\.weight")


def taming_names(state):
    """Rename a state dict from taming's or diffusers' names to taming's. Raises ValueError."""
    renamed, levels = {}, _levels(state)
    for name, value in state.items():
        new = _rename(name, DIFFUSERS, TAMING, levels)
        if PROJECTION.fullmatch(new) and value.ndim in (2, 3):      # linear, or a 1-D convolution
            value = value.reshape(*value.shape[:2], 1, 1)
        if new in renamed:
            raise ValueError(f"{name} and another key both stand for {new}")
        renamed[new] = value
    return renamed


def diffusers_names(state):
    """Rename a state dict from taming's names to diffusers'."""
    levels = _levels(state)
    return {_rename(name, TAMING, DIFFUSERS, levels):
            value.flatten(1) if PROJECTION.fullmatch(name) else value
            for name, value in state.items()}


def _levels(state):
    """Count the decoder's levels."""
    found = [re.match(r"decoder\.(?:up|up_blocks)\.(\d+)\.", name) for name in state]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _rename(name, source, target, levels):
    """Translate a name from column `source` of the tables to column `target`."""
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        return name
    for row in MODULES:
        pattern = re.escape(row[source]).replace(r"\{i\}", r"(?P<i>\d+)")
        if found := re.match(pattern.replace(r"\{j\}", r"(?P<j>\d+)") + r"\.", rest):
            numbers, layer = found.groupdict(), rest[found.end():]
            if row[TAMING].startswith("up."):
                numbers["i"] = levels - 1 - int(numbers["i"])
            for names in LAYERS:
                if layer.startswith(f"{names[source]}."):
                    layer = names[target] + layer.removeprefix(names[source])
                    break
            return f"{half}.{row[target].format(**numbers)}.{layer}"
    return name


# How keys start that only other autoencoders have, and diffusers' name for these.
OTHERS = {"bn.running_": "AutoencoderKLFlux2 (Flux.2's)",
          "encoder.layers.": "AutoencoderTiny (TAESD)",
          ("encoder.stages.", "encoder.down_blocks.0.0."): "AutoencoderDC (Sana's)"}


def complete(state, config=None):
    """Add the 1x1 convolutions that a KL latent may lack, as identities: (weights, notes).

    state: with taming's names. It may lack them where `config`, diffusers' config.json, says so or
    is None. Else raises ValueError; KeyError for no autoencoder.
    """
    state, notes = dict(state), []
    found = [kind for start, kind in OTHERS.items() if any(key.startswith(start) for key in state)]
    if any(value.ndim == 5 for value in state.values()):         # (out, in, time, height, width)
        found.append("a video's autoencoder")
    if found:
        raise ValueError(f"it is {found[0]}, which is not supported")
    outer = {"quant_conv": len(state["encoder.conv_out.weight"]),
             "post_quant_conv": state["decoder.conv_in.weight"].shape[1]}
    for name, width in outer.items():
        if not any(key.startswith(f"{name}.") for key in state):
            needed = config is not None and config.get(f"use_{name}", True)
            if needed or "quantize.embedding.weight" in state:
                raise ValueError(f"no {name} in it, which only a KL latent may lack and a "
                                 f"config.json tells (use_{name}: false); get the whole file")
            state[f"{name}.weight"] = torch.eye(width)[:, :, None, None]            # (w, w, 1, 1)
            state[f"{name}.bias"] = torch.zeros(width)
            notes.append(f"no {name} in it; an identity was added, which changes nothing")
    return state, notes


# What config.json of diffusers states beside the sizes: the map from a diffusion model's latents,
# z = latents * latents_std / scaling_factor + latents_mean or shift_factor, and a size in pixels.
STATED = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size")
# What the networks here have; shapes do not tell it.
IMPLEMENTED = {"act_fn": ("silu", "swish"), "norm_type": ("group",),
               "mid_block_add_attention": (True,)}


def stated(config):
    """Select the STATED fields of a config.json. Raises ValueError for what is not IMPLEMENTED."""
    for name, values in IMPLEMENTED.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(f"its config.json has {name} {config[name]!r}, and only {values[0]!r} "
                             "is implemented")
    return {name: config[name] for name in STATED if config.get(name) is not None}


def first_stage_config(state, norm_groups=32):
    """Read the VQGANConfig from the shapes in a complete state dict, except norm_groups.

    Raises KeyError if it is no such autoencoder, ValueError if norm_groups does not divide a width.
    """
    ch, z_channels = len(state["encoder.conv_in.weight"]), len(state["encoder.conv_out.weight"])
    blocks = _blocks(state, "encoder.down")
    levels = range(max(len(blocks), 1))
    widths = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in levels]
    if any(width % norm_groups for width in widths):
        raise ValueError(f"its levels, {widths} wide, do not divide into {norm_groups} groups; say "
                         "norm_num_groups in a config.json of diffusers beside the file")
    sizes = {"ch": ch, "num_res_blocks": blocks[0], "norm_groups": norm_groups,
             "ch_mult": tuple(width // ch for width in widths),
             "attn_levels": tuple(i for i in levels
                                  if f"encoder.down.{i}.attn.0.q.weight" in state)}
    if "quantize.embedding.weight" in state:
        K, d = state["quantize.embedding.weight"].shape
        return VQGANConfig("vq", z_channels=z_channels, embed_dim=d, K=K, **sizes)
    d = len(state["quant_conv.weight"]) // 2             # half is the mean, half the log-variance
    return VQGANConfig("kl", z_channels=z_channels // 2, embed_dim=d, **sizes)


def _blocks(state, where):
    """Count the ResBlocks of each level of encoder.down or decoder.up."""
    blocks = []
    while f"{where}.{len(blocks)}.block.0.conv1.weight" in state:
        level = f"{where}.{len(blocks)}.block"
        blocks.append(next(n for n in count() if f"{level}.{n}.conv1.weight" not in state))
    return blocks


def asym_decoder_size(state, config):
    """Read an asymmetric decoder's sizes: None, or {"preset", "ch", "num_res_blocks", "blend"}."""
    if not any(name.startswith("decoder.encoder.") for name in state):
        return None
    ch = state["decoder.conv_out.weight"].shape[1] // config.ch_mult[0]
    blocks = max(_blocks(state, "decoder.up"), default=0) - 1
    blend = "concat" if any(name.startswith("decoder.fuse.") for name in state) else "add"
    preset = next((name for name, (factor, num_res_blocks) in ASYM_PRESETS.items()
                   if (round(factor * config.ch), num_res_blocks) == (ch, blocks)), "own")
    return {"preset": preset, "ch": ch, "num_res_blocks": blocks, "blend": blend}


def diffusers_config(config, size=None, **others):
    """Make the dict of the config.json from which diffusers builds this model.

    config: a VQGANConfig. size: None for an AutoencoderKL or VQModel; of an AsymmetricAutoencoderKL
    the result of asym_decoder_size. others: STATED fields, if not Stable Diffusion's and 256 px.
    Raises ValueError for a model that diffusers cannot build.
    """
    kinds = ["Attn" * (i in config.attn_levels) for i in range(len(config.ch_mult))]
    fields = {"in_channels": 3, "out_channels": 3, "act_fn": "silu",
              "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
              "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
              "latent_channels": config.z_channels, "norm_num_groups": config.norm_groups,
              "sample_size": 256, "scaling_factor": SCALING_FACTOR} | others
    if config.latent == "kl" and config.z_channels != config.embed_dim:
        raise ValueError(f"diffusers' KL autoencoders have one latent width, this one has two: "
                         f"z_channels {config.z_channels}, embed_dim {config.embed_dim}")
    if config.latent == "kl" and config.z_channels != 4 and "scaling_factor" not in others:
        raise ValueError(f"no scaling_factor is stated for these {config.z_channels} channels: put "
                         "the config.json of the VAE beside its file (Stable Diffusion 3 has "
                         "scaling_factor 1.5305 and shift_factor 0.0609, Flux 0.3611 and 0.1159)")
    if not size:
        fields |= {"block_out_channels": config.widths, "layers_per_block": config.num_res_blocks}
        if config.latent == "kl":
            return {"_class_name": "AutoencoderKL", **fields}
        return {"_class_name": "VQModel", **fields, "num_vq_embeddings": config.K,
                "vq_embed_dim": config.embed_dim}
    # diffusers' branch has five layers, each twice as wide as the last up to the lowest level's
    # width, and it finds a level's feature by its shape.
    widths = [size["ch"] * multiplier for multiplier in config.ch_mult]
    theirs = [min(widths[0] * 2**i, widths[-1]) for i in range(4)]
    if (config.latent != "kl" or size["blend"] != "add" or widths != theirs
            or widths[0] == widths[1]):
        raise ValueError("diffusers' AsymmetricAutoencoderKL has a KL latent, blend add and four "
                         "levels, each twice as wide as the one above it up to the lowest's width; "
                         f"this one has {config.latent}, {size['blend']} and widths {widths}")
    return {"_class_name": "AsymmetricAutoencoderKL", **fields,
            "down_block_out_channels": config.widths,
            "layers_per_down_block": config.num_res_blocks, "up_block_out_channels": widths,
            "layers_per_up_block": size["num_res_blocks"]}
