"""training_state.pt: all that an interrupted run needs to go on as if nothing had happened."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import torch

from support.checkpoint import load_archive, save_tensors
from support.config import TrainingConfig
from support.corpus import Corpus
from support.errors import UserError, check

NOT_MATHEMATICS = ("output_dir", "device", "data", "checkpoint_interval")  # may differ when a run goes on


def fingerprint(corpus: Corpus) -> str:
    """A hash of both splits; of long ones, of their lengths and 2^22 evenly spaced tokens."""
    digest = hashlib.sha256()
    for tokens in (corpus.train, corpus.val):
        stride = max(1, len(tokens) >> 22)
        digest.update(f"{len(tokens)} ".encode())
        digest.update(np.ascontiguousarray(tokens[::stride]).astype(np.int64))
    return digest.hexdigest()


def save_state(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    data: str,
    progress: dict,
) -> None:
    """Write the state after a step. `progress` holds plain values: next step, losses, seconds, W&B id."""
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state_all()
    values = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": dataclasses.asdict(config),
        "data": data,
        "random": random,
        "progress": progress,
    }
    save_tensors(values, path)


def load_state(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    data: str,
) -> dict:
    """Put model, optimizer and random generators back where they were; return `progress`.

    Raises UserError when the file is damaged, or belongs to another configuration or other data.
    """
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    values = load_archive(path, most_bytes=4 * n_bytes + 2**24)  # weights, two moments, random states
    fresh = "start over with --fresh or choose another output_dir"
    wanted = {"model", "optimizer", "config", "data", "random", "progress"}
    check(wanted <= values.keys(), f"{path}: not the state of a training run; {fresh}")

    theirs, ours = _flat(values["config"]), _flat(dataclasses.asdict(config))
    differing = [
        f"{key} ({theirs.get(key)} there, {ours.get(key)} here)"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and key not in NOT_MATHEMATICS
    ]
    check(
        not differing,
        f"{path}: the interrupted run there has another configuration: {', '.join(differing)}; {fresh}",
    )
    check(
        values["data"] == data,
        f"{path}: the interrupted run there has other data than '{config.data or 'the default'}'; {fresh}",
    )
    try:
        model.load_state_dict(values["model"])
        optimizer.load_state_dict(values["optimizer"])
        torch.set_rng_state(values["random"]["cpu"])
        if "cuda" in values["random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(values["random"]["cuda"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: does not fit this model ({reason}); {fresh}") from None
    return values["progress"]


def _flat(config: dict) -> dict:
    """Nested keys as `model_config.n_embd`."""
    flat = {}
    for key, value in config.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat
