"""Data sets: tokens to train on, and reviews to classify.

Tokens are the splits `train` and `val`, 1-D integer arrays, in one .npz or as .npy files in a folder. An .npz is
loaded; a folder is memory-mapped, so its size affects neither the start nor the memory of a run. A text is
converted once to such a folder, `<name>.tokens` beside it, and again when it has changed.
"""

import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from support.errors import UserError, first_line, require
from support.files import DATA
from support.tokenizer import token_folder

SPLITS = ("train", "val")
# Dataset repositories on the Hugging Face Hub, the one file of each that is needed, and its name in data/.
C4 = ("yimingzhang/llms-hw2", "tokens.npz", "tokens.npz")
YELP = ("fancyzhx/yelp_polarity", "plain_text/test-00000-of-00001.parquet", "yelp_test.parquet")
C4_NOTE = "The course's own validation set is another part of C4, so compare perplexities with a margin."
YELP_NOTE = "The bundled sample has product reviews: its accuracies are not comparable with Yelp's."


def hub_file(repo: str, filename: str, name: str) -> tuple[Path | None, str]:
    """(data/<name>, ""), downloaded from the Hub if it is not there; (None, reason) if that fails."""
    path = DATA / name
    if path.exists():
        return path, ""
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        # Asked alone, because the download tries an unreachable Hub for minutes. An expired token is never sent.
        facts = get_hf_file_metadata(hf_hub_url(repo, filename, repo_type="dataset"), token=False, timeout=8)
        size = f"{facts.size / 1e6:,.1f} MB, once"
        print(f"Downloading {repo}: {size} (Ctrl-C stops it; --data sample avoids it).", flush=True)
        folder = DATA / ".downloads"
        os.replace(hf_hub_download(repo, filename, repo_type="dataset", local_dir=folder, token=False), path)
        return path, ""
    except Exception as error:  # a broken connection, a full disk: the client raises dozens of types
        reason = re.sub(r"https?://[^\s:]+", "the Hub", first_line(error).partition(". ")[0])
        return None, f"{repo} is not in data/{name} and cannot be downloaded ({reason:.80})"


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train on and to evaluate on."""

    name: str
    train: np.ndarray
    val: np.ndarray
    note: str | None = None  # a caveat, printed as a warning

    def require_rows(self, seq_len: int, splits: tuple[str, ...]) -> None:
        """Raise UserError unless each of the splits has at least one row of seq_len tokens."""
        for split in splits:
            n_tokens = len(getattr(self, split))
            problem = f"the {split} split has {n_tokens} tokens, fewer than one row of seq_len = {seq_len}"
            require(n_tokens >= seq_len, f"{self.name}: {problem}; use more data or a smaller seq_len")

    def n_predictions(self, seq_len: int) -> int:
        """Tokens of val that are predicted when it is cut into rows of seq_len tokens."""
        return len(self.val) // seq_len * (seq_len - 1)


def load_corpus(data: str | None, n_vocab: int) -> Corpus:
    """The corpus that the key or flag `data` names; its token ids are in [0, n_vocab).

    `data` is the path of an .npz, a token folder, or a text, JSON lines or a folder of these; 'sample'; or 'c4',
    which is data/tokens.npz, downloaded if it is not there. None means c4, or the sample if c4 is not available.
    Raises UserError for data that cannot be read or has no tokens.
    """
    note = None
    if data in (None, "c4"):
        path, problem = hub_file(*C4)
        if path:
            return Corpus("C4 (data/tokens.npz)", *read_tokens(path, n_vocab))
        require(data is None, f"data: c4: {problem}; put the file there, or use data: sample")
        data, note = "sample", f"NOTE: this is the bundled sample of C4: {problem}. {C4_NOTE}"
    if data == "sample":
        return Corpus("bundled sample of C4", *read_tokens(DATA / "sample.npz", n_vocab), note)
    known = "expected tokens, a text, JSON lines, a folder of these, 'sample' or 'c4'"
    require(Path(data).exists(), f"data: {data}: no such file or folder; {known}")
    return Corpus(data, *read_tokens(Path(data), n_vocab))


def read_tokens(path: Path, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """`train` and `val` of an .npz (train is empty if it lacks it), a token folder or a text.

    Raises UserError if the path cannot be read or contains anything but token ids in [0, n_vocab).
    """
    is_npz, remedy = path.suffix.lower() == ".npz", "download it again, or build it with data/prepare.py"
    if not is_npz and not any(path.glob("*.npy")):
        path = token_folder(path)
    try:
        if is_npz:
            with np.load(path, allow_pickle=False) as archive:  # compares the CRC of what it reads
                splits = {split: np.asarray(archive[split]) for split in SPLITS if split in archive}
        else:
            splits = {split: np.load(path / f"{split}.npy", "r", allow_pickle=False) for split in SPLITS}
    except Exception as error:  # zipfile, zlib and numpy raise many types; a damaged size is a MemoryError
        raise UserError(f"{path}: not tokens, damaged or too large ({first_line(error)}); {remedy}") from None
    require("val" in splits, f"{path}: 'val' is missing; {remedy}")
    for split, tokens in splits.items():
        problem = f"type {tokens.dtype} and shape {tokens.shape} instead of a non-empty 1-D array of integers"
        valid = tokens.dtype.kind in "iu" and tokens.ndim == 1 and len(tokens) > 0
        require(valid, f"{path}, {split}: {problem}; {remedy}")
        # Of a file that stays on the disk, evenly spaced parts are enough to notice another tokenizer.
        parts = [tokens] if is_npz else list(evenly_spaced(tokens))
        smallest, largest = min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)
        problem = f"token id {smallest if smallest < 0 else largest}, but the tokenizer has 0 to {n_vocab - 1}"
        require(smallest >= 0 and largest < n_vocab, f"{path}, {split}: {problem}; {remedy}")
    return splits.get("train", np.empty(0, np.uint16)), splits["val"]


def evenly_spaced(tokens: np.ndarray, at_most: int = 1 << 24) -> Iterator[np.ndarray]:
    """The tokens in slices of 65,536: all of them, or evenly spaced ones with about `at_most` tokens in all."""
    starts = range(0, len(tokens), 1 << 16)
    for start in starts[:: -(-len(tokens) // at_most)]:
        yield tokens[start : start + (1 << 16)]


def unigram_entropy(tokens: np.ndarray, n_vocab: int) -> float:
    """Entropy of the token frequencies in nats: the loss of a guess that knows only these frequencies.

    Of more than 2^24 tokens only that many are counted, which lowers the result by about V / 2^25 nats.
    """
    counts = np.zeros(n_vocab, dtype=np.int64)
    for part in evenly_spaced(tokens):
        counts += np.bincount(part.astype(np.int64), minlength=n_vocab)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


@dataclass(frozen=True)
class Reviews:
    """Texts to classify, with their labels (0 negative, 1 positive) if these are known."""

    name: str
    texts: list[str]
    labels: list[int] | None
    note: str | None  # a caveat, printed as a warning


def load_reviews(data: str | None, limit: int, fits: Callable[[str], bool], seed: int = 42) -> Reviews:
    """At most `limit` random reviews for which `fits(text)` is true, in the order of the data.

    `data` is a file as in text.read_reviews, 'yelp' (Yelp polarity's test split) or 'sample'; None means yelp, or
    the sample with a note if Yelp is not available. Texts without labels are all returned. Raises UserError.
    """
    name, path, note = data, Path(data or ""), None
    if data in (None, "yelp"):
        name = "Yelp polarity, test split"
        path, problem = hub_file(*YELP)
        require(path is not None or data is None, f"--data yelp: {problem}; put it there, or give --data sample")
        if path is None:
            data, note = "sample", f"NOTE: this is NOT Yelp: {problem}. {YELP_NOTE}"
    if data == "sample":
        name, path = "bundled sample of product reviews", DATA / "reviews.jsonl"
    from support.text import read_reviews

    reviews = list(read_reviews(path))
    require(bool(reviews), f"{name}: contains no review; add some or choose another file")
    labelled = {label is not None for _, label in reviews}
    require(len(labelled) == 1, f"{name}: some of the texts lack a label; label all or none")
    if True in labelled:
        order = list(range(len(reviews)))
        random.Random(seed).shuffle(order)
        chosen = sorted(islice((i for i in order if fits(reviews[i][0])), limit))
        require(bool(chosen), f"{name}: none of the {len(reviews)} reviews fits the model; use shorter ones")
        reviews = [reviews[i] for i in chosen]
    texts, labels = map(list, zip(*reviews, strict=True))
    return Reviews(name, texts, labels if True in labelled else None, note)
