"""GPT-2's byte-pair tokenizer, from the bundled vocabulary, and folders of the tokens of a text.

    >>> get_tokenizer().encode_ordinary("Hello world")
    [15496, 995]

Use `encode_ordinary` for text from outside: it reads a literal `<|endoftext|>` as plain characters, for which
`encode` raises an error.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from support.errors import UserError, require
from support.files import DATA, atomic_file, write_atomically

TOKEN = "<u2"  # 16 bits, for ids up to 65,535
FORMAT = 7  # raise it when the split or the tokenisation changes: texts are then converted again
BLANKS = re.compile(r"(\s{1000})\s+")
VOCABULARY = DATA / "gpt2.tiktoken"
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


class Tokenizer(tiktoken.Encoding):
    """A tiktoken.Encoding that cuts runs of blanks to 1,000: half a million of them crash tiktoken."""

    def encode_ordinary(self, text: str) -> list[int]:
        """As tiktoken does."""
        return super().encode_ordinary(BLANKS.sub(r"\1", text))


@lru_cache
def get_tokenizer(name: str = "gpt2") -> tiktoken.Encoding:
    """The encoding called `name`, of which only "gpt2" is bundled: 50,257 tokens, `eot_token` 50256.

    Raises UserError for another name, or if the vocabulary file is missing or altered.
    """
    require(name == "gpt2", f"tokenizer_encoding '{name}' is not bundled; use 'gpt2'")
    vocabulary = VOCABULARY.read_bytes() if VOCABULARY.exists() else b""
    # One altered line would shift token ids without any error.
    intact = hashlib.sha256(vocabulary).hexdigest() == VOCABULARY_SHA256
    require(intact, f"{VOCABULARY}: missing or altered; restore it with `git checkout -- data/gpt2.tiktoken`")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, vocabulary.splitlines())}
    special = {"<|endoftext|>": 50256}
    return Tokenizer("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def tokenise(documents: Iterable[str], file: BinaryIO) -> Iterator[int]:
    """Write the tokens to `file` as bare uint16, `<|endoftext|>` after each document; yield each one's length."""
    tokenizer = get_tokenizer()
    for text in documents:
        if text.strip():
            tokens = [*tokenizer.encode_ordinary(text), tokenizer.eot_token]
            file.write(np.array(tokens, dtype=TOKEN).tobytes())
            yield len(tokens)


def n_held_out(n_tokens: int) -> int:
    """How many of a text's tokens, its last ones, are held out: 1%, but at least 65,536 or 10%, the smaller."""
    return max(-(-n_tokens // 100), min(65_536, -(-n_tokens // 10)))


def save_folder(folder: Path, splits: dict[str, np.ndarray]) -> None:
    """Write each split to an .npy file in the folder. Arrays that are memory-mapped stay on the disk."""
    folder.mkdir(exist_ok=True)
    for split, tokens in splits.items():
        with atomic_file(folder / f"{split}.npy") as file:
            np.save(file, tokens)


def token_folder(path: Path) -> Path:
    """The token folder of a text or of a folder of texts, made now unless it fits the text already."""
    from support.text import read_documents, text_files

    folder = Path(f"{os.path.abspath(path)}.tokens")
    note = folder / "source.json"  # written last
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in text_files(path)]
    source = json.dumps({"format": FORMAT, "files": facts}) + "\n"
    if note.exists() and note.read_text(errors="replace") == source:
        return folder
    try:
        spool = TemporaryFile(dir=folder.parent)  # noqa: SIM115
    except OSError as error:
        problem = f"{folder.parent}: the tokens of the text cannot be written there ({error.strerror})"
        raise UserError(f"{problem}; copy the text to a folder that you can write to") from None
    with spool:
        n_tokens = sum(tokenise(read_documents(path), spool))
        require(n_tokens > 0, f"{path}: contains no text to train on; choose a file with text")
        tokens = np.memmap(spool, TOKEN, mode="r")
        end = n_tokens - n_held_out(n_tokens)
        save_folder(folder, {"train": tokens[:end], "val": tokens[end:]})
    write_atomically(note, source)
    return folder
