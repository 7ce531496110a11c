"""Every fast path gives what the plain one gives."""

import pytest
import torch
import torch.nn.functional as F

import train
from generate import left_pad
from model import DecoderLM

V, D = 1031, 24  # primes and no multiple of any chunk


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
    """Below |h| |w| log2(e) = 64 no maximum is taken off, above it is: std 0.1 and 60 are on either side."""
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


def test_chunked_loss_backward_twice():
    hidden = torch.randn(40, D, requires_grad=True)
    weight, labels = torch.randn(V, D, requires_grad=True), torch.randint(V, (40,))
    loss = train._ChunkedCrossEntropy.apply(hidden, weight, labels, 32)
    once = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    twice = torch.autograd.grad(loss, [hidden, weight])
    for first, second in zip(once, twice, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_chunked_loss_passes_on_what_is_not_finite(where):
    tensors = {"hidden": torch.randn(40, D), "weight": torch.randn(V, D)}
    tensors[where][7, 3] = float("nan")
    loss = train._ChunkedCrossEntropy.apply(*tensors.values(), torch.randint(V, (40,)), 32)
    assert not torch.isfinite(loss)


def test_loss_never_holds_all_logits():
    """At V = 50257, 4 x 128 rows of logits are 103 MB; the largest tensor made must be a chunk of 32 rows."""
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
    assert 50257 * 8 <= largest <= 50257 * 32


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
