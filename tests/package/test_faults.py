"""Faults, each really made: divergence, lack of memory or disk, W&B, a closed stdout, folders not to write to."""

import contextlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_run import TinyRun, at_batches, leave_out_what_is_slow

import generate
import train
from model import DecoderLM
from support import results, run, tracking
from support.checkpoint import load_archive
from support.config import ModelConfig
from support.files import atomic_file, json_text
from support.metrics import COLUMNS, MetricsLog
from support.plots import plot_classification

resource = pytest.importorskip("resource", reason="this system has no resource limits")


plot_curve = results.plot_curve


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    leave_out_what_is_slow(monkeypatch)


@contextlib.contextmanager
def limit(kind: int, most: int):
    """A limit of the operating system on this process, lifted afterwards."""
    former, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (former, hard))


def succeeds(command: list[str]) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 14 MB, where this process may mount one; a tiny run needs 11.3 MB to begin."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not succeeds(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", str(folder)]):
        pytest.skip("mounting a small disk is not allowed here; the tests with RLIMIT_FSIZE replace this one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder):
    """Leave no byte on the folder's disk."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass


# --- divergence ------------------------------------------------------------------------------------------


def assert_stopped_before_the_weights_changed(tiny, captured):
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: diverged"), captured.err
    for remedy in ("max_lr", "num_warmup_steps", "grad_clip", "learning rate", "--fresh"):
        assert remedy in captured.err
    assert not (tiny.out / "model.pt").exists() and not (tiny.out / "eval.json").exists()


def test_loss_that_is_not_finite(tmp_path, capsys):
    tiny = TinyRun(tmp_path, max_lr=1e30, checkpoint_interval=1, num_warmup_steps=0)
    assert tiny.main() == 1
    captured = capsys.readouterr()
    assert_stopped_before_the_weights_changed(tiny, captured)
    state = load_archive(tiny.state, 0, 1e9)
    step = state["progress"]["next_step"]
    assert f"at step {step} " in captured.err and f"resume at step {step}" in captured.err
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values()), "the state kept is a good one"
    assert tiny.main() == 1, "the same command diverges again, and says so again"
    assert load_archive(tiny.state, 0, 1e9)["progress"]["next_step"] == step


def test_gradient_that_is_not_finite(tmp_path, monkeypatch, capsys):
    class Overflowing(DecoderLM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            calls = iter(range(1000))
            self.ln.weight.register_hook(lambda grad: grad * (1e39 if next(calls) == 7 else 1))

    monkeypatch.setattr(train, "DecoderLM", Overflowing)
    tiny = TinyRun(tmp_path, checkpoint_interval=1)
    assert tiny.main() == 1
    captured = capsys.readouterr()
    assert "gradient norm inf" in captured.err and "at step 3 " in captured.err
    assert_stopped_before_the_weights_changed(tiny, captured)
    assert load_archive(tiny.state, 0, 1e9)["progress"]["next_step"] == 3


def test_json_is_valid_whatever_the_numbers():
    text = json_text({"val-perplexity": float("inf"), "deep": {"list": [float("nan"), 1.5]}})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(text, parse_constant=refuse) == {
        "val-perplexity": None,
        "deep": {"list": [None, 1.5]},
    }


# --- memory ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory bind on Linux only")
@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_out_of_memory_names_the_numbers_and_the_remedy(tmp_path, capsys, arguments):
    tiny = TinyRun(tmp_path, batch_size=300_000, grad_accumulation_steps=1, num_training_steps=3)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    with limit(resource.RLIMIT_AS, used + (300 << 20)):
        assert tiny.main(*arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: out of memory at step 0"), error
    assert "batch_size 300000 × seq_len 8 × n_embd 8 × n_layer 1" in error
    assert "--set batch_size=150000 grad_accumulation_steps=2" in error


def test_model_too_large_for_the_machine_is_one_sentence(tmp_path, capsys):
    assert TinyRun(tmp_path).main("--set", "model_config.n_embd=4000000") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory: the model is too large: 192 T parameters"), error
    assert error.count("\n") == 1


def test_number_of_parameters_is_that_of_the_model():
    config = ModelConfig(n_embd=6, n_head=2, n_positions=5, n_layer=3)
    built = DecoderLM(11, **vars(config))
    assert config.n_parameters(11) == sum(parameter.numel() for parameter in built.parameters())


# --- disk ------------------------------------------------------------------------------------------------


def test_disk_full_while_saving(tmp_path, monkeypatch, capsys, small_disk):
    tiny = TinyRun(tmp_path, output_dir=small_disk / "out", checkpoint_interval=1)
    whole = TinyRun(tmp_path / "whole")
    assert whole.main() == 0
    kept = {}

    def fill_the_disk():
        kept["state"] = tiny.state.read_bytes()
        fill(small_disk)

    def look():
        assert tiny.state.read_bytes() == kept["state"], "the former state was changed"
        assert tiny.leftovers() == []
        (small_disk / "filler").unlink()

    at_batches(monkeypatch, {4: fill_the_disk, 8: look})
    assert tiny.main() == 0
    out = capsys.readouterr().out
    assert "Could not save the state of step 3 (No space left on device); training continues" in out
    assert tiny.results() == whole.results(), "the run with the full disk lost something"


def test_disk_full_at_the_end(tmp_path, monkeypatch, capsys, small_disk):
    whole = TinyRun(tmp_path / "whole")
    assert whole.main() == 0
    tiny = TinyRun(tmp_path, output_dir=small_disk / "out")
    assert tiny.main("--set", "max_lr=0.1") == 0
    former = tiny.results()
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", filling(train.evaluate, small_disk))
        assert tiny.main("--fresh") == 1
    captured = capsys.readouterr()
    assert "No space left on device" in captured.err and "resume at step 6" in captured.err, captured.err
    assert captured.err.count("\n") == 1 and tiny.leftovers() == []
    for name in ("model.pt", "eval.json"):
        assert (tiny.out / name).read_bytes() == former[name], f"the former {name} was changed"
    (small_disk / "filler").unlink()
    assert tiny.main() == 0
    assert tiny.results() == whole.results()


def filling(function, folder):
    def wrapped(*args, **kwargs):
        fill(folder)
        return function(*args, **kwargs)

    return wrapped


def test_too_little_disk_is_refused_before_training(tmp_path, capsys, small_disk):
    (small_disk / "other").write_bytes(bytes(4 << 20))
    tiny = TinyRun(tmp_path, output_dir=small_disk / "out")
    assert tiny.main() == 2
    error = capsys.readouterr().err
    assert "10.5 MB free" in error and "need 11.3 MB" in error and "output_dir" in error
    assert not (tiny.out / "metrics.csv").exists()


def test_file_size_limit_while_saving_and_at_the_end(tmp_path, monkeypatch, capsys):
    """Where no small disk can be mounted, a limit on the size of files makes the same writes fail."""
    tiny = TinyRun(tmp_path, checkpoint_interval=2)
    with limit(resource.RLIMIT_FSIZE, 1 << 20):
        assert tiny.main() == 1
    captured = capsys.readouterr()
    assert captured.out.count("(File too large); training continues") == 3
    assert "File too large" in captured.err and "start over" in captured.err and tiny.leftovers() == []
    kept = {}
    at_batches(monkeypatch, {10: lambda: kept.update(state=tiny.state.read_bytes())})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        monkeypatch.setattr(
            train,
            "evaluate",
            lambda *args, **keys: (
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
                or {"val-loss": 1.0, "val-perplexity": 1.0}
            ),
        )
        assert tiny.main() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "resume at step 6" in capsys.readouterr().err and len(kept["state"]) > 1 << 20


def test_write_that_fails_halfway_leaves_the_former_file(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"former" * 1000)
    with (
        limit(resource.RLIMIT_FSIZE, 8192),
        pytest.raises(OSError, match="too large"),
        atomic_file(path) as file,
    ):
        file.write(bytes(10_000))
    assert path.read_bytes() == b"former" * 1000 and os.listdir(tmp_path) == ["model.pt"]


def test_metrics_wait_for_room(tmp_path):
    path, whole = tmp_path / "metrics.csv", tmp_path / "whole.csv"
    rows = [(step, 8 * step, 100 * step, 1 / (step + 1), 0.1 + step, 1e-3) for step in range(20)]
    with contextlib.closing(MetricsLog(path)) as log, contextlib.closing(MetricsLog(whole)) as reference:
        for row in rows:
            reference.append(*row)
        for row in rows[:5]:
            log.append(*row)
        with limit(resource.RLIMIT_FSIZE, path.stat().st_size + 30):  # row 5 is cut in its middle
            for row in rows[5:12]:
                log.append(*row)
            with pytest.raises(OSError, match="too large"):
                log.sync()
            assert path.read_bytes().count(b"\n") == 6, "the limit should have cut the sixth row in its middle"
        for row in rows[12:]:
            log.append(*row)
        log.sync()
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_state_is_not_saved_before_the_rows_that_it_promises(tmp_path, monkeypatch, capsys):
    logs = []
    monkeypatch.setattr(run, "MetricsLog", lambda *args: logs.append(MetricsLog(*args)) or logs[-1])
    tiny = TinyRun(tmp_path, checkpoint_interval=2)

    def fill_the_disk_of_the_metrics():
        with open("/dev/full", "wb") as full:
            os.dup2(full.fileno(), logs[-1]._file.fileno())

    with monkeypatch.context() as patch:
        at_batches(patch, {4: fill_the_disk_of_the_metrics})
        assert tiny.main() == 1
    captured = capsys.readouterr()
    assert "Could not save the state of step 4 (No space left on device)" in captured.out
    assert "resume at step 2" in captured.err and tiny.rows() == 3
    assert tiny.main() == 0 and tiny.rows() == 7


@pytest.mark.parametrize("rest", ["", "3,4", "\x00\n", "a,b,c,d,e,f\n", "5,1,1,2.0,2.0,0.1\n" * 3])
def test_metrics_are_cut_back_to_whole_rows_of_the_steps_done(tmp_path, rest):
    path = tmp_path / "metrics.csv"
    rows = "".join(f"{step},8,100,1.5,2.5,0.001\n" for step in range(3))
    path.write_text(",".join(COLUMNS) + "\n" + rows + rest)
    MetricsLog(path, n_rows=3).close()
    assert path.read_text() == ",".join(COLUMNS) + "\n" + rows


# --- folders ---------------------------------------------------------------------------------------------


@pytest.fixture
def read_only_folder(tmp_path):
    """A folder that this process cannot write to, root or not."""
    folder = tmp_path / "sealed"
    folder.mkdir()
    ways = [
        (["mount", "--bind", "-o", "ro", str(folder), str(folder)], ["umount", str(folder)]),
        (["chattr", "+i", str(folder)], ["chattr", "-i", str(folder)]),
    ]
    if os.geteuid() != 0:  # permission bits do not bind root
        ways = [(["chmod", "500", str(folder)], ["chmod", "700", str(folder)])]
    unseal = next((undo for seal, undo in ways if succeeds(seal)), None)
    if unseal is None:
        pytest.skip("root may write everywhere here: neither a read-only mount nor chattr is allowed")
    yield folder
    subprocess.run(unseal, check=True)


def test_read_only_folder_is_refused_before_training(tmp_path, capsys, read_only_folder):
    for out in (read_only_folder, read_only_folder / "deeper"):
        assert TinyRun(tmp_path, output_dir=out).main() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: output_dir: ") and "cannot be written" in error and error.count("\n") == 1


@pytest.mark.parametrize("place", [".", "model.pt/", "metrics.csv/", "training_state.pt/", ".lock/"])
def test_file_or_folder_in_the_way_is_refused_before_training(tmp_path, capsys, place):
    tiny = TinyRun(tmp_path)
    if place == ".":
        tiny.out.write_text("a file")
    else:
        (tiny.out / place).mkdir(parents=True)
    assert tiny.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: output_dir: ") and str(tiny.out) in error and error.count("\n") == 1
    assert tiny.out.is_file() or not (tiny.out / "metrics.csv").is_file()


# --- nobody reads, nothing is cached ---------------------------------------------------------------------


@pytest.mark.soak
def test_closed_stdout_and_unwritable_home(tmp_path):
    """`python train.py … | head -1`, with neither a home nor a cache folder."""
    tiny = TinyRun(tmp_path, num_training_steps=20)
    nowhere = dict.fromkeys(("HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), "/proc/nowhere")
    reader, writer = os.pipe()
    environment = {**os.environ, **nowhere, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(tiny.command(), stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert os.read(reader, 1)
    os.close(reader)
    assert process.wait(timeout=120) == 0, process.stderr.read()
    error = process.stderr.read()
    assert "Traceback" not in error and "BrokenPipe" not in error, error
    assert tiny.rows() == 21 and (tiny.out / "curve.png").exists()


PROGRAM = """
from support.errors import exit_on_user_error
from support.screen import heading, show_note
with exit_on_user_error():
    file = open("file.txt", "w")
    heading("train")
    show_note("─ a note")
    file.write("its own")
    file.close()
"""


@pytest.mark.parametrize(
    ("output", "unbuffered", "encoding", "shown"),
    [
        (">&- 2>&-", "", "utf-8", b""),
        ("> /dev/full 2>&1", "", "utf-8", b""),
        ("> /dev/full 2>&1", "1", "utf-8", b""),
        ("", "", "ascii", b"? a note"),
        ("", "", "utf-8", "─ a note".encode()),
    ],
    ids=["closed", "full", "full, unbuffered", "without the character", "good"],
)
def test_standard_output(tmp_path, output, unbuffered, encoding, shown):
    if "full" in output and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    environment = {"PYTHONIOENCODING": encoding, "PYTHONPATH": os.path.dirname(train.__file__)}
    environment = {**os.environ, **environment, "PYTHONUNBUFFERED": unbuffered}
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    shell = ["sh", "-c", f"exec '{sys.executable}' program.py {output}"]
    process = subprocess.run(shell, capture_output=True, cwd=tmp_path, env=environment)
    assert process.returncode == 0 and not process.stderr, process.stderr
    assert shown in process.stdout
    assert (tmp_path / "file.txt").read_text() == "its own", "what was printed went into a file"


def test_picture_that_cannot_be_drawn_costs_nothing(tmp_path, monkeypatch, capsys):
    tiny = TinyRun(tmp_path)
    monkeypatch.setattr(results, "plot_curve", plot_curve)
    monkeypatch.setattr(train, "evaluate", making_the_picture_a_folder(train.evaluate, tiny.out))
    assert tiny.main() == 0
    assert "Could not draw curve.png" in capsys.readouterr().out
    assert (tiny.out / "model.pt").exists() and not tiny.state.exists()


def test_train_that_never_calls_on_step_says_so_at_its_second_step_and_ends_well(tmp_path, monkeypatch, capsys):
    plain, when, note = train.train, [], "train() does not call on_step(StepResult(…))"
    monkeypatch.setattr(results, "plot_curve", plot_curve)
    monkeypatch.setattr(train, "train", lambda *args, on_step, **keys: plain(*args, **keys))
    tiny = TinyRun(tmp_path)
    at_batches(monkeypatch, {4: lambda: when.append(capsys.readouterr().out)})  # as the third step begins
    assert tiny.main() == 0
    assert when[0].count(note) == 1 and note not in capsys.readouterr().out
    assert tiny.rows() == 1 and not (tiny.out / "curve.png").exists() and not tiny.state.exists()
    assert json.loads((tiny.out / "run.json").read_text())["seconds"] > 0
    assert json.loads((tiny.out / "eval.json").read_text())["val-loss"] > 0


def test_train_that_ignores_start_step_is_one_sentence_and_costs_nothing(tmp_path, monkeypatch, capsys):
    plain, tiny = train.train, TinyRun(tmp_path)
    with monkeypatch.context() as patch:
        at_batches(patch, {6: lambda: os.kill(os.getpid(), signal.SIGINT)})
        assert tiny.main() == 130
    saved = tiny.state.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", lambda *args, start_step, **keys: plain(*args, **keys))
        assert tiny.main() == 1
    message = capsys.readouterr().err
    assert "error: train() began with step 0 instead of start_step = 4: " in message and "--fresh" in message
    assert tiny.state.read_bytes() == saved and tiny.main() == 0


@pytest.mark.parametrize("error", [NotImplementedError("question 3.1: not written yet"), IndexError("7")])
def test_generate_that_fails_costs_only_the_sample_text(tmp_path, monkeypatch, capsys, error):
    def unfinished(*args, **keys):
        raise error

    monkeypatch.setattr(generate, "generate", unfinished)
    tiny = TinyRun(tmp_path)
    assert tiny.main() == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"No sample text: generate() raised {type(error).__name__} ({error})" in printed
    assert (tiny.out / "model.pt").exists() and (tiny.out / "eval.json").exists()


def test_histogram_that_cannot_be_drawn_costs_nothing(tmp_path, capsys):
    (tmp_path / "classification.png").mkdir()
    plot_classification(np.ones(3), np.array([0, 1, 1]), {"a": 0.5}, "title", tmp_path / "classification.png")
    assert "Could not draw classification.png" in capsys.readouterr().out


def test_dry_run_of_a_train_that_never_calls_on_step_is_one_sentence(tmp_path, monkeypatch, capsys):
    plain = train.train
    monkeypatch.setattr(train, "train", lambda *args, on_step, **keys: plain(*args, **keys))
    assert TinyRun(tmp_path).main("--dry-run") == 2
    assert "train() did not call on_step, so its steps cannot be timed" in capsys.readouterr().err


def making_the_picture_a_folder(function, out):
    def wrapped(*args, **kwargs):
        (out / "curve.png").mkdir()
        return function(*args, **kwargs)

    return wrapped


# --- W&B -------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """W&B with a login, and with its functions ready to be made to fail; no run is left behind."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "WANDB_SECONDS", 0.5)
    monkeypatch.setattr(wandb, "run", None)
    return wandb


class FakeRun:
    """What a W&B run looks like to the package, as far as nothing fails."""

    id, offline, url = "abc123", False, "https://wandb.ai/me/run"
    settings = SimpleNamespace(sync_dir="wandb/run-abc123")

    def __init__(self):
        self.summary = {}


def fails(*args, **kwargs):
    raise RuntimeError("the server is on fire")


def hangs(*args, **kwargs):
    time.sleep(30)


@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        ("init", fails, "did not start (the server is on fire)"),
        ("init", hangs, "did not start (no answer in"),
        ("finish", fails, "did not finish (the server is on fire)"),
        ("finish", hangs, "did not finish (no answer in"),
    ],
)
def test_wandb_failing_is_one_note(tmp_path, monkeypatch, capsys, wandb, name, fault, words):
    calls = []
    monkeypatch.setattr(wandb, "init", lambda **kwargs: setattr(wandb, "run", FakeRun()))
    monkeypatch.setattr(wandb, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(wandb, "finish", lambda **kwargs: setattr(wandb, "run", None))
    monkeypatch.setattr(wandb, name, lambda *args, **kwargs: calls.append(name) or fault())
    tiny = TinyRun(tmp_path)
    started = time.monotonic()
    assert tiny.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("W&B") == 1 and words in printed, printed
    assert calls == [name], "what failed once is not tried again"
    assert time.monotonic() - started < 10 and tiny.rows() == 7


def test_wandb_without_login_asks_for_none(tmp_path, monkeypatch, capsys, wandb):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))  # without a netrc file
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setattr(wandb, "init", lambda **kwargs: pytest.fail("it would have prompted for a key"))
    tiny = TinyRun(tmp_path)
    assert tiny.main() == 0
    assert "Not logged in to W&B" in capsys.readouterr().out
    monkeypatch.delenv("WANDB_MODE")
    assert tiny.main() == 0
    assert "W&B" not in capsys.readouterr().out, "where nobody asked for W&B, nothing is said of it"


@pytest.mark.soak
@pytest.mark.parametrize("server", ["refuses", "is silent", "answers nonsense"])
def test_wandb_whose_server(tmp_path, server):
    """The real client, against servers that do not do their part: the run is slower by seconds at most."""
    if server == "answers nonsense":
        listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nonsense)
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        address = listening.server_address
    else:
        listening = socket.create_server(("127.0.0.1", 0))
        address = listening.getsockname()
        if server == "refuses":
            listening.close()
    tiny = TinyRun(tmp_path)
    environment = {
        **os.environ,
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": f"http://127.0.0.1:{address[1]}",
        "WANDB_DIR": str(tmp_path),
    }
    started = time.monotonic()
    process = subprocess.run(tiny.command(), capture_output=True, text=True, env=environment, timeout=180)
    assert process.returncode == 0 and tiny.rows() == 7, process.stderr
    assert process.stdout.count("W&B did not start") == 1 and "Traceback" not in process.stderr, process.stderr
    assert time.monotonic() - started < 60


class Nonsense(http.server.BaseHTTPRequestHandler):
    """Answers everything with a page that is not JSON."""

    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    do_GET = do_POST

    def log_message(self, *args):
        """Print nothing."""
