"""A run that is interrupted, however and wherever, resumes and ends with the same bits."""

import os
import random
import signal
import time
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_run import TinyRun, at_batches, leave_out_what_is_slow, processes, wait_until

import train
from support import results, run
from support.checkpoint import to_bytes
from support.files import write_together


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    leave_out_what_is_slow(monkeypatch)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    tiny = TinyRun(tmp_path_factory.mktemp("reference"))
    with pytest.MonkeyPatch.context() as patch:
        leave_out_what_is_slow(patch)
        assert tiny.main() == 0
    return tiny.results()


def interrupted(tiny, monkeypatch, batch, *signals) -> int:
    with monkeypatch.context() as patch:
        at_batches(patch, {batch: lambda: [os.kill(os.getpid(), number) for number in signals]})
        return tiny.main()


# --- signals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "number", "status"),
    [(0, signal.SIGTERM, 143), (5, signal.SIGINT, 130), (6, signal.SIGTERM, 143), (11, signal.SIGINT, 130)],
)  # 2 micro-batches a step: 5 and 11 are inside gradient accumulation, 11 in the last step
def test_first_signal_ends_the_step_and_the_same_command_goes_on(
    tmp_path, monkeypatch, capsys, uninterrupted, batch, number, status
):
    tiny = TinyRun(tmp_path)
    assert interrupted(tiny, monkeypatch, batch, number) == status
    step = batch // 2 + 1
    assert tiny.rows() == step + 1, "the step in hand is finished, and no other one begun"
    assert f"resume at step {step}" in capsys.readouterr().out
    assert tiny.main() == 0
    assert f"at step {step}" in capsys.readouterr().out
    assert tiny.results() == uninterrupted
    assert not tiny.state.exists() and not tiny.leftovers()


def test_interrupted_again_and_again(tmp_path, monkeypatch, uninterrupted):
    tiny = TinyRun(tmp_path)
    for _ in range(5):
        assert interrupted(tiny, monkeypatch, 1, signal.SIGTERM) == 143
    assert tiny.main() == 0
    assert tiny.results() == uninterrupted


def test_second_signal_stops_at_once(tmp_path, monkeypatch, uninterrupted):
    tiny = TinyRun(tmp_path, checkpoint_interval=1)
    assert interrupted(tiny, monkeypatch, 5, signal.SIGINT, signal.SIGINT) == 130
    assert tiny.rows() == 3, "steps 0 and 1 were done, step 2 was not finished"
    assert tiny.main() == 0
    assert tiny.results() == uninterrupted


@pytest.mark.parametrize("during", ["evaluate", "generate"])
def test_signal_after_the_last_step_acts_at_once(tmp_path, monkeypatch, capsys, uninterrupted, during):
    tiny = TinyRun(tmp_path)
    with monkeypatch.context() as patch:
        module = train if during == "evaluate" else __import__("generate")
        patch.setattr(module, during, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
        assert tiny.main() == 143
        hint = {"evaluate": "resume at step 6", "generate": "its results are written"}
        assert hint[during] in capsys.readouterr().out
    assert tiny.main() == 0
    assert tiny.results() == uninterrupted


def test_an_ignored_signal_stays_ignored(tmp_path, monkeypatch):
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what runs in its background
    try:
        assert interrupted(TinyRun(tmp_path), monkeypatch, 3, signal.SIGINT) == 0
    finally:
        signal.signal(signal.SIGINT, former)


# --- kill -9 ---------------------------------------------------------------------------------------------


def test_killed_runs_fall_back_to_the_last_state(tmp_path, uninterrupted):
    tiny = TinyRun(tmp_path, checkpoint_interval=2)
    for rows in (2, 5):
        process = tiny.process()
        wait_until(lambda: tiny.rows() > rows or not process.is_alive())  # noqa: B023
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, tiny.log()
    assert tiny.main() == 0
    assert tiny.results() == uninterrupted
    assert not tiny.leftovers()


def write_states(path, start: int) -> None:
    for count in range(start, 10**9):
        write_together({path: to_bytes({"count": count, "tensor": torch.full((50_000,), float(count))})})


def kill_writers(path, times: int, draw: random.Random) -> int:
    """Kill a writer of checkpoints at random moments; after each, the file is whole. Returns its count."""
    count = 0
    write_together({path: to_bytes({"count": 0, "tensor": torch.zeros(50_000)})})
    for _ in range(times):
        process = processes().Process(target=write_states, args=(path, count + 1))
        process.start()
        before = path.stat().st_mtime_ns
        wait_until(lambda: path.stat().st_mtime_ns != before)  # noqa: B023
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join()
        values = torch.load(path, weights_only=True)
        assert values["count"] > count and bool((values["tensor"] == values["count"]).all())
        count = values["count"]
    return count


def test_killed_writer_leaves_a_whole_file(tmp_path):
    assert kill_writers(tmp_path / "state.pt", 6, random.Random(1)) >= 6


def test_results_stand_until_the_new_ones_are_complete(tmp_path, monkeypatch, uninterrupted):
    tiny = TinyRun(tmp_path)
    assert tiny.main() == 0
    first, config = tiny.results(), (tiny.out / "config.yaml").read_bytes()
    assert interrupted(tiny, monkeypatch, 7, signal.SIGTERM, signal.SIGINT) == 130
    for name in ("model.pt", "eval.json", "metrics.csv"):
        assert (tiny.out / name).read_bytes() == first[name], f"{name} of the finished run is gone"
    assert (tiny.out / "config.yaml").read_bytes() == config
    assert tiny.main() == 0 and tiny.results() == uninterrupted, "a finished run starts over"


def test_a_run_stopped_while_its_curve_is_drawn_keeps_its_metrics(tmp_path, monkeypatch, uninterrupted):
    def stop(*_):
        raise KeyboardInterrupt

    tiny = TinyRun(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(results, "plot_curve", stop)
        assert tiny.main() == 130
    assert tiny.main() == 0 and tiny.results() == uninterrupted


# --- what may resume, and what may not --------------------------------------------------------------------


def test_another_configuration_or_other_data_is_refused(tmp_path, monkeypatch, capsys, uninterrupted):
    tiny = TinyRun(tmp_path)
    assert interrupted(tiny, monkeypatch, 3, signal.SIGTERM) == 143
    state = tiny.state.read_bytes()
    assert tiny.main("--set", "max_lr=0.5", "model_config.n_head=4") == 2
    error = capsys.readouterr().err
    assert "max_lr (0.01 there, 0.5 here)" in error and "model_config.n_head (2 there, 4 here)" in error
    other = tmp_path / "other.npz"
    np.savez(other, train=np.arange(400, dtype=np.uint16), val=np.arange(90, dtype=np.uint16))
    assert tiny.main("--data", str(other)) == 2
    error = capsys.readouterr().err
    assert "data" in error and "other.npz" in error and "tokens.npz" in error
    assert tiny.state.read_bytes() == state, "a refusal changes nothing"
    tiny.tokens.rename(tmp_path / "moved.npz")
    assert tiny.main("--data", str(tmp_path / "moved.npz")) == 0, "the same tokens under another name resume"
    assert tiny.results() == uninterrupted


def test_fresh_starts_over(tmp_path, monkeypatch, capsys):
    tiny = TinyRun(tmp_path)
    assert interrupted(tiny, monkeypatch, 3, signal.SIGTERM) == 143
    assert tiny.main("--fresh", "--set", "max_lr=0.5") == 0
    assert "Resuming" not in capsys.readouterr().out
    assert tiny.rows() == 7


def test_second_process_in_a_folder_is_refused_and_a_dead_owner_is_not_in_the_way(tmp_path, capsys):
    tiny = TinyRun(tmp_path, num_training_steps=100_000)
    owner = tiny.process()
    wait_until(lambda: tiny.rows() > 1)
    assert tiny.main() == 2
    assert "another process" in capsys.readouterr().err
    owner.kill()
    owner.join()
    assert (tiny.out / ".lock").exists(), "the owner died without tidying up"
    assert tiny.main("--set", "num_training_steps=3") == 0


def test_state_holds_all_that_goes_on(tmp_path, monkeypatch):
    tiny = TinyRun(tmp_path)
    np.random.seed(5)
    assert interrupted(tiny, monkeypatch, 3, signal.SIGTERM) == 143
    values = torch.load(tiny.state, weights_only=True)
    assert values.keys() == {"model", "optimizer", "config", "data", "random", "progress"}
    assert values["config"]["max_lr"] == 0.01 and len(values["data"]) == 64
    assert values["progress"]["next_step"] == 2 and len(values["progress"]["recent_losses"]) == 2
    expected = np.random.random()
    np.random.seed(6)
    assert interrupted(tiny, monkeypatch, 0, signal.SIGTERM) == 143
    assert np.random.random() == expected, "numpy's generator was not restored"


def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
    asked = []

    def start(config, run_id=None):
        asked.append(run_id)
        return "id-of-the-first"

    monkeypatch.setattr(run, "start_tracking", start)
    tiny = TinyRun(tmp_path)
    assert interrupted(tiny, monkeypatch, 3, signal.SIGTERM) == 143
    assert tiny.main() == 0
    assert asked == [None, "id-of-the-first"]


# --- how often -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "saved"), [(2, [2, 4, 6]), (4, [4, 6]), ("4e0", [4, 6]), ("0s", [1, 2, 3, 4, 5, 6]), ("60s", [6])]
)
def test_checkpoint_interval(tmp_path, monkeypatch, interval, saved):
    steps = []
    monkeypatch.setattr(run.TrainingState, "save", lambda self, progress, _: steps.append(progress.next_step))
    assert TinyRun(tmp_path, checkpoint_interval=interval).main() == 0
    assert steps == saved


@pytest.mark.parametrize("interval", [0, -5, "fast", "1h", "-3s", 2.5, [1]])
def test_checkpoint_interval_without_sense_is_refused(tmp_path, capsys, interval):
    assert TinyRun(tmp_path, checkpoint_interval=interval).main() == 2
    assert "checkpoint_interval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cost", "passed", "due"), [(1.0, 99, False), (1.0, 101, True), (0.01, 29, False), (0.01, 31, True)]
)
def test_writing_takes_less_than_a_hundredth_of_the_time(cost, passed, due):
    hook = SimpleNamespace(
        config=SimpleNamespace(checkpoint_interval=None),
        _save_seconds=cost,
        _last_save=time.perf_counter() - passed,
    )
    assert run.TrainingRun._save_is_due(hook, 7) == due


# --- soak: pytest -m soak --------------------------------------------------------------------------------


@pytest.mark.soak
def test_soak_sixty_kills_of_one_run(tmp_path, capsys):
    keys = {"num_training_steps": 1500, "checkpoint_interval": 3}
    reference = TinyRun(tmp_path / "reference", **keys)
    assert reference.main() == 0
    tiny = TinyRun(tmp_path, **keys)
    draw, kills, statuses = random.Random(7), 0, []
    while kills < 60:
        process = tiny.process()
        if draw.random() < 0.85:  # in training, else anywhere from the start on
            goal = min(tiny.rows() + draw.randrange(1, 14), 1501)
            wait_until(lambda: tiny.rows() >= goal or not process.is_alive())  # noqa: B023
            time.sleep(draw.uniform(0, 0.03))
        else:
            time.sleep(draw.uniform(0, 1.0))
        number = draw.choice([signal.SIGTERM, signal.SIGKILL])
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
        process.join()
        assert process.exitcode in (143, -signal.SIGTERM, -signal.SIGKILL), (
            f"{process.exitcode}: {tiny.log()[-2000:]}"
        )
        statuses.append(process.exitcode)
        kills += 1
    for _ in range(10):  # and at its end, where the results take their places
        starts = tiny.log().count("Resuming")
        process = tiny.process()
        # The first of them has most of the steps before it, on a busy machine for minutes.
        wait_until(lambda: tiny.log().count("Resuming") > starts and tiny.rows() == 1501, 900)  # noqa: B023
        time.sleep(draw.uniform(0, 0.8))
        process.kill()
        process.join()
        if (tiny.out / "model.pt").exists():
            assert (tiny.out / "model.pt").read_bytes() == reference.results()["model.pt"]
        kills += process.exitcode != 0
        statuses.append(process.exitcode)
        if process.exitcode == 0:
            break
    process = tiny.process()
    process.join()
    assert process.exitcode == 0, tiny.log()[-2000:]
    assert tiny.results() == reference.results()
    assert not tiny.leftovers() and not tiny.state.exists()
    with capsys.disabled():
        counts = {status: statuses.count(status) for status in sorted(set(statuses))}
        print(f"\n{kills} kills of one run of 1500 steps, exit statuses {counts}: identical bits")


@pytest.mark.soak
def test_soak_three_hundred_killed_writers(tmp_path, capsys):
    count = kill_writers(tmp_path / "state.pt", 300, random.Random(2))
    with capsys.disabled():
        print(f"\n300 writers killed, {count} files written: whole after each")
