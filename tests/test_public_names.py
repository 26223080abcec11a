import dataclasses

import pytest
import torch

from asym_decoder import AsymDecoder
from public_names import (
    asym_decoder_size,
    complete,
    diffusers_config,
    diffusers_names,
    first_stage_config,
    taming_names,
)
from vqgan import VQGAN, VQGAN_PRESETS, VQGANConfig

KL = VQGANConfig(latent="kl", ch=8, ch_mult=(1, 2, 4, 4), num_res_blocks=1, attn_levels=(),
                 z_channels=4, embed_dim=4, norm_groups=4)
VQ = VQGANConfig(ch=8, ch_mult=(1, 2, 2), num_res_blocks=2, attn_levels=(1, 2), z_channels=6,
                 embed_dim=3, K=16, norm_groups=4)
# First stages of latent-diffusion that are no presets here: f = 4 and f = 32.
F4 = VQGANConfig(ch_mult=(1, 2, 4), attn_levels=(), z_channels=3, embed_dim=3, K=8192)
F32 = VQGANConfig("kl", ch_mult=(1, 1, 2, 2, 4, 4), attn_levels=(4, 5), z_channels=64, embed_dim=64)
PUBLIC = pytest.mark.parametrize(
    "config", [*(VQGAN_PRESETS[name] for name in ("vq-f16", "vq-f8", "kl-f8")), F4, F32],
    ids=["vq-f16", "vq-f8", "kl-f8", "vq-f4", "kl-f32"])


def weights(config, size=None, device="cpu"):
    """A state dict with the names of a public file: one decoder, the asymmetric one with `size`."""
    with torch.device(device):
        first_stage = VQGAN(config, own_decoder=size is None)
        state = first_stage.state_dict()
        if size:
            decoder = AsymDecoder(config, size["ch"], size["num_res_blocks"], size["blend"])
            state |= {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    return dict(state)


def size(ch=8, num_res_blocks=1, blend="add"):
    return {"ch": ch, "num_res_blocks": num_res_blocks, "blend": blend}


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(("ours", "theirs"), [
    ("encoder.conv_in.weight", "encoder.conv_in.weight"),
    ("encoder.down.0.block.1.nin_shortcut.bias",
     "encoder.down_blocks.0.resnets.1.conv_shortcut.bias"),
    ("encoder.down.2.downsample.conv.weight", "encoder.down_blocks.2.downsamplers.0.conv.weight"),
    ("encoder.down.2.attn.1.norm.weight", "encoder.down_blocks.2.attentions.1.group_norm.weight"),
    ("encoder.mid.block_1.norm1.weight", "encoder.mid_block.resnets.0.norm1.weight"),
    ("encoder.mid.block_2.conv2.bias", "encoder.mid_block.resnets.1.conv2.bias"),
    ("encoder.norm_out.weight", "encoder.conv_norm_out.weight"),
    ("decoder.mid.attn_1.q.bias", "decoder.mid_block.attentions.0.to_q.bias"),
    ("decoder.mid.attn_1.proj_out.bias", "decoder.mid_block.attentions.0.to_out.0.bias"),
    ("decoder.up.3.block.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"),
    ("decoder.up.0.block.2.norm2.bias", "decoder.up_blocks.3.resnets.2.norm2.bias"),
    ("decoder.up.1.upsample.conv.bias", "decoder.up_blocks.2.upsamplers.0.conv.bias"),
    ("decoder.encoder.layers.4.bias", "decoder.condition_encoder.layers.4.bias"),
    ("quantize.embedding.weight", "quantize.embedding.weight"),
    ("quant_conv.weight", "quant_conv.weight"),
    ("post_quant_conv.bias", "post_quant_conv.bias"),
])
def test_a_weight_has_one_name_here_and_one_in_diffusers(ours, theirs):
    # the decoder's first and last level tell how many there are
    ends = {f"decoder.up.{i}.block.9.conv1.bias": torch.zeros(1) for i in (0, 3)}
    state = {ours: torch.zeros(2)} | ends
    renamed = diffusers_names(state)
    assert theirs in renamed
    assert list(taming_names(renamed)) == list(state)


@PUBLIC
def test_every_published_first_stage_survives_both_renamings_and_is_recognised(config):
    state = weights(config, device="meta")
    theirs = diffusers_names(state)
    assert len(theirs) == len(state)
    assert not any(part in key for key in theirs for part in (".down.", ".up.", ".mid.", "nin_"))
    assert {value.ndim for key, value in theirs.items() if key.endswith("to_q.weight")} == {2}
    for layout in (state, taming_names(theirs)):
        assert shapes(taming_names(layout)) == shapes(state)
        assert first_stage_config(complete(layout)[0]) == config
        assert asym_decoder_size(layout, config) is None


@pytest.mark.parametrize(("preset", "ch", "num_res_blocks"), [
    ("base", 128, 2), ("large", 192, 3), ("large2", 256, 5)])
def test_every_published_decoder_survives_both_renamings_and_is_recognised(
        preset, ch, num_res_blocks):
    config = VQGAN_PRESETS["kl-f8"]
    state = weights(config, size(ch, num_res_blocks), device="meta")
    theirs = diffusers_names(state)
    assert len(theirs) == len(state)
    assert theirs["decoder.condition_encoder.layers.0.weight"].shape == (ch, 3, 3, 3)
    assert theirs["decoder.up_blocks.3.resnets.0.conv1.weight"].shape[0] == ch    # the highest
    assert shapes(taming_names(theirs)) == shapes(state)
    assert first_stage_config(state) == config
    assert asym_decoder_size(state, config) == {"preset": preset, **size(ch, num_res_blocks)}


def test_no_weight_is_exchanged_for_another_on_the_way():
    state = {name: torch.rand(value.shape) for name, value in weights(VQ).items()}
    back = taming_names(diffusers_names(state))
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_older_names_and_shapes_of_attention_are_read():
    state = weights(VQ)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    theirs = {}
    for name, value in diffusers_names(state).items():
        layer = next((new for new in old if f".{new}." in name), None)
        theirs[name.replace(f".{layer}.", f".{old[layer]}.") if layer else name] = value
    assert any("proj_attn" in name for name in theirs)
    one_dimensional = {name: value.flatten(2) if "attn" in name and value.ndim == 4 else value
                       for name, value in state.items()}
    assert any(value.ndim == 3 for value in one_dimensional.values())
    for layout in (theirs, one_dimensional):
        back = taming_names(layout)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], value) for name, value in state.items())


def test_two_names_for_one_weight_are_refused():
    state = weights(KL)
    twice = state | {"decoder.conv_norm_out.weight": torch.zeros(8)}
    with pytest.raises(ValueError, match=r"both stand for decoder\.norm_out\.weight"):
        taming_names(twice)


def test_names_that_no_layout_has_pass_through():
    strange = {"unet.down.0.x": 0, "decoder.up.x.block.0": 1, "encoder.down": 2, "decoder": 3,
               "encoder.down_blocks.0.motion.0.weight": 4}
    strange = {name: torch.tensor(value) for name, value in strange.items()}
    assert taming_names(strange) == strange
    assert diffusers_names(strange) == strange


# ---------------------------------------------------------------- sizes from shapes


def test_our_own_blend_and_sizes_are_recognised():
    for wanted in (size(blend="concat"), size(ch=16, num_res_blocks=4)):
        state = weights(KL, wanted)
        found = asym_decoder_size(state, first_stage_config(state, 4))
        assert {key: found[key] for key in wanted} == wanted
    assert found["preset"] == "own"
    state = weights(KL, size(ch=12, num_res_blocks=3))
    assert asym_decoder_size(state, KL)["preset"] == "large"


def test_a_networks_sizes_come_back_whatever_they_are():
    for config in (KL, VQ, dataclasses.replace(VQ, latent="kl", K=VQGANConfig.K),
                   dataclasses.replace(KL, ch_mult=(3,), embed_dim=2)):
        assert first_stage_config(weights(config), 4) == config


def test_groups_of_the_norms_are_as_stated_and_else_32():
    wide = dataclasses.replace(KL, ch=32, norm_groups=32)
    assert first_stage_config(weights(wide)).norm_groups == 32
    assert first_stage_config(weights(wide), 8).norm_groups == 8
    with pytest.raises(ValueError, match=r"32\] wide, .* into 32 groups; say norm_num_groups"):
        first_stage_config(weights(KL))


# ---------------------------------------------------------------- what else may be in a file


def without_convolutions(config, *names):
    return {name: value for name, value in VQGAN(config).state_dict().items()
            if name.split(".")[0] not in names}


BOTH = "quant_conv", "post_quant_conv"
NEWER = {"use_quant_conv": False, "use_post_quant_conv": False}


@pytest.mark.parametrize("stated", [None, NEWER], ids=["no-config", "config"])
def test_convolutions_around_a_kl_latent_that_may_be_missing_are_identities(stated):
    model, x = VQGAN(KL).eval(), torch.rand(1, 3, 16, 16)
    kept, notes = complete(without_convolutions(KL, *BOTH), stated)
    assert [note.split(" ")[1] for note in notes] == ["quant_conv", "post_quant_conv"]
    assert first_stage_config(kept, 4) == KL
    model.load_state_dict(kept)
    with torch.no_grad():
        h = model.encoder(x)
        assert torch.equal(model.quant_conv(h), h)
        z = torch.randn(1, KL.z_channels, 4, 4)
        assert torch.equal(model.post_quant_conv(z), z)


@pytest.mark.parametrize(("config", "lost", "stated"), [
    *((KL, lost, stated) for lost in BOTH
      for stated in ({}, NEWER | {f"use_{lost}": True}, {"_class_name": "AutoencoderKL"})),
    *((VQ, lost, stated) for lost in BOTH for stated in (None, {}, NEWER))])
def test_a_file_that_lost_a_convolution_is_refused_whatever_it_decodes_to(config, lost, stated):
    with pytest.raises(ValueError, match=f"^no {lost} in it.*use_{lost}: false.*get the whole"):
        complete(without_convolutions(config, lost), stated)
    assert complete(without_convolutions(config), stated)[1] == []


@pytest.mark.parametrize(("key", "shape", "kind"), [
    ("bn.running_mean", (8,), r"AutoencoderKLFlux2 \(Flux\.2's\)"),
    ("encoder.layers.0.weight", (8, 3, 3, 3), r"AutoencoderTiny \(TAESD\)"),
    ("encoder.stages.0.op_list.0.weight", (8,), r"AutoencoderDC \(Sana's\)"),
    ("encoder.down_blocks.0.0.conv1.weight", (8, 8, 3, 3), r"AutoencoderDC \(Sana's\)"),
    ("encoder.conv1.weight", (8, 3, 3, 3, 3), "a video's autoencoder")])
def test_another_autoencoder_is_refused_by_its_name(key, shape, kind):
    for state in ({key: torch.zeros(shape)}, weights(KL) | {key: torch.zeros(shape)}):
        with pytest.raises(ValueError, match=f"^it is {kind}, which is not supported"):
            complete(taming_names(state))


# ---------------------------------------------------------------- what diffusers can build


def test_only_latents_as_wide_as_stable_diffusions_have_its_scale_unless_another_is_stated():
    wide = dataclasses.replace(KL, z_channels=16, embed_dim=16)
    assert diffusers_config(KL, size())["scaling_factor"] == 0.18215
    for config, widths in ((wide, None), (wide, size())):
        with pytest.raises(ValueError, match=r"^no scaling_factor is stated for these 16 channels"):
            diffusers_config(config, widths)
        assert diffusers_config(config, widths, scaling_factor=0.5)["scaling_factor"] == 0.5
    assert diffusers_config(VQ)["scaling_factor"] == 0.18215


@pytest.mark.parametrize(("config", "changed"), [
    (dataclasses.replace(KL, latent="vq"), {}), (KL, {"blend": "concat"}),
    (dataclasses.replace(KL, ch_mult=(1, 2, 4)), {}),
    (dataclasses.replace(KL, ch_mult=(1, 2, 2, 4)), {}),
    (dataclasses.replace(KL, ch_mult=(2, 2, 2, 2)), {}), (dataclasses.replace(KL, embed_dim=3), {}),
], ids=["vq", "concat", "levels", "widths", "equal-widths", "latent"])
def test_a_decoder_that_diffusers_cannot_build_is_refused(config, changed):
    with pytest.raises(ValueError, match=r"^diffusers' .*(one latent width|has a KL latent)"):
        diffusers_config(config, size() | changed)
    assert diffusers_config(KL, size())["_class_name"] == "AsymmetricAutoencoderKL"


def test_a_latent_of_two_widths_is_refused_for_a_first_stage_only_where_it_is_gaussian():
    with pytest.raises(ValueError, match="one latent width, this one has two"):
        diffusers_config(dataclasses.replace(KL, embed_dim=3))
    assert diffusers_config(VQ)["vq_embed_dim"] == 3


def test_attention_in_levels_is_told_from_the_highest_level_down_and_from_the_lowest_up():
    fields = diffusers_config(VQ)
    assert fields["down_block_types"] == [
        "DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    assert fields["up_block_types"] == [
        "AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"]
