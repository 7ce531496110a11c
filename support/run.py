"""One training run around `train`: its folder is locked, its steps are logged and saved, and it is resumed."""

import dataclasses
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from support.checkpoint import read_archive, save_tensors
from support.config import dump_config, load_config
from support.data import Corpus
from support.device import random_state, set_random_state
from support.errors import RunStopped, UserError, first_line, is_out_of_memory, require
from support.files import json_text, write_atomically
from support.report import Report, finish_wandb, log_wandb, start_wandb
from support.screen import show_note

STATE = "training_state.pt"  # exists while a run is unfinished
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Run:
    """A training run in its output_dir.

    with Run(report, model, optimizer, validate, fresh=False) as run:
        train(…, start_step=run.next_step, previous_losses=run.losses, on_step=run.on_step)
        run.save_results(evaluate(…))
    """

    def __init__(
        self,
        report: Report,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        validate: Callable[[], dict[str, float]],
        fresh: bool,
    ):
        self.report, self.model, self.optimizer, self.validate, self.fresh = (
            report,
            model,
            optimizer,
            validate,
            fresh,
        )
        self.c, self.world, self.device = report.c, report.world, report.hardware.device
        self.folder = Path(self.c.output_dir)
        self.data = fingerprint(report.corpus)
        self.finished = False  # before this command
        self.rows: list[list[float]] = []  # of each step: loss, train-loss, learning-rate, val-loss (NaN: none)
        self.seconds = 0.0  # spent training
        self.wandb_id = self.result = None
        self.hint = "Nothing was saved yet: rerun the same command to start over"
        self._lock = FileLock(self.folder / ".lock", timeout=0)  # the system releases it if its owner dies
        self._handlers: dict = {}  # of signals, before the run
        self._signal, self._save_seconds = 0, 0.0

    @property
    def next_step(self) -> int:
        """The number of steps done."""
        return len(self.rows)

    @property
    def losses(self) -> list[float]:
        """The losses of these steps."""
        return [row[0] for row in self.rows]

    def __enter__(self) -> "Run":
        try:
            self.world.first(self._open)
            (last_step,) = self.world.maximum(self.next_step)
            require(
                last_step == self.next_step, f"output_dir: the processes do not share the folder {self.folder}"
            )
            if self.next_step:
                show_note(f"Resuming the interrupted run at step {self.next_step} (--fresh starts over).")
            if self.world.rank == 0 and not self.finished:
                self.wandb_id = start_wandb(self.c, self.wandb_id)
        except BaseException:
            self._lock.release()
            raise
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # shells ignore Ctrl-C for background jobs
                self._handlers[number] = signal.signal(number, self._receive)
        self._clock = self._last_save = time.perf_counter()
        return self

    def _open(self) -> None:
        """Lock the folder and restore what is in it."""
        if self.world.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock.acquire()
                for file in self.folder.glob(".*.pt.*.tmp"):  # of a process that was killed while it saved
                    file.unlink()
                if self.fresh:
                    (self.folder / STATE).unlink(missing_ok=True)
            except Timeout:
                raise UserError(f"output_dir: another process is training in {self.folder}; wait for it") from None
            except OSError as error:
                problem = f"output_dir: {self.folder} cannot be written ({error.strerror})"
                raise UserError(f"{problem}; choose another") from None
        if (self.folder / STATE).exists():
            self._load()
        elif not self.fresh and (self.folder / "model.pt").exists() and (self.folder / "config.yaml").exists():
            theirs, data = load_config(str(self.folder / "config.yaml")), self.data
            with suppress(OSError, ValueError, LookupError, TypeError):
                data = json.loads((self.folder / "run.json").read_bytes())["data-sha256"]
            self._require_same("finished", dataclasses.asdict(theirs), data)
            self.finished = True

    def _load(self) -> None:
        """Restore everything from the state file."""
        path, remedy = self.folder / STATE, "start over with --fresh"
        state = read_archive(path, remedy)
        try:
            self._require_same("interrupted", state["config"], state["data"])
            n, n_here = len(state["random"]), self.world.size
            require(n == n_here, f"{self.folder}: the run there has {n} processes, not {n_here}; {remedy}")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            set_random_state(state["random"][self.world.rank], self.device)
            self.rows, self.seconds, self.wandb_id = state["rows"].tolist(), state["seconds"], state["wandb_id"]
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: damaged ({first_line(error)}); {remedy}") from None
        self._set_hint()

    def _require_same(self, kind: str, config: dict, data: str) -> None:
        differing = self.c.differing(config) or ["other tokens in data"] * (data != self.data)
        ways = "choose another folder with --set output_dir=outputs/NAME, or replace that run with --fresh"
        require(not differing, f"{self.folder}: the {kind} run there has {', '.join(differing)}; {ways}")

    def _set_hint(self) -> None:
        self.hint = f"{self.folder / STATE} is kept: rerun the same command to resume at step {self.next_step}"

    def _receive(self, number: int, _frame) -> None:
        """Stop after the step; at a second signal, unless torchrun repeats the first one, at once."""
        if self._signal and self.world.size == 1:
            raise SystemExit(128 + number)
        self._signal = number
        if self.world.rank == 0:
            with suppress(OSError):  # not print, which the signal may have interrupted
                os.write(2, b"\nStopping after this step (press Ctrl-C again to stop now).\n")

    def on_step(self, result) -> None:
        """Log a step of `train`; evaluate or save if it is time to; stop if a signal came."""
        started = f"train() began with step {result.step}, not with start_step = {self.next_step}"
        require(
            result.step == self.next_step, f"{started}: give it `for step in range(start_step, …)`, or --fresh"
        )
        self.seconds += time.perf_counter() - self._clock
        self.rows.append([result.loss, result.train_loss, result.learning_rate, math.nan])
        c, n = self.c, self.next_step
        is_last, is_main = n == c.num_training_steps, self.world.rank == 0
        if is_main and c.eval_interval and n % c.eval_interval == 0 and not is_last:
            self.rows[-1][-1] = val_loss = self.validate()["val-loss"]
            log_wandb(result.step, val_loss)
        # A signal to one process stops all of them after the same step; rank 0 alone knows how long saving takes.
        stop, save = self.world.maximum(self._signal, is_main and (is_last or self._save_is_due()))
        if stop or save:
            self._save()
        if stop:
            raise SystemExit(128 + stop)
        if is_main:
            self.report.show_step(n, *self.rows[-1], self.seconds / n)
        self._clock = time.perf_counter()

    def _save_is_due(self) -> bool:
        interval = self.c.checkpoint_interval
        if isinstance(interval, int):
            return self.next_step % interval == 0
        seconds = float(interval[:-1]) if interval else max(30.0, 100 * self._save_seconds)  # 1% of the time
        return time.perf_counter() - self._last_save >= seconds

    def _save(self) -> None:
        started = time.perf_counter()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "config": dataclasses.asdict(self.c),
            "data": self.data,
            "random": self.world.gather(random_state(self.device)),
            "rows": torch.tensor(self.rows, dtype=torch.float64),
            "seconds": self.seconds,
            "wandb_id": self.wandb_id,
        }
        try:
            if self.world.rank == 0:
                save_tensors(self.folder / STATE, state)
            self._set_hint()
        except (OSError, MemoryError) as error:
            show_note(
                f"Could not save the state of step {self.next_step} ({first_line(error)}); training continues."
            )
        self.world.maximum(0)  # torchrun ends all processes as soon as one exits: wait for the writer
        self._last_save = time.perf_counter()
        self._save_seconds = self._last_save - started

    def save_results(self, result: dict[str, float]) -> None:
        """Write the files of the finished run, then remove the state. `result` comes from `evaluate`."""
        weights = {key: tensor.detach().cpu() for key, tensor in self.model.state_dict().items()}
        if not (math.isfinite(result["val-loss"]) and all(bool(w.isfinite().all()) for w in weights.values())):
            raise FloatingPointError("the last update made the weights infinite")
        corpus, seq_len = self.report.corpus, self.c.seq_len
        evaluation = {**result, "tokens-predicted": corpus.n_predictions(seq_len), "seq_len": seq_len}
        save_tensors(self.folder / "model.pt", weights)
        write_atomically(self.folder / "config.yaml", dump_config(self.c))
        write_atomically(self.folder / "eval.json", json_text(evaluation))
        if self.rows:
            self.rows[-1][-1] = result["val-loss"]
        else:  # a student's train() may ignore on_step
            self.seconds = time.perf_counter() - self._clock
            show_note("train() did not call on_step after each step: this run drew no curve and could not resume.")
        self.report.save(self.folder, self.rows, self.seconds, self.data)
        (self.folder / STATE).unlink(missing_ok=True)
        self.result, self.hint = result, "The run is finished and its results are written"

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> None:
        """Give everything back, and say where a stopped run would resume."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        with suppress(OSError):  # the terminal may be gone
            self.report.close()
            if isinstance(error, (SystemExit, KeyboardInterrupt)):
                print(f"\nStopped. {self.hint}.", flush=True)
        finish_wandb(self.result)
        self._lock.release()
        c = self.c
        if isinstance(error, FloatingPointError):
            warm_up, clip = f"more num_warmup_steps (now {c.num_warmup_steps})", c.grad_clip or "off; 1.0 is usual"
            remedies = f"a lower max_lr (now {c.max_lr:g}), {warm_up}, or grad_clip (now {clip})"
            raise RunStopped(f"diverged: {error}. Likely remedies, with --fresh: {remedies}") from error
        if error is not None and is_out_of_memory(error):
            remedy = (
                f"--set batch_size={c.batch_size // 2} grad_accumulation_steps={2 * c.grad_accumulation_steps}"
            )
            remedy = f"{remedy} gives the same result" if c.batch_size % 2 == 0 else "make model_config smaller"
            size = f"batch_size {c.batch_size} × seq_len {c.seq_len} at step {self.next_step}"
            raise RunStopped(f"out of memory, {size}: {remedy}. {self.hint}") from error


def fingerprint(corpus: Corpus) -> str:
    """Hash the lengths of both splits and up to 64 evenly spaced parts of each."""
    digest = hashlib.sha256()
    for tokens in (corpus.train, corpus.val):
        digest.update(f"{len(tokens)} ".encode())
        for start in range(0, len(tokens), max(1 << 16, len(tokens) // 64)):
            digest.update(tokens[start : start + (1 << 16)].astype(np.int64))
    return digest.hexdigest()
