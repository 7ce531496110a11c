"""training_state.pt: everything an interrupted run needs to continue bit for bit."""

import hashlib
import json
import reprlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from support.checkpoint import load_archive, to_bytes
from support.config import load_config
from support.data import Corpus, evenly_spaced
from support.errors import UserError, first_line, is_out_of_memory, require
from support.files import write_together
from support.setup import Setup

FRESH = "start over with --fresh or choose another output_dir"


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


class TrainingState:
    """The file `path` and what it saves: model, optimizer, random generators and progress of one run."""

    def __init__(self, path: Path, setup: Setup, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.path, self.setup, self.model, self.optimizer = path, setup, model, optimizer
        self.data_hash = fingerprint(setup.corpus)

    def save(self, progress: Progress, random_states: list[dict]) -> None:
        """Write the file after a step; `random_states` holds the `random_state` of every process, by rank.

        May raise OSError or MemoryError; the former file is then unchanged.
        """
        values = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "config": self.setup.config.flat(),
            "data": self.data_hash,
            "random": random_states,
            "progress": vars(progress),
        }
        write_together({self.path: to_bytes(values)})

    def load(self) -> Progress:
        """Restore model, optimizer and this process's random generators; return the progress.

        Raises UserError if the file is damaged, or belongs to another configuration, other data or another
        number of processes.
        """
        # Weights and two moments make three numbers per parameter; the rest is the index and the random states.
        n_bytes = 4 * sum(parameter.numel() for parameter in self.model.parameters())
        values = load_archive(self.path, 2.9 * n_bytes, 3.1 * n_bytes + 2**24, FRESH)
        try:
            self._require_same_run("interrupted", values["config"], values["data"])
            n, n_here = len(values["random"]), self.setup.world.size
            launcher = "python" if n == 1 else f"torchrun --nproc_per_node={n}"
            there = (
                f"{self.path.parent}: the interrupted run there has {n} process{'es' * (n > 1)}, this one {n_here}"
            )
            require(n == n_here, f"{there}; resume it with {launcher} train.py, or {FRESH}")
            progress = Progress(**values["progress"])
            in_range = 0 < progress.next_step <= self.setup.config.num_training_steps
            require(in_range, f"{self.path}: damaged; {FRESH}")
            self.model.load_state_dict(values["model"])
            self.optimizer.load_state_dict(values["optimizer"])
            _restore_random_state(values["random"][self.setup.world.rank], self.setup.device)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"{self.path}: not the state of this run ({first_line(error)}); {FRESH}") from None
        return progress

    def finished_run_exists(self) -> bool:
        """Whether the folder has the results of a finished run.

        Raises UserError if it had another configuration or other data.
        """
        model, config, run = (self.path.with_name(name) for name in ("model.pt", "config.yaml", "run.json"))
        if not (model.exists() and config.exists()):
            return False
        try:
            data_hash = json.loads(run.read_bytes())["data-sha256"]
        except (OSError, ValueError, LookupError, TypeError):  # an older run: only its configuration is known
            data_hash = None
        self._require_same_run("finished", load_config(str(config)).flat(), data_hash)
        return True

    def _require_same_run(self, kind: str, theirs: dict, data_hash: str | None) -> None:
        there, ours = f"{self.path.parent}: the {kind} run there has", self.setup.config.flat()
        differing = [
            f"{key} ({reprlib.repr(theirs.get(key))} there, {ours.get(key)!r} here)"
            for key in self.setup.config.differing(theirs)
        ]
        require(not differing, f"{there} another configuration: {', '.join(differing)}; {FRESH}")
        names = [reprlib.repr(keys["data"] or "the default") for keys in (theirs, ours)]
        other = f"other data: data ({names[0]} there, {names[1]} here) has different tokens"
        require(data_hash in (None, self.data_hash), f"{there} {other}; {FRESH}")


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
