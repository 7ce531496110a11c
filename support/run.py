"""One training run around `train`: it is locked, resumed, logged, saved, stopped and finished here."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support.config import memory_advice
from support.distribution import LOST, lost_process
from support.errors import RunStopped, as_user_error, require
from support.metrics import MetricsLog
from support.progress import ProgressDisplay, RunFacts, show_run_header
from support.results import show_results, show_sample, write_results
from support.run_folder import STATE, WORKING_METRICS, locked_folder
from support.screen import bold, duration, show_note
from support.setup import Setup
from support.signals import StopSignals
from support.state import Progress, RunIdentity, fingerprint, load_state, random_state, save_state
from support.tracking import finish_tracking, start_tracking
from train import RUNNING_MEAN_STEPS, StepResult

DRY_RUN_STEPS = 6  # enough to time a step; the first one warms up
DISK_BYTES_PER_SECOND = 2e8  # assumed until the first state has been written and timed


class TrainingRun:
    """The folder and the screen of one run.

    run = TrainingRun(setup, model, optimizer, flops)
    with run.open(fresh=False, dry_run=False):
        train(…, start_step=run.progress.next_step, on_step=run.on_step)
        run.finish(evaluate(…))
    """

    def __init__(self, setup: Setup, model: torch.nn.Module, optimizer: torch.optim.Optimizer, flops: int):
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.facts = RunFacts(setup, model.n_vocab, n_parameters, flops)
        self.setup, self.config, self.world = setup, setup.config, setup.world
        self.model, self.optimizer = model, optimizer
        self.folder = Path(setup.config.output_dir)
        self.state_path = self.folder / STATE
        self.progress = Progress()
        self.end_step = self.config.num_training_steps
        self.on_step: Callable[[StepResult], None] = self._after_step
        self.writes_results = self.world.is_main_process
        self._resume_hint = "Nothing was saved yet: rerun the same command to start over"
        self._save_seconds = 12 * n_parameters / DISK_BYTES_PER_SECOND

    def show_header(self, title: str) -> None:
        """Print what will be trained, on what, and what it costs."""
        show_run_header(title, self.facts)

    @contextmanager
    def open(self, fresh: bool, dry_run: bool) -> Iterator[None]:
        """Lock the output directory, resume an interrupted run if there is one, and always clean up.

        A dry run touches no folder: it times DRY_RUN_STEPS steps and prints how long all would take.
        """
        with ExitStack() as stack:
            if dry_run:
                stack.enter_context(self._timed_steps())
                yield
                return
            if self.world.is_main_process:
                stack.enter_context(locked_folder(self.folder, self.facts.n_parameters))
            with self.world.main_process_first():
                self._resume(fresh)
            steps = self.world.gather(self.progress.next_step)
            require(len(set(steps)) == 1, f"output_dir: the processes do not share the folder {self.folder}")
            if self.world.is_main_process:
                self.progress.wandb_id = start_tracking(self.config, self.progress.wandb_id)
                self._result: dict | None = None
                stack.callback(lambda: finish_tracking(self._result))
                metrics = MetricsLog(self.folder / WORKING_METRICS, self.progress.next_step)
                self._metrics = stack.enter_context(closing(metrics))
            display = ProgressDisplay(self.facts, self.progress.next_step, self.world.is_main_process)
            self._display = stack.enter_context(closing(display))
            self._signals = stack.enter_context(StopSignals(announced=self.world.is_main_process))
            stack.enter_context(self._errors_explained())
            self._seconds_before = self.progress.seconds
            self._started = self._last_save = time.perf_counter()
            self._signals.deferring = self.progress.next_step < self.config.num_training_steps
            yield

    @contextmanager
    def _timed_steps(self) -> Iterator[None]:
        ends = [time.perf_counter()]
        self.end_step, self.writes_results = DRY_RUN_STEPS, False
        self.on_step = lambda result: ends.append(time.perf_counter())
        with self._errors_explained():
            yield
        require(len(ends) > 2, "--dry-run: train() did not call on_step, so its steps cannot be timed")
        seconds_per_step = float(np.median(np.diff(ends)[1:]))  # the first step warms up
        total = seconds_per_step * self.config.num_training_steps
        print(f"  {self.facts.speed(seconds_per_step)}")
        print(f"  a step takes {seconds_per_step * 1e3:.0f} ms; the whole run would take {bold(duration(total))}")

    def _resume(self, fresh: bool) -> None:
        """Restore an interrupted run that was saved in the folder, unless a fresh start is wanted."""
        if fresh:
            self.state_path.unlink(missing_ok=True)
        self.identity = RunIdentity(self.config, fingerprint(self.setup.corpus), self.world.size)
        if self.state_path.exists():
            self.progress = load_state(
                self.state_path, self.identity, self.model, self.optimizer, self.world.rank, self.setup.device
            )
            self._set_resume_hint()
            show_note(f"Resuming the interrupted run at step {self.progress.next_step} (--fresh starts over).")

    def _set_resume_hint(self) -> None:
        step = self.progress.next_step
        self._resume_hint = f"{self.state_path} is kept: rerun the same command to resume at step {step}"

    @contextmanager
    def _errors_explained(self) -> Iterator[None]:
        """Turn whatever stops the run into one sentence that says where it would resume."""
        try:
            yield
        except (SystemExit, KeyboardInterrupt):
            print(f"\nStopped. {self._resume_hint}.", flush=True)
            raise
        except Exception as error:
            c = self.config
            user_error = as_user_error(error, f" at step {self.progress.next_step}: {memory_advice(c)}")
            common_reason = None  # why all processes stop at once
            if isinstance(error, FloatingPointError):
                common_reason = (
                    f"diverged: {error}; the weights were not updated. Likely remedies, with --fresh: a "
                    f"lower max_lr (now {c.max_lr:g}), more num_warmup_steps (now {c.num_warmup_steps}), or "
                    f"grad_clip (now {c.grad_clip or 'off'}; 1.0 is usual)"
                )
            elif lost_process(error):
                common_reason = LOST
            if common_reason:
                raise RunStopped(f"{common_reason}. {self._resume_hint}", on_all_processes=True) from error
            if user_error is None:
                raise
            raise RunStopped(f"{user_error}. {self._resume_hint}") from error

    def _after_step(self, result: StepResult) -> None:
        """Log and show one step, save the state if it is due, stop if a signal came."""
        now, progress, total = time.perf_counter(), self.progress, self.config.num_training_steps
        progress.next_step = n_steps = result.step + 1
        progress.seconds = self._seconds_before + now - self._started
        progress.recent_losses = [*progress.recent_losses, result.loss][-RUNNING_MEAN_STEPS:]
        if self.world.is_main_process:
            tokens, flops = n_steps * self.setup.tokens_per_step, n_steps * self.facts.flops_per_step
            self._metrics.append(result.step, tokens, flops, *result[1:])
            self._display.update(result, now - self._started)

        last = n_steps == total
        # A signal to one process stops all of them after the same step.
        due = self.world.is_main_process and self._save_is_due(n_steps)  # it knows how long saving takes
        stop, due = self.world.maximum(self._signals.number, due)
        if stop or last or due:
            self._save_state()
        if stop:
            self.world.barrier()  # torchrun ends all processes as soon as one exits: wait for the writer
        self._signals.deferring = not last
        stop = stop or (last and self._signals.number)
        if stop:  # a signal that came after the check waits for the next step
            raise SystemExit(128 + stop)

    def _save_is_due(self, n_steps: int) -> bool:
        interval = self.config.checkpoint_interval
        if isinstance(interval, int):
            return n_steps % interval == 0
        # By default, as often as keeps writing below 1% of the time.
        seconds = float(interval[:-1]) if interval else max(30.0, 100 * self._save_seconds)
        return time.perf_counter() - self._last_save >= seconds

    def _save_state(self) -> None:
        started = time.perf_counter()
        random_states = self.world.gather(random_state(self.setup.device))
        try:
            if self.world.is_main_process:
                self._metrics.sync()  # first: a state promises the rows of all steps before it
                save_state(
                    self.state_path, self.identity, self.model, self.optimizer, random_states, self.progress
                )
            self._set_resume_hint()
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or "out of memory"
            tqdm.write(
                f"Could not save the state of step {self.progress.next_step} ({reason}); training continues."
            )
        self._last_save = time.perf_counter()
        self._save_seconds = self._last_save - started

    def finish(self, result: dict[str, float]) -> None:
        """Write and print the results of `evaluate`, and remove the state, which is no longer needed."""
        self._display.close()
        self._metrics.sync()
        if not self.progress.seconds:  # train() did not call on_step
            self.progress.seconds = time.perf_counter() - self._started
        facts = write_results(self.folder, self.facts, self.model, result, self.progress.seconds)
        self.state_path.unlink(missing_ok=True)
        (self.folder / WORKING_METRICS).unlink(missing_ok=True)  # after the state, whose rows it holds
        self._resume_hint = "The run is finished and its results are written"
        self._result = result
        show_results(self.folder, self.facts, result, facts)

    def show_sample(self, generate: Callable[[str], str]) -> None:
        """Print a prompt with its continuation `generate(prompt)`, and the next commands to type."""
        show_sample(self.folder / "model.pt", generate)
