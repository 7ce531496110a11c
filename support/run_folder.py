"""The folder of a training run: one owner at a time, enough space, results that never mix two runs."""

import shutil
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from support.errors import UserError, require
from support.files import remove_leftovers

RESULTS = ("model.pt", "config.yaml", "eval.json", "metrics.csv", "curve.png", "run.json")
VALIDATION = "validation.csv"  # one more result of a run with an eval_interval
STATE = "training_state.pt"  # exists while a run is unfinished
WORKING_METRICS = "metrics.partial.csv"  # becomes metrics.csv together with the other results
WORKING_VALIDATION = "validation.partial.csv"


@contextmanager
def locked_folder(folder: Path, n_parameters: int):
    """Create the folder if needed and keep other processes out of it inside the block.

    Raises UserError if another process trains there, or if the results cannot be written there.
    """
    name = f"output_dir: {folder}"
    lock = FileLock(folder / ".lock", timeout=0)  # the system releases it if its owner dies
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{name}: another process is training in it; wait for it or choose another") from None
    except OSError as error:
        raise UserError(f"{name} cannot be written ({error.strerror}); choose another") from None
    try:
        for file in (*RESULTS, VALIDATION, STATE, WORKING_METRICS, WORKING_VALIDATION):
            require(not (folder / file).is_dir(), f"{name}/{file} is a folder; remove it")
            remove_leftovers(folder / file)
        in_use = (folder / STATE).stat().st_size if (folder / STATE).exists() else 0
        # Two states, the old and the new one, of 12 bytes per parameter, and model.pt of 4.
        needed, free = 28 * n_parameters - in_use, shutil.disk_usage(folder).free
        shortage = f"{free / 1e6:.1f} MB free, but the checkpoints need {needed / 1e6:.1f} MB"
        require(free > needed, f"{name} has {shortage}; free some disk space or choose another disk")
        yield
    finally:
        lock.release()
