"""Disturb trainings at random moments, and damage what they read; count what happened.

    python benchmarks/faults.py --minutes 10 [--seed 0]

The networks are those of the tests, a few thousand weights, so all stages take seconds. A disturbed
run is continued to its end, and must then have the bits of an undisturbed one. A user's mistake
must be told in one line. What differs is a fault: it is listed, and the exit status is 1.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from ports import free_port
from train_process import ARGS, KILLED, Started, assert_same_run, rank_env

import data
import run_folder
from distributed import UserError

STAGES = ["vqgan", "refit", "decoder", "prior"]
LIMIT = 30                     # seconds in which a disturbed run has to end
PHOTOS = [*ARGS, "--data", "folder", "--first-stage", "tiny", "--perceptual", "none", "--stage",
          "vqgan"]


class Fault(Exception):
    """Tell of what must not happen."""


def check(holds, what, text=""):
    if not holds:
        raise Fault(f"{what} {text.strip()[-500:]}")


def check_error(one, *words):
    """Check that a run ends in one line, of a user's mistake, that has one of the words."""
    status, text = one.end()
    check(status == 2 and text.count("error: ") == 1 and "Traceback" not in text
          and any(word in text for word in words), f"status {status}, not one line:", text)


def runs(out, world=1, *more, **options):
    """Start all processes of a run."""
    port = free_port()
    envs = [rank_env(r, world, port) for r in range(world)] if world > 1 else [{}]
    return [Started(out, *more, env=env, **options) for env in envs]


def finish(out, world=1, reference=None):
    """Continue a run to its end, and compare it with the undisturbed one."""
    results = [one.end(900) for one in runs(out, world)]
    check(not any(status for status, _ in results), "does not continue:", results[0][1])
    for stage in STAGES if reference else ():
        assert_same_run(reference, out, stage)


# -- kills and signals -----------------------------------------------------------------------------

def disturb(rng, out, world, number, longest):
    """Send a signal at a random moment; return the stage that it hit, or None if it came late."""
    processes = runs(out, world)
    while processes[0].process.is_alive() and "writing to" not in processes[0].text.read_text():
        time.sleep(0.01)
    time.sleep(rng.uniform(0, longest))
    hit = next((stage for stage in reversed(STAGES) if (out / stage).exists()), "the start")
    victim = rng.randrange(world)
    for one in [processes[victim]] if number == signal.SIGKILL else processes:
        if one.process.is_alive():
            os.kill(one.process.pid, number)
    start = time.monotonic()
    statuses, texts = zip(*(one.end() for one in processes))
    what = f"{number.name} in {hit}, {world} processes, status {statuses}:"
    check(time.monotonic() - start < LIMIT, f"{what} slow", texts[0])
    check("Traceback" not in "".join(texts), what, "".join(texts))
    if number == signal.SIGKILL:
        check(all(status in (0, 1, KILLED) for status in statuses), what, texts[0])
        told = [f"rank {victim} of {world} has died" in text for text in texts]
        check(world == 1 or 0 in statuses or any(told), f"{what} nobody names the dead", texts[0])
    else:                      # outside training there is nothing to save, and no handler
        check(all(status in (0, 128 + number, -number) for status in statuses), what, texts[0])
    return hit if any(statuses) else None


def disturbed_run(rng, folder, seen, longest, world=None):
    """Kill, terminate and hang up a run of one or two processes four times, then finish it."""
    world, out = world or rng.choice((1, 2)), folder / f"disturbed-{rng.randrange(10**9)}"
    reference = folder / f"undisturbed-{world}"
    out.mkdir()
    done = STAGES[:rng.randrange(4)]             # begin with any stage, so that all are hit alike
    for stage in done:
        shutil.copytree(reference / stage, out / stage)
    for name in ("config.json", "command.txt") if done else ():
        shutil.copy(reference / name, out / name)
    for _ in range(4):
        number = rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGHUP])
        if hit := disturb(rng, out, world, number, longest):
            seen[f"{number.name} in {hit}, {world} process{'es' * (world > 1)}"] += 1
    finish(out, world, reference)
    shutil.rmtree(out)
    seen["runs disturbed four times: the bits of undisturbed ones"] += 1


def restart(rng, folder, seen):
    """Kill one of two processes under `torchrun --max-restarts 2`."""
    program, pids, out = folder / "program", folder / "pids", folder / "restarted"
    program.write_text(f"""
import os, sys
sys.path[:0] = {sys.path[:2]!r}
with open({str(pids)!r}, "a") as file:
    print(os.environ["RANK"], os.getpid(), file=file)
from train_process import shrink
program = shrink()
program.exit_on_user_error(program.main)
""")
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=2",
         f"--master-port={free_port()}", program, *ARGS, "--stage", "vqgan", "--out", out],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = out / "vqgan" / "log.jsonl"
    while torchrun.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.01)
    os.kill(int(dict(map(str.split, pids.read_text().splitlines()))[rng.choice("01")]),
            signal.SIGKILL)
    try:
        text = torchrun.communicate(timeout=300)[0]
    finally:
        torchrun.terminate()
    check(torchrun.returncode == 0 and "from step" in text, "no restart:", text)
    assert_same_run(folder / "undisturbed-2", out, "vqgan")
    seen["torchrun --max-restarts 2, one of two killed: went on by itself, same bits"] += 1


# -- disks -----------------------------------------------------------------------------------------

def mounted(*args):
    return not subprocess.run(["mount", *args], capture_output=True).returncode


def limit_files(size):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def disks(rng, folder, seen):
    """Train on a disk that is too small, then make room; go on where nothing can be written."""
    for number in range(4):
        disk, size = folder / f"disk-{number}", int(2 ** rng.uniform(16, 21))
        disk.mkdir()
        small = mounted("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk))
        (one,) = runs(disk, prepare=None if small else partial(limit_files, size // 8))
        check_error(one, "make room", "choose another")
        if small:
            mounted("-o", "remount,size=1g", str(disk))
        finish(disk, 1, folder / "undisturbed-1")
        seen[f"disk full ({'tmpfs' if small else 'RLIMIT_FSIZE'}): one line; with room it went on, "
             "same bits"] += 1
        if small and mounted("-o", "remount,ro", str(disk)):
            check_error(*runs(disk), "--out")
            seen["read-only output: one line"] += 1
        subprocess.run(["umount", str(disk)], capture_output=True)


# -- what is read ----------------------------------------------------------------------------------

def write_photos(folder, count, rng):
    folder.mkdir()
    for i in range(count):
        image = np.frombuffer(rng.randbytes(4800), np.uint8).reshape(40, 40, 3)
        Image.fromarray(image).save(folder / f"{i:03}{rng.choice(['.png', '.jpg', '.bmp'])}")
    return folder


def vanishing(rng, folder, seen):
    """Remove photos while a run reads them: half of them, or all."""
    for share, workers in ((0.5, "0"), (0.5, "1"), (1, "0"), (1, "1")):
        photos = write_photos(folder / f"photos-{share}-{workers}", 40, rng)
        out = folder / f"vanishing-{share}-{workers}"
        (one,) = runs(out, 1, "--root", str(photos), "--workers", workers, "--steps", "60",
                      args=PHOTOS)
        while one.process.is_alive() and not (out / "vqgan" / "last.pt").exists():
            time.sleep(0.01)
        for path in rng.sample(sorted(photos.iterdir()), int(share * 40)):
            path.unlink()
        if share == 1:
            check_error(one, "in a row cannot be used")
            check("saved at step" in one.text.read_text(), "not saved:", one.text.read_text())
            seen["all photos vanish: one line, saved"] += 1
        else:
            status, text = one.end()
            check(status == 0 and "Traceback" not in text, f"status {status}:", text)
            seen["half of the photos vanish: went on by the others, with warnings"] += 1


def damage(content, rng):
    """Damage a file's bytes in a random way."""
    at = rng.randrange(len(content))
    return rng.choice([b"", b"<html>404</html>", content[:at], content[at:],
                       rng.randbytes(len(content)), content[:at] + bytes(200) + content[at + 200:],
                       content[:at] + rng.randbytes(9) + content[at + 9:],
                       content[:at] + rng.randbytes(50) + content[at:]])


def refused(read, path):
    """Return what is read, or None where it is refused in one line that names the file."""
    try:
        return read(path)
    except UserError as error:
        check(str(path) in str(error) and "\n" not in str(error), "not one line:", str(error))


def bad_images(rng, folder, seen, count=40):
    """Read damaged photos; train on them and as many whole ones."""
    photos = write_photos(folder / "bad-photos", 2 * count, rng)
    for path in sorted(photos.iterdir())[:count]:
        path.write_bytes(damage(path.read_bytes(), rng))
        what = "read all the same" if refused(data.load_image, path) else "refused in one line"
        seen[f"damaged image: {what}"] += 1
    status, text = runs(folder / "bad", 1, "--root", str(photos), args=PHOTOS)[0].end()
    check(status == 0 and "Traceback" not in text, f"status {status}:", text)
    seen["training on damaged and whole images: went on by the whole ones"] += 1


def bad_checkpoints(rng, folder, seen, count=30):
    """Read damaged checkpoints: none may give another state. Then continue a run on some."""
    last = folder / "undisturbed-1" / "decoder" / "last.pt"
    whole, path = run_folder.load(last), last.with_name("damaged.pt")
    for _ in range(count):
        path.write_bytes(damage(last.read_bytes(), rng))
        state = refused(run_folder.load, path)
        check(state is None or all(torch.equal(value, state["model"][name])
                                   for name, value in whole["model"].items()), "another state")
        seen[f"damaged checkpoint: {'whole, and read' if state else 'refused in one line'}"] += 1
    path.unlink()
    for stage in STAGES:
        out = folder / f"damaged-{stage}"
        shutil.copytree(folder / "undisturbed-1", out)
        (out / stage / "last.pt").write_bytes(b"nothing")
        finish(out, 1, folder / "undisturbed-1")
        seen["last.pt damaged: went on from previous.pt, same bits"] += 1
        for name in ("last.pt", "previous.pt"):
            (out / stage / name).write_bytes(b"nothing")
        check_error(*runs(out), "restore one of them", "truncated or no checkpoint")
        seen["last.pt and previous.pt damaged: one line"] += 1


def main(argv=None, kinds=(restart, disks, vanishing, bad_images, bad_checkpoints)):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng, seen, faults, start = random.Random(args.seed), Counter(), [], time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for world in (1, 2):
            begun = time.monotonic()
            finish(folder / f"undisturbed-{world}", world)
        longest, kinds = (time.monotonic() - begun) / 3, [*kinds]
        while kinds or time.monotonic() - start < 60 * args.minutes:
            kind = kinds.pop(0) if kinds else partial(disturbed_run, longest=longest)
            try:
                kind(rng, folder, seen)
            except (Fault, AssertionError, subprocess.TimeoutExpired) as fault:
                faults.append(f"{kind}: {fault}")
    print(f"seed {args.seed}, {(time.monotonic() - start) / 60:.0f} minutes\n\n"
          "| what was tried, and what happened | times |\n|---|--:|")
    print(*(f"| {what} | {times} |" for what, times in sorted(seen.items())), sep="\n")
    print(f"| faults | {len(faults)} |", *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    # Mount small disks in a name space of this process's own, where that is allowed.
    if "FAULTS" not in os.environ and not subprocess.run(["unshare", "-m", "true"]).returncode:
        os.environ["FAULTS"] = "has its own mounts"
        os.execvp("unshare", ["unshare", "-m", sys.executable, *sys.argv])
    sys.exit(main())
