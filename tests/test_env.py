"""Question 0: is everything here that the assignment needs? `pytest tests/test_env.py` says what it found."""

import importlib
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
PACKAGES = re.findall(r"^[\w-]+", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)
REMEDY = "pip install -r requirements.txt"


@pytest.fixture
def say(capfd):
    """Print past pytest's capture: the versions are worth reading also when all is well."""

    def say(line):
        with capfd.disabled():
            print(f"\n{line}", end=" ", flush=True)

    return say


def test_python(say):
    found, good = f"python {platform.python_version()}", (3, 10) <= sys.version_info[:2] <= (3, 13)
    say(f"[{'OK' if good else 'FAIL'}] {found}")
    assert good, f"expected Python 3.10 to 3.13, got {found}: create the environment with another python3.x"


@pytest.mark.parametrize("package", PACKAGES)
def test_package(package, say):
    try:
        found = version(package)
        if package != "datasets":  # takes seconds to import
            importlib.import_module("yaml" if package == "pyyaml" else package)
    except (PackageNotFoundError, ImportError) as error:
        say(f"[FAIL] {package}")
        raise AssertionError(f"{package}: expected it installed, got {error!r}; remedy: {REMEDY}") from error
    say(f"[OK] {package} {found}")


def test_torch_is_recent_and_computes(say):
    torch = pytest.importorskip("torch", reason="see test_package[torch]")
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    assert release >= (2, 6), f"torch: expected 2.6 or newer, got {torch.__version__}; remedy: {REMEDY}"
    device = "mps" if torch.backends.mps.is_available() else f"cpu ({torch.get_num_threads()} threads)"
    say(f"[OK] torch finds {torch.cuda.get_device_name() if torch.cuda.is_available() else device}")
    a = torch.arange(6.0).view(2, 3)
    assert torch.equal(a @ a.T, torch.tensor([[5.0, 14.0], [14.0, 50.0]])), "torch: a 2×3 product came out wrong"
