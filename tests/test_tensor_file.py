"""The .safetensors format, read and written without its package."""

import json

import pytest
import torch

from distributed import UserError
from tensor_file import TYPES, read_safetensors, write_safetensors


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
