import copy
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from table_rows import slow_forward
from torch import nn

from asym_decoder import ASYM_PRESETS, AsymDecoder, AsymVQGAN, ConditionBranch, mask_guided_blend
from pconv import PartialConv2d
from vqgan import VQGAN, VQGAN_PRESETS, VQGANConfig

CONFIG = VQGANConfig(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, attn_levels=(), z_channels=6,
                     embed_dim=4, K=32, norm_groups=4)
KL_F8 = VQGAN_PRESETS["kl-f8"]
BLENDS = pytest.mark.parametrize("blend", ["add", "concat"])
SIZE = (16, 24)


def images(B=2, size=SIZE, dtype=torch.float32):
    return torch.rand(B, 3, *size, dtype=dtype) * 2 - 1


def masks(B=2, size=SIZE, dtype=torch.float32):
    """Rectangles at odd places, none full, none empty."""
    mask = torch.zeros(B, 1, *size, dtype=dtype)
    for b in range(B):
        mask[b, :, 3 + b:size[0] - 4, 5:size[1] - 6 - b] = 1
    return mask


def latents(B=2, size=SIZE, channels=6, dtype=torch.float32):
    return torch.randn(B, channels, size[0] // 4, size[1] // 4, dtype=dtype)


def generators(first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(2)]


def model(blend="add", config=CONFIG):
    return AsymVQGAN(VQGAN(config), AsymDecoder(config, config.ch, 1, blend)).eval()


def forward(asym, x, mask, generator=None):
    """x_hat of a training pass, as train_autoencoder goes through it."""
    return asym.decoder.conv_out(asym(x, mask, generator)).float()


def count(parameters):
    return sum(p.numel() for p in parameters)


# ---------------------------------------------------------------- sizes and layers


@pytest.mark.parametrize(("preset", "add", "concat"), [
    ("base", 60_276_227, 1_740_544), ("large", 160_136_835, 3_913_344),
    ("large2", 371_966_467, 6_954_496)])
def test_the_papers_sizes_on_the_kl_f8_plan(preset, add, concat):
    with torch.device("meta"):
        plain = AsymDecoder.from_preset(KL_F8, preset)
        fused = AsymDecoder.from_preset(KL_F8, preset, "concat")
    assert count(plain.parameters()) == add
    assert count(fused.parameters()) == add + concat
    assert count(fused.fuse.parameters()) == concat
    for decoder in (plain, fused):
        trunk, branch = decoder.split_parameters()
        assert trunk | branch == dict(decoder.named_parameters())
        assert not trunk.keys() & branch.keys()
    if preset == "base":                                 # the first stage's decoder and a branch
        with torch.device("meta"):
            vanilla = VQGAN(KL_F8).decoder
        trunk, branch = plain.split_parameters()
        assert count(trunk.values()) == count(vanilla.parameters()) == 49_490_179
        assert count(branch.values()) == 10_786_048
        assert plain.load_trunk(vanilla)


@BLENDS
def test_the_layers_are_those_of_table_7(blend):
    with torch.device("meta"):
        decoder = AsymDecoder.from_preset(KL_F8, "base", blend)
    widths = [128, 256, 512, 512, 512]
    layers = list(decoder.encoder.layers)
    assert [(c.in_channels, c.out_channels) for c in layers] == list(zip([3, *widths], widths))
    assert [c.kernel_size[0] for c in layers] == [3, 3, 4, 4, 4]
    assert [c.stride[0] for c in layers] == [1, 1, 2, 2, 2]
    assert [len(level.block) for level in decoder.up] == [3, 3, 3, 3]
    assert {f"encoder.layers.{i}.{kind}" for i in range(5) for kind in ("weight", "bias")} == \
        {name for name in decoder.state_dict() if name.startswith("encoder.")}   # the authors'
    assert {isinstance(c, PartialConv2d) for c in layers} == {blend == "concat"}
    assert hasattr(decoder, "fuse") == (blend == "concat")
    if blend == "concat":
        assert [c.in_channels for c in decoder.fuse] == [257, 513, 1025, 1025, 1025]
        assert [c.out_channels for c in decoder.fuse] == widths


def test_an_unknown_blend_is_refused():
    with pytest.raises(ValueError, match='"add" or "concat"'):
        AsymDecoder(CONFIG, 8, 1, blend="multiply")


@pytest.mark.parametrize("preset", ASYM_PRESETS)
def test_presets_scale_the_first_stages_widths_and_depth(preset):
    with torch.device("meta"):
        decoder = AsymDecoder.from_preset(CONFIG, preset)
    factor, num_res_blocks = ASYM_PRESETS[preset]
    assert decoder.conv_out.in_channels == 8 * factor
    assert [len(level.block) for level in decoder.up] == [num_res_blocks + 1] * 3


# ---------------------------------------------------------------- the branch and the blends


@pytest.mark.parametrize("partial", [False, True])
def test_features_are_taken_before_the_relu_and_halve_from_the_third_on(partial):
    branch = ConditionBranch([4, 6, 8, 10], partial)
    image, mask = images(), masks()
    features = branch(image, mask)
    assert [tuple(f.shape[1:]) for f in features] == [(4, 16, 24), (6, 16, 24), (8, 8, 12),
                                                      (10, 4, 6)]
    h, valid = image * (1 - mask), 1 - mask
    for layer, feature in zip(branch.layers, features):
        if partial:
            h, valid = layer(h, valid)
        else:
            h = F.conv2d(h, layer.weight, layer.bias, layer.stride, padding=1)
        torch.testing.assert_close(feature, h)
        assert (feature < 0).any()
        h = h.clamp(min=0)


@BLENDS
def test_features_do_not_depend_on_the_pixels_to_be_generated(blend):
    decoder, image, mask = AsymDecoder(CONFIG, 8, 1, blend), images(), masks()
    changed = torch.where(mask == 1, 100 * torch.randn_like(image), image)
    for a, b in zip(decoder.encoder(image, mask), decoder.encoder(changed, mask)):
        assert torch.equal(a, b)


def test_the_blend_is_equation_4():
    f_dec, f_enc = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    mask = (torch.rand(2, 1, 4, 4) > 0.5).float()
    chosen = mask_guided_blend(f_dec, f_enc, mask)
    assert torch.equal(chosen, torch.where(mask.bool(), f_dec, f_enc))


@BLENDS
def test_the_forward_pass_is_the_tables_row_by_row(blend):
    decoder, z, image, mask = AsymDecoder(CONFIG, 12, 2, blend), latents(), images(), masks()
    torch.testing.assert_close(decoder(z, image, mask), slow_forward(decoder, z, image, mask))


@BLENDS
@pytest.mark.parametrize(("ch", "ch_mult"), [(8, (1, 1, 2, 4)), (8, (4, 2, 1)), (12, (1, 3)),
                                             (8, (1, 1, 1, 1, 1, 2)), (8, (1,))], ids=str)
def test_any_width_plan_and_number_of_levels_can_be_built_and_trained(blend, ch, ch_mult):
    """Widths like (32,32,64,128), where a level's shape does not tell which level it is."""
    config = dataclasses.replace(CONFIG, ch=ch, ch_mult=ch_mult)
    decoder, f = AsymDecoder(config, ch, 1, blend), config.f
    assert len(decoder.encoder.layers) == len(ch_mult) + 1
    image, mask = images(1, (32, 64)), masks(1, (32, 64))
    x_hat = decoder(torch.randn(1, 6, 32 // f, 64 // f), image, mask)
    assert x_hat.shape == image.shape
    x_hat.square().sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())


# ---------------------------------------------------------------- what the mask means


@BLENDS
def test_without_a_mask_and_under_a_full_mask_it_is_the_same_function_of_z_alone(blend):
    asym, z, image = model(blend), latents(channels=4), images()
    full = torch.ones(2, 1, *SIZE)
    plain = asym.decode(z)
    assert torch.equal(asym.decode(z, image=image, mask=full), plain)
    assert not torch.equal(asym.decode(z, image=image, mask=masks()), plain)


def test_an_empty_mask_makes_the_sum_independent_of_the_latent():
    decoder, image, empty = AsymDecoder(CONFIG, 8, 1), images(), torch.zeros(2, 1, *SIZE)
    known = decoder(latents(), image, empty)
    assert torch.equal(decoder(100 * latents(), image, empty), known)
    assert not torch.equal(decoder(latents(), images(), empty), known)


def test_known_pixels_depend_on_the_latent_only_next_to_the_mask_or_through_the_last_norm():
    decoder, image, mask = AsymDecoder(CONFIG, 8, 1), images(), masks()
    far = F.max_pool2d(mask, 3, stride=1, padding=1).expand(-1, 3, -1, -1) == 0
    ring = (mask == 0).expand(-1, 3, -1, -1) & ~far

    def change():
        return (decoder(latents(), image, mask) - decoder(latents(), image, mask)).abs()

    assert change()[far].max() > 0                       # the norm's statistics
    decoder.norm_out = nn.Identity()
    assert change()[far].max() == 0
    assert change()[ring].max() > 0                      # conv_out reaches one pixel
    assert change()[(mask == 1).expand(-1, 3, -1, -1)].max() > 0


def test_add_without_a_mask_is_the_vanilla_decoder():
    vanilla, decoder, z = VQGAN(CONFIG).decoder, AsymDecoder(CONFIG, 8, 1), latents()
    decoder.load_trunk(vanilla)
    assert torch.equal(decoder(z), vanilla(z))


def test_concat_without_a_mask_joins_features_of_zero_and_a_mask_of_one(monkeypatch):
    decoder, z, full = AsymDecoder(CONFIG, 8, 1, "concat"), latents(), torch.ones(2, 1, *SIZE)
    plain = decoder(z)
    shapes = [f.shape for f in decoder.encoder(images(), masks())]
    monkeypatch.setattr(decoder.encoder, "forward", lambda *_: [torch.zeros(s) for s in shapes])
    torch.testing.assert_close(plain, slow_forward(decoder, z, images(), full))


# ---------------------------------------------------------------- gradients, the trunk, frozenness


def gradients(decoder, x_hat, target):
    decoder.zero_grad()
    (x_hat - target).square().sum().backward()
    return {name: p.grad for name, p in decoder.named_parameters()}


# k.bias adds q·bias to all scores of a query, and softmax does not see a common summand.
UNSEEN = {"mid.attn_1.k.bias"}
BEFORE_A_NORM = {f"up.0.block.{j}.conv1.bias" for j in (0, 1)}


@pytest.mark.parametrize(("blend", "norm_groups", "expected"), [
    ("add", 4, UNSEEN), ("concat", 4, UNSEEN), ("add", 8, UNSEEN | BEFORE_A_NORM)])
def test_all_parameters_get_gradients_but_what_softmax_or_a_norm_of_one_channel_cannot_see(
        blend, norm_groups, expected):
    """In float64, where zero by identity is told from small. Level 0 has 8 channels: a norm of 8
    groups subtracts each channel's mean, so a summand before it leaves no trace. What a level adds
    to its stream does leave one here: the blend breaks the constancy."""
    config, dtype = dataclasses.replace(CONFIG, norm_groups=norm_groups), torch.float64
    decoder = AsymDecoder(config, 8, 1, blend).double()
    x_hat = decoder(latents(dtype=dtype), images(dtype=dtype), masks(dtype=dtype))
    grads = gradients(decoder, x_hat, images(dtype=dtype))
    largest = max(grad.abs().max() for grad in grads.values())
    assert expected == {name for name, grad in grads.items() if grad.abs().max() <= 1e-7 * largest}


def test_the_trunk_loads_the_first_stages_decoder_one_to_one():
    vanilla, decoder = VQGAN(CONFIG).decoder, AsymDecoder(CONFIG, 8, 1)
    branch = {name: p.clone() for name, p in decoder.split_parameters()[1].items()}
    assert decoder.load_trunk(vanilla)
    loaded = decoder.state_dict()
    for name, value in vanilla.state_dict().items():
        assert torch.equal(loaded[name], value), name
    assert all(torch.equal(loaded[name], value) for name, value in branch.items())


@pytest.mark.parametrize("attn_levels", [(), (0, 1)])
def test_a_trunk_twice_as_wide_starts_as_the_first_stages_decoder_and_its_copies_learn_apart(
        attn_levels):
    config = dataclasses.replace(CONFIG, attn_levels=attn_levels)
    vanilla, decoder = VQGAN(config).decoder.double(), AsymDecoder(config, 16, 1).double()
    assert decoder.load_trunk(vanilla)
    z = latents(dtype=torch.float64)
    torch.testing.assert_close(decoder(z), vanilla(z), rtol=0, atol=1e-12)
    decoder(z).square().mean().backward()
    for name, parameter in decoder.split_parameters()[0].items():
        # The gradient of q is made of k and the other way round: they part when their inputs do.
        if parameter.ndim == 4 and not name.endswith(("conv_out.weight", "q.weight", "k.weight")):
            first, second = parameter.grad[0::2], parameter.grad[1::2]      # of the copies
            assert (first - second).abs().max() > 1e-3 * first.abs().max(), name


@pytest.mark.parametrize(("ch", "num_res_blocks"), [(12, 1), (8, 2)])
def test_another_size_does_not_take_the_first_stages_decoder(ch, num_res_blocks):
    decoder = AsymDecoder(CONFIG, ch, num_res_blocks)
    before = copy.deepcopy(decoder.state_dict())
    assert not decoder.load_trunk(VQGAN(CONFIG).decoder)
    assert all(torch.equal(before[name], value) for name, value in decoder.state_dict().items())


# ---------------------------------------------------------------- a start with pinned statistics


def deviations(decoder, z):
    """The deviation of each group of the last GroupNorm's input, one row for an image."""
    h = decoder.blended(z).unflatten(1, (decoder.norm_out.num_groups, -1)).flatten(2)
    return h.var(2, correction=0).sqrt()                                    # (N, G)


def pinned(blend, z, size=3.0):
    """A vanilla decoder, and an asymmetric one that starts from it, pinned at z."""
    vanilla, decoder = VQGAN(CONFIG).decoder.requires_grad_(False), model(blend).decoder
    decoder.requires_grad_(False).load_trunk(vanilla)
    decoder.pass_trunk()
    decoder.pin_statistics(z, size)
    return vanilla, decoder


@BLENDS
def test_a_trunk_that_is_passed_on_decodes_as_the_first_stage_does_without_a_mask(blend):
    vanilla, decoder, z = VQGAN(CONFIG).decoder, model(blend).decoder, latents()
    decoder.load_trunk(vanilla)
    decoder.pass_trunk()
    torch.testing.assert_close(decoder(z), vanilla(z))
    x, known = images(), decoder(z, images(), masks())
    assert not torch.allclose(known, decoder(z, x, masks()))                # the image still counts


@BLENDS
def test_an_image_with_the_mean_deviations_is_decoded_as_before_the_pinning(blend):
    z = latents(1)                                          # of one image its own are the mean
    vanilla, decoder = pinned(blend, z)
    assert (decoder(z) - vanilla(z)).abs().max() < 1e-5
    assert (decoder(latents(1)) - vanilla(latents(1))).abs().max() > 1e-3


@BLENDS
def test_pinned_statistics_differ_less_between_images_the_larger_the_constants(blend):
    z = latents(6) * torch.linspace(0.2, 3, 6)[:, None, None, None]
    spreads = []
    for size in (1e-6, 3.0, 10.0):
        torch.manual_seed(0)
        found = deviations(pinned(blend, z, size)[1], z)
        spreads.append((found.std(0) / found.mean(0)).max().item())
    assert spreads[0] > 2 * spreads[1] > 4 * spreads[2]


def test_known_pixels_and_hole_get_the_same_constants():
    z, decoder = latents(), model().decoder
    before = [layer.bias.clone() for layer in (decoder.encoder.layers[0],
                                               decoder.up[0].block[-1].conv2)]
    decoder.pin_statistics(z)
    after = [decoder.encoder.layers[0].bias, decoder.up[0].block[-1].conv2.bias]
    branch, trunk = ((b - a).unflatten(0, (4, 2)) for a, b in zip(before, after))
    torch.testing.assert_close(branch, trunk)
    assert (branch[:, 0] > 0).all()
    torch.testing.assert_close(branch[:, 0], -branch[:, 1])                 # the means stay


@pytest.mark.parametrize(("blend", "latent"), [("add", "kl"), ("concat", "vq")])
def test_training_moves_all_of_the_decoder_and_not_a_bit_of_the_first_stage(blend, latent):
    asym = model(blend, dataclasses.replace(CONFIG, latent=latent)).train()
    before = copy.deepcopy(asym.state_dict())
    optimizer = torch.optim.Adam([p for p in asym.parameters() if p.requires_grad], lr=1e-3)
    for step in range(3):
        x = images()
        x_hat = forward(asym, x, masks(), generators(10 * step))
        optimizer.zero_grad()
        (x_hat - x).abs().mean().backward()
        optimizer.step()
    after = asym.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert not [name for name in moved if name.startswith("first_stage.")]
    still = {name for name in after if name.startswith("decoder.")} - moved
    assert still <= {"decoder.mid.attn_1.k.bias"}


def test_no_gradient_reaches_the_first_stage_by_any_way():
    asym, x, mask = model(), images(), masks()
    (forward(asym, x, mask) + asym.decode(asym.encode(x), image=x, mask=mask)).sum().backward()
    for name, p in asym.first_stage.named_parameters():
        assert not p.requires_grad, name
        assert p.grad is None, name


@BLENDS
def test_a_training_pass_is_a_decoding_of_the_full_images_latent(blend):
    asym, x, mask = model(blend), images(), masks()
    expected = asym.decode(asym.encode(x), image=x, mask=mask)
    assert torch.equal(forward(asym, x, mask), expected)


def test_a_kl_latent_is_sampled_in_training_by_the_generators():
    asym, x, mask = model(config=dataclasses.replace(CONFIG, latent="kl")), images(), masks()
    z = asym.encode(x, sample=True, generator=generators())
    assert torch.equal(forward(asym, x, mask, generators()), asym.decode(z, image=x, mask=mask))
    assert not torch.equal(z, asym.encode(x))


@BLENDS
def test_checkpointing_changes_no_gradient(blend):
    decoder, z, image, mask = AsymDecoder(CONFIG, 8, 1, blend), latents(), images(), masks()
    target = images()
    plain = gradients(decoder, decoder(z, image, mask), target)
    decoder.checkpointing = True
    for name, grad in gradients(decoder, decoder(z, image, mask), target).items():
        assert torch.equal(grad, plain[name]), name


@BLENDS
def test_bf16_autocast_gives_a_float32_image_near_the_float32_one(blend):
    asym, x, mask = model(blend), images(), masks()
    z = asym.encode(x)
    expected = asym.decode(z, image=x, mask=mask)
    full = torch.ones_like(mask)
    with torch.autocast("cpu", torch.bfloat16):
        ours = asym.decode(z, image=x, mask=mask)
        assert torch.equal(asym.decode(z, image=x, mask=full), asym.decode(z))
        x_hat = forward(asym.train(), x, mask)
    assert ours.dtype == x_hat.dtype == torch.float32
    assert (ours - expected).norm() < 0.05 * expected.norm()
    x_hat.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in asym.decoder.parameters())


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("z", "image", "mask", "message"), [
    ((2, 4, 4, 6), (2, 3, 16, 24), None, "give both, or neither"),
    ((2, 4, 4, 6), None, (2, 1, 16, 24), "give both, or neither"),
    ((2, 6, 4, 6), None, None, r"a latent is \(B,4,h,w\)"),
    ((4, 4, 6), None, None, r"a latent is \(B,4,h,w\)"),
    ((2, 4, 4, 6), (2, 3, 18, 24), (2, 1, 18, 24), r"must be \(2, 3, 16, 24\)"),
    ((2, 4, 4, 6), (2, 3, 16, 20), (2, 1, 16, 20), r"must be \(2, 3, 16, 24\)"),
    ((2, 4, 4, 6), (1, 3, 16, 24), (1, 1, 16, 24), r"must be \(2, 3, 16, 24\)"),
    ((2, 4, 4, 6), (2, 1, 16, 24), (2, 1, 16, 24), r"must be \(2, 3, 16, 24\)"),
    ((2, 4, 4, 6), (2, 3, 16, 24), (2, 3, 16, 24), r"and \(2, 1, 16, 24\) for latent"),
    ((2, 4, 4, 6), (2, 3, 16, 24), (2, 1, 4, 6), r"and \(2, 1, 16, 24\) for latent"),
    ((2, 4, 4, 6), (2, 3, 16, 24), (2, 16, 24), r"and \(2, 1, 16, 24\) for latent"),
], ids=str)
def test_what_does_not_fit_is_refused_in_training_too(train, z, image, mask, message):
    asym = model().train(train)
    image = None if image is None else torch.zeros(image)
    mask = None if mask is None else torch.zeros(mask)
    with pytest.raises(ValueError, match=message):
        asym.decode(torch.zeros(z), image=image, mask=mask)


def test_image_and_mask_are_given_by_name():
    with pytest.raises(TypeError):
        model().decode(latents(channels=4), images(), masks())


@pytest.mark.parametrize("value", [0.5, -1.0, 255.0, float("nan")])
def test_a_mask_that_is_not_binary_is_refused_outside_training(value):
    asym, z, image, mask = model(), latents(channels=4), images(), masks()
    mask[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="other than 0 and 1"):
        asym.decode(z, image=image, mask=mask)
    asym.train().decode(z, image=image, mask=mask)       # there it would wait for the device


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_a_binary_mask_of_any_type_will_do(dtype):
    asym, z, image, mask = model(), latents(channels=4), images(), masks()
    expected = asym.decode(z, image=image, mask=mask)
    assert torch.equal(asym.decode(z, image=image, mask=mask.to(dtype)), expected)


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize(("backend", "tolerance", "checkpointing"), [
    ("aot_eager", 1e-6, False),
    *(pytest.param("inductor", 1e-4, on, marks=pytest.mark.slow) for on in (False, True))])
@pytest.mark.parametrize(("blend", "latent"), [("add", "kl"), ("concat", "vq")])
def test_a_compiled_model_gives_the_same_gradients_for_any_masks(
        blend, latent, backend, tolerance, checkpointing):
    config = dataclasses.replace(CONFIG, ch_mult=(1, 2), latent=latent)
    asym = model(blend, config).train()
    asym.decoder.checkpointing = checkpointing
    x = images()

    def run(full):
        mask = masks()
        mask[full] = 1
        asym.zero_grad()
        x_hat = forward(asym, x, mask, generators())
        x_hat.square().mean().backward()
        return [x_hat.detach(), *(p.grad for p in asym.decoder.parameters())]

    schedule = [[], [0], [0, 1]]
    eager = [run(full) for full in schedule]
    torch.compiler.reset()
    asym.compile(backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Guards may run slower")       # Python 3.13.0
        run([])
        with torch.compiler.set_stance("fail_on_recompile"):
            for full, expected in zip(schedule, eager):
                for a, b in zip(run(full), expected):
                    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert backend == "inductor" or not [str(w.message) for w in caught]
