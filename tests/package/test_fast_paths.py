"""Every fast path gives what the plain one gives."""

import os
import shutil
import signal
import subprocess

import pytest
import tiny_run
import torch
import torch._dynamo
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train
from generate import CachedDecoder, last_token_logits, left_pad
from model import DecoderLM
from support import chunked_loss
from support.chunked_loss import ChunkedLanguageModelingLoss, LanguageModelingLoss, loss_module
from support.config import load_config
from support.errors import UserError
from support.hardware import choose_float32_products, compile_forward

V, D = 5003, 24  # a prime: not a multiple of any chunk


@pytest.fixture(autouse=True)
def products_as_in_the_commands():
    """The commands choose the library of matrix products; the tests of the questions use the default."""
    choose_float32_products()


# --- The chunked loss ---


class HiddenStates(torch.nn.Module):
    """A stand-in for a DecoderLM: its hidden states are a parameter, whatever the input."""

    def __init__(self, hidden, weight):
        super().__init__()
        self.hidden = torch.nn.Parameter(hidden)  # (N, D)
        self.token_embeddings = torch.nn.Embedding.from_pretrained(weight, freeze=False)  # (V, D)

    def hidden_states(self, input_ids):
        return torch.cat([self.hidden, self.hidden[:1].detach()])[None]  # (1, N + 1, D): the last predicts nothing

    def gradients(self):
        return self.hidden.grad, self.token_embeddings.weight.grad


def random_model(n, std=1.0):
    """Logits with this standard deviation, and input ids (1, n + 1) with n predictions."""
    return HiddenStates(torch.randn(n, D), torch.randn(V, D) * std / D**0.5), torch.randint(V, (1, n + 1))


def plain_loss(model, input_ids):
    """The definition in float64, and its gradients."""
    hidden, weight = (p.detach().double().requires_grad_() for p in model.parameters())
    loss = F.cross_entropy(hidden @ weight.T, input_ids[0, 1:])
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("n", [1, 31, 32, 33, 101])
@pytest.mark.parametrize("std", [0.1, 1.0, 8.0, 60.0], ids=lambda std: f"logits of std {std}")
@pytest.mark.parametrize("rows", [32, 512])
def test_chunked_loss_equals_the_definition(monkeypatch, n, std, rows):
    """Logits of std 60 leave the range of exp2, so that the maximum has to be subtracted; the others do not."""
    monkeypatch.setattr(chunked_loss, "MIN_ROWS", rows)
    model, input_ids = random_model(n, std)
    expected, *gradients = plain_loss(model, input_ids)
    loss = ChunkedLanguageModelingLoss(model)(input_ids)
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    # A float32 logit of size 5 std is off by about 5 std 1e-7 sqrt(D); 1e-6 covers one, 4 std in the mean.
    torch.testing.assert_close(loss.double(), expected, atol=1e-5 * max(1, std), rtol=1e-6)
    for got, right in zip(model.gradients(), gradients, strict=True):
        atol = 6e-6 * max(1.0, std) * right.abs().max()
        torch.testing.assert_close(got.double(), 3 * right, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 5), (2, 8), (1, 2), (40, 7)])
@pytest.mark.parametrize("loss_class", [ChunkedLanguageModelingLoss, LanguageModelingLoss])
def test_loss_module_of_a_model_equals_the_definition(randomise, loss_class, shape):
    model = randomise(DecoderLM(11, 6, 2, 8, n_layer=1, p_dropout=0.0))
    input_ids, parameters = torch.randint(11, shape), list(model.parameters())
    plain, fast = train.plain_loss(model, input_ids), loss_class(model)(input_ids)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    gradients = (torch.autograd.grad(loss, parameters) for loss in (fast, plain))
    for got, right in zip(*gradients, strict=True):
        torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)


def test_chunked_loss_is_as_exact_as_the_library_at_std_8():
    model, input_ids = random_model(500, std=8.0)
    hidden, weight = model.parameters()
    expected = plain_loss(model, input_ids)[0]
    library = F.cross_entropy(hidden @ weight.T, input_ids[0, 1:])
    ours = ChunkedLanguageModelingLoss(model)(input_ids)
    one_rounding = expected.item() * 2**-23
    assert abs(ours - expected) <= max(abs(library - expected), 2 * one_rounding)


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_chunked_loss_where_all_logits_are_small_or_large(shift):
    """Without the maximum subtracted every exponential would be 0, or infinite, from the second chunk on."""
    model, input_ids = random_model(150)
    with torch.no_grad():
        hidden, weight = model.parameters()
        hidden[:, 0], weight[:, 0] = 1.0, 0.0
        hidden[:70, 1], hidden[70:, 1], weight[:, 1] = 0.0, 1.0, shift
    expected, hidden_grad, _ = plain_loss(model, input_ids)
    loss = ChunkedLanguageModelingLoss(model)(input_ids)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=1e-5)  # float32 logits of 200 have 2e-5
    # The second column sums 5,003 terms of up to shift / n = 2 to exactly 0: rounding leaves 2 · 5e-6 at most.
    torch.testing.assert_close(model.hidden.grad.double(), hidden_grad, atol=1e-5, rtol=1e-4)


def test_a_second_backward_pass_of_the_chunked_loss_is_an_error():
    model, input_ids = random_model(40)
    loss = ChunkedLanguageModelingLoss(model)(input_ids)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("parameter", [0, 1], ids=["hidden states", "embeddings"])
def test_chunked_loss_passes_on_what_is_not_finite(parameter):
    model, input_ids = random_model(40)
    with torch.no_grad():
        list(model.parameters())[parameter][7, 3] = float("nan")
    assert not torch.isfinite(ChunkedLanguageModelingLoss(model)(input_ids))


def test_chunked_loss_is_float32_under_autocast(randomise):
    model, input_ids = randomise(DecoderLM(11, 6, 2, 8, n_layer=1)).eval(), torch.randint(11, (3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.hidden_states(input_ids)
        loss = ChunkedLanguageModelingLoss(model)(input_ids)
    assert loss.dtype == torch.float32
    right = train.compute_language_modeling_loss(input_ids, model.token_logits(hidden.float()))
    torch.testing.assert_close(loss, right, atol=1e-5, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_chunked_loss_never_holds_all_logits():
    """At V = 50257, 4 x 128 rows of logits are 103 MB; the largest tensor must be a chunk of 64 rows."""
    model = DecoderLM(50257, 8, 2, 128, 1)
    with LargestTensor() as largest:
        ChunkedLanguageModelingLoss(model)(torch.randint(50257, (4, 128))).backward()
    assert 50257 * 8 <= largest.numel <= 50257 * 64


def test_the_loss_of_each_device():
    model = DecoderLM(11, 6, 2, 8, n_layer=1)
    assert type(loss_module(model, torch.device("cpu"), False)) is ChunkedLanguageModelingLoss
    assert type(loss_module(model, torch.device("meta"), False)) is LanguageModelingLoss


# --- Decoding ---


@pytest.mark.parametrize("B", [1, 2, 5])
def test_last_token_logits_equal_the_last_of_all(B):
    model, hidden = DecoderLM(V, D, 3, 16, 2), torch.randn(B, 7, D)
    got, right = last_token_logits(model, hidden), model.token_logits(hidden)[:, -1]
    torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(16, 11), (16,)], ids=["padded", "one row"])
def test_cached_steps_equal_the_whole_sequence(randomise, lengths):
    model = randomise(DecoderLM(V, D, 3, 16, 2)).eval()
    input_ids, mask = left_pad([torch.randint(V, (n,)).tolist() for n in lengths], 0, "cpu")
    decoder = CachedDecoder(model)
    with torch.inference_mode():
        for n in (9, 10, 13, 16):
            got = decoder.next_token_logits(input_ids[:, :n], mask[:, :n])
            right = model(input_ids[:, :n], mask[:, :n])[:, -1]
            torch.testing.assert_close(got, right, atol=1e-4, rtol=1e-5)  # logits of a few tens


def test_cached_steps_read_each_token_once(randomise):
    model, rows = randomise(DecoderLM(V, D, 3, 16, 2)).eval(), []
    model.blocks[0].ff.register_forward_pre_hook(lambda ff, inputs: rows.append(inputs[0].shape[1]))
    decoder = CachedDecoder(model)
    for n in (5, 6, 8):
        decoder.next_token_logits(torch.zeros(2, n, dtype=torch.long), torch.ones(2, n))
    assert rows == [5, 1, 2]


# --- Compilation ---


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
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU, and it is not installed"
)
@pytest.mark.parametrize("loss_class", [ChunkedLanguageModelingLoss, LanguageModelingLoss])
def test_soak_compiled_loss_is_one_graph_compiled_once_and_equal(randomise, loss_class):
    """Not one step may leave the compiled code, or compile it again."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = randomise(DecoderLM(V, D, 3, 16, 2, p_dropout=0.0))
    loss_fn, parameters = loss_class(model), list(model.parameters())
    compile_forward(loss_fn, torch.device("cpu"))
    n_graphs = []
    for _ in range(4):
        input_ids = torch.randint(V, (3, 16))
        loss, right = loss_fn(input_ids), loss_class(model)(input_ids)
        torch.testing.assert_close(loss, right, atol=1e-5, rtol=1e-5)
        gradients = (torch.autograd.grad(value, parameters) for value in (loss, right))
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        n_graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert n_graphs == [2] * 4, "one graph is the trial of the compiler, one the loss"


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
