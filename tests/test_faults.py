"""benchmarks/faults.py in its short form: damaged photos, and a few disturbances of one run."""

import random
import sys
from collections import Counter

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import faults


def test_damaged_photos_are_read_or_refused_in_one_line_and_training_goes_on(tmp_path):
    seen = Counter()
    faults.bad_images(random.Random(1), tmp_path, seen, count=12)
    assert seen.pop("training on damaged and whole images: went on by the whole ones") == 1
    assert seen["damaged image: refused in one line"] > 3
    assert seen.total() == 12


def test_a_disturbed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
    rng, seen = random.Random(1), Counter()
    faults.finish(tmp_path / "undisturbed-1")
    faults.disturbed_run(rng, tmp_path, seen, longest=2, world=1)
    assert seen.pop("runs disturbed four times: the bits of undisturbed ones") == 1
    assert seen.total() >= 1


def test_what_is_no_line_of_a_users_mistake_is_a_fault():
    with pytest.raises(faults.Fault, match="status 0, not one line"):
        faults.check_error(Ended(0, "all is well"), "all")
    with pytest.raises(faults.Fault, match="Traceback"):
        faults.check_error(Ended(2, "Traceback: error: lost"), "lost")
    faults.check_error(Ended(2, "error: lost"), "lost")


@pytest.mark.slow
def test_torchrun_restarts_a_run_of_which_a_process_was_killed_and_it_goes_on(tmp_path):
    seen = Counter()
    faults.finish(tmp_path / "undisturbed-2", 2)
    faults.restart(random.Random(1), tmp_path, seen)
    assert seen.total() == 1


class Ended:
    def __init__(self, *result):
        self.end = lambda: result
