"""From text to tokens: files of any size are read and tokenised, one document at a time."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tiktoken import Encoding
from tqdm import tqdm

from support.errors import UserError, first_line, require

END_OF_TEXT = "<|endoftext|>"


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a file in their order.

    Those of a .jsonl or .jsonl.gz are the fields `text`; in any other file `<|endoftext|>` separates them.
    """
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from (record["text"] for _, record in read_jsonl(path))
        return
    parts = []
    for line in _read_lines(path):
        *ends, rest = line.split(END_OF_TEXT)
        for end in ends:
            yield "".join([*parts, end])
            parts = []
        parts.append(rest)
    yield "".join(parts)


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of a .jsonl or .jsonl.gz; UserError names a line without a string `text`."""
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        valid = isinstance(record, dict) and isinstance(record.get("text"), str)
        require(valid, f"{path}, line {number}: not a JSON object with a string 'text'; fix or remove the line")
        yield number, record


def _read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, which may be compressed with gzip; of a large one, shows a progress bar."""
    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, delay=1, disable=None)
    try:
        with path.open("rb") as raw, bar:
            binary = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            for line in io.TextIOWrapper(binary, encoding="utf-8-sig"):
                yield line
                bar.update(raw.tell() - bar.n)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else first_line(error)
        raise UserError(f"{path}: cannot be read ({reason}); give another file") from None


def tokenise(documents: Iterable[str], tokenizer: Encoding, file: BinaryIO) -> Iterator[int]:
    """Write the tokens to `file` as bare uint16, `<|endoftext|>` after each document; yield each one's length."""
    for text in documents:
        if text.strip():
            tokens = [*tokenizer.encode_ordinary(text), tokenizer.eot_token]
            file.write(np.array(tokens, dtype="<u2").tobytes())
            yield len(tokens)


def n_held_out(n_tokens: int) -> int:
    """How many of a text's tokens, its last ones, are held out: 1%, but at least 65,536 or 10%, the smaller."""
    return max(-(-n_tokens // 100), min(65_536, -(-n_tokens // 10)))
