"""Count what a training step asks of a GPU, without one: fake tensors have shapes but no values.

    python benchmarks/fake_cuda.py

An operation is one kernel or a few. Its bytes are those of its operands and results on the GPU. A
wait is a copy that blocks, or a number that the host reads. PyTorch's backward pass needs a device
that is there, so it is left out, with the operations that it would add, and gradients are zeros.
"""

import ctypes
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import gpu
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
import train_prior
from vqgan import VQGAN_PRESETS

DEVICE = torch.device("cuda", 0)
CUDA, META = 1, 14                       # of c10::DeviceType
FREE = ("empty", "new_empty", "_unsafe_view", "prim::")          # no kernel runs
READS = ("_local_scalar_dense", "nonzero", "masked_select")      # the host waits for their results


class Counts(TorchDispatchMode):
    """Count operations on the GPU, their bytes, and waits. What is read is 0.5, 1 or True."""

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self):
        self.operations = self.bytes = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        result = value(args[0]) if name == "_local_scalar_dense" else func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, result)) if torch.is_tensor(t)]
        there = [t for t in tensors if t.device.type == "cuda"]
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if there and not views and not name.startswith(FREE):
            copied = len(there) < len(tensors) and name in ("_to_copy", "copy_")
            self.operations += name not in READS[:1]
            self.bytes += sum(t.numel() * t.element_size() for t in there)
            self.waits += name in READS or (copied and not kwargs.get("non_blocking"))
        return result


def value(tensor):
    return 0.5 if tensor.is_floating_point() else tensor.dtype == torch.bool or 1


@contextmanager
def fake_cuda():
    """Let tensors on DEVICE be made in the block, without memory; yield the Counts."""
    # PyTorch's CPU build has no guard for CUDA devices. Lend it meta's, which does nothing, but
    # takes a device without an index for "meta".
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE")
    kept, guards[CUDA] = guards[CUDA], guards[CUDA] or guards[META]
    counts = Counts()

    def apply(module, change, recurse=True):      # a module's own cannot move fake tensors
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = nn.Parameter(change(p.detach()), p.requires_grad)
            for name, buffer in part._buffers.items():
                part._buffers[name] = change(buffer)
        return module

    def backward(loss):
        if loss.device != DEVICE:
            raise RuntimeError(f"a loss is on {loss.device}")

    def tolist(tensor):
        counts.waits += tensor.device.type == "cuda"
        values = value(tensor)
        for length in reversed(tensor.shape):
            values = [values] * length
        return values

    try:
        with (mock.patch.object(nn.Module, "_apply", apply),
              mock.patch.object(torch.Tensor, "backward", backward),
              mock.patch.object(torch.autograd, "grad", lambda _, x, **options: [
                  torch.zeros_like(one) for one in (x if isinstance(x, (list, tuple)) else [x])]),
              mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available",
                                return_value=False),
              mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
              mock.patch.object(FakeTensor, "tolist", tolist),
              FakeTensorMode(allow_non_fake_inputs=True), counts):
            yield counts
    finally:
        guards[CUDA] = kept


def build(name, config, **options):
    """Build a stage of random weights on DEVICE, as gpu.stage_of does, with gradients of zero."""
    gpu.CUDA, gpu.FOLDER = True, None
    stage = gpu.stage_of(name, config, DEVICE, **options)
    for optimizer in stage.optimizers.values():
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.device != DEVICE:
                raise RuntimeError(f"{name} trains parameters on {p.device}")
            p.grad = torch.zeros_like(p)
        optimizer.step()                          # so that its averages are there
    return stage


def training_step(stage, B, size):
    """Take one step on B images of `size` px, or maps, by train.py's own functions."""
    terms = train.gradients(stage, gpu.drawn(stage, B, size), True, B)
    train.agree(terms, False)
    stage.update(True)


def validation(stage, B, size):
    """Validate on B held-out images or maps."""
    batch = gpu.batch_of(stage, B, size)
    stage.validate([(batch, None) if stage.name == "prior" else batch])


def sampling(stage, B, size):
    """Draw the pictures of samples/; of a prior by one reverse step."""
    batch = gpu.batch_of(stage, B, size)
    x = torch.zeros(B, 3, size, size, device=DEVICE)
    with mock.patch.object(train_prior, "PICTURE_STEPS", 1):
        stage.pictures([(batch, x) if stage.name == "prior" else batch], B)


def main():
    print(f"torch {torch.__version__}\n\n| forward pass, losses, update | operations | "
          "MiB for an image or map | waits |\n|---|--:|--:|--:|")

    def row(title, work, name, plan, B, **options):
        with fake_cuda() as counts:
            stage = build(name, VQGAN_PRESETS[plan], **options)
            counts.clear()
            work(stage, B, 256)
            print(f"| {title} | {counts.operations:,} | {counts.bytes / B / 2**20:,.0f} | "
                  f"{counts.waits} |", flush=True)

    for precision in ("fp32", "bf16"):
        for layout in ("NHWC", "NCHW"):
            row(f"base decoder on kl-f8, 16 images, {precision}, {layout}", training_step,
                "decoder", "kl-f8", 16, precision=precision, channels_last=layout == "NHWC",
                perceptual="vgg")
    row("first stage vq-f16, 16 images, bf16, NCHW", training_step, "vqgan", "vq-f16", 16,
        precision="bf16", channels_last=False, perceptual="vgg")
    for precision in ("fp32", "bf16"):
        row(f"prior paper117, 180 maps, {precision}", training_step, "prior", "vq-f16", 180,
            precision=precision, channels_last=False)
    row("prior paper117, validation of 8 maps", validation, "prior", "vq-f16", 8,
        channels_last=False)
    row("prior paper117, a reverse step of 16 maps", sampling, "prior", "vq-f16", 16,
        channels_last=False)


if __name__ == "__main__":
    main()
