"""The device: which one is chosen, and that a CUDA GPU gives what the CPU does (pytest tests/ -m gpu)."""

import os
import signal

import pytest
import torch
from tiny_run import TinyRun, at_batches

import train
from classify import score
from generate import generate
from model import DecoderLM
from support.chunked_loss import SlicedLanguageModelingLoss, compiled
from support.config import load_config
from support.decoding import CachedDecoder
from support.device import batches_on, choose_device
from support.errors import UserError
from support.tokenizer import get_tokenizer

V, P = 5003, 32


# --- the choice, with substituted answers of PyTorch --------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """machine(n_gpus, capability, fails, mps) substitutes what PyTorch says of this machine."""

    def substitute(n_gpus=0, capability=(8, 6), fails=False, mps=False):
        def ones(*sizes, device=None):
            if fails and device is not None:
                raise RuntimeError("no kernel image\nis available")
            return torch.zeros(*sizes)

        answers = {"is_available": n_gpus > 0, "device_count": n_gpus, "get_device_capability": capability}
        for name, answer in (answers | {"get_device_name": "A card"}).items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "set_device", lambda number: range(n_gpus)[number])  # a number, no device
        monkeypatch.setattr(torch, "ones", ones)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return substitute


@pytest.mark.parametrize(
    ("there", "asked", "device", "dtype"),
    [
        ({"n_gpus": 2, "mps": True}, "auto", "cuda", torch.bfloat16),
        ({"n_gpus": 2}, "cuda:1", "cuda:1", torch.bfloat16),
        ({"n_gpus": 1, "capability": (7, 5)}, "cuda", "cuda", torch.float32),
        ({"n_gpus": 1, "fails": True}, "auto", "cpu", torch.float32),
        ({"mps": True}, "auto", "mps", torch.float32),
        ({}, "auto", "cpu", torch.float32),
        ({"n_gpus": 1}, "cpu", "cpu", torch.float32),
    ],
)
def test_device_that_is_chosen_and_its_precision(machine, there, asked, device, dtype):
    machine(**there)
    for training in (False, True):
        chosen = choose_device(asked, training)
        assert (chosen.device, chosen.dtype) == (torch.device(device), dtype if training else torch.float32)
        assert str(chosen).startswith(device) and "\n" not in str(chosen)


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "mps", "gpu", "cpu:0", "cuda:x", "meta"])
def test_device_that_is_not_here_is_refused(machine, asked):
    for there in ({}, {"n_gpus": 1, "fails": True}):
        machine(**there)
        with pytest.raises(UserError, match=f"device.*{asked}"):
            choose_device(asked)


def test_products_chosen_for_this_machine_are_float32s():
    state = torch.get_rng_state()
    choose_device("cpu")
    assert torch.equal(torch.get_rng_state(), state), "the choice must not move the generator"
    a, b = torch.randn(2, 300, 300)
    torch.testing.assert_close(a @ b, (a.double() @ b.double()).float(), rtol=0, atol=2e-4)  # bfloat16: 0.2


# --- with a GPU ---------------------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    """As the commands choose it, but with exact float32 products."""
    chosen = choose_device("auto", training=True)
    assert chosen.device.type == "cuda", chosen
    torch.set_float32_matmul_precision("highest")
    return chosen


def two_steps(device, choose_loss=None, dtype=torch.float32):
    """The losses and the last gradient of two steps of train() on fixed batches."""
    torch.manual_seed(0)
    model, losses = DecoderLM(V, 24, 3, P, 2, p_dropout=0.0).to(device), []
    tokens = torch.randint(V, (500,), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    train.train(
        model,
        batches_on(device, train.random_batch_sampler(tokens, "cpu", 4, P)),
        torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True),
        lambda step: 1e-3,
        torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
        num_training_steps=2,
        grad_accumulation_steps=2,
        loss_fn=choose_loss and choose_loss(model),
        grad_clip=1.0,
        on_step=lambda result: losses.append(result.loss),
    )
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return losses, torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).cpu()


def compiled_loss(model):
    return compiled(SlicedLanguageModelingLoss(model), model.ln.weight.device)


@pytest.mark.gpu
@pytest.mark.parametrize("choose_loss", [None, SlicedLanguageModelingLoss, compiled_loss])
def test_steps_equal_the_cpus(gpu, choose_loss):
    right, right_gradient = two_steps(torch.device("cpu"))
    losses, gradient = two_steps(gpu.device, choose_loss)
    assert losses == pytest.approx(right, abs=1e-4)
    torch.testing.assert_close(gradient, right_gradient, atol=1e-4, rtol=1e-3)
    if gpu.dtype == torch.bfloat16:
        losses, gradient = two_steps(gpu.device, choose_loss, gpu.dtype)
        assert losses == pytest.approx(right, rel=0.01)
        assert torch.cosine_similarity(gradient, right_gradient, dim=0) > 0.99


@pytest.mark.gpu
def test_texts_and_scores_equal_the_cpus(gpu, randomise):
    model, tokenizer = randomise(DecoderLM(50257, 24, 3, P, 2)).eval(), get_tokenizer()
    prefixes = ["a", "a longer one", "one of more than the thirty-two tokens that the model can read " * 3]
    texts = generate(model, "cpu", tokenizer, prefixes, 2, max_new_tokens=20)
    scores = score(model, "cpu", tokenizer, prefixes, 2)
    model = model.to(gpu.device)
    for decoder in (None, CachedDecoder(model)):
        found = generate(model, gpu.device, tokenizer, prefixes, 2, max_new_tokens=20, next_token_logits=decoder)
        assert found == texts
    torch.testing.assert_close(
        score(model, gpu.device, tokenizer, prefixes, 2).cpu(), scores, atol=1e-3, rtol=1e-3
    )


@pytest.mark.gpu
def test_memory_of_the_final_run(gpu):
    """A micro-batch in gigabytes, used and reserved: docs/scaling.md says what the card must have."""
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free GPU memory")
    c = load_config("configs/final-1e17.yaml")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = DecoderLM(50257, **vars(c.model_config)).to(gpu.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = torch.randint(50257, (c.batch_size, c.seq_len)).to(gpu.device)
    loss_fn, autocast = SlicedLanguageModelingLoss(model), gpu.autocast()
    train.train(model, [batch] * 3, optimizer, lambda step: 0.0, autocast, 3, loss_fn=loss_fn)
    used, reserved = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
    assert used < 12.5 and reserved < 18, f"{used:.1f} GB used, {reserved:.1f} GB reserved"


@pytest.mark.gpu
def test_interrupted_run_continues_to_rounding(tmp_path, monkeypatch, quick):
    """The sums of a GPU have no fixed order, so its runs do not agree bit for bit."""
    whole, broken = TinyRun(tmp_path / "whole", device="cuda"), TinyRun(tmp_path / "broken", device="cuda")
    with monkeypatch.context() as patched:
        at_batches(patched, {5: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        assert broken.main() == 143
    assert whole.main() == broken.main() == 0
    losses = [[float(row["loss"]) for row in run.rows()] for run in (whole, broken)]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.gpu
def test_out_of_memory_is_one_sentence(tmp_path, capsys):
    tiny = TinyRun(tmp_path, device="cuda", batch_size=1_000_000)
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        assert tiny.main() == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "batch_size" in error
