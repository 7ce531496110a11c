"""Shared setup of the package's tests."""

import os
import signal
import sys
from pathlib import Path

import matplotlib.figure
import pytest
import torch

# The runs here are too small for several threads. The processes that tests start need the same number.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The scripts of these folders import each other as modules, and so do their tests.
for folder in ("report", "instructor"):
    sys.path.append(str(Path(__file__).resolve().parents[2] / folder))


@pytest.fixture(autouse=True)
def interruptible():
    """Let Ctrl-C reach the tests also if a shell started them in the background, ignoring it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture
def quick(monkeypatch):
    """Save no pictures: drawing takes longer than a tiny run."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, file, **_: None)
