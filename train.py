"""Train the language model from a YAML file (question 2.1).

    python train.py configs/GPT-tiny.yaml                        train, evaluate, save
    python train.py configs/GPT-tiny.yaml --data my.txt          train on your own text
    python train.py configs/GPT-tiny.yaml --set max_lr=1e-3      override a key of the YAML
    python train.py configs/GPT-tiny.yaml --dry-run              show what training would cost, then exit
    python train.py configs/GPT-tiny.yaml --init model.pt        start from the weights of a checkpoint
    python train.py configs/GPT-tiny.yaml --evaluate model.pt    evaluate a checkpoint, then exit
    torchrun --nproc_per_node=4 train.py configs/GPT-tiny.yaml   train with four processes

Shapes: B sequences in a batch, S tokens in each, V vocabulary size, N = B (S - 1) predictions.
"""

import math
from collections import deque, namedtuple
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from model import DecoderLM

try:
    import wandb
except ImportError as error:
    raise SystemExit(f"error: {error}; install what is missing: pip install -r requirements.txt") from None

RUNNING_MEAN_STEPS = 20  # steps averaged in the train-loss
StepResult = namedtuple("StepResult", "step loss train_loss learning_rate")  # losses in nats per token


def random_batch_sampler(
    tokens: torch.Tensor | np.ndarray, device: torch.device | str, batch_size: int, seq_len: int
) -> Iterator[torch.Tensor]:
    """Yield (B, S) int64 batches of rows from random places in the corpus, without end.

    Every start position, the last one included, is equally likely (torch's global generator draws it). The
    corpus may be memory-mapped: only the rows drawn are read.
    """
    tokens = tokens.cpu().numpy() if isinstance(tokens, torch.Tensor) else tokens
    while True:
        starts = torch.randint(len(tokens) - seq_len + 1, (batch_size, 1)).numpy()
        yield torch.from_numpy(tokens[starts + np.arange(seq_len)].astype(np.int64)).to(device)


def sequential_batch_sampler(
    tokens: torch.Tensor | np.ndarray, device: torch.device | str, batch_size: int, seq_len: int, *, drop_last=True
) -> Iterator[torch.Tensor]:
    """Yield (B, S) int64 batches that pass through the corpus once, in order.

    An incomplete last batch is dropped or, with drop_last=False, yielded with fewer rows. Tokens after the
    last full row are never used.
    """
    tokens = tokens.cpu().numpy() if isinstance(tokens, torch.Tensor) else tokens
    n_rows = len(tokens) // seq_len
    if drop_last:
        n_rows -= n_rows % batch_size
    rows = tokens[: n_rows * seq_len].reshape(n_rows, seq_len)
    for start in range(0, n_rows, batch_size):
        yield torch.from_numpy(rows[start : start + batch_size].astype(np.int64)).to(device)


def cosine_lr_schedule(
    num_warmup_steps: int, num_training_steps: int, min_lr: float, max_lr: float
) -> Callable[[int], float]:
    """Linear warm-up to max_lr, then half a cosine to min_lr (Loshchilov and Hutter 2017, "SGDR"), then min_lr."""

    def lr_at(t: int) -> float:
        if t < num_warmup_steps:
            return max_lr * t / num_warmup_steps
        if t >= num_training_steps:
            return min_lr
        progress = (t - num_warmup_steps) / (num_training_steps - num_warmup_steps)  # in [0, 1)
        return min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2

    return lr_at


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def compute_language_modeling_loss(input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each next token: input_ids (B, S), logits (B, S, V) -> scalar, in nats.

    The logits at position s predict the token at s + 1, so there are B (S - 1) predictions.
    """
    predictions = logits[:, :-1].flatten(end_dim=1)  # (N, V)
    labels = input_ids[:, 1:].flatten()  # (N,)
    return F.cross_entropy(predictions, labels)


def train(
    model: nn.Module,
    batch_sampler: Iterable[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    lr_schedule: Callable[[int], float],
    autocast: AbstractContextManager = nullcontext(),  # noqa: B008 (stateless)
    num_training_steps: int = 0,
    grad_accumulation_steps: int = 1,
    *,
    loss_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    grad_clip: float | None = None,
    start_step: int = 0,
    previous_losses: Iterable[float] = (),
    on_step: Callable[[StepResult], None] | None = None,
) -> None:
    """Train the model in place for the steps start_step .. num_training_steps - 1.

    Each step sets lr_schedule(step), draws grad_accumulation_steps micro-batches (B, S) and updates the weights
    once with the gradient of their mean loss. An active W&B run logs the learning-rate and the train-loss, a mean
    over RUNNING_MEAN_STEPS steps. Raises FloatingPointError before a loss or gradient that is not finite is used.

    loss_fn      computes the loss of input_ids (B, S) by other means than model(input_ids), perhaps faster
    grad_clip    scales a gradient down to this norm if it is longer
    start_step   the first step; a resumed run passes the number of steps done, and in previous_losses their losses
    on_step      is called with the StepResult of each step, for example to show or save it
    """
    batches = iter(batch_sampler)
    recent_losses = deque(previous_losses, maxlen=RUNNING_MEAN_STEPS)
    model.train()
    for step in range(start_step, num_training_steps):
        learning_rate = lr_schedule(step)
        set_lr(optimizer, learning_rate)

        optimizer.zero_grad()
        losses = []
        for _ in range(grad_accumulation_steps):
            input_ids = next(batches)
            with autocast:
                if loss_fn is None:
                    loss = compute_language_modeling_loss(input_ids, model(input_ids))
                else:
                    loss = loss_fn(input_ids)
            # Divided, the micro-batches' gradients add up to the gradient of their mean loss.
            (loss / grad_accumulation_steps).backward()
            losses.append(loss.detach())

        grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if grad_clip is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, grad_norm)
        # tolist() waits for the device, once per step: both numbers are fetched together.
        step_loss, grad_norm = torch.stack([torch.stack(losses).mean(), grad_norm]).tolist()
        if not (math.isfinite(step_loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(f"loss {step_loss:.4g} and gradient norm {grad_norm:.4g} at step {step}")
        optimizer.step()

        recent_losses.append(step_loss)
        train_loss = sum(recent_losses) / len(recent_losses)
        if wandb.run is not None:
            wandb.log({"train-loss": train_loss, "learning-rate": learning_rate}, step=step)
        if on_step is not None:
            on_step(StepResult(step, step_loss, train_loss, learning_rate))


def evaluate(
    model: nn.Module,
    batch_sampler: Iterable[torch.Tensor],
    autocast: AbstractContextManager = nullcontext(),  # noqa: B008 (stateless)
    *,
    loss_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float]:
    """Return the mean loss over all predicted tokens (nats per token) and its perplexity, exp(loss).

    Batches may differ in size: each is weighted by its number of predictions. loss_fn is as in `train`.
    model.training is restored.
    """
    total_loss, n_predictions, was_training = 0.0, 0, model.training
    model.eval()
    with torch.inference_mode():
        for input_ids in tqdm(batch_sampler, "evaluating", leave=False, disable=None):
            B, S = input_ids.shape
            with autocast:
                if loss_fn is None:
                    loss = compute_language_modeling_loss(input_ids, model(input_ids))
                else:
                    loss = loss_fn(input_ids)
            total_loss += loss.item() * B * (S - 1)
            n_predictions += B * (S - 1)
    model.train(was_training)
    val_loss = total_loss / n_predictions
    return {"val-loss": val_loss, "val-perplexity": torch.tensor(val_loss, dtype=torch.float64).exp().item()}


def training_flops(
    model: DecoderLM, num_training_steps: int, grad_accumulation_steps: int, batch_size: int, seq_len: int
) -> int:
    """FLOPs of a whole training run: FLOPs per token times the tokens trained on."""
    return model.flops_per_token * num_training_steps * grad_accumulation_steps * batch_size * seq_len


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and save the model of a configuration; see the module's docstring."""
    from generate import generate
    from support.checkpoint import load_weights
    from support.chunked_loss import choose_loss, compiled
    from support.config import load_config, parse_arguments
    from support.data import load_corpus
    from support.device import batches_on, choose_device, join_processes
    from support.errors import accepted, exit_on_user_error
    from support.report import Report, show_evaluation, show_sample
    from support.run import Run
    from support.screen import heading
    from support.tokenizer import get_tokenizer

    args = parse_arguments(argv)
    with exit_on_user_error():
        c = load_config(args.config, args.set, data=args.data, init=args.init)
        world = join_processes()  # one, unless torchrun started several
        heading(f"evaluate {args.evaluate}" if args.evaluate else f"train {c.output_dir}")
        hardware = choose_device(c.device, training=True, local_rank=world.local_rank)
        device, autocast = hardware.device, hardware.autocast()
        tokenizer = get_tokenizer(c.tokenizer_encoding)
        corpus = world.first(lambda: load_corpus(c.data, tokenizer.n_vocab))
        corpus.require_rows(c.seq_len, ("val",) if args.evaluate else ("train", "val"))

        torch.manual_seed(c.seed)
        model = DecoderLM(tokenizer.n_vocab, **vars(c.model_config)).to(device)
        if args.evaluate or c.init:
            load_weights(model, args.evaluate or c.init, c.model_config)
        loss_fn = choose_loss(model, compute_language_modeling_loss, device)

        def validate(tokens) -> dict[str, float]:
            options = accepted(sequential_batch_sampler, drop_last=False)
            batches = sequential_batch_sampler(tokens, "cpu", c.batch_size, c.seq_len, **options)
            return evaluate(model, batches_on(device, batches), autocast, **accepted(evaluate, loss_fn=loss_fn))

        if args.evaluate:
            return show_evaluation(c, corpus, hardware, validate(corpus.val))

        options = {"betas": (0.9, 0.95), "weight_decay": c.weight_decay, "fused": device.type != "mps"}
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        lr_schedule = cosine_lr_schedule(c.num_warmup_steps, c.num_training_steps, c.min_lr, c.max_lr)
        batches = batches_on(device, random_batch_sampler(corpus.train, "cpu", c.batch_size, c.seq_len))
        report = Report(c, model, tokenizer.n_vocab, corpus, hardware, world)
        report.show_plan()
        if args.dry_run:
            return print("Dry run: nothing was trained.")
        train_loss_fn = world.distribute(compiled(loss_fn, device) if c.compile else loss_fn, c, autocast)
        with Run(report, model, optimizer, validate, args.fresh) as run:
            if run.finished:
                return report.show_results(run.folder)
            steps = c.num_training_steps, c.grad_accumulation_steps
            options = {"loss_fn": train_loss_fn, "grad_clip": c.grad_clip, "on_step": run.on_step}
            options |= {"start_step": len(run.rows), "previous_losses": [row[0] for row in run.rows]}
            train(model, batches, optimizer, lr_schedule, autocast, *steps, **accepted(train, **options))
            if world.rank == 0:
                run.save_results(validate(corpus.val))
                report.show_results(run.folder)
                show_sample(run.folder, lambda text: generate(model, device, tokenizer, [text], 1, 32, 0.7)[0])


if __name__ == "__main__":
    main()
