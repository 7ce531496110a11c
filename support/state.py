"""training_state.pt: all that an interrupted run needs to go on as if nothing had happened."""

import hashlib
import reprlib
from pathlib import Path

import numpy as np
import torch

from support.checkpoint import load_archive, packed
from support.config import TrainingConfig
from support.corpus import Corpus
from support.distribution import World
from support.errors import UserError, check, first_line
from support.files import write_together

FRESH = "start over with --fresh or choose another output_dir"


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
        "config": config.flat(),
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
        _check_same_run(values, config, data, world.size, f"{path}: the interrupted run there has")
        progress = values["progress"]
        check(_makes_sense(progress, config.num_training_steps), f"{path}: its progress makes no sense; {FRESH}")
        model.load_state_dict(values["model"])
        optimizer.load_state_dict(values["optimizer"])
        for parameter in model.parameters():
            moments = list(optimizer.state[parameter].values())
            same_shape = bool(moments) and all(moment.shape in (parameter.shape, ()) for moment in moments)
            finite = all(bool(tensor.isfinite().all()) for tensor in (parameter, *moments))
            check(same_shape and finite, f"{path}: holds values of other shapes, or not finite; {FRESH}")
        _restore_random_state(values["random"][world.rank], next(model.parameters()).device)
    except UserError:
        raise
    except Exception as error:  # a foreign archive can hold anything under these names, or nothing
        raise UserError(f"{path}: not the state of this run ({first_line(error)}); {FRESH}") from None
    return progress


def _check_same_run(values: dict, config: TrainingConfig, data: str, n_ranks: int, there: str) -> None:
    theirs, ours = values["config"], config.flat()
    differing = [
        f"{key} ({reprlib.repr(theirs.get(key))} there, {ours.get(key)!r} here)"
        for key in config.differing(theirs)
    ]
    check(not differing, f"{there} another configuration: {', '.join(differing)}; {FRESH}")
    names = [reprlib.repr(keys["data"] or "the default") for keys in (theirs, ours)]
    check(
        values["data"] == data,
        f"{there} other data: data ({names[0]} there, {names[1]} here) does not hold the same tokens; {FRESH}",
    )
    n = len(values["random"])
    launcher = "python" if n == 1 else f"torchrun --nproc_per_node={n}"
    check(
        n == n_ranks,
        f"{there} {n} process{'es' * (n > 1)}, this one {n_ranks}; "
        f"continue it with {launcher} train.py, or {FRESH}",
    )


def _makes_sense(progress: dict, n_steps: int) -> bool:
    return (
        0 < int(progress["step"]) <= n_steps
        and all(isinstance(loss, float) for loss in progress["losses"])
        and isinstance(progress["seconds"], float)
        and isinstance(progress["wandb_id"], (str, type(None)))
    )


def random_state(device: torch.device) -> dict:
    """The generators of torch (it draws the batches), of the GPU, and of numpy, as plain values."""
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "numpy": [kind, torch.from_numpy(keys), *rest]}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
