"""Build tokens to train on, or a sample of reviews.

    python data/prepare.py texts.jsonl.gz tokens                   then: python train.py CONFIG --data tokens
    python data/prepare.py hf:allenai/c4 tokens --config en --tokens 1000000000
    python data/prepare.py texts.jsonl.gz part.npz --tokens 1000000
    python data/prepare.py texts.jsonl.gz test.npz --val-only      only held-out tokens, to grade question 2.6 on
    python data/prepare.py reviews.jsonl sample.jsonl --reviews 1000

SOURCE is JSON lines with a field `text`, a text file (documents separated by `<|endoftext|>`), a folder of these,
or hf:NAME, the train split of a dataset of the Hugging Face Hub with a column `text`, streamed as far as needed.
OUT is a folder, which training memory-maps, or an .npz. Documents stay whole with --tokens; without it, the last
tokens of the source are held out. Tokens are kept on disk, not in memory. The same command gives the same files.
"""

import json
import random
import sys
import zipfile
from argparse import Namespace, RawDescriptionHelpFormatter
from array import array
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.errors import (  # noqa: E402
    ArgumentParser,
    UserError,
    exit_on_user_error,
    first_line,
    positive_int,
    require,
)
from support.files import atomic_file, write_atomically  # noqa: E402
from support.text import read_documents, read_reviews  # noqa: E402
from support.tokenizer import get_tokenizer, n_held_out, save_tokens, tokenise  # noqa: E402

SEED = 42
HUB = "hf:"


def hub_documents(source: str, config: str | None) -> Iterator[str]:
    """The column `text` of the train split of a dataset of the Hugging Face Hub, streamed."""
    name = source.removeprefix(HUB)
    try:
        from huggingface_hub import HfApi

        HfApi().dataset_info(name, timeout=8)  # a quick answer if there is no network
        import datasets

        rows = datasets.load_dataset(name, config, split="train", streaming=True)
        for row in tqdm(rows, unit=" documents", disable=None):
            yield row["text"]
    except Exception as error:  # the clients raise dozens of types, a dataset without `text` a KeyError
        raise UserError(f"{source}: cannot be read ({type(error).__name__}: {first_line(error)})") from None


def draw_reviews(source: str, n_reviews: int) -> list[dict]:
    """Distinct reviews of at least four words in random order, as many of each label (one more of 1 if odd)."""
    by_label = {0: {}, 1: {}, None: {}}  # dicts, to drop repeated texts and keep the order
    for text, label in read_reviews(Path(source)):
        if len(text.split()) >= 4:
            by_label[label][text] = None
    draw, chosen = random.Random(SEED), []
    for label, n in ((0, n_reviews // 2), (1, n_reviews - n_reviews // 2)):
        texts = list(by_label[label])
        problem = f"--reviews {n_reviews}: {source} has only {len(texts)} of label {label}"
        require(len(texts) >= n, f"{problem}; ask for fewer")
        chosen += [{"text": text, "label": label} for text in draw.sample(texts, n)]
    draw.shuffle(chosen)
    return chosen


def choose_tokens(args: Namespace, spool: BinaryIO) -> dict[str, list[tuple[int, int]]]:
    """Write the tokens of the source to the spool; return starts and ends of what each split takes of them."""
    streamed = args.source.startswith(HUB)
    documents = hub_documents(args.source, args.config) if streamed else read_documents(Path(args.source))
    wanted = {"val": args.val_tokens or -(-(args.tokens or 0) // 20), "train": args.tokens or 0}
    lengths, missing = array("q"), dict(wanted)
    for length in tokenise(documents, get_tokenizer(), spool):
        lengths.append(length)
        missing["val" if missing["val"] > 0 else "train"] -= length
        if streamed and any(wanted.values()) and max(missing.values()) <= 0:
            break
    n_tokens, order = sum(lengths), array("q", range(len(lengths)))
    require(n_tokens > 0, f"{args.source}: no text found")
    if not any(wanted.values()):
        end = 0 if args.val_only else n_tokens - n_held_out(n_tokens)
        return {"train": [(0, end)], "val": [(end, n_tokens)]}
    if not streamed:
        random.Random(SEED).shuffle(order)
    found = f"{args.source} has {len(lengths):,} document{'s' * (len(lengths) > 1)} with {n_tokens:,} tokens"
    asked = f"too few for {wanted['train']:,} train and {wanted['val']:,} val tokens in whole documents"
    ends, documents, runs = list(accumulate(lengths)), iter(order), {}
    for split, missing in wanted.items():
        runs[split] = []
        while missing > 0:
            n = next(documents, None)
            require(n is not None, f"{found}, {asked}; ask for fewer, or leave out --tokens to cut anywhere")
            runs[split].append((ends[n] - lengths[n], ends[n]))
            missing -= lengths[n]
    return runs


def write_tokens(out: Path, spool: BinaryIO, runs: dict[str, list[tuple[int, int]]]) -> None:
    """Write the runs of each split to an .npz or a folder."""
    if out.suffix == ".npz":
        with atomic_file(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for split in runs:
                with archive.open(f"{split}.npy", "w", force_zip64=True) as member:
                    save_tokens(member, spool, runs[split])
        return
    out.mkdir(exist_ok=True)
    for split in runs:
        with atomic_file(out / f"{split}.npy") as file:
            save_tokens(file, spool, runs[split])


def main(argv: list[str] | None = None) -> None:
    """Write the tokens or reviews that the command line asks for."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--config", metavar="NAME", help="the configuration of a dataset that has several")
    number = {"type": positive_int, "metavar": "N"}
    text = "as many held-out tokens (default: a twentieth of --tokens, or all with --val-only)"
    parser.add_argument("--val_tokens", **number, help=text)
    kind = parser.add_mutually_exclusive_group()
    text = "take documents, of a file at random, until they give N training tokens"
    kind.add_argument("--tokens", **number, help=text)
    kind.add_argument("--val_only", action="store_true", help="an .npz without tokens to train on")
    kind.add_argument("--reviews", **number, help="draw N reviews, half of each label, instead of tokens")
    args = parser.parse_args(argv)

    source, out, is_npz = args.source, args.out, args.out.suffix == ".npz"
    with exit_on_user_error():
        on_disk = Path(source).exists()
        require(on_disk or source.startswith(HUB), f"{source}: no such file or folder")
        require(out.parent.is_dir(), f"{out.parent}: no such folder")
        require(not (on_disk and out.exists() and out.samefile(source)), f"{out} is the source; name another file")
        if args.reviews:
            reviews = draw_reviews(source, args.reviews)
            write_atomically(out, "".join(json.dumps(review) + "\n" for review in reviews))
            print(f"{out}: {len(reviews):,} reviews")
            return
        require(is_npz or not out.is_file(), f"{out} is a file; write to an .npz or to a folder")
        require(
            is_npz or not args.val_only, f"--val-only: {out} must be an .npz: a folder needs tokens to train on"
        )
        require(args.tokens or args.val_only or not args.val_tokens, "--val-tokens needs --tokens or --val-only")
        with TemporaryFile(dir=out.parent) as spool:
            runs = choose_tokens(args, spool)
            runs = {"val": runs["val"]} if args.val_only else runs
            write_tokens(out, spool, runs)
        n_tokens = {split: sum(end - start for start, end in runs[split]) for split in sorted(runs)}
        print(f"{out}: {' and '.join(f'{n:,} {split}' for split, n in n_tokens.items())} tokens")


if __name__ == "__main__":
    main()
