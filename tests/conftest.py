"""Root modules are imported by name; every test starts from the same seed."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def _same_seed_for_every_test():
    torch.manual_seed(0)
