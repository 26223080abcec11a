import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from recipes import (
    RECIPES,
    Recipe,
    adam,
    first_gan_step,
    learning_rate,
    run_length,
    set_learning_rates,
)


def test_the_decoders_recipes_are_the_papers():
    base, large = RECIPES["decoder"]["base"], RECIPES["decoder"]["large"]
    assert (base.lr, base.batch_size, large.lr, large.batch_size) == (3.6e-4, 80, 7.2e-4, 320)
    for recipe in (base, large):
        assert (recipe.betas, recipe.warmup, recipe.min_lr) == ((0.5, 0.9), 5000, 1e-6)
        assert (recipe.epochs, recipe.gan, recipe.lambda_rule) == (12, "hinge", "paper")
    assert (base.start_trunk, base.trunk_factor) == (True, 0.1)
    assert not large.start_trunk
    theirs = 12 * (1_152_196 // base.batch_size)         # the authors' steps: their GAN's at 50,001
    assert (theirs, run_length(base, 1_281_167)) == (172_824, 192_176)
    assert base.disc_start == large.disc_start == round(50_001 / theirs, 2)


def test_the_first_stages_recipes_are_tamings_and_latent_diffusions():
    vq, kl = RECIPES["vqgan"]["vq"], RECIPES["vqgan"]["kl"]
    for recipe in (vq, kl):
        assert recipe.lr == pytest.approx(4.5e-6 * recipe.batch_size)
        assert (recipe.min_lr, recipe.warmup) == (0, 0)
    assert (vq.lambda_rule, kl.lambda_rule) == ("taming", "ldm")
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


def test_a_run_is_as_long_as_its_steps_or_epochs_and_the_gan_starts_in_it():
    assert run_length(Recipe(batch_size=80, epochs=12), 1000) == 150
    assert run_length(Recipe(batch_size=80, epochs=12), 1001) == 151
    assert run_length(Recipe(steps=7, epochs=12), 1000) == 7
    assert first_gan_step(Recipe(disc_start=0.5), 101) == 50
    assert first_gan_step(Recipe(disc_start=50_001), 100) == 50_001
    assert first_gan_step(Recipe(disc_start=0), 100) == 0


def test_the_learning_rate_warms_up_from_one_percent_and_falls_as_a_cosine():
    rates = [learning_rate(step, 1000, 1.0, 100, 0.1) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[50] == pytest.approx(0.505)
    assert max(rates) == rates[100] == 1
    assert rates[550] == pytest.approx(0.55)                     # half way down
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert learning_rate(99, 100, 1.0, 5000, 0.0) == 1           # a tenth of a short run at most
    assert learning_rate(9, 100, 1.0, 5000, 0.0) == pytest.approx(0.901)


def test_every_groups_schedule_is_that_of_the_authors_code():
    """LambdaWarmUpCosineScheduler: a multiplier of each group's own rate, with its own minimum."""
    recipe, steps = replace(RECIPES["decoder"]["base"], warmup=50), 700

    def theirs(step, rate):
        lowest = 1e-6 / rate
        if step < 50:
            return rate * ((1 - 0.01) / 50 * step + 0.01)
        t = (step - 50) / (steps - 50)
        return rate * (lowest + 0.5 * (1 - lowest) * (1 + math.cos(t * math.pi)))

    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = adam([(weights[:1], 0.1), (weights[1:], 1.0)], recipe, torch.device("cpu"))
    for step in range(steps):
        set_learning_rates({"generator": optimizer}, recipe, step, steps, 0)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([theirs(step, 3.6e-5), theirs(step, 3.6e-4)], rel=1e-12)
    assert theirs(0, 3.6e-5) < 1e-6                # the minimum is no floor of the warm-up


def test_each_group_and_player_has_its_own_rate_and_all_end_at_the_minimum():
    recipe = Recipe(lr=1e-3, warmup=0, min_lr=1e-5)
    parameter = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    cpu = torch.device("cpu")
    optimizers = {"generator": adam([(parameter[:1], 0.1), (parameter[1:2], 1.0)], recipe, cpu),
                  "discriminator": adam([(parameter[2:], 2.0)], recipe, cpu)}
    trunk, branch = optimizers["generator"].param_groups
    (disc,) = optimizers["discriminator"].param_groups
    assert set_learning_rates(optimizers, recipe, 0, 100, 50) == 1e-3
    assert (trunk["lr"], branch["lr"], disc["lr"]) == pytest.approx((1e-4, 1e-3, 2e-3))
    set_learning_rates(optimizers, recipe, 50, 100, 50)          # the discriminator's begins here
    assert disc["lr"] == pytest.approx(2e-3)
    set_learning_rates(optimizers, recipe, 100, 100, 50)
    assert (trunk["lr"], branch["lr"]) == pytest.approx((1e-5, 1e-5))
