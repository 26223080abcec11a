import json
import struct
from argparse import Namespace

import pytest
import torch

import weight_files
from distributed import UserError
from weight_files import (
    PUBLISHED_FILES,
    TYPES,
    find_weights,
    read_public,
    read_safetensors,
    write_safetensors,
)


def first_stage():
    """The keys of a small one with a condition branch, random values."""
    names = ["encoder.conv_in.weight", "encoder.down.0.block.0.norm1.bias", "quant_conv.weight",
             "quantize.embedding.weight", "post_quant_conv.bias", "decoder.conv_in.weight",
             "decoder.up.0.block.0.conv1.weight", "decoder.encoder.layers.0.weight",
             "decoder.up_layers.0.deconv.weight"]
    return {name: torch.randn(3, 2, 1) for name in names}


def stable_diffusion(weights, prefix="first_stage_model."):
    """`weights` inside a whole checkpoint, other parts around it."""
    others = ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.0.bias",
              "model_ema.diffusion_modelout0bias", "model_ema.decay", "betas", "logvar",
              "cond_stage_model.transformer.text_model.encoder.layers.0.weight",
              "conditioner.embedders.0.model.encoder.weight"]
    return {**{name: torch.randn(2) for name in others},
            **{prefix + name: value for name, value in weights.items()}}


DROPPED = {"model.diffusion_model.": 2, "model_ema.": 2, "single buffers": 2, "conditioner.": 1,
           "cond_stage_model.": 1}


def same(state, expected):
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].dtype == torch.float32
        assert state[name].is_contiguous()
        assert torch.equal(state[name], value.float())


def write_by_hand(path, weights):
    """By hand, so that writing needs no package: length of the header, header, bytes."""
    header, data = {}, b""
    for name, value in weights.items():
        raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[value.dtype]
        header[name] = {"dtype": kind, "shape": list(value.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def write_config(folder, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "AutoencoderKL", "latent_channels": 4, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return config


WRAPPERS = {
    "flat": lambda weights: weights,
    "state_dict": lambda weights: {"epoch": 3, "state_dict": weights, "optimizer_states": [{}]},
    "model": lambda weights: {"model": weights, "step": 1},
}


@pytest.mark.parametrize("ending", ["ckpt", "pt", "pth", "bin"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_pickled_first_stage_comes_as_it_is_named(tmp_path, wrapper, ending):
    weights, path = first_stage(), tmp_path / f"model.{ending}"
    torch.save(WRAPPERS[wrapper](weights), path, _use_new_zipfile_serialization=ending != "pth")
    found = read_public(path)
    same(found.state, weights)
    assert (found.path, found.config, found.dropped, found.stand_ins, found.notes) == (
        path, None, {}, [], [])


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_of_a_whole_stable_diffusion_checkpoint_only_the_first_stage_is_kept(tmp_path, prefix):
    weights, path = first_stage(), tmp_path / "sd.ckpt"
    torch.save({"state_dict": stable_diffusion(weights, prefix)}, path)
    found = read_public(path)
    same(found.state, weights)
    assert found.dropped == DROPPED


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_what_only_training_needed_is_left_out_and_the_unexpected_is_not(tmp_path, prefix):
    weights = first_stage() | {"quantize.used": torch.ones(2), "lossless.weight": torch.ones(2),
                               "surprise": torch.ones(1)}
    training = {"loss.logvar": torch.ones(1), "loss.discriminator.main.0.bias": torch.ones(3),
                "model_ema.decay": torch.ones(1), "colorize": torch.ones(1)}
    torch.save({prefix + name: value for name, value in (training | weights).items()},
               tmp_path / "a.ckpt")
    found = read_public(tmp_path / "a.ckpt")
    same(found.state, weights)
    assert found.dropped == ({"loss.": 2, "model_ema.": 1, "single buffers": 1} if not prefix
                             else {"first_stage_model.": 4})


def test_two_first_stages_in_one_file_are_refused(tmp_path):
    weights = first_stage()
    torch.save(stable_diffusion(weights) | weights, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt: more than one first stage \(first_stage_model\."
                                        r"decoder\. and decoder\.\)"):
        read_public(tmp_path / "a.ckpt")


@pytest.mark.parametrize(("keys", "kind"), [
    (["lora_unet_down_blocks_0.lora_up.weight"], "a LoRA"),
    (["model.diffusion_model.out.0.bias", "betas"], "a U-Net"),
    (["down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"], "a U-Net"),
    (["model_ema.decay", "model_ema.encoderconv_inweight"], "EMA weights without their model"),
    (["text_model.encoder.layers.0.mlp.fc1.weight"], "a text encoder"),
    (["cond_stage_model.transformer.text_model.encoder.layers.0.weight"], "a text encoder"),
    (["transformer.tok_emb.weight"], "a transformer"),
    (["a.weight", "b.encoder.weight", "c.weight", "d.weight"], None),
])
def test_a_file_without_a_first_stage_says_what_it_looks_like(tmp_path, keys, kind):
    torch.save({"state_dict": {key: torch.ones(1) for key in keys}}, tmp_path / "a.pt")
    with pytest.raises(UserError) as caught:
        read_public(tmp_path / "a.pt")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'a.pt'}: holds no first stage: no key starts with "
                              f"encoder. or decoder. ({', '.join(keys[:3])}, ...)")
    assert message.endswith(f"; it looks like {kind}" if kind else "...)")


@pytest.mark.parametrize(("contents", "reason"), [
    ({}, "there is none"), ({"state_dict": {}}, "there is none"),
    ([torch.ones(1)], "an object of type list, not a state dict"),
    (torch.ones(1), "an object of type Tensor"),
    ({3: torch.ones(1)}, "keys are no names"), ({"encoder.\x1b[2J": 1}, "keys are no names"),
    ({"encoder.a": 3, "decoder.b": torch.ones(1), "decoder.c": "text"},
     "not only tensors in its state dict: encoder.a is of type int, decoder.c is of type str"),
    ({f"encoder.{n}": n for n in range(5)}, "encoder.2 is of type int and 2 more"),
])
def test_what_is_no_state_dict_is_one_line(tmp_path, contents, reason):
    torch.save(contents, tmp_path / "a.pt")
    with pytest.raises(UserError, match=reason) as caught:
        read_public(tmp_path / "a.pt")
    assert str(caught.value).startswith(str(tmp_path / "a.pt"))
    assert str(caught.value).isprintable()


def test_a_value_that_is_none_of_the_first_stages_may_be_anything(tmp_path):
    torch.save(stable_diffusion(first_stage()) | {"model_ema.num_updates": 7}, tmp_path / "a.pt")
    assert read_public(tmp_path / "a.pt").dropped == DROPPED | {"model_ema.": 3}


def test_half_precision_becomes_float32_and_is_told(tmp_path):
    weights = first_stage()
    weights["quant_conv.weight"] = weights["quant_conv.weight"].half()
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"].bfloat16().transpose(0, 1)
    torch.save(weights | {"quantize.used": torch.arange(3)}, tmp_path / "a.pt")
    found = read_public(tmp_path / "a.pt")
    assert torch.equal(found.state.pop("quantize.used"), torch.arange(3))
    same(found.state, weights)
    assert found.notes == ["bfloat16 weights are read as float32",
                           "float16 weights are read as float32"]


def test_what_was_read_does_not_need_the_file_any_more(tmp_path):
    weights, path = first_stage(), tmp_path / "a.pt"
    torch.save(weights, path)
    found = read_public(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    same(found.state, weights)


def test_classes_of_the_trainer_are_listed(tmp_path):
    torch.save({"state_dict": first_stage(), "hparams": Namespace(lr=1.0)}, tmp_path / "a.ckpt")
    assert read_public(tmp_path / "a.ckpt").stand_ins == ["argparse.Namespace"]


# -- folders and safetensors -----------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", "vae", "movq", "vqvae"])
def test_a_folder_of_diffusers_gives_weights_and_config(tmp_path, where):
    weights, folder = first_stage(), tmp_path / where
    config = write_config(folder)
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    (tmp_path / "model_index.json").write_text("{}")
    found = read_public(tmp_path)
    same(found.state, weights)
    assert found.config == config
    assert found.path == folder / "diffusion_pytorch_model.bin"
    assert found.notes == []


def test_a_file_has_the_config_beside_it_if_diffusers_wrote_that(tmp_path):
    torch.save(first_stage(), tmp_path / "model.bin")
    (tmp_path / "config.json").write_text('{"lr": 0.1}')
    assert read_public(tmp_path / "model.bin").config is None
    config = write_config(tmp_path)
    assert read_public(tmp_path / "model.bin").config == config
    assert read_public(tmp_path / "model.bin").notes == []


def test_the_only_variant_in_a_folder_is_read_and_told(tmp_path):
    weights = {name: value.half() for name, value in first_stage().items()}
    write_config(tmp_path)
    torch.save(weights, tmp_path / "diffusion_pytorch_model.fp16.bin")
    found = read_public(tmp_path)
    same(found.state, weights)
    assert found.notes == [
        "read a variant, diffusion_pytorch_model.fp16.bin",
        "float16 weights are read as float32"]
    torch.save(weights, tmp_path / "diffusion_pytorch_model.non_ema.bin")
    with pytest.raises(UserError, match=r"give one of its variants: .*fp16\.bin, .*non_ema\.bin"):
        read_public(tmp_path)
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    assert read_public(tmp_path).path.name == "diffusion_pytorch_model.bin"


@pytest.mark.parametrize(("files", "reason"), [
    ({}, "no config.json of diffusers in it, nor in its vae, movq, vqvae"),
    ({"config.json": '{"model_type": "clip"}'}, "no config.json of diffusers"),
    ({"config.json": "{"}, r"config\.json: not a JSON file"),
    ({"config.json": '{"_class_name": "VQModel"}'}, "no diffusion_pytorch_model.safetensors or"),
])
def test_a_folder_without_what_is_needed_says_what_is_missing(tmp_path, files, reason):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_public(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_safetensors_come_like_pickles_and_before_them(tmp_path):
    weights, config = first_stage(), write_config(tmp_path)
    weights["quant_conv.weight"] = weights["quant_conv.weight"].bfloat16()
    write_by_hand(tmp_path / "diffusion_pytorch_model.safetensors", weights)
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    found = read_public(tmp_path)
    same(found.state, weights)
    assert found.config == config
    write_by_hand(tmp_path / "sd.safetensors", stable_diffusion(weights))
    found = read_public(tmp_path / "sd.safetensors")
    same(found.state, weights)
    assert found.dropped == DROPPED


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "it is empty"), (b"<html>", "it is a web page"), (b"\x10", "Error"),
    (struct.pack("<Q", 2) + b"{", "JSONDecodeError"),
    (b"version https://git-lfs.github.com/spec/v1", "it is a git-lfs pointer"),
])
def test_a_damaged_safetensors_file_is_one_line(tmp_path, data, reason):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.safetensors: truncated or no checkpoint.*{reason}"):
        read_public(tmp_path / "a.safetensors")


# -- what pickles.py refuses -----------------------------------------------------------------------


def test_missing_truncated_and_foreign_files_are_one_line_each(tmp_path):
    torch.save(first_stage(), tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[:-20])
    (tmp_path / "page.ckpt").write_bytes(b"<!DOCTYPE html>")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for name, reason in {"gone.ckpt": "no such file or folder", "cut.ckpt": "truncated or no",
                         "page.ckpt": "a web page", "empty.ckpt": "empty"}.items():
        with pytest.raises(UserError, match=reason) as caught:
            read_public(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_code_beside_the_weights_is_refused_by_name(tmp_path):
    torch.save({"state_dict": first_stage(), "callback": print}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt: refused: it asks for __builtin__\.print, which"):
        read_public(tmp_path / "a.ckpt")


# -- the .safetensors format ----------------------------------------------------------------------


def raw(path, header, numbers=b""):
    """A file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    return path


def test_what_is_written_is_read_as_it_was(tmp_path):
    weights = {"a.weight": torch.randn(3, 4).half(), "empty": torch.zeros(0, 5),
               "scalar": torch.tensor(2.5), "view": torch.randn(4, 6).T[::2]}
    write_safetensors(tmp_path / "x.safetensors", weights)
    found = read_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value.float()) for name, value in weights.items())
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_read_also_where_its_numbers_lie_askew(tmp_path, name):
    value = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(TYPES[name])
    numbers = bytes(value.view(torch.uint8).flatten().tolist())
    header = {"x": {"dtype": name, "shape": [2, 3], "data_offsets": [1, 1 + len(numbers)]}}
    found = read_safetensors(raw(tmp_path / "x.safetensors", header, b"!" + numbers))["x"]
    assert found.dtype == TYPES[name]
    assert torch.equal(found, value)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": torch.ones(4)})
    before = path.read_bytes()
    read_safetensors(path)["x"].zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("header", [
    b"no json", {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9999]}},
    {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
    {"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
    {"x": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, {"x": 3}, [1, 2]])
def test_a_header_that_lies_is_one_line_that_names_the_file(tmp_path, header):
    path = raw(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(UserError, match="truncated or no checkpoint") as caught:
        read_safetensors(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_and_a_missing_one_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": torch.ones(400)})
    path.write_bytes(path.read_bytes()[:-1])
    for wrong in (path, tmp_path / "gone.safetensors"):
        with pytest.raises(UserError, match=wrong.name):
            read_safetensors(wrong)


def test_the_package_reads_and_writes_the_same(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    weights = {"a": torch.randn(3, 4), "b": torch.randn(7)}
    write_safetensors(tmp_path / "ours.safetensors", weights)
    theirs = safetensors.load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(theirs[name], value) for name, value in weights.items())
    half = {name: value.bfloat16() for name, value in weights.items()}
    safetensors.save_file(half, tmp_path / "theirs.safetensors")
    ours = read_safetensors(tmp_path / "theirs.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in half.items())


# -- published files -------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    """Every download fails at once, and says what was asked for."""
    def refuse(address, *args, **kwargs):
        raise OSError(f"no route to {address}")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_a_missing_file_offline_names_file_address_and_folder(name, tmp_path, offline):
    with pytest.raises(UserError) as caught:
        find_weights(name, tmp_path / "weights")
    line = str(caught.value)
    assert line.startswith(f"{name} is not in {tmp_path / 'weights'}")
    assert f"get {PUBLISHED_FILES[name][0]}{name}" in line
    assert "\n" not in line


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A file of our own in the table, at a file:// address: (name, folder to put it in, digest)."""
    source = tmp_path / "published"
    source.mkdir()
    (source / "small.pth").write_bytes(b"weights")
    digest = weight_files.hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(PUBLISHED_FILES, "small.pth", (source.as_uri() + "/", digest[:8]))
    return "small.pth", tmp_path / "cache" / "deep", digest


def test_a_missing_file_is_downloaded_once_where_it_belongs(published, capsys):
    name, folder, _ = published
    path = find_weights(name, folder)
    assert path == folder / name
    assert path.read_bytes() == b"weights"
    assert [p.name for p in folder.iterdir()] == [name]
    assert "downloading file://" in capsys.readouterr().out
    assert find_weights(name, folder) == path
    assert capsys.readouterr().out == ""


def test_a_download_with_another_hash_is_refused_and_leaves_nothing(published, monkeypatch):
    name, folder, _ = published
    monkeypatch.setitem(PUBLISHED_FILES, name, (PUBLISHED_FILES[name][0], "00000000"))
    with pytest.raises(UserError, match="invalid hash value"):
        find_weights(name, folder)
    assert list(folder.iterdir()) == []


def test_the_users_own_file_with_another_hash_is_used_and_said_once(published, capsys):
    name, folder, digest = published
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"mine")
    assert find_weights(name, folder).read_bytes() == b"mine"
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert str(folder / name) in said
    assert digest[:8] in said
    find_weights(name, folder)
    assert capsys.readouterr().out == ""


def test_only_local_rank_0_downloads_and_the_others_wait(published, monkeypatch, offline):
    name, folder, _ = published
    folder.mkdir(parents=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(weight_files.time, "sleep",
                        lambda _: (folder / name).write_bytes(b"weights"))
    assert find_weights(name, folder).read_bytes() == b"weights"


def test_who_waits_ten_minutes_in_vain_says_which_file_is_missing(published, monkeypatch):
    name, folder, _ = published
    now = [1000.0]
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(weight_files.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(weight_files.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    with pytest.raises(UserError, match=f"{name} did not come to {folder} within 10 minutes: get"):
        find_weights(name, folder)
    assert now[0] == pytest.approx(1600, abs=1)
