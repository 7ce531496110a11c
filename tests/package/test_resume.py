"""A run that is interrupted, however and wherever, resumes and ends with the same bits; a finished one is kept."""

import csv
import json
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from tiny_run import TinyRun, assert_refused, at_batches, files, wait_until

import train

pytestmark = pytest.mark.usefixtures("quick")
NO_DROPOUT = {"n_embd": 8, "n_head": 2, "n_positions": 16, "n_layer": 1, "p_dropout": 0.0}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run without any interruption."""
    tiny = TinyRun(tmp_path_factory.mktemp("reference"))
    assert tiny.main() == 0
    return tiny


@pytest.fixture
def finished(tmp_path):
    tiny = TinyRun(tmp_path)
    assert tiny.main() == 0
    return tiny


def interrupted(tiny, monkeypatch, batch, *signals, arguments=()) -> int:
    with monkeypatch.context() as patch:
        at_batches(patch, {batch: lambda: [os.kill(os.getpid(), number) for number in signals]})
        return tiny.main(*arguments)


def assert_only_results(tiny):
    names = {"model.pt", "config.yaml", "eval.json", "run.json", "metrics.csv"}
    left = {path.name for path in tiny.out.iterdir() if not path.name.startswith(".lock")}
    assert left - {"curve.png", "validation.csv"} == names


# --- signals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "number"),
    [(0, signal.SIGTERM), (5, signal.SIGINT), (6, signal.SIGHUP), (11, signal.SIGINT)],
)  # 2 micro-batches a step: 5 and 11 are inside gradient accumulation, 11 in the last step
def test_first_signal_ends_the_step_and_the_same_command_goes_on(
    tmp_path, monkeypatch, capsys, reference, batch, number
):
    tiny = TinyRun(tmp_path)
    assert interrupted(tiny, monkeypatch, batch, number) == 128 + number
    step = batch // 2 + 1
    assert tiny.rows() == step, "the step in hand is finished, and no other one begun"
    assert f"step {step}" in capsys.readouterr().out
    assert tiny.main() == 0
    assert f"step {step}" in capsys.readouterr().out, "the screen does not say where the run resumes"
    assert tiny.results() == reference.results()
    assert_only_results(tiny)


def test_second_signal_stops_at_once(tmp_path, monkeypatch, reference):
    tiny = TinyRun(tmp_path, checkpoint_interval=1)
    assert interrupted(tiny, monkeypatch, 5, signal.SIGINT, signal.SIGINT) == 130
    assert tiny.rows() == 2, "steps 0 and 1 were done, step 2 was not finished"
    assert tiny.main() == 0
    assert tiny.results() == reference.results()


def test_signal_after_the_last_step_loses_nothing(tmp_path, monkeypatch, reference):
    tiny, original = TinyRun(tmp_path), train.evaluate
    with monkeypatch.context() as patch:
        kill = lambda *args, **keys: os.kill(os.getpid(), signal.SIGTERM) or original(*args, **keys)  # noqa: E731
        patch.setattr(train, "evaluate", kill)
        assert tiny.main() in (143, 0)
    assert tiny.main() == 0
    assert tiny.results() == reference.results()


def test_an_ignored_signal_stays_ignored(tmp_path, monkeypatch):
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what runs in its background
    try:
        assert interrupted(TinyRun(tmp_path), monkeypatch, 3, signal.SIGINT) == 0
    finally:
        signal.signal(signal.SIGINT, former)


# --- kill -9 ---------------------------------------------------------------------------------------------


def test_killed_run_falls_back_to_the_last_state(tmp_path):
    keys = {"checkpoint_interval": 2, "num_training_steps": 40}
    whole, tiny = TinyRun(tmp_path / "whole", **keys), TinyRun(tmp_path, **keys)
    process = tiny.process()
    wait_until(lambda: (tiny.out / "training_state.pt").exists() or not process.is_alive())
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, tiny.log.read_text()
    assert whole.main() == tiny.main() == 0
    assert tiny.results() == whole.results()
    assert_only_results(tiny)


@pytest.mark.soak
def test_soak_sixty_kills_of_one_run(tmp_path, capsys):
    keys = {"num_training_steps": 1500, "checkpoint_interval": 3, "eval_interval": 100}
    whole, tiny = TinyRun(tmp_path / "whole", **keys), TinyRun(tmp_path, **keys)
    assert whole.main() == 0
    draw, statuses = random.Random(7), []
    while len(statuses) < 60 and not (tiny.out / "model.pt").exists():
        process = tiny.process()
        if draw.random() < 0.85:  # in training, else anywhere from the start on
            goal = min(tiny.rows() + draw.randrange(1, 14), 1500)
            wait_until(lambda: tiny.rows() >= goal or not process.is_alive())  # noqa: B023
            time.sleep(draw.uniform(0, 0.03))
        else:
            time.sleep(draw.uniform(0, 1.0))
        number = draw.choice([signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGINT])
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        assert process.exitcode in (0, -number, 128 + number), tiny.log.read_text()[-2000:]
        statuses.append(process.exitcode)
    assert tiny.main() == 0
    assert tiny.results() == whole.results()
    assert (tiny.out / "validation.csv").read_bytes() == (whole.out / "validation.csv").read_bytes()
    assert_only_results(tiny)
    with capsys.disabled():
        counts = {status: statuses.count(status) for status in sorted(set(statuses))}
        print(f"\n{len(statuses)} kills of one run of 1500 steps, exit statuses {counts}: identical bits")


# --- what may resume, and what may not --------------------------------------------------------------------


def test_interrupted_run_resumes_with_its_own_configuration_and_data_only(
    tmp_path, monkeypatch, capsys, reference
):
    tiny, other = TinyRun(tmp_path), tmp_path / "other.npz"
    np.savez(other, train=np.arange(400, dtype=np.uint16), val=np.arange(90, dtype=np.uint16))
    assert interrupted(tiny, monkeypatch, 3, signal.SIGTERM) == 143
    words = ["max_lr", "0.01", "0.5", "n_head", "--fresh", "output_dir"]
    change = ("--set", "max_lr=0.5", "model_config.n_head=4")
    assert_refused(capsys, tmp_path, words, train, tiny.config, *change)
    assert_refused(capsys, tmp_path, ["data", "--fresh", "output_dir"], train, tiny.config, "--data", other)
    tiny.tokens.rename(tmp_path / "moved.npz")
    assert tiny.main("--data", tmp_path / "moved.npz") == 0, "the same tokens under another name resume"
    assert tiny.results() == reference.results()


def test_fresh_starts_over(tmp_path, monkeypatch):
    tiny = TinyRun(tmp_path)
    assert interrupted(tiny, monkeypatch, 3, signal.SIGTERM) == 143
    assert tiny.main("--fresh", "--set", "max_lr=0.5") == 0
    assert tiny.rows() == 6 and "max_lr: 0.5" in (tiny.out / "config.yaml").read_text()


def test_finished_run_shows_its_results_and_how_to_start_over(finished, tmp_path, capsys):
    before = files(finished.out)
    capsys.readouterr()
    assert finished.main() == 0
    out, loss = capsys.readouterr().out, json.loads(before["eval.json"])["val-loss"]
    assert f"{loss:.2f}" in out and "--fresh" in out
    assert files(finished.out) == before
    other = tmp_path / "other.npz"
    np.savez(other, train=np.arange(400, dtype=np.uint16), val=np.arange(90, dtype=np.uint16))
    words = ["max_lr", "--fresh", "output_dir"]
    assert_refused(capsys, tmp_path, words, train, finished.config, "--set", "max_lr=0.5")
    assert_refused(capsys, tmp_path, ["data", *words[1:]], train, finished.config, "--data", other)
    assert finished.main("--fresh", "--set", "max_lr=0.5") == 0
    assert json.loads((finished.out / "eval.json").read_text()) != json.loads(before["eval.json"])


def test_second_process_in_a_folder_is_refused_and_a_dead_owner_is_not_in_the_way(tmp_path, capsys):
    tiny = TinyRun(tmp_path, num_training_steps=100_000)
    owner = tiny.process()
    wait_until(lambda: tiny.rows() > 1 or not owner.is_alive())
    assert tiny.main() == 2
    error = capsys.readouterr().err
    assert str(tiny.out) in error and error.count("\n") == 1
    owner.kill()
    owner.join()
    assert tiny.main("--fresh", "--set", "num_training_steps=3") == 0


@pytest.mark.parametrize("place", [".", "model.pt", "metrics.csv", "training_state.pt", "/proc/tiny"])
def test_output_folder_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch, capsys, place):
    tiny = TinyRun(tmp_path, **({"output_dir": place} if place[0] == "/" else {}))
    if place == ".":
        tiny.out.write_text("a file")
    elif place[0] != "/":
        (tiny.out / place).mkdir(parents=True)
    monkeypatch.setattr(train, "random_batch_sampler", lambda *_: pytest.fail("training began"))
    assert tiny.main() == 2
    error = capsys.readouterr().err
    assert str(tiny.out) in error and error.count("\n") == 1 and "tmp" not in error.replace(str(tmp_path), "")
    assert place == "metrics.csv" or not (tiny.out / "metrics.csv").exists()


# --- what goes on ----------------------------------------------------------------------------------------


def test_generators_continue(tmp_path, monkeypatch):
    """numpy's too, which a student's own sampler may draw from."""
    tiny = TinyRun(tmp_path)
    np.random.seed(5)
    assert interrupted(tiny, monkeypatch, 3, signal.SIGTERM) == 143
    expected = np.random.random()
    np.random.seed(6)
    assert interrupted(tiny, monkeypatch, 0, signal.SIGTERM) == 143
    assert np.random.random() == expected, "numpy's generator was not restored"


def test_checkpoint_interval(tmp_path, monkeypatch):
    tiny, steps = TinyRun(tmp_path, checkpoint_interval=2), {}
    path = tiny.out / "training_state.pt"

    def look(batch):
        return lambda: steps.update({batch // 2: path.stat().st_mtime_ns if path.exists() else None})

    at_batches(monkeypatch, {batch: look(batch) for batch in range(0, 12, 2)})
    assert tiny.main() == 0
    assert steps[0] is steps[1] is None and steps[2] == steps[3] < steps[4] == steps[5]


def test_init_starts_from_these_weights_and_is_not_read_again_on_resuming(finished, tmp_path, monkeypatch, capsys):
    start = tmp_path / "start.pt"
    start.write_bytes((finished.out / "model.pt").read_bytes())
    init, losses = ("--init", start), []
    for name, arguments in (("further", init), ("random", ())):
        tiny = TinyRun(tmp_path / name, model_config=NO_DROPOUT)
        assert tiny.main(*arguments) == 0
        losses.append(float(next(csv.DictReader((tiny.out / "metrics.csv").open()))["loss"]))
    assert losses[0] < losses[1] - 0.05
    tiny = TinyRun(tmp_path / "further", output_dir=tmp_path / "stopped", model_config=NO_DROPOUT)
    assert interrupted(tiny, monkeypatch, 5, signal.SIGTERM, arguments=init) == 143
    assert_refused(capsys, tmp_path, ["init"], train, tiny.config)
    start.rename(tmp_path / "gone.pt")
    assert_refused(
        capsys, tmp_path, ["start.pt"], train, tiny.config, *init, "--dry-run", "--set", "output_dir=new"
    )
    assert tiny.main(*init) == 0
    assert tiny.results()["model.pt"] == (tmp_path / "further/out/model.pt").read_bytes()


@pytest.mark.parametrize("batch", [None, 3, 9])
def test_validation_losses_leave_the_training_unchanged(tmp_path, monkeypatch, reference, batch):
    tiny = TinyRun(tmp_path, eval_interval=2, checkpoint_interval=4)
    if batch is not None:
        assert interrupted(tiny, monkeypatch, batch, signal.SIGTERM, signal.SIGTERM) == 143
    assert tiny.main() == 0
    assert tiny.results() == reference.results(), "training must be bit-identical with and without evaluation"
    rows = list(csv.DictReader((tiny.out / "validation.csv").open()))
    assert [int(row["step"]) for row in rows] == [1, 3, 5]
    losses = [float(row["val-loss"]) for row in rows]
    assert len(set(losses)) == 3, "each row should be the loss of its own step"
    assert losses[-1] == pytest.approx(json.loads((tiny.out / "eval.json").read_text())["val-loss"], rel=1e-6)


def test_validation_during_training_takes_a_part_and_the_end_all(tmp_path, monkeypatch):
    tiny, sizes = TinyRun(tmp_path, batch_size=1, eval_interval=3), []
    np.savez(tiny.tokens, train=np.arange(400, dtype=np.uint16), val=np.arange(8 * 130, dtype=np.uint16))
    original = train.evaluate

    def watched(model, batches, *args, **keys):
        batches = list(batches)
        sizes.append(len(batches))
        return original(model, batches, *args, **keys)

    monkeypatch.setattr(train, "evaluate", watched)
    assert tiny.main() == 0
    assert sizes[-1] == 130 and max(sizes[:-1]) <= 50, sizes


# --- divergence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_last_step", [False, True])
def test_run_that_diverges_ends_1_and_keeps_finite_weights(tmp_path, capsys, at_last_step):
    """An infinite learning rate of the last update makes the weights useless though every loss was finite."""
    keys = {"num_training_steps": 1} if at_last_step else {"checkpoint_interval": 1}
    tiny = TinyRun(tmp_path, num_warmup_steps=0, max_lr=1e30, **keys)
    assert tiny.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "diverged" in error and "max_lr" in error
    assert not (tiny.out / "eval.json").exists()
    if not at_last_step:
        model = torch.load(tiny.out / "training_state.pt", weights_only=True)["model"]
        assert all(tensor.isfinite().all() for tensor in model.values())
    assert tiny.main() == 1, "the same command diverges again, and says so again"
