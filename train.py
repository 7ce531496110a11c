"""Train the language model from a YAML file (question 2.1).

    python train.py configs/GPT-tiny.yaml                        train, evaluate, save
    python train.py configs/GPT-tiny.yaml --data my.txt          on a text of your own
    python train.py configs/GPT-tiny.yaml --set max_lr=1e-3      with another value for a key
    python train.py configs/GPT-tiny.yaml --dry-run              only say what it would take
    python train.py configs/GPT-tiny.yaml --evaluate model.pt    only evaluate a checkpoint
    torchrun --nproc_per_node=4 train.py configs/GPT-tiny.yaml   four processes

Shapes: B sequences in a batch, S tokens in each, D hidden size, V vocabulary size, N = B (S - 1)
predictions.
"""

import argparse
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import wandb
from torch import nn

from model import DecoderLM

RUNNING_MEAN_STEPS = 20  # steps averaged in the reported train-loss


def random_batch_sampler(
    tokens: torch.Tensor | np.ndarray, device: torch.device | str, batch_size: int, seq_len: int
) -> Iterator[torch.Tensor]:
    """Yield (B, S) int64 batches of rows from anywhere in the corpus, for ever.

    Every start position, the last one included, is equally likely; draws come from torch's global
    generator. The corpus may be memory-mapped and of any integer type: only the rows drawn are read
    and widened. Raises ValueError when it is shorter than one row.
    """
    tokens = tokens.cpu().numpy() if isinstance(tokens, torch.Tensor) else tokens
    n_starts = len(tokens) - seq_len + 1
    if n_starts < 1:
        raise ValueError(f"a corpus of {len(tokens)} tokens has no row of seq_len = {seq_len}")
    offsets = np.arange(seq_len)
    while True:
        starts = torch.randint(n_starts, (batch_size, 1)).numpy()
        yield torch.from_numpy(tokens[starts + offsets].astype(np.int64)).to(device)


def sequential_batch_sampler(
    tokens: torch.Tensor | np.ndarray, device: torch.device | str, batch_size: int, seq_len: int, *, drop_last=True
) -> Iterator[torch.Tensor]:
    """Yield (B, S) int64 batches that pass once through the corpus, in its order.

    An incomplete last batch is dropped, or, with drop_last=False, yielded with fewer rows. Tokens after
    the last full row are never used.
    """
    tokens = tokens.cpu().numpy() if isinstance(tokens, torch.Tensor) else tokens
    n_rows = len(tokens) // seq_len
    if drop_last:
        n_rows -= n_rows % batch_size
    for row in range(0, n_rows, batch_size):
        rows = min(batch_size, n_rows - row)
        batch = tokens[row * seq_len : (row + rows) * seq_len].reshape(rows, seq_len)
        yield torch.from_numpy(batch.astype(np.int64)).to(device)


def cosine_lr_schedule(
    num_warmup_steps: int, num_training_steps: int, min_lr: float, max_lr: float
) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine down to min_lr (Loshchilov and Hutter 2017, "SGDR", eq. 5).

    With a = num_warmup_steps and b = num_training_steps, the learning rate of step t is

        max_lr t / a                                                      for t in [0, a)
        min_lr + (max_lr - min_lr) (1 + cos(pi (t - a) / (b - a))) / 2    for t in [a, b)
        min_lr                                                            for t >= b
    """

    def lr_at(t: int) -> float:
        if t < num_warmup_steps:
            return max_lr * t / num_warmup_steps
        if t >= num_training_steps:
            return min_lr
        progress = (t - num_warmup_steps) / (num_training_steps - num_warmup_steps)  # in [0, 1)
        return min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2

    return lr_at


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def compute_language_modeling_loss(input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each next token: input_ids (B, S), logits (B, S, V) -> scalar, in nats.

    The logits at position s predict the token at s + 1, so the last position has no label and the first
    token is predicted by none: B (S - 1) predictions. This is the definition; `LanguageModelingLoss`
    computes the same without ever holding all logits.
    """
    predictions = logits[:, :-1].flatten(end_dim=1)  # (N, V)
    labels = input_ids[:, 1:].flatten()  # (N,)
    return F.cross_entropy(predictions, labels)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of hidden (N, D) @ weight.T (V, D) against labels (N,), a few rows at a time.

    The gradients are computed in the forward pass, while a chunk's logits are still in cache, so each logit
    is written once and never kept. With p = softmax(logits), the gradient of a row's loss in its logits is
    p - onehot(label). What makes it fast changes nothing but the rounding: exp2 is the faster exponential,
    so log2(e) is multiplied into the (N, D) hidden states; the vocabulary comes first in memory, which suits
    a CPU's matrix products; rows of p are scaled by way of their (N, D) factors; and the maximum is taken off
    only once a sum of exponentials has come near the end of float32's range.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, rows):
        ctx.save_for_backward(hidden, weight, labels)
        ctx.rows = rows
        loss, *ctx.gradients = _loss_and_gradients(hidden, weight, labels, rows, any(ctx.needs_input_grad))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # The gradients are returned, not copied, which takes long; a second backward pass computes them anew.
        hidden_grad, weight_grad = ctx.gradients or _loss_and_gradients(*ctx.saved_tensors, ctx.rows, True)[1:]
        ctx.gradients = None
        return hidden_grad.mul_(grad), weight_grad.mul_(grad), None, None


def _loss_and_gradients(hidden, weight, labels, rows, need_grad):
    """The mean loss, and its gradients with respect to hidden and weight if these are needed."""
    n, n_vocab = len(hidden), len(weight)
    words = 2**22 // hidden.shape[1]  # 16 MiB of the weight at a time: larger products leave the caches
    hidden_grad = torch.empty_like(hidden) if need_grad else None
    weight_grad = torch.empty_like(weight) if need_grad else None
    buffer = hidden.new_empty(n_vocab * min(rows, n))
    nats = torch.zeros((), dtype=torch.float64)
    log2_e = math.log2(math.e)
    take_maximum = False
    for h, label, start in zip(hidden.split(rows), labels.split(rows), range(0, n, rows), strict=True):
        logits = buffer[: n_vocab * len(h)].view(n_vocab, len(h))  # (V, R), in base 2
        h_T = (h.T * log2_e).contiguous()
        while True:
            for piece, out in zip(weight.split(words), logits.split(words), strict=True):
                torch.mm(piece, h_T, out=out)
            if take_maximum:
                logits.sub_(logits.amax(dim=0, keepdim=True))
            of_label = logits.gather(0, label[None])  # (1, R)
            p = logits.exp2_()  # in place, not yet divided by the sum
            total = p.sum(dim=0, keepdim=True)
            if take_maximum or (total.min() > 2**-60 and total.max() < 2**60):
                break
            take_maximum = True  # for this chunk and the rest
        nats += (total.log2() - of_label).sum(dtype=torch.float64) / log2_e
        if need_grad:
            p.scatter_add_(0, label[None], -total)
            scale = 1 / (total.T * n)  # (R, 1): divides by the sum, and takes the mean
            hidden_grad[start : start + rows] = (p.T @ weight) * scale
            h = h * scale
            for out, piece in zip(weight_grad.split(words), p.split(words), strict=True):
                out.addmm_(piece, h, beta=float(start > 0))  # the first chunk replaces what was there
    return (nats / n).to(hidden.dtype), hidden_grad, weight_grad


class LanguageModelingLoss(nn.Module):
    """input_ids (B, S) -> `compute_language_modeling_loss(input_ids, model(input_ids))`, in little memory.

    At V = 50257 the (B, S, V) logits and their gradient are nearly the whole memory and time of a small
    model. Here only `rows` rows of them exist at any moment. The loss is computed in the precision of
    the weights (float32), outside autocast.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if not hasattr(self.model, "hidden_states"):
            logits = self.model(input_ids)
            precision = torch.promote_types(logits.dtype, torch.float32)
            return compute_language_modeling_loss(input_ids, logits.to(precision))
        hidden = self.model.hidden_states(input_ids)[:, :-1].flatten(end_dim=1)  # (N, D)
        weight = self.model.token_embeddings.weight  # (V, D), tied
        labels = input_ids[:, 1:].flatten()
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(weight.dtype)
            if hidden.device.type != "cpu":  # pragma: no cover (GPU only)
                # The library's chunks keep a GPU busy without waiting for it.
                options = nn.LinearCrossEntropyOptions(batch_chunk_size=2048)
                return F.linear_cross_entropy(hidden, weight, labels, options=options)
            # Narrow products are bound by memory: keep their chunk in cache. Wide ones want many rows.
            rows = min(max(64, hidden.shape[1]), 512)
            return _ChunkedCrossEntropy.apply(hidden, weight, labels, rows)


def _loss_module(model: nn.Module) -> nn.Module:
    """The model's loss as a module. What is or wraps one already stays as it is."""
    is_loss = any(isinstance(module, LanguageModelingLoss) for module in model.modules())
    return model if is_loss else LanguageModelingLoss(model)


class StepResult(NamedTuple):
    """What happened in one training step, as `train` tells it to `on_step`."""

    step: int
    loss: float  # mean of this step's micro-batch losses, of all processes, nats per token
    train_loss: float  # mean over the last RUNNING_MEAN_STEPS steps
    learning_rate: float


def train(
    model: nn.Module,
    batch_sampler: Iterator[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    lr_schedule: Callable[[int], float],
    autocast: AbstractContextManager = nullcontext(),  # noqa: B008 (stateless)
    num_training_steps: int = 0,
    grad_accumulation_steps: int = 1,
    *,
    start_step: int = 0,
    on_step: Callable[[StepResult], None] | None = None,
) -> None:
    """Train the model in place for the steps start_step .. num_training_steps - 1. `model` may
    also be its LanguageModelingLoss, distributed or compiled.

    Each step sets lr_schedule(step), draws grad_accumulation_steps micro-batches and updates the weights
    once with the gradient of their mean loss. The train-loss and learning rate go to the active W&B run,
    if there is one. `on_step` is called after each step; if it has an attribute `recent_losses` (a
    deque), the running mean lives there and so can be continued by a later call.

    Raises FloatingPointError before the weights change when a loss is not finite.
    """
    loss_of = _loss_module(model)
    loss_of.train()
    no_sync = getattr(loss_of, "no_sync", nullcontext)  # distributed: leaves the gradients unaveraged
    sum_over_ranks = getattr(model, "sum_over_ranks", lambda *values: values)
    batches = iter(batch_sampler)
    recent_losses = getattr(on_step, "recent_losses", deque(maxlen=RUNNING_MEAN_STEPS))
    log_to_wandb = wandb.run is not None

    for step in range(start_step, num_training_steps):
        learning_rate = lr_schedule(step)
        set_lr(optimizer, learning_rate)

        optimizer.zero_grad()
        losses = []
        for i in range(grad_accumulation_steps):
            input_ids = next(batches)
            with nullcontext() if i == grad_accumulation_steps - 1 else no_sync():
                with autocast:
                    loss = loss_of(input_ids)
                # Divided, the micro-batches' gradients sum to the gradient of their mean loss.
                (loss / grad_accumulation_steps).backward()
            losses.append(loss.detach())

        sum_of_losses, n_ranks = sum_over_ranks(torch.stack(losses).mean().item(), 1)
        step_loss = sum_of_losses / n_ranks
        if not math.isfinite(step_loss):
            raise FloatingPointError(f"the loss is {step_loss} at step {step} (learning rate {learning_rate:.3g})")
        optimizer.step()  # support/run.py hooks in here to clip gradients, and to refuse those not finite

        recent_losses.append(step_loss)
        result = StepResult(step, step_loss, sum(recent_losses) / len(recent_losses), learning_rate)
        if log_to_wandb:
            try:
                wandb.log({"train-loss": result.train_loss, "learning-rate": learning_rate}, step=step)
            except Exception as error:  # whatever fails there, hours of training are worth more
                log_to_wandb = False
                warnings.warn(f"W&B stopped logging at step {step} ({error})", stacklevel=2)
        if on_step is not None:
            on_step(result)


def evaluate(
    model: nn.Module,
    batch_sampler: Iterator[torch.Tensor],
    autocast: AbstractContextManager = nullcontext(),  # noqa: B008 (stateless)
) -> dict[str, float]:
    """Mean loss over all predicted tokens (nats per token), and the perplexity exp(loss).

    Batches may differ in size: each counts by its predictions. The model's mode is restored.
    Raises ValueError when there is no batch.
    """
    was_training = model.training
    loss_of = _loss_module(model).eval()
    total_loss, n_predictions = 0.0, 0
    try:
        with torch.inference_mode():
            for input_ids in batch_sampler:
                B, S = input_ids.shape
                with autocast:
                    loss = loss_of(input_ids)
                total_loss += loss.item() * B * (S - 1)
                n_predictions += B * (S - 1)
    finally:
        model.train(was_training)
    sum_over_ranks = getattr(model, "sum_over_ranks", lambda *values: values)
    total_loss, n_predictions = sum_over_ranks(total_loss, n_predictions)
    if n_predictions == 0:
        raise ValueError("no batch to evaluate: the corpus has no full row of seq_len tokens")
    val_loss = total_loss / n_predictions
    return {"val-loss": val_loss, "val-perplexity": float(np.exp(val_loss))}


def training_flops(
    model: DecoderLM, num_training_steps: int, grad_accumulation_steps: int, batch_size: int, seq_len: int
) -> int:
    """FLOPs of a whole training run: those per token times the tokens trained on."""
    n_tokens = num_training_steps * grad_accumulation_steps * batch_size * seq_len
    return model.flops_per_token * n_tokens


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and save the model of a configuration; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train the language model from a YAML file.")
    parser.add_argument("config", help="YAML file, such as configs/GPT-tiny.yaml")
    parser.add_argument("--data", help="tokens, a text or jsonl, 'c4' or 'sample' (overrides the key data)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of the YAML")
    parser.add_argument("--fresh", action="store_true", help="start over instead of continuing")
    parser.add_argument("--dry-run", action="store_true", help="say what it would take, train nothing")
    parser.add_argument("--evaluate", metavar="CHECKPOINT", help="evaluate these weights, train nothing")
    args = parser.parse_args(argv)

    from generate import generate
    from support.checkpoint import load_weights
    from support.config import load_config
    from support.corpus import load_corpus
    from support.distribution import join_world
    from support.errors import exit_on_user_error
    from support.hardware import choose_hardware, compile_forward
    from support.run import Run
    from support.screen import show_evaluation
    from support.signals import check_memory
    from support.tokenizer import get_tokenizer

    with exit_on_user_error(), join_world() as world:
        config = load_config(args.config, args.set, args.data)
        hardware = choose_hardware(world.device(config.device))
        device, autocast = hardware.device, hardware.autocast()
        tokenizer = get_tokenizer(config.tokenizer_encoding)
        with world.rank_0_first():
            corpus = load_corpus(config.data, tokenizer.n_vocab)
        corpus.check_length(config.seq_len)

        if not args.evaluate:
            check_memory(config.model_config, tokenizer.n_vocab, device)
        torch.manual_seed(config.seed)
        model = DecoderLM(tokenizer.n_vocab, **vars(config.model_config)).to(device)
        loss = LanguageModelingLoss(model)
        if config.compile:
            compile_forward(loss, device)
        loss = world.distribute(loss, config.seed)

        def validation_loss() -> tuple[dict[str, float], int]:
            rows = len(corpus.val) // config.seq_len
            tokens = world.share(corpus.val, config.seq_len)
            batches = sequential_batch_sampler(tokens, device, config.batch_size, config.seq_len, drop_last=False)
            return evaluate(loss, batches, autocast), rows * (config.seq_len - 1)

        if args.evaluate:
            load_weights(model, args.evaluate, config.model_config)
            show_evaluation(args.evaluate, corpus.name, *validation_loss(), config.seq_len)
            return

        options = {"betas": (0.9, 0.95), "weight_decay": config.weight_decay, "fused": hardware.fused}
        optimizer = torch.optim.AdamW(model.parameters(), config.max_lr, **options)
        rates = (config.min_lr, config.max_lr)
        lr_schedule = cosine_lr_schedule(config.num_warmup_steps, config.num_training_steps, *rates)
        batches = random_batch_sampler(corpus.train, device, config.batch_size, config.seq_len)
        n_steps, n_micro = config.num_training_steps, config.grad_accumulation_steps
        flops = training_flops(model, n_steps, n_micro, config.batch_size * world.size, config.seq_len)
        run = Run(config, hardware, corpus, model, optimizer, flops, world)
        run.show_header(f"train {args.config}")
        if args.dry_run:
            with run.stopwatch() as on_step:
                train(loss, batches, optimizer, lr_schedule, autocast, 6, n_micro, on_step=on_step)
            return

        with run.open(args.fresh):
            steps = {"start_step": run.start_step, "on_step": run}
            train(loss, batches, optimizer, lr_schedule, autocast, n_steps, n_micro, **steps)
            text = generate(model, device, tokenizer, ["The city"], 1, temperature=0.7)[0]
            run.finish(*validation_loss(), sample=("The city", text))


if __name__ == "__main__":
    main()
