"""The prompts of generate.py, and what it prints and writes."""

import json
from argparse import Namespace
from pathlib import Path

from support.checkpoint import TrainedModel
from support.errors import UserError, require
from support.files import write_atomically
from support.paths import ROOT
from support.screen import heading, show_facts, show_note, show_text


def read_prefixes(path: str | None) -> list[str]:
    """The prefixes of a file in order, by default prefixs.json; UserError names the entry or line that is wrong.

    The file is a JSON list or JSON lines; each entry is a string or an object like {"prefix": "…"}.
    """
    where = path = path or ROOT / "prefixs.json"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            entries = [(f"{path}, entry {n}", entry) for n, entry in enumerate(json.loads(text), start=1)]
        else:
            entries = []
            for n, line in enumerate(text.split("\n"), start=1):  # splitlines() also splits inside strings
                where = f"{path}, line {n}"
                if line.strip():
                    entries.append((where, json.loads(line)))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a JSON list of strings") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: invalid JSON ({error}); give a list of strings, or one per line") from None
    require(bool(entries), f"{path}: contains no prefix; give a JSON list of strings")
    prefixes = []
    for where, entry in entries:
        prefix = entry.get("prefix") if isinstance(entry, dict) else entry
        require(isinstance(prefix, str), f'{where}: neither a string nor an object like {{"prefix": "…"}}')
        prefixes.append(prefix)
    return prefixes


def show_generation_header(trained: TrainedModel, args: Namespace) -> None:
    """Print which model generates, and how it samples."""
    parts = ["greedy (temperature 0)" if args.temperature == 0 else f"temperature {args.temperature:g}"]
    parts += [f"top_k {args.top_k}"] if args.top_k else []
    parts += [f"top_p {args.top_p:g}"] if args.top_p else []
    parts += [f"seed {args.seed}"] if args.temperature > 0 else []
    parts += [f"up to {args.max_new_tokens} new tokens"]
    heading("generate")
    show_facts({**trained.facts(), "sampling": ", ".join(parts)})
    defaults = {"top_k": None, "top_p": None, "seed": 0, "num_samples": 1}
    unused = [f"--{name}" for name, default in defaults.items() if getattr(args, name) != default]
    if unused and args.temperature == 0:
        show_note(f"{', '.join(unused)}: no effect at temperature 0; sample with --temperature 0.8, for example.")


def report_texts(trained: TrainedModel, prompts: list[str], texts: list[str], seconds: float) -> None:
    """Print each prompt with its continuation; write generation.jsonl beside the checkpoint.

    Generating took `seconds`.
    """
    lines = []
    for prompt, text in zip(prompts, texts, strict=True):
        show_text(prompt, text)
        lines.append(json.dumps({"prefix": prompt, "generation": text}, ensure_ascii=False) + "\n")
    path = trained.folder / "generation.jsonl"
    write_atomically(path, "".join(lines))
    print(f"{len(texts)} text{'s' * (len(texts) > 1)} in {seconds:.1f} s, written to {path}")
