"""What generate.py prints and writes."""

import json
from argparse import Namespace

from support.checkpoint import TrainedModel
from support.files import write_atomically
from support.screen import heading, next_commands, show_facts, show_text


def show_generation_header(trained: TrainedModel, args: Namespace) -> None:
    """Print which model generates, and how it samples."""
    parts = ["greedy (temperature 0)" if args.temperature == 0 else f"temperature {args.temperature:g}"]
    parts += [f"top_k {args.top_k}"] if args.top_k else []
    parts += [f"top_p {args.top_p:g}"] if args.top_p else []
    parts += [f"seed {args.seed}"] if args.temperature > 0 else []
    parts += [f"up to {args.max_new_tokens} new tokens"]
    heading("generate")
    show_facts({**trained.facts(), "sampling": ", ".join(parts)})


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
    print(f"{len(texts)} texts in {seconds:.1f} s, written to {path}")
    next_commands(f"python generate.py --checkpoint {trained.path} --temperature 0.8")
