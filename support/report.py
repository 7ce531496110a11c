"""What a training run shows: its plan, progress, results and curve, and the same on Weights & Biases."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import wandb
from tqdm import tqdm

from support.config import TrainingConfig, dump_config
from support.data import Corpus, unigram_entropy
from support.device import Device
from support.errors import UserError, first_line
from support.files import atomic_file, json_text, write_atomically
from support.screen import bold, command, count, duration, heading, show_facts, show_note, show_text, wrapped

COLUMNS = ("step", "tokens", "flops", "loss", "train-loss", "learning-rate", "val-loss")  # of metrics.csv


class Report:
    """The numbers of a run that are known before it starts, and what is shown and written about it."""

    def __init__(self, c: TrainingConfig, model, n_vocab: int, corpus: Corpus, hardware: Device, world):
        self.c, self.corpus, self.hardware, self.world = c, corpus, hardware, world
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.tokens_per_step = c.batch_size * c.seq_len * c.grad_accumulation_steps * world.size
        self.flops_per_step = model.flops_per_token * self.tokens_per_step
        self.ln_vocab = math.log(n_vocab)  # the loss of a uniform guess
        self.unigrams = unigram_entropy(corpus.train, n_vocab)
        self._bar: tqdm | None = None

    def show_plan(self) -> None:
        """Print what will be trained, on what, and what it costs."""
        c, corpus, n_steps = self.c, self.corpus, self.c.num_training_steps
        if corpus.note:
            show_note(corpus.note)
        n_train, n_tokens = len(corpus.train), self.tokens_per_step * n_steps
        size = f"{count(self.n_parameters, 'parameters')}, model.pt {self.n_parameters * 4 / 1e6:.1f} MB"
        split = f"{count(n_train, 'tokens')} to train on, {count(len(corpus.val), 'tokens')} held out"
        steps = f"{n_steps} steps of {self.tokens_per_step} tokens = {count(n_tokens, 'tokens')}"
        show_facts(
            {
                "device": f"{self.hardware}" + f", {self.world.size} processes" * (self.world.size > 1),
                "model": size + (f", weights of {c.init}" if c.init else ""),
                "data": f"{corpus.name}: {split}",
                "training": f"{steps} ({n_tokens / n_train:.2g} passes over the data)",
                "compute": f"{self.flops_per_step * n_steps:.3g} FLOPs",
                "uniform": f"{self.ln_vocab:.3f} nats, the loss of a guess that knows nothing",
                "unigrams": f"{self.unigrams:.3f} nats, the loss of a guess that knows only word frequencies",
            }
        )

    def show_step(self, n_done: int, loss, train_loss, learning_rate, val_loss, seconds_per_step: float) -> None:
        """Show a step in a bar on a terminal; elsewhere print about twenty lines in all."""
        n_steps, speed = self.c.num_training_steps, self.tokens_per_step / seconds_per_step
        text = f"loss {train_loss:.3f}  lr {learning_rate:.1e}  {speed:,.0f} tok/s"
        if not math.isnan(val_loss):
            tqdm.write(f"step {n_done}/{n_steps}  validation loss {val_loss:.3f}")
            if wandb.run:
                wandb.log({"val-loss": val_loss}, step=n_done - 1)
        if sys.stderr.isatty():
            layout = "{n_fmt}/{total_fmt} {bar:16} {remaining} left{postfix}"
            self._bar = self._bar or tqdm(total=n_steps, initial=n_done - 1, bar_format=layout)
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif n_done % math.ceil(n_steps / 20) == 0 or n_done == n_steps:
            left = duration((n_steps - n_done) * seconds_per_step)
            print(f"step {n_done}/{n_steps}  {text}  {left} left", flush=True)

    def close(self) -> None:
        """End the bar, so that what is printed next starts on its own line."""
        if self._bar:
            self._bar.close()

    def save(self, folder: Path, result: dict, rows: list[list[float]], seconds: float, origin: dict) -> None:
        """Write all files of a finished run but model.pt; `result` comes from `evaluate`, `rows` from Run."""
        self.close()
        predicted = {"tokens-predicted": self.corpus.n_predictions(self.c.seq_len), "seq_len": self.c.seq_len}
        flops = self.flops_per_step * self.c.num_training_steps
        facts = {
            "seconds": seconds,
            "tokens-per-second": self.tokens_per_step * self.c.num_training_steps / seconds,
            "flops": flops,
            "tflops": flops / seconds / 1e12,
            "device": str(self.hardware),
            "torch": torch.__version__,
        }
        write_atomically(folder / "config.yaml", dump_config(self.c))
        write_atomically(folder / "eval.json", json_text({**result, **predicted}))
        write_atomically(folder / "run.json", json_text({**facts, **origin}))
        if rows:
            per_step = self.tokens_per_step, self.flops_per_step
            metrics = [[step, *((step + 1) * n for n in per_step), *row] for step, row in enumerate(rows)]
            lines = [",".join(map(str, row)).replace("nan", "") for row in metrics]
            write_atomically(folder / "metrics.csv", "\n".join([",".join(COLUMNS), *lines, ""]))
            try:
                self._plot_curve(dict(zip(COLUMNS, np.array(metrics).T, strict=True)), folder / "curve.png")
            except Exception as error:
                show_note(f"Could not draw curve.png: {first_line(error)}")

    def show_results(self, folder: Path) -> None:
        """Print what the files of a finished run say."""
        try:
            evaluation, run = (json.loads((folder / name).read_bytes()) for name in ("eval.json", "run.json"))
            loss, perplexity = evaluation["val-loss"], evaluation["val-perplexity"] or math.inf
            trained = f"{self.c.num_training_steps} steps in {duration(run['seconds'])}, "
            trained += f"{run['tokens-per-second']:,.0f} tokens/s, {run['tflops']:.3f} TFLOPS"
            evaluated = f"{evaluation['tokens-predicted']:,} predicted tokens, seq_len {evaluation['seq_len']}"
            below_uniform, below_unigrams = self.ln_vocab - loss, self.unigrams - loss
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{folder}: unreadable results ({first_line(error)}); --fresh starts over") from None
        where = f"{abs(below_unigrams):.2f} {'above' if below_unigrams < 0 else 'below'} word frequencies alone"
        uses_context = below_unigrams >= 0.1  # nats; less can be chance
        meaning = "the model is using context" if uses_context else "train longer or with a higher max_lr"
        meaning = f"{below_uniform:.2f} below a uniform guess and {where}: {meaning}."
        if below_uniform <= 0:
            meaning = "No better than a uniform guess: nothing was learned."
        heading("result")
        print("  " + bold(f"validation loss {loss:.3f} nats, perplexity {perplexity:.1f}"))
        print(f"  {wrapped(meaning, 2)}\n")
        names = " ".join(sorted(path.name for path in folder.glob("[!.]*.*")))
        show_facts({"trained": trained, "evaluated": evaluated, "files": f"{folder}/ {names}"})

    def _plot_curve(self, metrics: dict[str, np.ndarray], path: Path) -> None:
        """Plot the losses with two reference lines (in nats), and the learning rate below them, over steps."""
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # not pyplot, which looks for a display

        with rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
            figure = Figure((8, 6), layout="constrained")
            above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
        steps, val_losses = metrics["step"], metrics["val-loss"]
        above.plot(steps, metrics["loss"], color="C0", alpha=0.25, linewidth=0.8, label="each step")
        above.plot(steps, metrics["train-loss"], color="C0", linewidth=1.8, label="mean of the last 20 steps")
        above.axhline(self.ln_vocab, color="0.3", ls=":", label=f"uniform guess, ln V = {self.ln_vocab:.2f}")
        above.axhline(self.unigrams, color="0.3", ls="--", label=f"word frequencies only = {self.unigrams:.2f}")
        known = ~np.isnan(val_losses)
        label = f"validation, {val_losses[-1]:.3f} at the end" + ", before on a part" * int(known.sum() > 1)
        above.plot(steps[known], val_losses[known], "o-", color="C2", clip_on=False, label=label)
        above.set(ylabel="loss (nats per token)", title=f"{path.parent.name} on {self.corpus.name}")
        above.legend(edgecolor="none", framealpha=0.9)
        below.plot(steps, metrics["learning-rate"], color="C1", linewidth=1.8)
        below.set(ylabel="learning rate", xlabel="training step", ylim=(0, None))
        below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi=130)


def show_evaluation(c: TrainingConfig, corpus: Corpus, hardware: Device, result: dict[str, float]) -> None:
    """Print the loss of a checkpoint, and what it was evaluated on."""
    predicted = f"{corpus.n_predictions(c.seq_len):,} predicted tokens in rows of seq_len {c.seq_len}"
    show_facts({"data": f"the val split of {corpus.name}, {predicted}", "device": str(hardware)})
    loss, perplexity = result["val-loss"], result["val-perplexity"]
    if not math.isfinite(loss):
        raise FloatingPointError(f"the validation loss is {loss}")
    print("  " + bold(f"validation loss {loss:.4f} nats per token, perplexity {perplexity:.5g}"))


def show_sample(folder: Path, generate: Callable[[str], str]) -> None:
    """Print a prompt with its continuation `generate(prompt)`, and the next commands to type."""
    prompt, checkpoint = "The city", folder / "model.pt"
    try:
        continuation = generate(prompt)
        print(bold("sample"))
        show_text(prompt, continuation)
    except Exception as error:  # generate() may be unfinished: no reason to fail after hours of training
        show_note(f"No sample text: generate() raised {type(error).__name__} ({first_line(error)}).")
    sampling = command("generate.py", checkpoint, "--temperature", 0.8)
    print("Next:", sampling, command("classify.py", checkpoint, "--data", "sample"), sep="\n  ")


def start_wandb(c: TrainingConfig) -> None:
    """Start a W&B run; without a login or WANDB_MODE=offline a disabled one, as a student's train() may log."""
    mode = os.environ.get("WANDB_MODE")
    try:
        settings = wandb.Settings(silent=True, console="off", init_timeout=10, finish_timeout=30)
        wandb.setup(settings)
        is_wanted = mode != "disabled" and (mode == "offline" or wandb.login(prompt=False, verify=False))
        place = {"project": "decoder-from-scratch", "name": Path(c.output_dir).name}
        place["mode"] = None if is_wanted else "disabled"
        wandb.init(**place, config=dataclasses.asdict(c), settings=settings)
    except Exception as error:  # offline, a wrong key, a full disk: none of them may stop a training run
        show_note(f"W&B did not start ({first_line(error)}); metrics.csv has everything.")


def finish_wandb(result: dict | None) -> None:
    """End the W&B run, if there is one, with these results; None marks it as failed."""
    if wandb.run is not None:
        try:
            wandb.run.summary.update(result or {})
            wandb.finish(exit_code=int(result is None))
        except Exception as error:
            show_note(f"W&B did not finish ({first_line(error)}); metrics.csv has everything.")
