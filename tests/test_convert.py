import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import SIZE, settings, write_decoder, write_first_stage, write_prior, write_stage

import convert
import public_names
import run_folder
import weight_files
from asym_decoder import AsymDecoder, AsymVQGAN
from convert import (
    count,
    list_layers,
    load,
    load_first_stage,
    load_model,
    load_prior,
    save_model,
    to_diffusers,
)
from distributed import UserError, exit_on_user_error
from public_names import diffusers_names
from vqgan import VQGAN, VQGAN_PRESETS, AttnBlock, VQGANConfig

# As public files have no settings, GroupNorm's 32 groups must divide every width.
VQ = VQGANConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_levels=(1,), z_channels=4,
                 embed_dim=4, K=8)
KL = dataclasses.replace(VQ, latent="kl", attn_levels=(), K=VQGANConfig.K)
# What diffusers' AsymmetricAutoencoderKL can be: four levels, the first two of different widths.
FOUR = VQGANConfig(latent="kl", ch=8, ch_mult=(1, 2, 4, 4), num_res_blocks=1, attn_levels=(),
                   z_channels=4, embed_dim=4, norm_groups=4)


def half_masked(side=SIZE):
    mask = torch.zeros(1, 1, side, side)
    mask[..., :9] = 1
    return mask


def same_pictures(model, expected, side=SIZE):
    """Whether both give the same latents and pictures, bit for bit."""
    x, mask = torch.rand(1, 3, side, side) * 2 - 1, half_masked(side)
    with torch.no_grad():
        z = expected.encode(x)
        known = {"image": x, "mask": mask} if isinstance(expected, AsymVQGAN) else {}
        return (torch.equal(model.encode(x), z) and
                torch.equal(model.decode(z, **known), expected.decode(z, **known)))


@pytest.mark.parametrize("blend", ["add", "concat"])
def test_a_run_folder_gives_the_models_that_were_saved_and_draws_no_random_number(tmp_path, blend):
    first_stage, parent = write_first_stage(tmp_path)
    assert same_pictures(load_model(tmp_path), first_stage.eval())
    decoder = write_decoder(tmp_path, parent, blend=blend)
    before = torch.get_rng_state()
    for path in (tmp_path, tmp_path / "decoder" / "last.pt"):
        loaded = load(path)
        assert torch.equal(torch.get_rng_state(), before)
        assert same_pictures(loaded.model, AsymVQGAN(first_stage, decoder).eval())
        assert (loaded.stage, loaded.finished, loaded.parent) == ("decoder", True, parent)
        assert not loaded.model.training
        assert not any(p.requires_grad for p in loaded.model.parameters())
        before = torch.get_rng_state()
    assert isinstance(load_model(tmp_path / "vqgan" / "last.pt"), VQGAN)
    assert load_first_stage(tmp_path).parent == parent


@pytest.mark.parametrize(("stage", "read"), [("decoder", load_model), ("prior", load_prior)])
def test_a_first_stage_that_changed_or_went_is_refused_with_the_mend(tmp_path, stage, read):
    _, parent = write_first_stage(tmp_path / "a")
    write = write_decoder if stage == "decoder" else write_prior
    write(tmp_path / "b", parent, vqgan=str(tmp_path / "a"))
    write_first_stage(tmp_path / "a", seed=7)
    with pytest.raises(UserError, match=rf"other first-stage weights .*--stage {stage} --vqgan"):
        read(tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UserError, match=r"needs the first stage .*a, which does not exist"):
        read(tmp_path / "b")


def test_a_refit_counts_only_when_it_is_finished(tmp_path):
    _, plain = write_first_stage(tmp_path, seed=0)
    _, refit = write_first_stage(tmp_path, seed=1, stage="refit", finished=False)
    assert load_first_stage(tmp_path).parent == plain
    write_first_stage(tmp_path, seed=1, stage="refit", finished=True)
    assert load_first_stage(tmp_path).parent == refit != plain
    write_prior(tmp_path / "b", refit, vqgan=str(tmp_path), finished=False)
    prior = load_prior(tmp_path / "b")
    assert (prior.parent, prior.finished) == (refit, False)


def test_loading_is_strict(tmp_path):
    model, _ = write_first_stage(tmp_path / "a")
    weights = model.state_dict()
    for name, changed in {"missing": {k: v for k, v in weights.items() if k != "quant_conv.bias"},
                          "left-over": weights | {"extra": torch.zeros(1)}}.items():
        write_stage(tmp_path / name, "vqgan", changed, settings())
        with pytest.raises(UserError, match=r"do not fit the network.*(quant_conv.bias|extra)"):
            load_model(tmp_path / name)


@pytest.mark.parametrize(("read", "path", "reason"), [
    (load_model, "gone", "no such run folder"), (load_prior, "gone", "no such run folder"),
    (load_model, "empty", "decoder/last.pt or refit/last.pt or vqgan/last.pt is not in it"),
    (load_prior, "empty", "prior/last.pt is not in it.*--stage prior"),
    (load_model, "photo.pt", "photo.pt"),
    (load_model, "prior/last.pt", "is a prior; give a decoder or refit or vqgan"),
    (load_prior, "decoder/last.pt", "is a decoder; give a prior"),
    (load_first_stage, "decoder/last.pt", "is a decoder; give a refit or vqgan")])
def test_mistaken_paths_are_one_line_each(tmp_path, read, path, reason):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photo.pt").write_bytes(b"no checkpoint")
    for stage in ("prior", "decoder"):
        write_stage(tmp_path, stage, {}, settings())
    with pytest.raises(UserError, match=reason) as caught:
        read(tmp_path / path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- public checkpoints


def asymmetric(first_stage, ch=None, num_res_blocks=1, blend="add"):
    config = first_stage.config
    decoder = AsymDecoder(config, ch or config.ch, num_res_blocks, blend)
    return AsymVQGAN(first_stage, decoder).eval()


def write_public(path, model):
    """A .ckpt as Lightning leaves it: the authors' names, the losses' weights, dead layers."""
    weights = {name.removeprefix("first_stage."): value
               for name, value in model.state_dict().items()
               if not name.startswith("first_stage.decoder.")}
    extra = {"loss.logvar": torch.zeros(())}
    if isinstance(model, AsymVQGAN):
        extra["decoder.up_layers.0.deconv.weight"] = torch.zeros(4, 4, 4, 4)
    torch.save({"epoch": 3, "global_step": 70, "state_dict": weights | extra}, path)
    return path


@pytest.mark.parametrize("config", [VQ, KL], ids=["vq", "kl"])
def test_a_public_first_stage_is_loaded_by_what_its_shapes_tell(tmp_path, config):
    model = VQGAN(config).eval()
    loaded = load(write_public(tmp_path / "model.ckpt", model))
    assert (loaded.stage, loaded.step, loaded.finished) == ("vqgan", 0, True)
    assert loaded.model.config == config
    assert loaded.config["decoder"] is None
    assert loaded.parent == run_folder.weights_hash(model.state_dict())
    assert same_pictures(loaded.model, model)
    assert same_pictures(load_first_stage(tmp_path / "model.ckpt").model, model)
    assert not loaded.model.training


@pytest.mark.parametrize("blend", ["add", "concat"])
def test_a_public_decoder_comes_with_a_first_stage_that_has_none(tmp_path, blend):
    model = asymmetric(VQGAN(KL), num_res_blocks=2, blend=blend)
    loaded = load(write_public(tmp_path / "base.ckpt", model))
    assert loaded.stage == "decoder"
    assert loaded.config["decoder"] == {"preset": "base", "ch": 32, "num_res_blocks": 2,
                                        "blend": blend}
    assert loaded.model.first_stage.decoder is None
    assert any("up_layers" in note for note in loaded.notes)
    assert same_pictures(loaded.model, model)
    with pytest.raises(UserError, match=r"base\.ckpt is a decoder; give a refit or vqgan"):
        load_first_stage(tmp_path / "base.ckpt")


def test_whatever_encodes_alike_has_the_same_latents_wherever_it_comes_from(tmp_path):
    first_stage = VQGAN(KL)
    config = settings() | {"first_stage": dataclasses.asdict(KL)}
    write_stage(tmp_path / "run", "vqgan", first_stage.state_dict(), config)
    sources = [tmp_path / "run", write_public(tmp_path / "sd.ckpt", first_stage),
               write_public(tmp_path / "base.ckpt", asymmetric(first_stage))]
    run, sd, base = (load(path) for path in sources)
    assert run.latent_hash == sd.latent_hash == base.latent_hash
    assert run.parent == sd.parent != base.parent                # base has no vanilla decoder
    with torch.no_grad():
        first_stage.decoder.conv_out.bias += 1
    assert load(write_public(tmp_path / "tuned.ckpt", first_stage)).latent_hash == run.latent_hash
    with torch.no_grad():
        first_stage.quant_conv.bias += 1
    assert load(write_public(tmp_path / "other.ckpt", first_stage)).latent_hash != run.latent_hash


def test_a_runs_decoder_may_stand_on_a_public_first_stage(tmp_path):
    first_stage = VQGAN(KL).eval()
    path = write_public(tmp_path / "sd.ckpt", first_stage)
    parent = load_first_stage(path).parent
    config = settings(vqgan=str(path)) | {"first_stage": dataclasses.asdict(KL)}
    model = asymmetric(first_stage, 8 * 4)
    config["decoder"] |= {"ch": 32}
    weights = {name: value for name, value in model.state_dict().items()
               if name.startswith("decoder.")}
    write_stage(tmp_path / "run", "decoder", weights, config, parent)
    loaded = load(tmp_path / "run")
    assert same_pictures(loaded.model, model)
    assert (loaded.parent, loaded.latent_hash) == (parent, load(path).latent_hash)


def test_public_files_that_cannot_be_loaded_are_one_line_each(tmp_path):
    path = write_public(tmp_path / "cut.ckpt", VQGAN(KL))
    path.write_bytes(path.read_bytes()[:-2000])
    weights = VQGAN(KL).state_dict()

    def without(part):
        return {name: value for name, value in weights.items() if part not in name}

    mistakes = {
        "truncated": ("cut", None),
        "needs one first stage": ("unet", {"input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}),
        r"quantize\.embed\.weight": ("gumbel", weights | {"quantize.embed.weight": torch.zeros(8)}),
        r"decoder\.mid\.attn_1": ("no-attention", without("decoder.mid.attn_1")),
        r"decoder\.conv_in\.weight": ("encoderless", without("conv_in")),
        r"encoder\.down\.0": ("no-levels", without("down.")),
        r"decoder\.left\.over": ("long", weights | {"decoder.left.over": torch.zeros(1)}),
        r"encoder\.conv_in\.weight": (
            "grey", weights | {"encoder.conv_in.weight": torch.zeros(32, 1, 3, 3)}),
        "floating point": ("integers", weights | {"quant_conv.bias": torch.zeros(8).char()}),
        "no autoencoder of this kind": (
            "scalar", weights | {"encoder.conv_in.weight": torch.zeros(())}),
        r"no quant_conv in it.*get the whole file": (
            "no-quant-conv", {name: value for name, value in VQGAN(VQ).state_dict().items()
                              if not name.startswith("quant_conv")}),
        "norm_num_groups": ("narrow", VQGAN(FOUR).state_dict())}
    for reason, (name, state) in mistakes.items():
        if state is not None:
            torch.save(state, tmp_path / f"{name}.ckpt")
        with pytest.raises(UserError, match=rf"{name}\.ckpt: .*{reason}") as caught:
            load_model(tmp_path / f"{name}.ckpt")
        assert "\n" not in str(caught.value)


def test_a_converted_file_gives_the_same_model_and_latents_and_stands_alone(tmp_path):
    public = asymmetric(VQGAN(VQ), num_res_blocks=2)
    _, parent = write_first_stage(tmp_path / "a")
    stage = tmp_path / "a" / "vqgan" / "last.pt"
    write_decoder(tmp_path / "b", parent, vqgan=str(stage))
    sources = {"first": write_public(tmp_path / "first.ckpt", VQGAN(VQ)), "stage": stage,
               "asym": write_public(tmp_path / "asym.ckpt", public), "run": tmp_path / "b"}
    made = {name: load(source) for name, source in sources.items()}
    for name, before in made.items():
        save_model(before, tmp_path / f"{name}.pt")
    (tmp_path / "a").rename(tmp_path / "gone")
    for name, before in made.items():
        after = load(tmp_path / f"{name}.pt")
        assert same_pictures(after.model, before.model)
        assert (after.latent_hash, after.stage, after.finished, after.config["vqgan"]) == (
            before.latent_hash, before.stage, before.finished, None)
        assert after.config["first_stage"] == before.config["first_stage"]
        keys = run_folder.load(tmp_path / f"{name}.pt")["model"]
        assert {key.split(".")[0] for key in keys} == {
            "encoder", "quant_conv", "quantize", "post_quant_conv", "decoder"}
    assert load_first_stage(tmp_path / "first.pt").parent == made["first"].parent


@pytest.mark.parametrize(("name", "make"), [
    ("AutoencoderKL", lambda: VQGAN(FOUR)), ("VQModel", lambda: VQGAN(VQ)),
    ("AsymmetricAutoencoderKL", lambda: asymmetric(VQGAN(FOUR), ch=12, num_res_blocks=3))],
    ids=["kl", "vq", "asymmetric"])
def test_an_export_holds_every_weight_under_diffusers_name_and_comes_back(tmp_path, name, make):
    model = make().eval()
    made = to_diffusers(model, tmp_path / "vae", scaling_factor=0.5, sample_size=64)
    assert [path.name for path in made] == ["diffusion_pytorch_model.safetensors", "config.json"]
    fields = json.loads(made[1].read_text())
    assert (fields["_class_name"], fields["scaling_factor"], fields["sample_size"]) == (
        name, 0.5, 64)
    found = weight_files.read_safetensors(made[0])
    expected = diffusers_names({name.removeprefix("first_stage."): value
                                for name, value in model.state_dict().items()
                                if not name.startswith("first_stage.decoder.")})
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    loaded = load(tmp_path / "vae")
    assert loaded.model.config == model.config
    assert loaded.config["scaling_factor"] == 0.5
    assert same_pictures(loaded.model, model)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    model, vae = VQGAN(FOUR), tmp_path / "vae"
    vae.mkdir()
    to_diffusers(model, vae)                                 # an empty one is as good as none
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for place in (vae, vae / "config.json"):
        with pytest.raises(UserError, match=f"{place.name} exists already"):
            to_diffusers(model, place)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("call", "error", "expected"), [
    ("replace", KeyboardInterrupt(), KeyboardInterrupt),                # stands for SIGKILL
    ("fsync", KeyboardInterrupt(), KeyboardInterrupt),
    ("fsync", OSError(28, "No space left on device"), OSError)])
def test_an_export_that_was_cut_short_is_no_whole_one(tmp_path, monkeypatch, call, error, expected):
    def fail(*args):
        raise error
    monkeypatch.setattr(weight_files.os, call, fail)
    with pytest.raises(expected):        # exit_on_user_error makes one line of a full disk
        to_diffusers(VQGAN(FOUR), tmp_path / "vae")
    assert {path.suffix for path in (tmp_path / "vae").iterdir()} == {".part"}


def run_main(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, args)])
    convert.main()
    return capsys.readouterr().out


def test_a_file_alone_is_only_described(tmp_path, monkeypatch, capsys):
    path = write_public(tmp_path / "base.ckpt", asymmetric(VQGAN(KL), num_res_blocks=2))
    before = sorted(tmp_path.rglob("*"))
    text = run_main(monkeypatch, capsys, path)
    for part in ("base.ckpt: decoder, public weights", "up_layers", load(path).latent_hash[:16],
                 "KL latent, d 4, f 2, ch 32, ch_mult (1, 2)",
                 "base, add: ch 32, num_res_blocks 2"):
        assert part in text
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- the layers as a table


def test_multiplications_are_those_counted_by_hand():
    """Outputs times the weights that each one takes; of attention, two products besides."""
    conv, up = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.ConvTranspose2d(8, 4, 4)
    linear, attention = torch.nn.Linear(4, 5), AttnBlock(32)
    model = torch.nn.ModuleList([conv, up, linear, attention])

    def run():
        linear(up(conv(torch.zeros(1, 3, 8, 8))).mean((2, 3)))
        attention(torch.zeros(1, 32, 6, 5))
    counted = count(model, run)
    assert counted[conv] == ((8, 4, 4), 8 * 4 * 4 * 3 * 3 * 3)
    assert counted[up] == ((4, 7, 7), 8 * 4 * 4 * 4 * 4 * 4)         # each input, each tap
    assert counted[linear] == ((5,), 4 * 5)
    assert counted[attention] == ((32, 6, 5), 4 * 30 * 32**2 + 2 * 30**2 * 32)
    assert counted[attention.q][1] == 30 * 32**2
    assert counted[attention.norm][1] == 0


def part(rows, name):
    """The rows of one part, without its name."""
    return [row[1:] for row in rows if row[0] == name]


@pytest.mark.parametrize("blend", ["add", "concat"])
@pytest.mark.parametrize("config", [VQ, KL, FOUR], ids=["vq", "kl", "four"])
def test_every_parameter_is_in_one_row_and_the_parts_sum_to_the_networks(config, blend):
    model = asymmetric(VQGAN(config), num_res_blocks=2, blend=blend)
    rows = list_layers(model, 32)
    for module, names in ((model, {row[0] for row in rows}), (model.decoder, {"Condition", "Main"}),
                          (model.decoder.encoder, {"Condition"}),
                          (model.first_stage.decoder, {"First stage's decoder"})):
        listed = sum(row[5] for row in rows if row[0] in names)
        assert listed == sum(p.numel() for p in module.parameters())
    side = 32 // config.f
    inputs = [torch.zeros(1, C, h, h, device="meta")
              for C, h in ((config.z_channels, side), (3, 32), (1, 32))]
    in_all = count(model, lambda: model.decoder(*inputs))[model.decoder][1]
    assert sum(row[6] for row in rows if row[0] in ("Condition", "Main")) == in_all > 0
    assert sum(row[5] for row in list_layers(VQGAN(config), 32)) == sum(
        p.numel() for p in model.first_stage.parameters())


def on_meta(preset, blend):
    with torch.device("meta"):
        config = VQGAN_PRESETS["kl-f8"]
        return AsymVQGAN(VQGAN(config), AsymDecoder.from_preset(config, preset, blend))


def test_the_base_decoder_is_listed_as_in_table_7():
    """Layers and shapes at 512 px, row by row; name and counts of one."""
    rows = list_layers(on_meta("base", "concat"), 512)
    assert [(i, layer, *shape) for i, _, layer, shape, *_ in part(rows, "Condition")] == [
        (0, "PartialConv2d 3x3", 128, 512, 512), (1, "PartialConv2d 3x3", 256, 512, 512),
        (2, "PartialConv2d 4x4", 512, 256, 256), (3, "PartialConv2d 4x4", 512, 128, 128),
        (4, "PartialConv2d 4x4", 512, 64, 64)]
    assert [(i, layer, *shape) for i, _, layer, shape, *_ in part(rows, "Main")] == [
        ("Out", "Concat", 257, 512, 512), ("Out", "Conv2d 1x1", 128, 512, 512),
        ("Out", "GroupNorm", 128, 512, 512), ("Out", "Conv2d 3x3", 3, 512, 512),
        (0, "Concat", 513, 512, 512), (0, "Conv2d 1x1", 256, 512, 512),
        (0, "ResBlock x 3", 128, 512, 512),
        (1, "Concat", 1025, 256, 256), (1, "Conv2d 1x1", 512, 256, 256),
        (1, "ResBlock x 3", 256, 256, 256), (1, "Upsample", 256, 512, 512),
        (2, "Concat", 1025, 128, 128), (2, "Conv2d 1x1", 512, 128, 128),
        (2, "ResBlock x 3", 512, 128, 128), (2, "Upsample", 512, 256, 256),
        (3, "Concat", 1025, 64, 64), (3, "Conv2d 1x1", 512, 64, 64),
        (3, "ResBlock x 3", 512, 64, 64), (3, "Upsample", 512, 128, 128),
        (4, "Conv2d 3x3", 512, 64, 64), (4, "ResBlock", 512, 64, 64),
        (4, "AttnBlock", 512, 64, 64), (4, "ResBlock", 512, 64, 64)]
    assert part(rows, "Main")[1] == ("Out", "decoder.fuse.0", "Conv2d 1x1", (128, 512, 512),
                                     257 * 128 + 128, 257 * 128 * 512**2)
    assert [row[1] for row in part(rows, "Main")[-2:]] == ["decoder.mid.attn_1",
                                                           "decoder.mid.block_2"]


@pytest.mark.parametrize(("preset", "parameters"), [
    ("base", 60_276_227), ("large", 160_136_835), ("large2", 371_966_467)])
def test_the_published_decoders_have_their_parameters_in_the_table(preset, parameters):
    rows = list_layers(on_meta(preset, "add"), 256)
    assert sum(row[5] for row in rows if row[0] in ("Condition", "Main")) == parameters
    if preset == "base":                   # its trunk is the vanilla decoder and costs the same
        ours, vanilla = ([row[2:6] for row in part(rows, name) if row[2] != "add"]
                         for name in ("Main", "First stage's decoder"))
        assert ours == vanilla


def test_layers_are_printed_in_columns_with_the_prior_and_no_file_is_written(
        tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    _, parent = write_first_stage(run)
    write_decoder(run, parent, blend="concat")
    write_prior(run, parent)
    before = sorted(tmp_path.rglob("*"))
    text = run_main(monkeypatch, capsys, run, "--layers")
    assert sorted(tmp_path.rglob("*")) == before
    assert max(map(len, text.splitlines())) < 100
    assert f"One image of {SIZE} x {SIZE} px" in text
    totals = [int(line.split()[1].replace(",", "")) for line in text.splitlines()
              if line.split()[:1] == ["total"]]
    model, prior = load_model(run), load_prior(run).unet
    assert sum(totals) == sum(p.numel() for p in model.parameters())
    assert sum(totals[:2]) == sum(p.numel() for p in model.decoder.parameters())
    assert f"Prior tiny: {sum(p.numel() for p in prior.parameters()):,} parameters" in text
    path = write_public(tmp_path / "base.ckpt", asymmetric(VQGAN(KL), num_res_blocks=2))
    text = run_main(monkeypatch, capsys, path, "--layers")
    assert "One image of 256 x 256 px" in text
    assert "First stage's decoder" not in text               # it is not in the file
    assert "Prior" not in text


def test_layers_of_a_folder_with_a_prior_alone_are_its_first_stages_and_its_own(
        tmp_path, monkeypatch, capsys):
    _, parent = write_first_stage(tmp_path / "run")
    write_prior(tmp_path / "prior-run", parent, vqgan=str(tmp_path / "run"))
    text = run_main(monkeypatch, capsys, tmp_path / "prior-run", "--layers")
    assert "prior-run: a prior on a vqgan, step" in text
    assert "First stage's decoder" in text
    assert "Prior tiny" in text


# ---------------------------------------------------------------- the command


def test_both_outputs_of_a_run_come_from_one_command(tmp_path, monkeypatch, capsys):
    model, run = asymmetric(VQGAN(FOUR)), tmp_path / "run"
    config = settings() | {"first_stage": dataclasses.asdict(FOUR)}
    first_stage = model.first_stage.state_dict()
    write_stage(run, "vqgan", first_stage, config)
    weights = {f"decoder.{name}": value for name, value in model.decoder.state_dict().items()}
    write_stage(run, "decoder", weights, config, run_folder.weights_hash(first_stage))
    one, vae = tmp_path / "one.pt", tmp_path / "vae"
    text = run_main(monkeypatch, capsys, run, "-o", one, "--to-diffusers", vae)
    for part in ("decoder, step 2", "left out     the first stage's own decoder", str(one),
                 str(vae / "config.json")):
        assert part in text
    assert same_pictures(load_model(one), model)
    assert same_pictures(load_model(vae), model)
    fields = json.loads((vae / "config.json").read_text())
    assert (fields["scaling_factor"], fields["sample_size"]) == (0.18215, SIZE)


def test_the_map_of_a_folders_latents_is_said_and_kept_also_by_what_is_trained_on_it(
        tmp_path, monkeypatch, capsys):
    stated = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "latents_mean": [0.5, -0.5],
              "latents_std": [1.5, 2.0]}
    to_diffusers(VQGAN(FOUR), tmp_path / "a", **stated, sample_size=512)
    first_stage = load(tmp_path / "a")
    model = asymmetric(first_stage.model)
    config = settings(vqgan=str(tmp_path / "a")) | {"first_stage": dataclasses.asdict(FOUR)}
    config["decoder"]["ch"] = FOUR.ch
    weights = {f"decoder.{name}": value for name, value in model.decoder.state_dict().items()}
    write_stage(tmp_path / "run", "decoder", weights, config, first_stage.parent)
    for source, flag, target in (("a", "--to-diffusers", "b"), ("a", "-o", "a.pt"),
                                 ("a.pt", "--to-diffusers", "c"), ("run", "--to-diffusers", "d"),
                                 ("run", "-o", "run.pt"), ("run.pt", "--to-diffusers", "e")):
        text = run_main(monkeypatch, capsys, tmp_path / source, flag, tmp_path / target)
        assert ("scaling_factor 0.3611, shift_factor 0.1159, latents_mean [0.5, -0.5], latents_std "
                "[1.5, 2.0]\n") in text
    for folder in "bcde":
        fields = json.loads((tmp_path / folder / "config.json").read_text())
        assert {name: fields[name] for name in stated} == stated
        assert fields["sample_size"] == (512 if folder in "bc" else SIZE)    # a run has its own


def test_a_wide_latent_goes_to_diffusers_with_the_scale_in_the_config_beside_its_file(
        tmp_path, monkeypatch, capsys):
    model = VQGAN(dataclasses.replace(KL, ch_mult=(1, 2, 4, 4), z_channels=16, embed_dim=16))
    torch.save({name: value for name, value in model.state_dict().items()
                if "quant_conv" not in name}, tmp_path / "ae.sft")
    text = run_main(monkeypatch, capsys, tmp_path / "ae.sft")
    assert "for a diffusion model: no scaling_factor is stated\n" in text
    with pytest.raises(UserError, match="no scaling_factor is stated for these 16 channels: put"):
        run_main(monkeypatch, capsys, tmp_path / "ae.sft", "--to-diffusers", tmp_path / "vae")
    assert not (tmp_path / "vae").exists()
    (tmp_path / "config.json").write_text(json.dumps({
        "_class_name": "AutoencoderKL", "scaling_factor": 0.3611, "shift_factor": 0.1159,
        "use_quant_conv": False, "use_post_quant_conv": False}))
    run_main(monkeypatch, capsys, tmp_path / "ae.sft", "--to-diffusers", tmp_path / "vae")
    fields = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert (fields["scaling_factor"], fields["shift_factor"]) == (0.3611, 0.1159)
    assert same_pictures(load_model(tmp_path / "vae"), load_model(tmp_path / "ae.sft"))


@pytest.mark.parametrize(("name", "value"), [
    ("act_fn", "gelu"), ("norm_type", "spatial"), ("mid_block_add_attention", False)])
def test_what_no_shape_tells_and_is_not_implemented_is_refused_by_name(tmp_path, name, value):
    to_diffusers(VQGAN(FOUR), tmp_path / "a", act_fn="swish")            # another name of silu
    load(tmp_path / "a")
    config = tmp_path / "a" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    with pytest.raises(UserError, match=f"has {name} {value!r}, and only .* is implemented"):
        load(tmp_path / "a")


def test_where_one_output_is_refused_the_other_is_not_written(tmp_path, monkeypatch, capsys):
    tiny_runs.write_run(tmp_path / "run")                    # a codebook: not for diffusers
    for args in (("-o", tmp_path / "one.pt", "--to-diffusers", tmp_path / "vae"),
                 ("-o", tmp_path / "run", "--to-diffusers", tmp_path / "vae")):
        with pytest.raises(UserError):
            run_main(monkeypatch, capsys, tmp_path / "run", *args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_mistake_at_the_command_line_ends_with_status_2_and_one_line(tmp_path, monkeypatch,
                                                                       capsys):
    path = write_public(tmp_path / "sd.ckpt", VQGAN(KL))
    for args, reason in (([tmp_path / "gone.ckpt"], "gone.ckpt: no such run folder or checkpoint"),
                         ([path, "-o", path], "sd.ckpt exists already"),
                         ([path, "--to-diffusers", tmp_path], "exists already")):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            exit_on_user_error(convert.main)
        assert left.value.code == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1


def test_a_prior_comes_with_the_average_its_process_and_its_first_stage(tmp_path):
    first_stage, parent = write_first_stage(tmp_path)
    write_prior(tmp_path, parent)
    file = tmp_path / "prior" / "last.pt"
    state = run_folder.load(file)
    weights = {name: torch.randn_like(value) for name, value in state["model"].items()}
    state["ema"]["weights"] = weights
    state["config"]["prior"]["residual"] = "onehot"
    run_folder.save(file, state)
    for path in (tmp_path, file):
        prior = load_prior(path)
        assert prior.unet.state_dict().keys() == weights.keys()
        for name, value in prior.unet.state_dict().items():
            assert torch.equal(value, weights[name]), name
        diffusion = prior.diffusion
        assert (diffusion.K, diffusion.T, diffusion.residual) == (tiny_runs.TINY.K, 6, "onehot")
        assert (prior.grid, prior.step, prior.finished, prior.parent) == ((16, 16), 2, True, parent)
        assert prior.facts == state["extra"]
        for module in (prior.unet, prior.first_stage):
            assert not module.training
            assert not any(p.requires_grad for p in module.parameters())
        indices = diffusion.sample(prior.unet, (2, *prior.grid), 3, torch.Generator())
        assert prior.first_stage.decode_indices(indices).shape == (2, 3, 32, 32)
        x = torch.rand(1, 3, 32, 32)
        assert torch.equal(prior.first_stage.indices(x), first_stage.eval().indices(x))


@pytest.mark.parametrize("name", ["breadth", "layout"])
def test_a_prior_of_another_network_is_refused_in_one_line(tmp_path, name):
    write_prior(tmp_path, write_first_stage(tmp_path)[1])
    state = run_folder.load(tmp_path / "prior" / "last.pt")
    state["config"]["prior"]["net"][name] = 8
    run_folder.save(tmp_path / "prior" / "last.pt", state)
    with pytest.raises(UserError, match=f"of another version .* train it again .*{name}"):
        load_prior(tmp_path)


def test_steps_are_a_hundred_or_all_unless_asked_for():
    assert [convert.chosen_steps(*given) for given in (
        (None, 50), (None, 4000), (7, 4000), (None, 4000, 25))] == [50, 100, 7, 25]
    for asked in (0, 51):
        with pytest.raises(UserError, match="from 1 to T = 50"):
            convert.chosen_steps(asked, 50)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)


def agree(model, peer, side=64):
    """The same latents and pictures, of ours and of diffusers' model."""
    x, mask = torch.rand(1, 3, side, side) * 2 - 1, half_masked(side)
    with torch.no_grad():
        if model.config.latent == "vq":
            z_e = model.moments(x)
            close(z_e, peer.encode(x).latents)
            close(model.decode(model.quantize(z_e)[0]), peer.decode(z_e).sample)
            return
        z, theirs = model.encode(x), peer.encode(x).latent_dist
        close(z, theirs.mode())
        close(model.first_stage.moments(x).logvar, theirs.logvar)
        cases = [{}]
        if isinstance(model, AsymVQGAN):
            cases += [{"image": x, "mask": m} for m in (mask, 0 * mask, 0 * mask + 1)]
        for known in cases:
            close(model.decode(z, **known), peer.decode(z, **known).sample)


ATTENTION = dataclasses.replace(FOUR, attn_levels=(0, 2))
KL_F8, VQ_F8 = VQGAN_PRESETS["kl-f8"], VQGAN_PRESETS["vq-f8"]


@pytest.mark.parametrize(("name", "make"), [
    pytest.param(name, make, id=number, marks=pytest.mark.slow if "f8" in number else ())
    for number, name, make in [
        ("kl", "AutoencoderKL", lambda: VQGAN(FOUR)), ("vq", "VQModel", lambda: VQGAN(VQ)),
        ("kl-attention", "AutoencoderKL", lambda: VQGAN(ATTENTION)),
        ("asymmetric", "AsymmetricAutoencoderKL", lambda: asymmetric(VQGAN(FOUR), 12, 3)),
        ("asymmetric-attention", "AsymmetricAutoencoderKL",
         lambda: asymmetric(VQGAN(ATTENTION), 12, 3)),
        ("kl-f8", "AutoencoderKL", lambda: VQGAN(KL_F8)),
        ("vq-f8", "VQModel", lambda: VQGAN(VQ_F8)),
        ("kl-f8-base", "AsymmetricAutoencoderKL", lambda: asymmetric(VQGAN(KL_F8), 128, 2)),
        ("kl-f8-large", "AsymmetricAutoencoderKL", lambda: asymmetric(VQGAN(KL_F8), 192, 3))]])
def test_diffusers_reads_ours_and_we_theirs_and_all_compute_the_same(tmp_path, name, make):
    diffusers = pytest.importorskip("diffusers")
    model = make().eval()
    if model.config.latent == "vq":                # codes far from each other
        torch.nn.init.normal_(model.quantize.embedding.weight)
    to_diffusers(model, tmp_path / "ours")
    peer, told = getattr(diffusers, name).from_pretrained(tmp_path / "ours",
                                                          output_loading_info=True)
    assert not any(told.values())                  # no key missing, unexpected or of another shape
    agree(model, peer.eval())
    for safe in (True, False):
        peer.save_pretrained(tmp_path / f"{safe}", safe_serialization=safe)
        agree(load_model(tmp_path / f"{safe}"), peer)
        size = sum(file.stat().st_size for file in (tmp_path / f"{safe}").iterdir())
        peer.save_pretrained(tmp_path / f"{safe}-shards", max_shard_size=size // 3,
                             safe_serialization=safe)
        assert len(list((tmp_path / f"{safe}-shards").glob("*-of-*"))) > 1
        agree(load_model(tmp_path / f"{safe}-shards"), peer)


# What the config.json of first stages in wide use says of their latents. The networks are those of
# Stable Diffusion apart from the width of the latent and the convolutions around it.
NO_CONVOLUTIONS = {"use_quant_conv": False, "use_post_quant_conv": False}
LATENTS = {
    "sd": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025},
    "playground": {"latent_channels": 4, "scaling_factor": 0.5, "latents_std": [8.4, 5.1, 4.4, 4.8],
                   "latents_mean": [-1.6, 1.1, -0.2, 0.7]},
    "sd3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609,
            **NO_CONVOLUTIONS},
    "flux": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159,
             **NO_CONVOLUTIONS}}
SMALL = {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 1}


def published(name, sizes=SMALL, seed=0):
    """A first stage of that layout with random weights, by diffusers' own class."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4,
                                    up_block_types=("UpDecoderBlock2D",) * 4,
                                    **{**LATENTS[name], **sizes}).eval()
    with torch.no_grad():
        for weight in model.parameters():                # norms and biases are no longer 1 and 0
            if weight.ndim == 1:
                weight += 0.2 * torch.randn_like(weight)
    return model


def original_names(model):
    """A diffusers autoencoder's weights by the names in the file that its authors published.

    Written out from these, module by module: the encoder's levels from the highest resolution on,
    the decoder's numbered likewise, attention by convolutions.
    """
    levels, blocks = len(model.config.block_out_channels), model.config.layers_per_block
    names = {}
    for half, level, mine, extra in (("encoder", "down", "down_blocks", 0),
                                     ("decoder", "up", "up_blocks", 1)):
        names |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out",
                  f"{half}.norm_out": f"{half}.conv_norm_out"}
        places = {f"{half}.mid.block_{i + 1}": f"{half}.mid_block.resnets.{i}" for i in (0, 1)}
        for i in range(levels):
            number = i if half == "encoder" else levels - 1 - i
            places |= {f"{half}.{level}.{i}.block.{j}": f"{half}.{mine}.{number}.resnets.{j}"
                       for j in range(blocks + extra)}
            names[f"{half}.{level}.{i}.{level}sample.conv"] = (
                f"{half}.{mine}.{number}.{level}samplers.0.conv")
        for theirs, ours in places.items():
            names |= {f"{theirs}.{part}": f"{ours}.{part}"
                      for part in ("norm1", "conv1", "norm2", "conv2")}
            names[f"{theirs}.nin_shortcut"] = f"{ours}.conv_shortcut"
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v",
                     "proj_out": "to_out.0"}
        names |= {f"{half}.mid.attn_1.{a}": f"{half}.mid_block.attentions.0.{b}"
                  for a, b in attention.items()}
    names |= {name: name for name in ("quant_conv", "post_quant_conv")}
    state, original = model.state_dict(), {}
    for theirs, ours in names.items():
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in state:
                value = state.pop(f"{ours}.{kind}")
                linear = ".attn_1." in theirs and value.ndim == 2
                original[f"{theirs}.{kind}"] = value[:, :, None, None] if linear else value
    assert not state                                     # every weight has a name
    return original


def whole_checkpoint(model):
    """What lies in an all-in-one file: the first stage in half precision, and other networks."""
    weights = {f"first_stage_model.{name}": value.half()
               for name, value in original_names(model).items()}
    return weights | {
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(2, 2),
        "text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight": torch.zeros(2)}


def save_as(form, model, folder):
    """Write diffusers' model in a form in which such first stages are published: its path."""
    half = form.endswith("16")
    if form.startswith("folder"):
        model = copy.deepcopy(model).half() if half else model
        model.save_pretrained(folder / "vae", variant="fp16" if half else None,
                              max_shard_size="2MB" if "shards" in form else "10GB")
        return folder
    contents = whole_checkpoint(model) if form == "whole" else original_names(model)
    if half:
        contents = {name: value.bfloat16() for name, value in contents.items()}
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({k: v.contiguous() for k, v in contents.items()}, folder / "ae.sft")
    return folder / "ae.sft"


def as_published(form, model, path, tmp_path):
    """The same file or folder, read by diffusers, in float32."""
    kind = type(model)
    if path.is_dir():
        return kind.from_pretrained(path / "vae", variant="fp16" if "16" in form else None,
                                    torch_dtype=torch.float32).eval()
    model.save_config(tmp_path / "config")
    named = shutil.copy(path, tmp_path / "config" / "ae.safetensors")     # .sft is not known there
    return kind.from_single_file(str(named), config=str(tmp_path / "config"), local_files_only=True,
                                 torch_dtype=torch.float32).eval()


FORMS = ("folder", "folder-fp16", "folder-shards", "folder-shards-fp16", "whole", "file",
         "file-bf16")


@pytest.mark.parametrize(("name", "form"), [
    *(("flux", form) for form in FORMS), ("sd3", "folder"), ("sd3", "whole"), ("sdxl", "whole"),
    ("sdxl", "folder"), ("playground", "folder")])
def test_first_stages_in_wide_use_are_read_in_the_forms_they_come_in(tmp_path, name, form):
    model = published(name)
    path = save_as(form, model, tmp_path)
    peer, loaded = as_published(form, model, path, tmp_path), load(path)
    agree(loaded.model, peer)
    assert ("shards" in form) == any(tmp_path.rglob("*-of-*"))
    assert len([note for note in loaded.notes if "an identity was added" in note]) == (
        2 if name in ("sd3", "flux") else 0)
    fields = {key: value for key, value in LATENTS[name].items()
              if key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")}
    stated = {key: loaded.config[key] for key in fields if key in loaded.config}
    assert stated == (fields if path.is_dir() else {})


@pytest.mark.parametrize("name", ["sd3", "playground"])
def test_a_decoder_on_a_shifted_latent_is_written_with_the_shift_and_computes_the_same(
        tmp_path, name):
    diffusers = pytest.importorskip("diffusers")
    published(name).save_pretrained(tmp_path)
    first_stage = load(tmp_path)
    model = asymmetric(first_stage.model, num_res_blocks=2)
    fields = public_names.stated(first_stage.config)
    to_diffusers(model, tmp_path / "asym", **fields)
    peer = diffusers.AsymmetricAutoencoderKL.from_pretrained(tmp_path / "asym").eval()
    agree(model, peer)
    assert {key: peer.config[key] for key in fields} == fields


@pytest.mark.slow
def test_a_decoder_trained_for_200_steps_on_a_first_stage_of_diffusers_keeps_known_pixels(tmp_path):
    """3 times better than by that first stage's own decoder; and diffusers computes the same."""
    vae, run = tmp_path / "sd3", tmp_path / "run"
    published("sd3", {"block_out_channels": (16, 32, 64, 64), "layers_per_block": 1,
                      "norm_num_groups": 4}).save_pretrained(vae / "vae")
    for program, *args in (
            ("train", "--vqgan", vae, "--stage", "decoder", "--preset", "tiny", "--steps", "200",
             "--workers", "0", "--device", "cpu", "--out", run),
            ("eval", run, "-n", "50", "--no-fid", "--device", "cpu"),
            ("convert", run, "--to-diffusers", tmp_path / "asym")):
        script = Path(convert.__file__).with_name(f"{program}.py")
        subprocess.run([sys.executable, script, *args], check=True)
    rows = json.loads((run / "report.json").read_text())["rows"]
    errors = {row["decoder"]: row["pre_error"] for row in rows
              if (row["protocol"], row["bucket"]) == ("full", "all")}
    print(errors)                                                        # shown by pytest -s
    assert 3 * errors["asym"] < min(errors["vanilla"], errors["asym-nomask"])
    peer = pytest.importorskip("diffusers").AsymmetricAutoencoderKL.from_pretrained(
        tmp_path / "asym").eval()
    agree(load_model(run), peer)


def tiny_pipeline(folder, vae):
    """A StableDiffusionInpaintPipeline of 64 px with random weights around `vae`."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    ends = {"bos": "<|startoftext|>", "eos": "<|endoftext|>"}
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), *ends.values()]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=16, num_attention_heads=2,
        num_hidden_layers=1, **{f"{end}_token_id": vocabulary[word] for end, word in ends.items()}))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=9, out_channels=4, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        vae=vae, text_encoder=text_encoder.eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_stable_diffusions_inpainting_pipeline_decodes_with_our_decoder(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    from PIL import Image
    model = asymmetric(VQGAN(FOUR), ch=12, num_res_blocks=3)
    to_diffusers(model, tmp_path / "vae")
    vae = diffusers.AsymmetricAutoencoderKL.from_pretrained(tmp_path / "vae")
    pipeline = tiny_pipeline(tmp_path, vae)
    calls, decode = [], vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, **given: calls.append((z, given))
                        or decode(z, **given))
    photo = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[16:50, 10:40] = 255                                        # white is painted anew
    made = pipeline("a sign", Image.fromarray(photo.numpy()), Image.fromarray(mask.numpy()),
                    height=64, width=64, num_inference_steps=2, output_type="pt",
                    generator=torch.Generator().manual_seed(0)).images          # in [0,1]
    (z, given), = calls
    x, mask = photo.permute(2, 0, 1)[None] / 127.5 - 1, mask[None, None] / 255
    close(given["image"], x)
    close(given["mask"], mask)
    with torch.no_grad():
        ours = model.decode(z, image=x, mask=mask) / 2 + 0.5
        bare = model.decode(z) / 2 + 0.5
    known = (mask == 0).expand_as(made)
    assert ((ours > 0) & (ours < 1)).float().mean() > 0.5           # few are clamped
    close(ours.clamp(0, 1), made)
    assert (bare.clamp(0, 1) - made)[known].abs().mean() > 0.01     # the mask is not ignored
