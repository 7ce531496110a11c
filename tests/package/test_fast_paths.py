"""Every fast path gives what the plain one gives."""

import os
import signal
import subprocess

import pytest
import tiny_run
import torch
import torch.nn.functional as F

import model as model_module
import train
from generate import left_pad
from model import DecoderLM, Dropout, MultiHeadAttention
from support.config import load_config
from support.errors import UserError
from support.hardware import choose_float32_products, compile_forward

V, D = 5003, 24  # a prime: no multiple of any chunk


@pytest.fixture(autouse=True)
def products_as_in_the_commands():
    """As the commands choose the library; the tests of the questions take the default."""
    choose_float32_products()


def plain_loss(hidden, weight, labels):
    """The definition in float64, and its gradients."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, labels)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("n", [1, 31, 32, 33, 101])
@pytest.mark.parametrize("std", [0.1, 1.0, 8.0, 60.0], ids=lambda std: f"logits of std {std}")
@pytest.mark.parametrize("rows", [32, 512])
def test_chunked_loss_equals_the_definition(n, std, rows):
    """Logits of std 60 leave the range of exp2, so that the maximum has to be taken off; the others do not."""
    hidden = torch.randn(n, D, requires_grad=True)
    weight = (torch.randn(V, D) * std / D**0.5).requires_grad_()
    labels = torch.randint(V, (n,))
    loss = train._ChunkedCrossEntropy.apply(hidden, weight, labels, rows)
    (3 * loss).backward()
    expected, hidden_grad, weight_grad = plain_loss(hidden, weight, labels)
    assert loss.dtype == torch.float32
    # A float32 logit of size 5 std is off by about 5 std 1e-7 sqrt(D); 1e-6 covers one, 4 std in the mean.
    torch.testing.assert_close(loss.double(), expected, atol=1e-5 * max(1, std), rtol=1e-6)
    for got, want in ((hidden.grad, 3 * hidden_grad), (weight.grad, 3 * weight_grad)):
        torch.testing.assert_close(got.double(), want, atol=2e-6 * max(1.0, std) * want.abs().max(), rtol=1e-4)


def test_chunked_loss_is_as_exact_as_the_library_at_std_8():
    hidden, labels = torch.randn(500, D), torch.randint(V, (500,))
    weight = torch.randn(V, D) * 8 / D**0.5
    expected = plain_loss(hidden, weight, labels)[0]
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=128)
    library = F.linear_cross_entropy(hidden, weight, labels, options=options)
    ours = train._ChunkedCrossEntropy.apply(hidden, weight, labels, 32)
    one_rounding = expected.item() * 2**-23
    assert abs(ours - expected) <= max(abs(library - expected), 2 * one_rounding)


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_chunked_loss_where_all_logits_are_small_or_large(shift):
    """Without the maximum taken off every exponential would be 0, or infinite, from the second chunk on."""
    hidden, weight = torch.randn(100, D), torch.randn(V, D)
    hidden[:, 0], weight[:, 0] = 1.0, 0.0
    hidden[40:, 1], weight[:, 1] = 1.0, shift
    hidden[:40, 1] = 0.0
    labels = torch.randint(V, (100,))
    expected = plain_loss(hidden, weight, labels)
    hidden.requires_grad_()
    loss = train._ChunkedCrossEntropy.apply(hidden, weight, labels, 32)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected[0], atol=0, rtol=1e-5)  # float32 logits of 200 have 2e-5
    # The second column sums 5,003 terms of up to shift / n = 2 to exactly 0: rounding leaves 2 · 5e-6 at most.
    torch.testing.assert_close(hidden.grad.double(), expected[1], atol=1e-5, rtol=1e-4)


def test_chunked_loss_backward_twice():
    hidden = torch.randn(40, D, requires_grad=True)
    weight, labels = torch.randn(V, D, requires_grad=True), torch.randint(V, (40,))
    loss = train._ChunkedCrossEntropy.apply(hidden, weight, labels, 32)
    once = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    kept = [gradient.clone() for gradient in once]
    twice = torch.autograd.grad(2 * loss, [hidden, weight])
    for first, second, copy in zip(once, twice, kept, strict=True):
        assert torch.equal(2 * first, second)
        assert torch.equal(first, copy), "the second pass changed what the first one had handed over"


@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_chunked_loss_passes_on_what_is_not_finite(where):
    tensors = {"hidden": torch.randn(40, D), "weight": torch.randn(V, D)}
    tensors[where][7, 3] = float("nan")
    loss = train._ChunkedCrossEntropy.apply(*tensors.values(), torch.randint(V, (40,)), 32)
    assert not torch.isfinite(loss)


def test_loss_never_holds_all_logits():
    """At V = 50257, 4 x 128 rows of logits are 103 MB; the largest tensor made must be a chunk of 64 rows."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    model = DecoderLM(50257, 8, 2, 128, 1)
    with Watch():
        train.LanguageModelingLoss(model)(torch.randint(50257, (4, 128))).backward()
    assert 50257 * 8 <= largest <= 50257 * 64


@pytest.mark.parametrize("B", [1, 2, 5])
def test_next_token_logits_equal_the_last_of_all(B):
    model = DecoderLM(V, D, 3, 16, 2).eval()
    rows = [torch.randint(V, (length,)).tolist() for length in (7, 3, 6, 1, 7)[:B]]
    input_ids, mask = left_pad(rows, 0, "cpu")
    with torch.inference_mode():
        torch.testing.assert_close(
            model.next_token_logits(input_ids, mask), model(input_ids, mask)[:, -1], atol=1e-5, rtol=1e-5
        )


def test_cached_steps_equal_the_whole_sequence():
    model = DecoderLM(V, D, 3, 16, 2).eval()
    input_ids, mask = left_pad([torch.randint(V, (length,)).tolist() for length in (16, 11)], 0, "cpu")
    caches = model.kv_caches()
    with torch.inference_mode():
        whole = model(input_ids, mask)
        for start, end in ((0, 9), (9, 10), (10, 13), (13, 16)):
            hidden = model.hidden_states(input_ids[:, start:end], mask[:, :end], caches=caches)
            real = mask[:, start:end].bool()
            torch.testing.assert_close(
                model.token_logits(hidden)[real], whole[:, start:end][real], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("padded", [False, True])
def test_attention_in_groups_equals_attention_of_all(padded, monkeypatch):
    """Only float32 rounding of the weights' gradients may differ, which are sums over the groups."""
    mha, x = MultiHeadAttention(D, 3).eval(), torch.randn(5, 7, D, requires_grad=True)
    mask = torch.ones(5, 7)
    mask[1, :3] = mask[4, :5] = 0
    results = []
    for most in (2**21, 2 * 3 * 7 * 7):  # all at once, then groups of 2, 2 and 1
        monkeypatch.setattr(model_module, "MOST_SCORES", most)
        out = mha(x, mask if padded else None)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *mha.parameters()])))
    for whole, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("shape", [(1001, 333), (4,)])
def test_dropout_equals_its_definition(p, shape):
    """What it keeps is x / (1 - p), the share that it drops is p, and the gradient goes the same way."""
    dropout, x = Dropout(p), torch.randn(shape, requires_grad=True)
    out = dropout(x)
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] / (1 - p), atol=0, rtol=1e-6)
    out.sum().backward()
    torch.testing.assert_close(x.grad, kept / (1 - p), atol=0, rtol=1e-6)
    if x.numel() > 1000:
        dropped = 1 - kept.float()
        deviation = (p * (1 - p) / x.numel()) ** 0.5  # of the mean of independent draws
        assert abs(dropped.mean() - p) < 5 * deviation
        for step in (1, 2, 3, 4, 333):  # four elements share a draw: neighbours must be independent all the same
            both = (dropped.flatten()[step:] * dropped.flatten()[:-step]).mean()
            assert abs(both - p * p) < 10 * deviation * p
        assert dropped.mean(dim=0).std() < 1.2 * (p * (1 - p) / shape[0]) ** 0.5, "some columns are favoured"


def test_dropout_at_its_ends_and_from_its_seed():
    x = torch.randn(50, dtype=torch.float64)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros_like(x))
    torch.manual_seed(1)
    first, second = Dropout(0.5)(x), Dropout(0.5)(x)
    assert first.dtype == torch.float64
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(Dropout(0.5)(x), first)


def test_compile_must_be_true_or_false(tmp_path, capsys):
    run = tiny_run.TinyRun(tmp_path, compile="perhaps")
    assert run.main() == 2
    assert "compile = 'perhaps' must be true or false" in capsys.readouterr().err
    assert load_config(str(tiny_run.TinyRun(tmp_path).config)).compile is False


def test_compilation_is_tried_before_the_module_is_compiled(monkeypatch):
    """With stand-ins for the compiler; the long tests use the real one."""
    module, compiled = torch.nn.Linear(1, 1), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    compile_forward(module, torch.device("cpu"))
    assert compiled == [module], "the module itself is compiled, so that its state_dict keeps its names"

    def no_compiler(function):
        raise RuntimeError("no g++ here\nand a long trace")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(UserError, match="nothing compiles here .*no g.. here.*or give compile: false"):
        compile_forward(module, torch.device("cpu"))
    assert compiled == [module]


@pytest.mark.soak
def test_soak_compiled_run_equals_the_plain_one_and_continues(tmp_path, monkeypatch):
    model_config = {**tiny_run.KEYS["model_config"], "p_dropout": 0.0}
    whole = tiny_run.TinyRun(tmp_path / "whole", compile=True, model_config=model_config)
    assert whole.main() == 0
    broken = tiny_run.TinyRun(tmp_path / "broken", compile=True, model_config=model_config)
    with monkeypatch.context() as patched:
        tiny_run.at_batches(patched, {5: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        assert broken.main() == 128 + signal.SIGTERM
    assert broken.state.exists()
    assert broken.main() == 0
    assert broken.results() == whole.results()

    plain = tiny_run.TinyRun(tmp_path / "plain", model_config=model_config)
    assert plain.main() == 0
    states = [torch.load(run.out / "model.pt", weights_only=True) for run in (whole, plain)]
    assert states[0].keys() == states[1].keys() == DecoderLM(50257, **model_config).state_dict().keys()
    for key, compiled in states[0].items():
        # Six steps of AdamW of at most max_lr = 1e-2 each; rounding decides the sign where a gradient is 0.
        close = (compiled - states[1][key]).abs() < 1e-4
        assert close.float().mean() > 0.99, key


@pytest.mark.soak
def test_soak_compile_without_a_compiler_is_one_sentence(tmp_path):
    run = tiny_run.TinyRun(tmp_path, compile=True)
    nowhere = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = subprocess.run(run.command(), env={**os.environ, **nowhere}, capture_output=True, text=True)
    assert process.returncode == 2, process.stderr
    assert "compile = true, but nothing compiles here" in process.stderr
    assert "give compile: false" in process.stderr
    assert "Traceback" not in process.stderr
    assert not run.out.exists()
