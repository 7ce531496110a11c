"""Build tokens to train on, or a sample of reviews.

    python data/prepare.py texts.jsonl.gz tokens                   then: python train.py CONFIG --data tokens
    python data/prepare.py hf:allenai/c4 tokens --config en --tokens 1000000000
    python data/prepare.py texts.jsonl.gz part.npz --tokens 1000000
    python data/prepare.py texts.jsonl.gz test.npz --val-only      only held-out tokens, to grade question 2.6 on
    python data/prepare.py reviews.jsonl sample.jsonl --reviews 1000

SOURCE is a .jsonl or .jsonl.gz with a field `text`, a text file (documents separated by `<|endoftext|>`), or
hf:NAME, the train split of a dataset of the Hugging Face Hub with a column `text`, streamed as far as needed.
OUT is a folder, which training memory-maps, or an .npz. The tokens are kept on disk, not in memory. The same
command gives the same files. data/build.py makes the token files that come with the package.
"""

import argparse
import json
import random
import sys
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.arguments import positive_int  # noqa: E402
from support.errors import UserError, exit_on_user_error, require  # noqa: E402
from support.files import atomic_file, write_atomically  # noqa: E402
from support.hub import HUB_SECONDS, reason  # noqa: E402
from support.text import n_held_out, read_documents, read_jsonl, tokenise  # noqa: E402
from support.tokenizer import get_tokenizer  # noqa: E402

SEED = 42
HUB = "hf:"


def hub_records(name: str, config: str | None) -> Iterator[dict]:
    """The rows of the train split of a dataset of the Hugging Face Hub, streamed."""
    from huggingface_hub import HfApi

    n_read = 0
    try:
        HfApi().dataset_info(name, timeout=HUB_SECONDS)  # a quick answer if there is no network
        import datasets

        for row in datasets.load_dataset(name, config, split="train", streaming=True):
            found = ", ".join(row)
            require(isinstance(row.get("text"), str), f"hf:{name}: no text in a column 'text' (found: {found})")
            yield row
            n_read += 1
    except UserError:
        raise
    except Exception as error:  # the clients raise dozens of types
        read = f" beyond document {n_read:,}" if n_read else ""
        raise UserError(f"hf:{name}: cannot be read{read} ({reason(error)}); fix that and retry") from None


def documents(source: str, config: str | None) -> Iterator[str]:
    """The documents of the source."""
    if source.startswith(HUB):
        return (record["text"] for record in hub_records(source.removeprefix(HUB), config))
    return read_documents(Path(source))


def draw(lengths: array, wanted: dict[str, int], order: Sequence[int]) -> dict[str, Sequence[int]]:
    """{split: documents}, taken in this order until each split has its number of tokens.

    Raises UserError if there are too few.
    """
    drawn, position = {}, 0
    for split, missing in wanted.items():
        first = position
        while missing > 0:
            enough = position < len(order)
            require(
                enough, f"the source lacks {missing:,} {split} tokens; ask for fewer with --tokens or --val-tokens"
            )
            missing -= lengths[order[position]]
            position += 1
        drawn[split] = order[first:position]
    return drawn


def draw_reviews(source: Path, n_reviews: int) -> list[dict]:
    """Distinct reviews of at least four words in random order, as many of each label (one more of 1 if odd)."""
    by_label = {0: {}, 1: {}}  # dicts, to drop repeated texts and keep the order
    for number, record in read_jsonl(source):
        if record.get("label") not in (0, 1):
            raise UserError(f"{source}, line {number}: label {record.get('label')!r}; it must be 0 or 1")
        if len(record["text"].split()) >= 4:
            by_label[record["label"]][record["text"]] = None
    draw, chosen = random.Random(SEED), []
    for label, n in ((0, n_reviews // 2), (1, n_reviews - n_reviews // 2)):
        texts = list(by_label[label])
        require(
            len(texts) >= n,
            f"--reviews {n_reviews}: {source} has only {len(texts)} of label {label}; ask for fewer",
        )
        chosen += [{"text": text, "label": label} for text in draw.sample(texts, n)]
    draw.shuffle(chosen)
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
        file.write(spool.read(2 * (end - start)))


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--config", metavar="NAME", help="the configuration of a dataset that has several")
    for option, text in (
        ("--tokens", "take documents, of a file at random, until they give N training tokens"),
        ("--val-tokens", "with --tokens or --val-only: as many held-out tokens (default: a twentieth, or all)"),
        ("--reviews", "draw N reviews, half of each label, instead of tokens"),
    ):
        parser.add_argument(option, type=positive_int, metavar="N", help=text)
    parser.add_argument(
        "--val-only", action="store_true", help="an .npz of held-out tokens, with none to train on"
    )
    with exit_on_user_error():
        prepare(parser.parse_args(argv))


def prepare(arguments: argparse.Namespace) -> None:
    source, out = arguments.source, arguments.out
    require(source.startswith(HUB) or Path(source).is_file(), f"{source}: no such file")
    require(out.parent.is_dir(), f"{out.parent}: no such folder")
    if arguments.reviews:
        reviews = draw_reviews(Path(source), arguments.reviews)
        write_atomically(out, "".join(json.dumps(review) + "\n" for review in reviews))
        print(f"{out}: {len(reviews):,} reviews")
        return
    a_file = out.suffix != ".npz" and out.is_file()
    require(not a_file, f"{out} is a file; write to an .npz or to a folder")
    if arguments.val_only:
        require(out.suffix == ".npz", f"--val-only: {out} must be an .npz; a folder needs tokens to train on")
        require(
            not arguments.tokens, "--val-only has no tokens to train on; use --val-tokens in place of --tokens"
        )
    with TemporaryFile(dir=out.parent) as spool:
        runs = choose(arguments, spool)
        write_tokens(out, spool, runs)
    n_tokens = {split: (runs[split][:, 1] - runs[split][:, 0]).sum() for split in runs}
    print(f"{out}: {' and '.join(f'{n:,} {split}' for split, n in sorted(n_tokens.items()))} tokens")


def choose(arguments: argparse.Namespace, spool: BinaryIO) -> dict[str, np.ndarray]:
    """Write the tokens of all documents to the spool; return which are train and val, as (n, 2) runs."""
    streamed, n_train = arguments.source.startswith(HUB), arguments.tokens or 0
    n_val = arguments.val_tokens or -(-n_train // 20)
    lengths, n_read = array("q"), {"val": 0, "train": 0}
    total = n_train + n_val if n_train or arguments.val_only else 0  # 0: all there are
    with tqdm(total=total or None, unit=" tokens", unit_scale=True, disable=None if streamed else True) as bar:
        for length in tokenise(documents(arguments.source, arguments.config), get_tokenizer(), spool):
            bar.update(length)
            lengths.append(length)
            n_read["val" if n_read["val"] < n_val else "train"] += length
            if streamed and total and n_read["val"] >= n_val and n_read["train"] >= n_train:
                break
    require(len(lengths) > 0, f"{arguments.source}: no text found")
    if not total:
        n_tokens = sum(lengths)
        end = 0 if arguments.val_only else n_tokens - n_held_out(n_tokens)
        runs = {"train": np.array([(0, end)]), "val": np.array([(end, n_tokens)])}
        return {"val": runs["val"]} if arguments.val_only else runs
    order = array("q", range(len(lengths)))
    if not streamed:
        random.Random(SEED).shuffle(order)
    drawn = draw(lengths, {"val": n_val, "train": n_train} if n_train else {"val": n_val}, order)
    ends = np.cumsum(lengths)
    runs = np.stack([ends - lengths, ends], axis=1)
    return {split: runs[np.array(drawn[split])] for split in drawn}


if __name__ == "__main__":
    main()
