"""On a CUDA GPU, everything is as on the CPU: pytest tests/ -m gpu (skipped where there is no GPU)."""

import os
import signal
import socket

import pytest
import torch
import torch.distributed as dist
from tiny_run import TinyRun, at_batches, leave_out_what_is_slow

import train
from generate import generate
from model import DecoderLM
from support.chunked_loss import ChunkedLanguageModelingLoss, LanguageModelingLoss, loss_module
from support.distribution import DistributedLoss
from support.hardware import batches_on, choose_hardware, matrix_product_rate, peak_memory_mib

pytestmark = pytest.mark.gpu
V, P, GPU = 5003, 32, torch.device("cuda")
FINAL = {"n_embd": 256, "n_head": 8, "n_positions": 256, "n_layer": 8, "p_dropout": 0.0}  # configs/final-1e17.yaml


@pytest.fixture(autouse=True)
def gpu_is_chosen():
    """As the commands do it, but with exact float32 products."""
    chosen = choose_hardware("auto")
    assert chosen.device.type == "cuda", chosen.reason
    torch.set_float32_matmul_precision("highest")
    return chosen


def a_step(model, device, loss_class, dtype=torch.float32):
    """The losses and the last gradient, on the CPU, of two steps of train() on fixed batches."""
    model, losses = model.to(device), []
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
        loss_fn=loss_class(model),
        grad_clip=1.0,
        on_step=lambda result: losses.append(result.loss),
    )
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return losses, gradient.cpu()


@pytest.mark.parametrize("loss_class", [LanguageModelingLoss, ChunkedLanguageModelingLoss])
def test_a_step_equals_the_cpus(loss_class):
    results = []
    for device in (torch.device("cpu"), GPU):
        torch.manual_seed(0)
        results.append(a_step(DecoderLM(V, 24, 3, P, 2, p_dropout=0.0), device, loss_class))
    (right, right_gradient), (losses, gradient) = results
    assert losses == pytest.approx(right, abs=1e-4)
    torch.testing.assert_close(gradient, right_gradient, atol=1e-4, rtol=1e-3)


def test_a_bfloat16_step_is_close_to_the_cpus(gpu_is_chosen):
    if gpu_is_chosen.dtype != torch.bfloat16:
        pytest.skip(f"this GPU has no bfloat16 products: {gpu_is_chosen}")
    results = []
    for device, dtype in ((torch.device("cpu"), torch.float32), (GPU, torch.bfloat16)):
        torch.manual_seed(0)
        model = DecoderLM(V, 24, 3, P, 2, p_dropout=0.0)
        results.append(a_step(model, device, LanguageModelingLoss, dtype))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    (right, right_gradient), (losses, gradient) = results
    assert losses == pytest.approx(right, rel=0.01)
    assert torch.cosine_similarity(gradient, right_gradient, dim=0) > 0.99


def test_greedy_generation_equals_the_cpus(randomise, ascii_tokenizer):
    model = randomise(DecoderLM(129, 24, 3, P, 2)).eval()
    prefixes = ["a", "a longer one", "one of more than the thirty-two tokens that the model can read"]
    right = generate(model, "cpu", ascii_tokenizer, prefixes, 2, max_new_tokens=20)
    assert generate(model.to(GPU), GPU, ascii_tokenizer, prefixes, 2, max_new_tokens=20) == right


def test_interrupted_run_continues(tmp_path, monkeypatch):
    """The sums of a GPU have no fixed order, so its runs agree to rounding, not bit for bit."""
    leave_out_what_is_slow(monkeypatch)
    whole, broken = TinyRun(tmp_path / "whole", device="cuda"), TinyRun(tmp_path / "broken", device="cuda")
    assert whole.main() == 0
    with monkeypatch.context() as patched:
        at_batches(patched, {5: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        assert broken.main() == 128 + signal.SIGTERM
    assert broken.main() == 0
    losses = []
    for run in (whole, broken):
        rows = (run.out / "metrics.csv").read_text().splitlines()
        losses.append([float(row.split(",")[rows[0].split(",").index("loss")]) for row in rows[1:]])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=0.01)


def test_out_of_memory(tmp_path, capsys):
    tiny = TinyRun(tmp_path, device="cuda", batch_size=1_000_000)
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        assert tiny.main() == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--set batch_size=500000 grad_accumulation_steps=4" in error


def test_peak_memory_of_the_final_run_is_as_docs_scaling_states(gpu_is_chosen):
    if gpu_is_chosen.dtype != torch.bfloat16 or torch.cuda.mem_get_info(GPU)[0] < 15e9:
        pytest.skip(f"this run needs bfloat16 products and 15 GB of free memory: {gpu_is_chosen}")
    model = DecoderLM(50257, **FINAL).to(GPU)
    loss_fn, optimizer = loss_module(model, GPU, False), torch.optim.AdamW(model.parameters(), fused=True)
    torch.cuda.reset_peak_memory_stats(GPU)
    for _ in range(2):
        with gpu_is_chosen.autocast():
            loss = loss_fn(torch.zeros(64, 256, dtype=torch.long, device=GPU))
        loss.backward()
        optimizer.step()
    assert peak_memory_mib(GPU) * 2**20 < 14e9, "13 GB were counted without a GPU"


def test_products_reach_a_plausible_rate(gpu_is_chosen):
    """Timed without a wait for each product, two measurements agree, and larger products are not much faster."""
    rate = matrix_product_rate(gpu_is_chosen)
    assert matrix_product_rate(gpu_is_chosen) == pytest.approx(rate, rel=0.2)
    assert matrix_product_rate(gpu_is_chosen, 12288) < 1.3 * rate


@pytest.mark.skipif(not dist.is_nccl_available(), reason="this PyTorch is built without NCCL")
def test_distributed_loss_with_nccl_on_one_process(randomise):
    model, input_ids = randomise(DecoderLM(V, 24, 3, P, 2, p_dropout=0.0)).to(GPU), torch.randint(V, (3, P))
    parameters, input_ids = list(model.parameters()), input_ids.to(GPU)
    right = torch.autograd.grad(train.plain_loss(model, input_ids), parameters)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        loss_fn = DistributedLoss(LanguageModelingLoss(model), 1, (3, P), torch.autocast("cuda", enabled=False))
        loss = loss_fn(input_ids)
        loss.backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(loss, train.plain_loss(model, input_ids))
    for parameter, gradient in zip(parameters, right, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-3)
