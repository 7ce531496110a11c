"""A training run small enough to be killed many times: 0.4 M parameters, some milliseconds a step."""

import multiprocessing
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import yaml

import generate
import train
from support import plan, results

ROOT = Path(train.__file__).parent
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


class TinyRun:
    """Its configuration and token file, in a separate folder beside the output folder."""

    def __init__(self, folder: Path, **keys):
        folder.mkdir(exist_ok=True)
        self.out = Path(keys.pop("output_dir", folder / "out"))
        self.tokens = folder / "tokens.npz"
        self.config = folder / "tiny.yaml"
        self.state = self.out / "training_state.pt"
        draw = np.random.default_rng(3)
        splits = {name: draw.integers(0, 50257, n).astype(np.uint16) for name, n in (("train", 400), ("val", 90))}
        np.savez(self.tokens, **splits)
        values = {"output_dir": str(self.out), "data": str(self.tokens), **KEYS, **keys}
        self.config.write_text(yaml.safe_dump(values))

    def main(self, *arguments: str) -> int:
        """Run the command in this process; return its exit status."""
        try:
            train.main([str(self.config), *arguments])
        except SystemExit as stop:
            return stop.code
        return 0

    def command(self, *arguments: str) -> list[str]:
        """The command line that a user types."""
        return [sys.executable, str(ROOT / "train.py"), str(self.config), *arguments]

    def process(self, *arguments: str):
        """Start the command in a process that may be killed."""
        process = processes().Process(target=_main, args=(str(self.config), arguments, str(self.config) + ".log"))
        process.start()
        return process

    def log(self) -> str:
        """What the processes printed."""
        return Path(str(self.config) + ".log").read_text()

    def rows(self) -> int:
        """Rows of the metrics, of the unfinished run if there is one, with the header."""
        for name in ("metrics.partial.csv", "metrics.csv"):
            with suppress(FileNotFoundError):
                return (self.out / name).read_bytes().count(b"\n")
        return 0

    def results(self) -> dict[str, bytes]:
        """The files that must not depend on interruptions, byte for byte."""
        return {name: (self.out / name).read_bytes() for name in ("model.pt", "metrics.csv", "eval.json")}

    def leftovers(self) -> list[str]:
        """Temporary files in the output folder."""
        return sorted(path.name for path in self.out.glob(".*tmp*"))


def processes():
    """Processes that fork from one which has imported everything and computed nothing: each starts fast."""
    context = multiprocessing.get_context("forkserver")
    modules = ["train", "generate", "support.run", "support.tokenizer", "torch._dynamo"]  # DDP imports the last
    context.set_forkserver_preload(modules)
    return context


def _main(config: str, arguments: tuple, log: str) -> None:
    os.environ["MPLBACKEND"] = "Agg"
    with open(log, "a", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        train.main([config, *arguments])


def leave_out_what_is_slow(patch) -> None:
    """The measurement of speed, the picture and the sample of text: none of them has a part in any fault."""
    patch.setattr(plan, "matrix_product_rate", lambda hardware: 1e12)
    patch.setattr(results, "plot_curve", lambda *args: None)
    patch.setattr(generate, "generate", lambda *args, **kwargs: [""])


def wait_until(condition, seconds: float = 120) -> None:
    """Poll until the condition is true; fail after the given time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.001)


def at_batches(monkeypatch, actions: dict) -> None:
    """Let `actions[n]()` happen just before the n-th micro-batch of the process is drawn, from 0."""
    sampler, drawn = train.random_batch_sampler, iter(range(10**9))

    def watched(*args):
        batches = sampler(*args)
        while True:
            actions.get(next(drawn), lambda: None)()
            yield next(batches)

    monkeypatch.setattr(train, "random_batch_sampler", watched)
