"""Question 2.1: train.py. What counts is which numbers come out, not how a solution arrives at them.

The training loop is watched from the optimizer: an optimizer that notes, at each of its steps, the gradients,
weights and learning rate it was given.
"""

import contextlib
import copy
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import wandb
from points import check_close
from torch.utils._python_dispatch import TorchDispatchMode

import train
from model import DecoderLM

V, P, LN2 = 11, 8, math.log(2)


@pytest.fixture
def lm(randomise):
    return randomise(DecoderLM(V, 6, 2, P, n_layer=1, p_dropout=0.0))


def random_batches(seed=0, shape=(3, 5), limit=200):
    """More batches than any test needs; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(limit):
        yield torch.randint(V, shape, generator=generator)
    raise AssertionError(f"train: expected an end after num_training_steps, got {limit} batches drawn: no end?")


# ---------------------------------------------------------------------------------------------------------
# random_batch_sampler


@pytest.mark.question("2.1", "random_batch_sampler")
class TestRandomBatchSampler:
    @pytest.mark.parametrize(
        "tokens",
        [
            torch.arange(60),
            torch.arange(60, dtype=torch.int32),
            np.arange(60),
            np.arange(60, dtype=np.uint16),
        ],
        ids=["int64 tensor", "int32 tensor", "int64 array", "uint16 array"],
    )
    def test_rows_are_pieces_of_the_corpus(self, tokens):
        batch = next(iter(train.random_batch_sampler(tokens, "cpu", 3, 5)))
        guess = ": yield whole batches" if tuple(batch.shape) == (5,) else ""
        assert tuple(batch.shape) == (3, 5), f"a batch: expected shape (3, 5), got {tuple(batch.shape)}{guess}"
        assert batch.dtype == torch.int64, f"a batch: expected int64, got {batch.dtype}"
        assert batch.device.type == "cpu", f"a batch: expected it on cpu, got {batch.device}"
        pieces = batch[:, :1] + torch.arange(5)  # token i of this corpus is i
        check_close(batch, pieces, "rows of a corpus 0, 1, 2, …", hint="a row must be consecutive tokens")

    def test_token_ids_keep_their_value(self):
        tokens = np.full(9, 50256, dtype=np.uint16)  # beyond int16
        batch = next(iter(train.random_batch_sampler(tokens, "cpu", 2, 5)))
        wrong = {"read as int16, which ends at 32767": torch.full((2, 5), 50256 - 2**16)}
        check_close(batch, torch.full((2, 5), 50256), "a batch of token 50256 from uint16", wrong)

    def test_rows_and_batches_are_drawn_anew(self):
        sampler = train.random_batch_sampler(torch.arange(10_000), "cpu", 8, 4)
        batches = [batch[:, 0] for batch in itertools.islice(sampler, 2)]
        assert len(batches) == 2, f"expected batches without end, got only {len(batches)}: is there a loop?"
        assert not torch.equal(*batches), "the second batch: expected new rows, got the first batch again"
        steps = batches[0].diff()
        assert steps.unique().numel() > 1, (
            f"rows of a batch: expected starts of their own, got all {steps[0]} apart: one draw for all rows?"
        )

    def test_every_start_is_equally_likely(self):
        # 12 tokens hold 9 rows of 4. 500 batches of 8 are 4000 draws: each start 444 times, with
        # sigma = sqrt(4000 · 1/9 · 8/9) = 19.9; 5 sigma = 99.
        sampler = train.random_batch_sampler(torch.arange(12), "cpu", 8, 4)
        batches = list(itertools.islice(sampler, 500))
        assert len(batches) == 500, f"expected batches without end, got only {len(batches)}"
        counts = torch.bincount(torch.cat(batches)[:, 0], minlength=9)
        assert len(counts) == 9, f"starts 0 to 8 of 12 tokens in rows of 4: got start {len(counts) - 1}"
        assert counts[8] > 0, (
            "the last start, 8 of 12 tokens in rows of 4, is never drawn: n_tokens - seq_len + 1 starts"
        )
        assert counts[0] > 0, "the first start, 0, is never drawn"
        off = (counts - 4000 / 9).abs()
        guess = (
            ": a row may start anywhere, not only at multiples of seq_len" if counts[[1, 2, 3]].sum() == 0 else ""
        )
        assert off.max() < 99, (
            f"start {off.argmax()}: expected it about 444 times in 4000, got {counts[off.argmax()]}{guess}"
        )

    def test_a_corpus_of_one_row_is_enough(self):
        batch = next(iter(train.random_batch_sampler(torch.arange(5), "cpu", 2, 5)))
        check_close(batch, torch.arange(5).expand(2, 5), "batches of a corpus of exactly seq_len tokens")


# ---------------------------------------------------------------------------------------------------------
# sequential_batch_sampler


@pytest.mark.question("2.1", "sequential_batch_sampler")
class TestSequentialBatchSampler:
    def batches(self, n_tokens, as_numpy=False):
        tokens = np.arange(n_tokens, dtype=np.uint16) if as_numpy else torch.arange(n_tokens)
        # At most 20, so that a sampler without end fails and does not hang.
        return list(itertools.islice(train.sequential_batch_sampler(tokens, "cpu", 3, 5), 20))

    @pytest.mark.parametrize("as_numpy", [False, True], ids=["int64 tensor", "uint16 array"])
    def test_batches_follow_the_corpus(self, as_numpy):
        got = self.batches(30, as_numpy)
        guess = {1: ": keep the last full batch", 20: " or more: end after one pass"}.get(len(got), "")
        assert len(got) == 2, f"30 tokens in batches of 3×5: expected 2 batches, got {len(got)}{guess}"
        assert got[0].dtype == torch.int64, f"a batch: expected int64, got {got[0].dtype}"
        wrong = {
            "rows overlap: each starts on the last token of the one before": [
                [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]],
                [[12, 13, 14, 15, 16], [16, 17, 18, 19, 20], [20, 21, 22, 23, 24]],
            ],
            "rows run through the batches; they must follow one another within a batch": [
                [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14], [20, 21, 22, 23, 24]],
                [[5, 6, 7, 8, 9], [15, 16, 17, 18, 19], [25, 26, 27, 28, 29]],
            ],
            "the first batch again": torch.arange(15).view(3, 5).expand(2, 3, 5),
        }
        hint = "each row goes on where the row before it ends"
        check_close(
            torch.stack(got), torch.arange(30).view(2, 3, 5), "batches of a corpus 0, 1, 2, …", wrong, hint
        )

    @pytest.mark.parametrize("n_tokens, n_batches", [(14, 0), (15, 1), (29, 1), (30, 2), (31, 2), (44, 2)])
    def test_only_full_batches(self, n_tokens, n_batches):
        got = self.batches(n_tokens)
        guess = "keep the last full batch" if len(got) < n_batches else "drop the incomplete one"
        assert len(got) == n_batches, (
            f"{n_tokens} tokens in batches of 3×5: expected {n_batches} batches, got {len(got)}: {guess}"
        )
        shapes = {tuple(batch.shape) for batch in got}
        assert shapes <= {(3, 5)}, f"{n_tokens} tokens: expected only batches of shape (3, 5), got {shapes}"


# ---------------------------------------------------------------------------------------------------------
# cosine_lr_schedule


@pytest.mark.question("2.1", "cosine_lr_schedule")
class TestCosineSchedule:
    """Warm-up in steps 0 to 3, annealing from 1.0 to 0.2 in steps 4 to 11; all values worked out by hand."""

    def rates(self, *steps, a=4, b=12):
        try:
            schedule = train.cosine_lr_schedule(a, b, 0.2, 1.0)
            assert callable(schedule), f"the schedule: expected a function of the step, got {schedule!r}"
            return [float(schedule(t)) for t in steps]
        except ZeroDivisionError as error:
            raise AssertionError(
                f"num_warmup_steps = {a}, num_training_steps = {b}: expected a rate, got a division by zero"
            ) from error

    def test_warm_up_rises_from_zero(self):
        wrong = {
            "warm-up one step early: (t + 1) / a": [0.25, 0.5, 0.75, 1.0],
            "warm-up reaches the peak one step early: t / (a - 1)": [0, 1 / 3, 2 / 3, 1.0],
            "warm-up from min_lr: it starts at 0": [0.2, 0.4, 0.6, 0.8],
            "warm-up from min_lr with the slope of max_lr": [0.2, 0.45, 0.7, 0.95],
            "no warm-up": [1.0, 1.0, 1.0, 1.0],
        }
        check_close(self.rates(0, 1, 2, 3), [0.0, 0.25, 0.5, 0.75], "learning rates of steps 0 to 3", wrong)

    def test_annealing_is_half_a_cosine(self):
        wrong = {
            "the cosine counts from step 0, not from the end of warm-up": [0.8, 0.6, 0.4, 0.253590, 0.213630],
            "the cosine is b steps long, not b - a": [1.0, 0.946410, 0.8, 0.6, 0.496472],
            "min_lr reached one step early: (t - a) / (b - a - 1)": [1.0, 0.849396, 0.510992, 0.239612, 0.2],
            "the cosine starts one step early": [0.969552, 0.753073, 0.446927, 0.230448, 0.2],
            "decay to 0, not to min_lr": [1.0, 0.853553, 0.5, 0.146447, 0.038060],
            "amplitude max_lr, not max_lr - min_lr": [1.2, 1.053553, 0.7, 0.346447, 0.238060],
            "a linear decay": [1.0, 0.8, 0.6, 0.4, 0.3],
            "a whole cosine": [1.0, 0.6, 0.2, 0.6, 0.882843],
            "a quarter of a cosine": [1.0, 0.939104, 0.765685, 0.506147, 0.356072],
            "a rising cosine": [0.2, 0.317157, 0.6, 0.882843, 0.969552],
            "the factor 1/2 of the cosine is missing": [1.8, 1.565685, 1.0, 0.434315, 0.260896],
        }
        right = [1.0, 0.882843, 0.6, 0.317157, 0.230448]
        check_close(self.rates(4, 6, 8, 10, 11), right, "learning rates of steps 4, 6, 8, 10, 11", wrong)

    def test_min_lr_ever_after(self):
        wrong = {
            "the cosine goes on after num_training_steps": [0.2, 0.230448, 1.0, 0.2],
            "0 after num_training_steps": [0.0, 0.0, 0.0, 0.0],
        }
        check_close(self.rates(12, 13, 20, 60), [0.2] * 4, "learning rates of steps 12, 13, 20, 60", wrong)

    def test_no_warm_up(self):
        check_close(
            self.rates(0, 4, 8, a=0, b=8),
            [1.0, 0.6, 0.2],
            "learning rates without warm-up",
            {"step 0 still counts as warm-up": [0.0, 0.6, 0.2]},
        )

    def test_warm_up_only(self):
        check_close(self.rates(3, 4, 5, a=4, b=4), [0.75, 0.2, 0.2], "learning rates where warm-up is all")


# ---------------------------------------------------------------------------------------------------------
# compute_language_modeling_loss


@pytest.mark.question("2.1", "compute_language_modeling_loss")
class TestLanguageModelingLoss:
    ids = torch.tensor([[3, 7, 1, 9], [2, 5, 8, 4]])
    # The probability that the logits at each position give to the next, the same and the previous token.
    next_token = [[2**-2, 2**-3, 2**-4], [2**-5, 2**-6, 2**-7]]
    same_token = [[0.11, 0.12, 0.13, 0.14], [0.15, 0.16, 0.17, 0.18]]
    previous = [[0.05, 0.06, 0.07], [0.08, 0.09, 0.10]]
    token_0 = [0.3, 0.25]  # at the last position
    first_token = [0.2, 0.22]  # of the row, at the last position

    def logits(self):
        p = torch.zeros(2, 4, V)
        for b, s in itertools.product(range(2), range(4)):
            p[b, s, self.ids[b, s]] = self.same_token[b][s]
            if s < 3:
                p[b, s, self.ids[b, s + 1]] = self.next_token[b][s]
            else:
                p[b, s, 0] = self.token_0[b]
                p[b, s, self.ids[b, 0]] = self.first_token[b]
            if s > 0:
                p[b, s, self.ids[b, s - 1]] = self.previous[b][s - 1]
            others = p[b, s] == 0
            p[b, s, others] = (1 - p[b, s].sum()) / others.sum()
        return p.log() + torch.randn(2, 4, 1)  # softmax does not see a constant

    def test_mean_cross_entropy_of_the_next_tokens(self):
        def nats(*rows):
            values = [-math.log(p) for row in rows for p in row]
            return sum(values) / len(values)

        wrong = {
            "logits and labels not shifted: each token predicts itself": nats(*self.same_token),
            "shifted the wrong way: each token predicts the one before": nats(*self.previous),
            "summed, not averaged": 27 * LN2,
            "divided by B·S, though there are B·(S - 1) predictions": 27 / 8 * LN2,
            "divided by B only": 27 / 2 * LN2,
            "the first position's prediction is lost": (3 + 4 + 6 + 7) / 4 * LN2,
            "the last prediction is lost": (2 + 3 + 5 + 6) / 4 * LN2,
            "labels padded with token 0 and the padding counted": nats(*self.next_token, self.token_0),
            "labels rolled: the last position predicts the first token": nats(*self.next_token, self.first_token),
            "in bits, not in nats": 4.5,
            "softmax before the cross entropy, which has one inside": F.cross_entropy(
                self.logits().softmax(-1)[:, :-1].flatten(end_dim=1), self.ids[:, 1:].flatten()
            ),
            "the sign": -4.5 * LN2,
        }
        loss = train.compute_language_modeling_loss(self.ids, self.logits())
        # -log2 of the six probabilities is 2, 3, 4, 5, 6, 7: on average 4.5 bits
        check_close(loss, 4.5 * LN2, "the loss", wrong, hint="mean over all B·(S - 1) predictions, in nats")

    def test_uniform_guess_costs_ln_v(self):
        loss = train.compute_language_modeling_loss(self.ids, torch.full((2, 4, V), 3.0))
        check_close(loss, math.log(V), "the loss of equal logits")

    def test_large_logits_do_not_overflow(self):
        logits = torch.zeros(2, 4, V)
        logits[..., 10] = 200.0  # sure of a token that never comes
        loss = train.compute_language_modeling_loss(self.ids, logits)
        check_close(
            loss,
            200.0,
            "the loss of logits of 200",
            hint="log of a softmax overflows: use torch's cross entropy",
        )

    def test_gradient_reaches_every_prediction(self):
        logits = self.logits().requires_grad_()
        loss = train.compute_language_modeling_loss(self.ids, logits)
        assert getattr(loss, "requires_grad", False), (
            "the loss has no gradient: expected a tensor on the graph (no .item(), no .detach())"
        )
        loss.backward()
        used = logits.grad.abs().sum(dim=-1) > 0
        check_close(
            used.long(),
            [[1, 1, 1, 0]] * 2,
            "which positions' logits get a gradient",
            {
                "the first position's logits are unused": [[0, 1, 1, 1]] * 2,
                "the last position's logits are used, but nothing follows them": [[1, 1, 1, 1]] * 2,
            },
        )


# ---------------------------------------------------------------------------------------------------------
# train


class WatchedSGD(torch.optim.SGD):
    """SGD in two parameter groups that notes what it is given at each step."""

    def __init__(self, model, lr=0.5):
        parameters = list(model.parameters())
        super().__init__([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=lr)
        self.model = model
        self.seen = []

    def step(self, closure=None):
        parameters = list(self.model.parameters())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.seen.append(
            {
                "lr": [group["lr"] for group in self.param_groups],
                "gradient": torch.cat([g.flatten() for g in gradients]).clone(),
                "weights": copy.deepcopy(self.model.state_dict()),
            }
        )
        return super().step(closure)


def gradient_at(model, weights, batches):
    """The gradient of the mean loss over `batches` (all of one shape) where the model has these weights."""
    model = copy.deepcopy(model)
    model.load_state_dict(weights)
    ids = torch.cat(list(batches))
    loss = train.compute_language_modeling_loss(ids, model(ids))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.fixture
def wandb_log(monkeypatch):
    """An active W&B run in disabled mode; the list of what is logged to it, as (step, values)."""
    logged = []

    def log(data, step=None, **_):
        logged.append((len(logged) if step is None else step, {k: float(v) for k, v in data.items()}))

    run = wandb.init(mode="disabled")
    monkeypatch.setattr(wandb, "log", log)
    monkeypatch.setattr(run, "log", log)
    yield logged
    run.finish()


@pytest.mark.question("2.1", "train")
@pytest.mark.usefixtures("wandb_log")
class TestTrain:
    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_each_step_uses_the_gradient_of_its_own_batches(self, lm, accumulation):
        optimizer = WatchedSGD(lm)
        train.train(
            lm,
            random_batches(),
            optimizer,
            lambda t: 0.1,
            num_training_steps=3,
            grad_accumulation_steps=accumulation,
        )
        n = len(optimizer.seen)
        guess = ": is optimizer.step() inside the accumulation loop?" if n == 3 * accumulation else ""
        assert n == 3, f"3 training steps, accumulation {accumulation}: expected 3 optimizer steps, got {n}{guess}"
        batches = random_batches()
        previous = None
        for t, seen in enumerate(optimizer.seen):
            drawn = list(itertools.islice(batches, accumulation))
            right = gradient_at(lm, seen["weights"], drawn)
            wrong = {"clipped to norm 1, which nobody asked for": right / right.norm()}
            if t > 0:
                wrong["gradients are not cleared between the steps"] = right + previous
            if accumulation > 1:
                last = gradient_at(lm, seen["weights"], drawn[-1:])
                wrong |= {
                    "the losses are not divided by grad_accumulation_steps": accumulation * right,
                    "gradients cleared inside the accumulation loop, only the last micro-batch is left": (
                        last / accumulation
                    ),
                    "only the last micro-batch is used": last,
                    "only the first micro-batch is used": gradient_at(lm, seen["weights"], drawn[:1]),
                    "the loss is divided twice by grad_accumulation_steps": right / accumulation,
                }
            check_close(
                seen["gradient"],
                right,
                f"the gradient at step {t}, accumulation {accumulation}",
                wrong,
                hint="are gradients cleared after each step, and every batch used once?",
            )
            previous = seen["gradient"]

    def test_the_learning_rate_of_each_step(self, lm):
        optimizer, schedule = WatchedSGD(lm, lr=0.5), [0.01, 0.04, 0.09, 0.16, 0.25]
        train.train(lm, random_batches(), optimizer, lambda t: schedule[t], num_training_steps=4)
        first, second = zip(*(seen["lr"] for seen in optimizer.seen), strict=True)
        wrong = {
            "the learning rate is never set": [0.5] * 4,
            "lr set after the optimizer's step: one step late": [0.5, 0.01, 0.04, 0.09],
            "lr one step late: schedule(step - 1)": [0.25, 0.01, 0.04, 0.09],
            "lr one step late, the first one twice": [0.01, 0.01, 0.04, 0.09],
            "steps counted from 1: the first one is step 0": [0.04, 0.09, 0.16, 0.25],
            "lr set once, before the loop": [0.01] * 4,
        }
        check_close(first, schedule[:4], "learning rates of steps 0 to 3", wrong)
        check_close(
            second,
            schedule[:4],
            "learning rates of the second parameter group",
            {"only the first parameter group is set": [0.5] * 4},
        )

    def test_the_weights_are_the_optimizers(self, lm):
        # SGD's step from the last weights seen must be where the model ends.
        optimizer = WatchedSGD(lm)
        train.train(lm, random_batches(), optimizer, lambda t: 0.1, num_training_steps=2)
        assert len(optimizer.seen) == 2, f"2 training steps: expected 2 optimizer steps, got {len(optimizer.seen)}"
        last = optimizer.seen[-1]
        before = torch.cat([last["weights"][name].flatten() for name, _ in lm.named_parameters()])
        after = torch.cat([p.detach().flatten() for p in lm.parameters()])
        check_close(after, before - 0.1 * last["gradient"], "the weights after the last step")

    def test_training_lowers_the_loss(self, lm):
        batch = next(random_batches())
        before = train.compute_language_modeling_loss(batch, lm(batch)).item()
        optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95))
        train.train(
            lm,
            itertools.repeat(batch, 200),
            optimizer,
            lambda t: 0.02,
            num_training_steps=30,
            grad_accumulation_steps=2,
        )
        after = train.compute_language_modeling_loss(batch, lm(batch)).item()
        assert after < before / 2, (
            f"30 steps on one batch, accumulation 2: expected the loss to fall below half of {before:.3f}, "
            f"got {after:.3f}: are gradients cleared after each step?"
        )

    def test_training_mode_and_autocast(self, lm):
        class Autocast(contextlib.AbstractContextManager):
            active = False

            def __enter__(self):
                self.active = True

            def __exit__(self, *_):
                self.active = False

        autocast, seen = Autocast(), []
        lm.blocks[0].register_forward_pre_hook(lambda *_: seen.append((lm.blocks[0].training, autocast.active)))
        train.train(lm.eval(), random_batches(), WatchedSGD(lm), lambda t: 0.1, autocast, 2)
        assert seen, "train: expected the model to be called, got no call"
        modes, active = zip(*seen, strict=True)
        assert all(modes), "a model given in evaluation mode: expected training mode in train, got evaluation mode"
        assert all(active), "autocast: expected the model to be called inside the context, got a call outside it"

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_what_is_logged(self, lm, wandb_log, accumulation):
        # Learning rates too small to move a float32 weight: the losses of all batches are known beforehand.
        n_steps = 23
        with torch.no_grad():
            batches = itertools.islice(random_batches(), n_steps * accumulation)
            losses = [train.compute_language_modeling_loss(ids, lm(ids)).item() for ids in batches]
        train.train(
            lm,
            random_batches(),
            WatchedSGD(lm),
            lambda t: 1e-12 * (t + 1),
            num_training_steps=n_steps,
            grad_accumulation_steps=accumulation,
        )

        def running_mean(window, per_step=accumulation, losses=losses):
            ends = [per_step * (t + 1) for t in range(n_steps)]
            return [sum(part) / len(part) for part in (losses[max(0, end - window) : end] for end in ends)]

        right = running_mean(20 * accumulation)
        wrong = {
            "the mean over all steps: it is over the last 20": running_mean(10**6),
            "the loss of the step alone: it is the mean over the last 20 steps": running_mean(accumulation),
            "the mean over the last 19 steps: it is over 20": running_mean(19 * accumulation),
            "the mean over the last 21 steps: it is over 20": running_mean(21 * accumulation),
        }
        if accumulation > 1:
            wrong |= {
                "the losses divided by grad_accumulation_steps are reported": [
                    loss / accumulation for loss in right
                ],
                "the mean over 20 micro-batches: it is over 20 steps": running_mean(20),
                "the loss of the last micro-batch": running_mean(1),
                "each step's last micro-batch alone: it is the mean of all of them": running_mean(
                    20, per_step=1, losses=losses[accumulation - 1 :: accumulation]
                ),
            }
        steps = [step for step, _ in wandb_log]
        assert steps == list(range(n_steps)), (
            f"steps logged: expected 0, 1, …, {n_steps - 1}, got {', '.join(map(str, steps[:3]))}, …: "
            "log at every step, with its number"
        )
        for key in ("train-loss", "learning-rate"):
            assert all(key in values for _, values in wandb_log), f"expected '{key}' logged at every step"
        check_close([values["train-loss"] for _, values in wandb_log], right, "the train-loss logged", wrong)
        check_close(
            [1e12 * values["learning-rate"] for _, values in wandb_log],
            range(1, 24),
            "1e12·learning-rate",
            {
                "the learning rate of the step before": range(0, 23),
                "of the step after": range(2, 25),
                **(
                    {"lr_schedule gets the number of micro-batches, not of steps": range(1, 46, 2)}
                    if accumulation > 1
                    else {}
                ),
            },
        )


# ---------------------------------------------------------------------------------------------------------
# More of the interface, without points


def takes(function, parameter):
    """Skip the test where a solution's function lacks an optional parameter."""
    if parameter not in inspect.signature(function).parameters:
        pytest.skip(f"{function.__name__} does not take {parameter} (optional for the points)")


def test_random_batches_from_a_memory_mapped_file(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(40_000, 40_060, dtype=np.uint16))
    tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    batch = next(iter(train.random_batch_sampler(tokens, torch.device("cpu"), 3, 5)))
    check_close(batch, batch[:, :1] + torch.arange(5), "rows of a memory-mapped corpus")
    assert batch.min() >= 40_000, f"token ids: expected 40000 or more, got {batch.min()}"


def test_sequential_batches_keep_the_last_rows_when_asked():
    takes(train.sequential_batch_sampler, "drop_last")
    for n_tokens, shapes in ((42, [(3, 5), (3, 5), (2, 5)]), (30, [(3, 5), (3, 5)]), (9, [(1, 5)]), (4, [])):
        got = list(train.sequential_batch_sampler(torch.arange(n_tokens), "cpu", 3, 5, drop_last=False))
        assert [tuple(b.shape) for b in got] == shapes, f"{n_tokens} tokens, drop_last=False: expected {shapes}"
        flat = torch.cat([b.flatten() for b in got]) if got else torch.arange(0)
        assert flat.tolist() == list(range(n_tokens - n_tokens % 5))


def test_set_lr_reaches_every_parameter_group(lm):
    optimizer = WatchedSGD(lm)
    train.set_lr(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_train_goes_on_from_a_step(lm, wandb_log):
    takes(train.train, "start_step")
    steps = []
    train.train(
        lm,
        random_batches(),
        WatchedSGD(lm),
        lambda t: steps.append(t) or 0.1,
        num_training_steps=7,
        start_step=4,
    )
    assert steps == [4, 5, 6] and [step for step, _ in wandb_log] == [4, 5, 6]


def test_train_tells_what_happened(lm):
    takes(train.train, "on_step")
    told = []
    with torch.no_grad():
        losses = [
            train.compute_language_modeling_loss(ids, lm(ids)).item()
            for ids in itertools.islice(random_batches(), 6)
        ]
    train.train(
        lm,
        random_batches(),
        WatchedSGD(lm),
        lambda t: 1e-12 * (t + 1),
        num_training_steps=3,
        grad_accumulation_steps=2,
        on_step=told.append,
    )
    by_step = [(losses[i] + losses[i + 1]) / 2 for i in (0, 2, 4)]
    assert [result.step for result in told] == [0, 1, 2]
    check_close([result.loss for result in told], by_step, "loss of each step")
    check_close([result.train_loss for result in told], [sum(by_step[:n]) / n for n in (1, 2, 3)], "running mean")
    check_close([1e12 * result.learning_rate for result in told], [1, 2, 3], "1e12·learning_rate")


def test_train_without_a_wandb_run(lm):
    assert wandb.run is None
    optimizer = WatchedSGD(lm)
    train.train(lm, random_batches(), optimizer, lambda t: 0.1, num_training_steps=2)
    assert len(optimizer.seen) == 2


class TestEvaluate:
    batches = [torch.tensor([[1, 5, 2, 10, 0, 3]] * 2 + [[7, 7, 4, 9, 8, 1]]), torch.tensor([[6, 2, 0, 3]])]

    def test_every_predicted_token_counts_the_same(self, lm):
        lm.eval()
        with torch.no_grad():
            first, second = (train.compute_language_modeling_loss(ids, lm(ids)).item() for ids in self.batches)
        right = (15 * first + 3 * second) / 18  # 3·5 and 1·3 predictions
        wrong = {
            "the mean of the batches' means: batches differ in size": (first + second) / 2,
            "weighted by rows": (3 * first + second) / 4,
            "weighted by tokens, not by predictions": (18 * first + 4 * second) / 22,
            "summed": first + second,
            "only the last batch": second,
            "the logarithm of the mean perplexity": math.log((15 * math.exp(first) + 3 * math.exp(second)) / 18),
        }
        got = train.evaluate(lm, iter(self.batches))
        check_close(got["val-loss"], right, "val-loss", wrong)
        wrong = {
            "perplexity in base 2: the loss is in nats": 2**right,
            "the mean of the batches' perplexities": (math.exp(first) + math.exp(second)) / 2,
        }
        check_close(got["val-perplexity"], math.exp(right), "val-perplexity", wrong)

    @pytest.mark.parametrize("mode", ["training", "evaluation"])
    def test_leaves_the_model_as_it_was(self, randomise, mode):
        model = randomise(DecoderLM(V, 6, 2, P, n_layer=1, p_dropout=0.5)).eval()
        ids = self.batches[0]
        right = train.compute_language_modeling_loss(ids, model(ids)).item()
        weights = copy.deepcopy(model.state_dict())
        model.train(mode == "training")
        seen = []
        model.blocks[0].register_forward_pre_hook(
            lambda block, _: seen.append((block.training, torch.is_grad_enabled()))
        )
        got = train.evaluate(model, [ids])["val-loss"]
        check_close(
            got, right, f"val-loss of a model found in {mode} mode", hint="dropout must be off in evaluate"
        )
        assert not any(training for training, _ in seen), "evaluate: expected evaluation mode, got training mode"
        assert not any(grad for _, grad in seen), "evaluate: expected no gradients, got a forward pass with them"
        assert model.training == (mode == "training"), f"evaluate: expected {mode} mode restored, got the other"
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])]
        assert not changed, f"evaluate: expected the weights unchanged, got other {changed}"
        assert all(p.grad is None for p in model.parameters()), "evaluate: expected no gradients left behind"


def test_training_flops():
    model = DecoderLM(V, 6, 2, P, n_layer=1)
    got = train.training_flops(model, 10, 3, 4, 5)
    # 66 + 48 + (12·36 + 13·6) + 12 = 636 parameters; 6·636 + 12·1·6·8 = 4392 per token; 10·3·4·5 = 600 tokens
    assert got == 2_635_200 and isinstance(got, int), f"training_flops: expected the integer 2635200, got {got!r}"


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives back."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.fixture
def loss_class():
    if not hasattr(train, "LanguageModelingLoss"):
        pytest.skip("train.py has no LanguageModelingLoss (optional for the points)")
    return train.LanguageModelingLoss


class TestChunkedLoss:
    @pytest.mark.parametrize("shape", [(3, 5), (2, 8), (1, 2), (40, 7)])
    def test_equals_the_definition(self, lm, loss_class, shape):
        ids = next(random_batches(shape=shape))
        parameters = list(lm.parameters())
        plain = train.compute_language_modeling_loss(ids, lm(ids))
        chunked = loss_class(lm)(ids)
        check_close(chunked, plain, "the chunked loss")
        gradients = [torch.autograd.grad(3 * loss, parameters) for loss in (plain, chunked)]
        for (name, _), right, got in zip(lm.named_parameters(), *gradients, strict=True):
            check_close(got, right, f"3 times the chunked loss: gradient of {name}")

    def test_never_holds_all_logits(self, randomise, loss_class):
        B, S, n_vocab = 4, 130, 997
        model = randomise(DecoderLM(n_vocab, 6, 2, S, n_layer=1))
        ids = torch.randint(n_vocab, (B, S))
        with LargestTensor() as largest:
            loss_class(model)(ids).backward()
        assert largest.numel < B * S * n_vocab / 2, f"B·S·V = {B * S * n_vocab}, largest tensor {largest.numel}"

    def test_is_float32_under_autocast(self, lm, loss_class):
        ids = next(random_batches())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = lm.hidden_states(ids)
            loss = loss_class(lm)(ids)
        assert loss.dtype == torch.float32, f"the loss under bf16 autocast: expected float32, got {loss.dtype}"
        check_close(
            loss,
            train.compute_language_modeling_loss(ids, lm.token_logits(hidden.float())).float(),
            "the loss of bf16 hidden states",
        )

    def test_a_model_without_hidden_states(self, loss_class):
        class Bigram(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(V, V)

            def forward(self, input_ids):
                return self.table(input_ids)

        model, ids = Bigram(), next(random_batches())
        check_close(
            loss_class(model)(ids), train.compute_language_modeling_loss(ids, model(ids)).detach(), "the loss"
        )
