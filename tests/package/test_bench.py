"""The bench of a GPU, as far as a CPU can run it."""

import bench_gpu
import pytest
import torch

from support.hardware import choose_hardware


@pytest.mark.soak
def test_bench_of_a_gpu_runs_on_the_cpu(monkeypatch):
    """Small enough to see that every contender trains and generates; the numbers mean nothing here."""
    monkeypatch.setattr(bench_gpu, "STEPS", 1)
    monkeypatch.setattr(bench_gpu, "NEW_TOKENS", 2)
    shape = {"n_embd": 8, "n_head": 2, "n_positions": 80, "n_layer": 1}
    monkeypatch.setattr(bench_gpu, "SHAPES", {"small": (shape, 1)})
    monkeypatch.setattr(bench_gpu, "DECODER", shape)
    cpu = choose_hardware("cpu")
    rows = bench_gpu.bench_steps("small", cpu, 1e9, 1, compiled=False)
    assert [row["step"] for row in rows][:2] == ["small, plain", "small, chunked"]
    assert all(value > 0 for row in rows for value in list(row.values())[1:])
    assert bench_gpu.bench_generation(2, cpu, 1)["ms per token"] > 0


def test_traffic_of_a_product_and_of_views():
    a, b, c = torch.randn(3, 5), torch.randn(5, 7), torch.randn(7)
    with bench_gpu.Traffic(1e3, 1e9) as traffic:
        product = a @ b
    assert (traffic.kernels, traffic.bytes, traffic.flops) == (1, 4 * (15 + 35 + 21), 2 * 3 * 5 * 7)
    assert traffic.seconds == traffic.bytes / 1e3, "its bytes take longer than its FLOPs"
    with bench_gpu.Traffic(1e3, 1e9) as traffic:
        torch.empty_like(product)
        product.T[:5].unsqueeze(0)
        product += c.expand(3, 7)
    assert (traffic.kernels, traffic.bytes) == (1, 4 * (21 + 7 + 21)), "views move nothing; += reads and writes"
