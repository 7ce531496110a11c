"""Training data: the course's C4 tokens, other token files and folders, texts, and the bundled sample.

A token folder holds the 1-D integer arrays train.npy and val.npy. It is memory-mapped, so that its size matters
neither to the memory nor to the start. An .npz cannot be mapped: a large one is turned once, like a text, into
a folder of uint16, `<name>.tokens` beside it. Its checked.json, written last, holds the sizes and dates of the
files that were checked: as long as they stay, nothing is checked or made again.
"""

import json
import mmap
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy
from tqdm import tqdm

from support.errors import UserError, first_line, require
from support.files import atomic_file, write_atomically
from support.hub import DATA, Unavailable, hub_file, verify_checksum, writable_or_cache_path
from support.text import read_pieces, split_held_out, tokenise
from support.tokenizer import get_tokenizer

C4 = ("yimingzhang/llms-hw2", "tokens.npz")  # the course's dataset repository on the Hugging Face Hub, its file
SAMPLE_NAME = "bundled sample of C4"
SAMPLE_NOTE = (
    "NOTE: no data named and no data/tokens.npz, and the course's C4 tokens cannot be fetched ({}), so this "
    "trains on the bundled sample of C4, the assignment's corpus. The course's own validation set is another part "
    "of C4, so compare perplexities with a margin."
)
SPLITS = ("train", "val")
LARGE = 1 << 24  # tokens from which on an .npz is not loaded but made a folder
CHUNK = 1 << 22  # tokens read at once
FORMAT = 2  # raise it when the split or the tokenisation changes: folders made of texts are then made anew


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train on and to evaluate on: 1-D integer arrays, those of a folder memory-mapped."""

    name: str
    train: np.ndarray
    val: np.ndarray
    note: str | None = None  # what the reader of the results must know; printed loudly

    def check_length(self, seq_len: int) -> None:
        """Raise UserError unless each split holds at least one row of seq_len tokens."""
        for split, tokens in (("train", self.train), ("val", self.val)):
            require(
                len(tokens) >= seq_len,
                f"{self.name}: the {split} split holds {len(tokens)} tokens, fewer than one row of "
                f"seq_len = {seq_len}; give more data or a smaller seq_len",
            )

    @property
    def is_sample(self) -> bool:
        """Whether this is the sample that comes with the package."""
        return self.name == SAMPLE_NAME

    def n_predictions(self, seq_len: int) -> int:
        """Tokens of val that are predicted when it is cut into rows of seq_len tokens."""
        return len(self.val) // seq_len * (seq_len - 1)


def load_corpus(data: str | None, n_vocab: int) -> Corpus:
    """The corpus that the key or flag `data` names; every token id is in [0, n_vocab).

    `data` is the path of an .npz, of a token folder, of a .jsonl or .jsonl.gz (field `text`) or of a text file;
    'sample'; or 'c4', which is data/tokens.npz, fetched when it is not there. None is c4 where it can be had,
    else the sample. Raises UserError for what cannot be read or holds no tokens.
    """
    note = None
    if data is None or data == "c4":
        try:
            return Corpus("C4 (data/tokens.npz)", *read_tokens(hub_file(*C4, "tokens.npz"), n_vocab))
        except Unavailable as error:
            remedy = "try again with a network, put the file there, or give data: sample"
            require(data is None, f"data: c4: no data/tokens.npz, and it cannot be fetched ({error}); {remedy}")
            data, note = "sample", SAMPLE_NOTE.format(error)
    if data == "sample":
        return Corpus(SAMPLE_NAME, *read_tokens(DATA / "sample.npz", n_vocab), note)
    path = Path(data)
    known = "a token file or folder, a text or jsonl file, 'sample' or 'c4'"
    require(path.exists(), f"data: {data} does not exist; give {known}")
    if not path.is_dir() and path.suffix != ".npz":
        path = _made_once(path, _tokenise_file, n_vocab)
    return Corpus(data, *read_tokens(path, n_vocab))


def read_tokens(path: Path, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """`train` and `val` of an .npz or of a token folder, checked; UserError says what is wrong with it."""
    if path.is_dir():
        return _map_folder(path, n_vocab)
    members = [_npz_chunks(path, key, n_vocab) for key in SPLITS]
    if sum(next(member) for member in members) >= LARGE:
        return _map_folder(_made_once(path, _unpack, n_vocab), n_vocab)
    train, val = (np.concatenate([*member]) for member in members)
    verify_checksum(path)  # compares it with what was fetched
    return train, val


# --- Token folders ------------------------------------------------------------------------------------------


class MappedTokens(np.memmap):
    """Tokens that stay on the disk, however many have been read.

    Pages that were read count as memory of the process, in the end the whole file. So each access gives back
    what those before it brought in; the system's cache keeps it.
    """

    def __getitem__(self, index):
        if self._mmap is not None:
            self._mmap.madvise(mmap.MADV_DONTNEED)
        return super().__getitem__(index)


def _map_folder(folder: Path, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    files, splits = [folder / f"{key}.npy" for key in SPLITS], []
    for path in files:
        try:
            tokens = npy.open_memmap(path, mode="r")  # never unpickles
        except Exception as error:  # a foreign file fails in a dozen ways inside numpy; all mean the same here
            remedy = "a token folder holds train.npy and val.npy"
            raise UserError(f"{path}: not a numpy array ({first_line(error)}); {remedy}") from None
        _check_array(tokens.dtype, tokens.shape, path)
        splits.append(tokens.view(MappedTokens))
    note = writable_or_cache_path(folder / "checked.json")
    if not _is_noted(note, folder, n_vocab):
        for path, tokens in zip(files, splits, strict=True):
            for start in tqdm(range(0, len(tokens), CHUNK), f"checking {path} once", delay=0.5, disable=None):
                _check_ids(tokens[start : start + CHUNK], path, n_vocab)
        with suppress(OSError):  # where it cannot be noted, it is checked each time
            _write_note(note, folder, n_vocab)
    return splits[0], splits[1]


def _stamps(*paths: Path) -> list[list[int]]:
    return [[path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _is_noted(note: Path, folder: Path, n_vocab: int, **facts) -> bool:
    """Whether the note says that the files in `folder`, as they are now, were checked, and these facts."""
    try:
        noted = json.loads(note.read_bytes())
        files = _stamps(folder / "train.npy", folder / "val.npy")
        return noted == {**noted, **facts, "files": files} and noted["n_vocab"] <= n_vocab
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_note(note: Path, folder: Path, n_vocab: int, **facts) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    facts |= {"n_vocab": n_vocab, "files": _stamps(folder / "train.npy", folder / "val.npy")}
    write_atomically(note, json.dumps(facts, indent=2) + "\n")


def _made_once(source: Path, make: Callable[[Path, Path, int], dict], n_vocab: int) -> Path:
    """The token folder that `make(source, folder, n_vocab)` fills, again only when the source has changed."""
    folder = writable_or_cache_path(source.with_name(f"{source.name}.tokens"))
    facts = {"format": FORMAT, "made_of": _stamps(source)}
    if not _is_noted(folder / "checked.json", folder, n_vocab, **facts):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            facts |= make(source, folder, n_vocab)
            _write_note(folder / "checked.json", folder, n_vocab, **facts)
        finally:
            with suppress(OSError):
                folder.rmdir()  # only if it is empty
    return folder


def _tokenise_file(path: Path, folder: Path, n_vocab: int) -> dict:
    with TemporaryFile(dir=folder) as spool:
        lengths = np.array([*tokenise(read_pieces(path), get_tokenizer(), spool)])
        require(len(lengths) > 0, f"{path}: holds no text to train on; give a file with text")
        for key, runs in split_held_out(lengths).items():
            with atomic_file(folder / f"{key}.npy") as file:
                write_runs(file, spool, runs)
    return {}


def _unpack(path: Path, folder: Path, n_vocab: int) -> dict:
    print(f"{path} is large: unpacking it once into {folder}, which can be memory-mapped.", flush=True)
    facts = {"source": json.loads(verify_checksum(path))}
    for key in SPLITS:
        chunks = _npz_chunks(path, key, n_vocab)
        length = next(chunks)
        with atomic_file(folder / f"{key}.npy") as file:
            write_npy(file, length, tqdm(chunks, key, -(-length // CHUNK), disable=None))
    return facts


def write_runs(file: BinaryIO, spool: BinaryIO, runs: np.ndarray) -> None:
    """Write runs, (n, 2) starts and ends, of a file of bare uint16 tokens as one .npy."""
    spool.flush()
    tokens = np.memmap(spool, dtype="<u2", mode="r").view(MappedTokens)
    length = int((runs[:, 1] - runs[:, 0]).sum())
    write_npy(file, length, (tokens[start:end] for start, end in runs))


def write_npy(file: BinaryIO, length: int, chunks: Iterable[np.ndarray]) -> None:
    """Write tokens that come in chunks as one .npy of uint16."""
    npy.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (length,)})
    for chunk in chunks:
        file.write(chunk.astype("<u2", copy=False).tobytes())


# --- Files from outside -------------------------------------------------------------------------------------


def _npz_chunks(path: Path, key: str, n_vocab: int) -> Iterator:
    """The length of an array of tokens in an .npz, then the array itself in chunks, checked."""
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                is_html = file.read(64).lstrip().startswith(b"<")
            raise ValueError("it is a web page" if is_html else "it is empty, truncated or no .npz at all")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if f"{key}.npy" not in names:
                raise ValueError(f"it is missing; found: {', '.join(names) or 'nothing'}")
            with archive.open(f"{key}.npy") as member:
                version = npy.read_magic(member)
                read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, _, dtype = read_header(member)
                _check_array(dtype, shape, f"{path}: '{key}'")
                n_left = shape[0]
                yield n_left
                while n_left:
                    chunk = np.frombuffer(member.read(min(CHUNK, n_left) * dtype.itemsize), dtype)
                    _check_ids(chunk, f"{path}: '{key}'", n_vocab)  # raises ValueError at the end of the file
                    n_left -= len(chunk)
                    yield chunk
                if member.read(1):  # zipfile compares the CRC at the end of a member
                    raise ValueError("it is longer than it says")
    except UserError:
        raise
    except Exception as error:  # a damaged archive fails in a dozen ways inside zipfile, zlib and numpy
        remedy = "download it again or build it with data/prepare.py"
        raise UserError(f"{path}: '{key}' cannot be read ({first_line(error)}); {remedy}") from None


def _check_array(dtype: np.dtype, shape: tuple[int, ...], where: Path | str) -> None:
    require(
        dtype.kind in "iu" and len(shape) == 1 and shape[0] > 0,
        f"{where} has type {dtype} and shape {shape}, but tokens are integers in one dimension, at least one "
        "of them; build the file with data/prepare.py",
    )


def _check_ids(tokens: np.ndarray, where: Path | str, n_vocab: int) -> None:
    for extreme in (int(tokens.min()), int(tokens.max())):
        require(
            0 <= extreme < n_vocab,
            f"{where} holds the token id {extreme}, but the tokenizer's ids are 0 to {n_vocab - 1}; "
            "tokenise the text with the tokenizer of the configuration",
        )


# --- What a corpus tells ------------------------------------------------------------------------------------


def evenly_spaced(tokens: np.ndarray, at_most: int = 1 << 24) -> Iterator[np.ndarray]:
    """The tokens in slices of 65,536: all of them, or evenly spaced ones of (about) `at_most` tokens."""
    starts = range(0, len(tokens), 1 << 16)
    for start in starts[:: -(-len(tokens) // at_most)]:
        yield tokens[start : start + (1 << 16)]


def unigram_entropy(tokens: np.ndarray, n_vocab: int) -> float:
    """Entropy in nats of the token frequencies: the loss of a guess that knows only these.

    Of more than 2^24 tokens that many are counted; the entropy comes out lower then, by V / 2^25 nats at most.
    """
    counts = np.zeros(n_vocab, dtype=np.int64)
    for part in evenly_spaced(tokens):
        counts += np.bincount(part.astype(np.int64), minlength=n_vocab)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
