"""Writing files so that a crash never leaves half of one."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
            _sync(file)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(file: BinaryIO) -> None:
    """Wait until the disk has what was written."""
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can open folders (Windows cannot)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of writing `path`. Only for one who holds the folder's lock."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def write_together(contents: dict[Path, bytes | memoryview]) -> None:
    """Replace several files: all are on the disk before the first one takes its place. May raise OSError."""
    with ExitStack() as files:
        for path, content in contents.items():
            file = files.enter_context(atomic_file(path))
            file.write(content)
            _sync(file)


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replace the file `path` by this text (UTF-8)."""
    with atomic_file(path) as file:
        file.write(text.encode())


def json_text(values: dict) -> str:
    """The values as JSON; a float that is not finite becomes null, since JSON has no other word for it."""

    def jsonable(value):
        if isinstance(value, dict):
            return {key: jsonable(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [jsonable(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(jsonable(values), indent=2, allow_nan=False) + "\n"


def write_json(path: str | os.PathLike, values: dict) -> None:
    """Replace the file `path` by `json_text(values)`."""
    write_atomically(path, json_text(values))
