"""Build the token files that come with the package, and the final model's training data.

    python data/build.py sample c4_sample.jsonl.gz     data/sample.npz
    python data/build.py mixture enwik8.gz             data/heldout-wikipedia.npz, outputs/report/mixture/

The mixture is Wikipedia without its held-out pages, and the training part of the sample several times over.
No training document shares N_WORDS consecutive words with a held-out one: those that would are left out. The
same input gives the same tokens; data/README.md says where the input comes from and lists the sha256 sums.
"""

import argparse
import gzip
import hashlib
import html
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))

from support.data import read_tokens  # noqa: E402
from support.errors import exit_on_user_error, require  # noqa: E402
from support.files import atomic_file  # noqa: E402
from support.text import read_json  # noqa: E402
from support.tokenizer import get_tokenizer  # noqa: E402

SAMPLE, HELD_OUT = DATA / "sample.npz", DATA / "heldout-wikipedia.npz"
HELD_OUT_TITLES = DATA / "heldout-wikipedia.txt"
MIXTURE = DATA.parent / "outputs/report/mixture"
SEED = 42
N_VAL_TOKENS = 100_000  # of the sample
N_WORDS = 13  # as in the contamination check of GPT-3 (Brown et al. 2020, appendix C)
C4_REPEATS = 4  # then a third of the mixture is C4. Up to about four passes over the same text are worth nearly
# as much as new text, and further ones still help, but less and less (Muennighoff et al. 2023).


def encode(text: str) -> np.ndarray:
    """The tokens of a document, followed by <|endoftext|>."""
    tokenizer = get_tokenizer()
    return np.array([*tokenizer.encode_ordinary(text), tokenizer.eot_token], dtype=np.uint16)


def decode_documents(tokens: np.ndarray) -> list[str]:
    """The texts of documents that each end with <|endoftext|>."""
    tokenizer = get_tokenizer()
    ends = np.flatnonzero(tokens == tokenizer.eot_token)
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(tokens[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]


def word_runs(text: str) -> Iterator[str]:
    """Every N_WORDS consecutive words, without punctuation and capitals."""
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[i : i + N_WORDS]) for i in range(len(words) - N_WORDS + 1))


def without_overlap(documents: Iterable[str], held_out: Iterable[str]) -> list[str]:
    """The documents that share no N_WORDS consecutive words with a held-out one."""
    forbidden = {run for text in held_out for run in word_runs(text)}
    return [text for text in documents if forbidden.isdisjoint(word_runs(text))]


def build_sample(source: Path) -> None:
    """data/sample.npz: random documents of the source held out, the rest to train on."""
    texts = [record["text"] for _, record in read_json(Path(source))]
    random.Random(SEED).shuffle(texts)
    n_val, n_tokens = 0, 0
    while n_tokens < N_VAL_TOKENS:
        n_tokens += len(encode(texts[n_val]))
        n_val += 1
    held_out, rest = texts[:n_val], texts[n_val:]
    training = without_overlap(rest, held_out)
    print(
        f"{len(training):,} documents to train on, {n_val:,} held out; "
        f"{len(rest) - len(training)} left out because they overlap with a held-out one"
    )
    write_npz(SAMPLE, train=concatenate(training), val=concatenate(held_out))


def wikipedia_pages(dump: str) -> Iterator[tuple[str, str]]:
    """(title, text) of the articles of a dump of March 2006, without most of the markup."""
    for title, text in re.findall(r"<title>([^<]*)</title>.*?<text[^>]*>(.*?)</text>", dump, re.S):
        if ":" in title or text.lower().startswith("#redirect"):
            continue
        text = html.unescape(html.unescape(text))
        text = re.sub(r"<!--.*?-->|<(ref|math|table|div|pre)\b.*?</\1>", "", text, flags=re.S | re.I)
        text = remove_innermost_first(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", text)  # templates, tables
        text = re.sub(r"\[\[(?:[^][|:]*\|)?([^][|:]*)\]\]", r"\1", text)  # [[page|words]]
        text = remove_innermost_first(r"\[\[[^][]*\]\]", text)  # pictures, categories, other languages
        text = re.sub(r"\[\w+://\S+ ?([^\]]*)\]", r"\1", text)  # links out of Wikipedia
        text = re.sub(r"'{2,}|<[^<>]*>", "", text)  # bold, italics, tags
        lines = (line.strip() for line in text.splitlines())
        text = "\n".join(line for line in lines if line and line[0] not in "=*#:;|!{}")
        if len(text) > 500:
            yield html.unescape(title), text


def remove_innermost_first(pattern: str, text: str) -> str:
    while (shorter := re.sub(pattern, "", text, flags=re.S)) != text:
        text = shorter
    return text


def build_mixture(dump: Path) -> None:
    """data/heldout-wikipedia.npz, and the folder with what the final model trains on and is evaluated on."""
    with gzip.open(dump, "rt", encoding="utf-8", errors="ignore") as file:
        pages = dict(wikipedia_pages(file.read()))
    titles = [line for line in HELD_OUT_TITLES.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    require(pages.keys() >= set(titles), f"{dump} does not contain all pages of {HELD_OUT_TITLES.name}")
    held_out = [pages.pop(title) for title in titles]
    c4_train, c4_val = read_tokens(SAMPLE, get_tokenizer().n_vocab)
    training = without_overlap(pages.values(), held_out + decode_documents(c4_val))
    c4 = without_overlap(decode_documents(c4_train), held_out)
    print(
        f"{len(training):,} pages to train on, {len(held_out)} held out; {len(pages) - len(training)} pages and "
        f"{len(decode_documents(c4_train)) - len(c4)} documents of C4 left out because they overlap"
    )
    write_npz(HELD_OUT, val=concatenate(held_out))
    documents = [encode(text) for text in training + c4]
    order = list(range(len(training))) + C4_REPEATS * list(range(len(training), len(documents)))
    random.Random(SEED).shuffle(order)
    MIXTURE.mkdir(parents=True, exist_ok=True)
    for split, tokens in (("train", np.concatenate([documents[i] for i in order])), ("val", c4_val)):
        with atomic_file(MIXTURE / f"{split}.npy") as file:
            np.save(file, tokens)
        report(MIXTURE / f"{split}.npy", split, tokens)


def concatenate(texts: Iterable[str]) -> np.ndarray:
    return np.concatenate([encode(text) for text in texts])


def write_npz(path: Path, **splits: np.ndarray) -> None:
    with atomic_file(path) as file:
        np.savez_compressed(file, **splits)
    for split, tokens in splits.items():
        report(path, split, tokens)


def report(path: Path, split: str, tokens: np.ndarray) -> None:
    """Print the size and the sha256 of the tokens themselves: a compressed file may differ with zlib."""
    digest = hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()
    print(f"{path.relative_to(DATA.parent)}: {split}, {len(tokens):,} tokens, sha256 {digest}")


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["sample", "mixture"])
    parser.add_argument("source", type=Path, metavar="SOURCE")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        require(args.source.is_file(), f"{args.source}: no such file")
        (build_sample if args.what == "sample" else build_mixture)(args.source)


if __name__ == "__main__":
    main()
