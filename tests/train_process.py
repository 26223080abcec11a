"""train.py in processes of its own, so that tests can kill them; and what they leave behind.

Importing torch takes seconds, so one server process does it and forks the others. They run the
program itself, on a smaller first stage and with fewer images in the report.
"""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import traceback
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
from ports import free_port

os.environ["OMP_NUM_THREADS"] = "1"            # for the server; it is started by the first process
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["train", "pytest"])

SMALL = {"ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_levels": (), "z_channels": 4,
         "embed_dim": 4, "K": 16, "norm_groups": 4}
SMALL_UNET = {"width": 8, "mults": (1, 2), "num_blocks": 1, "top_skip": True, "attn_levels": (1,),
              "head_width": 4, "time_width": 8, "norm_groups": 4}
ARGS = ["--size", "32", "--batch-size", "4", "--steps", "6", "--save-every", "2", "--workers", "0",
        "--disc-start", "3", "--device", "cpu", "--refit-samples", "40", "--codes", "12",
        "--timesteps", "4"]
KILLED = -signal.SIGKILL
NUMBERS = itertools.count()


class Started:
    """`train.py ARGS... more --out out` in a process of its own."""

    def __init__(self, out, *more, env=None, prepare=None, args=ARGS):
        self.text = Path(f"{out}.{next(NUMBERS)}.out")
        self.text.touch()
        argv = ["train.py", *args, *more, "--out", str(out)]
        self.process = FORK.Process(target=_train, args=(argv, str(self.text), env or {}, prepare))
        self.process.start()

    def end(self, timeout=300):
        """(exit status, everything printed)."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.text.read_text()}")
        return self.process.exitcode, self.text.read_text()


def train(out, *more, **options):
    """Run to the end: (exit status, everything printed)."""
    return Started(out, *more, **options).end()


def call(function, *args, ranks=None, port=None):
    """function(*args) in processes of their own, one for each of `ranks` (a count), or one."""
    port = port or free_port()
    processes = [FORK.Process(target=_call, args=(function, args, rank_env(rank, ranks, port)))
                 for rank in range(ranks or 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def rank_env(rank, world, port):
    """What torchrun tells process `rank`; nothing where `world` is None."""
    if world is None:
        return {}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _call(function, args, env):
    os.environ.update(env)
    torch.set_num_threads(1)
    function(*args)


def _train(argv, text, env, prepare):
    os.environ.update(env)
    descriptor = os.open(text, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)     # a background job ignores it
    sys.argv = argv
    program = shrink()
    if prepare:
        prepare()
    try:
        program.exit_on_user_error(program.main)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def shrink():
    """train, on a first stage of a few thousand weights, with few held-out images, no curves."""
    import data
    import diffusion
    import train as program
    import train_autoencoder
    import train_prior
    import unet
    import vqgan
    vqgan.VQGAN_PRESETS["tiny"] = vqgan.VQGANConfig(**SMALL)
    unet.UNET_PRESETS["tiny"] = unet.UNetConfig(**SMALL_UNET)
    train_autoencoder.VALIDATION_IMAGES = train_prior.VALIDATION_MAPS = 8
    diffusion.HISTORY = 1                          # the draws are by importance from step 3 or so
    data.SIGNS_LENGTH["val"] = 100                 # whose codes refit counts
    program.curves = lambda *_: None               # two thirds of the time of so short a run
    program.evaluate = partial(program.evaluate, n=4)
    return program


def note_curves():
    """For `prepare`: curves.png gets a letter each time that it would be drawn."""
    import train as program

    def note(log, png):
        assert log.exists()
        with open(png, "a") as file:
            file.write("c")

    program.curves = note


def die_inside(call, count):
    """SIGKILL this process in the count-th torch.save (half written) or os.replace."""
    module = {"save": torch, "replace": os}[call]
    original, left = getattr(module, call), [count]

    def deadly(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            if call == "save":
                buffer = BytesIO()
                original(args[0], buffer)
                args[1].write(buffer.getvalue()[:len(buffer.getvalue()) // 2])
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, call, deadly)


def assert_same_run(a, b, stage):
    """Bit-identical checkpoints, and the same log with each step once."""
    one, two = (torch.load(run / stage / "last.pt", weights_only=True) for run in (a, b))
    assert_same(one, two, "last.pt")
    assert (a / stage / "log.jsonl").read_text() == (b / stage / "log.jsonl").read_text()
    steps = [line["step"] for line in log_lines(a / stage)]
    assert steps == list(range(len(steps)))


def assert_same(one, two, where):
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for i, pair in enumerate(zip(one, two)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert one == two, where


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
