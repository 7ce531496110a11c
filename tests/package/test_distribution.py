"""torchrun: several processes train what one would on the joined batch, resume exactly, and say things once."""

import os
import signal
import socket
import sys

import pytest
import torch
from tiny_run import TinyRun, assert_refused, at_batches, processes

import train

NO_DROPOUT = {"n_embd": 8, "n_head": 2, "n_positions": 16, "n_layer": 2, "p_dropout": 0.0}
TORCHRUN = {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0", "MPLBACKEND": "Agg"}


def in_rank(rank: int, port: int, log, prepare, arguments: list[str]) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    variables |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test", "DRAWN": log.parent / f"drawn{rank}"}
    os.environ.update(TORCHRUN | {name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    prepare(pytest.MonkeyPatch(), rank)
    train.main(arguments)


def note_batches(patch, rank):
    def noted(*arguments):
        for batch in sampler(*arguments):
            with open(os.environ["DRAWN"], "a") as file:
                file.write(f"{batch.tolist()}\n")
            yield batch

    sampler = train.random_batch_sampler
    patch.setattr(train, "random_batch_sampler", noted)


def two_ranks(tiny: TinyRun, *arguments, prepare=note_batches) -> tuple[list[int], list[str]]:
    """Exit statuses and output of two processes, as torchrun starts them but forked, which is much faster."""
    logs, ranks = [tiny.log.with_name(f"rank{rank}.txt") for rank in (0, 1)], []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for rank, log in enumerate(logs):
        job = (rank, port, log, prepare, [str(tiny.config), *arguments])
        ranks.append(processes().Process(target=in_rank, args=job))
        ranks[-1].start()
    for process in ranks:
        process.join(100)
        process.kill()
        process.join()
    return [process.exitcode for process in ranks], [log.read_text() for log in logs]


def joined_batches(patch, rank, n_rows=2):
    """Rows 2 rank, 2 rank + 1 of batches of four rows, the same for every process."""

    def sampler(*_):
        generator = torch.Generator().manual_seed(5)
        while True:
            yield torch.randint(50257, (4, 8), generator=generator)[n_rows * rank :][:n_rows]

    patch.setattr(train, "random_batch_sampler", sampler)


def test_two_processes_train_what_one_does_on_the_joined_batch(tmp_path, monkeypatch, quick):
    one = TinyRun(tmp_path / "one", model_config=NO_DROPOUT, batch_size=4)
    joined_batches(monkeypatch, 0, n_rows=4)
    assert one.main() == 0
    two = TinyRun(tmp_path / "two", model_config=NO_DROPOUT)
    statuses, said = two_ranks(two, prepare=joined_batches)
    assert statuses == [0, 0], said
    assert said[1] == "", "rank 1 must not print"
    rows = [{key: float(value) for key, value in run.rows()[-1].items()} for run in (one, two)]
    assert rows[1] == pytest.approx(rows[0], rel=1e-5), "tokens, FLOPs and losses must be those of all processes"
    states = [torch.load(run.out / "model.pt", weights_only=True) for run in (one, two)]
    for key, right in states[0].items():
        torch.testing.assert_close(states[1][key], right, rtol=0, atol=1e-4, msg=f"{key}: summed or not averaged?")


def stop_the_second(patch, rank):
    if rank == 1:
        at_batches(patch, {5: lambda: os.kill(os.getpid(), signal.SIGTERM)})


def test_interrupted_run_continues_exactly_and_only_on_as_many_processes(tmp_path, capsys):
    whole, tiny = TinyRun(tmp_path / "whole"), TinyRun(tmp_path)
    assert two_ranks(whole)[0] == [0, 0]
    drawn = [(tmp_path / f"whole/drawn{rank}").read_text() for rank in (0, 1)]
    assert drawn[0].count("\n") == 12 and drawn[0] != drawn[1], "each process should draw its own batches"
    statuses, said = two_ranks(tiny, prepare=stop_the_second)
    assert statuses == [143, 143] and "resume at step 3" in said[0], said
    assert_refused(capsys, tiny.out, ["2", "1"], train, tiny.config)
    assert two_ranks(tiny)[0] == [0, 0]
    assert tiny.results() == whole.results()


def test_an_error_is_reported_once(tmp_path):
    diverging = ("--set", "max_lr=1e30", "num_warmup_steps=0")
    for arguments, status in ((("--set", "max_lr=-1"), 2), (diverging, 1)):
        statuses, said = two_ranks(TinyRun(tmp_path), *arguments)
        assert statuses == [status, status] and "".join(said).count("error: ") == 1, said
        assert "Traceback" not in "".join(said), said
