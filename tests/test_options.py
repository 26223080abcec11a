import json
import shlex
from dataclasses import replace

import pytest
import tiny_runs
from tiny_runs import write_first_stage

import options
from distributed import UserError
from options import chosen_stages, parse, resolve, smaller_command
from stages import RECIPES


def settings(*words):
    return resolve(parse(list(words)))[0]


def test_no_flags_mean_the_embedded_data_and_tiny_models():
    args = parse([])
    found, first_stage = resolve(args)
    assert first_stage is None
    assert (found["data"], found["size"], found["decoder"]["preset"], found["perceptual"]) == (
        "signs", 64, "tiny", "none")
    assert found["recipes"]["vqgan"]["steps"] == RECIPES["vqgan"]["tiny"].steps
    assert str(args.out) == "runs/signs-tiny"
    json.dumps(found, allow_nan=False)


def test_imagenet_means_the_papers_plan():
    found = settings("--data", "imagenet")
    assert (found["size"], found["first_stage_name"], found["decoder"]["preset"],
            found["perceptual"]) == (256, "vq-f16", "base", "vgg")
    assert found["recipes"]["decoder"]["lr"] == 3.6e-4
    assert found["recipes"]["vqgan"]["disc_start"] == 250_001
    assert settings("--data", "imagenet", "--first-stage", "kl-f8")["recipes"]["vqgan"][
        "latent_weight"] == 1e-6
    assert settings("--data", "folder", "--preset", "large")["decoder"]["ch"] == 192


def test_the_recipes_lr_scales_with_the_batch_and_a_given_one_is_absolute():
    base = ("--data", "imagenet", "--batch-size", "40")
    assert settings(*base)["recipes"]["decoder"]["lr"] == pytest.approx(1.8e-4)
    assert settings(*base)["recipes"]["vqgan"]["lr"] == pytest.approx(4.5e-6 * 40)
    assert settings(*base, "--lr", "0.5")["recipes"]["decoder"]["lr"] == 0.5


def test_flags_replace_the_recipes_numbers():
    found = settings("--gan", "log", "--lambda", "taming", "--disc-start", "0.5", "--epochs", "2")
    for recipe in found["recipes"].values():
        assert (recipe["gan"], recipe["lambda_rule"]) == ("log", "taming")
        assert (recipe["disc_start"], recipe["steps"], recipe["epochs"]) == (0.5, 0, 2)


def test_how_a_run_is_run_is_not_among_its_settings():
    assert settings() == settings("--device", "cpu", "--workers", "3", "--save-every", "7",
                                  "--max-hours", "1", "--micro-batch", "2", "--stage", "vqgan",
                                  "--out", "elsewhere", "--restart", "--no-channels-last")
    steps = str(RECIPES["vqgan"]["tiny"].steps)
    assert settings("--stage", "vqgan", "--steps", steps)["recipes"]["vqgan"] == \
        settings()["recipes"]["vqgan"]


@pytest.mark.parametrize(("words", "message"), [
    ("--size 60 --first-stage vq-f8", "--size 60 .* the nearest that are: 56 or 64"),
    ("--data imagenet --size 16", "--size 16 is too small"),
    ("--stage vqgan --preset odd", "--preset odd does not fit --first-stage tiny"),
    ("--steps 5 --epochs 1", "give one"),
    ("--steps 0", "--steps 0: must be positive"),
    ("--batch-size -4", "--batch-size -4: must be positive"),
    ("--lr nan", "--lr nan: must be positive"),
    ("--lr inf", "--lr inf: must be positive"),
    ("--size 0", "--size 0: must be positive"),
    ("--seed -1", "--seed -1: must not be negative"),
    ("--workers -1", "--workers -1: must not be negative"),
    ("--disc-start -0.5", "--disc-start -0.5: must not be negative"),
    ("--codes 0", "--codes 0: must be positive"),
    ("--refit-samples 100", "--refit-samples 100 cannot make 128 codes"),
    ("--timesteps 1", "--timesteps 1: must be at least 2"),
    ("--ema 1", "--ema 1.0: must be from 0 to below 1"),
    ("--vqgan nowhere", "nowhere: no such run folder"),
])
def test_a_mistake_names_the_flag_and_the_mend(words, message, monkeypatch):
    monkeypatch.setitem(options.ASYM_PRESETS, "odd", (1.1, 1))       # no multiple of norm_groups
    with pytest.raises(UserError, match=message):
        settings(*words.split())


def stages_of(*words):
    args = parse(list(words))
    return chosen_stages(args, *resolve(args))


def test_the_stages_are_all_or_the_one_asked_for_in_order():
    assert stages_of() == (["vqgan", "refit", "decoder", "prior"], None)
    for name in ("vqgan", "refit", "decoder", "prior"):
        assert stages_of("--stage", name) == ([name], None)


def test_a_kl_latent_has_no_codes_to_rebuild_or_to_learn():
    names, why = stages_of("--data", "imagenet", "--first-stage", "kl-f8")
    assert names == ["vqgan", "decoder"]
    assert "kl-f8 has a KL latent" in why
    assert settings("--first-stage", "kl-f8", "--data", "imagenet")["prior"] is None
    assert stages_of("--first-stage", "kl-f8", "--stage", "decoder") == (["decoder"], None)
    for name in ("refit", "prior"):
        with pytest.raises(UserError, match=f"--stage {name}: kl-f8 has a KL latent"):
            stages_of("--first-stage", "kl-f8", "--stage", name)


def test_a_given_first_stage_is_not_trained_again_nor_a_finished_refit_rebuilt(tmp_path):
    where = ("--vqgan", str(tmp_path / "run"), "--size", "32")
    write_first_stage(tmp_path / "run")
    assert stages_of(*where, "--unet", "tiny")[0] == ["refit", "decoder", "prior"]
    write_first_stage(tmp_path / "run", stage="refit")
    assert stages_of(*where, "--unet", "tiny")[0] == ["decoder", "prior"]
    assert stages_of(*where, "--unet", "tiny", "--stage", "refit")[0] == ["refit"]


def test_a_grid_that_the_unet_cannot_halve_is_refused_where_the_prior_is_to_be_trained():
    with pytest.raises(UserError, match=r"--size 72 .* 18 x 18 codes.* a multiple of 16"):
        stages_of("--size", "72")
    assert stages_of("--size", "72", "--stage", "vqgan")[0] == ["vqgan"]


def test_the_prior_and_its_codes_have_the_papers_sizes_unless_told_otherwise():
    tiny, paper = settings(), settings("--data", "imagenet")
    assert (paper["refit"], tiny["refit"]["K"]) == ({"K": 1024, "samples": 20_000}, 128)
    assert (paper["prior"]["unet"], paper["prior"]["T"], paper["prior"]["ema"]) == (
        "paper117", 4000, 0.9999)
    assert {"schedule": "cosine", "form": "theta", "residual": "onehot"}.items() <= (
        paper["prior"].items())
    assert (tiny["prior"]["unet"], tiny["prior"]["T"], tiny["prior"]["residual"]) == (
        "tiny", 100, "none")
    own = settings("--codes", "64", "--refit-samples", "900", "--unet", "ddpm117", "--timesteps",
                   "50", "--ema", "0")
    assert own["refit"] == {"K": 64, "samples": 900}
    assert (own["prior"]["net"]["num_blocks"], own["prior"]["T"], own["prior"]["ema"]) == (3, 50, 0)
    assert (own["prior"]["residual"], own["recipes"]["prior"]["batch_size"]) == ("none", 180)


def test_a_large_codebook_is_rebuilt_from_at_least_16_features_a_code():
    assert settings("--data", "imagenet", "--codes", "16384")["refit"]["samples"] == 16 * 16384


def test_a_first_stage_whose_codes_were_rebuilt_is_still_of_its_plan(tmp_path, monkeypatch):
    monkeypatch.setitem(options.VQGAN_PRESETS, "tiny", replace(tiny_runs.TINY, K=77))
    write_first_stage(tmp_path / "run")
    found = settings("--vqgan", str(tmp_path / "run"), "--size", "32")
    assert (found["first_stage_name"], found["first_stage"]["K"]) == ("tiny", 8)
    assert (found["prior"]["unet"], found["refit"]["K"]) == ("tiny", 8)


def test_flags_are_not_guessed_from_their_beginnings(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--batch", "4"])
    assert left.value.code == 2
    assert "--batch" in capsys.readouterr().err


def test_a_given_first_stage_brings_its_plan(tmp_path):
    write_first_stage(tmp_path / "run")
    found, first_stage = resolve(parse(["--vqgan", str(tmp_path / "run"), "--size", "32"]))
    assert found["first_stage_name"] == "own"
    assert found["first_stage"]["ch"] == first_stage.model.config.ch == 8
    assert found["vqgan"] == str((tmp_path / "run").resolve())
    for flag, value in (("--first-stage", "vq-f8"), ("--stage", "vqgan")):
        with pytest.raises(UserError, match=flag):
            settings("--vqgan", str(tmp_path / "run"), flag, value)


def test_help_tells_every_default_and_every_recipe_in_100_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for stage, recipes in RECIPES.items():
        for name in recipes:
            assert f"{stage} {name}" in text
    for number in ("0.00036", "0.00072", "warmup 5000", "250001", "50001", "betas (0.5, 0.9)",
                   "latent_weight 1e-06", "min_lr 1e-06", "trunk_factor 0.1"):
        assert number in text, number
    for flag in vars(parse([])):
        assert f"--{'lambda' if flag == 'lambda_rule' else flag.replace('_', '-')}" in text


def test_help_marks_our_own_numbers_and_tells_those_outside_the_recipes():
    lines = {line[:17].strip(): line[18:] for line in options.recipe_table().splitlines()}
    for name in ("vqgan tiny", "decoder tiny", "decoder large2"):
        assert lines[name].startswith("(ours) batch_size"), name
    assert "steps 500000 (ours)" in lines["vqgan vq"]
    assert "ours" not in lines["decoder base"] + lines["decoder large"]
    for number in ("p_full 0.5", "mask_kind thick", "1e-4", "1e4", "0.8", "beta 0.25",
                   "K 16384, d 4", "LPIPS weight 1", "0.5 to 1 of the short side"):
        assert number in options.recipe_table(), number


def test_a_health_check_takes_500_steps_unless_told_otherwise():
    found = settings("--overfit", "8", "--data", "imagenet")
    assert [recipe["steps"] for recipe in found["recipes"].values()] == [500] * 4
    assert settings("--overfit", "8", "--epochs", "3")["recipes"]["decoder"]["epochs"] == 3


@pytest.mark.parametrize(("words", "folder"), [
    ("--blend concat", "runs/signs-tiny-concat"), ("--overfit 8", "runs/signs-tiny-overfit8"),
    ("--blend concat --overfit 8", "runs/signs-tiny-concat-overfit8")])
def test_what_must_not_share_a_folder_has_its_own(words, folder):
    args = parse(words.split())
    resolve(args)
    assert str(args.out) == folder


def test_paths_are_absolute_whatever_named_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = settings("--data", "folder", "--root", "photos", "--weights", "nets")
    assert (found["root"], found["weights"]) == (str(tmp_path / "photos"), str(tmp_path / "nets"))
    monkeypatch.delenv("IMAGENET", raising=False)
    assert settings("--data", "imagenet")["root"] == str(tmp_path / "data" / "imagenet")
    monkeypatch.setenv("IMAGENET", "elsewhere")
    assert settings("--data", "imagenet")["root"] == str(tmp_path / "elsewhere")
    assert settings()["root"] is None


def test_the_smaller_command_keeps_the_data_and_replaces_the_sizes():
    words = ["--data", "folder", "--root", "my photos", "--epochs=30", "--batch-size", "64",
             "--channels-last", "--seed", "3"]
    command = smaller_command(words, settings(*words), affordable=77)
    assert command.startswith("python train.py ")
    found = settings(*shlex.split(command)[2:])
    assert found["root"].endswith("my photos")
    assert (found["first_stage_name"], found["decoder"]["preset"], found["size"],
            found["seed"]) == ("tiny", "tiny", 128, 3)
    assert found["recipes"]["decoder"]["steps"] == 5000


def test_where_the_sizes_are_small_already_the_run_gets_shorter():
    words = ["--steps", "10000000", "--lr", "0.1"]
    command = smaller_command(words, settings(*words), affordable=77)
    assert settings(*shlex.split(command)[2:])["recipes"]["vqgan"]["steps"] == 77


def test_every_flag_is_a_setting_or_a_way_of_running():
    flags = set(vars(parse([])))
    assert flags - options.HOW - options.NESTED <= settings().keys()
