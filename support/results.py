"""The results of a training run: its files, and what is printed at the end."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from support.checkpoint import ROOT, to_bytes
from support.config import dump_config, load_config
from support.files import json_text, write_together
from support.hardware import peak_memory_mib
from support.plots import plot_curve
from support.progress import RunFacts
from support.run_folder import RESULTS, WORKING_METRICS
from support.screen import bold, duration, heading, next_commands, show_facts, show_note, show_text
from support.setup import Setup

SAMPLE_PROMPT = "The city"
EXPECTED_VAL_LOSS = {"smoke": 7.69, "GPT-tiny": 6.88}  # shipped configurations on the bundled sample


def write_results(
    folder: Path, facts: RunFacts, model: torch.nn.Module, result: dict[str, float], seconds: float
) -> dict[str, str]:
    """Write model.pt, config.yaml, eval.json, run.json, metrics.csv and curve.png; return facts to print.

    `result` comes from `evaluate`; the run has trained for `seconds`. May raise OSError; the former results
    are then unchanged.
    """
    setup, c = facts.setup, facts.setup.config
    seconds_per_step = seconds / c.num_training_steps
    n_predictions = setup.corpus.n_predictions(c.seq_len)
    peak = peak_memory_mib(setup.device)
    measured = {
        "seconds": seconds,
        "tokens-per-second": setup.tokens_per_step / seconds_per_step,
        "tflops": facts.flops / seconds / 1e12,
        "matrix-product-tflops": facts.peak_flops_per_second / 1e12,
        "peak-memory-mib": peak,
        "flops": facts.flops,
        "device": setup.hardware.name,
        "dtype": str(setup.hardware.dtype),
        "allocator": os.environ.get("LD_PRELOAD") or "system default",  # it decides much of the speed on a CPU
        "torch": torch.__version__,
    }
    evaluation = {**result, "tokens-predicted": n_predictions, "seq_len": c.seq_len}
    weights = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    write_together(
        {
            folder / "model.pt": to_bytes(weights),
            folder / "config.yaml": dump_config(c).encode(),
            folder / "eval.json": json_text(evaluation).encode(),
            folder / "run.json": json_text(measured).encode(),
            folder / "metrics.csv": (folder / WORKING_METRICS).read_bytes(),
        }
    )
    title = f"{folder.name} on {setup.corpus.name}"
    levels = (result["val-loss"], facts.ln_vocab, facts.unigram_entropy)
    plot_curve(folder / "metrics.csv", *levels, title, folder / "curve.png")
    return {
        "trained": f"{c.num_training_steps} steps in {duration(seconds)}, {facts.speed(seconds_per_step)}",
        "memory": f"{peak:.0f} MiB at the peak",
        "evaluated": f"{n_predictions:,} predicted tokens, seq_len {c.seq_len}",
        "written": f"{folder}/ {', '.join(RESULTS)}",
    }


def show_results(folder: Path, facts: RunFacts, result: dict[str, float], written: dict[str, str]) -> None:
    """Print the loss, what it means, and how it was reached."""
    heading("result")
    val_loss, perplexity = result["val-loss"], result["val-perplexity"]
    print("  " + bold(f"validation loss {val_loss:.3f} nats, perplexity {perplexity:.1f}"))
    print(f"  {_meaning(folder, facts, val_loss)}\n")
    show_facts(written)


def show_sample(checkpoint: Path, generate: Callable[[str], str]) -> None:
    """Print a prompt with its continuation `generate(prompt)`, and the next commands to type."""
    try:
        show_text(SAMPLE_PROMPT, generate(SAMPLE_PROMPT))
    except NotImplementedError:
        show_note("No sample text: generate() in generate.py is not written yet (question 3.1).")
    next_commands(
        f"python generate.py --prefixes prefixs.json --checkpoint {checkpoint}",
        f"python classify.py {checkpoint}",
    )


def _meaning(folder: Path, facts: RunFacts, val_loss: float) -> str:
    """Compare the loss with two simple guesses, and with what this configuration should reach."""
    if not math.isfinite(val_loss):
        return "The loss is not finite: the run diverged; lower max_lr or lengthen the warm-up."
    below_uniform, below_unigrams = facts.ln_vocab - val_loss, facts.unigram_entropy - val_loss
    text = f"{below_uniform:.2f} below a uniform guess"
    if below_uniform <= 0:
        text = "No better than a uniform guess: nothing was learned."
    elif below_unigrams <= 0:
        text += ", not yet below word frequencies alone: train longer or with a higher max_lr."
    else:
        text += f" and {below_unigrams:.2f} below word frequencies alone: the model is using context."
    corpus, config = facts.setup.corpus, facts.setup.config
    if folder.name in EXPECTED_VAL_LOSS and corpus.is_sample:
        shipped = load_config(str(ROOT / "configs" / f"{folder.name}.yaml"))
        if not config.differing(shipped.flat()):
            text += f" Expected for this configuration: about {EXPECTED_VAL_LOSS[folder.name]:.2f}."
    return text


def show_evaluation(checkpoint: str, setup: Setup, result: dict[str, float]) -> None:
    """Print the loss of a checkpoint, and what it was measured on."""
    heading("evaluate")
    show_facts({"model": checkpoint, "data": f"the val split of {setup.corpus.name}"})
    loss, perplexity, seq_len = result["val-loss"], result["val-perplexity"], setup.config.seq_len
    print("  " + bold(f"validation loss {loss:.4f} nats per token, perplexity {perplexity:.5g}"))
    print(f"  over {setup.corpus.n_predictions(seq_len):,} predicted tokens in rows of seq_len {seq_len}")
