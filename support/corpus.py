"""Training data: token files, text that is tokenised once and cached, and the bundled sample.

A token file is an .npz with the 1-D integer arrays `train` and `val`. Tokens stay in the narrow type of
their file (uint16 for GPT-2's vocabulary): the course's 520 million tokens are 1 GB so, 4 GB as int64.
"""

import gzip
import io
import json
import re
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tiktoken import Encoding
from tqdm import tqdm

from support.errors import UserError, check
from support.files import atomic_file
from support.tokenizer import get_tokenizer

DATA = Path(__file__).resolve().parent.parent / "data"
END_OF_TEXT = "<|endoftext|>"
SAMPLE_NOTE = (
    "NOTE: no data named and no data/tokens.npz, so this trains on the bundled sample of Wikipedia pages; "
    "its perplexities are not comparable with C4's."
)
CACHE_FORMAT = 1  # raise it when the split or the tokenisation changes: older caches are then made anew


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train on and to evaluate on: 1-D integer arrays (memory-mapped from a folder)."""

    name: str
    train: np.ndarray
    val: np.ndarray
    note: str | None = None  # what the reader of the results must know; printed loudly

    def check_length(self, seq_len: int) -> None:
        """Raise UserError unless each split holds at least one row of seq_len tokens."""
        for split, tokens in (("train", self.train), ("val", self.val)):
            check(
                len(tokens) >= seq_len,
                f"{self.name}: the {split} split holds {len(tokens)} tokens, fewer than one row of "
                f"seq_len = {seq_len}; give more data or a smaller seq_len",
            )


def load_corpus(data: str | None, n_vocab: int) -> Corpus:
    """The corpus that the key or flag `data` names; every token id of a token file is in [0, n_vocab).

    `data` is the path of an .npz, of a folder with train.npy and val.npy, of a .jsonl or .jsonl.gz (field
    `text`) or of a text file, or 'sample'. None means data/tokens.npz where it exists, else the sample.
    Raises UserError for what cannot be read or holds no tokens.
    """
    if data is None and (DATA / "tokens.npz").exists():
        return Corpus("data/tokens.npz", *read_tokens(DATA / "tokens.npz", n_vocab))
    if data is None or data == "sample":
        train, val = read_tokens(DATA / "sample.npz", n_vocab)
        return Corpus("bundled sample (Wikipedia 2006)", train, val, SAMPLE_NOTE if data is None else None)
    path = Path(data)
    if not path.exists():
        raise UserError(f"data: {data} does not exist; give a token file, a text or jsonl file, or 'sample'")
    if path.is_dir() or path.suffix == ".npz":
        return Corpus(data, *read_tokens(path, n_vocab))
    return Corpus(data, *tokenise_file(path))


def read_tokens(path: Path, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """`train` and `val` of an .npz, or of a folder with train.npy and val.npy (memory-mapped), checked."""
    read = _map_npy if path.is_dir() else _read_npz
    train, val = read(path, "train"), read(path, "val")
    for key, tokens in (("train", train), ("val", val)):
        _check_tokens(tokens, f"{path}: '{key}'", n_vocab)
    return train, val


def _map_npy(folder: Path, key: str) -> np.ndarray:
    path = folder / f"{key}.npy"
    try:
        return np.lib.format.open_memmap(path, mode="r")  # never unpickles
    except Exception as error:  # a foreign file fails in a dozen ways inside numpy; all mean the same here
        remedy = "a data folder holds train.npy and val.npy"
        raise UserError(f"{path}: not a numpy array ({_reason(error)}); {remedy}") from None


def _read_npz(path: Path, key: str) -> np.ndarray:
    remedy = "download it again or build it with data/prepare.py"
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                is_html = file.read(64).lstrip().startswith(b"<")
            raise ValueError("it is a web page" if is_html else "it is empty, truncated or no .npz at all")
        with np.load(path, allow_pickle=False) as archive:
            if key in archive.files:
                return np.asarray(archive[key])  # zipfile compares the CRC while numpy reads
            found = ", ".join(archive.files) or "nothing"
    except Exception as error:  # a damaged archive fails in a dozen ways inside zipfile, zlib and numpy
        raise UserError(f"{path}: '{key}' cannot be read ({_reason(error)}); {remedy}") from None
    raise UserError(f"{path}: the array '{key}' is missing (found: {found}); {remedy}")


def _check_tokens(tokens: np.ndarray, where: str, n_vocab: int) -> None:
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 1 or tokens.size == 0:
        raise UserError(
            f"{where} has type {tokens.dtype} and shape {tokens.shape}, but tokens are integers in one "
            "dimension, at least one of them; build the file with data/prepare.py"
        )
    for extreme in (int(tokens.min()), int(tokens.max())):
        if not 0 <= extreme < n_vocab:
            raise UserError(
                f"{where} holds the token id {extreme}, but the tokenizer's ids are 0 to {n_vocab - 1}; "
                "tokenise the text with the tokenizer of the configuration"
            )


def tokenise_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`train` and `val` of a text or jsonl file, cached as `<name>.tokens.npz` beside it."""
    cache = path.with_name(f"{path.name}.tokens.npz")
    stamp = np.array([CACHE_FORMAT, path.stat().st_size, path.stat().st_mtime_ns])
    if cached := _read_cache(cache, stamp):
        return cached
    tokens, lengths = tokenise(read_pieces(path), get_tokenizer())
    if not lengths:
        raise UserError(f"{path}: holds no text to train on; give a file with text")
    train, val = split_held_out(tokens, lengths)
    try:
        save_npz(cache, train=train, val=val, source=stamp)
    except OSError as error:
        print(f"The tokens are not cached ({cache}: {error.strerror}): the next run tokenises again.")
    return train, val


def _read_cache(cache: Path, stamp: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    if not cache.is_file():
        return None
    try:
        up_to_date = np.array_equal(_read_npz(cache, "source"), stamp)
        return read_tokens(cache, get_tokenizer().n_vocab) if up_to_date else None
    except UserError as error:
        print(f"The token cache is made anew ({error}).")
        return None


def read_pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """Pieces of text in file order, each with whether a document ends there; draws a progress bar."""
    with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from ((record["text"], True) for _, record in read_jsonl(path, bar))
        else:
            yield from _read_text(path, bar)


def read_jsonl(path: Path, bar: tqdm | None = None) -> Iterator[tuple[int, dict]]:
    """(line number, object) for a .jsonl or .jsonl.gz; UserError names the line without a string `text`."""
    for number, line in enumerate(_read_blocks(path, bar, size=None), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); write one object a line") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UserError(f"{path}, line {number}: no string in the field 'text'; add it or drop the line")
        yield number, record


def _read_text(path: Path, bar: tqdm) -> Iterator[tuple[str, bool]]:
    """Documents are what stands between literal `<|endoftext|>`; long ones come in several pieces.

    A piece ends before a space or line break that follows another character, since no token of GPT-2's
    pattern spans such a place: the tokens are those of the whole text.
    """
    rest = ""
    for block in _read_blocks(path, bar, size=1 << 20):
        *documents, rest = (rest + block).split(END_OF_TEXT)
        yield from ((document, True) for document in documents)
        cut = re.match(r".*\S(?=[ \n])", rest, re.DOTALL)
        if cut:
            yield cut.group(), False
            rest = rest[cut.end() :]
    yield rest, True


def _read_blocks(path: Path, bar: tqdm | None, size: int | None) -> Iterator[str]:
    """Lines, or blocks of `size` characters, of a UTF-8 file that may be compressed with gzip."""
    try:
        with path.open("rb") as raw:
            binary = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            text = io.TextIOWrapper(binary, encoding="utf-8-sig")
            while block := text.readline() if size is None else text.read(size):
                yield block
                if bar is not None:
                    bar.update(raw.tell() - bar.n)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it or give another file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}); give another file") from None


def tokenise(pieces: Iterable[tuple[str, bool]], tokenizer: Encoding) -> tuple[np.ndarray, list[int]]:
    """Tokens as one uint16 array, each document followed by `<|endoftext|>`, and the documents' lengths."""
    tokens, lengths, start = array("H"), [], 0  # array("H"): 2 bytes a token, where a list takes 8 and more
    for text, document_ends in pieces:
        if len(tokens) > start or not text.isspace():
            tokens.extend(tokenizer.encode_ordinary(text))
        if document_ends and len(tokens) > start:
            tokens.append(tokenizer.eot_token)
            lengths.append(len(tokens) - start)
            start = len(tokens)
    return np.frombuffer(tokens, dtype=np.uint16), lengths


def split_held_out(tokens: np.ndarray, lengths: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(train, val): val gets 1% of the tokens but at least the smaller of 65,536 tokens and 10%.

    It gets whole documents, drawn at random, first such as keep it below twice that amount, then below half
    of all tokens. Where those do not make up the amount, as with a single text, it gets the end.
    """
    total = len(tokens)
    target = max(-(-total // 100), min(65_536, -(-total // 10)))
    held_out, n_held_out = np.zeros(len(lengths), dtype=bool), 0
    order = np.random.default_rng(seed).permutation(len(lengths))
    for limit in (2 * target, total // 2):
        for document in order:
            if n_held_out < target and not held_out[document] and n_held_out + lengths[document] <= limit:
                held_out[document] = True
                n_held_out += lengths[document]
    if n_held_out < target:
        return tokens[:-target], tokens[-target:]
    is_val = np.repeat(held_out, lengths)
    return tokens[~is_val], tokens[is_val]


def save_npz(path: Path, compress: bool = False, **arrays: np.ndarray) -> None:
    """Write an .npz; `path` is the old file or the whole new one at every instant. May raise OSError."""
    with atomic_file(path) as file:
        (np.savez_compressed if compress else np.savez)(file, **arrays)


def unigram_entropy(tokens: np.ndarray, n_vocab: int) -> float:
    """Entropy in nats of the token frequencies: the loss of a guess that knows only these."""
    counts = np.zeros(n_vocab, dtype=np.int64)
    for start in range(0, len(tokens), 1 << 20):  # a slice widens to 8 MB, the whole corpus to gigabytes
        counts += np.bincount(tokens[start : start + (1 << 20)].astype(np.int64), minlength=n_vocab)
    p = counts[counts > 0] / len(tokens)
    return float(-(p * np.log(p)).sum())


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
