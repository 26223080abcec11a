"""Our weights under diffusers' names, for comparisons with its models."""


def to_diffusers(state):
    """A VQGAN's or AsymVQGAN's state dict (taming's names) -> diffusers' keys and shapes."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up."))
    return dict(_renamed(name, value, levels) for name, value in state.items())


def _renamed(name, value, levels):
    parts = name.removeprefix("first_stage.").split(".")
    if parts[:2] == ["decoder", "encoder"]:
        return ".".join(["decoder", "condition_encoder", *parts[2:]]), value
    if parts[0] not in ("encoder", "decoder"):
        return ".".join(parts), value                    # quant_conv, post_quant_conv, quantize
    if parts[1] in ("norm_out", "conv_in", "conv_out"):
        return ".".join([parts[0], parts[1].replace("norm", "conv_norm"), *parts[2:]]), value
    if parts[1] == "mid":
        kind, number = parts[2].split("_")
        where, rest = ["mid_block", *_block(kind, str(int(number) - 1))], parts[3:]
    else:
        index = int(parts[2]) if parts[1] == "down" else levels - 1 - int(parts[2])
        where, rest = [f"{parts[1]}_blocks", str(index)], parts[3:]
        if rest[0].endswith("sample"):
            return ".".join([parts[0], *where, f"{rest[0]}rs", "0", *rest[1:]]), value
        where, rest = where + _block(*rest[:2]), rest[2:]
    if "attentions" in where:
        rest[0] = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v",
                   "proj_out": "to_out.0"}[rest[0]]
        value = value.flatten(1) if value.ndim == 4 else value       # 1x1 convolution -> linear
    rest[0] = "conv_shortcut" if rest[0] == "nin_shortcut" else rest[0]
    return ".".join([parts[0], *where, *rest]), value


def _block(kind, number):
    return [{"block": "resnets", "attn": "attentions"}[kind], number]
