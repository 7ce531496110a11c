"""Weights & Biases, for those who use it: never a prompt, an account or a long wait for those who do not."""

import dataclasses
import netrc
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

import wandb

from support.config import TrainingConfig
from support.errors import in_background

PATIENCE = 10  # seconds that a run waits for W&B to start or to end


def start_tracking(config: TrainingConfig, run_id: str | None = None) -> str | None:
    """Start a W&B run where the person is logged in or set WANDB_MODE; return its id, else run_id.

    run_id continues an earlier run. Whatever fails is one warning: the local metrics are complete.
    """
    mode = os.environ.get("WANDB_MODE")
    if mode == "disabled" or (mode != "offline" and not _logged_in()):  # wandb would prompt for a key
        if mode == "online":
            warnings.warn("W&B has no login (wandb login); metrics.csv has everything", stacklevel=2)
        return run_id

    def start() -> None:
        wandb.init(
            project="decoder-from-scratch",
            name=Path(config.output_dir).name,
            id=run_id,
            resume="allow" if run_id else None,
            config=dataclasses.asdict(config),
            settings=wandb.Settings(init_timeout=PATIENCE, silent=True, console="off"),
        )

    return wandb.run.id if _succeeds(start, 1.5 * PATIENCE, "did not start") else run_id


def _logged_in() -> bool:
    """Whether `wandb login` was done on this machine; asks no network."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    with suppress(OSError, netrc.NetrcParseError):
        return "WANDB_API_KEY" in os.environ or host in netrc.netrc(os.environ.get("NETRC")).hosts
    return False


def finish_tracking(summary: dict | None) -> None:
    """Send the results and end the W&B run, if there is one; without results it is marked as failed."""

    def finish() -> None:
        wandb.run.summary.update(summary or {})
        wandb.finish(exit_code=int(summary is None))

    if wandb.run is not None:
        _succeeds(finish, PATIENCE, "did not take all")


def _succeeds(action: Callable[[], None], seconds: float, failure: str) -> bool:
    """Let the action run for so long at most. If it fails, warn and part from W&B."""
    try:
        in_background(action).result(seconds)
        return True
    except Exception as error:  # offline, a wrong key, a full disk: none is worth a training run
        reason = str(error) or "no answer in time"
        warnings.warn(f"W&B {failure} ({reason}); the run's own folder has everything", stacklevel=3)
        with suppress(Exception):  # left alone, its process would be waited for at exit, for minutes
            in_background(wandb.teardown).result(1)
        return False
