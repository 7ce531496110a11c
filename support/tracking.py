"""Weights & Biases, for those who use it: never a prompt, an account or a long wait for those who do not."""

import netrc
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

from support.config import TrainingConfig

PATIENCE = 10  # seconds that a run waits for W&B to start or to end


def start_tracking(config: TrainingConfig, settings: dict, run_id: str | None = None) -> str | None:
    """Start a W&B run where the person is logged in or set WANDB_MODE; return its id, else run_id.

    run_id continues an earlier run. Whatever fails is one warning: the local metrics are complete.
    """
    mode = os.environ.get("WANDB_MODE")
    if mode == "disabled" or (mode != "offline" and not _logged_in()):  # online, it would prompt for a key
        if mode == "online":
            warnings.warn("W&B has no login (wandb login); metrics.csv has everything", stacklevel=2)
        return run_id
    import wandb

    def start() -> None:
        wandb.init(
            project="decoder-from-scratch",
            name=Path(config.output_dir).name,
            id=run_id,
            resume="allow" if run_id else None,
            config=settings,
            settings=wandb.Settings(init_timeout=PATIENCE, silent=True, console="off"),
        )

    try:
        _within(1.5 * PATIENCE, start)
        return wandb.run.id
    except Exception as error:  # offline, a wrong key, a full disk: none is worth a training run
        warnings.warn(f"W&B did not start ({error}); metrics.csv has everything", stacklevel=2)
        _tear_down()
        return run_id


def finish_tracking(summary: dict | None = None) -> None:
    """Send the results and end the W&B run, if there is one; without results it is marked as failed."""
    import wandb

    if wandb.run is None:
        return

    def finish() -> None:
        wandb.run.summary.update(summary or {})
        wandb.finish(exit_code=int(summary is None))

    try:
        _within(PATIENCE, finish)
    except Exception as error:
        warnings.warn(f"W&B did not take all ({error}); the run's folder has everything", stacklevel=2)
        _tear_down()


def _tear_down() -> None:
    """Part from W&B's process, which at exit would be waited for, for minutes if it cannot send."""
    import wandb

    with suppress(Exception):  # one warning was given already
        _within(1, wandb.teardown)


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Let the action run for so long at most. Raises what it raises, or TimeoutError; it may then go on."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds} s")
    if errors:
        raise errors[0]


def _logged_in() -> bool:
    """Whether `wandb login` was done on this machine; asks no network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False  # no netrc file, or not one to understand: nobody logged in with it
