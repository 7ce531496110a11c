"""Common mistakes in train.py (question 2.1) and the values they give, for tests/test_train.py."""

import math

import torch

# --- samplers ---

# A corpus 0, 1, 2, … in two batches of 3 rows of 5 tokens; the first token of each row, in place of 0, 5, 10, …
SEQUENTIAL_STARTS = {
    "rows overlap: each starts on the last token of the one before": [0, 4, 8, 12, 16, 20],
    "rows run through the batches; they must follow one another within a batch": [0, 10, 20, 5, 15, 25],
    "rows start at every token: each must start where the row before it ends": [0, 1, 2, 3, 4, 5],
    "the first batch again": [0, 5, 10, 0, 5, 10],
}
SEQUENTIAL_BATCHES = {
    name: (torch.tensor(starts)[:, None] + torch.arange(5)).view(2, 3, 5)
    for name, starts in SEQUENTIAL_STARTS.items()
}

# --- cosine_lr_schedule: warm-up in steps 0 to 3, annealing from 1.0 to 0.2 in steps 4 to 11 ---

WARM_UP = {  # steps 0, 1, 2, 3
    "warm-up one step early: step 0 must have rate 0": [0.25, 0.5, 0.75, 1.0],
    "warm-up reaches the peak one step early: at step a - 1, not a": [0, 1 / 3, 2 / 3, 1.0],
    "warm-up from min_lr: it starts at 0": [0.2, 0.4, 0.6, 0.8],
    "warm-up from min_lr with the slope of max_lr": [0.2, 0.45, 0.7, 0.95],
    "no warm-up": [1.0, 1.0, 1.0, 1.0],
}
ANNEALING = {  # steps 4, 6, 8, 10, 11
    "the cosine counts from step 0, not from the end of warm-up": [0.8, 0.6, 0.4, 0.253590, 0.213630],
    "the cosine is b steps long: it must end at step b": [1.0, 0.946410, 0.8, 0.6, 0.496472],
    "min_lr reached one step early: at step b - 1, not b": [1.0, 0.849396, 0.510992, 0.239612, 0.2],
    "the cosine starts one step early": [0.969552, 0.753073, 0.446927, 0.230448, 0.2],
    "+ min_lr is missing": [0.8, 0.682843, 0.4, 0.117157, 0.030448],
    "decay to 0, not to min_lr": [1.0, 0.853553, 0.5, 0.146447, 0.038060],
    "the cosine falls by max_lr: it must end at min_lr": [1.2, 1.053553, 0.7, 0.346447, 0.238060],
    "a linear decay": [1.0, 0.8, 0.6, 0.4, 0.3],
    "a whole cosine": [1.0, 0.6, 0.2, 0.6, 0.882843],
    "a quarter of a cosine": [1.0, 0.939104, 0.765685, 0.506147, 0.356072],
    "a rising cosine": [0.2, 0.317157, 0.6, 0.882843, 0.969552],
    "the cosine falls by twice max_lr - min_lr": [1.8, 1.565685, 1.0, 0.434315, 0.260896],
}
AFTER_THE_END = {  # steps 12, 13, 20, 60
    "the cosine continues after num_training_steps": [0.2, 0.230448, 1.0, 0.2],
    "0 after num_training_steps": [0.0, 0.0, 0.0, 0.0],
}

# --- compute_language_modeling_loss ---


def costs(input_ids, logits, offset=1):
    """Of each position s the nats it costs to predict the token at s + offset: (B, S - |offset|)."""
    S, nats = input_ids.shape[1], -logits.log_softmax(-1)
    positions = [s for s in range(S) if 0 <= s + offset < S]
    return torch.stack([nats[:, s].gather(1, input_ids[:, [s + offset]])[:, 0] for s in positions], dim=1)


def loss(input_ids, logits):
    B, S = input_ids.shape
    right, after_the_end = costs(input_ids, logits), -logits[:, -1].log_softmax(-1)
    return {
        "logits and labels not shifted: each token predicts itself": costs(input_ids, logits, 0).mean(),
        "shifted the wrong way: each token predicts the one before": costs(input_ids, logits, -1).mean(),
        "summed, not averaged": right.sum(),
        "divided by B·S, though there are B·(S - 1) predictions": right.sum() / (B * S),
        "divided by B only": right.sum() / B,
        "the first position's prediction is lost": right[:, 1:].mean(),
        "the last prediction is lost": right[:, :-1].mean(),
        "labels padded with token 0 and the padding counted": torch.cat(
            [right, after_the_end[:, :1]], dim=1
        ).mean(),
        "labels rolled: the last position predicts the first token": (
            torch.cat([right, after_the_end.gather(1, input_ids[:, :1])], dim=1).mean()
        ),
        "in bits, not in nats": right.mean() / math.log(2),
        "softmax before the cross entropy, which has one inside": costs(input_ids, logits.softmax(-1)).mean(),
        "the wrong sign": -right.mean(),
    }


# --- train ---


def gradient(of, batches, previous=None):
    """of(batches): the gradient of their mean loss; previous: the gradient of the step before, if there is one."""
    right, n = of(batches), len(batches)
    wrong = {"clipped to norm 1: no clipping was asked for": right / right.norm()}
    if previous is not None:
        wrong["gradients are not cleared between the steps"] = right + previous
    if n > 1:
        first, last = of(batches[:1]), of(batches[-1:])
        wrong |= {
            "the losses are not divided by grad_accumulation_steps": n * right,
            "gradients cleared inside the accumulation loop, only the last micro-batch is left": last / n,
            "only the last micro-batch is used": last,
            "only the first micro-batch is used": first,
            "the loss is divided twice by grad_accumulation_steps": right / n,
        }
    return wrong


def learning_rates(schedule, at_start):
    """Steps 0 to 3 with schedule[t] at step t; at_start: the optimizer's own rate."""
    return {
        "the learning rate is never set": [at_start] * 4,
        "lr set after the optimizer's step: one step late": [at_start, *schedule[:3]],
        "lr one step late: schedule(step - 1)": [schedule[-1], *schedule[:3]],
        "lr one step late, the first one twice": [schedule[0], *schedule[:3]],
        "steps counted from 1: the first one is step 0": schedule[1:5],
        "lr set once, before the loop": schedule[:1] * 4,
    }


def running_mean(losses, window, per_step=1):
    """After each step the mean of the last `window` losses; `per_step` of them belong to a step."""
    ends = range(per_step, len(losses) + 1, per_step)
    parts = [losses[max(0, end - window) : end] for end in ends]
    return [sum(part) / len(part) for part in parts]


def logged_loss(losses, per_step):
    """losses: those of all micro-batches, `per_step` of them to a step."""

    def mean_of_last(steps):
        return running_mean(losses, steps * per_step, per_step)

    wrong = {
        "the mean over all steps: it is over the last 20": mean_of_last(10**6),
        "the loss of the step alone: it is the mean over the last 20 steps": mean_of_last(1),
    }
    if per_step > 1:
        wrong |= {
            "the losses divided by grad_accumulation_steps are reported": [m / per_step for m in mean_of_last(20)],
            "the mean over 20 micro-batches: it is over 20 steps": running_mean(losses, 20, per_step),
            "the loss of the last micro-batch": running_mean(losses, 1, per_step),
            "each step's last micro-batch alone: it is the mean of all of them": (
                running_mean(losses[per_step - 1 :: per_step], 20)
            ),
        }
    return wrong


def logged_rate(n_steps, per_step):
    """Where the rate of step t is t + 1."""
    wrong = {
        "the learning rate of the step before": range(n_steps),
        "the learning rate of the step after": range(2, n_steps + 2),
    }
    if per_step > 1:
        micro_batches = range(1, per_step * n_steps, per_step)
        wrong["lr_schedule gets the number of micro-batches, not of steps"] = micro_batches
    return wrong
