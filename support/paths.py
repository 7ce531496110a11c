"""Where the package's own files are, from whatever folder its commands are run."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
