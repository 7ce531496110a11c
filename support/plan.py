"""The plan of a training run: its size and cost, what is printed before it, and the progress bar during it."""

import math
import sys
from functools import cached_property

import torch
from tqdm import tqdm

from support.data import unigram_entropy
from support.hardware import matrix_product_rate
from support.screen import count, duration, show_facts, show_note
from support.setup import Setup
from train import StepResult, training_flops


class TrainingPlan:
    """The numbers of a training run that are known before it starts.

    `flops` is the FLOPs of the whole run, `flops_per_step` of one step of all processes. `ln_vocab` is the loss of
    a uniform guess, in nats.
    """

    def __init__(self, setup: Setup, model: torch.nn.Module):
        c = setup.config
        self.setup, self.n_vocab = setup, model.n_vocab
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        batch_size = c.batch_size * setup.world.size
        self.flops_per_step = training_flops(model, 1, c.grad_accumulation_steps, batch_size, c.seq_len)
        self.flops = c.num_training_steps * self.flops_per_step
        self.ln_vocab = math.log(model.n_vocab)

    @cached_property
    def unigram_entropy(self) -> float:
        """The loss of a guess that knows only token frequencies, in nats."""
        return unigram_entropy(self.setup.corpus.train, self.n_vocab)

    @cached_property
    def peak_flops_per_second(self) -> float:
        """What all devices of the run could do at best: their matrix-product rate."""
        return matrix_product_rate(self.setup.hardware) * self.setup.world.size

    def speed(self, seconds_per_step: float) -> str:
        """Tokens and FLOPs per second, and the share of what the devices could do."""
        tokens_per_second = self.setup.tokens_per_step / seconds_per_step
        flops_per_second = self.flops_per_step / seconds_per_step
        n = self.setup.world.size
        device = f"{n} devices'" if n > 1 else "this device's"
        share = flops_per_second / self.peak_flops_per_second
        return (
            f"{tokens_per_second:,.0f} tokens/s, {flops_per_second / 1e12:.3f} TFLOPS: "
            f"{share:.0%} of {device} speed in matrix products"
        )


def show_plan(plan: TrainingPlan) -> None:
    """Print what will be trained, on what, and what it costs."""
    setup, corpus, c = plan.setup, plan.setup.corpus, plan.setup.config
    if corpus.note:
        show_note(corpus.note)
    n_tokens = setup.tokens_per_step * c.num_training_steps
    # The course's budgets mean something only to a run that is about as large.
    budgets = [
        f", {plan.flops / b:.1%} of the course's {b:.0e}".replace("e+", "e")
        for b in (1e15, 1e17)
        if b / 2 < plan.flops < 2 * b
    ]
    processes = f", {setup.world.size} processes" if setup.world.size > 1 else ""
    show_facts(
        {
            "device": f"{setup.hardware}{processes}",
            "model": f"{count(plan.n_parameters, 'parameters')}, model.pt {plan.n_parameters * 4 / 1e6:.1f} MB",
            **({"weights": f"of {c.init}"} if c.init else {}),
            "data": f"{corpus.name}: {count(len(corpus.train), 'tokens')} to train on, "
            f"{count(len(corpus.val), 'tokens')} held out",
            "training": f"{c.num_training_steps} steps of {setup.tokens_per_step} tokens = "
            f"{count(n_tokens, 'tokens')} ({n_tokens / len(corpus.train):,.1f} times the data)",
            "compute": f"{plan.flops:.3g} FLOPs{''.join(budgets)}",
            "ln V": f"{plan.ln_vocab:.3f} nats, the loss of a uniform guess",
            "unigrams": f"{plan.unigram_entropy:.3f} nats, the loss of a guess that knows only word frequencies",
        }
    )


class ProgressBar:
    """A bar on a terminal; elsewhere about twenty lines in all. Shows nothing if disabled."""

    def __init__(self, plan: TrainingPlan, start_step: int, enabled: bool):
        self.plan, self.start_step = plan, start_step
        self.total = plan.setup.config.num_training_steps
        self.bar = tqdm(
            total=self.total,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            disable=not (enabled and sys.stderr.isatty()),
        )

    def update(self, result: StepResult, seconds: float) -> None:
        """Show the result of a step; `seconds` have passed since start_step."""
        done = result.step + 1
        seconds_per_step = seconds / (done - self.start_step)
        text = (
            f"loss {result.train_loss:.3f}  lr {result.learning_rate:.2e}  "
            f"{self.plan.setup.tokens_per_step / seconds_per_step:,.0f} tok/s  "
            f"{self.plan.flops_per_step / seconds_per_step / 1e12:.3f} TFLOPS"
        )
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif done % math.ceil(self.total / 20) == 0 or done == self.total:
            left = duration((self.total - done) * seconds_per_step)
            print(f"step {done}/{self.total}  {text}  {left} left", flush=True)

    def close(self) -> None:
        """End the bar, so that what is printed next starts on its own line."""
        self.bar.close()
