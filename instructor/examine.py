"""Looks at a hand-in without running any of its code, in a separate process with limits; for grade.py.

    python examine.py unpack ZIP FOLDER           unpack what is graded, check imports and calls
    python examine.py perplexity FOLDER TOKENS    measure FOLDER/model.pt with the package's own model and loss

Prints the result as JSON. A hand-in against the rules gives `{"error": "…"}`.
"""

import json
import math
import os
import resource
import stat
import sys
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from submit import CODE, broken_rules  # noqa: E402

from support.errors import UserError, first_line, require  # noqa: E402

MEMORY_BYTES, MOST_ENTRIES = 4 << 30, 10_000
MOST_BYTES = dict.fromkeys(CODE, 1 << 20) | {"config.yaml": 1 << 20, "model.pt": 200 << 20}  # unpacked
BATCH_TOKENS = 4096


def unpack(path: Path, folder: Path) -> dict:
    """Unpack the graded files from the zip's top, or the one folder in it, and read the code.

    Returns {"problems": {file: [sentence, whether it can be run]}, "notes": [sentence]}.
    """
    with zipfile.ZipFile(path) as archive:
        entries = {}  # parts of the path -> entry
        for entry in archive.infolist():
            parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
            if entry.is_dir() or parts[0] == "__MACOSX":
                continue
            outside = (
                parts[0] == "/" or ":" in parts[0] or ".." in parts or stat.S_ISLNK(entry.external_attr >> 16)
            )
            require(not outside, f"the zip has a path outside its folder, or a link: {entry.filename[:200]!r}")
            require(parts not in entries, f"the zip has two files {entry.filename[:200]!r}")
            entries[parts] = entry
        require(len(entries) <= MOST_ENTRIES, f"the zip has {len(entries):,} files")
        places = {parts[:-1] for parts in entries if parts[-1] in CODE and len(parts) <= 2}
        places = {()} & places or places
        require(len(places) == 1, f"{', '.join(CODE)}: found in {len(places)} folders of the zip, expected one")
        (place,) = places
        problems = {}
        for name, most in MOST_BYTES.items():
            if entry := entries.pop((*place, name), None):
                with archive.open(entry) as file:
                    content = file.read(most + 1)  # whatever size the zip claims
                if len(content) > most:
                    problems[name] = [f"{name} has more than {most >> 20} MiB", False]
                    continue
                (folder / name).write_bytes(content)
                rules = broken_rules(name, content) if name in CODE else ()
                for problem in sorted(rules, key=lambda rule: rule[1])[:1]:  # first what keeps it from running
                    problems[name] = list(problem)
            else:
                problems[name] = [f"{name} is missing", False]
    pdfs = {parts for parts in entries if parts[-1].lower().endswith(".pdf")}
    others = ["/".join(parts) for parts in entries if parts not in pdfs]
    notes = [] if pdfs else ["no PDF of written answers in the zip"]
    notes += [f"ignored in the zip: {', '.join(others[:8])}" + " …" * (len(others) > 8)] if others else []
    return {"problems": problems, "notes": notes}


def perplexity(folder: Path, tokens: Path) -> dict:
    """{"perplexity": that of the hand-in's weights, over all predicted tokens of the `val` tokens}."""
    from submit import load_own_model

    from support.chunked_loss import loss_module
    from support.data import read_tokens
    from train import evaluate, sequential_batch_sampler

    os.chdir(folder)  # so that messages name model.pt, not its path
    trained, _, _ = load_own_model(Path("model.pt"))
    val, seq_len = read_tokens(tokens, trained.tokenizer.n_vocab)[1], trained.config.seq_len
    batches = sequential_batch_sampler(val, trained.device, -(-BATCH_TOKENS // seq_len), seq_len, drop_last=False)
    loss_fn = loss_module(trained.model, trained.device, compiled=False)
    found = evaluate(trained.model, batches, trained.hardware.autocast(), loss_fn=loss_fn)["val-perplexity"]
    require(math.isfinite(found), f"the perplexity is {found}")
    return {"perplexity": found}


def main() -> None:
    """Print the answer to one question about the hand-in."""
    what, *paths = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        answer = {"unpack": unpack, "perplexity": perplexity}[what](*map(Path, paths))
    except Exception as error:  # zipfile, zlib, yaml and torch raise many types for a foreign file
        answer = {
            "error": f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
        }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
