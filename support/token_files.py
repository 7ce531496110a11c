"""Token files: the splits `train` and `val`, 1-D integer arrays, in one .npz or as .npy files in a folder.

A folder is memory-mapped, so its size affects neither the start nor the memory of a run. An .npz cannot be mapped:
a large one is converted once, as a text is, to a folder of uint16, `<name>.tokens` beside it. The file source.json
in that folder, written last, says what it was made of: a changed source or a killed conversion is converted again.
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
from support.hub import writable_or_cache_path
from support.text import read_pieces, split_held_out, tokenise
from support.tokenizer import get_tokenizer

SPLITS = ("train", "val")
LARGE = 1 << 24  # tokens; an .npz that has more is converted to a folder
FORMAT = 3  # raise it when the split or the tokenisation changes: texts are then converted again
REMEDY = "download it again or build it with data/prepare.py"


def read_tokens(path: Path, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """`train` and `val` of an .npz, a token folder or a text (.jsonl, .jsonl.gz, or any other file as UTF-8).

    Of an .npz that has only `val`, train is empty.
    Raises UserError if the path cannot be read or holds anything but token ids in [0, n_vocab).
    """
    if path.is_dir():
        return _read_folder(path, n_vocab)
    folder = writable_or_cache_path(path.with_name(f"{path.name}.tokens"))
    if not _is_made_of(path, folder):
        if path.suffix == ".npz":
            train, val = _read_npz(path, n_vocab)
            if len(train) + len(val) < LARGE:
                return train, val
            print(f"{path} is large: converting it once to {folder}, which can be memory-mapped.", flush=True)
            _write_folder(folder, train, val)
        else:
            _tokenise_text(path, folder)
        write_atomically(folder / "source.json", _stamp(path))
    return _read_folder(folder, n_vocab)


def evenly_spaced(tokens: np.ndarray, at_most: int = 1 << 24) -> Iterator[np.ndarray]:
    """The tokens in slices of 65,536: all of them, or evenly spaced ones with about `at_most` tokens in all."""
    starts = range(0, len(tokens), 1 << 16)
    for start in starts[:: -(-len(tokens) // at_most)]:
        yield tokens[start : start + (1 << 16)]


# --- Reading ------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    splits = []
    for path in (folder / "train.npy", folder / "val.npy"):
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
    splits = []
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in SPLITS:
                if key == "train" and archive.files == ["val"]:  # a file to evaluate on
                    splits.append(np.empty(0, np.uint16))
                    continue
                found = ", ".join(archive.files) or "nothing"
                require(key in archive.files, f"{path}: '{key}' is missing, found {found}; {REMEDY}")
                splits.append(archive[key])  # the CRC is compared at the end of the array
                require(isinstance(splits[-1], np.ndarray), f"{path}: '{key}' is not a numpy array; {REMEDY}")
                _check_tokens(splits[-1], f"{path}: '{key}'", n_vocab)
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many types; a damaged size is a MemoryError
        raise UserError(f"{path}: damaged .npz file, or too large ({first_line(error)}); {REMEDY}") from None
    return splits[0], splits[1]


def _check_tokens(tokens: np.ndarray, where: str, n_vocab: int) -> None:
    require(
        tokens.dtype.kind in "iu" and tokens.ndim == 1 and len(tokens) > 0,
        f"{where} has type {tokens.dtype} and shape {tokens.shape}, but tokens are a non-empty 1-D array of "
        "integers; build the file with data/prepare.py",
    )
    # Of a file that stays on the disk, evenly spaced parts are enough to notice another tokenizer.
    for part in evenly_spaced(tokens) if isinstance(tokens, np.memmap) else [tokens]:
        for extreme in (int(part.min()), int(part.max())):
            require(
                0 <= extreme < n_vocab,
                f"{where} contains the token id {extreme}, but the tokenizer's ids are 0 to {n_vocab - 1}; "
                "tokenise the text with the tokenizer of the configuration",
            )


# --- Writing ------------------------------------------------------------------------------------------------


def _stamp(source: Path) -> str:
    """What source.json says about the file that a folder was made of."""
    facts = source.stat()
    return json.dumps({"format": FORMAT, "bytes": facts.st_size, "modified_ns": facts.st_mtime_ns}) + "\n"


def _is_made_of(source: Path, folder: Path) -> bool:
    note = folder / "source.json"
    return note.exists() and note.read_text(errors="replace") == _stamp(source)


def _tokenise_text(path: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder.parent) as spool:
        lengths = np.array([*tokenise(read_pieces(path), get_tokenizer(), spool)])
        require(len(lengths) > 0, f"{path}: contains no text to train on; give a file with text")
        folder.mkdir(exist_ok=True)
        for split, runs in split_held_out(lengths).items():
            with atomic_file(folder / f"{split}.npy") as file:
                write_runs(file, spool, runs)


def _write_folder(folder: Path, train: np.ndarray, val: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, tokens in (("train", train), ("val", val)):
        with atomic_file(folder / f"{split}.npy") as file:
            np.save(file, tokens.astype(np.uint16, copy=False))


def write_runs(file: BinaryIO, spool: BinaryIO, runs: np.ndarray) -> None:
    """Write parts of a file of bare uint16 tokens as one .npy; runs (n, 2) are their starts and ends."""
    n_tokens = int((runs[:, 1] - runs[:, 0]).sum())
    npy.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (n_tokens,)})
    for start, end in runs.tolist():
        spool.seek(2 * start)
        file.write(spool.read(2 * (end - start)))
