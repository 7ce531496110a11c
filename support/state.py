"""training_state.pt: all that an interrupted run needs to go on as if nothing had happened."""

import dataclasses
import hashlib
import reprlib
from pathlib import Path

import numpy as np
import torch

from support.checkpoint import load_archive, packed
from support.config import TrainingConfig
from support.corpus import Corpus, evenly_spaced
from support.distribution import World
from support.errors import UserError, check, first_line
from support.files import write_together

NOT_MATHEMATICS = ("output_dir", "device", "data", "checkpoint_interval")  # may differ when a run goes on
FRESH = "start over with --fresh or choose another output_dir"


def fingerprint(corpus: Corpus) -> str:
    """A hash of both splits; of long ones, of their lengths and about 2^22 evenly spaced tokens."""
    digest = hashlib.sha256()
    for tokens in (corpus.train, corpus.val):
        digest.update(f"{len(tokens)} ".encode())
        for part in evenly_spaced(tokens, at_most=1 << 22):
            digest.update(part.astype(np.int64))
    return digest.hexdigest()


def save_state(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    data: str,
    random: list[dict],
    progress: dict,
) -> None:
    """Write the state after a step: `random` holds every rank's `random_state`, `progress` plain values:
    next step, losses, seconds, W&B id.

    May raise OSError; the file is then the former one.
    """
    values = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": dataclasses.asdict(config),
        "data": data,
        "random": random,
        "progress": progress,
    }
    write_together({path: packed(values)})


def load_state(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    data: str,
    world: World,
) -> dict:
    """Put model, optimizer and random generators back where they were; return `progress`.

    Raises UserError when the file is damaged, or belongs to another configuration, other data or another
    number of processes.
    """
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    # Weights and two moments make 3; the rest is the index and the random states.
    values = load_archive(path, 2.9 * n_bytes, 3.1 * n_bytes + 2**24, FRESH)
    try:
        _check_same_run(values, config, data, path)
        n_ranks = len(values["random"])
        launcher = "python" if n_ranks == 1 else f"torchrun --nproc_per_node={n_ranks}"
        check(
            n_ranks == world.size,
            f"{path}: the interrupted run there has {n_ranks} process{'es' * (n_ranks > 1)}, this one "
            f"{world.size}; continue it with {launcher} train.py, or {FRESH}",
        )
        progress = values["progress"]
        check(_is_progress(progress, config.num_training_steps), f"{path}: its progress makes no sense; {FRESH}")
        model.load_state_dict(values["model"])
        optimizer.load_state_dict(values["optimizer"])
        _check_tensors(model, optimizer)
        _restore_random_state(values["random"][world.rank], next(model.parameters()).device)
    except UserError:
        raise
    except Exception as error:  # a foreign archive can hold anything under these names, or nothing
        raise UserError(f"{path}: not the state of this run ({first_line(error)}); {FRESH}") from None
    return progress


def _check_same_run(values: dict, config: TrainingConfig, data: str, path: Path) -> None:
    theirs, ours = _flat(values["config"]), _flat(dataclasses.asdict(config))
    differing = [
        f"{key} ({reprlib.repr(theirs.get(key))} there, {ours.get(key)!r} here)"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and key not in NOT_MATHEMATICS
    ]
    check(
        not differing,
        f"{path}: the interrupted run there has another configuration: {', '.join(differing)}; {FRESH}",
    )
    there = reprlib.repr(theirs["data"] or "the default")
    check(
        values["data"] == data,
        f"{path}: the interrupted run there has other data: data ({there} there, "
        f"{config.data or 'the default'!r} here) does not hold the same tokens; {FRESH}",
    )


def _flat(config: dict) -> dict:
    """Nested keys as `model_config.n_embd`."""
    flat = {}
    for key, value in config.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _is_progress(progress: dict, n_steps: int) -> bool:
    return (
        0 < int(progress["step"]) <= n_steps
        and all(isinstance(loss, float) for loss in progress["losses"])
        and isinstance(progress["seconds"], float)
        and isinstance(progress["wandb_id"], (str, type(None)))
    )


def _check_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every number finite and every moment of its parameter's shape; raises ValueError."""
    tensors = list(model.parameters())
    for parameter in model.parameters():
        moments = list(optimizer.state[parameter].values())
        if not moments or any(moment.shape not in (parameter.shape, ()) for moment in moments):
            raise ValueError("the optimizer's state has other shapes")
        tensors += moments
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError("it holds values that are not finite")


def random_state(device: torch.device) -> dict:
    """The generators of torch (it draws the batches), of the GPU, and of numpy, as plain values."""
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest]}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
