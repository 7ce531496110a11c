"""Faults, each really made: divergence, lack of memory or disk, W&B, a closed stdout, folders not to write to."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_run import TinyRun, at_batches

import train
from model import DecoderLM
from support import hardware, results
from support.checkpoint import load_archive
from support.config import ModelConfig
from support.files import atomic_file, write_json
from support.metrics import COLUMNS, MetricsLog, read_rows

resource = pytest.importorskip("resource", reason="this system has no resource limits")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leave out the speed measurement, which takes seconds and has no part in any fault."""
    monkeypatch.setattr(hardware, "matrix_product_rate", lambda hardware: 1e12)


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(results, "plot_curve", lambda *args: None)


@contextlib.contextmanager
def limit(kind: int, most: int):
    """A limit of the operating system on this process, lifted afterwards."""
    former, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (former, hard))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 14 MB, where this process may mount one; a tiny run needs 11.3 MB to begin."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here; the tests with RLIMIT_FSIZE stand in")
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
    step = state["progress"]["step"]
    assert f"at step {step} " in captured.err and f"continues from step {step}" in captured.err
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values()), (
        "the state kept is a good one"
    )
    assert tiny.main() == 1, "the same command diverges again, and says so again"
    assert load_archive(tiny.state, 0, 1e9)["progress"]["step"] == step


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
    assert "the gradient's norm is" in captured.err and "at step 3 " in captured.err
    assert_stopped_before_the_weights_changed(tiny, captured)
    assert load_archive(tiny.state, 0, 1e9)["progress"]["step"] == 3


def test_json_is_valid_whatever_the_numbers(tmp_path):
    path = tmp_path / "eval.json"
    write_json(path, {"val-perplexity": float("inf"), "deep": {"list": [float("nan"), 1.5]}})

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "val-perplexity": None,
        "deep": {"list": [None, 1.5]},
    }


# --- memory ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory bind on Linux only")
@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_out_of_memory_names_the_numbers_and_the_remedy(tmp_path, capsys, no_picture, arguments):
    tiny = TinyRun(tmp_path, batch_size=300_000, grad_accumulation_steps=1, num_training_steps=3)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    with limit(resource.RLIMIT_AS, used + (300 << 20)):
        assert tiny.main(*arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: out of memory at step 0"), error
    assert "batch_size 300000 × seq_len 8 × n_embd 8 × n_layer 1" in error
    assert "--set batch_size=150000 grad_accumulation_steps=2" in error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_out_of_memory_on_a_gpu(tmp_path, capsys):
    tiny = TinyRun(tmp_path, device="cuda", batch_size=1_000_000)
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        assert tiny.main() == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--set batch_size=500000 grad_accumulation_steps=4" in error


def test_model_that_no_memory_holds_is_refused_at_once(tmp_path, capsys):
    tiny = TinyRun(tmp_path)
    assert tiny.main("--set", "model_config.n_embd=4000000") == 2
    error = capsys.readouterr().err
    assert "model_config" in error and "n_embd = 4000000" in error and error.count("\n") == 1


def test_number_of_parameters_is_that_of_the_model():
    config = ModelConfig(n_embd=6, n_head=2, n_positions=5, n_layer=3)
    built = DecoderLM(11, **vars(config))
    assert config.n_parameters(11) == sum(parameter.numel() for parameter in built.parameters())


# --- disk ------------------------------------------------------------------------------------------------


def test_disk_full_while_saving(tmp_path, monkeypatch, capsys, small_disk, no_picture):
    tiny = TinyRun(tmp_path, output_dir=small_disk / "out", checkpoint_interval=1)
    whole = TinyRun(tmp_path)
    assert whole.main() == 0
    kept = {}

    def fill_the_disk():
        kept["state"] = tiny.state.read_bytes()
        fill(small_disk)

    def look():
        assert tiny.state.read_bytes() == kept["state"], "the former state is no longer what it was"
        assert tiny.leftovers() == []
        (small_disk / "filler").unlink()

    at_batches(monkeypatch, {4: fill_the_disk, 8: look})
    assert tiny.main() == 0
    out = capsys.readouterr().out
    assert "state of step 3 could not be saved (No space left on device); training goes on" in out
    assert tiny.results() == whole.results(), "the run with the full disk lost something"


def test_disk_full_at_the_end(tmp_path, monkeypatch, capsys, small_disk, no_picture):
    whole = TinyRun(tmp_path)
    assert whole.main() == 0
    tiny = TinyRun(tmp_path, output_dir=small_disk / "out")
    assert tiny.main("--set", "max_lr=0.1") == 0
    former = tiny.results()
    monkeypatch.setattr(train, "evaluate", filling(train.evaluate, small_disk))
    assert tiny.main() == 1
    captured = capsys.readouterr()
    assert "No space left on device" in captured.err and "continues from step 6" in captured.err, captured.err
    assert captured.err.count("\n") == 1 and tiny.leftovers() == []
    for name in ("model.pt", "eval.json"):
        assert (tiny.out / name).read_bytes() == former[name], f"the former {name} is no longer what it was"
    (small_disk / "filler").unlink()
    monkeypatch.undo()
    monkeypatch.setattr(hardware, "matrix_product_rate", lambda hardware: 1e12)
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


def test_file_size_limit_while_saving_and_at_the_end(tmp_path, monkeypatch, capsys, no_picture):
    """Where no small disk can be mounted, a limit on the size of files makes the same writes fail."""
    tiny = TinyRun(tmp_path, checkpoint_interval=2)
    with limit(resource.RLIMIT_FSIZE, 1 << 20):
        assert tiny.main() == 1
    captured = capsys.readouterr()
    assert captured.out.count("could not be saved (File too large); training goes on") == 3
    assert "File too large" in captured.err and "starts over" in captured.err and tiny.leftovers() == []
    kept = {}
    at_batches(monkeypatch, {10: lambda: kept.update(state=tiny.state.read_bytes())})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        monkeypatch.setattr(
            train,
            "evaluate",
            lambda *args: (
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
                or {"val-loss": 1.0, "val-perplexity": 1.0}
            ),
        )
        assert tiny.main() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "continues from step 6" in capsys.readouterr().err and len(kept["state"]) > 1 << 20


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
    path = tmp_path / "metrics.csv"
    log, whole = MetricsLog(path), tmp_path / "whole.csv"
    reference = MetricsLog(whole)
    for step in range(20):
        row = (step, 8 * step, 100 * step, 1 / (step + 1), 0.1 + step, 1e-3)
        reference.append(*row)
        if step == 5:
            room = limit(resource.RLIMIT_FSIZE, path.stat().st_size + 30)  # row 5 is cut in its middle
            room.__enter__()
        log.append(*row)
        if step == 12:
            with pytest.raises(OSError, match="too large"):
                log.sync()
            assert len(read_rows(path)) == 5, "a row that is cut short is no row"
            room.__exit__(None, None, None)
    log.sync()
    assert path.read_bytes() == whole.read_bytes()
    log.close()
    reference.close()


@pytest.mark.parametrize("rest", ["", "3,4", "\x00\n", "a,b,c,d,e,f\n", "5,1,1,2.0,2.0,0.1\n" * 3])
def test_metrics_are_cut_back_to_whole_rows_of_the_steps_done(tmp_path, rest):
    path = tmp_path / "metrics.csv"
    rows = "".join(f"{step},8,100,1.5,2.5,0.001\n" for step in range(3))
    path.write_text(",".join(COLUMNS) + "\n" + rows + rest)
    MetricsLog(path, start_step=3).close()
    assert path.read_text() == ",".join(COLUMNS) + "\n" + rows


# --- folders ---------------------------------------------------------------------------------------------


@pytest.fixture
def read_only_folder(tmp_path):
    """A folder that this process cannot write to, root or not."""
    folder = tmp_path / "sealed"
    folder.mkdir()
    bind = ["mount", "--bind", "-o", "ro", str(folder), str(folder)]
    unseal = ["umount", str(folder)]
    if os.geteuid() != 0:
        folder.chmod(0o500)
        unseal = ["chmod", "700", str(folder)]
    elif sys.platform != "linux" or (
        subprocess.run(bind, capture_output=True).returncode
        and subprocess.run(["chattr", "+i", str(folder)], capture_output=True).returncode
    ):
        pytest.skip("root may write everywhere here, and neither a read-only mount nor chattr is allowed")
    elif not os.path.ismount(folder):
        unseal = ["chattr", "-i", str(folder)]
    yield folder
    subprocess.run(unseal, check=True)


def test_read_only_folder_is_refused_before_training(tmp_path, capsys, read_only_folder):
    for out in (read_only_folder, read_only_folder / "deeper"):
        assert TinyRun(tmp_path, output_dir=out).main() == 2
        error = capsys.readouterr().err
        assert (
            error.startswith("error: output_dir: ") and "cannot be written" in error and error.count("\n") == 1
        )


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


def test_closed_stdout_and_unwritable_home(tmp_path):
    """`python train.py … | head -1`, with neither a home nor a cache folder."""
    tiny = TinyRun(tmp_path, num_training_steps=40)
    nowhere = dict.fromkeys(("HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), "/proc/nowhere")
    reader, writer = os.pipe()
    process = subprocess.Popen(
        tiny.command(), stdout=writer, stderr=subprocess.PIPE, text=True, env={**os.environ, **nowhere}
    )
    os.close(writer)
    assert os.read(reader, 1)
    os.close(reader)
    assert process.wait(timeout=120) == 0, process.stderr.read()
    error = process.stderr.read()
    assert "Traceback" not in error and "BrokenPipe" not in error, error
    assert tiny.rows() == 41 and (tiny.out / "curve.png").exists()


def test_stdout_closed_from_the_start_and_a_full_one(tmp_path):
    tiny = TinyRun(tmp_path, num_training_steps=3)
    shell = " ".join(map(json.dumps, tiny.command()))
    closed = subprocess.run(["sh", "-c", f"exec {shell} >&- 2>&-"], timeout=120)
    assert closed.returncode == 0 and tiny.rows() == 4
    metrics = (tiny.out / "metrics.csv").read_text()
    assert metrics.startswith("step,") and "train" not in metrics.split("\n", 1)[1], "a print went into a file"
    if os.path.exists("/dev/full"):
        full = subprocess.run(
            ["sh", "-c", f"exec {shell} --dry-run > /dev/full"], capture_output=True, timeout=120
        )
        assert full.returncode == 0, full.stderr


def test_picture_that_cannot_be_drawn_costs_nothing(tmp_path, monkeypatch, capsys):
    tiny = TinyRun(tmp_path)
    monkeypatch.setattr(train, "evaluate", making_the_picture_a_folder(train.evaluate, tiny.out))
    assert tiny.main() == 0
    assert "curve.png could not be drawn" in capsys.readouterr().out
    assert (tiny.out / "model.pt").exists() and not tiny.state.exists()


def making_the_picture_a_folder(function, out):
    def wrapped(*args, **kwargs):
        (out / "curve.png").mkdir()
        return function(*args, **kwargs)

    return wrapped


def test_characters_that_the_terminal_lacks(tmp_path):
    code = "from support.errors import exit_on_user_error\nwith exit_on_user_error():\n    print('─ done')\n"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.path.dirname(train.__file__)}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert shown.stdout.split() == [b"?", b"done"], shown.stderr


# --- W&B -------------------------------------------------------------------------------------------------
