"""Build tokens to train on, or to evaluate on.

    python data/prepare.py texts.jsonl.gz tokens                   then: python train.py CONFIG --data tokens
    python data/prepare.py hf:allenai/c4 tokens --config en --tokens 1000000000
    python data/prepare.py texts.jsonl.gz test.npz --val-only      only held-out tokens, to grade question 2.6 on

SOURCE is JSON lines with a field `text`, a text file (documents separated by `<|endoftext|>`), a folder of these,
or hf:NAME, the train split of a dataset of the Hugging Face Hub with a column `text`, streamed as far as needed.
OUT is a folder, which training memory-maps, or an .npz. Documents are taken in order and the last tokens held out,
so shuffle a source that is sorted. Tokens are kept on disk, not in memory.
"""

import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
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
from support.files import atomic_file  # noqa: E402
from support.text import read_documents  # noqa: E402
from support.tokenizer import TOKEN, n_held_out, save_folder, tokenise  # noqa: E402

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


def write_tokens(source: str, documents: Iterator[str], wanted: int | None, spool: BinaryIO) -> int:
    """Write the tokens of the documents to the spool; return how many of them, from the start, are to train on.

    Given the number wanted to train on, takes whole documents, and a twentieth as many more tokens to hold out.
    """
    n_documents = n_tokens = n_train = 0
    wanted_val = -(-(wanted or 0) // 20)
    for length in tokenise(documents, spool):
        n_documents, n_tokens = n_documents + 1, n_tokens + length
        if wanted and n_train < wanted:
            n_train += length
        elif wanted and n_tokens - n_train >= wanted_val:
            break
    require(n_tokens > 0, f"{source}: no text found")
    if not wanted:
        return n_tokens - n_held_out(n_tokens)
    found = f"{source} has {n_documents:,} document{'s' * (n_documents > 1)} with {n_tokens:,} tokens"
    asked = f"too few for {wanted:,} train and {wanted_val:,} val tokens in whole documents"
    enough = n_tokens - n_train >= wanted_val
    require(enough, f"{found}, {asked}; ask for fewer, or leave out --tokens to cut anywhere")
    return n_train


def main(argv: list[str] | None = None) -> None:
    """Write the tokens that the command line asks for."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--config", metavar="NAME", help="the configuration of a dataset that has several")
    kind = parser.add_mutually_exclusive_group()
    text = "take whole documents until they give N tokens to train on, and N / 20 more to hold out"
    kind.add_argument("--tokens", type=positive_int, metavar="N", help=text)
    kind.add_argument("--val_only", action="store_true", help="an .npz without tokens to train on")
    args = parser.parse_args(argv)

    source, out, is_npz = args.source, args.out, args.out.suffix.lower() == ".npz"
    with exit_on_user_error():
        on_disk = Path(source).exists()
        require(on_disk or source.startswith(HUB), f"{source}: no such file or folder")
        require(out.parent.is_dir(), f"{out.parent}: no such folder")
        require(os.access(out.parent, os.W_OK), f"{out.parent}: cannot be written; name another folder")
        require(not (on_disk and out.exists() and out.samefile(source)), f"{out} is the source; name another file")
        require(is_npz or not out.is_file(), f"{out} is a file; write to an .npz or to a folder")
        require(is_npz or not args.val_only, f"--val-only: {out} is a folder, which needs train too; use an .npz")
        documents = read_documents(Path(source)) if on_disk else hub_documents(source, args.config)
        with TemporaryFile(dir=out.parent) as spool:
            n_train = write_tokens(source, documents, args.tokens, spool)
            tokens = np.memmap(spool, TOKEN, mode="r")
            splits = {"train": tokens[:n_train], "val": tokens[n_train:]}
            if args.val_only:
                splits = {"val": tokens}
            if is_npz:
                with atomic_file(out) as file:
                    np.savez_compressed(file, **splits)
            else:
                save_folder(out, splits)
            print(f"{out}: {' and '.join(f'{len(splits[split]):,} {split}' for split in splits)} tokens")


if __name__ == "__main__":
    main()
