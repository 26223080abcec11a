"""The .safetensors format: eight bytes of length, as many of JSON, then the numbers of all tensors.

    {name: tensor} --write_safetensors--> file --read_safetensors--> {name: tensor}, mapped

Nothing in such a file can run. What published weights and exports need of the format is so little
that no package is asked for. Not here: pickled weights (pickles.py), what names mean (layouts.py).
"""

import json
import os

import torch

from distributed import UserError
from pickles import check_download

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
         "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of the file `path` (a Path), on the CPU; only what is looked at is read.

    Raises UserError for a file that is missing, truncated or no such file.
    """
    try:
        with path.open("rb") as file:
            check_download(path, file)
        # Mapped privately: whoever writes to a tensor does not write to the file.
        data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        start = 8 + int.from_bytes(data[:8].tolist(), "little")
        entries = json.loads(data[8:start].numpy().tobytes())
        entries.pop("__metadata__", None)
        return {name: _tensor(data[start:], **entry) for name, entry in entries.items()}
    except UserError:
        raise
    except Exception as error:                   # a damaged header can ask for anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path}: truncated or no checkpoint ({reason})") from None


def _tensor(data, dtype, shape, data_offsets):
    """One tensor out of the numbers of all of them, data (n,) uint8."""
    first, last = data_offsets
    numbers = data[first:last]
    if first < 0 or len(numbers) < last - first:
        raise ValueError(f"{last - first} bytes are asked for, {len(numbers)} are there")
    width = torch.empty(0, dtype=TYPES[dtype]).element_size()
    if numbers.data_ptr() % width:               # a view must begin where such a number may
        numbers = numbers.clone()
    return numbers.view(TYPES[dtype]).view(shape)


def write_safetensors(path, weights):
    """Write {name: tensor} in float32 to `path` (a Path), whole or not at all. Raises OSError."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, value in weights.items():
        start, end = end, end + 4 * value.numel()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                     # the tensors lie aligned
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in weights.values():
            file.write(value.detach().cpu().float().contiguous().numpy().astype("<f4", copy=False))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
