"""Question 0: is everything here that the assignment needs? `pytest tests/test_env.py` says what it found."""

import importlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

REMEDY = "pip install -r requirements.txt"

# Name in pip -> name in Python. `datasets` takes seconds to import: it is only looked up.
PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "pyyaml": "yaml",
    "wandb": "wandb",
    "tqdm": "tqdm",
    "tiktoken": "tiktoken",
    "matplotlib": "matplotlib",
    "datasets": None,
}


@pytest.fixture
def say(capfd):
    """Print past pytest's capture: the versions are worth reading also when all is well."""

    def say(line):
        with capfd.disabled():
            print(f"\n{line}", end=" ", flush=True)

    return say


def test_python(say):
    found = f"python {platform.python_version()}"
    good = (3, 10) <= sys.version_info[:2] <= (3, 13)
    say(f"[{'OK' if good else 'FAIL'}] {found}")
    assert good, (
        f"expected Python 3.10 to 3.13, got {found}: create the virtual environment with another python3.x"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_package(package, say):
    try:
        found = version(package)
        if module := PACKAGES[package]:
            importlib.import_module(module)
    except (PackageNotFoundError, ImportError) as error:
        say(f"[FAIL] {package}")
        raise AssertionError(f"{package}: expected it installed, got {error!r}; remedy: {REMEDY}") from error
    say(f"[OK] {package} {found}")


def test_torch_is_recent_and_computes(say):
    torch = pytest.importorskip("torch", reason="see test_package[torch]")
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    assert release >= (2, 6), f"torch: expected 2.6 or newer, got {torch.__version__}; remedy: {REMEDY}"
    devices = [
        torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "mps" if torch.backends.mps.is_available() else None,
        f"cpu with {torch.get_num_threads()} threads",
    ]
    say(f"[OK] torch finds {', '.join(filter(None, devices))}")
    a = torch.arange(6.0).view(2, 3)
    assert torch.equal(a @ a.T, torch.tensor([[5.0, 14.0], [14.0, 50.0]])), "torch: a 2×3 product came out wrong"
