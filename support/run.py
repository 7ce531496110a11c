"""One training run around `train`: its folder, screen, metrics, interruption and results."""

import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from support import hardware as machine
from support.config import TrainingConfig
from support.corpus import Corpus, unigram_entropy
from support.distribution import LOST, World, lost_process
from support.errors import RunStopped, UserError, as_user_error, require
from support.files import remove_leftovers
from support.metrics import MetricsLog
from support.results import FILES, show_results, write_results
from support.screen import bold, count, duration, heading, show_facts, show_note
from support.signals import StopSignals, memory_advice
from support.state import fingerprint, load_state, random_state, save_state
from support.tracking import finish_tracking, start_tracking


class Run:
    """The folder of a training run, and the `on_step` hook of `train`.

    run = Run(config, hardware, corpus, model, optimizer, flops, world)
    with run.open(fresh=False):
        train(…, start_step=run.start_step, on_step=run)
        run.finish(evaluate(…), …)
    """

    def __init__(
        self, config: TrainingConfig, hardware, corpus: Corpus, model, optimizer, flops: int, world: World
    ):
        self.config, self.hardware, self.corpus, self.world = config, hardware, corpus, world
        self.is_main_process = world.rank == 0  # the process that writes and shows, where there are several
        self.model, self.optimizer, self.flops = model, optimizer, flops
        self.folder = Path(config.output_dir)
        self.state_path = self.folder / "training_state.pt"
        self.tokens_per_step = world.size * config.batch_size * config.seq_len * config.grad_accumulation_steps
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.ln_vocab = math.log(model.n_vocab)
        self.unigram = unigram_entropy(corpus.train, model.n_vocab)
        self.start_step = self._next_step = 0
        self.recent_losses: deque[float] = deque(maxlen=20)  # train() keeps its running mean here
        self.seconds = self._seconds_before = 0.0  # trained in all, and before an interruption
        self._resume_hint = "Nothing was saved yet: the same command starts over"
        self._result: dict | None = None
        # Until the first state was written and timed: its bytes at 200 MB/s.
        self._save_seconds = 12 * self.n_parameters / 2e8
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
                "device": f"{self.hardware}" + (f", {n} processes" if (n := self.world.size) > 1 else ""),
                "model": f"{count(self.n_parameters, 'parameters')}, "
                f"model.pt {self.n_parameters * 4 / 1e6:.1f} MB",
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
        with self._explained():
            yield lambda result: ends.append(time.perf_counter())
        require(len(ends) > 2, "--dry-run: train() did not call on_step, so its steps cannot be timed")
        typical = float(np.median(np.diff(ends)[1:]))  # the first step warms up
        total = typical * self.config.num_training_steps
        print(f"  {self.speed(typical)}")
        print(f"  a step takes {typical * 1e3:.0f} ms; the whole run would take {bold(duration(total))}")

    @cached_property
    def matrix_product_rate(self) -> float:
        """FLOPs per second that the device reaches at best."""
        return machine.matrix_product_rate(self.hardware)

    def speed(self, seconds_per_step: float) -> str:
        """Tokens and FLOPs per second, and the share of what the device could do."""
        achieved = self.flops / self.config.num_training_steps / seconds_per_step
        n = self.world.size
        share = achieved / (self.matrix_product_rate * n)
        return (
            f"{self.tokens_per_step / seconds_per_step:,.0f} tokens/s, {achieved / 1e12:.3f} TFLOPS: "
            f"{share:.0%} of {f'{n} times ' if n > 1 else ''}this device's matrix-product rate"
        )

    # The folder

    @contextmanager
    def open(self, fresh: bool) -> Iterator["Run"]:
        """Hold the folder, restoring an interrupted run that stands in it, and end in order whatever happens."""
        with ExitStack() as stack:
            if self.is_main_process:
                self._hold_folder(stack)
            with self.world.rank_0_first():
                self._wandb_id = self._restore(fresh)
            same = len(set(self.world.gather(self.start_step))) == 1
            require(same, f"output_dir: {self.folder} is not the same folder for all processes; share one")
            if self.is_main_process:
                self._wandb_id = start_tracking(self.config, self._wandb_id)
                stack.callback(lambda: finish_tracking(self._result))
                self._metrics = stack.enter_context(
                    closing(MetricsLog(self.folder / "metrics.csv", self.start_step))
                )
            total, shown = self.config.num_training_steps, self.is_main_process and sys.stderr.isatty()
            self._bar = stack.enter_context(
                tqdm(total=total, initial=self.start_step, unit="step", dynamic_ncols=True, disable=not shown)
            )
            self._signals = stack.enter_context(StopSignals(announced=self.is_main_process))
            stack.enter_context(self._explained())
            self._started = self._last_save = time.perf_counter()
            self._signals.deferring = self.start_step < total
            yield self

    def _hold_folder(self, stack: ExitStack) -> None:
        """Keep other processes out of the folder, and refuse one that cannot take the results."""
        name = f"output_dir: {self.folder}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The system releases the lock with its owner, however that ends.
            stack.enter_context(FileLock(self.folder / ".lock", timeout=0))
        except Timeout:
            raise UserError(f"{name}: another process trains in it; wait for it or choose another") from None
        except OSError as error:
            raise UserError(f"{name} cannot be written ({error.strerror}); choose another") from None
        for file in FILES:
            require(not (self.folder / file).is_dir(), f"{name}/{file} is a folder; remove it")
            remove_leftovers(self.folder / file)
        there = self.state_path.stat().st_size if self.state_path.exists() else 0
        # Two states, the old and the new one, of 12 bytes a parameter, and model.pt of 4.
        needed, free = 28 * self.n_parameters - there, shutil.disk_usage(self.folder).free
        require(
            free > needed,
            f"{name} has {free / 1e6:.1f} MB free, but the checkpoints need {needed / 1e6:.1f} MB; "
            "make room or choose another disk",
        )

    def _restore(self, fresh: bool) -> str | None:
        """Continue where an interrupted run stood; return the id of its W&B run."""
        if fresh:
            self.state_path.unlink(missing_ok=True)
        self.data = fingerprint(self.corpus)
        if not self.state_path.exists():
            return None
        progress = load_state(self)
        self.start_step = self._next_step = progress["step"]
        self.seconds = self._seconds_before = progress["seconds"]
        self.recent_losses.extend(progress["losses"])
        self._saved(self.start_step)
        show_note(f"Continuing the interrupted run from step {self.start_step} (--fresh starts over).")
        return progress["wandb_id"]

    def _saved(self, step: int) -> None:
        self._resume_hint = f"{self.state_path} is kept: the same command continues from step {step}"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what stops the run into a sentence that says from where it would go on."""
        try:
            yield
        except (SystemExit, KeyboardInterrupt):
            print(f"\nStopped. {self._resume_hint}.", flush=True)
            raise
        except Exception as error:
            c = self.config
            message = as_user_error(error, f" at step {self._next_step}: {memory_advice(c)}")
            if isinstance(error, FloatingPointError):
                message = (
                    f"diverged: {error}; the weights were not changed by it. Likely remedies, with --fresh: a "
                    f"lower max_lr (now {c.max_lr:g}), more num_warmup_steps (now {c.num_warmup_steps}), or "
                    f"grad_clip (now {c.grad_clip or 'off'}; 1.0 is usual)"
                )
            elif lost_process(error):
                message = LOST
            if message is None:
                raise
            raise RunStopped(f"{message}. {self._resume_hint}") from error

    # The training itself

    def _check_gradients(self, *_) -> None:
        """Before each update: clip, and refuse a gradient that is not finite, while the weights are good."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if not torch.isfinite(norm):
            rate = self.optimizer.param_groups[0]["lr"]
            at = f"at step {self._next_step} (learning rate {rate:.3g})"
            raise FloatingPointError(f"the gradient's norm is {norm.item()} {at}")
        if self.config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)

    def __call__(self, result) -> None:
        """After each step: a row in metrics.csv, the screen, and from time to time the state."""
        self._next_step = n_steps = result.step + 1
        seconds = time.perf_counter() - self._started
        self.seconds = self._seconds_before + seconds
        if self.is_main_process:
            flops_per_step = self.flops // self.config.num_training_steps
            self._metrics.append(
                result.step, n_steps * self.tokens_per_step, n_steps * flops_per_step, *result[1:]
            )
            self._show_progress(result, seconds / (n_steps - self.start_step))

        last = n_steps == self.config.num_training_steps
        # A signal to one process stops all of them, after the same step.
        stop, due = self.world.maximum(self._signals.number, self.is_main_process and self._save_is_due(n_steps))
        if stop or last or due:
            self._save_state(n_steps)
        if stop:
            self.world.maximum(0)  # no rank ends while rank 0 still writes: torchrun would then end that too
        self._signals.deferring = not last
        stop = stop or (last and self._signals.number)
        if stop:  # a signal that came after the test waits for the next step
            raise SystemExit(128 + stop)

    def _save_is_due(self, n_steps: int) -> bool:
        interval = self.config.checkpoint_interval
        if isinstance(interval, int):
            return n_steps % interval == 0
        # Without a wish: writing takes less than 1% of the time.
        seconds = float(interval[:-1]) if interval else max(30.0, 100 * self._save_seconds)
        return time.perf_counter() - self._last_save >= seconds

    def _show_progress(self, result, seconds_per_step: float) -> None:
        """The bar on a terminal, elsewhere twenty lines in all."""
        done, total = self._next_step, self.config.num_training_steps
        facts = (
            f"loss {result.train_loss:.3f}  lr {result.learning_rate:.2e}  "
            f"{self.tokens_per_step / seconds_per_step:,.0f} tok/s  "
            f"{self.flops / total / seconds_per_step / 1e12:.3f} TFLOPS"
        )
        if not self._bar.disable:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update()
        elif done % -(-total // 20) == 0 or done == total:
            left = duration((total - done) * seconds_per_step)
            print(f"step {done}/{total}  {facts}  {left} left", flush=True)

    def _save_state(self, next_step: int) -> None:
        started = time.perf_counter()
        random = self.world.gather(random_state(self.hardware.device))
        progress = {
            "step": next_step,
            "losses": list(self.recent_losses),
            "seconds": self.seconds,
            "wandb_id": self._wandb_id,
        }
        try:
            if self.is_main_process:
                self._metrics.sync()  # first: a state promises the rows of all steps before it
                save_state(self, random, progress)
            self._saved(next_step)
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or "out of memory"
            tqdm.write(f"The state of step {next_step} could not be saved ({reason}); training goes on.")
        self._last_save = time.perf_counter()
        self._save_seconds = self._last_save - started

    def finish(self, result: dict[str, float], n_predictions: int, sample: tuple[str, str]) -> None:
        """Write the results, drop the state that is then no longer needed, and print what came of it."""
        if not self.is_main_process:
            return
        if self._next_step == self.start_step < self.config.num_training_steps:  # train() told of no step
            self.seconds = time.perf_counter() - self._started
        self._bar.close()
        self._metrics.sync()
        facts = write_results(self, result, n_predictions)
        self.state_path.unlink(missing_ok=True)
        self._resume_hint = "The run is finished and its results are written"
        self._result = result
        show_results(self, result, facts, sample)
