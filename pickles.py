"""Checkpoints that others wrote, read without running anything of theirs.

A pickle is a program: the file names functions, and Python's reader imports and calls them. Here it
gets a closed world instead. `find_class`, the only door through which a name in the file becomes an
object, knows three answers, by exact name and never by looking anything up in a module:

    file --zip or older torch--> _Reader.find_class --> ALLOWED: tensors, containers, numbers
                                                    --> an inert stand-in, listed by its name
                                                    --> UserError: refused, it asks for os.system

- ALLOWED leads to immutable built-in types and to functions of this file. Nothing in it imports,
  opens, evaluates, or looks up an attribute by a name that the file chooses.
- Classes that training leaves in checkpoints (STAND_INS) become empty classes made on the spot. The
  package is not imported, installed or not; a stand-in takes what it is given and does nothing.
- Any other name ends the reading before a single call is made with it.

So whatever the file calls, it is one of these, and it can change none of them: an object's state is
given to stand-ins only, not to classes, functions or tensors, which torch and numpy would let it
corrupt (a made-up numpy dtype lets bytes pass for pointers). A tensor is a view that as_strided
has checked against the bytes that are there. A storage is never unpickled, torch.load and
torch.jit.load are never called, and TorchScript's code is not read. What is not defended against:
files that ask for more memory or time than there is.

Not here: which of the tensors are the first stage (weight_files.py), our own files (run_folder.py).
"""

import io
import mmap
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict, defaultdict
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from distributed import UserError

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001         # of torch before 1.6


class StandIn:
    """In place of an object whose class is not imported. Accepts everything, does nothing."""

    state = None                             # what the file would have given to __setstate__

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def _nothing(self, *args):
        pass

    __setitem__ = append = extend = add = _nothing       # its class may be a dict, list or set


def _tensor(flat, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    """A view of a storage, which is a 1-D tensor. Hooks and gradients stay behind."""
    if metadata:
        raise ValueError("a tensor that is marked as conjugate or negative")
    return flat.as_strided(size, stride, offset)         # raises if any of it lies outside


def _value(value, *decoration):
    """For helpers that return what they are given as something more: a Parameter, a typed list."""
    return value


def _encode(text, encoding):
    """How bytes are spelled in the older protocols; no codec of the file's choice is looked up."""
    if encoding != "latin1":
        raise ValueError("bytes that are not spelled in latin1")
    return text.encode("latin1")


_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}
_BUILTINS = (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, range, set, slice,
             str, tuple)

ALLOWED = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _value,
    ("torch._utils", "_rebuild_parameter_with_state"): _value,
    ("torch", "Size"): torch.Size,
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("collections", "Counter"): dict,        # Counter itself is Python code
    ("_codecs", "encode"): _encode,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _STORAGES.values()},
    **{(module, kind.__name__): kind
       for module in ("builtins", "__builtin__") for kind in _BUILTINS},
    ("__builtin__", "long"): int,            # names of Python 2, which the older protocols use
    ("__builtin__", "unicode"): str,
    ("__builtin__", "xrange"): range,
}

STAND_INS = {"pytorch_lightning", "lightning", "omegaconf", "argparse", "ldm", "taming"}  # packages
_SINGLE_STAND_INS = {
    ("typing", "Any"), ("torch", "device"), ("numpy", "dtype"), ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", name)
      for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
}

_TORCHSCRIPT_ALLOWED = ALLOWED | {
    ("torch.jit._pickle", name): _value
    for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist",
                 "restore_type_tag")
}


class _Reader(pickle._Unpickler):            # the one in Python: the one in C has no say over BUILD
    """Reads one pickle; `storage(dtype, key, numel)` gives the 1-D tensors that it points to."""

    def __init__(self, path, file, storage=None, allowed=ALLOWED, packages=STAND_INS):
        super().__init__(SimpleNamespace(read=file.read, readline=self._line), encoding="utf-8")
        self.file = file
        self.path, self.storage, self.allowed, self.packages = path, storage, allowed, packages
        self.stand_ins = {}                  # dotted name -> class

    def _line(self):
        line = self.file.readline()
        if not line.endswith(b"\n"):         # pickle would take what is there for the whole name
            raise EOFError("ends within a name")
        return line

    def find_class(self, module, name):
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        dotted = f"{module}.{name}"
        if not all(part.isidentifier() for part in dotted.split(".")):
            raise ValueError(f"no name of anything: {dotted}")
        # In a pickle a name may be a path to something else, torch's `_utils.os.system`; not here.
        of_a_package = module.split(".")[0] in self.packages and "." not in name
        if of_a_package or (module, name) in _SINGLE_STAND_INS:
            return self.stand_ins.setdefault(dotted, type(name, (StandIn,), {}))
        raise self._refusal(dotted)

    def get_extension(self, code):
        raise self._refusal(f"extension {code} of the copyreg registry")

    def _refusal(self, what):
        return UserError(f"{self.path}: refused: it asks for {_one_line(what)}, which is code, "
                         "not weights")

    def persistent_load(self, pid):
        match pid:
            case "storage", torch.dtype() as dtype, str(key), _device, int(numel), *view:
                if not any(view):            # of a part of a storage: the oldest files have one
                    return self.storage(dtype, key, numel)
        raise ValueError(f"no storage of a known kind: {pid}")

    def load_build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, StandIn):
            target.state = state
        elif not isinstance(target, OrderedDict):        # its state is module versions: not needed
            raise ValueError(f"state for an object of type {type(target).__name__}")

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}


class _Archive:
    """The records of a zip file that torch wrote: mapped into memory, read when they are touched.

    The mapping is private. What anyone writes into a tensor stays in memory, not in the file.
    """

    def __init__(self, file):
        self.zip = zipfile.ZipFile(file)
        names = self.zip.namelist()
        roots = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("a zip archive without one data.pkl")
        self.root = roots[0].removesuffix("data.pkl")
        marks = (f"{self.root}constants.pkl", f"{self.root}code/")
        self.is_torchscript = any(name.startswith(marks) for name in names)
        self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.swapped = (f"{self.root}byteorder" in names
                        and self.record("byteorder").decode() != sys.byteorder)
        self.storages = {}

    def _span(self, name):
        """(start, end) of a record's bytes in the file."""
        info = self.zip.getinfo(self.root + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        # Of the local header, only its length counts; the central directory has the rest.
        lengths = struct.unpack_from("<HH", self.bytes, info.header_offset + 26)
        start = info.header_offset + 30 + sum(lengths)
        return start, start + info.file_size

    def record(self, name):
        start, end = self._span(name)
        return self.bytes[start:end]

    def storage(self, dtype, key, numel):
        if (dtype, key) not in self.storages:
            self.storages[dtype, key] = self._map(dtype, f"data/{key}", numel)
        return self.storages[dtype, key]

    def _map(self, dtype, name, numel):
        start, end = self._span(name)
        if numel < 0 or numel * dtype.itemsize > end - start:
            raise EOFError(f"{name} is shorter than its {numel} numbers")
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        if self.swapped or start % dtype.itemsize:       # torch itself aligns its records
            flat = torch.frombuffer(bytearray(self.bytes[start:end]), dtype=dtype, count=numel)
            if self.swapped:
                flat.untyped_storage().byteswap(dtype)
            return flat
        return torch.frombuffer(self.bytes, dtype=dtype, count=numel, offset=start)


def _read_legacy(path, file):
    """torch before 1.6: three pickles of preliminaries, the contents, the keys, the storages."""
    size = os.fstat(file.fileno()).st_size
    storages = {}

    def storage(dtype, key, numel):          # empty as yet: the numbers come after the contents
        if not 0 <= numel * dtype.itemsize <= size:
            raise EOFError(f"shorter than the {numel} numbers of storage {key}")
        if key not in storages:
            storages[key] = torch.empty(numel, dtype=dtype)
        return storages[key]

    _check_preliminaries(path, file)
    reader = _Reader(path, file, storage)
    contents = reader.load()
    keys = _Reader(path, file).load()
    if set(keys) != set(storages):
        raise EOFError("the storages are not all there")
    for key in keys:
        flat = storages[key]
        (numel,) = struct.unpack("<q", file.read(8))
        numbers = flat.view(torch.uint8).numpy()
        if numel != flat.numel() or file.readinto(numbers) != numbers.nbytes:
            raise EOFError(f"the numbers of storage {key} are not all there")
    return contents, sorted(reader.stand_ins)


def _check_preliminaries(path, file):
    try:
        magic, protocol, system = [_Reader(path, file).load() for _ in range(3)]
    except UserError:
        raise                                # another pickle, and it asks for code
    except Exception:
        magic = None                         # a photo, a text, anything
    if magic != LEGACY_MAGIC:
        raise ValueError("torch.save did not write it")
    if protocol != LEGACY_PROTOCOL or not system["little_endian"]:
        raise ValueError("of another version, or from a big-endian machine")


def read_pickle(path):
    """(contents, stand_ins) of a checkpoint that torch.save wrote, whatever its name ends in.

    contents: as it was saved, tensors on the CPU; a Parameter is its tensor, and what is no tensor,
    container, number or text is a StandIn. Tensors of a zip are mapped: clone what outlives the
    file. stand_ins: the sorted dotted names of the classes that were not imported.
    Raises UserError, one line: a file that is missing, truncated or no checkpoint; that asks for
    code (named); or that is a TorchScript archive, which is for read_torchscript.
    """
    path = Path(path)
    with _errors_in_one_line(path), path.open("rb") as file:
        if not _is_zip(path, file):
            return _read_legacy(path, file)
        archive = _Archive(file)
        if archive.is_torchscript:
            raise UserError(f"{path}: a TorchScript archive, which is a program with its weights; "
                            "give a checkpoint that holds a state dict")
        reader = _Reader(path, io.BytesIO(archive.record("data.pkl")), archive.storage)
        return reader.load(), sorted(reader.stand_ins)


def read_torchscript(path):
    """{dotted name: tensor} of the parameters and buffers in a TorchScript archive.

    Names and values are those of the module's state_dict(), together with tensors that are plain
    attributes of a module. Its code is not read. Tensors are mapped, as in read_pickle.
    Raises UserError as read_pickle does, and for a checkpoint that is no TorchScript archive.
    """
    path = Path(path)
    with _errors_in_one_line(path), path.open("rb") as file:
        archive = _Archive(file) if _is_zip(path, file) else None
        if archive is None or not archive.is_torchscript:
            raise UserError(f"{path}: not a TorchScript archive")
        reader = _Reader(path, io.BytesIO(archive.record("data.pkl")), archive.storage,
                         _TORCHSCRIPT_ALLOWED, {"__torch__"})
        return dict(_tensors_below(reader.load(), "", ()))


def _tensors_below(module, prefix, above):
    if module in above or not isinstance(module.state, dict):
        raise ValueError(f"{prefix or 'its root'} is no module")
    for name, value in module.state.items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, StandIn):
            yield from _tensors_below(value, f"{prefix}{name}.", (*above, module))


def check_download(path, file):
    """UserError for what a download may leave in a checkpoint's place; else the first 64 bytes."""
    head = file.read(64)
    file.seek(0)
    mistake = None
    if not head:
        mistake = "it is empty"
    elif head.lstrip().startswith(b"<"):
        mistake = "it is a web page; download the file that the page offers"
    elif head.startswith(b"version https://git-lfs"):
        mistake = "it is a git-lfs pointer; fetch the file with git lfs pull"
    if mistake:
        raise UserError(f"{path}: truncated or no checkpoint ({mistake})")
    return head


def _is_zip(path, file):
    return check_download(path, file).startswith(b"PK")


@contextmanager
def _errors_in_one_line(path):
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:               # a damaged pickle can raise anything at all
        reason = _one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{path}: truncated or no checkpoint ({reason})") from None


def _one_line(text):
    """Text that the file chose, for a terminal: no line breaks, no control characters, short."""
    return text[:200].encode("unicode_escape").decode()
