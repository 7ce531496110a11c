"""A run that is interrupted, however and wherever, resumes and ends with the same bits; a finished one is kept."""

import json
import os
import random
import re
import signal
import time

import numpy as np
import pytest
import torch
from tiny_run import TinyRun, assert_refused, at_batches, files, wait_until

import train

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The results of a run without any interruption."""
    tiny = TinyRun(tmp_path_factory.mktemp("reference"))
    assert tiny.main() == 0
    return tiny.results()


def interrupted(tiny, monkeypatch, batch, *signals, arguments=()) -> int:
    with monkeypatch.context() as patch:
        at_batches(patch, {batch: lambda: [os.kill(os.getpid(), number) for number in signals]})
        return tiny.main(*arguments)


def assert_ends_as(tiny, results):
    """The same command resumes, ends with these bits and leaves nothing else behind."""
    assert tiny.main() == 0
    assert tiny.results() == results
    left = {path.name for path in tiny.out.iterdir()}
    assert left - {"curve.png", ".lock"} == {"config.yaml", "run.json", *results}


# 2 micro-batches a step: 5 and 11 are inside gradient accumulation, 11 in the last step
@pytest.mark.parametrize(("batch", "name"), [(0, "SIGTERM"), (5, "SIGINT"), (6, "SIGHUP"), (11, "SIGINT")])
def test_a_signal_ends_the_step_and_the_same_command_goes_on(
    tmp_path, monkeypatch, capsys, reference, batch, name
):
    tiny, number, step = TinyRun(tmp_path), getattr(signal, name), batch // 2 + 1
    assert interrupted(tiny, monkeypatch, batch, number) == 128 + number
    assert f"resume at step {step}" in capsys.readouterr().out, "the current step finishes and no other starts"
    assert_ends_as(tiny, reference)
    assert f"at step {step}" in capsys.readouterr().out, "the screen does not say where the run resumes"


def test_a_second_signal_acts_at_once_and_one_after_training_costs_nothing(
    tmp_path, monkeypatch, capsys, reference
):
    def stop(*args, **keys):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **keys)

    tiny, evaluate = TinyRun(tmp_path, checkpoint_interval=1), train.evaluate
    assert interrupted(tiny, monkeypatch, 5, signal.SIGINT, signal.SIGINT) == 130
    assert "resume at step 2" in capsys.readouterr().out, "steps 0 and 1 were done, step 2 was not finished"
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", stop)
        assert tiny.main() in (143, 0)
    assert_ends_as(tiny, reference)


def test_killed_run_falls_back_to_the_last_state(tmp_path):
    keys = {"checkpoint_interval": 2, "num_training_steps": 20}
    whole, tiny = TinyRun(tmp_path / "whole", **keys), TinyRun(tmp_path, **keys)
    process = tiny.process()
    wait_until(lambda: tiny.saves() or not process.is_alive())
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, tiny.log.read_text()
    assert whole.main() == 0
    assert_ends_as(tiny, whole.results())


@pytest.mark.soak
def test_soak_sixty_kills_of_one_run(tmp_path):
    keys = {"num_training_steps": 1500, "checkpoint_interval": 3, "eval_interval": 100}
    whole, tiny = TinyRun(tmp_path / "whole", **keys), TinyRun(tmp_path, **keys)
    assert whole.main() == 0
    draw = random.Random(7)
    for _ in range(60):
        process, saved = tiny.process(), tiny.saves()
        if draw.random() < 0.85:  # in training, else anywhere from the start on
            wait_until(lambda: tiny.saves() != saved or not process.is_alive())  # noqa: B023
        time.sleep(draw.uniform(0, 0.2))
        number = draw.choice([signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGINT])
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        assert process.exitcode in (0, -number, 128 + number), tiny.log.read_text()[-2000:]
    assert_ends_as(tiny, whole.results())


def test_folder_is_kept_for_its_configuration_and_data(tmp_path, monkeypatch, capsys, reference):
    tiny, other = TinyRun(tmp_path), tmp_path / "other.npz"
    np.savez(other, train=np.arange(400, dtype=np.uint16), val=np.arange(90, dtype=np.uint16))
    ways_out = ["--fresh", "output_dir"]
    assert interrupted(tiny, monkeypatch, 3, signal.SIGTERM) == 143
    for _ in ("interrupted", "finished"):
        change = ("--set", "max_lr=0.5", "model_config.n_head=4")
        words = ["max_lr", "0.01", "0.5", "n_head", *ways_out]
        assert_refused(capsys, tmp_path, words, train, tiny.config, *change)
        assert_refused(capsys, tmp_path, ["data", *ways_out], train, tiny.config, "--data", other)
        assert_ends_as(tiny, reference)
    moved = ("--data", tiny.tokens.rename(tmp_path / "moved.npz"))
    before = files(tiny.out)
    capsys.readouterr()
    assert tiny.main(*moved) == 0, "the same tokens under another name"
    out, loss = capsys.readouterr().out, json.loads(before["eval.json"])["val-loss"]
    assert float(re.search(r"validation loss\W+([\d.]+)", out)[1]) == pytest.approx(loss, abs=1e-3)
    assert "--fresh" in out and files(tiny.out) == before
    assert tiny.main(*moved, "--fresh", "--set", "max_lr=0.5") == 0
    assert files(tiny.out)["model.pt"] != before["model.pt"]


def test_second_process_in_a_folder_is_refused_and_a_dead_owner_is_not_in_the_way(tmp_path, capsys):
    tiny = TinyRun(tmp_path, num_training_steps=100_000, checkpoint_interval=1)
    owner = tiny.process()
    wait_until(lambda: tiny.saves() or not owner.is_alive())
    assert tiny.main() == 2
    error = capsys.readouterr().err
    assert str(tiny.out) in error and error.count("\n") == 1
    owner.kill()
    owner.join()
    assert tiny.main("--fresh", "--set", "num_training_steps=3") == 0


def test_init_starts_from_these_weights_and_is_compared_on_resuming(tmp_path, monkeypatch, capsys):
    first, further = TinyRun(tmp_path / "first"), TinyRun(tmp_path / "further")
    assert first.main() == 0
    init = ("--init", first.out / "model.pt")
    assert interrupted(further, monkeypatch, 5, signal.SIGTERM, arguments=init) == 143
    assert_refused(capsys, tmp_path, ["init"], train, further.config)
    assert further.main(*init) == 0
    assert float(further.rows()[0]["loss"]) < float(first.rows()[0]["loss"]) - 0.01


@pytest.mark.parametrize("batch", [None, 9])
def test_validation_losses_leave_the_training_unchanged(tmp_path, monkeypatch, reference, batch):
    """They are those of a part of the held-out tokens; the last one is that of all."""

    def watched(model, batches, *args, **keys):
        sizes.append(len(batches := list(batches)))
        return evaluate(model, batches, *args, **keys)

    tiny, sizes, evaluate = TinyRun(tmp_path, eval_interval=2, checkpoint_interval=4), [], train.evaluate
    with np.load(tiny.tokens) as arrays:
        np.savez(tiny.tokens, train=arrays["train"], val=np.arange(16 * 130, dtype=np.uint16))
    monkeypatch.setattr(train, "evaluate", watched)
    if batch is not None:
        assert interrupted(tiny, monkeypatch, batch, signal.SIGTERM, signal.SIGTERM) == 143
    assert tiny.main() == 0
    assert tiny.results()["model.pt"] == reference["model.pt"], "evaluation must leave the training as it is"
    assert sizes[-1] == 130 and max(sizes[:-1]) <= 50
    losses = [row["val-loss"] for row in tiny.rows()]
    assert [bool(loss) for loss in losses] == [False, True] * 3 and len(set(losses)) == 4
    assert float(losses[-1]) == pytest.approx(json.loads((tiny.out / "eval.json").read_text())["val-loss"])


@pytest.mark.parametrize(
    "keys", [{"checkpoint_interval": 1}, {"num_training_steps": 1}], ids=["some step", "last"]
)
def test_run_that_diverges_ends_1_and_keeps_finite_weights(tmp_path, capsys, keys):
    """The last update can make the weights useless though every loss was finite."""
    tiny = TinyRun(tmp_path, num_warmup_steps=0, max_lr=1e30, **keys)
    for _ in ("the first time", "the same command again"):
        assert tiny.main() == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "diverged" in error and "max_lr" in error
    assert not (tiny.out / "eval.json").exists()
    if "checkpoint_interval" in keys:
        model = torch.load(tiny.out / "training_state.pt", weights_only=True)["model"]
        assert all(tensor.isfinite().all() for tensor in model.values())
