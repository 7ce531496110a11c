"""training_state.pt: everything an interrupted run needs to continue bit for bit."""

import hashlib
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from support.checkpoint import load_archive, to_bytes
from support.config import TrainingConfig
from support.corpus import Corpus, evenly_spaced
from support.errors import UserError, first_line, is_out_of_memory, require
from support.files import write_together

FRESH = "start over with --fresh or choose another output_dir"


@dataclass(frozen=True)
class RunIdentity:
    """What must be the same for a run to be resumed."""

    config: TrainingConfig
    data: str  # fingerprint of the corpus
    n_processes: int


@dataclass
class Progress:
    """How far a run has come."""

    next_step: int = 0
    recent_losses: list[float] = field(default_factory=list)  # of the steps in the running mean
    seconds: float = 0.0  # spent training
    wandb_id: str | None = None


def fingerprint(corpus: Corpus) -> str:
    """Hash both splits; of long ones, their lengths and about 2^22 evenly spaced tokens."""
    digest = hashlib.sha256()
    for tokens in (corpus.train, corpus.val):
        digest.update(f"{len(tokens)} ".encode())
        for part in evenly_spaced(tokens, at_most=1 << 22):
            digest.update(part.astype(np.int64))
    return digest.hexdigest()


def save_state(
    path: Path,
    identity: RunIdentity,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    random_states: Iterable[dict],
    progress: Progress,
) -> None:
    """Write the state after a step; `random_states` holds the `random_state` of every process, by rank.

    May raise OSError or MemoryError; the former file is then unchanged.
    """
    values = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": identity.config.flat(),
        "data": identity.data,
        "random": list(random_states),
        "progress": vars(progress),
    }
    write_together({path: to_bytes(values)})


def load_state(
    path: Path,
    identity: RunIdentity,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    device: torch.device,
) -> Progress:
    """Restore model, optimizer and this process's random generators; return the progress.

    Raises UserError if the file is damaged, or belongs to another configuration, other data or another
    number of processes.
    """
    # Weights and two moments make three numbers per parameter; the rest is the index and the random states.
    n_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    values = load_archive(path, 2.9 * n_bytes, 3.1 * n_bytes + 2**24, FRESH)
    try:
        _require_same_run(values, identity, f"{path}: the interrupted run there has")
        progress = Progress(**values["progress"])
        require(0 < progress.next_step <= identity.config.num_training_steps, f"{path}: damaged; {FRESH}")
        model.load_state_dict(values["model"])
        optimizer.load_state_dict(values["optimizer"])
        _restore_random_state(values["random"][rank], device)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: not the state of this run ({first_line(error)}); {FRESH}") from None
    return progress


def _require_same_run(values: dict, identity: RunIdentity, there: str) -> None:
    theirs, ours = values["config"], identity.config.flat()
    differing = [
        f"{key} ({reprlib.repr(theirs.get(key))} there, {ours.get(key)!r} here)"
        for key in identity.config.differing(theirs)
    ]
    require(not differing, f"{there} another configuration: {', '.join(differing)}; {FRESH}")
    names = [reprlib.repr(keys["data"] or "the default") for keys in (theirs, ours)]
    require(
        values["data"] == identity.data,
        f"{there} other data: data ({names[0]} there, {names[1]} here) has different tokens; {FRESH}",
    )
    n = len(values["random"])
    launcher = "python" if n == 1 else f"torchrun --nproc_per_node={n}"
    require(
        n == identity.n_processes,
        f"{there} {n} process{'es' * (n > 1)}, this one {identity.n_processes}; "
        f"resume it with {launcher} train.py, or {FRESH}",
    )


def random_state(device: torch.device) -> dict:
    """The state of the generators of torch (which draws the batches), numpy and the GPU."""
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest]}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:  # the run may have started on a CPU
        torch.cuda.set_rng_state(state["cuda"], device)
