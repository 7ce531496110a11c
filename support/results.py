"""What came of a training run: its files, and what the person reads at the end."""

import math
import os

import torch

from support.checkpoint import ROOT, to_bytes
from support.config import dump_config, load_config
from support.files import json_text, write_together
from support.hardware import peak_memory_mib
from support.plots import plot_curve
from support.screen import bold, duration, heading, next_commands, show_facts, show_text

EXPECTED_VAL_LOSS = {"smoke": 7.61, "GPT-tiny": 6.90}  # shipped configurations on the bundled sample
FILES = ("model.pt", "config.yaml", "eval.json", "metrics.csv", "curve.png", "run.json", "training_state.pt")


def write_results(run, result: dict[str, float], n_predictions: int) -> dict[str, str]:
    """Write model.pt with its config.yaml, eval.json and run.json, then draw curve.png; return facts to print.

    May raise OSError; the former results then stand as they were.
    """
    c = run.config
    seconds_per_step = run.seconds / c.num_training_steps
    peak = peak_memory_mib(run.hardware.device)
    measured = {
        "seconds": run.seconds,
        "tokens-per-second": run.tokens_per_step / seconds_per_step,
        "tflops": run.flops / run.seconds / 1e12,
        "matrix-product-tflops": run.matrix_product_rate / 1e12,
        "peak-memory-mib": peak,
        "flops": run.flops,
        "device": run.hardware.name,
        "dtype": str(run.hardware.dtype),
        "allocator": os.environ.get("LD_PRELOAD") or "system default",  # it decides much of the speed on a CPU
        "torch": torch.__version__,
    }
    evaluation = {**result, "tokens-predicted": n_predictions, "seq_len": c.seq_len}
    weights = {key: tensor.detach().cpu() for key, tensor in run.model.state_dict().items()}
    write_together(
        {
            run.folder / "model.pt": to_bytes(weights),
            run.folder / "config.yaml": dump_config(c).encode(),
            run.folder / "eval.json": json_text(evaluation).encode(),
            run.folder / "run.json": json_text(measured).encode(),
        }
    )
    levels = (result["val-loss"], run.ln_vocab, run.unigram)
    title = f"{run.folder.name} on {run.corpus.name}"
    plot_curve(run.folder / "metrics.csv", *levels, title, run.folder / "curve.png")
    return {
        "trained": f"{c.num_training_steps} steps in {duration(run.seconds)}, {run.speed(seconds_per_step)}",
        "memory": f"{peak:.0f} MiB at the peak",
        "evaluated": f"{n_predictions:,} predicted tokens, seq_len {c.seq_len}",
        "written": f"{run.folder}/ {', '.join(FILES[:-1])}",
    }


def show_results(run, result: dict[str, float], facts: dict[str, str], sample: tuple[str, str]) -> None:
    """Print the loss and what it means, the facts, a prompt with its continuation, and what to type next."""
    heading("result")
    val_loss = result["val-loss"]
    print("  " + bold(f"validation loss {val_loss:.3f} nats, perplexity {result['val-perplexity']:.1f}"))
    print(f"  {_meaning(run, val_loss)}\n")
    show_facts(facts)
    show_text(*sample)
    checkpoint = run.folder / "model.pt"
    next_commands(
        f"python generate.py --prefixes prefixs.json --checkpoint {checkpoint}",
        f"python classify.py {checkpoint}",
    )


def _meaning(run, val_loss: float) -> str:
    """Where the loss stands between the two guesses, and what was to be expected."""
    if not math.isfinite(val_loss):
        return "The loss is not finite: the run diverged; lower max_lr or lengthen the warm-up."
    below_uniform, below_unigrams = run.ln_vocab - val_loss, run.unigram - val_loss
    text = f"{below_uniform:.2f} below a uniform guess"
    if below_uniform <= 0:
        text = "No better than a uniform guess: nothing was learned."
    elif below_unigrams <= 0:
        text += ", not yet below word frequencies alone: train longer or with a higher max_lr."
    else:
        text += f" and {below_unigrams:.2f} below word frequencies alone: the model uses the words before."
    name = run.folder.name
    if name in EXPECTED_VAL_LOSS and run.corpus.name.startswith("bundled"):
        shipped = load_config(str(ROOT / "configs" / f"{name}.yaml"))
        if not run.config.differing(shipped.flat()):
            text += f" Expected for this configuration: about {EXPECTED_VAL_LOSS[name]:.2f}."
    return text
