"""The language modeling loss as a module, computed faster than its definition with the same value and gradients.

The (B, S, V) logits and their gradient take nearly all the memory and time of a small model. On a CPU,
`ChunkedLanguageModelingLoss` computes them a few rows at a time: GPT-tiny trains five times as fast. On a GPU,
`SlicedLanguageModelingLoss` leaves out the last position before the logits are made, which saves copies.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from support.device import random_state, set_random_state
from support.errors import UserError, first_line
from support.screen import show_note

MIN_ROWS, MAX_ROWS = 64, 512  # predictions per chunk
PIECE_SIZE = 2**22  # numbers of the embedding matrix multiplied at a time: more would leave a CPU's caches
SAFE_SUM = 2.0**60  # a sum of exponentials between 1 / SAFE_SUM and SAFE_SUM has not lost precision


class PlainLoss(nn.Module):
    """input_ids (B, S) -> definition(input_ids, model(input_ids)), as train() does without a loss_fn."""

    def __init__(self, model: nn.Module, definition: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.model, self.definition = model, definition

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.definition(input_ids, self.model(input_ids))


class SlicedLanguageModelingLoss(nn.Module):
    """input_ids (B, S) -> mean next-token cross entropy in nats, in float32 under autocast too."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = self.model.token_logits(self.model.hidden_states(input_ids)[:, :-1])  # (B, S - 1, V)
        return F.cross_entropy(logits.flatten(end_dim=1), input_ids[:, 1:].flatten())


class ChunkedLanguageModelingLoss(nn.Module):
    """The same in little memory, for a model with tied `token_embeddings`. It can be differentiated once."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.hidden_states = model.hidden_states

    def compile(self, **options) -> None:
        """Compile the hidden states, the part without branches on computed values, in place."""
        self.hidden_states = torch.compile(self.model.hidden_states, **options)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden_states(input_ids)[:, :-1].flatten(end_dim=1)  # (N, D)
        weight = self.model.token_embeddings.weight  # (V, D)
        labels = input_ids[:, 1:].flatten()  # (N,)
        with torch.autocast(hidden.device.type, enabled=False):
            return _ChunkedCrossEntropy.apply(hidden.to(weight.dtype), weight, labels, torch.is_grad_enabled())


def choose_loss(model: nn.Module, definition: Callable, device: torch.device) -> nn.Module:
    """The fast loss of this device or, if a change of model.py makes it differ, the plain one, with a note.

    The definition maps input_ids (B, S) and logits (B, S, V) to the loss. No generator changes its state.
    """
    fast = ChunkedLanguageModelingLoss if device.type == "cpu" else SlicedLanguageModelingLoss
    if _equals_plain(fast, model, definition, device):
        return fast(model)
    show_note("The fast loss does not match this model.py: training uses the plain loss, which is slower.")
    return PlainLoss(model, definition)


@torch.no_grad()
def _equals_plain(fast: type[nn.Module], model: nn.Module, definition: Callable, device: torch.device) -> bool:
    """Whether the losses of a few tokens are equal up to rounding, for a copy with noise in every parameter.

    Without the noise, an output bias of 0 or a soft cap on small logits would not show.
    """
    before, noise = random_state(device), torch.Generator().manual_seed(0)
    try:
        model = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=noise).to(parameter) / 2
        input_ids = torch.arange(8, device=device).view(4, 2)
        losses = []
        for make in (PlainLoss(model, definition), fast(model)):
            set_random_state(before, device)  # for the same dropout
            losses.append(make(input_ids).item())
    except NotImplementedError:  # of the student's edition
        raise
    except Exception:  # a model without hidden_states, for example
        return False
    finally:
        set_random_state(before, device)
    return math.isclose(*losses, rel_tol=1e-3)  # TF32 rounds to 1e-3


def compiled(loss_fn: nn.Module, device: torch.device) -> nn.Module:
    """The same loss, to be compiled when it is first called.

    Raises UserError if nothing can be compiled, for example on a CPU without a C++ compiler.
    """
    try:
        from torch._inductor import config

        config.shape_padding = False  # it would copy the logits
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # depends on what the device's compiler lacks
        needed = "a C++ compiler such as g++" if device.type == "cpu" else "gcc and Python's headers (python3-dev)"
        remedy = f"install {needed}, or set compile: false"
        raise UserError(f"compile: true, but torch.compile fails here ({first_line(error)}); {remedy}") from None
    loss_fn = copy.copy(loss_fn)  # of the same model
    loss_fn.compile()
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
