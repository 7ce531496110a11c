"""The plainest right train.py: what mutants.py breaks, and what fills the starter edition in its test."""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
import wandb


class StepResult(NamedTuple):
    step: int
    loss: float
    train_loss: float
    learning_rate: float


def random_batch_sampler(tokens, device, batch_size: int, seq_len: int):
    n_starts = len(tokens) - seq_len + 1
    while True:
        starts = torch.randint(0, n_starts, (batch_size,)).tolist()
        rows = [torch.as_tensor(tokens[start : start + seq_len]).long() for start in starts]
        yield torch.stack(rows).to(device)


def sequential_batch_sampler(tokens, device, batch_size: int, seq_len: int, *, drop_last: bool = True):
    rows = []
    for start in range(0, len(tokens) - seq_len + 1, seq_len):
        rows.append(torch.as_tensor(tokens[start : start + seq_len]).long())
        if len(rows) == batch_size:
            yield torch.stack(rows).to(device)
            rows = []
    if rows and not drop_last:
        yield torch.stack(rows).to(device)


def cosine_lr_schedule(num_warmup_steps: int, num_training_steps: int, min_lr: float, max_lr: float):
    def lr_at(t: int) -> float:
        if t < num_warmup_steps:
            return max_lr * t / num_warmup_steps
        if t >= num_training_steps:
            return min_lr
        angle = math.pi * (t - num_warmup_steps) / (num_training_steps - num_warmup_steps)
        return min_lr + 0.5 * (max_lr - min_lr) * (1 + math.cos(angle))

    return lr_at


def set_lr(optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr


def compute_language_modeling_loss(input_ids: torch.Tensor, logits: torch.Tensor):
    labels = input_ids[:, 1:].reshape(-1)
    predictions = logits[:, :-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(predictions, labels)


def train(
    model,
    batch_sampler,
    optimizer,
    lr_schedule,
    autocast=nullcontext(),  # noqa: B008
    num_training_steps: int = 0,
    grad_accumulation_steps: int = 1,
    *,
    start_step: int = 0,
    on_step=None,
):
    model.train()
    step_losses = []
    for step in range(start_step, num_training_steps):
        lr = lr_schedule(step)
        set_lr(optimizer, lr)
        optimizer.zero_grad()
        total = 0.0
        for _ in range(grad_accumulation_steps):
            input_ids = next(batch_sampler)
            with autocast:
                logits = model(input_ids)
                loss = compute_language_modeling_loss(input_ids, logits)
            (loss / grad_accumulation_steps).backward()
            total += loss.item()
        optimizer.step()
        step_losses.append(total / grad_accumulation_steps)
        recent = step_losses[-20:]
        train_loss = sum(recent) / len(recent)
        if wandb.run is not None:
            wandb.log({"train-loss": train_loss, "learning-rate": lr}, step=step)
        if on_step is not None:
            on_step(StepResult(step, step_losses[-1], train_loss, lr))


def evaluate(model, batch_sampler, autocast=nullcontext()):  # noqa: B008
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for input_ids in batch_sampler:
            with autocast:
                loss = compute_language_modeling_loss(input_ids, model(input_ids))
            n = input_ids[:, 1:].numel()
            total += n * loss.item()
            count += n
    model.train(was_training)
    return {"val-loss": total / count, "val-perplexity": math.exp(total / count)}


def training_flops(model, num_training_steps, grad_accumulation_steps, batch_size, seq_len) -> int:
    n_tokens = num_training_steps * grad_accumulation_steps * batch_size * seq_len
    return model.flops_per_token * n_tokens
