"""Training data: the course's C4 tokens, the user's own tokens or text, or the bundled sample."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.errors import require
from support.hub import Unavailable, hub_file
from support.paths import DATA
from support.token_files import evenly_spaced, read_tokens

C4 = ("yimingzhang/llms-hw2", "tokens.npz")  # the course's dataset repository on the Hugging Face Hub, its file
SAMPLE_NOTE = (
    "NOTE: the course's C4 tokens cannot be fetched ({}), so this trains on the bundled sample of C4. The "
    "course's own validation set is another part of C4, so compare perplexities with a margin."
)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train on and to evaluate on: 1-D integer arrays, those of a folder memory-mapped."""

    name: str
    train: np.ndarray
    val: np.ndarray
    note: str | None = None  # what the reader of the results must know; printed loudly

    def require_rows(self, seq_len: int, splits: tuple[str, ...]) -> None:
        """Raise UserError unless each of the splits has at least one row of seq_len tokens."""
        for split in splits:
            n_tokens = len(getattr(self, split))
            require(
                n_tokens >= seq_len,
                f"{self.name}: the {split} split has {n_tokens} tokens, fewer than one row of "
                f"seq_len = {seq_len}; use more data or a smaller seq_len",
            )

    def n_predictions(self, seq_len: int) -> int:
        """Tokens of val that are predicted when it is cut into rows of seq_len tokens."""
        return len(self.val) // seq_len * (seq_len - 1)


def load_corpus(data: str | None, n_vocab: int) -> Corpus:
    """The corpus that the key or flag `data` names; its token ids are in [0, n_vocab).

    `data` is the path of an .npz, a token folder, a .jsonl or .jsonl.gz (field `text`) or a text file; 'sample';
    or 'c4', which is data/tokens.npz, downloaded if it is not there. None means c4, or the sample if c4 is not
    available. Raises UserError for data that cannot be read or has no tokens.
    """
    note = None
    if data is None or data == "c4":
        try:
            return Corpus("C4 (data/tokens.npz)", *read_tokens(hub_file(*C4, "tokens.npz"), n_vocab))
        except Unavailable as error:
            remedy = "retry with a network, put the file there, or use data: sample"
            require(data is None, f"data: c4: no data/tokens.npz, and it cannot be downloaded ({error}); {remedy}")
            data, note = "sample", SAMPLE_NOTE.format(error)
    if data == "sample":
        return Corpus("bundled sample of C4", *read_tokens(DATA / "sample.npz", n_vocab), note)
    known = "a token file or folder, a text or jsonl file, 'sample' or 'c4'"
    require(Path(data).exists(), f"data: {data}: no such file or folder; give {known}")
    return Corpus(data, *read_tokens(Path(data), n_vocab))


def unigram_entropy(tokens: np.ndarray, n_vocab: int) -> float:
    """Entropy of the token frequencies in nats: the loss of a guess that knows only these frequencies.

    Of more than 2^24 tokens only that many are counted, which lowers the result by about V / 2^25 nats.
    """
    counts = np.zeros(n_vocab, dtype=np.int64)
    for part in evenly_spaced(tokens):
        counts += np.bincount(part.astype(np.int64), minlength=n_vocab)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
