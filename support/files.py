"""Writing files so that a crash never leaves half of one, and what is wrong with a zip file."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write to, which replaces `path` when the block ends without an error.

    It is written beside `path`, flushed to disk and renamed: at any moment `path` is either the old file or the
    complete new one, even if the process is killed or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of killed processes that were writing `path`. Needs the folder's lock."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink()


def write_together(contents: dict[Path, bytes | memoryview]) -> None:
    """Replace several files, none of them before all are on the disk. May raise OSError."""
    with ExitStack() as files:
        for path, content in contents.items():
            file = files.enter_context(atomic_file(path))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the first of them is renamed


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replace the file `path` by this text in UTF-8. May raise OSError."""
    write_together({Path(path): text.encode(errors="replace")})  # half a surrogate pair has no code


def json_text(values: dict) -> str:
    """The values as JSON; NaN and infinity, which JSON lacks, become null."""
    finite = json.loads(json.dumps(values), parse_constant=lambda word: None)
    return json.dumps(finite, indent=2) + "\n"


def zip_problem(path: Path, wanted: str) -> str:
    """Why `path`, which should be a `wanted` (a format that is a zip archive), cannot be opened."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith(b"PK"):
        return f"truncated or damaged {wanted}"
    kind = "web page" if start.startswith(b"<") else "foreign file" if start else "empty file"
    return f"{kind} instead of a {wanted}"
