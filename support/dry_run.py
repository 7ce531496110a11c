"""A dry run: what training would cost, from a few timed steps."""

import time

import numpy as np

from support.errors import require
from support.plan import TrainingPlan
from support.screen import bold, duration
from support.state import Progress
from train import StepResult


class DryRun:
    """Times a few steps of one micro-batch each to say how long all would take. Touches no folder."""

    writes_results = False
    resume_hint = "A dry run saves nothing"

    def __init__(self, plan: TrainingPlan):
        self.plan, self.progress = plan, Progress()
        n = plan.setup.config.grad_accumulation_steps
        slow = plan.setup.device.type == "cpu" and plan.flops_per_step / n > 1e12  # about a minute each
        self.end_step = 2 if slow else 6  # the first one warms up
        print(f"  Timing {self.end_step} micro-batches of {plan.setup.tokens_per_step // n} tokens.\n", flush=True)
        self._times = [time.perf_counter()]

    def on_step(self, result: StepResult) -> None:
        """Note the time."""
        self._times.append(time.perf_counter())

    def show_times(self) -> None:
        """Print the speed and the time of the whole run. Raises UserError if `train` did not call on_step."""
        timed = len(self._times) > 2
        require(timed, "--dry_run: train() did not call on_step, so its steps cannot be timed")
        c = self.plan.setup.config
        seconds_per_step = float(np.median(np.diff(self._times)[1:])) * c.grad_accumulation_steps
        total = seconds_per_step * c.num_training_steps
        print(f"  {self.plan.speed(seconds_per_step)}")
        print(f"  a step takes {seconds_per_step * 1e3:.0f} ms; the whole run would take {bold(duration(total))}")
