import copy
import json
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from train_process import SMALL, SMALL_UNET

import stages
import validation
from diffusion import STRATA, MultinomialDiffusion
from losses import adaptive_weight, discriminator_loss, generator_gan_loss, pixel_loss
from refit import install_codebook
from stages import RECIPES, Batch, CodeBatch, Recipe, learning_rate
from unet import UNet, UNetConfig
from vqgan import VQGAN, VQGANConfig

CPU = torch.device("cpu")
CONFIG = VQGANConfig(**SMALL)
SMALL_RECIPE = replace(RECIPES["decoder"]["tiny"], ndf=8)


def batch(n=4, size=32, full=(False, True, False, False)):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 3, size, size, generator=generator) * 2 - 1
    mask = torch.ones(n, 1, size, size)
    rows = [i for i in range(n) if not full[i]]
    mask[rows, :, :, : size // 2] = 0
    return Batch(x, mask, torch.tensor(rows, dtype=torch.int64),
                 stages.image_generators(0, "decoder", range(n)))


def part(whole, low, high):
    rows = whole.rows[(whole.rows >= low) & (whole.rows < high)] - low
    return Batch(whole.x[low:high], whole.mask[low:high], rows,
                 stages.image_generators(0, "decoder", range(low, high)))


def decoder(blend="add", latent="vq", recipe=SMALL_RECIPE, **options):
    torch.manual_seed(3)
    first_stage = VQGAN(replace(CONFIG, latent=latent))
    return stages.build_decoder(first_stage, "tiny", blend, recipe, CPU, **options)


def vqgan(latent="vq", recipe=SMALL_RECIPE, **options):
    torch.manual_seed(3)
    return stages.build_vqgan(replace(CONFIG, latent=latent), recipe, CPU, **options)


def refit(recipe=SMALL_RECIPE, **options):
    torch.manual_seed(3)
    model = VQGAN(CONFIG)
    install_codebook(model, torch.randn(12, CONFIG.embed_dim))
    return stages.build_refit(model, recipe, CPU, **options)


def prior(recipe=RECIPES["prior"]["tiny"], T=8, **options):
    torch.manual_seed(3)
    unet = UNet(UNetConfig(**SMALL_UNET), CONFIG.K, T)
    torch.nn.init.normal_(unet.logits.weight, std=0.3)               # not the start's exact zeros
    return stages.build_prior(unet, MultinomialDiffusion(CONFIG.K, T), 0.9, VQGAN(CONFIG), recipe,
                              CPU, **options)


def code_batch(low=0, high=4):
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(CONFIG.K, (4, 8, 8), generator=generator)
    return CodeBatch(indices[low:high], stages.image_generators(0, "prior", range(low, high)), None)


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


# -- the papers' numbers ---------------------------------------------------------------------------

def test_the_decoders_recipes_are_the_papers():
    base, large = RECIPES["decoder"]["base"], RECIPES["decoder"]["large"]
    assert (base.lr, base.batch_size, large.lr, large.batch_size) == (3.6e-4, 80, 7.2e-4, 320)
    for recipe in (base, large):
        assert (recipe.betas, recipe.warmup, recipe.min_lr) == ((0.5, 0.9), 5000, 1e-6)
        assert (recipe.epochs, recipe.gan, recipe.lambda_rule) == (12, "hinge", "paper")
    assert (base.start_trunk, base.trunk_factor) == (True, 0.1)
    assert not large.start_trunk


def test_the_first_stages_recipes_are_tamings():
    vq, kl = RECIPES["vqgan"]["vq"], RECIPES["vqgan"]["kl"]
    for recipe in (vq, kl):
        assert recipe.lr == pytest.approx(4.5e-6 * recipe.batch_size)
        assert (recipe.min_lr, recipe.warmup, recipe.lambda_rule) == (0, 0, "taming")
    assert (vq.disc_start, kl.disc_start, kl.latent_weight) == (250_001, 50_001, 1e-6)


def test_refits_recipe_is_the_papers():
    paper = RECIPES["refit"]["vq"]
    assert (paper.batch_size, paper.lr, paper.disc_factor * paper.lr) == (8, 1e-6, 2e-6)
    assert (paper.disc_start, paper.min_lr, paper.lambda_rule) == (0, 0, "taming")


def test_the_priors_recipe_is_the_papers():
    paper = RECIPES["prior"]["paper117"]
    assert (paper.batch_size, paper.lr, paper.steps, paper.betas) == (
        180, 1e-4, 1_000_000, (0.9, 0.999))
    rates = [learning_rate(step, paper.steps, paper.lr, paper.warmup, paper.min_lr)
             for step in (0, 500_000, 999_999)]
    assert rates == pytest.approx([1e-4, 0.5e-4, 0], abs=2e-8)            # a cosine to (nearly) 0


def test_a_recipe_survives_json():
    recipe = Recipe(**json.loads(json.dumps(asdict(RECIPES["vqgan"]["vq"]))))
    assert replace(recipe, betas=tuple(recipe.betas)) == RECIPES["vqgan"]["vq"]


def test_the_learning_rate_warms_up_from_one_percent_and_falls_as_a_cosine():
    rates = [learning_rate(step, 1000, 1.0, 100, 0.1) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[50] == pytest.approx(0.505)
    assert max(rates) == rates[100] == 1
    assert rates[550] == pytest.approx(0.55)                     # half way down
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert learning_rate(99, 100, 1.0, 5000, 0.0) == 1           # a tenth of a short run at most
    assert learning_rate(9, 100, 1.0, 5000, 0.0) == pytest.approx(0.901)


def test_the_trunk_learns_at_a_tenth_and_never_below_the_minimum():
    trainee = decoder(recipe=replace(SMALL_RECIPE, lr=1e-3, warmup=0, min_lr=1e-5,
                                     trunk_factor=0.1))
    trunk, branch = trainee.optimizers["generator"].param_groups
    stages.set_learning_rates(trainee, 0, 100, 50)
    assert (trunk["lr"], branch["lr"]) == pytest.approx((1e-4, 1e-3))
    stages.set_learning_rates(trainee, 100, 100, 50)
    assert (trunk["lr"], branch["lr"]) == pytest.approx((1e-5, 1e-5))
    scratch = decoder(recipe=replace(SMALL_RECIPE, start_trunk=False))
    assert scratch.optimizers["generator"].param_groups[0]["factor"] == 1


def test_the_discriminators_schedule_begins_when_it_does():
    trainee = vqgan(recipe=replace(SMALL_RECIPE, lr=1e-3, warmup=0, min_lr=1e-5))
    stages.set_learning_rates(trainee, 50, 100, 50)
    assert trainee.optimizers["discriminator"].param_groups[0]["lr"] == pytest.approx(1e-3)


def test_a_base_trunk_starts_from_the_first_stage_and_a_large_one_anew():
    first_stage = VQGAN(CONFIG)
    started = stages.build_decoder(first_stage, "tiny", "add", SMALL_RECIPE, CPU).model.decoder
    for name, value in first_stage.decoder.state_dict().items():
        assert torch.equal(started.state_dict()[name], value), name
    large = replace(SMALL_RECIPE, start_trunk=False)
    anew = stages.build_decoder(first_stage, "tiny", "add", large, CPU).model.decoder
    assert not torch.equal(anew.conv_in.weight, first_stage.decoder.conv_in.weight)


# -- one step --------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", ["vqgan", "decoder"])
def test_a_step_gives_the_textbooks_gradients(stage):
    trainee = vqgan(latent="kl") if stage == "vqgan" else decoder()
    trainee.recipe = replace(trainee.recipe, lambda_rule="paper", latent_weight=0.01)
    slow, data = copy.deepcopy(trainee), batch()
    step = stages.vqgan_step if stage == "vqgan" else stages.decoder_step
    terms = step(trainee, data, gan_on=True)

    data.generators = stages.image_generators(0, "decoder", range(4))
    if stage == "vqgan":
        x_hat, extra = slow.model(data.x, generator=data.generators)
    else:
        x_hat, extra = slow.model(data.x, data.mask, data.rows, data.generators)
    pixel, gan = pixel_loss(x_hat, data.x), generator_gan_loss(slow.discriminator(x_hat))
    last = slow.model.decoder.conv_out.weight
    weight = adaptive_weight(torch.autograd.grad(pixel, last, retain_graph=True)[0],
                             torch.autograd.grad(gan, last, retain_graph=True)[0])
    loss = pixel + weight * gan + 0.01 * extra.get("latent_loss", 0)
    weights = {n: p for n, p in slow.model.named_parameters() if p.requires_grad}
    expected = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))
    assert_close(gradients(trainee.model), expected, 1e-4)
    assert terms["lambda"].item() == pytest.approx(weight.item(), rel=1e-4)

    slow.discriminator.zero_grad()
    discriminator_loss(slow.discriminator(data.x), slow.discriminator(x_hat.detach())).backward()
    assert_close(gradients(trainee.discriminator), gradients(slow.discriminator), 1e-4)


@pytest.mark.parametrize("stage", ["vqgan", "decoder"])
@pytest.mark.parametrize("latent", ["vq", "kl"])
def test_micro_batches_add_up_to_the_whole_batchs_gradient(stage, latent):
    with float64():
        trainee = vqgan(latent) if stage == "vqgan" else decoder(latent=latent)
        step = stages.vqgan_step if stage == "vqgan" else stages.decoder_step
        whole = batch()
        step(trainee, whole, gan_on=False)
        expected = gradients(trainee.model)
        trainee.model.zero_grad()
        for low in (0, 2):
            step(trainee, part(whole, low, low + 2), gan_on=False, scale=0.5)
    assert_close(gradients(trainee.model), expected, 1e-6)


def test_before_its_start_the_discriminator_is_not_touched():
    trainee = vqgan()
    trainee.discriminator.register_forward_hook(lambda *_: pytest.fail("the discriminator ran"))
    before = copy.deepcopy(trainee.discriminator.state_dict())
    stages.vqgan_step(trainee, batch(), gan_on=False)
    stages.optimizer_step(trainee, gan_on=False)
    for name, value in trainee.discriminator.state_dict().items():
        assert torch.equal(value, before[name])
    assert not trainee.optimizers["discriminator"].state


def test_a_refits_discriminator_learns_at_twice_the_decoders_rate():
    trainee = refit(recipe=replace(RECIPES["refit"]["vq"], ndf=8))
    stages.set_learning_rates(trainee, 5, 100, 0)
    rates = {name: optimizer.param_groups[0]["lr"]
             for name, optimizer in trainee.optimizers.items()}
    assert rates == pytest.approx({"generator": 1e-6, "discriminator": 2e-6})


def test_a_refit_step_gives_the_gradients_of_a_vqgan_with_these_codes():
    trainee = refit()
    free = stages.build_vqgan(trainee.model.config, SMALL_RECIPE, CPU)
    free.model.load_state_dict(trainee.model.state_dict())
    free.discriminator.load_state_dict(trainee.discriminator.state_dict())
    terms = stages.refit_step(trainee, batch(), gan_on=True)
    expected = stages.vqgan_step(free, batch(), gan_on=True)
    assert terms == expected
    found = gradients(trainee.model)
    assert {name.split(".")[0] for name in found} == {"decoder", "post_quant_conv"}
    everything = gradients(free.model)
    for name, gradient in found.items():
        assert torch.equal(gradient, everything[name]), name


def test_training_a_refit_leaves_encoder_and_codes_bit_identical():
    trainee = refit()
    before = copy.deepcopy(trainee.model.state_dict())
    for step in range(3):
        stages.set_learning_rates(trainee, step, 3, 0)
        stages.refit_step(trainee, batch(), gan_on=True)
        stages.optimizer_step(trainee, gan_on=True)
    for name, value in trainee.model.state_dict().items():
        moved = name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(value, before[name]) != moved, name


def test_a_prior_step_descends_on_the_bound_at_the_times_of_its_images():
    trainee, data = prior(), code_batch()
    terms = stages.prior_step(trainee, data, gan_on=False)
    slow, data = prior(), code_batch()
    t, p = slow.timesteps.draw(data.generators)
    z_t = slow.diffusion.q_sample(data.indices, t, data.generators)
    log_x = slow.model(z_t, t).log_softmax(1)
    nats = sum(slow.diffusion.kl(log_x[i:i + 1], z_t[i:i + 1], data.indices[i:i + 1], t[i:i + 1],
                                 t[i:i + 1] - 1).sum() / p[i] for i in range(4)) / 4
    nats = nats + 64 * slow.diffusion.prior_kl()
    (nats / 64).backward()
    assert terms["vlb"].item() == pytest.approx(nats.item(), rel=1e-4)
    assert_close(gradients(trainee.model), gradients(slow.model), 1e-3)


def test_a_priors_micro_batches_add_up_and_its_history_is_of_whole_steps():
    with float64():
        trainee = prior()
        stages.prior_step(trainee, code_batch(), gan_on=False)
        parts = prior()
        for low in (0, 2):
            stages.prior_step(parts, code_batch(low, low + 2), gan_on=False, scale=0.5)
        assert parts.timesteps.counts.sum() == 0                     # not before the step is done
    assert_close(gradients(parts.model), gradients(trainee.model), 1e-6)
    trainee.timesteps.update()
    parts.timesteps.update()
    assert torch.equal(parts.timesteps.counts, trainee.timesteps.counts)
    torch.testing.assert_close(parts.timesteps.losses, trainee.timesteps.losses)


def test_a_priors_step_moves_model_average_and_history_and_nothing_else():
    trainee = prior()
    first_stage = copy.deepcopy(trainee.first_stage.state_dict())
    before = copy.deepcopy(trainee.model.state_dict())
    for step in range(3):
        stages.set_learning_rates(trainee, step, 3, 10)
        stages.prior_step(trainee, code_batch(), gan_on=False)
        stages.optimizer_step(trainee, gan_on=step > 1)              # GANs are not its affair
    assert all(not torch.equal(value, before[name])
               for name, value in trainee.model.state_dict().items() if name != "logits.bias")
    assert (trainee.ema.updates, trainee.timesteps.counts.sum()) == (3, 12)
    assert any(not torch.equal(trainee.ema.weights[name], value)
               for name, value in trainee.model.state_dict().items())
    for name, value in trainee.first_stage.state_dict().items():
        assert torch.equal(value, first_stage[name]), name


@pytest.mark.parametrize("blend", ["add", "concat"])
def test_training_the_decoder_leaves_the_first_stage_bit_identical(blend):
    trainee = decoder(blend)
    first_stage = copy.deepcopy(trainee.model.first_stage.state_dict())
    before = copy.deepcopy(trainee.model.decoder.state_dict())
    for step in range(3):
        stages.set_learning_rates(trainee, step, 3, 1)
        stages.decoder_step(trainee, batch(), gan_on=step >= 1)
        stages.optimizer_step(trainee, gan_on=step >= 1)
    for name, value in trainee.model.first_stage.state_dict().items():
        assert torch.equal(value, first_stage[name]), name
    after = trainee.model.decoder.state_dict()
    assert not torch.equal(after["conv_in.weight"], before["conv_in.weight"])
    assert not torch.equal(after["encoder.layers.0.weight"], before["encoder.layers.0.weight"])


def test_a_batch_of_full_masks_gives_the_branch_zeros_not_nothing():
    trainee = decoder()
    stages.decoder_step(trainee, batch(full=(True,) * 4), gan_on=False)
    for p in trainee.model.decoder.branch_parameters():
        assert p.grad is not None
        assert not p.grad.any()


@pytest.mark.parametrize("stage", ["vqgan", "decoder"])
def test_a_kl_latents_noise_belongs_to_the_image_not_to_the_batch(stage):
    whole = stages.image_generators(0, stage, range(5, 9))
    one = stages.image_generators(0, stage, [7])
    assert torch.equal(torch.randn(3, generator=whole[2]), torch.randn(3, generator=one[0]))
    other = stages.image_generators(1, stage, [7])
    assert not torch.equal(torch.randn(3, generator=other[0]), torch.randn(3, generator=whole[3]))


def test_channels_last_changes_the_layout_of_both_players_but_not_the_gradients():
    plain, last = decoder(), decoder(channels_last=True)
    assert last.discriminator.main[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert last.model.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    stages.decoder_step(plain, batch(), gan_on=True)
    data = batch()
    data.x = data.x.to(memory_format=torch.channels_last)
    stages.decoder_step(last, data, gan_on=True)
    assert_close(gradients(last.model), gradients(plain.model), 1e-4)


def test_bf16_networks_learn_with_float32_losses_and_weights():
    trainee = decoder(precision="bf16")
    losses = []
    for _ in range(15):
        terms = stages.decoder_step(trainee, batch(), gan_on=False)
        stages.optimizer_step(trainee, gan_on=False)
        losses.append(terms["pixel"])
    assert losses[0].dtype == torch.float32
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.dtype == torch.float32 for p in trainee.model.parameters())


def test_a_bf16_prior_learns_with_a_float32_loss_and_float32_weights():
    trainee = prior(precision="bf16")
    losses = []
    for _ in range(30):
        terms = stages.prior_step(trainee, code_batch(), gan_on=False)
        stages.optimizer_step(trainee, gan_on=False)
        losses.append(terms["vlb"])
    assert losses[0].dtype == torch.float32
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(p.dtype == torch.float32 for p in trainee.model.parameters())


def test_a_compiled_prior_has_the_same_gradients_and_is_validated_uncompiled():
    eager, compiled = prior(), prior()
    torch._dynamo.reset()
    compiled.model.compile(backend="aot_eager")
    for trainee in (eager, compiled):
        stages.prior_step(trainee, code_batch(), gan_on=False)
    assert_close(gradients(compiled.model), gradients(eager.model), 1e-3)
    data = replace(code_batch(), generators=None)
    assert validation.validate_prior(compiled, [data]) == validation.validate_prior(eager, [data])


@pytest.mark.parametrize(("stage", "backend"), [
    ("decoder", "aot_eager"),
    pytest.param("vqgan", "aot_eager", marks=pytest.mark.slow),
    pytest.param("decoder", "inductor", marks=pytest.mark.slow),
    pytest.param("vqgan", "inductor", marks=pytest.mark.slow)])
def test_a_compiled_generator_has_the_same_gradients(stage, backend):
    build, step = {"vqgan": (vqgan, stages.vqgan_step),
                   "decoder": (decoder, stages.decoder_step)}[stage]
    eager, compiled = build(), build()
    torch._dynamo.reset()
    compiled.model.compile(backend=backend)
    for full in [(False, True, False, False), (False, False, False, False)]:
        for trainee in (eager, compiled):
            trainee.model.zero_grad()
            step(trainee, batch(full=full), gan_on=True)
        assert_close(gradients(compiled.model), gradients(eager.model), 1e-3)
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()


def test_sync_batchnorm_has_the_keys_of_batchnorm():
    plain = vqgan().discriminator
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    synced.load_state_dict(plain.state_dict())
    assert synced.state_dict().keys() == plain.state_dict().keys()


# -- values and pictures ---------------------------------------------------------------------------

def test_a_term_that_is_not_finite_shows_in_the_means():
    terms = [{"pixel": torch.tensor(1.0), "gan": torch.tensor(float("nan"))},
             {"pixel": torch.tensor(3.0), "gan": torch.tensor(1.0)}]
    means = stages.global_terms(terms)
    assert means["pixel"] == 2
    assert np.isnan(means["gan"])


def test_the_gradient_norm_is_that_of_the_players_that_move():
    trainee = vqgan()
    stages.vqgan_step(trainee, batch(), gan_on=True)
    both = [*gradients(trainee.model).values(), *gradients(trainee.discriminator).values()]
    expected = torch.cat([g.flatten() for g in both]).norm()
    torch.testing.assert_close(stages.gradient_norm(trainee, gan_on=True), expected)
    alone = torch.cat([g.flatten() for g in gradients(trainee.model).values()]).norm()
    torch.testing.assert_close(stages.gradient_norm(trainee, gan_on=False), alone)


def test_a_priors_validation_takes_the_average_and_the_same_noise_and_gives_the_weights_back():
    trainee = prior()
    data = replace(code_batch(), generators=None)
    whole = validation.validate_prior(trainee, [data])
    parts = [replace(data, indices=data.indices[i:j]) for i, j in ((0, 3), (3, 4))]
    assert validation.validate_prior(trainee, parts)["val_vlb"] == pytest.approx(whole["val_vlb"])
    model = copy.deepcopy(trainee.model).eval()
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    expected = trainee.diffusion.vlb(model, data.indices, generators, STRATA)["vlb"]
    assert whole["val_vlb"] == pytest.approx(expected.mean().item())
    torch.nn.init.normal_(trainee.model.logits.weight)               # the average stays
    before = copy.deepcopy(trainee.model.state_dict())
    assert validation.validate_prior(trainee, [data]) == whole
    for name, value in trainee.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert trainee.model.training


def test_a_priors_pictures_are_its_samples_and_always_the_same():
    trainee = prior()
    data = replace(code_batch(), generators=None, x=torch.zeros(4, 3, 16, 16)).first(2)
    columns = validation.prior_columns(trainee, data)
    assert list(columns) == ["held out", "its codes, decoded", "new codes, 8 steps"]
    assert {image.shape for image in columns.values()} == {(2, 3, 16, 16)}
    again = validation.prior_columns(trainee, data)
    assert all(torch.equal(columns[name], again[name]) for name in columns)
    assert not torch.equal(columns["its codes, decoded"], columns["new codes, 8 steps"])


@pytest.mark.parametrize("stage", ["vqgan", "decoder"])
def test_validation_means_do_not_depend_on_the_batches_and_training_mode_returns(stage):
    trainee = vqgan() if stage == "vqgan" else decoder()
    validate = validation.validate_vqgan if stage == "vqgan" else validation.validate_decoder
    data = batch(full=(False,) * 4)
    parts = [Batch(data.x[i:j], data.mask[i:j], None, None) for i, j in ((0, 3), (3, 4))]
    one, two = validate(trainee, [replace(data, rows=None)]), validate(trainee, parts)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name] == pytest.approx(two[name], rel=1e-5)
    assert trainee.model.training


def test_weights_go_into_a_checkpoint_and_back_under_the_authors_names():
    trainee, other = decoder(), decoder(recipe=replace(SMALL_RECIPE, start_trunk=False))
    weights = stages.stage_weights(trainee)
    assert "decoder.encoder.layers.0.weight" in weights
    stages.load_stage_weights(other, weights)
    for a, b in zip(stages.stage_weights(other).values(), weights.values()):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="Missing key"):
        stages.load_stage_weights(other, dict(list(weights.items())[1:]))


def test_uint8_images_become_minus_one_to_one():
    items = {"image": torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 2, 2),
             "mask": torch.ones(1, 1, 2, 2, dtype=torch.uint8), "full": [True], "position": [3]}
    made = stages.training_batch(items, 0, "decoder", CPU)
    assert made.x.unique().tolist() == [-1, 1]
    assert made.mask.dtype == torch.float32
    assert made.rows.tolist() == []
