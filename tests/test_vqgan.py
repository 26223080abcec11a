import dataclasses
import re
import warnings

import pytest
import torch
from torch import nn

from vqgan import (
    VQGAN,
    VQGAN_PRESETS,
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    ResBlock,
    Upsample,
    VQGANConfig,
)

# Attention inside a level, a level whose width stays and two that widen; two channels to a group
# at the least.
SMALL = VQGANConfig(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, attn_levels=(2,), z_channels=6,
                    embed_dim=4, K=32, norm_groups=4)
SMALL_KL = dataclasses.replace(SMALL, latent="kl")
LATENTS = pytest.mark.parametrize("config", [SMALL, SMALL_KL], ids=["vq", "kl"])


def image(B=2, H=16, W=24):
    return torch.rand(B, 3, H, W) * 2 - 1


def generators(B=2):
    return [torch.Generator().manual_seed(i) for i in range(B)]


def forward(model, x, generator=None):
    """(x_hat, latent_loss) of a training pass, as train_autoencoder goes through it."""
    h, latent_loss = model(x, generator)
    return model.decoder.conv_out(h).float(), latent_loss


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- sizes, names, norms


@pytest.mark.parametrize(("config", "encoder", "decoder"), [
    (VQGAN_PRESETS["kl-f8"], 34_163_592, 49_490_179),
    (VQGANConfig(ch_mult=(1, 2, 4), attn_levels=(), z_channels=3, embed_dim=3, K=8192),
     22_337_411, 32_960_771),                                               # vq-f4
    (VQGAN_PRESETS["vq-f8"], 27_397_764, 40_253_955),
    (VQGAN_PRESETS["vq-f16"], 29_298_176, 42_449_795),
], ids=["kl-f8", "vq-f4", "vq-f8", "vq-f16"])
def test_the_public_models_have_their_parameter_counts(config, encoder, decoder):
    with torch.device("meta"):
        model = VQGAN(config)
    assert (count(model.encoder), count(model.decoder)) == (encoder, decoder)
    if config.latent == "kl":                            # Stable Diffusion's first stage in all
        assert (count(model.quant_conv), count(model.post_quant_conv)) == (72, 20)
        assert (count(model), len(model.state_dict())) == (83_653_863, 248)


def test_keys_are_those_of_the_public_checkpoints():
    with torch.device("meta"):
        names = {preset: {name: tuple(p.shape) for name, p in VQGAN(config).state_dict().items()}
                 for preset, config in VQGAN_PRESETS.items()}
    assert names["vq-f16"].items() >= {
        "encoder.down.0.block.0.norm1.weight": (128,),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.4.attn.1.proj_out.bias": (512,),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.conv_out.weight": (256, 512, 3, 3),
        "quant_conv.weight": (256, 256, 1, 1),
        "quantize.embedding.weight": (1024, 256),
        "post_quant_conv.bias": (256,),
        "decoder.conv_in.weight": (512, 256, 3, 3),
        "decoder.up.4.attn.2.k.weight": (512, 512, 1, 1),       # up[4] is the lowest resolution
        "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.3.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.0.block.2.conv2.bias": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }.items()
    assert names["kl-f8"]["encoder.conv_out.weight"] == (8, 512, 3, 3)       # mean and logvar
    assert names["kl-f8"]["quant_conv.weight"] == (8, 8, 1, 1)
    assert names["vq-f8"]["quantize.embedding.weight"] == (16384, 4)
    for absent in ["encoder.down.4.downsample.conv.weight", "encoder.down.3.attn.0.q.weight",
                   "decoder.up.0.upsample.conv.weight", "decoder.up.0.attn.0.q.weight",
                   "encoder.down.1.block.0.nin_shortcut.weight"]:
        assert absent not in names["vq-f16"]
    assert not any(name.startswith("quantize") for name in names["kl-f8"])


@pytest.mark.parametrize("preset", VQGAN_PRESETS)
def test_every_group_norm_has_eps_1e_6_and_the_configs_groups(preset):
    config = VQGAN_PRESETS[preset]
    with torch.device("meta"):
        model = VQGAN(config)
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert {(m.eps, m.num_groups) for m in norms} == {(1e-6, config.norm_groups)}


# ---------------------------------------------------------------- the blocks, against slow forms


def test_a_res_block_is_its_formula():
    block, x = ResBlock(8, 12, norm_groups=4), torch.randn(2, 8, 5, 6)

    def norm(h, layer):                              # GroupNorm by hand
        groups = h.reshape(len(h), 4, -1)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
        h = ((groups - mean) / (var + 1e-6).sqrt()).reshape(h.shape)
        return h * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)

    for layer in (block.norm1, block.norm2):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    h = norm(x, block.norm1)
    h = block.conv1(h * h.sigmoid())
    h = norm(h, block.norm2)
    h = block.conv2(h * h.sigmoid()) + block.nin_shortcut(x)
    torch.testing.assert_close(block(x), h, rtol=1e-4, atol=1e-5)
    assert not hasattr(ResBlock(8, 8, norm_groups=4), "nin_shortcut")


def test_downsampling_pads_one_pixel_right_and_below_only():
    down, x = Downsample(3), torch.randn(2, 3, 6, 8)
    padded = torch.zeros(2, 3, 7, 9)
    padded[:, :, :6, :8] = x
    expected = torch.zeros(2, 3, 3, 4)
    for i in range(3):
        for j in range(4):
            window = padded[:, None, :, 2 * i:2 * i + 3, 2 * j:2 * j + 3]
            expected[:, :, i, j] = (window * down.conv.weight).sum((2, 3, 4)) + down.conv.bias
    torch.testing.assert_close(down(x), expected)


def test_upsampling_doubles_every_pixel_then_convolves():
    up, x = Upsample(3), torch.randn(2, 3, 4, 5)
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(x), up.conv(doubled))


def test_attention_is_the_explicit_sum_over_positions():
    block, x = AttnBlock(8, norm_groups=4), torch.randn(2, 8, 5, 6)
    h = block.norm(x)
    q, k, v = (conv(h).flatten(2) for conv in (block.q, block.k, block.v))
    weight = torch.einsum("bcq,bck->bqk", q, k * 8 ** -0.5).softmax(-1)
    expected = x + block.proj_out(torch.einsum("bqk,bck->bcq", weight, v).view_as(x))
    direction, ours = torch.randn_like(x), block(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad((y * direction).sum(), list(block.parameters()))
                      for y in (ours, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_attention_sits_after_each_block_of_its_level_only():
    encoder, decoder = Encoder(SMALL), Decoder(SMALL)
    assert [len(level.attn) for level in encoder.down] == [0, 0, 1]
    assert [len(level.attn) for level in decoder.up] == [0, 0, 2]
    assert [len(level.block) for level in decoder.up] == [2, 2, 2]


def test_channels_last_changes_no_value():
    model, x = VQGAN(SMALL_KL), image()
    expected = model.decode(model.encode(x))
    model.to(memory_format=torch.channels_last)
    ours = model.decode(model.encode(x.to(memory_format=torch.channels_last)))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- encode, decode, forward


def test_codes_decode_to_the_reconstruction_bit_for_bit():
    model, x = VQGAN(SMALL).eval(), image(H=16, W=24)
    indices = model.indices(x)
    assert (indices.shape, indices.dtype, SMALL.f) == ((2, 4, 6), torch.int64, 4)
    assert torch.equal(model.decode_indices(indices), model.decode(model.encode(x)))
    x_hat, latent_loss = forward(model, x)
    assert (x_hat.shape, latent_loss.shape) == (x.shape, ())
    assert torch.equal(x_hat, model.decode_indices(indices))
    assert torch.equal(model.encode(x), model.quantize(model.moments(x))[0])


def test_a_kl_latent_is_its_mode_or_a_sample():
    model, x = VQGAN(SMALL_KL), image()
    gaussian = model.moments(x)
    assert gaussian.mean.shape == (2, 4, 4, 6)
    assert torch.equal(model.encode(x), gaussian.mean)
    sample = model.encode(x, sample=True, generator=generators())
    assert torch.equal(sample, gaussian.sample(generators()))
    assert not torch.equal(sample, gaussian.mean)
    x_hat, latent_loss = forward(model, x, generator=generators())
    assert torch.equal(x_hat, model.decode(sample))
    assert torch.equal(latent_loss, gaussian.kl().mean())


@pytest.mark.parametrize("shape", [(2, 3, 18, 16), (2, 3, 16, 17), (2, 1, 16, 16), (3, 16, 16)])
def test_images_that_do_not_fit_are_refused(shape):
    model = VQGAN(SMALL)
    for use in (model, model.encode, model.moments, model.indices):
        with pytest.raises(ValueError, match=f"multiples of f=4, not {re.escape(str(shape))}"):
            use(torch.zeros(shape))


def test_the_quantiser_takes_its_settings_from_the_config():
    config = dataclasses.replace(SMALL, beta=0.5, legacy_beta=True, code_range=2.0)
    quantizer = VQGAN(config).quantize
    assert (quantizer.K, quantizer.d, quantizer.beta) == (32, 4, 0.5)
    assert quantizer.legacy_beta
    assert 1 < quantizer.embedding.weight.abs().max() <= 2


def test_a_width_that_the_groups_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiples of norm_groups=4"):
        Decoder(SMALL, ch=6)


@LATENTS
def test_bf16_autocast_gives_float32_latents_and_images_near_the_float32_ones(config):
    model, x = VQGAN(config), image()
    expected = model.decode(model.encode(x))
    with torch.autocast("cpu", torch.bfloat16):
        z = model.encode(x)
        ours = model.decode(z)
        x_hat, latent_loss = forward(model, x, generator=generators())
    assert {t.dtype for t in (z, ours, x_hat, latent_loss)} == {torch.float32}
    (x_hat.square().mean() + latent_loss).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if config.latent == "kl":             # codes may flip
        assert (ours - expected).norm() < 0.05 * expected.norm()


# ---------------------------------------------------------------- gradients


def without_gradient(model, loss):
    """Names of the parameters whose gradient is at most 1e-7 of the largest entry of all."""
    loss.backward()
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    return {name for name, p in model.named_parameters()
            if p.grad is None or p.grad.abs().max() <= 1e-7 * largest}


def any_loss(x_hat):
    """Depends on each output pixel in its own way."""
    return (x_hat * torch.randn_like(x_hat)).sum() + x_hat.square().sum()


def spread_codes(model):
    if model.config.latent == "vq":       # so that several are in use and far from their outputs
        nn.init.normal_(model.quantize.embedding.weight)


@LATENTS
def test_every_parameter_gets_a_gradient_except_what_softmax_cannot_see(config):
    model = VQGAN(config)
    spread_codes(model)
    x_hat, latent_loss = forward(model, image(), generator=generators())
    dead = without_gradient(model, any_loss(x_hat) + latent_loss)
    # k.bias adds q·bias to all scores of a query, and softmax does not see a common summand.
    assert all(name.endswith(("attn_1.k.bias", "attn.0.k.bias", "attn.1.k.bias")) for name in dead)


def test_a_bias_before_a_norm_of_one_channel_a_group_has_no_gradient_and_nothing_else():
    """In float64, where zero by identity is told from small. The norm subtracts each channel's
    mean, so a channel's constant summand leaves no trace."""
    config = dataclasses.replace(SMALL, norm_groups=8, attn_levels=())     # level 0 has 8
    decoder = Decoder(config).double()
    dead = without_gradient(decoder, any_loss(decoder(torch.randn(2, 6, 4, 6).double())))
    # conv1 is before a norm; all that is added to the stream of level 0 ends in norm_out.
    assert dead == {f"up.0.block.{name}.bias" for name in (
        "0.conv1", "1.conv1", "0.conv2", "1.conv2", "0.nin_shortcut")} | {"mid.attn_1.k.bias"}


def test_checkpointing_recomputes_every_level_and_changes_no_gradient():
    decoder, z = Decoder(SMALL), torch.randn(2, 6, 4, 6)
    runs = []
    decoder.up[1].block[0].register_forward_hook(lambda *_: runs.append(1))

    def gradients():
        decoder.zero_grad()
        decoder(z).square().sum().backward()
        return {name: p.grad for name, p in decoder.named_parameters()}

    plain = gradients()
    assert len(runs) == 1
    decoder.checkpointing = True
    for name, grad in gradients().items():
        assert torch.equal(grad, plain[name]), name
    assert len(runs) == 3
    with torch.no_grad():
        decoder(z)
    assert len(runs) == 4


@LATENTS
def test_a_first_stage_without_its_decoder_still_encodes_and_says_so_when_it_should_decode(config):
    whole, bare, x = VQGAN(config).eval(), VQGAN(config, own_decoder=False).eval(), image()
    bare.load_state_dict({name: value for name, value in whole.state_dict().items()
                          if not name.startswith("decoder.")})
    with torch.no_grad():
        z = bare.encode(x)
        assert torch.equal(z, whole.encode(x))
        with pytest.raises(ValueError, match="without a decoder of its own"):
            bare.decode(z)


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize(("backend", "tolerance"), [
    ("aot_eager", 1e-6), pytest.param("inductor", 1e-4, marks=pytest.mark.slow)])
@LATENTS
def test_a_compiled_model_gives_the_same_gradients_without_a_warning(config, backend, tolerance):
    if backend == "aot_eager":
        config = dataclasses.replace(config, ch_mult=(1, 2), attn_levels=())
    model, x = VQGAN(config), image()
    spread_codes(model)

    def run():
        model.zero_grad()
        x_hat, latent_loss = forward(model, x, generator=generators())
        (x_hat.square().mean() + latent_loss).backward()
        return [x_hat.detach(), *(p.grad for p in model.parameters())]

    eager = run()
    torch.compiler.reset()
    model.compile(backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Guards may run slower")       # Python 3.13.0
        run()
        with torch.compiler.set_stance("fail_on_recompile"):
            for a, b in zip(run(), eager):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert backend == "inductor" or not [str(w.message) for w in caught]
