"""training_state.pt: all that an interrupted run needs to go on as if nothing had happened."""

import hashlib
import reprlib

import numpy as np
import torch

from support.checkpoint import load_archive, to_bytes
from support.corpus import Corpus, evenly_spaced
from support.errors import UserError, first_line, require
from support.files import write_together

FRESH = "start over with --fresh or choose another output_dir"


def fingerprint(corpus: Corpus) -> str:
    """A hash of both splits; of long ones, of their lengths and about 2^22 evenly spaced tokens."""
    digest = hashlib.sha256()
    for tokens in (corpus.train, corpus.val):
        digest.update(f"{len(tokens)} ".encode())
        for part in evenly_spaced(tokens, at_most=1 << 22):
            digest.update(part.astype(np.int64))
    return digest.hexdigest()


def save_state(run, random: list[dict], progress: dict) -> None:
    """Write the run's state after a step: `random` holds every rank's `random_state`, `progress` plain
    values (next step, losses, seconds, W&B id).

    May raise OSError; the file is then the former one.
    """
    values = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "config": run.config.flat(),
        "data": run.data,
        "random": random,
        "progress": progress,
    }
    write_together({run.state_path: to_bytes(values)})


def load_state(run) -> dict:
    """Put the run's model, optimizer and random generators back where they were; return `progress`.

    Raises UserError when the file is damaged, or belongs to another configuration, other data or another
    number of processes.
    """
    path, model = run.state_path, run.model
    # Weights and two moments make 3 numbers a parameter; the rest is the index and the random states.
    n_bytes = 4 * run.n_parameters
    values = load_archive(path, 2.9 * n_bytes, 3.1 * n_bytes + 2**24, FRESH)
    try:
        _check_same_run(run, values, f"{path}: the interrupted run there has")
        progress = values["progress"]
        good = 0 < int(progress["step"]) <= run.config.num_training_steps
        good = good and all(isinstance(number, float) for number in [progress["seconds"], *progress["losses"]])
        good = good and isinstance(progress["wandb_id"], (str, type(None)))
        model.load_state_dict(values["model"])
        run.optimizer.load_state_dict(values["optimizer"])
        for parameter in model.parameters():
            moments = list(run.optimizer.state[parameter].values())
            good = good and moments and all(moment.shape in (parameter.shape, ()) for moment in moments)
            good = good and all(tensor.isfinite().all() for tensor in (parameter, *moments))
        require(bool(good), f"{path}: its values make no sense; {FRESH}")
        _restore_random_state(values["random"][run.world.rank], run.hardware.device)
    except UserError:
        raise
    except Exception as error:  # a foreign archive can hold anything under these names, or nothing
        raise UserError(f"{path}: not the state of this run ({first_line(error)}); {FRESH}") from None
    return progress


def _check_same_run(run, values: dict, there: str) -> None:
    theirs, ours = values["config"], run.config.flat()
    differing = [
        f"{key} ({reprlib.repr(theirs.get(key))} there, {ours.get(key)!r} here)"
        for key in run.config.differing(theirs)
    ]
    require(not differing, f"{there} another configuration: {', '.join(differing)}; {FRESH}")
    names = [reprlib.repr(keys["data"] or "the default") for keys in (theirs, ours)]
    require(
        values["data"] == run.data,
        f"{there} other data: data ({names[0]} there, {names[1]} here) does not hold the same tokens; {FRESH}",
    )
    n, here = len(values["random"]), run.world.size
    launcher = "python" if n == 1 else f"torchrun --nproc_per_node={n}"
    require(
        n == here,
        f"{there} {n} process{'es' * (n > 1)}, this one {here}; continue it with {launcher} train.py, or {FRESH}",
    )


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
    if device.type == "cuda" and "cuda" in state:  # it may have begun on a CPU
        torch.cuda.set_rng_state(state["cuda"], device)
