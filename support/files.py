"""Writing files so that a crash never leaves half of one."""

import json
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
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # makes the rename itself durable
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(file: BinaryIO) -> None:
    """Wait until the disk has what was written."""
    file.flush()
    os.fsync(file.fileno())


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of writing `path`. Only for one who holds the folder's lock."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink()


def write_together(contents: dict[Path, bytes | memoryview]) -> None:
    """Replace several files: all are on the disk before the first one takes its place. May raise OSError."""
    with ExitStack() as files:
        for path, content in contents.items():
            file = files.enter_context(atomic_file(path))
            file.write(content)
            _sync(file)


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replace the file `path` by this text (UTF-8)."""
    write_together({Path(path): text.encode(errors="replace")})  # half a surrogate pair has no code


def json_text(values: dict) -> str:
    """The values as JSON; a float that is not finite becomes null, since JSON has no other word for it."""
    finite = json.loads(json.dumps(values), parse_constant=lambda word: None)
    return json.dumps(finite, indent=2) + "\n"
