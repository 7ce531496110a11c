"""Where the package's own files are, and writing files so that a crash never leaves half of one."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from support.errors import UserError

ROOT = Path(__file__).resolve().parent.parent  # whatever the current folder is
DATA = ROOT / "data"


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write to, which replaces `path` when the block ends without an error.

    It is written beside `path`, flushed to disk, closed and renamed: at any moment `path` is either the old file
    or the complete new one, even if the process is killed or the disk is full.
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


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replace the file `path` by this text in UTF-8. May raise OSError."""
    with atomic_file(path) as file:
        file.write(text.encode(errors="replace"))  # half a surrogate pair has no code


def lock_folder(lock: FileLock, folder: Path) -> None:
    """Create the folder of a run and take its lock. Raises UserError if another run has it or it is read-only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"output_dir: another process is training in {folder}; wait for it") from None
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written ({error.strerror}); choose another") from None


def json_text(values: dict) -> str:
    """The values as JSON; NaN and infinity, which JSON lacks, become null."""
    finite = json.loads(json.dumps(values), parse_constant=lambda word: None)
    return json.dumps(finite, indent=2) + "\n"
