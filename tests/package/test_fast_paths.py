"""Every fast path gives what the plain one gives, and where a changed model makes them differ it is not used."""

import copy
import json
import os
import re
import shutil

import pytest
import torch
from tiny_run import ROOT, TinyRun, python, random_tokens, status
from torch import nn

import classify
import generate
import model as model_file
import train
from generate import left_pad
from model import DecoderLM
from support import checkpoint
from support.chunked_loss import ChunkedLanguageModelingLoss
from support.decoding import CachedDecoder
from support.tokenizer import get_tokenizer

V, D = 5003, 24  # a prime: not a multiple of any chunk
NO_DROPOUT = {"n_embd": 8, "n_head": 2, "n_positions": 16, "n_layer": 2, "p_dropout": 0.0}


@pytest.mark.parametrize("shape", [(1, 2), (1, 33), (5, 8), (20, 31)], ids=str)
@pytest.mark.parametrize("std", [0.1, 1.0, 8.0, 60.0], ids=lambda std: f"logits of std {std}")
def test_chunked_loss_equals_the_definition_in_float64(shape, std):
    """Logits of std 60 leave the range of exp2, so that the maximum has to be subtracted; the others do not."""
    model, input_ids = DecoderLM(V, D, 3, 33, 1, p_dropout=0.0), torch.randint(V, shape)
    nn.init.normal_(model.token_embeddings.weight, std=std / D**0.5)
    exact = copy.deepcopy(model).double()
    expected = train.compute_language_modeling_loss(input_ids, exact(input_ids))
    expected.backward()
    loss = ChunkedLanguageModelingLoss(model)(input_ids)
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    # A float32 logit of size 5 std is off by about 5 std 1e-7 sqrt(D); 1e-6 covers one, 4 std in the mean.
    torch.testing.assert_close(loss.double(), expected, atol=1e-5 * max(1, std), rtol=1e-6)
    for got, right in zip(model.parameters(), exact.parameters(), strict=True):
        atol = 2e-5 * max(1.0, std) * right.grad.abs().max().item() + 1e-7
        torch.testing.assert_close(got.grad.double(), 3 * right.grad, atol=atol, rtol=1e-3)


def test_chunked_loss_is_float32_under_autocast_and_passes_on_what_is_not_finite(randomise):
    model, input_ids = randomise(DecoderLM(11, 6, 2, 8, n_layer=1)).eval(), torch.randint(11, (3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, loss = model.hidden_states(input_ids), ChunkedLanguageModelingLoss(model)(input_ids)
    right = train.compute_language_modeling_loss(input_ids, model.token_logits(hidden.float()))
    torch.testing.assert_close(loss, right, atol=1e-5, rtol=1e-5)
    model.token_embeddings.weight.data[7, 3] = float("nan")
    assert not ChunkedLanguageModelingLoss(model)(input_ids).isfinite()


def test_cached_decoder_is_right_for_any_sequence_of_calls(randomise):
    """It continues, starts over for other texts, a shorter one or another mask, and slides beyond the window."""
    model = randomise(DecoderLM(V, D, 3, 16, 2)).eval()
    decoder, texts = CachedDecoder(model), torch.randint(V, (3, 16))
    lengths = [(5, 3), (6, 4), (9, 7), (16, 14), (4, 2), (4, 3), (5, 5), (6,), (7,), (6, 6, 6)]
    rows = [[text[:n].tolist() for text, n in zip(texts, row, strict=False)] for row in lengths]
    calls = [left_pad(row, 0, "cpu") for row in rows]
    calls += [(texts[:, i:], torch.ones(3, 16 - i)) for i in (0, 1, 2)]
    with torch.inference_mode():
        for input_ids, mask in calls:
            right = model(input_ids, mask)[:, -1]
            torch.testing.assert_close(decoder(input_ids, mask), right, atol=1e-4, rtol=1e-5)  # logits of tens


# --- models that their user changed: fast means equal, or it is not used -----------------------------------


class Untied(DecoderLM):
    """With an output matrix of its own."""

    def __init__(self, *args, **keys):
        super().__init__(*args, **keys)
        self.output = nn.Linear(*self.token_embeddings.weight.shape[::-1])
        nn.init.normal_(self.output.weight, std=0.5)

    def token_logits(self, x):
        return self.output(x)


class PostNormBlock(model_file.DecoderBlock):
    def forward(self, x, attention_mask=None):
        x = self.ln_1(x + self.mha(x, attention_mask))
        return self.ln_2(x + self.ff(x))


class MeanOfThePast(model_file.DecoderBlock):
    """Adds the mean of all earlier inputs, which a cache of keys and values does not have."""

    def forward(self, x, attention_mask=None):
        n = torch.arange(1, x.shape[1] + 1)[:, None]
        return super().forward(x + 3 * x.cumsum(1) / n, attention_mask)


@pytest.mark.parametrize("changed", [Untied, PostNormBlock, MeanOfThePast])
def test_commands_print_the_changed_models_own_numbers(changed, tmp_path, monkeypatch, capsys, randomise, quick):
    if changed is Untied:
        for module in (model_file, train, generate, classify, checkpoint):
            monkeypatch.setattr(module, "DecoderLM", Untied)
    else:
        monkeypatch.setattr(model_file, "DecoderBlock", changed)
    tiny = TinyRun(tmp_path, model_config=NO_DROPOUT, num_training_steps=2)
    assert tiny.main() == 0
    model = train.DecoderLM(50257, **NO_DROPOUT)
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
    assert status(generate, tiny.out, "--prompt", *prompts, "--max_new_tokens", 14) == 0
    written = [json.loads(line)["generation"] for line in (tiny.out / "generation.jsonl").read_text().splitlines()]
    assert written == generate.generate(model, "cpu", get_tokenizer(), prompts, 2, 14)


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_soak_compiled_runs_equal_the_plain_one_and_need_a_compiler(tmp_path, quick):
    runs = [TinyRun(tmp_path / n, model_config=NO_DROPOUT, compile=n != "plain") for n in ("plain", "one", "two")]
    assert [run.main() for run in runs] == [0, 0, 0]
    assert runs[1].results() == runs[2].results()
    losses = [json.loads((run.out / "eval.json").read_text())["val-loss"] for run in runs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    nothing = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = python(ROOT / "train.py", runs[1].config, "--fresh", env={**os.environ, **nothing})
    assert done.returncode == 2 and "compile" in done.stderr and done.stderr.count("\n") == 1, done.stderr
