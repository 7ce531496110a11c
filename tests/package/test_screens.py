"""The choice of the device, and what the commands print: numbers, the bar, errors, the results of a run."""

import io
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_run import ROOT, TinyRun, at_batches, leave_out_what_is_slow
from torch.optim.optimizer import register_optimizer_step_post_hook

from support import checkpoint, hardware, results, run, state
from support.classification import area_under_roc
from support.config import load_config
from support.errors import UserError, exit_on_user_error
from support.generation import read_prefixes
from support.hardware import choose_hardware
from support.screen import bold, count, duration

CONFIGS = ROOT / "configs"


# --- the device: the answers of CUDA and MPS are substituted here ----------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """machine(n_gpus, bf16, mps) substitutes what PyTorch says of this machine."""

    def substitute(n_gpus=0, bf16=False, mps=False):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return substitute


@pytest.mark.parametrize(
    ("there", "asked", "device", "dtype", "fused", "reason"),
    [
        ({"n_gpus": 2, "bf16": True, "mps": True}, "auto", "cuda", torch.bfloat16, True, "with bfloat16"),
        ({"n_gpus": 2, "bf16": True}, "cuda:1", "cuda:1", torch.bfloat16, True, "with bfloat16"),
        ({"n_gpus": 1}, "cuda", "cuda", torch.float32, True, "without bfloat16"),
        ({"mps": True}, "auto", "mps", torch.float32, False, "Apple"),
        ({}, "auto", "cpu", torch.float32, True, "no GPU found"),
        ({"n_gpus": 1}, "cpu", "cpu", torch.float32, True, "as requested"),
    ],
)
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_device(machine, there, asked, device, dtype, fused, reason):
    machine(**there)
    chosen = choose_hardware(asked)
    assert (chosen.device, chosen.dtype, chosen.fused) == (torch.device(device), dtype, fused)
    assert reason in str(chosen) and str(chosen).startswith(device)
    if "cuda" in device:
        assert torch.get_float32_matmul_precision() == "high", "products that stay in float32 should use TF32"
    if dtype == torch.bfloat16:
        assert chosen.autocast().fast_dtype == dtype and chosen.autocast().device == "cuda"


@pytest.mark.parametrize(
    ("capability", "coarse", "precision"),
    [("AVX512", False, "medium"), ("AVX512", True, "highest"), ("AVX2", False, "highest")],
    ids=["exact products", "products in bfloat16", "no AVX-512"],
)
def test_other_library_for_float32_only_where_its_products_are_exact(monkeypatch, capability, coarse, precision):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    if coarse:
        matmul = torch.Tensor.__matmul__
        monkeypatch.setattr(
            torch.Tensor,
            "__matmul__",
            lambda a, b: matmul(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else matmul(a, b),
        )
    state = torch.get_rng_state()
    choose_hardware("cpu")
    assert torch.get_float32_matmul_precision() == precision
    assert torch.equal(torch.get_rng_state(), state), (
        "the trial must not move the generator that training draws from"
    )


def test_products_chosen_for_this_machine_are_float32s():
    choose_hardware("cpu")
    a, b = torch.randn(2, 300, 300)
    torch.testing.assert_close(a @ b, (a.double() @ b.double()).float(), rtol=0, atol=2e-4)  # bfloat16: 0.2


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "cuda:2", "mps", "gpu", "cpu:0", "cuda:x", "meta"])
def test_device_that_is_not_there(machine, asked):
    machine(n_gpus=2 if asked == "cuda:2" else 0)
    with pytest.raises(UserError, match=f"device = '{asked}'.*use auto"):
        choose_hardware(asked)


def test_facts_of_a_gpu(machine, monkeypatch):
    machine(n_gpus=1)
    gpu = choose_hardware("cuda").device
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 20)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.ones(3))
    assert choose_hardware("cuda").name == "a GPU" and hardware.peak_memory_mib(gpu) == 3
    assert torch.equal(state.random_state(gpu)["cuda"], torch.ones(3))
    restored = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda values, device: restored.append(values))
    state._restore_random_state(state.random_state(gpu), gpu)
    state._restore_random_state(state.random_state(torch.device("cpu")), gpu)  # a run that began on a CPU
    assert len(restored) == 1


def test_speed_of_the_processor_is_measured():
    cpu = choose_hardware("cpu")
    assert hardware.matrix_product_rate(cpu, size=64) > 1e6 and cpu.name.endswith("threads")


# --- words and numbers on the screen ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("val_loss", "words"),
    [
        (math.nan, "diverged"),
        (11.0, "No better than a uniform guess"),
        (9.0, "1.82 below a uniform guess, not yet below word frequencies"),
        (6.9, "3.92 below a uniform guess and 0.60 below word frequencies"),
    ],
)
def test_meaning_of_a_loss(val_loss, words):
    plan = SimpleNamespace(ln_vocab=10.82, unigram_entropy=7.5)
    assert words in results._meaning(plan, val_loss)


def test_numbers_for_people():
    texts = [count(n, "tokens") for n in (7, 1640, 1.64e6, 5.2e9, 1e15)]
    assert texts == ["7 tokens", "1.64 k tokens", "1.64 M tokens", "5.2 G tokens", "1e+03 T tokens"]
    assert [duration(s) for s in (3.14159, 600, 7200)] == ["3.1 s", "10.0 min", "2.0 h"]


def test_area_under_roc_is_the_share_of_pairs_in_order():
    draw = np.random.default_rng(1)
    p, labels = draw.integers(0, 5, 60) / 5, draw.integers(0, 2, 60)
    pairs = [(a > b) + 0.5 * (a == b) for a in p[labels == 1] for b in p[labels == 0]]
    assert area_under_roc(p, labels) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert math.isnan(area_under_roc(p, np.ones(60)))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_gets_one_bar_and_style(tmp_path, monkeypatch):
    leave_out_what_is_slow(monkeypatch)
    out, bar = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", bar)
    assert TinyRun(tmp_path).main() == 0
    assert "6/6" in bar.getvalue() and "tok/s" in bar.getvalue(), bar.getvalue()
    assert "step 6/6" not in out.getvalue() and "\033[1mvalidation loss" in out.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    assert bold("plain") == "plain"


def test_gradients_are_clipped(tmp_path, monkeypatch):
    leave_out_what_is_slow(monkeypatch)
    norms = []

    def watch(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    handle = register_optimizer_step_post_hook(watch)
    try:
        assert TinyRun(tmp_path, grad_clip=1e-3).main() == 0
    finally:
        handle.remove()
    assert norms == pytest.approx([1e-3] * 6, rel=1e-2), "the norm of every step should be the limit"


# --- errors ----------------------------------------------------------------------------------------------


def test_ctrl_c_and_errors_of_the_program():
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    with pytest.raises(ZeroDivisionError), exit_on_user_error():
        1 / 0  # noqa: B018 (a mistake in the program needs its traceback)


def test_mistake_in_a_students_code_keeps_its_traceback(tmp_path, monkeypatch):
    leave_out_what_is_slow(monkeypatch)
    tiny = TinyRun(tmp_path)
    at_batches(monkeypatch, {4: lambda: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        tiny.main()
    assert tiny.rows() == 3, "the rows of the steps done stay"


def test_file_that_vanishes_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        open("/nowhere/at all")  # noqa: SIM115
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: /nowhere/at all: No such file or directory; ")


def test_memory_advice_for_a_batch_of_one():
    config = load_config(str(CONFIGS / "GPT-tiny.yaml"), ["batch_size=1"])
    assert run.smaller_batch_advice(config).endswith("make one of the others smaller")


def test_memory_that_runs_out_while_a_checkpoint_loads_is_no_damaged_file(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "model.pt")

    def no_memory(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(MemoryError):
        checkpoint.load_archive(tmp_path / "model.pt", 0, 1e9)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('["a", 1]', "entry 2"),
        ('["a"', ""),
        ('"a"\n\n{"prefix": \n', "line 3"),
        ("[]", "no prefix"),
        ("[" * 9999, ""),
        (None, "No such file"),
    ],
)
def test_bad_prefixes_name_the_place(tmp_path, text, place):
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"p\.json.*{place}"):
        read_prefixes(str(path))


# --- the checkpoint that is taken when none is named -----------------------------------------------------


def test_model_of_the_package_is_the_last_resort(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path / "package")
    (tmp_path / "package").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no trained model found"):
        checkpoint.find_checkpoint(None, None)
    (tmp_path / "package" / "model.pt").touch()
    assert checkpoint.find_checkpoint(None, None)[0] == Path("package/model.pt")
    for name, age in (("old", 100), ("new", 50)):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "model.pt").touch()
        os.utime(tmp_path / "outputs" / name / "model.pt", (1e9 - age, 1e9 - age))
    path, how = checkpoint.find_checkpoint(None, None)
    assert path == Path("outputs/new/model.pt") and "newest" in how


def test_leftovers_of_killed_writers_are_removed(tmp_path, monkeypatch):
    leave_out_what_is_slow(monkeypatch)
    tiny = TinyRun(tmp_path)
    tiny.out.mkdir()
    (tiny.out / ".model.pt.4711.tmp").write_bytes(b"half of")
    assert tiny.main() == 0 and not tiny.leftovers()
    assert json.loads((tiny.out / "run.json").read_text())["matrix-product-tflops"] == 1
