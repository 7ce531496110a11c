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
    """Let signals reach the tests also if a shell (in the background, with nohup) started them ignoring these."""
    usual = {signal.SIGINT: signal.default_int_handler, getattr(signal, "SIGHUP", signal.SIGTERM): signal.SIG_DFL}
    former = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture
def quick(monkeypatch):
    """Save no pictures: drawing takes longer than a tiny run."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, file, **_: None)
