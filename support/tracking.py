"""Optional Weights & Biases logging: without an account, no prompt and no delay."""

import dataclasses
import netrc
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

import wandb

from support.config import TrainingConfig
from support.screen import show_note

WANDB_SECONDS = 10  # that a run waits for W&B to start or to end


def start_tracking(config: TrainingConfig, run_id: str | None = None) -> str | None:
    """Start a W&B run if the user is logged in or set WANDB_MODE; return its id, otherwise run_id.

    run_id continues an earlier run. A failure is only a note, because the local metrics are complete.
    """
    mode = os.environ.get("WANDB_MODE")
    if mode == "disabled" or (mode != "offline" and not _logged_in()):  # otherwise wandb prompts for a key
        if mode == "online":
            show_note("Not logged in to W&B (run wandb login); metrics.csv has everything.")
        return run_id

    def start() -> str:
        wandb.init(
            project="decoder-from-scratch",
            name=Path(config.output_dir).name,
            id=run_id,
            resume="allow" if run_id else None,
            config=dataclasses.asdict(config),
            settings=wandb.Settings(init_timeout=WANDB_SECONDS, silent=True, console="off"),
        )
        return wandb.run.id

    return _within(1.5 * WANDB_SECONDS, start, "did not start") or run_id


def _logged_in() -> bool:
    """Whether `wandb login` was run on this machine; needs no network."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    with suppress(OSError, netrc.NetrcParseError):
        return "WANDB_API_KEY" in os.environ or host in netrc.netrc(os.environ.get("NETRC")).hosts
    return False


def log_validation(step: int, val_loss: float) -> None:
    """Log a validation loss to the W&B run, if there is one."""
    if wandb.run is not None:
        wandb.log({"val-loss": val_loss}, step=step)


def finish_tracking(summary: dict | None) -> None:
    """End the W&B run, if there is one, with these results, and print where it is; None marks it as failed."""

    def finish() -> str:
        run = wandb.run
        offline = f"W&B was offline; to upload the run: wandb sync {run.settings.sync_dir}"
        place = offline if run.offline else f"W&B: {run.url}"
        run.summary.update(summary or {})
        wandb.finish(exit_code=int(summary is None))
        return place

    if wandb.run is not None and (place := _within(WANDB_SECONDS, finish, "did not finish")):
        show_note(place)


def _within(seconds: float, action: Callable, failure: str):
    """What the action returns. If it raises or takes longer, show a note, stop using W&B and return None."""
    try:
        return _in_background(action).result(seconds)
    except Exception as error:  # offline, a wrong key, a full disk: none of them may stop a training run
        show_note(f"W&B {failure} ({str(error) or 'no answer in time'}); metrics.csv has everything.")
        with suppress(Exception):  # otherwise Python waits at exit for its process, for minutes
            _in_background(wandb.teardown).result(1)
        return None


def _in_background(action: Callable) -> Future:
    """Start the action in a daemon thread: if it hangs, the program can still end."""
    outcome = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome
