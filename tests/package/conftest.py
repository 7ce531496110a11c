"""Puts report/ on the path: its scripts import each other as modules, and so do their tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "report"))
