"""Build the token files that come with the package, and the data that the final model was trained on.

    python data/build.py sample c4_sample.jsonl.gz     data/sample.npz
    python data/build.py wikipedia enwik8.gz           data/heldout-wikipedia.npz, the other pages as .jsonl.gz
    python data/build.py mixture sample:5 web_open.jsonl.gz:2 wikipedia_2014.jsonl.gz:1 wikipedia_2006.jsonl.gz:1

The mixture is a folder of tokens, outputs/report/NAME: the documents of the sources in random order, each as
many times as the number after the colon says. No training document shares N_WORDS words in a row with a held-out
one: those that would are left out. The same input gives the same tokens; data/README.md lists the sha256 sums.
"""

import argparse
import gzip
import hashlib
import html
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))

from support.errors import exit_on_user_error  # noqa: E402
from support.text import read_documents  # noqa: E402
from support.tokenizer import get_tokenizer  # noqa: E402

SAMPLE, HELD_OUT = DATA / "sample.npz", DATA / "heldout-wikipedia.npz"
HELD_OUT_TITLES = HELD_OUT.with_suffix(".txt")
OUTPUTS = DATA.parent / "outputs/report"
SEED = 42
N_VAL_TOKENS = 100_000  # of the sample
N_WORDS = 13  # as in the contamination check of GPT-3 (Brown et al. 2020, appendix C)


def encode(texts: Iterable[str]) -> list[np.ndarray]:
    """The tokens of each document, followed by <|endoftext|>."""
    tokenizer = get_tokenizer()
    rows = tokenizer.encode_ordinary_batch(list(texts))
    return [np.array([*row, tokenizer.eot_token], dtype=np.uint16) for row in rows]


def decode_documents(tokens: np.ndarray) -> list[str]:
    """The texts of documents that each end with <|endoftext|>."""
    tokenizer = get_tokenizer()
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_token) + 1)[:-1]
    return [tokenizer.decode(document[:-1].tolist()) for document in documents]


def word_runs(text: str) -> Iterator[str]:
    """Every N_WORDS consecutive words, without punctuation and capitals."""
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[i : i + N_WORDS]) for i in range(len(words) - N_WORDS + 1))


def without_overlap(documents: Iterable[str], held_out: Iterable[str]) -> list[str]:
    """The documents that share no N_WORDS consecutive words with a held-out one."""
    forbidden = {run for text in held_out for run in word_runs(text)}
    return [text for text in documents if forbidden.isdisjoint(word_runs(text))]


def build_sample(source: str) -> None:
    """data/sample.npz: random documents of the source held out, the rest to train on."""
    texts = list(read_documents(Path(source)))
    random.Random(SEED).shuffle(texts)
    documents = encode(texts)
    n_val = int(np.searchsorted(np.cumsum([len(tokens) for tokens in documents]), N_VAL_TOKENS)) + 1
    train = encode(without_overlap(texts[n_val:], texts[:n_val]))
    print(f"{len(train):,} documents to train on, {n_val:,} held out; {len(texts) - n_val - len(train)} left out")
    save(SAMPLE, train=np.concatenate(train), val=np.concatenate(documents[:n_val]))


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


def build_wikipedia(source: str) -> None:
    """data/heldout-wikipedia.npz, and outputs/report/wikipedia_2006.jsonl.gz with the other pages."""
    with gzip.open(source, "rt", encoding="utf-8", errors="ignore") as file:
        pages = dict(wikipedia_pages(file.read()))
    titles = [line for line in HELD_OUT_TITLES.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    save(HELD_OUT, val=np.concatenate(encode(pages.pop(title) for title in titles)))
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    with gzip.open(OUTPUTS / "wikipedia_2006.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"title": title, "text": text}) + "\n" for title, text in pages.items())
    print(f"{len(pages):,} pages: outputs/report/wikipedia_2006.jsonl.gz")


def build_mixture(*sources: str, name: str = "mixture") -> None:
    """outputs/report/NAME: train.npy from the sources, val.npy of the sample."""
    sample = np.load(SAMPLE)
    held_out = decode_documents(sample["val"]) + decode_documents(np.load(HELD_OUT)["val"])
    documents, order = [], []
    for source in sources:
        path, _, weight = source.rpartition(":")
        texts = decode_documents(sample["train"]) if path == "sample" else list(read_documents(Path(path)))
        kept = encode(without_overlap(texts, held_out))
        n_tokens = sum(map(len, kept))
        print(
            f"{path}: {len(texts):,} documents, {len(texts) - len(kept)} left out, {n_tokens:,} tokens × {weight}"
        )
        order += int(weight) * list(range(len(documents), len(documents) + len(kept)))
        documents += kept
    random.Random(SEED).shuffle(order)
    folder = OUTPUTS / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, tokens in (("train", np.concatenate([documents[i] for i in order])), ("val", sample["val"])):
        np.save(folder / f"{split}.npy", tokens)
        report(folder, split, tokens)


def save(path: Path, **splits: np.ndarray) -> None:
    np.savez_compressed(path, **splits)
    for split, tokens in splits.items():
        report(path, split, tokens)


def report(path: Path, split: str, tokens: np.ndarray) -> None:
    """Print the size and the sha256 of the tokens themselves: a compressed file may differ with zlib."""
    digest = hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()
    print(f"{path.relative_to(DATA.parent)}: {split}, {len(tokens):,} tokens, sha256 {digest}")


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    builders = {"sample": build_sample, "wikipedia": build_wikipedia, "mixture": build_mixture}
    parser.add_argument("what", choices=list(builders))
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--name", default="mixture", help="of the mixture (default: mixture)")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        builders[args.what](*args.sources, **({"name": args.name} if args.what == "mixture" else {}))


if __name__ == "__main__":
    main()
