"""Build a token file, or a sample of reviews.

    python data/prepare.py texts.jsonl.gz tokens.npz           then: python train.py CONFIG --data tokens.npz
    python data/prepare.py pages.jsonl.gz part.npz --tokens 1000000       also writes part_titles.txt
    python data/prepare.py reviews.jsonl sample.jsonl --reviews 1000

SOURCE is a .jsonl or .jsonl.gz with a field `text`, or a text file (documents between `<|endoftext|>`).
The same command gives the same file. data/README.md has the commands of the bundled files.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.corpus import read_jsonl, read_pieces, save_npz, split_held_out, tokenise  # noqa: E402
from support.errors import UserError, exit_on_user_error  # noqa: E402
from support.files import write_atomically  # noqa: E402
from support.tokenizer import get_tokenizer  # noqa: E402

SEED = 42
TITLES_HEADER = "# Documents in the token file of this name, as split, tab, title; licence: see README.md\n"


def cut_at_sentence(text: str, max_chars: int) -> str:
    """At most `max_chars` characters of `text`, up to a sentence that ends a line or else any sentence."""
    if len(text) <= max_chars:
        return text
    for end in (r"[.!?](?=\n)", r"[.!?](?=\s)"):
        cuts = [match.end() for match in re.finditer(end, text[: max_chars + 1])]
        if cuts and cuts[-1] > max_chars // 2:
            return text[: cuts[-1]]
    return text[:max_chars]


def is_prose(title: str, text: str) -> bool:
    """Whether a page is sentences throughout: no stub, list, calendar page, table, formulas or references."""
    lines = [line.rstrip() for line in text.splitlines()]
    in_sentences = sum(len(line) for line in lines if len(line) > 80 and line.endswith((".", '"', ")")))
    plain = sum(character.isascii() and (character.isalpha() or character in " ,.") for character in text)
    return (
        len(text) >= 1000
        and in_sentences > 0.95 * len(text)
        and plain > 0.94 * len(text)
        and not re.match(r"Lists? of |Timeline |\d+", title)
        and not re.search(r"may refer to|ISBN|https?:", text)
    )


def select_documents(source: Path, max_chars: int | None, prose_only: bool) -> Iterator[dict]:
    """The objects of a jsonl source, their texts cut to `max_chars`; only pages of prose if asked for."""
    for _, record in read_jsonl(source):
        title = str(record.get("title", ""))
        text = cut_at_sentence(record["text"], max_chars) if max_chars else record["text"]
        if text.strip() and (not prose_only or is_prose(title, text)):
            yield {"title": title, "text": text}


def draw_tokens(documents: list[dict], n_train: int, n_val: int) -> tuple[dict, dict]:
    """({split: tokens}, {split: titles}) of whole documents drawn at random; no document is in both splits.

    A split ends with the document that brings it to its number of tokens; UserError when they do not suffice.
    """
    random.Random(SEED).shuffle(documents)
    remaining, tokens, titles = iter(documents), {}, {}
    for split, wanted in (("val", n_val), ("train", n_train)):
        arrays, titles[split], missing = [], [], wanted
        while missing > 0:
            document = next(remaining, None)
            if document is None:
                raise UserError(f"--tokens: the source lacks {missing:,} {split} tokens; ask for fewer")
            arrays.append(tokenise([(document["text"], True)], get_tokenizer())[0])
            titles[split].append(document["title"])
            missing -= len(arrays[-1])
        tokens[split] = np.concatenate(arrays)
    return tokens, titles


def draw_reviews(source: Path, n_reviews: int) -> list[dict]:
    """Distinct reviews of at least four words, half of them of each label, in random order."""
    by_label = {0: {}, 1: {}}  # dicts, to drop repeated texts and keep the order
    for number, record in read_jsonl(source):
        if record.get("label") not in (0, 1):
            raise UserError(f"{source}, line {number}: label {record.get('label')!r}; it must be 0 or 1")
        if len(record["text"].split()) >= 4:
            by_label[record["label"]][record["text"]] = None
    if min(map(len, by_label.values())) < n_reviews // 2:
        raise UserError(f"--reviews {n_reviews}: {source} has too few for half of each label; ask for fewer")
    draw, chosen = random.Random(SEED), []
    for label, texts in by_label.items():
        chosen += [{"text": text, "label": label} for text in draw.sample(list(texts), n_reviews // 2)]
    draw.shuffle(chosen)
    return chosen


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--prose-only", action="store_true", help="skip stubs, lists, tables and the like")
    for option, text in (
        ("--max-chars-per-document", "cut longer ones at the end of a sentence"),
        ("--tokens", "draw documents at random until they give N training tokens"),
        ("--val-tokens", "with --tokens: as many held-out tokens (default: a twentieth)"),
        ("--reviews", "draw N reviews, half of each label, instead of tokens"),
    ):
        parser.add_argument(option, type=positive_int, metavar="N", help=text)
    with exit_on_user_error():
        prepare(parser.parse_args(argv))


def prepare(arguments: argparse.Namespace) -> None:
    source, out, max_chars = arguments.source, arguments.out, arguments.max_chars_per_document
    if not source.is_file() or not out.parent.is_dir():
        raise UserError(f"{out.parent if source.is_file() else source} does not exist; mend the path")
    if arguments.reviews:
        reviews = draw_reviews(source, arguments.reviews)
        write_atomically(out, "".join(json.dumps(review) + "\n" for review in reviews))
        print(f"{out}: {len(reviews):,} reviews")
        return
    if out.suffix != ".npz":
        raise UserError(f"{out}: a token file ends in .npz; change its name")
    documents = select_documents(source, max_chars, arguments.prose_only)
    if arguments.tokens:
        n_val = arguments.val_tokens or -(-arguments.tokens // 20)
        tokens, titles = draw_tokens(list(documents), arguments.tokens, n_val)
        lines = [f"{split}\t{title}\n" for split in titles for title in sorted(titles[split])]
        write_atomically(out.with_name(f"{out.stem}_titles.txt"), TITLES_HEADER + "".join(lines))
    else:
        selected = ((document["text"], True) for document in documents)
        pieces = selected if max_chars or arguments.prose_only else read_pieces(source)
        all_tokens, lengths = tokenise(pieces, get_tokenizer())
        if not lengths:
            raise UserError(f"{source}: holds no text that the options admit; relax them")
        tokens = dict(zip(("train", "val"), split_held_out(all_tokens, lengths), strict=True))
    save_npz(out, compress=True, **tokens)
    print(f"{out}: {len(tokens['train']):,} train and {len(tokens['val']):,} val tokens")


if __name__ == "__main__":
    main()
