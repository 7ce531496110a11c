"""Writing files so that a crash never leaves half of one."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` when the block ends without an error.

    It is written beside `path`, flushed to disk and renamed: at every instant `path` is the old file or
    the whole new one, also when the process is killed or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can open folders (Windows cannot)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replace the file `path` by this text (UTF-8)."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike, values: dict) -> None:
    """Replace the file `path` by these values; a float that is not finite becomes null, which JSON has."""

    def jsonable(value):
        if isinstance(value, dict):
            return {key: jsonable(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_atomically(path, json.dumps(jsonable(values), indent=2, allow_nan=False) + "\n")
