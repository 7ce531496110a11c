"""Weights & Biases, for those who use it: never a prompt, an account or a delay for those who do not."""

import netrc
import os
import warnings
from pathlib import Path
from urllib.parse import urlparse

from support.config import TrainingConfig


def start_tracking(config: TrainingConfig, settings: dict, run_id: str | None = None) -> str | None:
    """Start a W&B run where the person is logged in or set WANDB_MODE; return its id, else None.

    run_id continues an earlier run. Whatever fails is one warning: the local metrics are complete.
    """
    mode = os.environ.get("WANDB_MODE")
    if mode == "disabled" or (mode != "offline" and not _logged_in()):  # online, it would prompt for a key
        if mode == "online":
            warnings.warn("W&B has no login (wandb login); metrics.csv has everything", stacklevel=2)
        return None
    import wandb

    try:
        run = wandb.init(
            project="decoder-from-scratch",
            name=Path(config.output_dir).name,
            id=run_id,
            resume="allow" if run_id else None,
            config=settings,
            settings=wandb.Settings(init_timeout=20, silent=True),
        )
    except Exception as error:  # offline, a wrong key, a full disk: none is worth a training run
        warnings.warn(f"W&B did not start ({error}); metrics.csv has everything", stacklevel=2)
        return None
    return run.id


def finish_tracking(summary: dict) -> None:
    """Send the results and end the W&B run, if there is one."""
    import wandb

    if wandb.run is None:
        return
    try:
        wandb.run.summary.update(summary)
        wandb.finish()
    except Exception as error:
        warnings.warn(f"W&B did not take the results ({error}); they are in the run's folder", stacklevel=2)


def _logged_in() -> bool:
    """Whether `wandb login` was done on this machine; asks no network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False  # no netrc file, or not one to understand: nobody logged in with it
