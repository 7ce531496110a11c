"""Every fast path gives what the plain one gives, and where a changed model makes them differ it is not used."""

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from tiny_run import TinyRun, random_tokens, status
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import classify
import generate
import model as model_file
import train
from generate import left_pad
from model import DecoderLM
from support.chunked_loss import ChunkedLanguageModelingLoss
from support.decoding import CachedDecoder
from support.tokenizer import get_tokenizer

V, D = 5003, 24  # a prime: not a multiple of any chunk

# --- the chunked loss ------------------------------------------------------------------------------------


class HiddenStates(nn.Module):
    """A stand-in for a DecoderLM: its hidden states are a parameter, whatever the input."""

    def __init__(self, hidden, weight):
        super().__init__()
        self.hidden = nn.Parameter(hidden)  # (N, D)
        self.token_embeddings = nn.Embedding.from_pretrained(weight, freeze=False)  # (V, D)

    def hidden_states(self, input_ids):
        return torch.cat([self.hidden, self.hidden[:1].detach()])[None]  # (1, N + 1, D): the last predicts nothing

    def token_logits(self, x):
        return x @ self.token_embeddings.weight.T

    def forward(self, input_ids):
        return self.token_logits(self.hidden_states(input_ids))


def random_model(n, std=1.0):
    """Logits with this standard deviation, and input ids (1, n + 1) with n predictions."""
    return HiddenStates(torch.randn(n, D), torch.randn(V, D) * std / D**0.5), torch.randint(V, (1, n + 1))


def definition(model, input_ids):
    """The loss in float64, and its gradients."""
    hidden, weight = (p.detach().double().requires_grad_() for p in model.parameters())
    loss = F.cross_entropy(hidden @ weight.T, input_ids[0, 1:])
    loss.backward()
    return loss.detach(), (hidden.grad, weight.grad)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 101, 600])
@pytest.mark.parametrize("std", [0.1, 1.0, 8.0, 60.0], ids=lambda std: f"logits of std {std}")
def test_chunked_loss_equals_the_definition(n, std):
    """Logits of std 60 leave the range of exp2, so that the maximum has to be subtracted; the others do not."""
    model, input_ids = random_model(n, std)
    expected, gradients = definition(model, input_ids)
    loss = ChunkedLanguageModelingLoss(model)(input_ids)
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    # A float32 logit of size 5 std is off by about 5 std 1e-7 sqrt(D); 1e-6 covers one, 4 std in the mean.
    torch.testing.assert_close(loss.double(), expected, atol=1e-5 * max(1, std), rtol=1e-6)
    for parameter, right in zip(model.parameters(), gradients, strict=True):
        atol = 6e-6 * max(1.0, std) * right.abs().max()
        torch.testing.assert_close(parameter.grad.double(), 3 * right, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 5), (2, 8), (1, 2), (40, 7)])
def test_chunked_loss_of_a_model_equals_the_plain_one(randomise, shape):
    model = randomise(DecoderLM(11, 6, 2, 8, n_layer=1, p_dropout=0.0))
    input_ids, parameters = torch.randint(11, shape), list(model.parameters())
    losses = (
        train.compute_language_modeling_loss(input_ids, model(input_ids)),
        ChunkedLanguageModelingLoss(model)(input_ids),
    )
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    gradients = (torch.autograd.grad(loss, parameters) for loss in losses)
    for right, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)


def test_chunked_loss_is_float32_under_autocast_and_passes_on_what_is_not_finite(randomise):
    model, input_ids = randomise(DecoderLM(11, 6, 2, 8, n_layer=1)).eval(), torch.randint(11, (3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, loss = model.hidden_states(input_ids), ChunkedLanguageModelingLoss(model)(input_ids)
    assert loss.dtype == torch.float32
    right = train.compute_language_modeling_loss(input_ids, model.token_logits(hidden.float()))
    torch.testing.assert_close(loss, right, atol=1e-5, rtol=1e-5)
    model.token_embeddings.weight.data[7, 3] = float("nan")
    assert not ChunkedLanguageModelingLoss(model)(input_ids).isfinite()


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
    """At V = 50257, 4 x 128 rows of logits are 103 MB."""
    model = DecoderLM(50257, 8, 2, 128, 1)
    with LargestTensor() as largest:
        ChunkedLanguageModelingLoss(model)(torch.randint(50257, (4, 128))).backward()
    assert 50257 * 8 <= largest.numel <= 50257 * 128


# --- cached decoding -------------------------------------------------------------------------------------


def test_cached_decoder_is_right_for_any_sequence_of_calls(randomise):
    """It continues, starts over for other texts, a shorter one or another mask, and slides beyond the window."""
    model = randomise(DecoderLM(V, D, 3, 16, 2)).eval()
    decoder, texts = CachedDecoder(model), torch.randint(V, (3, 16))
    lengths = [
        (5, 3),
        (6, 4),
        (9, 7),
        (16, 14),
        (4, 2),
        (4, 3),
        (5, 5),
        (6,),
        (7,),
        (6, 6, 6),
        (7, 7, 2),
        (8, 8, 3),
    ]
    calls = [
        left_pad([text[:n].tolist() for text, n in zip(texts, row, strict=False)], 0, "cpu") for row in lengths
    ]
    calls += [(texts[:, i:], torch.ones(3, 16 - i)) for i in (0, 1, 2)]
    with torch.inference_mode():
        for input_ids, mask in calls:
            right = model(input_ids, mask)[:, -1]
            torch.testing.assert_close(decoder(input_ids, mask), right, atol=1e-4, rtol=1e-5)  # logits of tens


def test_cached_decoder_reads_each_token_once(randomise):
    model, rows = randomise(DecoderLM(V, D, 3, 16, 2)).eval(), []
    model.blocks[0].ff.register_forward_pre_hook(lambda ff, inputs: rows.append(inputs[0].shape[1]))
    decoder = CachedDecoder(model)
    with torch.inference_mode():
        for n in (5, 6, 8):
            decoder(torch.zeros(2, n, dtype=torch.long), torch.ones(2, n))
    assert rows == [5, 1, 2]


@pytest.mark.parametrize("prefixes", [["To be"], ["To be", "or", "not to be, that is"]], ids=len)
def test_generation_with_the_cache_is_that_without(randomise, ascii_tokenizer, prefixes):
    model = randomise(DecoderLM(129, 12, 2, 8, 2)).eval()
    arguments = model, "cpu", ascii_tokenizer, prefixes, 2, 20
    right = generate.generate(*arguments)
    assert generate.generate(*arguments, next_token_logits=CachedDecoder(model)) == right


# --- models that their user changed (fast means equal, or it is not used) ---------------------------------


class Untied(DecoderLM):
    """With an output matrix of its own."""

    def __init__(self, *args, **keys):
        super().__init__(*args, **keys)
        torch.manual_seed(0)
        self.output = nn.Linear(self.token_embeddings.embedding_dim, self.token_embeddings.num_embeddings)
        nn.init.normal_(self.output.weight, std=0.5)

    def token_logits(self, x):
        return self.output(x)


class PostNormBlock(model_file.DecoderBlock):
    def forward(self, x, attention_mask=None):
        x = self.ln_1(x + self.mha(x, attention_mask))
        return self.ln_2(x + self.ff(x))


class NotCausalOverCache(model_file.DecoderBlock):
    """Adds the mean of all earlier inputs, which a cache of keys and values does not have."""

    def forward(self, x, attention_mask=None):
        n = torch.arange(1, x.shape[1] + 1)[:, None]
        return super().forward(x + 3 * x.cumsum(1) / n, attention_mask)


@pytest.fixture(params=["untied", "post-norm", "sum over the past"])
def changed(request, monkeypatch, randomise):
    """The changed class in place of DecoderLM in all files."""
    if request.param == "untied":
        for module in (model_file, train, generate, classify):
            if hasattr(module, "DecoderLM"):
                monkeypatch.setattr(module, "DecoderLM", Untied)
        monkeypatch.setattr("support.checkpoint.DecoderLM", Untied)
        return Untied
    block = PostNormBlock if request.param == "post-norm" else NotCausalOverCache
    monkeypatch.setattr(model_file, "DecoderBlock", block)
    return DecoderLM


def test_commands_print_the_changed_models_own_numbers(changed, tmp_path, capsys, randomise, quick):
    keys = {"n_embd": 8, "n_head": 2, "n_positions": 16, "n_layer": 2, "p_dropout": 0.0}
    tiny = TinyRun(tmp_path, model_config=keys, num_training_steps=4)
    assert tiny.main() == 0
    model = changed(50257, **keys)
    model.load_state_dict(torch.load(tiny.out / "model.pt", weights_only=True))
    rows = torch.from_numpy(random_tokens(90, seed=4).astype("int64"))[:88].view(11, 8)
    with torch.inference_mode():
        right = train.compute_language_modeling_loss(rows, model.eval()(rows)).item()
    assert json.loads((tiny.out / "eval.json").read_text())["val-loss"] == pytest.approx(right, abs=1e-4)
    capsys.readouterr()
    assert tiny.main("--evaluate", tiny.out) == 0
    shown = re.search(r"validation loss\W+([\d.]+)", capsys.readouterr().out)[1]
    assert float(shown) == pytest.approx(right, abs=1e-3)

    torch.save(randomise(model).state_dict(), tiny.out / "model.pt")  # large weights, so that mistakes show
    prompts = ["Once upon a time there was", "It"]
    assert status(generate, tiny.out, "--prompt", *prompts, "--max_new_tokens", 24) == 0
    written = [json.loads(line)["generation"] for line in (tiny.out / "generation.jsonl").read_text().splitlines()]
    assert written == generate.generate(model, "cpu", get_tokenizer(), prompts, 2, 24)


# --- compilation -----------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")


@pytest.mark.soak
@needs_compiler
def test_soak_compiled_run_equals_the_plain_one_and_repeats(tmp_path, capsys, quick):
    keys = {"n_embd": 8, "n_head": 2, "n_positions": 16, "n_layer": 1, "p_dropout": 0.0}
    runs = [TinyRun(tmp_path / n, model_config=keys, compile=n != "plain") for n in ("plain", "one", "two")]
    assert [run.main() for run in runs] == [0, 0, 0]
    assert runs[1].results() == runs[2].results()
    losses = [json.loads((run.out / "eval.json").read_text())["val-loss"] for run in runs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.soak
def test_soak_compile_without_a_compiler_is_one_sentence(tmp_path, monkeypatch, capsys):
    torch._dynamo.reset()
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    tiny = TinyRun(tmp_path, compile=True)
    assert tiny.main() == 2
    error = capsys.readouterr().err
    assert "compile" in error and error.count("\n") == 1
