"""Token files: the splits `train` and `val`, 1-D integer arrays, in one .npz or as .npy files in a folder.

A folder is memory-mapped, so its size affects neither the start nor the memory of a run. Texts and large .npz
files are converted once to such a folder, `<name>.tokens` beside the file. The file source.json in it, written
last, says what it was made of: a changed source or a killed conversion is converted again.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from support.errors import UserError, first_line, require
from support.files import atomic_file, write_atomically, zip_problem
from support.text import read_documents, split_held_out, tokenise
from support.tokenizer import get_tokenizer

SPLITS = ("train", "val")
LARGE = 1 << 24  # tokens; an .npz that has more is converted to a folder
FORMAT = 4  # raise it when the split or the tokenisation changes: texts are then converted again
REMEDY = "download it again or build it with data/prepare.py"


def read_tokens(path: Path, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """`train` and `val` of an .npz, a token folder or a text (.jsonl, .jsonl.gz, or any other file as UTF-8).

    Of an .npz that has only `val`, train is empty.
    Raises UserError if the path cannot be read or holds anything but token ids in [0, n_vocab).
    """
    if path.is_dir():
        return _read_folder(path, n_vocab)
    folder = path.with_name(f"{path.name}.tokens")
    facts, note = path.stat(), folder / "source.json"
    source = json.dumps({"format": FORMAT, "bytes": facts.st_size, "modified_ns": facts.st_mtime_ns}) + "\n"
    if not note.exists() or note.read_text(errors="replace") != source:
        if path.suffix == ".npz":
            train, val = _read_npz(path, n_vocab)
            if len(train) + len(val) < LARGE:
                return train, val
            print(f"{path} is large: converting it once to {folder}, which can be memory-mapped.", flush=True)
            folder.mkdir(exist_ok=True)
            for split, tokens in zip(SPLITS, (train, val), strict=True):
                with atomic_file(folder / f"{split}.npy") as file:
                    np.save(file, tokens.astype(np.uint16, copy=False))
        else:
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
            # The CRC of an array is compared while it is read. A member that is no array comes as bytes.
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
        lengths = np.array([*tokenise(read_documents(path), get_tokenizer(), spool)])
        require(len(lengths) > 0, f"{path}: contains no text to train on; give a file with text")
        folder.mkdir(exist_ok=True)
        for split, runs in split_held_out(lengths).items():
            with atomic_file(folder / f"{split}.npy") as file:
                write_runs(file, spool, runs)


def write_runs(file: BinaryIO, spool: BinaryIO, runs: np.ndarray) -> None:
    """Write parts of a file of bare uint16 tokens as one .npy; runs (n, 2) are their starts and ends."""
    n_tokens = int((runs[:, 1] - runs[:, 0]).sum())
    npy.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (n_tokens,)})
    for start, end in runs.tolist():
        spool.seek(2 * start)
        file.write(spool.read(2 * (end - start)))
