"""Build the data that the final model was trained on.

    python data/build.py outputs/report/mixture sample:5 web_open.jsonl.gz:2 wikipedia_2014.jsonl.gz:1

makes a folder of tokens: the documents of the sources in random order, each as many times as the number after the
colon says, and the sample's val split. Documents that share N_WORDS consecutive words with a held-out one are left
out. The same input gives the same tokens; data/README.md has their sha256.
"""

import hashlib
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))

from support.errors import exit_on_user_error  # noqa: E402
from support.text import read_documents  # noqa: E402
from support.tokenizer import get_tokenizer  # noqa: E402

N_WORDS = 13  # as in the contamination check of GPT-3 (Brown et al. 2020, appendix C)


def encode(texts: list[str]) -> list[np.ndarray]:
    """The tokens of each document, followed by <|endoftext|>."""
    tokenizer = get_tokenizer()
    return [np.array([*row, tokenizer.eot_token], np.uint16) for row in tokenizer.encode_ordinary_batch(texts)]


def decode_documents(tokens: np.ndarray) -> list[str]:
    """The texts of documents that each end with <|endoftext|>."""
    tokenizer = get_tokenizer()
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_token) + 1)[:-1]
    return [tokenizer.decode(document[:-1].tolist()) for document in documents]


def word_runs(text: str) -> Iterator[str]:
    """Every N_WORDS consecutive words, without punctuation and capitals."""
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[i : i + N_WORDS]) for i in range(len(words) - N_WORDS + 1))


def without_overlap(documents: list[str], held_out: list[str]) -> list[str]:
    """The documents that share no N_WORDS consecutive words with a held-out one."""
    forbidden = {run for text in held_out for run in word_runs(text)}
    return [text for text in documents if forbidden.isdisjoint(word_runs(text))]


def mixture(*sources: str) -> dict[str, np.ndarray]:
    """The sources in random order to train on, and the val split of the sample."""
    c4, wikipedia = (np.load(DATA / name) for name in ("sample.npz", "heldout-wikipedia.npz"))
    held_out = decode_documents(c4["val"]) + decode_documents(wikipedia["val"])
    documents, order = [], []
    for source in sources:
        path, _, times = source.rpartition(":")
        texts = decode_documents(c4["train"]) if path == "sample" else list(read_documents(Path(path)))
        kept = encode(without_overlap(texts, held_out))
        n_tokens = sum(map(len, kept))
        print(f"{source}: {len(texts):,} documents, {len(texts) - len(kept)} left out, {n_tokens:,} tokens")
        order += int(times) * list(range(len(documents), len(documents) + len(kept)))
        documents += kept
    random.Random(42).shuffle(order)
    return {"train": np.concatenate([documents[i] for i in order]), "val": c4["val"]}


def main(out: str, *sources: str) -> None:
    """Write the mixture to the folder `out`."""
    with exit_on_user_error():
        splits = mixture(*sources)
    Path(out).mkdir(parents=True, exist_ok=True)
    for split, tokens in splits.items():
        np.save(f"{out}/{split}.npy", tokens)
        print(f"{split}: {len(tokens):,} tokens, sha256 {hashlib.sha256(tokens.tobytes()).hexdigest()}")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
