"""Question 2.1: train.py. Only the resulting numbers count, not how a solution arrives at them.

The training loop is observed from the optimizer, which notes the gradients, weights and rate of each step. Its
model is a stand-in, and its loss a correct one, so that other mistakes cost no points here.
Tests marked `question` give points; those marked `advice` test what this package adds to the handout.
"""

import copy
import inspect
import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import wandb
from checks import check_close, check_equal, check_shape, explained
from mistakes import train as mistakes
from stand_ins import PlainLM

import train

V, LN2 = 11, math.log(2)


@pytest.fixture
def lm(randomise):
    return randomise(PlainLM(V, 6, 2, 8, n_layer=1, p_dropout=0.0)).train()


def plain_loss(model):
    """The correct loss as a function of the input ids alone."""
    return lambda ids: mistakes.costs(ids, model(ids)).mean()


def random_batches(seed=0, shape=(3, 5), limit=200):
    """More batches than any test needs; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(limit):
        yield torch.randint(V, shape, generator=generator)
    raise AssertionError(f"train: expected to stop after num_training_steps, but drew {limit} batches: no end?")


def first_batches(n):
    return list(itertools.islice(random_batches(), n))


# --- random_batch_sampler ---

NO_BATCH = (TypeError, AttributeError, RuntimeError, ValueError, IndexError)
ANY_CORPUS = "tokens may be a tensor or a NumPy array of any integer type: make an int64 tensor of the rows alone"


def random_starts(tokens, batch_size, seq_len, n_batches):
    """The first token of each row, (n_batches, batch_size)."""
    sampler = train.random_batch_sampler(tokens, "cpu", batch_size, seq_len)
    batches = list(itertools.islice(sampler, n_batches))
    hint = "batches must come without end: is there a loop?"
    check_equal(len(batches), n_batches, "number of batches", hint=hint)
    return torch.stack(batches)[:, :, 0]


@pytest.mark.question("2.1", "random_batch_sampler")
class TestRandomBatchSampler:
    def test_rows_are_pieces_of_the_corpus(self):
        tokens = torch.arange(60)  # token i of this corpus is i
        batch = next(iter(train.random_batch_sampler(tokens, "cpu", 3, 5)))
        check_shape(batch, (3, 5), "a batch", {"single rows: yield whole batches": (5,)})
        check_equal(batch.dtype, torch.int64, "dtype of a batch")
        check_equal(batch.device.type, "cpu", "device of a batch")
        right, hint = batch[:, :1] + torch.arange(5), "a row must be consecutive tokens"
        check_close(batch, right, "rows of a corpus 0, 1, 2, …", hint=hint)

    def test_rows_and_batches_are_drawn_independently(self):
        first, second = random_starts(torch.arange(10_000), 8, 4, n_batches=2)
        assert not torch.equal(first, second), "the second batch: expected new rows, got the first batch again"
        steps = first.diff().unique().tolist()
        assert len(steps) > 1, (
            f"rows of a batch: expected independent starts, got all {steps[0]} apart: one draw for all rows?"
        )

    def test_every_start_is_equally_likely(self):
        # 12 tokens hold 9 rows of 4. 500 batches of 8 are 4000 draws: each start 444 times, with
        # sigma = sqrt(4000 · 1/9 · 8/9) = 19.9; 5 sigma = 99.
        counts = torch.bincount(random_starts(torch.arange(12), 8, 4, n_batches=500).flatten(), minlength=9)
        what = "starts 0 to 8 of 12 tokens in rows of 4"
        assert len(counts) == 9, f"{what}: got start {len(counts) - 1}"
        assert counts[8] > 0, f"{what}: the last, 8, is never drawn: there are n_tokens - seq_len + 1 starts"
        assert counts[0] > 0, f"{what}: the first, 0, is never drawn"
        hint = "" if counts[1:4].any() else "a row may start anywhere, not only at multiples of seq_len"
        check_close(counts, torch.full((9,), 4000 / 9), f"how often of 4000 {what} are drawn", hint=hint, atol=99)


@pytest.mark.advice("2.1", "random_batch_sampler")
class TestMoreOfRandomBatchSampler:
    @pytest.mark.parametrize("dtype", ["int32 tensor", "int64 array", "uint16 array", "uint16 file"])
    def test_corpora_of_other_types(self, dtype, tmp_path):
        tokens = np.arange(50_200, 50_260).astype(dtype.split()[0])  # beyond int16
        if dtype.endswith("file"):
            np.save(tmp_path / "tokens.npy", tokens)
            tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
        tokens = torch.from_numpy(tokens) if dtype.endswith("tensor") else tokens
        with explained(f"a corpus of type {dtype}: expected batches", ANY_CORPUS, *NO_BATCH):
            batch = next(iter(train.random_batch_sampler(tokens, torch.device("cpu"), 3, 5)))
        check_equal(batch.dtype, torch.int64, "dtype of a batch")
        right, wrong = 50_200 + (batch - 50_200) % 2**16, {"read as int16, which ends at 32767": batch}
        check_close(batch, right, "token ids", wrong if (batch < 0).any() else {})
        check_close(batch, batch[:, :1] + torch.arange(5), f"rows of a corpus of type {dtype}")


# --- sequential_batch_sampler ---


def sequential_batches(tokens, **options):
    what = f"{len(tokens)} tokens in a {type(tokens).__name__}: expected batches of 3×5"
    hint = "only full rows can be reshaped or stacked"
    with explained(what, hint if isinstance(tokens, torch.Tensor) else ANY_CORPUS, *NO_BATCH):
        # At most 20, so that a sampler without end fails and does not hang.
        return list(itertools.islice(train.sequential_batch_sampler(tokens, "cpu", 3, 5, **options), 20))


@pytest.mark.question("2.1", "sequential_batch_sampler")
class TestSequentialBatchSampler:
    def test_batches_follow_the_corpus(self):
        got = sequential_batches(torch.arange(30))
        assert len(got) > 1, f"batches of 3×5 in 30 tokens: expected 2, got {len(got)}: is the last one lost?"
        check_shape(got[0], (3, 5), "a batch")
        check_equal(got[0].dtype, torch.int64, "dtype of a batch")
        what, hint = "batches of a corpus 0, 1, 2, …", "each row continues where the row before it ends"
        check_close(torch.stack(got[:2]), torch.arange(30).view(2, 3, 5), what, mistakes.SEQUENTIAL_BATCHES, hint)
        wrong = {"more passes: end after the first one": 20}
        check_equal(len(got), 2, "number of batches of 3×5 in 30 tokens", wrong)

    @pytest.mark.parametrize("n_tokens, n_batches", [(15, 1), (16, 1), (31, 2), (34, 2)])
    def test_tokens_that_fill_no_row_are_left_out(self, n_tokens, n_batches):
        shapes = [tuple(batch.shape) for batch in sequential_batches(torch.arange(n_tokens))]
        hint = "keep the last full batch" if len(shapes) < n_batches else "drop the incomplete row"
        check_equal(shapes, [(3, 5)] * n_batches, f"shapes of the batches of {n_tokens} tokens", hint=hint)


@pytest.mark.advice("2.1", "sequential_batch_sampler")
class TestMoreOfSequentialBatchSampler:
    @pytest.mark.parametrize("n_tokens, n_batches", [(14, 0), (29, 1), (44, 2)])
    def test_only_full_batches(self, n_tokens, n_batches):
        shapes = [tuple(batch.shape) for batch in sequential_batches(torch.arange(n_tokens))]
        hint = "drop the incomplete batch"
        check_equal(shapes, [(3, 5)] * n_batches, f"shapes of the batches of {n_tokens} tokens", hint=hint)

    def test_a_numpy_corpus(self):
        got = sequential_batches(np.arange(30, dtype=np.uint16))
        check_equal([batch.dtype for batch in got], [torch.int64] * 2, "dtypes of the batches")
        check_close(torch.stack(got), torch.arange(30).view(2, 3, 5), "batches of a uint16 array")


# --- cosine_lr_schedule ---


def learning_rates(*steps, a=4, b=12):
    """The schedule's values between 0.2 and 1.0, for a = num_warmup_steps and b = num_training_steps."""
    what = f"num_warmup_steps = {a}, num_training_steps = {b}: expected a rate"
    with explained(what, "each phase may be empty", ZeroDivisionError):
        schedule = train.cosine_lr_schedule(a, b, 0.2, 1.0)
        assert callable(schedule), f"the schedule: expected a function of the step, got {schedule!r}"
        return [float(schedule(t)) for t in steps]


@pytest.mark.question("2.1", "cosine_lr_schedule")
class TestCosineSchedule:
    """Warm-up in steps 0 to 3, annealing from 1.0 to 0.2 in steps 4 to 11; all values worked out by hand."""

    def test_warm_up_rises_from_zero(self):
        got = learning_rates(0, 1, 2, 3)
        check_close(got, [0.0, 0.25, 0.5, 0.75], "learning rates of steps 0 to 3", mistakes.WARM_UP)

    def test_annealing_is_half_a_cosine(self):
        right, what = [1.0, 0.882843, 0.6, 0.317157, 0.230448], "learning rates of steps 4, 6, 8, 10, 11"
        check_close(learning_rates(4, 6, 8, 10, 11), right, what, mistakes.ANNEALING)

    def test_min_lr_ever_after(self):
        got = learning_rates(12, 13, 20, 60)
        check_close(got, [0.2] * 4, "learning rates of steps 12, 13, 20, 60", mistakes.AFTER_THE_END)


@pytest.mark.advice("2.1", "cosine_lr_schedule")
class TestMoreOfCosineSchedule:
    def test_an_empty_phase(self):
        wrong = {"step 0 still counts as warm-up": [0.0, 0.6, 0.2]}
        got = learning_rates(0, 4, 8, a=0, b=8)
        check_close(got, [1.0, 0.6, 0.2], "learning rates without warm-up", wrong)
        got = learning_rates(3, 4, 5, a=4, b=4)
        check_close(got, [0.75, 0.2, 0.2], "learning rates where warm-up is all")


# --- compute_language_modeling_loss ---


@pytest.mark.question("2.1", "compute_language_modeling_loss")
class TestLanguageModelingLoss:
    ids = torch.tensor([[3, 7, 1, 9], [2, 5, 8, 4]])

    def logits(self):
        """The next tokens have the probabilities 2^-2 to 2^-7, and the first token 1/2 after the last one."""
        next_ids = self.ids.roll(-1, dims=1)[..., None]
        p_next = torch.tensor([[2**-2, 2**-3, 2**-4, 2**-1], [2**-5, 2**-6, 2**-7, 2**-1]])[..., None]
        others = torch.rand(2, 4, V).scatter(2, next_ids, 0.0)
        p = (others / others.sum(dim=-1, keepdim=True) * (1 - p_next)).scatter(2, next_ids, p_next)
        return p.log() + torch.randn(2, 4, 1)  # a constant changes no softmax

    def test_mean_cross_entropy_of_the_next_tokens(self):
        logits = self.logits()
        got = train.compute_language_modeling_loss(self.ids, logits)
        # -log2 of the six probabilities is 2, 3, 4, 5, 6, 7: on average 4.5 bits
        hint = "mean over all B·(S - 1) predictions, in nats"
        check_close(got, 4.5 * LN2, "the loss", mistakes.loss(self.ids, logits), hint)

    def test_large_logits_do_not_overflow(self):
        logits = torch.zeros(2, 4, V)
        logits[..., 10] = 200.0  # certain of a token that never comes
        loss = train.compute_language_modeling_loss(self.ids, logits)
        hint = "log of a softmax overflows: use torch's cross entropy"
        check_close(loss, 200.0, "the loss of logits of 200", hint=hint)

    def test_the_loss_has_a_gradient(self):
        loss = train.compute_language_modeling_loss(self.ids, self.logits().requires_grad_())
        assert getattr(loss, "requires_grad", False), (
            "the loss has no gradient: expected a tensor on the graph (no .item(), no .detach())"
        )


# --- train ---


class WatchedSGD(torch.optim.SGD):
    """SGD with two parameter groups that notes what it gets at each step."""

    def __init__(self, model, lr=0.5):
        parameters = list(model.parameters())
        super().__init__([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=lr)
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
    loss = plain_loss(model)(torch.cat(batches))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def losses_at(model, n):
    """The losses of the first n random batches at the model's present weights."""
    with torch.no_grad():
        return [plain_loss(model)(ids).item() for ids in first_batches(n)]


def negligible_rate(t):
    """A learning rate too small to change a float32 weight, so that the losses of all steps are known."""
    return 1e-12 * (t + 1)


@pytest.fixture
def wandb_log(monkeypatch):
    """An active W&B run in disabled mode; the list of what is logged to it, as (step, values)."""
    logged = []

    def log(data, step=None, **_):
        logged.append((len(logged) if step is None else step, {k: float(v) for k, v in data.items()}))

    run = wandb.init(mode="disabled")
    monkeypatch.setattr(wandb, "log", log)
    monkeypatch.setattr(run, "log", log)
    right_loss = lambda input_ids, logits: mistakes.costs(input_ids, logits).mean()  # noqa: E731
    monkeypatch.setattr(train, "compute_language_modeling_loss", right_loss)
    yield logged
    run.finish()


@pytest.mark.question("2.1", "train")
@pytest.mark.usefixtures("wandb_log")
class TestTrain:
    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_each_step_uses_the_gradient_of_its_own_batches(self, lm, accumulation):
        optimizer, batches = WatchedSGD(lm), random_batches()
        train.train(lm, random_batches(), optimizer, lambda t: 0.1, nullcontext(), 3, accumulation)
        wrong = {"optimizer.step() is inside the accumulation loop": 3 * accumulation} if accumulation > 1 else {}
        what = f"optimizer steps in 3 training steps, accumulation {accumulation}"
        check_equal(len(optimizer.seen), 3, what, wrong)
        previous = None
        for t, seen in enumerate(optimizer.seen):
            micro_batches = list(itertools.islice(batches, accumulation))

            def gradient(of, weights=seen["weights"]):
                return gradient_at(lm, weights, of)

            wrong = mistakes.gradient(gradient, micro_batches, previous)
            what = f"the gradient at step {t}, accumulation {accumulation}"
            hint = "is every batch used once?"
            check_close(seen["gradient"], gradient(micro_batches), what, wrong, hint)
            previous = seen["gradient"]

    def test_the_learning_rate_of_each_step(self, lm):
        optimizer, schedule = WatchedSGD(lm, lr=0.5), [0.01, 0.04, 0.09, 0.16, 0.25]
        train.train(lm, random_batches(), optimizer, lambda t: schedule[t], num_training_steps=4)
        first, second = zip(*(seen["lr"] for seen in optimizer.seen), strict=True)
        wrong = mistakes.learning_rates(schedule, at_start=0.5)
        check_close(first, schedule[:4], "learning rates of steps 0 to 3", wrong)
        wrong = {"only the first parameter group is set": [0.5] * 4}
        check_close(second, schedule[:4], "learning rates of the second parameter group", wrong)

    def test_training_lowers_the_loss(self, lm):
        (batch,) = first_batches(1)
        before = plain_loss(lm)(batch).item()
        optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95))
        train.train(lm, itertools.repeat(batch, 200), optimizer, lambda t: 0.05, nullcontext(), 30, 2)
        after = plain_loss(lm)(batch).item()
        assert after < before / 2, (
            f"30 steps on one batch, accumulation 2: expected the loss to fall below half of {before:.3f}, "
            f"got {after:.3f}: is each step's gradient the mean of its batches', and does the optimizer use it?"
        )

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_what_is_logged(self, lm, wandb_log, accumulation):
        n_steps = 23
        losses = losses_at(lm, n_steps * accumulation)
        sgd = WatchedSGD(lm)
        train.train(lm, random_batches(), sgd, negligible_rate, nullcontext(), n_steps, accumulation)
        steps, values = [step for step, _ in wandb_log], [values for _, values in wandb_log]
        hint = "log at every step, with its number"
        check_equal(steps, list(range(n_steps)), "steps logged", hint=hint)
        for key in ("train-loss", "learning-rate"):
            assert all(key in row for row in values), f"expected '{key}' logged at every step"
        right = mistakes.running_mean(losses, 20 * accumulation, accumulation)
        wrong = mistakes.logged_loss(losses, accumulation)
        check_close([row["train-loss"] for row in values], right, "the train-loss logged", wrong)
        rates = [1e12 * row["learning-rate"] for row in values]
        wrong = mistakes.logged_rate(n_steps, accumulation)
        check_close(rates, range(1, n_steps + 1), "1e12·learning-rate", wrong)


@pytest.mark.advice("2.1", "train")
class TestMoreOfTrain:
    def test_training_mode_and_autocast(self, lm, wandb_log):
        seen = []
        lm.register_forward_pre_hook(lambda lm, _: seen.append((lm.training, torch.is_autocast_enabled("cpu"))))
        autocast = torch.autocast("cpu", torch.bfloat16)
        train.train(lm.eval(), random_batches(), WatchedSGD(lm), lambda t: 0.1, autocast, 2)
        modes, autocasts = zip(*seen, strict=True)
        check_equal(modes, (True, True), "training mode at each call of a model passed in evaluation mode")
        check_equal(autocasts, (True, True), "whether the model is called inside `with autocast`")

    def test_without_a_wandb_run(self, lm, monkeypatch):
        def log(*_, **__):
            raise wandb.Error("You must call wandb.init() before wandb.log()")

        monkeypatch.setattr(wandb, "run", None)
        monkeypatch.setattr(wandb, "log", log)
        hint = "is wandb.log called although wandb.run is None?"
        with explained("train without an active W&B run: expected it to run", hint, wandb.Error, AttributeError):
            train.train(lm, random_batches(), WatchedSGD(lm), lambda t: 0.1, num_training_steps=2)

    @pytest.mark.parametrize("share", [0.1, 10.0], ids=["a longer gradient", "a shorter gradient"])
    def test_grad_clip_limits_the_norm_of_the_whole_gradient(self, lm, wandb_log, share):
        if "grad_clip" not in inspect.signature(train.train).parameters:
            pytest.skip("train does not take grad_clip (optional)")
        unclipped = gradient_at(lm, lm.state_dict(), first_batches(2))
        optimizer, most = WatchedSGD(lm), share * unclipped.norm().item()
        train.train(lm, random_batches(), optimizer, lambda t: 0.1, nullcontext(), 1, 2, grad_clip=most)
        right, wrong = min(share, 1.0) * unclipped, {"not clipped": unclipped} if share < 1 else {}
        what = f"the gradient, grad_clip = {share} times its norm"
        check_close(optimizer.seen[0]["gradient"], right, what, wrong)


@pytest.mark.advice("2.1", "evaluate")
class TestEvaluate:
    def test_every_prediction_counts_the_same_without_dropout(self, randomise):
        model = randomise(PlainLM(V, 6, 2, 8, n_layer=1, p_dropout=0.5)).eval()
        batches = [torch.randint(V, (3, 6)), torch.randint(V, (1, 4))]  # 15 and 3 predictions
        with torch.no_grad():
            first, second = (plain_loss(model)(ids).item() for ids in batches)
        got, right = train.evaluate(model.train(), iter(batches)), (15 * first + 3 * second) / 18
        wrong = {
            "the mean of the batches' means: batches differ in size": (first + second) / 2,
            "weighted by tokens, not by predictions": (18 * first + 4 * second) / 22,
        }
        check_close(got["val-loss"], right, "val-loss", wrong, hint="dropout must be off in evaluate")
        wrong = {"perplexity in base 2: the loss is in nats": 2**right}
        check_close(got["val-perplexity"], math.exp(right), "val-perplexity", wrong)
        check_equal(model.training, True, "model.training after evaluate, training mode before")
