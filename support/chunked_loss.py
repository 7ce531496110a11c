"""The language modeling loss as a module, plain or computed without ever holding all logits.

With V = 50257, the (B, S, V) logits and their gradient take nearly all the memory and time of a small model.
`ChunkedLanguageModelingLoss` computes the same loss and gradients a few rows at a time, which on a CPU makes
a training step 2 to 6 times as fast. On other devices the plain loss is used: there it is the proven path.
"""

import math

import torch
from torch import nn

from support.hardware import compile_forward
from train import plain_loss

MIN_ROWS, MAX_ROWS = 64, 512  # predictions per chunk
PIECE_SIZE = 2**22  # numbers of the embedding matrix multiplied at a time: more would leave a CPU's caches
SAFE_SUM = 2.0**60  # a sum of exponentials between 1 / SAFE_SUM and SAFE_SUM has not lost precision


class LanguageModelingLoss(nn.Module):
    """input_ids (B, S) -> `compute_language_modeling_loss(input_ids, model(input_ids))`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids (B, S) -> mean next-token cross entropy in nats, a scalar."""
        return plain_loss(self.model, input_ids)


class ChunkedLanguageModelingLoss(LanguageModelingLoss):
    """The same value and gradients in little memory, computed in float32 under autocast too.

    `model` is a DecoderLM: `hidden_states` and the tied `token_embeddings` are used. The loss can be
    differentiated once; a second backward pass raises RuntimeError.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.hidden_states = model.hidden_states

    def compile(self, **options) -> None:
        """Compile the hidden states, the part without branches on computed values, in place."""
        self.hidden_states = torch.compile(self.model.hidden_states, **options)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids (B, S) -> mean next-token cross entropy in nats, a scalar."""
        hidden = self.hidden_states(input_ids)[:, :-1].flatten(end_dim=1)  # (N, D)
        weight = self.model.token_embeddings.weight  # (V, D)
        labels = input_ids[:, 1:].flatten()  # (N,)
        with torch.autocast(hidden.device.type, enabled=False):
            return _ChunkedCrossEntropy.apply(hidden.to(weight.dtype), weight, labels, torch.is_grad_enabled())


def loss_module(model: nn.Module, device: torch.device, compiled: bool) -> LanguageModelingLoss:
    """The model's loss for this device, compiled if asked for."""
    loss_fn = ChunkedLanguageModelingLoss(model) if device.type == "cpu" else LanguageModelingLoss(model)
    if compiled:
        compile_forward(loss_fn, device)
    return loss_fn


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of hidden (N, D) @ weight.T (D, V) against labels (N,).

    The gradients are computed in the forward pass, while a chunk's logits are still in cache: with
    p = softmax(logits), the gradient of a row's loss with respect to its logits is p - onehot(label).
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, needs_gradients):
        loss, *gradients = _loss_and_gradients(hidden, weight, labels, needs_gradients)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad.mul_(grad), weight_grad.mul_(grad), None, None


def _loss_and_gradients(hidden, weight, labels, needs_gradients):
    """Return the mean loss, and if needed its gradients with respect to hidden (N, D) and weight (V, D).

    Two choices make this fast without changing more than the rounding: exponentials are taken in base 2, and
    the vocabulary comes first in memory, which suits a CPU's matrix products.
    """
    (n, D), V = hidden.shape, len(weight)
    rows = min(max(MIN_ROWS, D), MAX_ROWS)  # narrow products are memory-bound: keep their chunk in cache
    piece = PIECE_SIZE // D  # rows of the weight multiplied at a time
    hidden_grad = torch.empty_like(hidden) if needs_gradients else None
    weight_grad = torch.zeros_like(weight) if needs_gradients else None
    buffer = hidden.new_empty(V * min(rows, n))
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    subtract_max = False
    for start in range(0, n, rows):
        h, label = hidden[start : start + rows], labels[None, start : start + rows]  # (R, D), (1, R)
        logits = buffer[: V * len(h)].view(V, len(h))  # (V, R)
        of_label, p, total = _exponentials(weight, h, label, logits, piece, subtract_max)
        if not (subtract_max or (total.min() > 1 / SAFE_SUM and total.max() < SAFE_SUM)):
            subtract_max = True  # from here on
            of_label, p, total = _exponentials(weight, h, label, logits, piece, subtract_max)
        loss += (total.log2() - of_label).sum(dtype=torch.float64) * math.log(2)
        if needs_gradients:
            p.scatter_add_(0, label, -total)  # total (p - onehot)
            scale = 1 / (total.T * n)  # (R, 1): divides by the sum, and takes the mean
            hidden_grad[start : start + rows] = (p.T @ weight) * scale
            h = h * scale
            for out, part in zip(weight_grad.split(piece), p.split(piece), strict=True):
                out.addmm_(part, h)
    return (loss / n).to(hidden.dtype), hidden_grad, weight_grad


def _exponentials(weight, h, label, logits, piece, subtract_max):
    """Fill `logits` (V, R), then exponentiate it in place, in base 2.

    Returns the label's logit (1, R) in base 2, the exponentials (V, R), and their sum (1, R).
    """
    h_T = (h.T * math.log2(math.e)).contiguous()  # exp2 of the scaled logit is e to the logit
    for part, out in zip(weight.split(piece), logits.split(piece), strict=True):
        torch.mm(part, h_T, out=out)
    if subtract_max:
        logits -= logits.amax(dim=0, keepdim=True)
    of_label = logits.gather(0, label)
    exponentials = logits.exp2_()
    return of_label, exponentials, exponentials.sum(dim=0, keepdim=True)
