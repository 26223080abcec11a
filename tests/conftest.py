"""Root modules and tests/textbook/'s are imported by name; every test has the same seed."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "textbook")]


@pytest.fixture(autouse=True)
def _same_seed_for_every_test():
    torch.manual_seed(0)
