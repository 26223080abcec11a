"""Every attack here is shown to work on Python's own reader before it fails on ours."""

import argparse
import builtins
import codecs
import collections
import copyreg
import enum
import io
import mmap
import os
import pickle
import struct
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import pickles
from distributed import UserError
from pickles import StandIn, read_pickle, read_torchscript


class Call:
    """Pickled, it is a call: function(*args)."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def legacy_parts(contents, keys=(), version=1001, little_endian=True):
    """All of a file of torch before 1.6 but the numbers."""
    parts = (pickles.LEGACY_MAGIC, version, {"little_endian": little_endian})
    return b"".join(pickle.dumps(part, 2) for part in parts) + contents + pickle.dumps([*keys], 2)


def as_zip(contents, **records):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in {"data.pkl": contents, **records}.items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


CONTAINERS = {"zip": as_zip, "legacy": legacy_parts, "bare pickle": bytes}


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
    return marker


def text(string):
    """The opcode that pushes a short string in protocol 4."""
    return b"\x8c" + bytes([len(string.encode())]) + string.encode()


def by_name(module, name):
    return text(module) + text(name) + b"\x93"


def embedded(thing):
    """The opcodes that push a thing."""
    return pickle.dumps(thing, 2)[2:-1]


def attacks(marker, package="omegaconf_evil"):
    """{what: (pickle, the name that it asks for)}"""
    touch, opening = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    saved = io.BytesIO()
    torch.save(Call(exec, opening), saved)
    evil = b"\x80\x04" + by_name(package, "Evil")
    arg = text(str(marker))
    return {
        "os.system": (pickle.dumps(Call(os.system, touch)),
                      f"{os.system.__module__}.system"),
        "protocol 0": (f"cos\nsystem\n(S'{touch}'\ntR.".encode(), "os.system"),
        "INST": (f"(S'{touch}'\nios\nsystem\n.".encode(), "os.system"),
        "OBJ": (f"(cos\nsystem\nS'{touch}'\no.".encode(), "os.system"),
        "exec": (pickle.dumps(Call(exec, opening), 2), "__builtin__.exec"),
        "eval": (pickle.dumps(Call(eval, opening), 4), "builtins.eval"),
        "import": (pickle.dumps(Call(builtins.__import__, "os"), 4), "builtins.__import__"),
        "Popen": (pickle.dumps(Call(subprocess.Popen, ["touch", str(marker)])), "subprocess.Popen"),
        "run": (pickle.dumps(Call(subprocess.run, ["touch", str(marker)])), "subprocess.run"),
        "touch of a path": (b"\x80\x04" + by_name("builtins", "getattr") + embedded(marker)
                            + text("touch") + b"\x86R)R.", "builtins.getattr"),
        "partial": (b"\x80\x04" + by_name("functools", "partial") + by_name("os", "system")
                    + text(touch) + b"\x86R)R.", "functools.partial"),
        "attrgetter": (b"\x80\x04" + by_name("operator", "attrgetter") + text("touch")
                       + b"\x85R" + embedded(marker) + b"\x85R)R.", "operator.attrgetter"),
        "a path through an allowed module": (
            b"\x80\x04" + by_name("torch", "serialization.os.system") + text(touch) + b"\x85R.",
            "torch.serialization.os.system"),
        "a path through an allowed function": (
            b"\x80\x04" + by_name("torch._utils", "_rebuild_tensor.__globals__") + b".",
            "torch._utils._rebuild_tensor.__globals__"),
        "a storage inside": (
            pickle.dumps(Call(torch.storage._load_from_bytes, saved.getvalue())),
            "torch.storage._load_from_bytes"),
        "NEWOBJ": (evil + arg + b"\x85\x81.", f"{package}.Evil"),
        "NEWOBJ_EX": (evil + b")}" + text("a") + arg + b"s\x92.", f"{package}.Evil"),
        "REDUCE": (evil + arg + b"\x85R.", f"{package}.Evil"),
        "BUILD": (evil + b")\x81}b.", f"{package}.Evil"),
        "SETITEM": (evil + b")\x81" + arg + arg + b"s.", f"{package}.Evil"),
        "SETITEMS": (evil + b")\x81(" + arg + arg + b"u.", f"{package}.Evil"),
        "APPEND": (evil + b")\x81" + arg + b"a.", f"{package}.Evil"),
        "APPENDS": (evil + b")\x81(" + arg + b"e.", f"{package}.Evil"),
        "ADDITEMS": (evil + b")\x81(" + arg + b"\x90.", f"{package}.Evil"),
        "in the state of a stand-in": (
            b"\x80\x04" + by_name("taming", "Evil") + b")\x81}" + text("a")
            + by_name("os", "system") + text(touch) + b"\x85Rsb.", "os.system"),
        "in the arguments of a stand-in": (
            b"\x80\x04" + by_name("taming", "Evil")
            + by_name("os", "system") + text(touch) + b"\x85R\x85R.", "os.system"),
    }


ATTACKS = sorted(attacks(Path("marker")))
HARMLESS = {"import", "a path through an allowed function"}    # by themselves: only a first step
OPCODES = [name for name in ATTACKS if name.isupper() and name not in ("INST", "OBJ")]


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


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_by_file_and_name_and_nothing_runs(tmp_path, attack, container, evil):
    payload, name = attacks(evil)[attack]
    path = tmp_path / "model.ckpt"
    path.write_bytes(CONTAINERS[container](payload))
    with pytest.raises(UserError) as caught:
        read_pickle(path)
    assert str(caught.value) == f"{path}: refused: it asks for {name}, which is code, not weights"
    assert not evil.exists()


@pytest.mark.parametrize("opcode", OPCODES)
def test_a_real_class_behind_a_stand_ins_name_is_never_touched(tmp_path, opcode, evil):
    payload, name = attacks(evil, package="taming.modules")[opcode]
    path = tmp_path / "model.ckpt"
    path.write_bytes(as_zip(payload))
    contents, stand_ins = read_pickle(path)
    assert isinstance(contents, StandIn)
    assert stand_ins == [name] == ["taming.modules.Evil"]
    assert not evil.exists()


def test_the_extension_registry_is_not_asked(tmp_path, evil):
    copyreg.add_extension("posix", "system", 240)
    try:
        payload = b"\x80\x02\x82\xf0" + embedded((f"touch {evil}",)) + b"R."
        pickle.loads(payload)                          # works, and warms the registry's cache
        assert evil.exists()
        evil.unlink()
        (tmp_path / "model.ckpt").write_bytes(as_zip(payload))
        with pytest.raises(UserError, match="asks for extension 240 of the copyreg registry"):
            read_pickle(tmp_path / "model.ckpt")
    finally:
        copyreg.remove_extension("posix", "system", 240)
        copyreg._extension_cache.pop(240, None)
    assert not evil.exists()


@pytest.mark.parametrize(("module", "name"), [
    ("torch.nn.modules.linear", "Linear"), ("torch", "load"), ("torch.hub", "load"),
    ("torch._utils", "_rebuild_qtensor"), ("numpy", "load"), ("nt", "system"), ("builtins", "type"),
    ("builtins", "object"), ("omegaconf", "os.system"), ("typing", "get_type_hints"),
    ("lightning_evil", "X"), ("\u043emegaconf", "X"), ("Omegaconf", "X"), ("pickle", "loads"),
    ("copyreg", "_reconstructor"),
])
def test_names_beside_the_list_are_refused(tmp_path, module, name):
    (tmp_path / "a.pt").write_bytes(as_zip(b"\x80\x04" + by_name(module, name) + b"."))
    with pytest.raises(UserError) as caught:
        read_pickle(tmp_path / "a.pt")
    named = f"{module}.{name}".replace("\u043e", "\\u043e")     # a Cyrillic o shows itself
    assert f"asks for {named}, which is code" in str(caught.value)


def test_what_the_list_leads_to_is_immutable_or_defined_here():
    for thing in pickles._TORCHSCRIPT_ALLOWED.values():
        if isinstance(thing, type):
            with pytest.raises(TypeError, match="immutable"):
                thing.attribute = 1
        elif not isinstance(thing, torch.dtype):
            assert thing.__module__ == "pickles"


@pytest.mark.parametrize("target", [
    by_name("torch._utils", "_rebuild_tensor_v2"), by_name("collections", "OrderedDict"),
    by_name("taming", "Evil"), by_name("torch", "float32")])
def test_a_file_cannot_change_what_it_is_handed(tmp_path, target):
    before = pickles._tensor.__defaults__
    payload = b"\x80\x04" + target + b"N}" + text("__defaults__") + b"Ns\x86b."
    (tmp_path / "a.pt").write_bytes(as_zip(payload))
    with pytest.raises(UserError, match="state for an object of type"):
        read_pickle(tmp_path / "a.pt")
    assert pickles._tensor.__defaults__ == before


def test_a_numpy_array_with_a_made_up_dtype_is_a_stand_in(tmp_path):
    """With numpy's own dtype, these eight bytes would be followed as a pointer."""
    fields = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
    dtype = (b"\x80\x04" + by_name("numpy", "dtype") + text("V8") + b"\x85R"
             + embedded(fields) + b"b")
    array = (dtype + b"0" + by_name("numpy.core.multiarray", "_reconstruct")
             + by_name("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R" + b"(K\x01K\x01\x85"
             + dtype[2:] + b"\x89C\x08AAAAAAAAtb.")
    (tmp_path / "a.pt").write_bytes(as_zip(array))
    contents, stand_ins = read_pickle(tmp_path / "a.pt")
    assert isinstance(contents, StandIn)
    assert stand_ins == ["numpy.core.multiarray._reconstruct", "numpy.dtype", "numpy.ndarray"]


def test_no_source_file_is_patched_for_a_pickled_module(tmp_path, monkeypatch):
    """torch.load compares and patches the sources that such an id brings along."""
    monkeypatch.chdir(tmp_path)
    pid = text("module") + by_name("taming", "Net") + text("net.py") + text("source")
    (tmp_path / "a.pt").write_bytes(legacy_parts(b"\x80\x04(" + pid + b"tQ."))
    with pytest.raises(UserError, match="no storage of a known kind"):
        read_pickle(tmp_path / "a.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


class Storage:
    """Pickled, it is torch's reference to the storage "0" with so many float32."""

    def __init__(self, numel):
        self.pid = ("storage", torch.FloatStorage, "0", "cpu", numel)


class TensorPickler(pickle.Pickler):
    def persistent_id(self, thing):
        return getattr(thing, "pid", None)


def tensor_file(container, numel=5, offset=0, size=(5,), stride=(1,)):
    """A file with storage "0" of five numbers, and a tensor that says where in it it lies."""
    contents, numbers = io.BytesIO(), torch.arange(5.0).numpy().tobytes()
    TensorPickler(contents, 2).dump(Call(
        torch._utils._rebuild_tensor_v2, Storage(numel), offset, size, stride, False, {}))
    if container == "zip":
        return as_zip(contents.getvalue(), **{"data/0": numbers})
    return legacy_parts(contents.getvalue(), ["0"]) + struct.pack("<q", numel) + numbers


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_tensor_never_reaches_beyond_its_storage(tmp_path, container):
    path = tmp_path / "a.pt"
    path.write_bytes(tensor_file(container, offset=1, size=(2, 2), stride=(1, 2)))
    assert read_pickle(path)[0].tolist() == [[1, 3], [2, 4]]
    for lie in [{"size": (6,)}, {"stride": (2,)}, {"stride": (-1,), "offset": 4}, {"offset": 1},
                {"offset": -1}, {"stride": (2**62,)}, {"size": (2**62, 4), "stride": (0, 0)},
                {"size": (2**40,)}, {"numel": 6, "size": (6,)}, {"numel": 2**62}, {"numel": -5}]:
        path.write_bytes(tensor_file(container, **lie))
        with pytest.raises(UserError, match=r"a\.pt: truncated or no checkpoint"):
            read_pickle(path)
    path.write_bytes(tensor_file(container, numel=10**5))           # refused before room is made
    with pytest.raises(UserError, match=r"shorter than (its|the) 100000 numbers"):
        read_pickle(path)


def test_what_older_files_may_hold_and_this_reader_does_not_know_is_refused(tmp_path):
    none, path = pickle.dumps(None), tmp_path / "a.pt"
    part = ("storage", torch.FloatStorage, "0", "cpu", 5, ("1", 0, 5))
    for bad, reason in [
            (legacy_parts(none, version=1000), "of another version"),
            (legacy_parts(none, little_endian=False), "from a big-endian machine"),
            (legacy_parts(none, ["0"]), "the storages are not all there"),
            (legacy_parts(b"\x80\x02" + embedded(part) + b"Q.", ["0"]), "of a known kind"),
            (as_zip(pickle.dumps(Call(codecs.encode, "a", "rot13"), 2)), "not spelled in latin1"),
            (saved(torch.ones(2, dtype=torch.complex64).conj()), "marked as conjugate")]:
        path.write_bytes(bad)
        with pytest.raises(UserError, match=reason):
            read_pickle(path)


# -- what others write -----------------------------------------------------------------------------


@pytest.fixture
def trainers(monkeypatch):
    """Classes of packages that need not be installed; `gone()` takes the packages away again."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.trainer",
             "pytorch_lightning.callbacks.model_checkpoint", "pytorch_lightning.trainer.states",
             "omegaconf", "omegaconf.dictconfig", "ldm", "ldm.modules", "ldm.modules.ema"]
    made = {name: types.ModuleType(name) for name in names}

    def put(module, name, kind):
        kind.__module__, kind.__qualname__, kind.__name__ = module, name, name
        setattr(made[module], name, kind)
        return kind

    made["ModelCheckpoint"] = put("pytorch_lightning.callbacks.model_checkpoint",
                                  "ModelCheckpoint", type("ModelCheckpoint", (), {}))
    made["TrainerFn"] = put("pytorch_lightning.trainer.states", "TrainerFn",
                            enum.Enum("TrainerFn", ["FIT", "TEST"]))
    made["DictConfig"] = put("omegaconf.dictconfig", "DictConfig", type("DictConfig", (dict,), {}))
    made["LitEma"] = put("ldm.modules.ema", "LitEma", type("LitEma", (list,), {}))
    with monkeypatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, made[name])
        yield types.SimpleNamespace(**made, gone=patch.undo)


def state_dict():
    base = torch.randn(6, 4)
    return collections.OrderedDict({
        "float32": base, "transposed": base.t(), "row": base[2], "every other": base[::2, 1:],
        "float16": torch.randn(3, 5).half(), "bfloat16": torch.randn(7).bfloat16(),
        "float64": torch.randn(2).double(), "complex": torch.randn(2, dtype=torch.complex64),
        "int64": torch.arange(4), "bool": torch.tensor([True, False]), "scalar": torch.tensor(3.5),
        "uint8": torch.arange(5).byte(), "empty": torch.empty(0, 3),
        "expanded": base[:1].expand(9, 4),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False)})


def lightning_checkpoint(trainers):
    checkpoint, config = trainers.ModelCheckpoint(), trainers.DictConfig(lr=1e-4, deep={"a": [1]})
    checkpoint.best_model_score, checkpoint.function = torch.tensor(0.5), trainers.TrainerFn.FIT
    config.flags, ema = {"struct": True}, trainers.LitEma([1, 2])
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3)).half()
    return {
        "state_dict": state_dict() | module.state_dict(), "with metadata": module.state_dict(),
        "epoch": 3, "global_step": 2**40, "lightning": "1.4.2", "bytes": b"\x00\xff",
        "callbacks": {trainers.ModelCheckpoint: {"best": np.float64(1.0), "state": checkpoint}},
        "hyper_parameters": config, "args": argparse.Namespace(lr=0.1, sizes=(1, 2)), "ema": ema,
        "lr_schedulers": [{"milestones": collections.Counter([3, 5]), "loss": np.float32(0.5)}],
        "loops": collections.defaultdict(list, a=[1]), "kept": {1, 2}, "frozen": frozenset("ab"),
        "any": [torch.float16, torch.Size([2, 3]), torch.device("cpu"), int, str, range(3),
                slice(1, 2), None],
        "rng": {"numpy": np.arange(3), "python": (3, (1, 2), None), "bytes": bytearray(b"a")},
    }


STAND_INS = ["argparse.Namespace", "ldm.modules.ema.LitEma", "numpy._core.multiarray._reconstruct",
             "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.ndarray",
             "omegaconf.dictconfig.DictConfig",
             "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
             "pytorch_lightning.trainer.states.TrainerFn", "torch.device"]


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_lightning_checkpoint_comes_back_with_stand_ins_for_its_classes(
        tmp_path, trainers, zipped, protocol):
    path, written = tmp_path / "last.ckpt", lightning_checkpoint(trainers)
    torch.save(written, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    trainers.gone()
    contents, stand_ins = read_pickle(path)
    assert "omegaconf" not in sys.modules
    assert stand_ins == STAND_INS
    for part in ("state_dict", "with metadata"):
        assert list(contents[part]) == list(written[part])
        for name, tensor in written[part].items():
            read = contents[part][name]
            assert read.dtype == tensor.dtype
            assert read.stride() == tensor.stride()
            assert torch.equal(read, tensor)
            assert not read.requires_grad
    for name in ("epoch", "global_step", "lightning", "bytes", "loops", "kept", "frozen"):
        assert contents[name] == written[name]
    assert contents["lr_schedulers"][0]["milestones"] == {3: 1, 5: 1}
    assert contents["any"][:2] == [torch.float16, (2, 3)]
    assert contents["any"][3:] == [int, str, range(3), slice(1, 2), None]
    assert contents["args"].state == {"lr": 0.1, "sizes": (1, 2)}
    (callback, values), = contents["callbacks"].items()
    assert callback.__name__ == "ModelCheckpoint"
    assert torch.equal(values["state"].state["best_model_score"], torch.tensor(0.5))
    assert all(isinstance(value, StandIn) for value in
               [values["best"], values["state"], contents["hyper_parameters"], contents["ema"]])


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_share_a_storage_still_do(tmp_path, zipped):
    base = torch.arange(6.0)
    torch.save([base, base[2:4]], tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    (whole, part), _ = read_pickle(tmp_path / "a.pt")
    whole[3] = 100
    assert part.tolist() == [2, 100]


def test_an_archives_tensors_are_mapped_and_not_read(tmp_path, monkeypatch):
    buffers, frombuffer = [], torch.frombuffer
    monkeypatch.setattr(torch, "frombuffer", lambda buffer, **how: buffers.append(buffer)
                        or frombuffer(buffer, **how))
    torch.save([torch.zeros(5), torch.ones(3, dtype=torch.int64)], tmp_path / "a.pt")
    read_pickle(tmp_path / "a.pt")
    assert [type(buffer) for buffer in buffers] == [mmap.mmap, mmap.mmap]


def test_what_is_written_into_a_tensor_stays_out_of_the_file(tmp_path):
    torch.save(torch.zeros(1000), tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    read_pickle(tmp_path / "a.pt")[0].fill_(7)
    assert (tmp_path / "a.pt").read_bytes() == before
    assert read_pickle(tmp_path / "a.pt")[0].sum() == 0


def test_the_other_byte_order_is_turned_round(tmp_path):
    other = {"little": "big", "big": "little"}[sys.byteorder]
    contents = zipfile.ZipFile(io.BytesIO(saved(torch.arange(5.0)))).read("archive/data.pkl")
    swapped = torch.arange(5.0).numpy().byteswap().tobytes()
    for padding in range(4):
        records = {"byteorder": other, "padding": bytes(padding), "data/0": swapped}
        (tmp_path / "a.pt").write_bytes(as_zip(contents, **records))
        assert read_pickle(tmp_path / "a.pt")[0].tolist() == [0, 1, 2, 3, 4]


def test_an_archive_that_was_packed_anew_without_alignment_is_read_as_well(tmp_path):
    base = torch.arange(5.0)
    contents = zipfile.ZipFile(io.BytesIO(saved([base, base[1:]]))).read("archive/data.pkl")
    for padding in range(4):
        records = {"padding": bytes(padding), "data/0": base.numpy().tobytes()}
        (tmp_path / "a.pt").write_bytes(as_zip(contents, **records))
        (whole, part), _ = read_pickle(tmp_path / "a.pt")
        assert whole.data_ptr() % 4 == 0
        whole[2] = 9
        assert part.tolist() == [1, 9, 3, 4]


def saved(contents, **how):
    file = io.BytesIO()
    torch.save(contents, file, **how)
    return file.getvalue()


# -- what is no checkpoint -------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_anywhere_is_one_line(tmp_path, zipped):
    whole = saved({"a": torch.randn(50)}, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "a.pt"
    for cut in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"a\.pt: truncated or no checkpoint") as caught:
            read_pickle(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "it is empty"), (b"<!DOCTYPE html><html>", "it is a web page"),
    (b"version https://git-lfs.github.com/spec/v1", "it is a git-lfs pointer"),
    (b"\x89PNG\r\n\x1a\n", "torch.save did not write it"), (b"import os", "torch.save did not"),
    (b"cafe au lait\nsans sucre\n", "torch.save did not"), (b"\xff\xd8\xff\xe0", "torch.save did"),
    (pickle.dumps({"a": 1}), "torch.save did not write it"), (b"PK\x03\x04", "not a zip file"),
    (as_zip(b"")[:-3] + b"\x00\x00\x00", "EOFError"), (as_zip(b"\x80\x02K\x01"), "EOFError"),
    (as_zip(b"\x80\x02\x1b]2;title\x07."), "KeyError"),
    (as_zip(b"\x80\x04" + by_name("os\x1b[2J\n", "system") + b"."), r"os\\x1b\[2J\\n\.system"),
])
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, data, reason):
    (tmp_path / "a.pt").write_bytes(data)
    words = rf"a\.pt: truncated or no checkpoint \(.*{reason}"
    with pytest.raises(UserError, match=words) as caught:
        read_pickle(tmp_path / "a.pt")
    assert str(caught.value).isprintable()


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.pt: no such checkpoint"):
        read_pickle(tmp_path / "gone.pt")
    with pytest.raises(UserError, match="directory"):
        read_pickle(tmp_path)


def test_archives_that_torch_would_not_write_are_one_line_each(tmp_path):
    data, path = saved({"a": torch.zeros(500)}), tmp_path / "a.pt"
    members = zipfile.ZipFile(io.BytesIO(data))
    contents = members.read("archive/data.pkl")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", contents)
    with pytest.raises(UserError, match=r"data\.pkl is compressed"):
        read_pickle(path)
    path.write_bytes(data)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", contents)
    with pytest.raises(UserError, match=r"without one data\.pkl"):
        read_pickle(path)
    path.write_bytes(as_zip(contents))
    with pytest.raises(UserError, match="no item named 'archive/data/0'"):
        read_pickle(path)
    path.write_bytes(as_zip(contents, **{"data/0": bytes(1999)}))
    with pytest.raises(UserError, match="data/0 is shorter than its 500 numbers"):
        read_pickle(path)


# -- TorchScript -----------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        self.tied = torch.nn.Linear(4, 4)
        self.tied.bias = self.blocks[0].bias
        self.float16 = torch.nn.Parameter(torch.randn(2, 3).half())
        base = torch.randn(6, 4)
        self.register_buffer("transposed", base.t())
        self.register_buffer("view", base[1:3, ::2])
        self.register_buffer("scalar", torch.tensor(77))
        self.sizes, self.rates, self.flags = [1, 2], [0.5], [True]
        self.name, self.pair, self.spare, self.things = "net", (1, 2.5), [torch.ones(1)], {"a": 1}

    def forward(self, x):
        return self.tied(self.blocks(x).mean((2, 3)))


@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_torchscript_archive_gives_the_modules_state_dict(tmp_path, how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # deprecated, and still there
        net = Net().eval()
        net = torch.jit.script(net) if how == "script" else torch.jit.trace(
            net, torch.zeros(1, 3, 8, 8), check_trace=False)
        net.save(tmp_path / "net.pt")
    expected, read = net.state_dict(), read_torchscript(tmp_path / "net.pt")
    assert read.keys() == expected.keys()
    assert len(read) == 13
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].stride() == tensor.stride()
        assert torch.equal(read[name], tensor)
    assert read["tied.bias"].data_ptr() == read["blocks.0.bias"].data_ptr()


def test_a_torchscript_archive_never_reaches_torchs_own_reader(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        pytest.fail("torch's own reader was called")

    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(torch.jit, "load", forbidden)
    (tmp_path / "net.pt").write_bytes(as_zip(pickle.dumps({}), **{"constants.pkl": b""}))
    with pytest.raises(UserError, match=r"net\.pt: a TorchScript archive, which is a program"):
        read_pickle(tmp_path / "net.pt")
    (tmp_path / "net.pt").write_bytes(as_zip(pickle.dumps({}), **{"code/net.py": b""}))
    with pytest.raises(UserError, match="a TorchScript archive"):
        read_pickle(tmp_path / "net.pt")


MODULE = b"\x80\x02c__torch__\nNet\n)\x81"


@pytest.mark.parametrize(("contents", "reason"), [
    (pickle.dumps({"a": 1}), "truncated or no checkpoint"),
    (MODULE + b".", "its root is no module"),
    (MODULE + b"q\x00}X\x01\x00\x00\x00ah\x00sb.", r"a\. is no module"),      # its own child
    (b"\x80\x02cos\nsystem\n.", "asks for os.system, which is code"),
    (b"\x80\x02comegaconf\nX\n.", "asks for omegaconf.X, which is code"),
])
def test_a_torchscript_archive_with_something_else_inside_is_one_line(tmp_path, contents, reason):
    (tmp_path / "net.pt").write_bytes(as_zip(contents, **{"constants.pkl": b""}))
    with pytest.raises(UserError, match=rf"net\.pt: .*{reason}"):
        read_torchscript(tmp_path / "net.pt")


def test_a_plain_checkpoint_is_no_torchscript_archive(tmp_path):
    for zipped in (True, False):
        (tmp_path / "a.pt").write_bytes(saved({}, _use_new_zipfile_serialization=zipped))
        with pytest.raises(UserError, match=r"a\.pt: not a TorchScript archive"):
            read_torchscript(tmp_path / "a.pt")
