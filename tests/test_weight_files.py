"""Every attack here is shown to work on Python's own reader before it fails on ours."""

import argparse
import builtins
import collections
import copyreg
import datetime
import errno
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import run_folder
import weight_files
from data import load_image
from distributed import UserError
from weight_files import (
    PUBLISHED_FILES,
    TYPES,
    StandIn,
    find_weights,
    read_public,
    read_safetensors,
    read_tensors,
    unreadable,
    write_safetensors,
)

# -- attacks ---------------------------------------------------------------------------------------


class Call:
    """Pickled, it is a call: function(*args)."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def evil(monkeypatch, tmp_path):
    """Importable modules whose class writes the marker in whatever way a pickle may use it."""
    marker = tmp_path / "marker"

    class Evil:
        def __new__(cls, *args, **kwargs):
            if args or kwargs:
                marker.touch()
            return super().__new__(cls)

        def touch(self, *args):
            marker.touch()

        __setstate__ = __setitem__ = append = extend = add = touch

    for name in ("omegaconf_evil", "taming", "taming.modules"):
        module = types.ModuleType(name)
        module.Evil = Evil
        monkeypatch.setitem(sys.modules, name, module)
    copyreg.add_extension("subprocess", "getoutput", 240)
    yield marker
    copyreg.remove_extension("subprocess", "getoutput", 240)
    copyreg._extension_cache.pop(240, None)


def text(string):
    """The opcode that pushes a string in protocol 2."""
    return b"X" + struct.pack("<I", len(string.encode())) + string.encode()


def by_name(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


def embedded(thing):
    """The opcodes that push a thing."""
    return pickle.dumps(thing, 2)[2:-1]


def archived(contents, **records):
    """The bytes of a zip file as torch.save makes it, of a pickle and other records."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in {"data.pkl": contents, "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def attacks(marker, package="omegaconf_evil"):
    """{what: (pickle, the name that it asks for)}"""
    touch, opening = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    saved = io.BytesIO()
    torch.save(Call(exec, opening), saved)
    evil, arg = b"\x80\x02" + by_name(package, "Evil"), text(str(marker))
    return {
        "os.system": (pickle.dumps(Call(os.system, touch), 2), f"{os.system.__module__}.system"),
        "exec": (pickle.dumps(Call(exec, opening), 2), "builtins.exec"),
        "eval": (pickle.dumps(Call(eval, opening), 2), "builtins.eval"),
        "import": (pickle.dumps(Call(builtins.__import__, "os"), 2), "builtins.__import__"),
        "Popen": (pickle.dumps(Call(subprocess.Popen, ["touch", str(marker)]), 2),
                  ".Popen"),                   # of `commands`, subprocess's name in protocol 2
        "touch of a path": (b"\x80\x02" + by_name("builtins", "getattr") + embedded(marker)
                            + text("touch") + b"\x86R)R.", "builtins.getattr"),
        "partial": (b"\x80\x02" + by_name("functools", "partial") + by_name("posix", "system")
                    + text(touch) + b"\x86R)R.", "functools.partial"),
        "attrgetter": (b"\x80\x02" + by_name("operator", "attrgetter") + text("touch")
                       + b"\x85R" + embedded(marker) + b"\x85R)R.", "operator.attrgetter"),
        "a path through an allowed module": (
            b"\x80\x04" + by_name("torch", "serialization.os.system") + text(touch) + b"\x85R.",
            "torch.serialization.os.system"),
        "a path through an allowed function": (
            b"\x80\x04" + by_name("torch._utils", "_rebuild_tensor.__globals__") + b".",
            "torch._utils._rebuild_tensor.__globals__"),
        "a storage inside": (
            pickle.dumps(Call(torch.storage._load_from_bytes, saved.getvalue()), 2),
            "torch.storage._load_from_bytes"),
        "NEWOBJ": (evil + arg + b"\x85\x81.", f"{package}.Evil"),
        "REDUCE": (evil + arg + b"\x85R.", f"{package}.Evil"),
        "BUILD": (evil + b")\x81}b.", f"{package}.Evil"),
        "SETITEM": (evil + b")\x81" + arg + arg + b"s.", f"{package}.Evil"),
        "SETITEMS": (evil + b")\x81(" + arg + arg + b"u.", f"{package}.Evil"),
        "APPEND": (evil + b")\x81" + arg + b"a.", f"{package}.Evil"),
        "APPENDS": (evil + b")\x81(" + arg + b"e.", f"{package}.Evil"),
        "in the state of a stand-in": (
            b"\x80\x02" + by_name("taming", "Evil") + b")\x81}" + text("a")
            + by_name("posix", "system") + text(touch) + b"\x85Rsb.", "posix.system"),
        "in the arguments of a stand-in": (
            b"\x80\x02" + by_name("taming", "Evil") + by_name("posix", "system") + text(touch)
            + b"\x85R\x85R.", "posix.system"),
        # Opcodes that torch's reader does not know, so that no name is looked at.
        "EXT": (b"\x80\x02\x82\xf0" + embedded((touch,)) + b"R.", "Unsupported operand"),
        "protocol 0": (f"cos\nsystem\n(S'{touch}'\ntR.".encode(), "Unsupported operand"),
        "INST": (f"(S'{touch}'\nios\nsystem\n.".encode(), "Unsupported operand"),
        "OBJ": (f"(cos\nsystem\nS'{touch}'\no.".encode(), "Unsupported operand"),
        "protocol 4": (pickle.dumps(Call(os.system, touch), 4), "Unsupported operand"),
        "NEWOBJ_EX": (evil + b")}" + text("a") + arg + b"s\x92.", "Unsupported operand"),
        "ADDITEMS": (evil + b")\x81(" + arg + b"\x90.", "Unsupported operand"),
    }


ATTACKS = sorted(attacks(Path("marker")))
HARMLESS = {"import", "a path through an allowed function"}    # by themselves: only a first step


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("attack", [name for name in ATTACKS if name not in HARMLESS])
def test_the_attacks_are_real(attack, evil):
    payload, _ = attacks(evil)[attack]
    if attack == "a storage inside":
        assert "weights_only=False" in Path(torch.storage.__file__).read_text(encoding="utf-8")
    result = pickle.loads(payload)
    if isinstance(result, subprocess.Popen):
        result.wait()
    assert evil.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_by_file_and_name_and_nothing_runs(tmp_path, attack, evil):
    payload, name = attacks(evil)[attack]
    path = tmp_path / "model.ckpt"
    for data in (archived(payload), payload):                  # in a zip, and as a bare pickle
        path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            read_tensors(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert str(caught.value).isprintable()
        assert name in str(caught.value) or data == payload
        assert not evil.exists()


@pytest.mark.parametrize("opcode", ["NEWOBJ", "REDUCE", "BUILD", "SETITEM", "APPENDS"])
def test_a_real_class_behind_a_stand_ins_name_is_never_touched(tmp_path, opcode, evil):
    payload, _ = attacks(evil, package="taming.modules")[opcode]
    (tmp_path / "a.ckpt").write_bytes(archived(payload))
    if opcode in ("SETITEM", "APPENDS"):                       # filled like a dict, which it is not
        with pytest.raises(UserError, match="truncated or no checkpoint"):
            read_tensors(tmp_path / "a.ckpt")
    else:
        assert type(read_tensors(tmp_path / "a.ckpt")) is StandIn
    assert not evil.exists()


@pytest.mark.parametrize(("module", "name"), [
    ("torch.nn.modules.linear", "Linear"), ("torch", "load"), ("torch.hub", "load"),
    ("numpy", "load"), ("nt", "system"), ("builtins", "type"), ("builtins", "object"),
    ("builtins", "getattr"), ("typing", "get_type_hints"), ("numpy.core.multiarray", "fromfile"),
    ("lightning_evil", "X"), ("\u043emegaconf", "X"), ("Omegaconf", "X"), ("pickle", "loads"),
    ("copyreg", "_reconstructor"), ("argparse", "ArgumentParser"), ("os\x1b[2J", "system"),
])
def test_names_beside_the_list_are_refused(tmp_path, module, name):
    (tmp_path / "a.pt").write_bytes(archived(b"\x80\x02" + by_name(module, name) + b"."))
    with pytest.raises(UserError) as caught:
        read_tensors(tmp_path / "a.pt")
    named = f"{module}.{name}".encode("unicode_escape").decode()    # a Cyrillic o shows itself
    assert f"asks for {named}, which is code" in str(caught.value)


def test_a_numpy_array_with_a_made_up_dtype_is_a_stand_in(tmp_path):
    """With numpy's own dtype, these eight bytes would be followed as a pointer."""
    fields = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
    dtype = by_name("numpy", "dtype") + text("V8") + b"\x85R" + embedded(fields) + b"b"
    array = (b"\x80\x02" + by_name("numpy.core.multiarray", "_reconstruct")
             + by_name("numpy", "ndarray") + b"K\x00\x85" + text("b") + b"\x87R(K\x01K\x01\x85"
             + dtype + b"\x89" + text("A" * 8) + b"tb.")
    (tmp_path / "a.pt").write_bytes(archived(array))
    assert type(read_tensors(tmp_path / "a.pt")) is StandIn


# -- what trainers write ---------------------------------------------------------------------------


def test_containers_and_numbers_come_back_and_the_rest_as_stand_ins(tmp_path):
    base, frozen = torch.randn(6, 4), torch.nn.Parameter(torch.randn(2), requires_grad=False)
    tensors = {"transposed": base.t(), "every other": base[::2, 1:], "half": base.half(),
               "bfloat16": base.bfloat16(), "int64": torch.arange(4), "scalar": torch.tensor(3.5),
               "empty": torch.empty(0, 3), "expanded": base[:1].expand(9, 4), "frozen": frozen,
               "bool": torch.tensor([True, False])}
    plain = {"epoch": 3, "step": 2**40, "bytes": b"\x00\xff", "kept": {1, 2}, "sizes": (1, 2.5),
             "frozen": frozenset("ab"), "types": [int, dict, range(3), slice(1, 2), None],
             "milestones": collections.Counter([3, 5]), "dtype": torch.float16,
             "ordered": collections.OrderedDict(a=1), "shape": torch.Size([2, 3])}
    foreign = {"args": argparse.Namespace(lr=0.1), "path": Path("a"), "loss": np.float32(0.5),
               "when": datetime.datetime(2026, 1, 1), "array": np.arange(3),
               "version": torch.__version__, "numpy": np.dtype("float32")}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": tensors, "plain": plain, "foreign": foreign, "share": [base, base[2]],
                "loops": collections.defaultdict(list, a=[1]),
                "queue": collections.deque([1, 2], maxlen=5)}, path)
    before, contents = path.read_bytes(), read_tensors(path)
    for name, tensor in tensors.items():
        read = contents["state_dict"][name]
        assert (read.dtype, read.stride()) == (tensor.dtype, tensor.stride())
        assert torch.equal(read, tensor)
    assert contents["plain"] == plain
    assert (contents["loops"], contents["queue"]) == ({"a": [1]}, [1, 2])
    assert {type(value) for value in contents["foreign"].values()} == {StandIn}
    whole, row = contents["share"]
    whole.fill_(7)                                   # tensors still share, and the file is not hit
    assert row.tolist() == [7] * 4
    assert path.read_bytes() == before


@pytest.mark.parametrize(("module", "name"), [
    ("easydict", "EasyDict"), ("yacs.config", "CfgNode"), ("addict.addict", "Dict"),
    ("diffusers.configuration_utils", "FrozenDict")])
def test_dictionaries_of_packages_that_are_not_there_keep_their_items(tmp_path, monkeypatch, module,
                                                                      name):
    kind = type(name, (dict,), {"__module__": module})
    with monkeypatch.context() as patch:
        for part in (module.split(".")[0], module):
            patch.setitem(sys.modules, part, types.ModuleType(part))
        setattr(sys.modules[module], name, kind)
        settings = kind(lr=0.1)
        settings.lr = 0.1                                # EasyDict keeps each item twice
        torch.save({"hyper_parameters": settings, "a": torch.ones(2)}, tmp_path / "a.ckpt")
    contents = read_tensors(tmp_path / "a.ckpt")
    assert contents["hyper_parameters"] == {"lr": 0.1}
    assert contents["a"].tolist() == [1, 1]


def test_classes_of_packages_that_are_not_there_are_stand_ins_and_attributes_a_dict(
        tmp_path, monkeypatch):
    kinds = {}
    with monkeypatch.context() as patch:
        for module, name, base in (("pytorch_lightning.callbacks", "ModelCheckpoint", object),
                                   ("omegaconf.dictconfig", "DictConfig", object),
                                   ("lightning_fabric.utilities.data", "AttributeDict", dict)):
            kinds[name] = type(name, (base,), {"__module__": module})
            for part in (module.split(".")[0], module):
                patch.setitem(sys.modules, part, types.ModuleType(part))
            setattr(sys.modules[module], name, kinds[name])
        config = kinds["DictConfig"]()
        config.content = {"lr": 1e-4}
        torch.save({"callbacks": {kinds["ModelCheckpoint"]: {"best": torch.tensor(0.5)}},
                    "hyper_parameters": kinds["AttributeDict"](config=config, lr=0.1),
                    "state_dict": {"a": torch.ones(2)}}, tmp_path / "a.ckpt")
    contents = read_tensors(tmp_path / "a.ckpt")
    assert contents["state_dict"]["a"].tolist() == [1, 1]
    assert contents["callbacks"] == {StandIn: {"best": torch.tensor(0.5)}}
    config = contents["hyper_parameters"].pop("config")
    assert (type(config), contents["hyper_parameters"]) == (StandIn, {"lr": 0.1})


# -- why a file was not read -----------------------------------------------------------------------


def failures(path):
    """Each reader's complaint about `path`, as photo, weights, first stage and checkpoint."""
    for read in (load_image, read_tensors, read_public, run_folder.load):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(caught.value).isprintable()
        yield str(caught.value)


@pytest.mark.parametrize(("content", "said"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    (b"/annex/objects/SHA256E-s9--00.png\n", "git annex get"),
    (b"<!DOCTYPE HTML>\n<html>Please log in</html>", "a web page; download the file"),
    (b"", "the file is empty")])
def test_what_lies_in_the_place_of_a_file_is_named_with_its_cure_by_all_readers(tmp_path, content,
                                                                               said):
    (tmp_path / "x.png").write_bytes(content)
    for complaint in failures(tmp_path / "x.png"):
        assert complaint.startswith(f"{tmp_path / 'x.png'}: ")
        assert said in complaint


def test_a_link_to_nothing_says_where_it_leads(tmp_path):
    (tmp_path / "x.png").symlink_to("../annex/objects/1")
    for complaint in failures(tmp_path / "x.png"):
        assert complaint == (f"{tmp_path}/x.png: cannot be read (a link to {tmp_path.parent}/annex/"
                             "objects/1, which is not there; fetch or mount it)")


@pytest.mark.parametrize(("error", "said"), [
    (PermissionError(errno.EACCES, "Permission denied"), "cannot be read (Permission denied)"),
    (OSError(errno.EIO, "Input/output error"), "cannot be read (Input/output error)"),
    (MemoryError(), "cannot be read (Cannot allocate memory)"),
    (OSError("broken data stream"), "cannot be decoded (broken data stream); get it again"),
    (KeyError("x"), "cannot be decoded (KeyError: 'x'); get it again"),
    (OSError("cannot identify 'a\\x1b.png'"), "cannot be decoded (cannot identify); get it again"),
    (KeyError(), "cannot be decoded (KeyError: ); get it again")], ids=str)
def test_the_systems_reason_is_told_apart_from_a_damaged_file(tmp_path, monkeypatch, error, said):
    monkeypatch.chdir(tmp_path)
    Path("a\x1b.png").write_bytes(b"no image")
    complaint = unreadable("a\x1b.png", error, "cannot be decoded", "get it again")
    assert str(complaint) == f"a\x1b.png: {said}"


# -- what is no checkpoint -------------------------------------------------------------------------


def saved(contents, **how):
    file = io.BytesIO()
    torch.save(contents, file, **how)
    return file.getvalue()


@pytest.mark.parametrize(("data", "reason"), [
    (b"", r"no checkpoint of PyTorch 1.6 or later \(the file is empty"),
    (b"<!DOCTYPE html><html>", "a web page; download the file"),
    (saved({}, _use_new_zipfile_serialization=False),
     r"it starts with b'.*torch\.load\('a\.pt', weights_only=True"),
    (b"\x89PNG\r\n\x1a\n", "no checkpoint of"), (pickle.dumps({"a": 1}), "no checkpoint of"),
    (b"PK\x03\x04", "truncated or no"), (archived(b""), "truncated or no"),
    (archived(b"\x80\x02\x1b]2;title\x07."), "truncated or no"),
    (archived(pickle.dumps({}, 2), **{"constants.pkl": b""}), "torchscript"),
    *((saved({"a": torch.ones(50)})[:cut], "truncated or no")
      for cut in [*range(2, 1100, 31), -1]),
], ids=lambda value: value[:20] if isinstance(value, str) else len(value))
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, data, reason):
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.pt: .*{reason}") as caught:
        read_tensors(tmp_path / "a.pt")
    assert str(caught.value).isprintable()


def test_a_tensor_never_reaches_beyond_its_storage(tmp_path):
    data, path = torch.arange(5.0), tmp_path / "a.pt"
    pid = b"(" + b"".join(map(embedded, ("storage", torch.FloatStorage, "0", "cpu", 5))) + b"tQ"
    for offset, size, stride in ((0, (6,), (1,)), (0, (5,), (2,)), (1, (5,), (1,)),
                                 (0, (2**62, 4), (1, 1)), (4, (2,), (-1,)), (0, (5,), (1,))):
        contents = (b"\x80\x02" + by_name("torch._utils", "_rebuild_tensor_v2") + b"(" + pid
                    + b"".join(map(embedded, (offset, size, stride, False, {}))) + b"tR.")
        path.write_bytes(archived(contents, **{"data/0": data.numpy().tobytes()}))
        if stride == (1,) and offset + size[0] == 5:
            assert read_tensors(path).tolist() == data.tolist()
            continue
        with pytest.raises(UserError, match="truncated or no checkpoint"):
            read_tensors(path)


# -- the first stage in a public checkpoint --------------------------------------------------------


def first_stage():
    """The keys of a small one with a condition branch, random values."""
    names = ["encoder.conv_in.weight", "encoder.down.0.block.0.norm1.bias", "quant_conv.weight",
             "quantize.embedding.weight", "post_quant_conv.bias", "decoder.conv_in.weight",
             "decoder.up.0.block.0.conv1.weight", "decoder.encoder.layers.0.weight",
             "decoder.mid.block_1.norm1.weight"]
    return {name: torch.randn(3, 2, 1) for name in names}


def stable_diffusion(weights, prefix="first_stage_model."):
    """`weights` inside a whole checkpoint, other parts around it."""
    others = ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.0.bias",
              "model_ema.diffusion_modelout0bias", "model_ema.decay", "betas", "logvar",
              "cond_stage_model.transformer.text_model.encoder.layers.0.weight",
              "conditioner.embedders.0.model.encoder.weight"]
    return {**{name: torch.randn(2) for name in others},
            **{prefix + name: value for name, value in weights.items()}}


DROPPED = ("keys that are not used, left out: model (2), model_ema ({}), "
           "single buffers (2), cond_stage_model (1), conditioner (1)")


def same(state, expected):
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].dtype == torch.float32
        assert state[name].is_contiguous()
        assert torch.equal(state[name], value.float())


def write_config(folder, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "AutoencoderKL", "latent_channels": 4, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("wrap", [
    lambda weights: weights, lambda weights: {"model": weights, "step": 1},
    lambda weights: {"epoch": 3, "state_dict": weights, "optimizer_states": [{}]}])
def test_a_pickled_first_stage_comes_as_it_is_named_and_needs_the_file_no_more(tmp_path, wrap):
    weights, path = first_stage(), tmp_path / "model.ckpt"
    torch.save(wrap(weights), path)
    found = read_public(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    same(found.state, weights)
    assert (found.path, found.config, found.notes) == (path, None, [])


@pytest.mark.parametrize("wrap", [
    lambda weights: {"state_dict": {f"module.{name}": v for name, v in weights.items()}},
    lambda weights: {"model_state_dict": {f"_orig_mod.{name}": v for name, v in weights.items()}},
    lambda weights: {"module": {f"module._orig_mod.{name}": v for name, v in weights.items()}},
    lambda weights: {"params": {name.replace(".", "._orig_mod.", 1): v
                                for name, v in weights.items()}},
    lambda weights: {"_forward_module.first_stage_model." + name: v for name, v in weights.items()},
    lambda weights: {"model": {0: "text", **{f"vae.{name}": v for name, v in weights.items()}}}])
def test_what_trainers_put_around_weights_and_names_is_taken_off(tmp_path, wrap):
    weights = first_stage()
    torch.save(wrap(weights), tmp_path / "a.ckpt")
    same(read_public(tmp_path / "a.ckpt").state, weights)


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_of_a_whole_stable_diffusion_checkpoint_only_the_first_stage_is_kept(
        tmp_path, prefix, ending):
    weights, path = first_stage(), tmp_path / f"sd.{ending}"
    whole = stable_diffusion(weights, prefix)
    if ending == "safetensors":
        write_safetensors(path, whole)
    else:
        torch.save({"state_dict": whole | {"model_ema.num_updates": 7}}, path)
    found = read_public(path)
    same(found.state, weights)
    assert found.notes == [DROPPED.format(2 if ending == "safetensors" else 3)]


@pytest.mark.parametrize(("prefix", "left_out"), [
    ("first_stage_model.", "colorize (1)"), ("", "single buffers (1)")])
def test_weights_that_nothing_uses_are_left_out_and_the_unexpected_is_not(
        tmp_path, prefix, left_out):
    weights = first_stage() | {"quantize.used": torch.ones(2), "lossless.weight": torch.ones(2)}
    names = ("loss.logvar", "loss.discriminator.main.0.bias", "model_ema.decay",
             "decoder.up_layers.0.deconv.weight", "decoder.up_layers.0.deconv.bias",
             "quantize.embedding.cluster_size", "quantize.embedding.embed_avg", "colorize")
    unused = dict.fromkeys(names, torch.ones(1))
    torch.save({prefix + name: value for name, value in (unused | weights).items()},
               tmp_path / "a.ckpt")
    found = read_public(tmp_path / "a.ckpt")
    same(found.state, weights)
    assert found.notes == [
        "keys that are not used, left out: loss (2), model_ema (1), decoder.up_layers (2), "
        f"quantize.embedding.cluster_size (1), quantize.embedding.embed_avg (1), {left_out}"]


@pytest.mark.parametrize(("contents", "reason"), [
    (stable_diffusion(first_stage()) | first_stage(),
     r"needs one first stage.*holds first_stage_model\.decoder\., decoder\.:"),
    ({"model.diffusion_model.out.0.bias": torch.ones(1), "betas": torch.ones(1)},
     r"needs one first stage.*holds model\.diffusion_model\.out\.0\.bias, betas:"),
    ({"encoder.\x1b[2J": 1}, r"needs one first stage.*holds encoder\.\\x1b\[2J:"),
    ({3: torch.ones(1)}, "needs one first stage.*holds 3:"),
    *((nothing, "needs one first stage.*holds no keys:")
      for nothing in ({}, {"state_dict": {}}, [torch.ones(1)], torch.ones(1))),
    ({"encoder.a": torch.ones(1), "decoder.c": "F32"}, r"decoder\.c is not a tensor"),
    ({"state_dict": first_stage(), "callback": print}, r"refused because .* builtins\.print"),
])
def test_what_holds_not_one_first_stage_is_one_line(tmp_path, contents, reason):
    torch.save(contents, tmp_path / "a.pt")
    with pytest.raises(UserError, match=rf"a\.pt: .*{reason}") as caught:
        read_public(tmp_path / "a.pt")
    assert str(caught.value).isprintable()


def test_parameters_become_tensors_and_half_precision_float32_which_is_told(tmp_path):
    weights = first_stage()
    weights["post_quant_conv.bias"] = torch.nn.Parameter(weights["post_quant_conv.bias"])
    weights["quant_conv.weight"] = weights["quant_conv.weight"].half()
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"].bfloat16().transpose(0, 1)
    torch.save(weights | {"quantize.used": torch.arange(3)}, tmp_path / "a.pt")
    found = read_public(tmp_path / "a.pt")
    assert torch.equal(found.state.pop("quantize.used"), torch.arange(3))
    same(found.state, weights)
    assert not any(value.requires_grad for value in found.state.values())
    assert found.notes == ["bfloat16 weights are read as float32",
                           "float16 weights are read as float32"]


@pytest.mark.parametrize("where", ["", "vae", "movq", "vqvae"])
def test_a_folder_of_diffusers_gives_weights_and_config_safetensors_first(tmp_path, where):
    weights, folder = first_stage(), tmp_path / where
    config = write_config(folder)
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    assert read_public(tmp_path).path == folder / "diffusion_pytorch_model.bin"
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", weights)
    found = read_public(tmp_path)
    same(found.state, weights)
    assert (found.config, found.notes) == (config, [])


def test_a_file_has_the_config_beside_it_if_diffusers_wrote_that(tmp_path):
    torch.save(first_stage(), tmp_path / "model.bin")
    (tmp_path / "config.json").write_text('{"lr": 0.1}')
    write_config(tmp_path / "vae")
    assert read_public(tmp_path / "model.bin").config is None
    assert write_config(tmp_path) == read_public(tmp_path / "model.bin").config


def test_the_only_variant_in_a_folder_is_read_and_told(tmp_path):
    write_config(tmp_path)
    name = "diffusion_pytorch_model"
    torch.save(first_stage(), tmp_path / f"{name}.fp16.bin")
    assert read_public(tmp_path).notes == [f"read a variant, {name}.fp16.bin"]
    torch.save(first_stage(), tmp_path / f"{name}.non_ema.bin")
    with pytest.raises(UserError, match=r"needs one .*fp16\.bin, .*non_ema\.bin.*by name"):
        read_public(tmp_path)
    torch.save(first_stage(), tmp_path / f"{name}.bin")
    assert read_public(tmp_path).path.name == f"{name}.bin"


@pytest.mark.parametrize("name", ["ae.sft", "afc8e28272cd15db", "a.ckpt", "a.bin"])
def test_the_format_is_told_by_the_first_bytes_whatever_the_name(tmp_path, name):
    weights = first_stage()
    write_safetensors(tmp_path / name, weights)
    same(read_public(tmp_path / name).state, weights)
    torch.save(weights, tmp_path / name)
    same(read_public(tmp_path / name).state, weights)
    (tmp_path / name).write_bytes(b"version 0 of something")
    with pytest.raises(UserError, match="no safetensors and no checkpoint of PyTorch"):
        read_public(tmp_path / name)


def test_a_folder_of_diffusers_may_have_safetensors_under_the_pickles_name(tmp_path):
    weights = first_stage()
    write_config(tmp_path)
    write_safetensors(tmp_path / "diffusion_pytorch_model.bin", weights)
    same(read_public(tmp_path).state, weights)


def write_shards(folder, weights, ending="safetensors", variant="", index=None):
    """`weights` in three files and the index of them, as diffusers writes; the index's path."""
    places, name = {}, "diffusion_pytorch_model"
    for number in range(3):
        part = dict(list(weights.items())[number::3])
        shard = f"{name}{variant}-{number + 1:05}-of-00003.{ending}"
        (write_safetensors if ending == "safetensors" else lambda path, part: torch.save(
            part, path))(folder / shard, part)
        places |= dict.fromkeys(part, shard)
    path = folder / (index or f"{name}.{ending}.index.json")
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return path


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_hold_what_one_file_would(tmp_path, ending):
    weights, config = first_stage(), write_config(tmp_path)
    index = write_shards(tmp_path, weights, ending)
    for path in (tmp_path, index):                       # the folder, or the index by its name
        found = read_public(path)
        assert found.state.keys() == weights.keys()
        same({name: found.state[name] for name in weights}, weights)
        assert (found.path, found.config, found.notes) == (index, config, [])


@pytest.mark.parametrize("index", ["safetensors.fp16.index", "safetensors.index.fp16"])
def test_of_shards_in_a_folder_the_plain_ones_go_before_a_variant_and_one_file_before_all(
        tmp_path, index):
    write_config(tmp_path)
    half = {name: value.half() for name, value in first_stage().items()}
    write_shards(tmp_path, half, variant=".fp16", index=f"diffusion_pytorch_model.{index}.json")
    assert f"read a variant, diffusion_pytorch_model.{index}.json" in read_public(tmp_path).notes
    pickled = write_shards(tmp_path, first_stage(), "bin")
    assert read_public(tmp_path).path == pickled
    safe = write_shards(tmp_path, first_stage())
    assert read_public(tmp_path).path == safe
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", first_stage())
    assert read_public(tmp_path).path.name == "diffusion_pytorch_model.safetensors"


def test_a_shard_that_is_missing_or_damaged_is_named_in_one_line(tmp_path):
    write_config(tmp_path)
    index = write_shards(tmp_path, first_stage())
    shard = tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors"
    whole = read_tensors(shard)
    mistakes = [(lambda: write_safetensors(shard, dict(list(whole.items())[1:])),
                 rf"index\.json: truncated .*{next(iter(whole))}"),
                (lambda: shard.write_bytes(b"cut"), rf"{shard.name}: no safetensors and no"),
                (shard.unlink, rf"index\.json: truncated .*no file {shard.name} is beside"),
                (lambda: index.write_text("{"), r"index\.json: truncated"),
                (lambda: index.write_text("{}"), r"index\.json: truncated .*weight_map")]
    for mistake, reason in mistakes:
        mistake()
        with pytest.raises(UserError, match=reason) as caught:
            read_public(tmp_path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("shard", ["../{}", "sub/{}", "{folder}/{}", "./{}", "..", ".", "", 3,
                                   "\x1b[2J", "{}\x00"])
def test_an_index_reaches_no_file_but_those_beside_it(tmp_path, shard):
    folder, name = tmp_path / "model", "diffusion_pytorch_model-00001-of-00003.safetensors"
    write_config(folder)
    index = write_shards(folder, first_stage())
    (folder / "sub").mkdir()
    for other in (tmp_path, folder / "sub"):
        (other / name).write_bytes((folder / name).read_bytes())
    fields = json.loads(index.read_text())
    told = shard.format(name, folder=folder) if isinstance(shard, str) else shard
    for key, value in fields["weight_map"].items():
        fields["weight_map"][key] = told if value == name else value
    index.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"index\.json: truncated") as caught:
        read_public(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("files", "reason"), [
    ({}, "Is a directory"), ({"config.json": '{"model_type": "clip"}'}, "Is a directory"),
    ({"config.json": "{"}, r"config\.json: cannot be decoded"),
    ({"config.json": '{"_class_name": "VQModel"}'}, r"needs one .*\(none is there\); download it"),
])
def test_a_folder_without_what_is_needed_says_what_is_missing(tmp_path, files, reason):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_public(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", [
    "AutoencoderDC", "AutoencoderKLWan", "AutoencoderKLFlux2", "AutoencoderTiny",
    "FluxTransformer2DModel"])
def test_another_class_of_diffusers_is_refused_by_its_name_before_its_weights_are_read(
        tmp_path, name):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": name}))
    (tmp_path / "vae" / "ae.sft").write_bytes(b"not read")
    for path in (tmp_path, tmp_path / "vae", tmp_path / "vae" / "ae.sft"):
        with pytest.raises(UserError, match=rf"config\.json: {name} is not supported, only "
                                            "AutoencoderKL, VQModel, AsymmetricAutoencoderKL"):
            read_public(path)


def test_a_config_that_is_a_link_to_nothing_is_not_passed_over(tmp_path):
    """Without its config.json a folder's weights would be read with other norms and scales."""
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", first_stage())
    (tmp_path / "config.json").symlink_to("../blobs/5f0c")
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(UserError, match=r"config\.json: cannot be read \(a link .*blobs/5f0c"):
            read_public(path)


# -- the .safetensors format -----------------------------------------------------------------------


def raw(path, header, numbers=b""):
    """A file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    return path


def test_what_is_written_is_read_as_it_was_and_stays_so(tmp_path):
    weights, path = {"a.weight": torch.randn(3, 4).half(), "empty": torch.zeros(0, 5),
                     "scalar": torch.tensor(2.5), "view": torch.randn(4, 6).T[::2]}, tmp_path / "x"
    write_safetensors(path, weights)
    before, found = path.read_bytes(), read_safetensors(path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value.float()) for name, value in weights.items())
    found["view"].zero_()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_read_also_where_its_numbers_lie_askew(tmp_path, name):
    value = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(TYPES[name])
    numbers = bytes(value.view(torch.uint8).flatten().tolist())
    header = {"x": {"dtype": name, "shape": [2, 3], "data_offsets": [1, 1 + len(numbers)]}}
    found = read_safetensors(raw(tmp_path / "x.safetensors", header, b"!" + numbers))["x"]
    assert found.dtype == TYPES[name]
    assert torch.equal(found, value)


def typed(path, **tensors):
    """A file of {name: (type, bytes)}, each a list of numbers."""
    header, numbers = {}, b""
    for name, (dtype, data) in tensors.items():
        size = TYPES[dtype].itemsize if dtype in TYPES else 1
        header[name.replace("__", ".")] = {"dtype": dtype, "shape": [len(data) // size],
                                           "data_offsets": [len(numbers), len(numbers + data)]}
        numbers += data
    return raw(path, header, numbers)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4"])
def test_the_type_of_a_part_that_is_not_kept_is_no_matter(tmp_path, dtype):
    path = typed(tmp_path / "flux1-dev-fp8.safetensors", model__diffusion_model__x=(dtype, b"1234"),
                 vae__encoder__conv_in=("BF16", b"\x80\x3f\0\0"), vae__decoder__x=("F32", bytes(4)))
    found = read_public(path)
    assert found.state["encoder.conv_in"].tolist() == [1, 0]
    assert found.notes == ["keys that are not used, left out: model (1)",
                           "bfloat16 weights are read as float32"]


def test_weights_of_eight_bits_are_read_and_a_type_that_is_not_known_is_named(tmp_path):
    path = typed(tmp_path / "a.safetensors", encoder__x=("F8_E4M3", b"\x38\x40"))
    assert read_public(path).state["encoder.x"].tolist() == [1, 2]
    assert read_public(path).notes == ["float8_e4m3fn weights are read as float32"]
    typed(path, encoder__x=("F8_E4M3", b"\x38\x40"), decoder__y=("F4\x1b", b"12"))
    with pytest.raises(UserError, match=r"a\.safetensors: decoder\.y is of type 'F4\\x1b'"):
        read_public(path)


@pytest.mark.parametrize("write", [write_safetensors, lambda path, state: torch.save(state, path)])
def test_a_file_whose_name_is_not_utf_8_is_read(tmp_path, write):
    weights, path = first_stage(), tmp_path / os.fsdecode(b"M\xfcnchen.pt")
    write(tmp_path / "a.pt", weights)
    os.rename(tmp_path / "a.pt", path)
    same(read_public(path).state, weights)


def entry(dtype, shape, *offsets):
    return {"x": {"dtype": dtype, "shape": [shape], "data_offsets": offsets}}


@pytest.mark.parametrize("header", [
    b"no json", b"", {"x": 3}, [1, 2], entry("F32", 2, 0, 9999), entry("F32", 3, 0, 8),
    entry("F32", 2, -8, 0), entry([], 1, 0, 8), "cut", "page", "empty", "gone"], ids=str)
def test_a_header_that_lies_or_a_file_that_is_none_is_one_line_that_names_it(tmp_path, header):
    path = tmp_path / "x.safetensors"
    if not isinstance(header, str):
        raw(path, header, bytes(8))
    elif header != "gone":
        write_safetensors(path, {"x": torch.ones(400)})
        path.write_bytes({"cut": path.read_bytes()[:-1], "empty": b"",
                          "page": b"<!DOCTYPE html><html></html>"}[header])
    why = {"gone": "cannot be read", "page": "a web page"}.get(str(header), "truncated or no check")
    with pytest.raises(UserError, match=why) as caught:
        read_safetensors(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


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
    assert f"put {PUBLISHED_FILES[name][0]}{name} there" in line
    assert line.isprintable()


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
    assert (path, path.read_bytes()) == (folder / name, b"weights")
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
    for _ in range(2):
        assert find_weights(name, folder).read_bytes() == b"mine"
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert str(folder / name) in said
    assert digest[:8] in said


def test_only_local_rank_0_downloads_and_the_others_wait(published, monkeypatch, offline):
    name, folder, _ = published
    folder.mkdir(parents=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(weight_files.time, "sleep",
                        lambda _: (folder / name).write_bytes(b"weights"))
    assert find_weights(name, folder).read_bytes() == b"weights"
