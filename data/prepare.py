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
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.arguments import ArgumentParser, positive_int  # noqa: E402
from support.errors import UserError, exit_on_user_error, first_line, require  # noqa: E402
from support.files import atomic_file, write_atomically  # noqa: E402
from support.text import read_documents, read_reviews  # noqa: E402
from support.tokenizer import get_tokenizer, n_held_out, tokenise  # noqa: E402

SEED = 42
HUB = "hf:"


def hub_documents(name: str, config: str | None) -> Iterator[str]:
    """The column `text` of the train split of a dataset of the Hugging Face Hub, streamed."""
    try:
        from huggingface_hub import HfApi

        HfApi().dataset_info(name, timeout=8)  # a quick answer if there is no network
        import datasets

        for row in datasets.load_dataset(name, config, split="train", streaming=True):
            require(isinstance(row.get("text"), str), f"hf:{name}: no column 'text' (found: {', '.join(row)})")
            yield row["text"]
    except UserError:
        raise
    except Exception as error:  # the clients raise dozens of types
        raise UserError(f"hf:{name}: cannot be read ({type(error).__name__}: {first_line(error)})") from None


def draw_reviews(source: str, n_reviews: int) -> list[dict]:
    """Distinct reviews of at least four words in random order, as many of each label (one more of 1 if odd)."""
    by_label = {0: {}, 1: {}}  # dicts, to drop repeated texts and keep the order
    for text, label in read_reviews(Path(source)):
        require(label is not None, f"{source}: a review without a label; --reviews needs labels of 0 or 1")
        if len(text.split()) >= 4:
            by_label[label][text] = None
    draw, chosen = random.Random(SEED), []
    for label, n in ((0, n_reviews // 2), (1, n_reviews - n_reviews // 2)):
        texts = list(by_label[label])
        problem = f"{source} has only {len(texts)} of label {label}; ask for fewer"
        require(len(texts) >= n, f"--reviews {n_reviews}: {problem}")
        chosen += [{"text": text, "label": label} for text in draw.sample(texts, n)]
    draw.shuffle(chosen)
    return chosen


def choose_tokens(args: Namespace, spool: BinaryIO) -> dict[str, np.ndarray]:
    """Write the tokens of the source to the spool; return the runs of each split: (n, 2) starts and ends."""
    streamed = args.source.startswith(HUB)
    wanted = {"val": args.val_tokens or -(-(args.tokens or 0) // 20), "train": args.tokens or 0}
    if streamed:
        documents = hub_documents(args.source.removeprefix(HUB), args.config)
    else:
        documents = read_documents(Path(args.source))
    lengths, missing = array("q"), dict(wanted)
    with tqdm(total=sum(wanted.values()) or None, unit=" tokens", unit_scale=True, delay=1, disable=None) as bar:
        for length in tokenise(documents, get_tokenizer(), spool):
            bar.update(length)
            lengths.append(length)
            missing["val" if missing["val"] > 0 else "train"] -= length
            if streamed and any(wanted.values()) and max(missing.values()) <= 0:
                break
    n_tokens, ends = sum(lengths), np.cumsum(lengths)
    require(n_tokens > 0, f"{args.source}: no text found")
    if not any(wanted.values()):
        end = 0 if args.val_only else n_tokens - n_held_out(n_tokens)
        return {"train": np.array([(0, end)]), "val": np.array([(end, n_tokens)])}
    runs, order = np.stack([ends - lengths, ends], axis=1), np.arange(len(lengths))
    if not streamed:
        random.Random(SEED).shuffle(order)
    found = f"{args.source} has {len(lengths):,} document{'s' * (len(lengths) > 1)} with {n_tokens:,} tokens"
    asked = f"too few for {wanted['train']:,} train and {wanted['val']:,} val tokens in whole documents"
    chosen, position = {}, 0
    for split, missing in wanted.items():
        first = position
        while missing > 0:
            require(
                position < len(order), f"{found}, {asked}; ask for fewer, or leave out --tokens to cut anywhere"
            )
            missing -= lengths[order[position]]
            position += 1
        chosen[split] = runs[order[first:position]]
    return chosen


def write_tokens(out: Path, spool: BinaryIO, runs: dict[str, np.ndarray]) -> None:
    """Write the runs of each split as an .npz or a folder, replacing what is there only when all is written."""
    with ExitStack() as files:
        if out.suffix == ".npz":
            file = files.enter_context(atomic_file(out))
            archive = files.enter_context(zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED))
            for split in runs:
                with archive.open(f"{split}.npy", "w", force_zip64=True) as member:
                    write_runs(member, spool, runs[split])
        else:
            out.mkdir(exist_ok=True)
            for split in runs:
                write_runs(files.enter_context(atomic_file(out / f"{split}.npy")), spool, runs[split])


def write_runs(file: BinaryIO, spool: BinaryIO, runs: np.ndarray) -> None:
    """Write parts of a file of bare uint16 tokens as one .npy; runs (n, 2) are their starts and ends."""
    n_tokens = int((runs[:, 1] - runs[:, 0]).sum())
    npy.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (n_tokens,)})
    for start, end in runs.tolist():
        spool.seek(2 * start)
        for position in range(start, end, 1 << 20):
            file.write(spool.read(2 * min(1 << 20, end - position)))


def main(argv: list[str] | None = None) -> None:
    """Write the tokens or reviews; see the module's docstring."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--config", metavar="NAME", help="the configuration of a dataset that has several")
    for option, text in (
        ("--tokens", "take documents, of a file at random, until they give N training tokens"),
        ("--val_tokens", "with --tokens or --val-only: as many held-out tokens (default: a twentieth, or all)"),
        ("--reviews", "draw N reviews, half of each label, instead of tokens"),
    ):
        parser.add_argument(option, type=positive_int, metavar="N", help=text)
    parser.add_argument(
        "--val_only", action="store_true", help="an .npz of held-out tokens, with none to train on"
    )
    args = parser.parse_args(argv)
    with exit_on_user_error():
        prepare(args)


def prepare(args: Namespace) -> None:
    """Check what was asked for, then do it."""
    source, out = args.source, args.out
    require(source.startswith(HUB) or Path(source).exists(), f"{source}: no such file or folder")
    require(out.parent.is_dir(), f"{out.parent}: no such folder")
    require(
        not (out.exists() and Path(source).exists() and out.samefile(source)),
        f"{out} is the source; write to another file",
    )
    if args.reviews:
        reviews = draw_reviews(source, args.reviews)
        write_atomically(out, "".join(json.dumps(review) + "\n" for review in reviews))
        print(f"{out}: {len(reviews):,} reviews")
        return
    is_npz = out.suffix == ".npz"
    require(is_npz or not out.is_file(), f"{out} is a file; write to an .npz or to a folder")
    require(is_npz or not args.val_only, f"--val-only: {out} must be an .npz; a folder needs tokens to train on")
    require(not (args.val_only and args.tokens), "--val-only goes with --val-tokens, not with --tokens")
    require(args.tokens or args.val_only or not args.val_tokens, "--val-tokens needs --tokens or --val-only")
    with TemporaryFile(dir=out.parent) as spool:
        runs = choose_tokens(args, spool)
        write_tokens(out, spool, {split: runs[split] for split in runs if split == "val" or not args.val_only})
    n_tokens = {split: (runs[split][:, 1] - runs[split][:, 0]).sum() for split in runs}
    print(f"{out}: {n_tokens['train']:,} train and {n_tokens['val']:,} val tokens")


if __name__ == "__main__":
    main()
