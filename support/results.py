"""The results of a training run: its files, and what is printed at the end."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from support.checkpoint import checkpoint_file, load_weights, to_bytes
from support.config import dump_config
from support.errors import first_line, out_of_memory_means
from support.files import json_text, write_together
from support.hardware import peak_memory_mib
from support.plan import TrainingPlan
from support.plots import plot_curve
from support.run_folder import RESULTS, VALIDATION, WORKING_METRICS, WORKING_VALIDATION
from support.screen import bold, duration, heading, show_facts, show_note, show_text
from support.setup import Setup

SAMPLE_PROMPT = "The city"


def measurements(plan: TrainingPlan, seconds: float) -> dict:
    """What goes into run.json about a run that has trained for `seconds`."""
    hardware = plan.setup.hardware
    peak_memory = peak_memory_mib(hardware.device)  # before the matrix products below
    return {
        "seconds": seconds,
        "tokens-per-second": plan.setup.tokens_per_step * plan.setup.config.num_training_steps / seconds,
        "tflops": plan.flops / seconds / 1e12,
        "matrix-product-tflops": plan.peak_flops_per_second / 1e12,
        "peak-memory-mib": peak_memory,
        "flops": plan.flops,
        "device": hardware.name,
        "dtype": str(hardware.dtype),
        "allocator": os.environ.get("LD_PRELOAD") or "system default",  # it decides much of the speed on a CPU
        "torch": torch.__version__,
    }


def write_results(
    folder: Path, plan: TrainingPlan, model: torch.nn.Module, result: dict[str, float], measured: dict
) -> None:
    """Write the RESULTS of run_folder.py, and validation.csv if the run has an eval_interval.

    `result` comes from `evaluate`. May raise OSError; the former results are then unchanged.
    """
    corpus, c = plan.setup.corpus, plan.setup.config
    evaluation = {**result, "tokens-predicted": corpus.n_predictions(c.seq_len), "seq_len": c.seq_len}
    weights = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    write_together(
        {
            folder / "model.pt": to_bytes(weights),
            folder / "config.yaml": dump_config(c).encode(),
            folder / "eval.json": json_text(evaluation).encode(),
            folder / "run.json": json_text(measured).encode(),
            folder / "metrics.csv": (folder / WORKING_METRICS).read_bytes(),
            **({folder / VALIDATION: (folder / WORKING_VALIDATION).read_bytes()} if c.eval_interval else {}),
        }
    )
    if not c.eval_interval:
        (folder / VALIDATION).unlink(missing_ok=True)  # of the run that this one replaces
    title = f"{folder.name} on {corpus.name}"
    levels = (result["val-loss"], plan.ln_vocab, plan.unigram_entropy)
    plot_curve(folder / "metrics.csv", *levels, title, folder / "curve.png")


def show_results(folder: Path, plan: TrainingPlan, result: dict[str, float], measured: dict) -> None:
    """Print the loss, what it means, and how it was reached."""
    c, seconds = plan.setup.config, measured["seconds"]
    n_predictions = plan.setup.corpus.n_predictions(c.seq_len)
    heading("result")
    print("  " + bold(f"validation loss {result['val-loss']:.3f} nats, perplexity {result['val-perplexity']:.1f}"))
    print(f"  {_meaning(plan, result['val-loss'])}\n")
    show_facts(
        {
            "trained": f"{c.num_training_steps} steps in {duration(seconds)}, "
            f"{plan.speed(seconds / c.num_training_steps)}",
            "memory": f"{measured['peak-memory-mib']:.0f} MiB at the peak",
            "evaluated": f"{n_predictions:,} predicted tokens, seq_len {c.seq_len}",
            "written": f"{folder}/ {', '.join(RESULTS + (VALIDATION,) * bool(c.eval_interval))}",
        }
    )


def _meaning(plan: TrainingPlan, val_loss: float) -> str:
    """Compare the loss with two simple guesses."""
    if not math.isfinite(val_loss):
        return "The loss is not finite: the run diverged; lower max_lr or lengthen the warm-up."
    below_uniform, below_unigrams = plan.ln_vocab - val_loss, plan.unigram_entropy - val_loss
    text = f"{below_uniform:.2f} below a uniform guess"
    if below_uniform <= 0:
        text = "No better than a uniform guess: nothing was learned."
    elif below_unigrams < 0.1:  # nats; less can be chance
        text += ", not clearly below word frequencies alone: train longer or with a higher max_lr."
    else:
        text += f" and {below_unigrams:.2f} below word frequencies alone: the model is using context."
    return text


def show_sample(run, generate: Callable[[str], str]) -> None:
    """Print a prompt with its continuation `generate(prompt)`, and the next commands to type for a TrainingRun."""
    checkpoint = run.folder / "model.pt"
    try:
        continuation = generate(SAMPLE_PROMPT)
        print(bold("sample"))
        show_text(SAMPLE_PROMPT, continuation)
    except Exception as error:  # generate() may be unfinished: no reason to fail after hours of training
        show_note(f"No sample text: generate() raised {type(error).__name__} ({first_line(error)}).")
    print(f"\nNext:\n  python generate.py --prefixes prefixs.json --checkpoint {checkpoint}")
    print(f"  python classify.py {checkpoint}")


def show_evaluation(
    checkpoint: str, setup: Setup, model: torch.nn.Module, validate: Callable[[], dict[str, float]]
) -> None:
    """Load a checkpoint into the model; print what it is evaluated on, and the loss that `validate` returns."""
    c = setup.config
    load_weights(model, checkpoint, c.model_config)
    n_predictions = f"{setup.corpus.n_predictions(c.seq_len):,} predicted tokens in rows of seq_len {c.seq_len}"
    show_facts(
        {
            "model": str(checkpoint_file(checkpoint)),
            "data": f"the val split of {setup.corpus.name}, {n_predictions}",
            "device": str(setup.hardware),
        }
    )
    with out_of_memory_means(f"batch_size {c.batch_size} × seq_len {c.seq_len} does not fit; make one smaller"):
        result = validate()
    loss, perplexity = result["val-loss"], result["val-perplexity"]
    print("  " + bold(f"validation loss {loss:.4f} nats per token, perplexity {perplexity:.5g}"))
