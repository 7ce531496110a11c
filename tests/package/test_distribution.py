"""Two processes train as one would: the same gradients, one that writes, and one end for all."""

import faulthandler
import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny_run import ROOT, TinyRun, at_batches, leave_out_what_is_slow, processes, wait_until

import train
from model import DecoderLM
from support import distribution
from support.chunked_loss import LanguageModelingLoss
from support.distribution import LOST, World, join_world, lost_process
from support.errors import UserError
from support.signals import StopSignals

PATIENCE_SECONDS = 100  # with a rank; a busy machine of two cores takes ten
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes."""
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "OMP_NUM_THREADS": "1",
    }


def _in_rank(variables: dict, log: Path, function, args: tuple) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    leave_out_what_is_slow(pytest.MonkeyPatch())  # for good: this process has but one run to make
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    os.dup2(sys.stdout.fileno(), 2)
    faulthandler.dump_traceback_later(PATIENCE_SECONDS - 10)  # of a process that hangs, the place
    function(*args)


def free_port() -> int:
    """A port that no client is given by the system: one that knocks too early could be given the very same."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as knocking:
            if knocking.connect_ex(("127.0.0.1", port)) != 0:
                return port


class Ranks:
    """Processes as torchrun starts them, but forked, which takes a tenth of the time."""

    def __init__(self, folder: Path, function, *args, size: int = 2):
        port = free_port()
        self.logs = [folder / f"rank{rank}.log" for rank in range(size)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            log.unlink(missing_ok=True)
            job = (environment(rank, size, port), log, function, args)
            self.processes.append(processes().Process(target=_in_rank, args=job))
            self.processes[-1].start()

    def join(self) -> list[int]:
        """Wait for all; return their exit statuses, -SIGKILL for one that hangs."""
        for process in self.processes:
            process.join(PATIENCE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def said(self) -> list[str]:
        """What each printed."""
        return [log.read_text() for log in self.logs]


def train_tiny(config: str, arguments: tuple = (), actions: dict | None = None) -> None:
    """train.py in one rank; actions[rank, n] is done before the rank's n-th micro-batch."""
    rank = int(os.environ["RANK"])
    mine = {batch: action for (r, batch), action in (actions or {}).items() if r == rank}
    with pytest.MonkeyPatch.context() as patch:
        at_batches(patch, mine)
        train.main([config, *arguments])


def terminate_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_out_of_memory() -> None:
    raise MemoryError


# --- the mathematics -------------------------------------------------------------------------------------

V, S, STEPS, ACCUMULATION = 53, 7, 3, 2
ROWS = [4, 2]  # of a micro-batch: in one process, in each of two


def tokens_of(seed: int, n: int) -> torch.Tensor:
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed))


def joined_training(out: Path) -> None:
    """Three steps on hand-made batches; rank 0 writes what came of them."""
    without_exchange = []
    with join_world() as world:
        torch.manual_seed(1)
        model = DecoderLM(V, 10, 2, 11, 2, p_dropout=0.0)
        loss_fn = LanguageModelingLoss(model)
        rows = ROWS[0] // world.size
        config = SimpleNamespace(grad_accumulation_steps=ACCUMULATION, batch_size=rows, seq_len=S, seed=1)
        distributed = world.distribute(loss_fn, config, nullcontext())
        if world.size > 1:
            no_sync = distributed.module.no_sync
            distributed.module.no_sync = lambda: without_exchange.append(1) or no_sync()
        batches = tokens_of(2, STEPS * ACCUMULATION * ROWS[0] * S).view(-1, world.size, ROWS[0] // world.size, S)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=1.0), []
        train.train(
            model,
            iter(batches[:, world.rank]),
            optimizer,
            lambda step: 0.5,
            num_training_steps=STEPS,
            grad_accumulation_steps=ACCUMULATION,
            loss_fn=distributed,
            on_step=lambda result: losses.append(result.loss),
        )
        numbers = world.gather(torch.rand(1).item())
        if world.rank == 0:
            values = {"model": model.state_dict(), "gradient": [p.grad for p in model.parameters()]}
            torch.save(
                {
                    **values,
                    "losses": losses,
                    "without exchange": len(without_exchange),
                    "numbers": numbers,
                },
                out,
            )


def test_gradients_and_losses_equal_one_process_with_the_joined_batch(tmp_path):
    joined_training(tmp_path / "one.pt")
    ranks = Ranks(tmp_path, joined_training, tmp_path / "two.pt")
    assert ranks.join() == [0, 0], ranks.said()
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    message = "are the losses of a rank averaged over its own batch only, or gradients summed instead of averaged?"
    for key, weight in one["model"].items():
        torch.testing.assert_close(two["model"][key], weight, rtol=0, atol=1e-6, msg=f"{key}: {message}")
    for theirs, ours in zip(two["gradient"], one["gradient"], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-6), "the loss shown must be that of all ranks"
    quiet = STEPS * (ACCUMULATION - 1)
    assert two["without exchange"] == quiet, "gradients are exchanged once a step, not for every micro-batch"
    assert len(set(two["numbers"])) == 2, "each rank needs its own random stream"


# --- the run ---------------------------------------------------------------------------------------------


def test_interrupted_run_continues_exactly_and_only_on_as_many_ranks(tmp_path, capsys):
    whole = TinyRun(tmp_path / "whole")
    ranks = Ranks(tmp_path, train_tiny, str(whole.config))
    assert ranks.join() == [0, 0], ranks.said()
    said, silent = ranks.said()
    assert silent == "", "rank 1 must not print"
    assert "6 steps of 64 tokens" in said and "2 processes" in said  # 2 ranks × 2 rows × 8 tokens × 2
    assert whole.out.joinpath("metrics.csv").read_text().splitlines()[-1].startswith("5,384,")

    tiny = TinyRun(tmp_path)
    ranks = Ranks(tmp_path, train_tiny, str(tiny.config), (), {(1, 5): terminate_self})
    assert ranks.join() == [143, 143], ranks.said()
    assert ranks.said()[0].count("resume at step 3") == 1
    assert ranks.said()[1] == ""
    states = torch.load(tiny.state, weights_only=True)["random"]
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])

    kept = tiny.state.read_bytes()
    assert tiny.main() == 2
    assert "has 2 processes, this one 1; resume it with torchrun --nproc_per_node=2" in capsys.readouterr().err
    assert tiny.state.read_bytes() == kept, "a refusal changes nothing"

    ranks = Ranks(tmp_path, train_tiny, str(tiny.config))
    assert ranks.join() == [0, 0], ranks.said()
    assert tiny.results() == whole.results()
    assert not tiny.state.exists() and not tiny.leftovers()


def test_dead_rank_ends_the_others(tmp_path):
    tiny = TinyRun(tmp_path, num_training_steps=100_000, checkpoint_interval=1)
    ranks = Ranks(tmp_path, train_tiny, str(tiny.config), (), {(1, 9): kill_self})
    assert ranks.join() == [1, -signal.SIGKILL], ranks.said()
    said = ranks.said()[0]
    assert f"error: {LOST}. " in said and "resume at step 4" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "actions", "statuses", "first", "second"),
    [
        (("--set", "max_lr=-1"), {}, [2, 2], "max_lr", ""),
        ((), {(1, 4): run_out_of_memory}, [1, 1], LOST, "error: rank 1: out of memory at step 2"),
        (("--set", "max_lr=1e30", "num_warmup_steps=0"), {}, [1, 1], "diverged", ""),
    ],
    ids=["bad input", "one rank out of memory", "diverged"],
)
def test_who_tells_an_error(tmp_path, arguments, actions, statuses, first, second):
    ranks = Ranks(tmp_path, train_tiny, str(TinyRun(tmp_path).config), arguments, actions)
    assert ranks.join() == statuses, ranks.said()
    for said, expected in zip(ranks.said(), (first, second), strict=True):
        assert expected in said and "Traceback" not in said
        assert said.count("error: ") == bool(expected), said


def torchrun(tiny: TinyRun, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    variables = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK, "MPLBACKEND": "Agg"}
    return subprocess.Popen(
        [*command, str(ROOT / "train.py"), str(tiny.config)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_soak_signal_to_torchrun_saves_once(tmp_path, number):
    tiny = TinyRun(tmp_path, num_training_steps=100_000, checkpoint_interval=90_000)
    process = torchrun(tiny)
    wait_until(lambda: tiny.rows() > 2 or process.poll() is not None)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    step = torch.load(tiny.state, weights_only=True)["progress"]["next_step"]
    assert tiny.rows() == step + 1, said
    assert said.count(f"rerun the same command to resume at step {step}") == 1, said
    assert said.count("Stopping after this step") == 1, said
    assert process.returncode != 0


@pytest.mark.soak
def test_soak_torchrun_ends_all_when_one_is_killed(tmp_path):
    tiny = TinyRun(tmp_path, num_training_steps=100_000, checkpoint_interval=10)
    process = torchrun(tiny)
    wait_until(lambda: tiny.state.exists() or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {
        Path(f"/proc/{child}/environ").read_bytes().split(b"\0RANK=")[1][:1]: int(child) for child in children
    }
    os.kill(ranks[b"1"], signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert f"error: {LOST}" in said and "Signal 9 (SIGKILL)" in said, said


@pytest.mark.soak
def test_soak_four_ranks_continue_exactly(tmp_path):
    """With more than two ranks the order of a sum could depend on how gradients lie in the buckets."""
    whole, tiny = TinyRun(tmp_path / "whole"), TinyRun(tmp_path)
    ranks = Ranks(tmp_path, train_tiny, str(whole.config), size=4)
    assert ranks.join() == [0] * 4, ranks.said()
    for actions, status in (({(2, 3): terminate_self}, 143), ({(0, 3): terminate_self}, 143), ({}, 0)):
        ranks = Ranks(tmp_path, train_tiny, str(tiny.config), (), actions, size=4)
        assert ranks.join() == [status] * 4, ranks.said()
    assert tiny.results() == whole.results()


# --- one process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables",
    [{}, {"WORLD_SIZE": "4", "RANK": "2"}, environment(0, 1, 0)],
    ids=["alone", "SLURM", "torchrun of one"],
)
def test_one_process_never_initialises_distribution(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", None)
    module = torch.nn.Linear(1, 1)
    with join_world() as world:
        assert world == World() and world.distribute(module, None, nullcontext()) is module
        assert world.maximum(3, -1) == (3, -1) and world.gather("a") == ["a"]
        with world.main_process_first():
            pass
    assert not dist.is_initialized()


def test_every_rank_has_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert World().device_of_rank("mps") == "mps"
    world = World(5, 8, 1)
    assert world.device_of_rank("cpu") == "cpu"
    chosen = []
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(device_count=lambda: 2, set_device=chosen.append))
    monkeypatch.setattr(distribution, "cuda_problem", lambda: "no GPU found")
    for requested in ("auto", "cuda"):  # choose_hardware reports the problem
        assert world.device_of_rank(requested) == requested
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert world.device_of_rank("auto") == "cpu", "several processes cannot share an Apple GPU"
    monkeypatch.setattr(distribution, "cuda_problem", lambda: None)
    assert world.device_of_rank("auto") == world.device_of_rank("cuda") == "cuda:1" and chosen == [1, 1]
    with pytest.raises(UserError, match="8 processes cannot share device = 'cuda:0'"):
        world.device_of_rank("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes, but 2 GPUs here; start torchrun --nproc_per_node=2"):
        world.device_of_rank("auto")


def test_other_runtime_errors_are_no_lost_process():
    assert lost_process(dist.DistBackendError("NCCL communicator was aborted"))
    assert not lost_process(RuntimeError("shapes do not match")) and not lost_process(ValueError("gloomy"))


def test_ctrl_c_that_torchrun_passes_on_is_one_signal():
    """A terminal sends SIGINT to all processes, and torchrun sends it to them once more."""
    with StopSignals(announced=False, under_torchrun=True) as signals:
        signals.deferring = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGINT
        signals._received -= 1
        with pytest.raises(SystemExit) as stop:
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.value.code == 130
