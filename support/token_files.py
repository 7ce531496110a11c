"""Token files: the splits `train` and `val`, 1-D integer arrays, in one .npz or as .npy files in a folder.

An .npz is loaded; a folder is memory-mapped, so its size affects neither the start nor the memory of a run. A text
is converted once to such a folder, `<name>.tokens` beside the file. Its source.json, written last, identifies the
source: after a change of the source, or a conversion that was killed, the text is converted again.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from numpy.lib import format as npy

from support.errors import UserError, first_line, require
from support.files import atomic_file, write_atomically, zip_problem
from support.text import n_held_out, read_documents, tokenise
from support.tokenizer import get_tokenizer

SPLITS = ("train", "val")
FORMAT = 5  # raise it when the split or the tokenisation changes: texts are then converted again
REMEDY = "download it again or build it with data/prepare.py"


def read_tokens(path: Path, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """`train` and `val` of an .npz, a token folder or a text (.jsonl, .jsonl.gz, or any other file as UTF-8).

    Of an .npz that has only `val`, train is empty.
    Raises UserError if the path cannot be read or contains anything but token ids in [0, n_vocab).
    """
    if path.is_dir():
        return _read_folder(path, n_vocab)
    if path.suffix == ".npz":
        return _read_npz(path, n_vocab)
    folder = path.with_name(f"{path.name}.tokens")
    facts, note = path.stat(), folder / "source.json"
    source = json.dumps({"format": FORMAT, "bytes": facts.st_size, "modified_ns": facts.st_mtime_ns}) + "\n"
    if not note.exists() or note.read_text(errors="replace") != source:
        _tokenise_text(path, folder)
        write_atomically(note, source)
    return _read_folder(folder, n_vocab)


def evenly_spaced(tokens: np.ndarray, at_most: int = 1 << 24) -> Iterator[np.ndarray]:
    """The tokens in slices of 65,536: all of them, or evenly spaced ones with about `at_most` tokens in all."""
    starts = range(0, len(tokens), 1 << 16)
    for start in starts[:: -(-len(tokens) // at_most)]:
        yield tokens[start : start + (1 << 16)]


def _read_folder(folder: Path, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    splits = []
    for path in (folder / f"{split}.npy" for split in SPLITS):
        try:
            tokens = npy.open_memmap(path, mode="r")  # never unpickles
        except Exception as error:  # numpy raises many types for a file that is not an array
            remedy = "delete the folder and build it again"
            raise UserError(f"{path}: not a numpy array ({first_line(error)}); {remedy}") from None
        _check_tokens(tokens, str(path), n_vocab)
        splits.append(tokens)
    return splits[0], splits[1]


def _read_npz(path: Path, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    require(zipfile.is_zipfile(path), f"{path}: {zip_problem(path, '.npz file')}; {REMEDY}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = archive.files
            # Reading an array checks its CRC. A member that is not an array is read as bytes.
            splits = {key: np.asarray(archive[key]) for key in SPLITS if key in found}
    except Exception as error:  # zipfile, zlib and numpy raise many types; a damaged size is a MemoryError
        raise UserError(f"{path}: damaged .npz file, or too large ({first_line(error)}); {REMEDY}") from None
    for key in ("val",) if found == ["val"] else SPLITS:
        require(key in found, f"{path}: '{key}' is missing, found {', '.join(found) or 'nothing'}; {REMEDY}")
        _check_tokens(splits[key], f"{path}: '{key}'", n_vocab)
    return splits.get("train", np.empty(0, np.uint16)), splits["val"]


def _check_tokens(tokens: np.ndarray, where: str, n_vocab: int) -> None:
    require(
        tokens.dtype.kind in "iu" and tokens.ndim == 1 and len(tokens) > 0,
        f"{where} has type {tokens.dtype} and shape {tokens.shape}, but tokens are a non-empty 1-D array of "
        "integers; build the file with data/prepare.py",
    )
    # Of a file that stays on the disk, evenly spaced parts are enough to notice another tokenizer.
    parts = list(evenly_spaced(tokens)) if isinstance(tokens, np.memmap) else [tokens]
    smallest, largest = min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)
    require(
        smallest >= 0 and largest < n_vocab,
        f"{where} contains the token id {smallest if smallest < 0 else largest}, but the tokenizer's ids are "
        f"0 to {n_vocab - 1}; tokenise the text with the tokenizer of the configuration",
    )


def _tokenise_text(path: Path, folder: Path) -> None:
    with TemporaryFile(dir=folder.parent) as spool:
        n_tokens = sum(tokenise(read_documents(path), get_tokenizer(), spool))
        require(n_tokens > 0, f"{path}: contains no text to train on; give a file with text")
        spool.flush()
        tokens = np.memmap(spool, dtype="<u2", mode="r")
        folder.mkdir(exist_ok=True)
        for split, part in zip(SPLITS, np.split(tokens, [n_tokens - n_held_out(n_tokens)]), strict=True):
            with atomic_file(folder / f"{split}.npy") as file:
                np.save(file, part)
