"""One training run around `train`: it is locked, resumed, logged, saved, stopped and finished here."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from support.checkpoint import load_weights
from support.dry_run import DryRun
from support.errors import require
from support.metrics import VALIDATION_COLUMNS, MetricsLog
from support.plan import ProgressBar, TrainingPlan, show_plan
from support.results import measurements, show_results, write_results
from support.run_errors import errors_explained
from support.run_folder import STATE, WORKING_METRICS, WORKING_VALIDATION, locked_folder
from support.screen import show_note
from support.setup import Setup
from support.signals import StopSignals
from support.state import Progress, TrainingState, random_state
from support.tracking import finish_tracking, log_validation, start_tracking
from train import RUNNING_MEAN_STEPS, StepResult


@contextmanager
def open_run(
    setup: Setup,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    validate: Callable[[], dict[str, float]],
    fresh: bool,
    dry_run: bool,
) -> Iterator["TrainingRun | DryRun"]:
    """Lock the output directory, resume an interrupted run if there is one, and always clean up.

    with open_run(setup, model, optimizer, lambda: evaluate(…), fresh=False, dry_run=False) as run:
        train(…, start_step=run.progress.next_step, on_step=run.on_step)
        run.finish()
    """
    plan, world = TrainingPlan(setup, model), setup.world
    folder, is_main = Path(setup.config.output_dir), world.is_main_process
    show_plan(plan)
    if dry_run:
        run = DryRun(plan)
        with errors_explained(run, setup.config):
            yield run
        run.show_times()
        return
    with ExitStack() as stack:
        if is_main:
            stack.enter_context(locked_folder(folder, plan.n_parameters))
        with world.main_process_first():
            state = TrainingState(folder / STATE, setup, model, optimizer)
            if fresh:
                state.path.unlink(missing_ok=True)
            resumes = state.path.exists()
            replaces = not (resumes or fresh) and state.finished_run_exists()
            progress = state.load() if resumes else Progress()
            if setup.config.init and not resumes:
                load_weights(model, setup.config.init, setup.config.model_config)
        if replaces:
            show_note(f"The finished run in {folder} is replaced when this one ends.")
        if progress.next_step:
            show_note(f"Resuming the interrupted run at step {progress.next_step} (--fresh starts over).")
        steps = world.gather(progress.next_step)
        require(len(set(steps)) == 1, f"output_dir: the processes do not share the folder {folder}")
        if is_main:
            progress.wandb_id = start_tracking(setup.config, progress.wandb_id)
        run = TrainingRun(plan, state, progress, validate)
        stack.callback(run.close)
        stack.enter_context(run.signals)
        stack.enter_context(errors_explained(run, setup.config))
        run.signals.deferring = progress.next_step < run.end_step
        yield run


class TrainingRun:
    """Logs, shows and saves the steps of a run, stops it, and writes its results."""

    def __init__(
        self,
        plan: TrainingPlan,
        state: TrainingState,
        progress: Progress,
        validate: Callable[[], dict[str, float]],
    ):
        self.plan, self.state, self.progress, self.validate = plan, state, progress, validate
        self.setup, self.config, self.world = plan.setup, plan.setup.config, plan.setup.world
        self.folder = state.path.parent
        self.end_step = self.config.num_training_steps
        self.writes_results = is_main = self.world.is_main_process
        self.result: dict[str, float] | None = None
        self.resume_hint = "Nothing was saved yet: rerun the same command to start over"
        if progress.next_step:
            self._set_resume_hint()
        self.signals = StopSignals(announced=is_main, under_torchrun=self.world.size > 1)
        self._open_logs(progress.next_step)
        self._bar = ProgressBar(plan, progress.next_step, enabled=is_main)
        self._seconds_before = progress.seconds
        self._save_seconds = 0.0  # duration of the latest save
        self._n_updates, self._reported = 0, False  # does train() report its steps?
        self._hook = state.optimizer.register_step_pre_hook(self._before_update)
        self._started = self._last_save = time.perf_counter()

    def close(self) -> None:
        """Close the bar, the metrics and the W&B run."""
        self._hook.remove()
        self._bar.close()
        for log in self._logs:
            log.close()
        finish_tracking(self.result)

    def _before_update(self, *_) -> None:
        """Say in the second step that the first one was not reported: a student's train() may forget it."""
        self._n_updates += 1
        if self._n_updates == 2 and not self._reported:
            self.signals.deferring = False  # Ctrl-C cannot wait for the report of a step
            if self.world.is_main_process:
                show_note(
                    "train() does not call on_step(StepResult(…)) after each step: this run shows no progress, "
                    "draws no curve, and can neither be saved before its end nor resumed."
                )

    def _open_logs(self, step: int) -> None:
        """Start the main process's files, or keep their rows before this step."""
        self._metrics = self._validation = None
        if self.world.is_main_process:
            self._metrics = MetricsLog(self.folder / WORKING_METRICS, step)
            if interval := self.config.eval_interval:
                n_rows = min(step, self.end_step - 1) // interval  # `finish` adds the last step's
                self._validation = MetricsLog(self.folder / WORKING_VALIDATION, n_rows, VALIDATION_COLUMNS)
        self._logs = [log for log in (self._metrics, self._validation) if log]

    def on_step(self, result: StepResult) -> None:
        """Log and show one step, evaluate or save the state if it is due, stop if a signal came."""
        now, progress = time.perf_counter(), self.progress
        # A student's train() may ignore start_step.
        require(
            self._reported or result.step == progress.next_step,
            f"train() began with step {result.step} instead of start_step = {progress.next_step}: its loop should "
            "be `for step in range(start_step, num_training_steps)`; fix it, or start over with --fresh",
        )
        self._reported = True
        progress.next_step = n_steps = result.step + 1
        progress.seconds = self._seconds_before + now - self._started
        progress.recent_losses = [*progress.recent_losses, result.loss][-RUNNING_MEAN_STEPS:]
        if self.world.is_main_process:
            tokens, flops = n_steps * self.setup.tokens_per_step, n_steps * self.plan.flops_per_step
            self._metrics.append(result.step, tokens, flops, *result[1:])
            self._bar.update(result, now - self._started)

        last = n_steps == self.end_step
        if self._validation and n_steps % self.config.eval_interval == 0 and not last:
            started = time.perf_counter()
            self._log_validation(result.step, self.validate()["val-loss"])
            self._started += time.perf_counter() - started  # not a part of the training's time
        # A signal to one process stops all of them after the same step.
        due = self.world.is_main_process and self._save_is_due(n_steps)  # only it knows how long saving takes
        stop, due = self.world.maximum(self.signals.number, due)
        if stop or last or due:
            self._save()
        if stop:
            self.world.barrier()  # torchrun ends all processes as soon as one exits: wait for the writer
        self.signals.deferring = not last
        stop = stop or (last and self.signals.number)
        if stop:  # a signal that came after the check waits for the next step
            raise SystemExit(128 + stop)

    def _log_validation(self, step: int, val_loss: float) -> None:
        self._validation.append(step, val_loss)
        log_validation(step, val_loss)
        tqdm.write(f"step {step + 1}/{self.end_step}  validation loss {val_loss:.3f}")

    def _save_is_due(self, n_steps: int) -> bool:
        interval = self.config.checkpoint_interval
        if isinstance(interval, int):
            return n_steps % interval == 0
        # By default, as often as keeps writing below 1% of the time.
        seconds = float(interval[:-1]) if interval else max(30.0, 100 * self._save_seconds)
        return time.perf_counter() - self._last_save >= seconds

    def _save(self) -> None:
        started = time.perf_counter()
        random_states = self.world.gather(random_state(self.setup.device))
        try:
            if self.world.is_main_process:
                for log in self._logs:
                    log.sync()  # first: a state promises the rows of all steps before it
                self.state.save(self.progress, random_states)
            self._set_resume_hint()
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or "out of memory"
            show_note(
                f"Could not save the state of step {self.progress.next_step} ({reason}); training continues."
            )
        self._last_save = time.perf_counter()
        self._save_seconds = self._last_save - started

    def _set_resume_hint(self) -> None:
        step = self.progress.next_step
        self.resume_hint = f"{self.state.path} is kept: rerun the same command to resume at step {step}"

    def finish(self) -> None:
        """Evaluate, write and print the results, and remove the state, which is no longer needed."""
        self._bar.close()
        if not sys.stderr.isatty():  # a terminal gets a bar
            print("evaluating", flush=True)
        result = self.validate()
        if self._validation:
            self._log_validation(self.end_step - 1, result["val-loss"])
        for log in self._logs:
            log.sync()
        seconds = self.progress.seconds or time.perf_counter() - self._started  # train() may ignore on_step
        measured = measurements(self.plan, seconds) | {"data-sha256": self.state.data_hash}
        write_results(self.folder, self.plan, self.state.model, result, measured)
        self.state.path.unlink(missing_ok=True)
        for name in (WORKING_METRICS, WORKING_VALIDATION):
            (self.folder / name).unlink(missing_ok=True)  # after the state, which needs their rows
        self.resume_hint, self.result = "The run is finished and its results are written", result
        show_results(self.folder, self.plan, result, measured)
