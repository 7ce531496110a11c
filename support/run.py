"""One training run around `train`: its folder, screen, metrics, interruption and results."""

import dataclasses
import math
import shutil
import signal
import sys
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from support import hardware as machine
from support.checkpoint import save_weights
from support.config import TrainingConfig, dump_config, load_config
from support.corpus import Corpus, unigram_entropy
from support.errors import UserError, check
from support.files import write_atomically, write_json
from support.metrics import MetricsLog, read_metrics
from support.plots import plot_curve
from support.screen import bold, count, duration, heading, next_commands, show_facts, show_note, show_text
from support.state import fingerprint, load_state, save_state
from support.tracking import finish_tracking, start_tracking

ROOT = Path(__file__).resolve().parent.parent
EXPECTED_VAL_LOSS = {"smoke": 9.99, "GPT-tiny": 9.99}  # shipped configurations on the bundled sample


class Run:
    """The folder of a training run, and the `on_step` hook of `train`.

    with Run(config, hardware, corpus, model, optimizer, flops) as run:
        train(…, start_step=run.start_step, on_step=run)
        run.finish(evaluate(…), …)
    """

    def __init__(self, config: TrainingConfig, hardware, corpus: Corpus, model, optimizer, flops: int):
        self.config, self.hardware, self.corpus = config, hardware, corpus
        self.model, self.optimizer, self.flops = model, optimizer, flops
        self.folder = Path(config.output_dir)
        self.state_path = self.folder / "training_state.pt"
        self.tokens_per_step = config.batch_size * config.seq_len * config.grad_accumulation_steps
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.ln_vocab = math.log(model.n_vocab)
        self.unigram = unigram_entropy(corpus.train, model.n_vocab)
        self.start_step = 0
        self.recent_losses: deque[float] = deque(maxlen=20)  # train() keeps its running mean here
        self.seconds = 0.0  # trained before an interruption
        optimizer.register_step_pre_hook(self._check_gradients)

    # What it will take

    def show_header(self, title: str) -> None:
        """Print what will be trained, on what, and what it costs."""
        c, corpus = self.config, self.corpus
        heading(title)
        if corpus.note:
            show_note(corpus.note)
        tokens = self.tokens_per_step * c.num_training_steps
        shares = f"{self.flops / 1e15:.1%} of the course's 1e15, {self.flops / 1e17:.2%} of 1e17"
        show_facts(
            {
                "device": str(self.hardware),
                "model": f"{count(self.n_parameters, 'parameters')}, model.pt {self.n_parameters * 4 / 1e6:.1f} MB",
                "data": f"{corpus.name}: {count(len(corpus.train), 'tokens')} to train on, "
                f"{count(len(corpus.val), 'tokens')} held out",
                "training": f"{c.num_training_steps} steps of {self.tokens_per_step} tokens = "
                f"{count(tokens, 'tokens')} ({tokens / len(corpus.train):.2g} times the data)",
                "compute": f"{self.flops:.3g} FLOPs: {shares}",
                "ln V": f"{self.ln_vocab:.3f} nats, the loss of a uniform guess",
                "unigrams": f"{self.unigram:.3f} nats, the loss of a guess that knows only word frequencies",
            }
        )

    @contextmanager
    def stopwatch(self):
        """Times the steps of the block's `train`; prints how long the whole run would take."""
        ends = [time.perf_counter()]
        yield lambda result: ends.append(time.perf_counter())
        typical = float(np.median(np.diff(ends)[1:]))  # the first step warms up
        total = typical * self.config.num_training_steps
        print(f"  {self._speed(typical)}")
        print(f"  a step takes {typical * 1e3:.0f} ms; the whole run would take {bold(duration(total))}")

    def _speed(self, seconds_per_step: float) -> str:
        achieved = self.flops / self.config.num_training_steps / seconds_per_step
        share = achieved / machine.matrix_product_rate(self.hardware)
        return (
            f"{self.tokens_per_step / seconds_per_step:,.0f} tokens/s, {achieved / 1e12:.3f} TFLOPS: "
            f"{share:.0%} of this device's matrix-product rate"
        )

    # The training itself

    def open(self, fresh: bool) -> "Run":
        """Take the folder: check it, lock it, and restore an interrupted run that stands in it."""
        c = self.config
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"output_dir: {c.output_dir} cannot be written ({error.strerror}); choose another"
            ) from None
        needed, free = 5 * 4 * self.n_parameters, shutil.disk_usage(self.folder).free
        check(
            free > needed,
            f"output_dir: {c.output_dir} has {free / 1e6:.0f} MB free, but the checkpoints need "
            f"{needed / 1e6:.0f} MB; make room or choose another disk",
        )
        self._lock = FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"output_dir: another process is training in {c.output_dir}; wait for it or choose another"
            ) from None
        if fresh:
            self.state_path.unlink(missing_ok=True)
        self._data = fingerprint(self.corpus)
        wandb_id = None
        if self.state_path.exists():
            progress = load_state(self.state_path, self.model, self.optimizer, c, self._data)
            self.start_step, self.seconds = progress["step"], progress["seconds"]
            self.recent_losses.extend(progress["losses"])
            wandb_id = progress["wandb_id"]
            show_note(f"Continuing the interrupted run from step {self.start_step} (--fresh starts over).")
        self._metrics = MetricsLog(self.folder / "metrics.csv", self.start_step)
        self._wandb_id = start_tracking(c, dataclasses.asdict(c), wandb_id)
        return self

    def __enter__(self) -> "Run":
        self._signal = None
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self._bar = tqdm(
            total=self.config.num_training_steps,
            initial=self.start_step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self._started = self._last_save = time.perf_counter()
        self._save_seconds = 0.0
        return self

    def __exit__(self, *_) -> None:
        self._restore_signals()
        self._bar.close()
        self._metrics.close()
        self._lock.release()

    def _on_signal(self, number: int, _frame) -> None:
        self._signal = number
        self._restore_signals()  # a second signal stops at once
        print("\nStopping after this step …", file=sys.stderr)

    def _restore_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _check_gradients(self, optimizer, *_) -> None:
        """Before each update: clip, and refuse a gradient that is not finite, while the weights are good."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip or math.inf)
        if not torch.isfinite(norm):
            lr = optimizer.param_groups[0]["lr"]
            raise FloatingPointError(f"the gradient's norm is {norm.item()} (learning rate {lr:.3g})")

    def __call__(self, result) -> None:
        """After each step: a row in metrics.csv, the screen, and from time to time the state."""
        n_steps = result.step + 1
        flops_per_step = self.flops // self.config.num_training_steps
        self._metrics.append(
            result.step,
            n_steps * self.tokens_per_step,
            n_steps * flops_per_step,
            result.loss,
            result.train_loss,
            result.learning_rate,
        )
        now = time.perf_counter()
        seconds_per_step = (now - self._started) / (n_steps - self.start_step)
        self._show_progress(result, n_steps, seconds_per_step)

        interval = max(30.0, 100 * self._save_seconds)  # writing takes less than 1% of the time
        last = n_steps == self.config.num_training_steps
        if self._signal or last or now - self._last_save > interval:
            self._save_state(n_steps)
        if self._signal:
            again = "the same command continues from here"
            print(f"\nStopped after step {result.step}, saved to {self.state_path}: {again}.")
            raise SystemExit(128 + self._signal)

    def _show_progress(self, result, n_steps: int, seconds_per_step: float) -> None:
        total = self.config.num_training_steps
        speed = f"{self.tokens_per_step / seconds_per_step:,.0f} tok/s"
        tflops = f"{self.flops / total / seconds_per_step / 1e12:.3f} TFLOPS"
        if not self._bar.disable:
            facts = f"loss {result.train_loss:.3f}, lr {result.learning_rate:.2e}, {speed}, {tflops}"
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update()
        elif n_steps % max(1, total // 20) == 0 or n_steps == total:
            left = duration((total - n_steps) * seconds_per_step)
            print(
                f"step {n_steps}/{total}  loss {result.train_loss:.3f}  lr {result.learning_rate:.2e}  "
                f"{speed}  {tflops}  {left} left",
                flush=True,
            )

    def _save_state(self, next_step: int) -> None:
        started = time.perf_counter()
        progress = {
            "step": next_step,
            "losses": list(self.recent_losses),
            "seconds": self.seconds + started - self._started,
            "wandb_id": self._wandb_id,
        }
        try:
            self._metrics.sync()
            save_state(self.state_path, self.model, self.optimizer, self.config, self._data, progress)
        except OSError as error:
            tqdm.write(f"The training state could not be saved ({error.strerror}); training goes on.")
        self._last_save = time.perf_counter()
        self._save_seconds = self._last_save - started

    # What came of it

    def finish(self, result: dict[str, float], n_predictions: int, sample: tuple[str, str]) -> None:
        """Write the results, print them, and drop the state that is no longer needed."""
        c = self.config
        seconds = self.seconds + time.perf_counter() - self._started
        self._bar.close()
        val_loss = result["val-loss"]
        write_json(self.folder / "eval.json", {**result, "tokens-predicted": n_predictions, "seq_len": c.seq_len})
        write_atomically(self.folder / "config.yaml", dump_config(c))
        save_weights(self.model, self.folder / "model.pt")
        seconds_per_step = seconds / c.num_training_steps
        speed = self._speed(seconds_per_step)
        peak = machine.peak_memory_mib(self.hardware.device)
        write_json(
            self.folder / "run.json",
            {
                "seconds": seconds,
                "tokens-per-second": self.tokens_per_step / seconds_per_step,
                "tflops": self.flops / seconds / 1e12,
                "matrix-product-tflops": machine.matrix_product_rate(self.hardware) / 1e12,
                "peak-memory-mib": peak,
                "flops": self.flops,
                "device": self.hardware.name,
                "dtype": str(self.hardware.dtype),
                "allocator": machine.allocator_name(),
                "torch": torch.__version__,
            },
        )
        metrics = read_metrics(self.folder / "metrics.csv")
        title = f"{self.folder.name} on {self.corpus.name}"
        plot_curve(metrics, val_loss, self.ln_vocab, self.unigram, title, self.folder / "curve.png")
        self.state_path.unlink(missing_ok=True)
        finish_tracking(result)

        heading("result")
        print("  " + bold(f"validation loss {val_loss:.3f} nats, perplexity {result['val-perplexity']:.1f}"))
        print(f"  {self._meaning(val_loss)}\n")
        show_facts(
            {
                "trained": f"{c.num_training_steps} steps in {duration(seconds)}, {speed}",
                "memory": f"{peak:.0f} MiB at the peak",
                "evaluated": f"{n_predictions:,} predicted tokens, seq_len {c.seq_len}",
                "written": f"{self.folder}/ model.pt, config.yaml, eval.json, metrics.csv, curve.png, run.json",
            }
        )
        show_text(*sample)
        checkpoint = self.folder / "model.pt"
        next_commands(
            f"python generate.py --prefixes prefixs.json --checkpoint {checkpoint}",
            f"python classify.py {checkpoint}",
        )

    def _meaning(self, val_loss: float) -> str:
        """Where the loss stands between the two guesses, and what was to be expected."""
        if not math.isfinite(val_loss):
            return "The loss is not finite: the run diverged; lower max_lr or lengthen the warm-up."
        if val_loss >= self.ln_vocab:
            text = f"No better than a uniform guess ({self.ln_vocab:.2f}): nothing was learned."
        elif val_loss >= self.unigram:
            text = (
                f"Better than a uniform guess ({self.ln_vocab:.2f}), not yet than word frequencies alone "
                f"({self.unigram:.2f}): train longer or with a higher max_lr."
            )
        else:
            text = (
                f"{self.ln_vocab - val_loss:.2f} below a uniform guess and {self.unigram - val_loss:.2f} below "
                "word frequencies alone: the model uses the words before."
            )
        expected = EXPECTED_VAL_LOSS.get(self.folder.name)
        if expected and self.corpus.name.startswith("bundled") and self._is_shipped():
            text += f" Expected for this configuration: about {expected:.2f}."
        return text

    def _is_shipped(self) -> bool:
        """Whether this configuration is the shipped one of its name, whatever device and data it names."""
        shipped = load_config(str(ROOT / "configs" / f"{self.folder.name}.yaml"))
        neutral = {"device": "auto", "data": None, "output_dir": ""}
        return dataclasses.replace(shipped, **neutral) == dataclasses.replace(self.config, **neutral)
