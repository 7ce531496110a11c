"""Errors and signals that stop a training run, in the words of the user."""

from collections.abc import Iterator
from contextlib import contextmanager

from support.config import TrainingConfig
from support.distribution import LOST, lost_process
from support.errors import RunStopped, as_user_error


@contextmanager
def errors_explained(run, c: TrainingConfig) -> Iterator[None]:
    """Turn whatever stops the TrainingRun or DryRun into one sentence that says where it would resume."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        print(f"\nStopped. {run.resume_hint}.", flush=True)
        if run.plan.setup.world.size > 1:
            print("torchrun also reports the stop as an error; nothing else is wrong.", flush=True)
        raise
    except Exception as error:
        common_reason = None  # why all processes stop at once
        if isinstance(error, FloatingPointError):
            common_reason = (
                f"diverged: {error}; the weights were not updated. Likely remedies, with --fresh: a "
                f"lower max_lr (now {c.max_lr:g}), more num_warmup_steps (now {c.num_warmup_steps}), or "
                f"grad_clip (now {c.grad_clip or 'off'}; 1.0 is usual)"
            )
        elif lost_process(error):
            common_reason = LOST
        if common_reason:
            raise RunStopped(f"{common_reason}. {run.resume_hint}", on_all_processes=True) from error
        user_error = as_user_error(error, f" at step {run.progress.next_step}: {smaller_batch_advice(c)}")
        if user_error is None:
            raise
        raise RunStopped(f"{user_error}. {run.resume_hint}") from error


def smaller_batch_advice(c: TrainingConfig) -> str:
    """What fills the memory, and the smallest change that needs less and leaves the mathematics unchanged."""
    m, batch_size = c.model_config, c.batch_size
    sizes = f"batch_size {batch_size} × seq_len {c.seq_len} × n_embd {m.n_embd} × n_layer {m.n_layer}"
    if batch_size == 1:
        return f"{sizes} does not fit; make one of the others smaller"
    factor = next(k for k in range(2, batch_size + 1) if batch_size % k == 0)
    remedy = f"batch_size={batch_size // factor} grad_accumulation_steps={c.grad_accumulation_steps * factor}"
    return f"{sizes} does not fit; use --set {remedy}, which gives the same result"
