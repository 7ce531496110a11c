"""A training run small enough to be killed many times (0.4 M parameters), and how tests give commands."""

import csv
import multiprocessing
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import yaml

import train

ROOT = Path(train.__file__).resolve().parent
KEYS = {
    "tokenizer_encoding": "gpt2",
    "model_config": {"n_embd": 8, "n_head": 2, "n_positions": 16, "n_layer": 1},
    "device": "cpu",
    "batch_size": 2,
    "seq_len": 8,
    "num_warmup_steps": 2,
    "num_training_steps": 6,
    "grad_accumulation_steps": 2,
    "min_lr": 1e-3,
    "max_lr": 1e-2,
}


def status(command, *arguments) -> int:
    """The exit status of `python command.py arguments`, run in this process."""
    try:
        command.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def files(folder: Path) -> dict[str, bytes]:
    """Every file in the folder and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(capsys, folder: Path, words, command, *arguments, status_wanted: int = 2) -> str:
    """The command ends with one line on stderr that names these words, and leaves the folder as it was."""
    before = files(folder)
    capsys.readouterr()
    assert status(command, *arguments) == status_wanted
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 1500, error
    for word in words:
        assert str(word) in error, f"'{word}' is not named in: {error}"
    assert files(folder) == before, "bad input must leave every file as it was"
    return error


def random_tokens(n: int, seed: int = 3) -> np.ndarray:
    """Random tokens, in the type of a token file."""
    return np.random.default_rng(seed).integers(0, 50257, n).astype(np.uint16)


class TinyRun:
    """A configuration and a token file in `folder`, and the run's output folder."""

    def __init__(self, folder: Path, **keys):
        folder.mkdir(exist_ok=True)
        self.out = Path(keys.pop("output_dir", folder / "out"))
        self.tokens = folder / "tokens.npz"
        self.config = folder / "tiny.yaml"
        self.log = folder / "log.txt"  # what its processes printed
        np.savez(self.tokens, train=random_tokens(400), val=random_tokens(90, seed=4))
        values = {"output_dir": str(self.out), "data": str(self.tokens), **KEYS, **keys}
        self.config.write_text(yaml.safe_dump(values))

    def main(self, *arguments) -> int:
        """Run the command in this process; return its exit status."""
        return status(train, self.config, *arguments)

    def process(self, *arguments: str):
        """Start the command in a process that may be killed."""
        process = processes().Process(target=_main, args=([str(self.config), *arguments], self.log))
        process.start()
        return process

    def saves(self) -> int:
        """Changes whenever an unfinished run saves its state."""
        with suppress(FileNotFoundError):
            return (self.out / "training_state.pt").stat().st_mtime_ns
        return 0

    def rows(self) -> list[dict[str, str]]:
        """The rows of metrics.csv."""
        with (self.out / "metrics.csv").open() as file:
            return list(csv.DictReader(file))

    def results(self) -> dict[str, bytes]:
        """The files that must not depend on interruptions, byte for byte."""
        return {name: (self.out / name).read_bytes() for name in ("model.pt", "metrics.csv", "eval.json")}


def processes():
    """Processes that fork from one which has imported everything and computed nothing: each starts fast."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "generate", "support.run", "support.tokenizer", "torch._dynamo"])
    return context


def _main(arguments: list[str], log: Path) -> None:
    os.environ["MPLBACKEND"] = "Agg"
    with log.open("a", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        train.main(arguments)


def python(*arguments, **options) -> subprocess.CompletedProcess:
    """`python arguments` in a process of its own."""
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, **options)


def wait_until(condition, seconds: float = 120) -> None:
    """Poll until the condition is true; fail after the given time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def at_batches(monkeypatch, actions: dict) -> None:
    """Let `actions[n]()` happen just before the n-th micro-batch of the process is drawn, from 0."""
    sampler, drawn = train.random_batch_sampler, iter(range(10**9))

    def watched(*args):
        batches = sampler(*args)
        while True:
            actions.get(next(drawn), lambda: None)()
            yield next(batches)

    monkeypatch.setattr(train, "random_batch_sampler", watched)
