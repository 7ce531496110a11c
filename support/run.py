"""One training run around `train`: its folder is locked, its steps are saved, and it resumes where it stopped."""

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
from filelock import FileLock

from support.checkpoint import read_archive, save_tensors
from support.data import Corpus, evenly_spaced
from support.device import random_state, set_random_state
from support.errors import UserError, first_line, require
from support.files import lock_folder
from support.report import Report, finish_wandb, start_wandb
from support.screen import show_note

STATE = "training_state.pt"  # exists while a run is unfinished
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
WAYS = "choose another folder with --set output_dir=outputs/NAME, or replace that run with --fresh"


class Run:
    """A training run in its output_dir, a with block around train(…, on_step=run.on_step) and save_results."""

    def __init__(self, report: Report, model, optimizer, validate: Callable[[np.ndarray], dict], fresh: bool):
        self.report, self.model, self.optimizer = report, model, optimizer
        self.validate, self.fresh, self.c, self.world = validate, fresh, report.c, report.world
        self.device, self.folder = report.hardware.device, Path(report.c.output_dir)
        self.state_path = self.folder / STATE
        self.config, self.data_hash = dataclasses.asdict(self.c), fingerprint(report.corpus)
        self.finished = False  # by an earlier command
        self.rows: list[list[float]] = []  # of each step done: loss, train-loss, learning-rate, val-loss or NaN
        self.seconds = self.save_seconds = 0.0  # spent training, and on the latest state
        self.saved_step = self.signal = 0
        self.result: dict[str, float] | None = None
        self._handlers: dict = {}  # of signals, before the run
        self._lock = FileLock(self.folder / ".lock", timeout=0)  # the system releases it if its owner dies

    def __enter__(self) -> "Run":
        try:
            if self.world.rank == 0:
                lock_folder(self._lock, self.folder)
                for file in self.folder.glob(f".{STATE}.*.tmp"):  # of a process that was killed while it saved
                    file.unlink()
                if self.fresh:
                    self.state_path.unlink(missing_ok=True)
            self.world.first(self._restore)
            same_step = self.world.maximum(self.saved_step) == (self.saved_step,)
            require(same_step, f"output_dir: the processes do not share the folder {self.folder}")
            if self.world.rank == 0 and not self.finished:
                start_wandb(self.c)
        except BaseException:
            self._lock.release()
            raise
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # shells ignore Ctrl-C for background jobs
                self._handlers[number] = signal.signal(number, self._receive)
        self._clock = self._last_save = time.perf_counter()
        return self

    def _restore(self) -> None:
        """Load the state of an interrupted run, or notice a finished one. Raises UserError for another run."""
        interrupted = self.state_path.exists()
        self.finished = not interrupted and not self.fresh and (self.folder / "model.pt").exists()
        if not interrupted and not self.finished:
            return
        path = self.state_path if interrupted else self.folder / "run.json"
        try:
            earlier = read_archive(path, WAYS) if interrupted else json.loads(path.read_bytes())
            differing = self.c.differing(earlier["config"])
            differing = differing or ["other tokens in data"] * (earlier["data-sha256"] != self.data_hash)
            require(not differing, f"{self.folder}: the run there has {', '.join(differing)}; {WAYS}")
            if self.finished:
                again = "--fresh trains it again and replaces these results"
                show_note(f"This run has already finished. {again}; --set output_dir=outputs/NAME trains another.")
                return
            n, n_here = len(earlier["random"]), self.world.size
            require(n == n_here, f"{self.folder}: the run there has {n} processes, not {n_here}; {WAYS}")
            self.model.load_state_dict(earlier["model"])
            self.optimizer.load_state_dict(earlier["optimizer"])
            set_random_state(earlier["random"][self.world.rank], self.device)
            self.rows, self.seconds = earlier["rows"].tolist(), earlier["seconds"]
            self.saved_step = len(self.rows)
        except (OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: damaged ({first_line(error)}); {WAYS}") from None
        show_note(f"Resuming the interrupted run at step {self.saved_step} (--fresh starts over).")

    def _receive(self, number: int, _frame) -> None:
        """Stop after the step; at a second signal, unless torchrun repeats the first one, at once."""
        if self.signal and self.world.size == 1:
            raise SystemExit(128 + number)
        self.signal = number
        if self.world.rank == 0:
            with suppress(OSError):  # not print, which the signal may have interrupted
                os.write(2, b"\nStopping after this step (press Ctrl-C again to stop now).\n")

    def on_step(self, result) -> None:
        """Log a step of `train`; evaluate or save if it is time to; stop if a signal came."""
        self.seconds += time.perf_counter() - self._clock
        c, n, is_main = self.c, len(self.rows) + 1, self.world.rank == 0
        started = f"train() began with step {result.step}, not with start_step = {n - 1}"
        require(result.step == n - 1, f"{started}: write `for step in range(start_step, …)`, or use --fresh")
        self.rows.append([result.loss, result.train_loss, result.learning_rate, math.nan])
        is_last = n == c.num_training_steps
        if is_main and c.eval_interval and n % c.eval_interval == 0 and not is_last:
            val = self.report.corpus.val
            rows = val[: len(val) // c.seq_len * c.seq_len].reshape(-1, c.seq_len)
            part = rows[:: math.ceil(len(rows) / (50 * c.batch_size))]  # at most 50 batches, evenly spaced
            self.rows[-1][-1] = self.validate(part.reshape(-1))["val-loss"]
        # A signal to one process stops all of them after the same step; rank 0 alone knows how long saving takes.
        stop, save = self.world.maximum(self.signal, is_main and (is_last or self._save_is_due(n)))
        if stop or save:
            self._save()
        if stop:
            raise SystemExit(128 + stop)
        if is_last:
            self.optimizer.zero_grad()  # its memory is enough for the evaluation, the curve and the sample
            self.optimizer.state.clear()
        if is_main:
            self.report.show_step(n, *self.rows[-1], self.seconds / n)
        self._clock = time.perf_counter()

    def _save_is_due(self, n_steps: int) -> bool:
        interval = self.c.checkpoint_interval or f"{max(30.0, 100 * self.save_seconds)}s"  # 1% of the time
        if interval.endswith("s"):
            return time.perf_counter() - self._last_save >= float(interval[:-1])
        return n_steps % int(interval) == 0

    def _save(self) -> None:
        started = time.perf_counter()
        state = {
            "config": self.config,
            "data-sha256": self.data_hash,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.world.gather(random_state(self.device)),
            "rows": torch.tensor(self.rows, dtype=torch.float64),
            "seconds": self.seconds,
        }
        try:
            if self.world.rank == 0:
                save_tensors(self.state_path, state)
            self.saved_step = len(self.rows)
        except (OSError, MemoryError) as error:
            show_note(f"Could not save the state ({first_line(error)}); training continues.")
        self.world.wait()  # torchrun ends all processes as soon as one exits: wait for the writer
        self._last_save = time.perf_counter()
        self.save_seconds = self._last_save - started

    def save_results(self, result: dict[str, float]) -> None:
        """Write the files of the finished run, then remove the state. `result` comes from `evaluate`."""
        weights = {key: tensor.detach().cpu() for key, tensor in self.model.state_dict().items()}
        if not (math.isfinite(result["val-loss"]) and all(bool(w.isfinite().all()) for w in weights.values())):
            raise FloatingPointError("the last update made the weights or the loss non-finite")
        if self.rows:
            self.rows[-1][-1] = result["val-loss"]
        else:  # a student's train() may ignore on_step
            self.seconds = time.perf_counter() - self._clock
            show_note("train() never called on_step, so there is no curve, and interrupted runs cannot resume.")
        save_tensors(self.folder / "model.pt", weights)
        origin = {"config": self.config, "data-sha256": self.data_hash}
        self.report.save(self.folder, result, self.rows, self.seconds, origin)
        self.state_path.unlink(missing_ok=True)
        self.result = result

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> None:
        """Restore the signal handlers, release the lock, and say how to resume."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        with suppress(OSError):  # the terminal may be gone
            self.report.close()
            if error and not self.result:
                again = "rerun the same command" + " without --fresh" * bool(self.fresh and self.saved_step)
                hint = f"Nothing was saved yet: {again} to start over."
                resume = f"{self.state_path} is kept: {again} to resume at step {self.saved_step}."
                print("\nStopped.", resume if self.saved_step else hint, flush=True)
        finish_wandb(self.result)
        self._lock.release()
        if error is None:
            self.world.leave()


def fingerprint(corpus: Corpus) -> str:
    """Hash both splits; of long ones, their lengths and evenly spaced parts."""
    digest = hashlib.sha256()
    for tokens in (corpus.train, corpus.val):
        digest.update(f"{len(tokens)} ".encode())
        for part in evenly_spaced(tokens, at_most=1 << 22):
            digest.update(part.astype(np.int64))
    return digest.hexdigest()
