"""What one step of each image stage computes, and what the stages start from."""

import copy
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import settings, write_first_stage, write_stage
from train_process import SMALL
from training_step import latent_diffusion_step, textbook_step

import train_autoencoder
from asym_decoder import AsymDecoder, AsymVQGAN
from data import Batch, Signs, pixels, views
from distributed import UserError
from losses import discriminator_loss
from recipes import RECIPES
from refit import install_codebook
from run_folder import Run, load_optimizer
from seeding import image_generators
from train_autoencoder import (
    Autoencoder,
    DecoderStage,
    FirstStage,
    Refit,
    rebuild,
    trained_first_stage,
)
from vqgan import VQGAN, VQGANConfig

CPU = torch.device("cpu")
CONFIG = VQGANConfig(**SMALL)
SMALL_RECIPE = replace(RECIPES["decoder"]["tiny"], ndf=8)


def a_run(out="nowhere", data=("train", "val"), **more):
    config = settings() | {"precision": "fp32", "checkpointing": False,
                           "first_stage": asdict(CONFIG)} | more
    train_set, val_set = (Signs(split, 32, limit=n) for split, n in zip(data, (12, 10)))
    return Run(config, out, CPU, 0, train_set, val_set)


def batch(n=4, size=32, full=(False, True, False, False)):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 3, size, size, generator=generator) * 2 - 1
    mask = torch.ones(n, 1, size, size)
    mask[[i for i in range(n) if not full[i]], :, :, : size // 2] = 0
    return Batch(list(range(n)), x, mask)


def part(whole, low, high):
    return Batch(whole.index[low:high], whole.x[low:high], whole.mask[low:high])


def vqgan(latent="vq", recipe=SMALL_RECIPE, **more):
    torch.manual_seed(3)
    config = asdict(replace(CONFIG, latent=latent))
    return FirstStage(a_run(first_stage=config, **more), recipe, None)


def decoder(blend="add", latent="vq", recipe=SMALL_RECIPE, **more):
    torch.manual_seed(3)
    first_stage = VQGAN(replace(CONFIG, latent=latent)).eval()
    loaded = SimpleNamespace(model=first_stage, parent="hash")
    size = {"preset": "tiny", "blend": blend}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_autoencoder, "trained_first_stage", lambda *_: (loaded, None))
        return DecoderStage(a_run(decoder=size, **more), recipe, None)


def refit(recipe=SMALL_RECIPE, **more):
    torch.manual_seed(3)
    model = VQGAN(CONFIG)
    install_codebook(model, torch.randn(12, CONFIG.embed_dim))
    stage = Refit.__new__(Refit)
    trained = [p for p in model.parameters() if p.requires_grad]
    Autoencoder.__init__(stage, a_run(**more), "refit", recipe, model, [(trained, 1.0)])
    return stage


def save_and_load(first, second, path):
    """As train.py: what a stage is, and its optimizers."""
    torch.save([first.state_dict(), {n: o.state_dict() for n, o in first.optimizers.items()}], path)
    state, optimizers = torch.load(path, weights_only=True)
    second.load_state_dict(state)
    for name, optimizer in second.optimizers.items():
        load_optimizer(optimizer, optimizers[name])


STAGES = {"vqgan": vqgan, "decoder": decoder, "refit": refit}


@contextmanager
def float64():
    """All numbers in float64, so that what differs, differs by more than rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(one, two, relative=1e-6):
    assert one.keys() == two.keys()
    for name in one:
        worst = (one[name] - two[name]).abs().max().item()
        assert worst <= max(1e-8, relative * two[name].abs().max().item()), name


# -- one step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gan", ["hinge", "log"])
@pytest.mark.parametrize("rule", ["paper", "taming"])
@pytest.mark.parametrize(("name", "options"), [
    ("vqgan", {"latent": "vq"}), ("vqgan", {"latent": "kl"}), ("refit", {}),
    ("decoder", {"blend": "add"}), ("decoder", {"blend": "concat", "latent": "kl"})])
def test_a_step_gives_the_textbooks_gradients_to_both_players(name, options, rule, gan):
    recipe = replace(SMALL_RECIPE, lambda_rule=rule, latent_weight=0.01, gan=gan)
    stage, data = STAGES[name](recipe=recipe, **options), batch()
    stage.perceptual = lambda a, b: (a - b).square().mean((1, 2, 3))
    slow = copy.deepcopy(stage)
    terms = stage.step(data, gan_on=True)
    noise = image_generators(0, name, range(4)) if options.get("latent") == "kl" else None

    def encode():
        if name == "decoder":
            return slow.model(data.x, data.mask, noise), None
        return slow.model(data.x, noise)

    latent_weight = 0.01 / (data.x[0].numel() if options.get("latent") == "kl" else 1)
    generator, discriminator, weight = textbook_step(
        slow.model, slow.discriminator, encode, data.x, latent_weight, slow.perceptual, gan, rule)
    assert_close(gradients(stage.model), generator, 1e-4)
    assert_close(gradients(stage.discriminator), discriminator, 1e-4)
    assert terms["lambda"].item() == pytest.approx(weight.item(), rel=1e-4)


@pytest.mark.parametrize(("logits", "clamped"), [(0.01, True), (100, False)])
def test_a_kl_first_stages_step_is_latent_diffusions_divided_by_its_number_of_elements(
        logits, clamped):
    with float64():
        stage, data = vqgan("kl", replace(RECIPES["vqgan"]["kl"], ndf=8)), batch()
        stage.perceptual = lambda a, b: (a - b).square().mean((1, 2, 3))
        with torch.no_grad():            # weak logits make lambda large, strong ones small
            stage.discriminator.main[-1].weight *= logits
        slow = copy.deepcopy(stage)
        terms = stage.step(data, gan_on=True)
        theirs, ratio, weight = latent_diffusion_step(
            slow.model, slow.discriminator, data.x, image_generators(0, "vqgan", range(4)),
            slow.perceptual)
        elements = 3 * 32 * 32
        assert (ratio > 1e4) == clamped
        assert_close({name: elements * g for name, g in gradients(stage.model).items()}, theirs,
                     1e-9)
        assert terms["lambda"].item() * elements == pytest.approx(weight.item(), rel=1e-9)
        # Of a KL term of no weight, or of 3HW times its weight, the comparison would have told.
        for wrong in (0, 1e-6 * elements):
            slow.recipe = replace(slow.recipe, latent_weight=wrong)
            slow.model.zero_grad()
            slow.step(data, gan_on=True)
            ours, right = gradients(slow.model)["quant_conv.weight"], theirs["quant_conv.weight"]
            assert (elements * ours - right).abs().max() > 1e-7 * right.abs().max()


@pytest.mark.parametrize("name", ["vqgan", "decoder"])
@pytest.mark.parametrize("latent", ["vq", "kl"])
def test_micro_batches_add_up_to_the_whole_batchs_gradient(name, latent):
    with float64():
        stage, whole = STAGES[name](latent=latent), batch()
        stage.step(whole, gan_on=False)
        expected = gradients(stage.model)
        stage.model.zero_grad()
        for low in (0, 2):
            stage.step(part(whole, low, low + 2), gan_on=False, scale=0.5)
    assert_close(gradients(stage.model), expected, 1e-6)


def test_before_its_start_the_discriminator_is_not_touched():
    stage = vqgan()
    stage.discriminator.register_forward_hook(lambda *_: pytest.fail("the discriminator ran"))
    before = copy.deepcopy(stage.discriminator.state_dict())
    terms = stage.step(batch(), gan_on=False)
    assert terms.keys() == {"pixel", "latent"}
    stage.update(gan_on=False)
    for name, value in stage.discriminator.state_dict().items():
        assert torch.equal(value, before[name])
    assert not stage.optimizers["discriminator"].state


def test_one_forward_of_the_network_serves_both_players():
    stage, calls = decoder(), []
    stage.model.decoder.encoder.register_forward_hook(lambda *_: calls.append(1))
    stage.step(batch(), gan_on=True)
    assert len(calls) == 1


@pytest.mark.parametrize("name", STAGES)
def test_the_generators_step_gives_the_discriminators_parameters_no_gradient(name, monkeypatch):
    stage, seen = STAGES[name](), []

    def after_the_generators_step(*arguments):
        seen.append(gradients(stage.discriminator))
        assert gradients(stage.model)
        return discriminator_loss(*arguments)

    monkeypatch.setattr("losses.discriminator_loss", after_the_generators_step)
    stage.step(batch(), gan_on=True)
    assert seen == [{}]
    assert gradients(stage.discriminator)


@pytest.mark.parametrize(("name", "moving"), [
    ("refit", ("decoder.", "post_quant_conv.")), ("decoder", ("decoder.",)),
    ("vqgan", ("encoder.", "quantize.", "quant_conv.", "decoder.", "post_quant_conv."))])
def test_training_moves_what_it_should_and_leaves_the_rest_bit_identical(name, moving):
    stage = STAGES[name](recipe=replace(SMALL_RECIPE, lr=1e-2))
    before = copy.deepcopy(stage.model.state_dict())
    for step in range(3):
        stage.step(batch(), gan_on=step >= 1)
        stage.update(gan_on=step >= 1)
    for key, value in stage.model.state_dict().items():
        assert torch.equal(value, before[key]) != key.startswith(moving), key


def test_a_batch_of_full_masks_gives_the_branch_zeros_not_nothing():
    stage = decoder()
    stage.step(batch(full=(True,) * 4), gan_on=False)
    for p in stage.model.decoder.split_parameters()[1].values():
        assert p.grad is not None
        assert not p.grad.any()


def test_channels_last_changes_the_layout_of_both_players_but_not_the_gradients(monkeypatch):
    """In float64, because float32's rounding may flip the sign of a LeakyReLU's input near 0, and
    a single one changes all gradients by up to a percent."""
    a_post_init = Run.__post_init__

    def contiguous(self):
        a_post_init(self)
        self.channels_last = False

    with float64():
        last = decoder()
        monkeypatch.setattr(Run, "__post_init__", contiguous)
        plain = decoder()
        for stage in (plain, last):
            stage.step(batch(), gan_on=True)
    assert last.discriminator.main[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert last.model.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for one, two in ((last.model, plain.model), (last.discriminator, plain.discriminator)):
        assert_close(gradients(one), gradients(two), 1e-9)


def test_bf16_networks_learn_with_float32_losses_and_weights():
    stage, losses = decoder(precision="bf16"), []
    for _ in range(15):
        terms = stage.step(batch(), gan_on=False)
        stage.update(gan_on=False)
        losses.append(terms["pixel"])
    assert losses[0].dtype == torch.float32
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.dtype == torch.float32 for p in stage.model.parameters())


def codes_and_input(stage):
    """The codes of a training step (B,h,w), and what enters the decoder's first layer."""
    model, seen = stage.model, {}
    model.first_stage.quantize.register_forward_hook(
        lambda module, inputs, output: seen.update(codes=output[1]))
    model.decoder.conv_in.register_forward_pre_hook(
        lambda module, inputs: seen.update(z=inputs[0]))
    stage.step(batch(), gan_on=False)
    return seen["codes"], seen["z"]


@pytest.mark.parametrize("name", ["decoder", "refit"])
def test_a_frozen_first_stage_is_in_float32_under_bf16_too(name):
    def spread(stage):                    # the codes lie where the encoder's outputs are
        z_e = stage.model.first_stage.moments(batch().x).detach()
        weight = stage.model.first_stage.quantize.embedding.weight
        torch.manual_seed(5)
        weight.data = z_e.mean((0, 2, 3)) + z_e.std((0, 2, 3)) * torch.randn(weight.shape)
        return stage

    plain, rounded = (spread(STAGES[name](precision=p)) for p in ("fp32", "bf16"))
    codes, z = codes_and_input(plain)
    assert len(codes.unique()) > 4
    codes_in_bf16, z_in_bf16 = codes_and_input(rounded)
    assert torch.equal(codes_in_bf16, codes)
    # post_quant_conv is frozen in the decoder's stage only.
    assert torch.equal(z_in_bf16, z) == (name == "decoder")
    with rounded.run.autocast():          # else rounding would have exchanged some
        assert not torch.equal(rounded.model.first_stage.indices(batch().x), codes)


def test_validation_and_pictures_are_in_float32_under_bf16_as_in_eval_py():
    plain, rounded = decoder(precision="fp32"), decoder(precision="bf16")
    data = [batch(full=(False,) * 4)]
    assert rounded.validate(data) == plain.validate(data)
    columns = plain.pictures(data, 2)
    for caption, images in rounded.pictures(data, 2).items():
        assert torch.equal(images, columns[caption]), caption


@pytest.mark.parametrize(("name", "backend"), [
    ("decoder", "aot_eager"), ("vqgan", "aot_eager"),
    pytest.param("decoder", "inductor", marks=pytest.mark.slow),
    pytest.param("vqgan", "inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_has_the_same_gradients(name, backend):
    eager, compiled = STAGES[name](), STAGES[name]()
    torch.compiler.reset()
    compiled.model.compile(backend=backend)
    for stage in (eager, compiled):
        stage.step(batch(), gan_on=True)
    assert_close(gradients(compiled.model), gradients(eager.model), 1e-3)
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()


@pytest.mark.parametrize("name", ["decoder", "vqgan"])
def test_the_last_layer_stays_outside_what_is_compiled(name):
    """Lambda's two gradients then end at it and never enter the compiled part."""
    stage, compiled = STAGES[name](), set()

    def backend(graph, inputs):
        compiled.update(each.shape for each in inputs if isinstance(each, torch.Tensor))
        return graph.forward

    torch.compiler.reset()
    stage.model.compile(backend=backend)
    stage.step(batch(), gan_on=True)
    assert stage.model.decoder.conv_in.weight.shape in compiled
    assert stage.model.decoder.conv_out.weight.shape not in compiled


def test_sync_batchnorm_has_the_keys_of_batchnorm():
    plain = vqgan().discriminator
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    synced.load_state_dict(plain.state_dict())
    assert synced.state_dict().keys() == plain.state_dict().keys()


# -- held-out images and checkpoints ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["vqgan", "decoder"])
def test_validation_means_do_not_depend_on_the_batches_and_training_mode_returns(name):
    stage, data = STAGES[name](), batch(full=(False,) * 4)
    one, two = stage.validate([data]), stage.validate([part(data, 0, 3), part(data, 3, 4)])
    assert one.keys() == two.keys()
    for key in one:
        assert one[key] == pytest.approx(two[key], rel=1e-5)
    assert stage.model.training
    assert {len(column) for column in stage.pictures([data], 3).values()} == {3}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_saved_and_loaded_continues_bit_for_bit(name, tmp_path):
    whole, first = STAGES[name](), STAGES[name]()

    def steps(stage, count):
        for _ in range(count):
            stage.step(batch(), gan_on=True)
            stage.update(gan_on=True)

    steps(whole, 4)
    steps(first, 2)
    second = STAGES[name](recipe=replace(SMALL_RECIPE, start_trunk=False))
    save_and_load(first, second, tmp_path / "state.pt")
    steps(second, 2)
    a, b = whole.state_dict()["model"], second.state_dict()["model"]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_weights_are_saved_under_the_authors_names_and_loaded_strictly():
    stage = decoder()
    state = stage.state_dict()
    assert "decoder.encoder.layers.0.weight" in state["model"]
    assert all(name.startswith("decoder.") for name in state["model"])
    state["model"].pop("decoder.encoder.layers.0.weight")
    with pytest.raises(RuntimeError, match="Missing key"):
        stage.load_state_dict(state)


# -- what a stage starts from ----------------------------------------------------------------------


def test_a_base_trunk_starts_from_the_first_stage_and_a_large_one_at_random():
    base = decoder(recipe=replace(SMALL_RECIPE, start="plain"))
    for name, value in base.model.first_stage.decoder.state_dict().items():
        assert torch.equal(base.model.decoder.state_dict()[name], value), name
    factors = [group["factor"] for group in base.optimizers["generator"].param_groups]
    assert factors == [SMALL_RECIPE.trunk_factor] * 2 + [1, 1]
    large = decoder(recipe=replace(SMALL_RECIPE, start_trunk=False))
    assert not torch.equal(large.model.decoder.conv_in.weight,
                           large.model.first_stage.decoder.conv_in.weight)
    assert large.optimizers["generator"].param_groups[0]["factor"] == 1


def test_a_pinned_start_pins_new_decoders_and_lets_what_known_pixels_pass_learn_faster():
    plain, pinned = (decoder(recipe=replace(SMALL_RECIPE, start=start, known_factor=5.0))
                     for start in ("plain", "pinned"))
    groups = pinned.optimizers["generator"].param_groups
    rates = {id(p): group["factor"] for group in groups for p in group["params"]}
    names = dict(pinned.model.decoder.named_parameters())
    assert len(rates) == len(names)
    for name, p in names.items():
        first, last = "encoder.layers.0." in name, name.startswith(("norm_out", "conv_out"))
        trunk = not (last or name.startswith("encoder."))
        assert rates[id(p)] == (5 if first else SMALL_RECIPE.trunk_factor if trunk else 1), name
    images = next(views(pinned.run.train_set, [range(len(pinned.run.train_set))]))
    expected = plain.model.decoder
    expected.pin_statistics(plain.model.first_stage.post_quant_conv(
        plain.model.encode(pixels(images, torch.device("cpu")))))
    for name, value in expected.state_dict().items():
        if not name.startswith("encoder."):                  # a branch starts at random
            torch.testing.assert_close(names[name].data, value, atol=1e-5, rtol=1e-4)


def test_a_finished_refit_goes_before_the_given_first_stage_and_that_before_the_runs(tmp_path):
    own, given, rebuilt = tmp_path / "own", tmp_path / "given", tmp_path / "rebuilt"
    hashes = {}
    for seed, folder in enumerate((own, given, rebuilt)):
        hashes[folder] = write_first_stage(folder, seed)[1]
    hashes["refit"] = write_first_stage(rebuilt, 9, stage="refit")[1]

    def found(folder, **options):
        first_stage, where = trained_first_stage(a_run(folder, **options), "decoder")
        return first_stage.parent, where

    assert found(own) == (hashes[own], None)
    assert found(own, vqgan=str(given)) == (hashes[given], str(given))
    assert found(rebuilt) == (hashes["refit"], None)
    assert found(rebuilt, vqgan=str(given)) == (hashes["refit"], None)


def test_a_refit_that_is_not_finished_is_passed_over_and_that_is_said(tmp_path, capsys):
    _, parent = write_first_stage(tmp_path)
    write_first_stage(tmp_path, 9, stage="refit", finished=False)
    assert trained_first_stage(a_run(tmp_path), "prior")[0].parent == parent
    assert "prior: warning: the refit in" in capsys.readouterr().out


def test_a_refit_without_a_first_stage_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"vqgan/last.pt is not in it"):
        Refit(a_run(tmp_path), SMALL_RECIPE, None)


def test_the_discriminator_of_the_run_goes_on_where_its_size_is_the_same(tmp_path, capsys):
    kept, model = refit().discriminator, VQGAN(VQGANConfig(**settings()["first_stage"]))
    torch.nn.init.normal_(kept.main[0].weight)
    for extra, goes_on in (({}, False), ({"discriminator": kept.state_dict()}, True)):
        write_stage(tmp_path, "vqgan", model.state_dict(), settings(), extra=extra)
        for path in (tmp_path, tmp_path / "vqgan" / "last.pt"):
            stage = refit()
            stage.continue_discriminator(path)
            assert torch.equal(stage.discriminator.main[0].weight, kept.main[0].weight) == goes_on
    assert capsys.readouterr().out.count("it starts at random") == 2


def test_usage_is_counted_over_all_held_out_images_with_both_codebooks(tmp_path):
    model, _ = write_first_stage(tmp_path)
    model.eval()
    run = a_run(tmp_path, refit={"K": 5, "samples": 60})
    codebook, facts = rebuild(run, model)
    batches = train_autoencoder.held_out_batches(run.val_set, 10, 4, CPU)
    x = torch.cat([batch.x for batch in batches])
    before = model.indices(x).unique()
    assert facts["val"]["before"]["usage"] == len(before) / 8
    model.quantize.embedding = torch.nn.Embedding.from_pretrained(codebook)
    assert facts["val"]["after"]["usage"] == len(model.indices(x).unique()) / 5
    assert facts["inertia"][1] <= facts["inertia"][0]


def test_a_decoder_whose_groups_are_single_channels_cannot_be_pinned():
    config = VQGANConfig(**SMALL | {"norm_groups": SMALL["ch"]})
    model = AsymVQGAN(VQGAN(config), AsymDecoder(config, config.ch, 1))
    with pytest.raises(UserError, match=r"--start pinned: .* give --start plain"):
        train_autoencoder.pin_statistics(None, model)
