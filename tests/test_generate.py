"""Question 3.1: generate.py.

The tokenizer of these tests has one token per ASCII character, so that a text shows which tokens were chosen:
each is compared with what the model gives after the last n_positions tokens. The model's weights are large
enough for the context to matter; an untrained model only repeats its last token.
"""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from checks import check_close, check_equal, explained
from mistakes import generate as mistakes

import generate
from model import DecoderLM

N_VOCAB, P, MAX_NEW = 129, 8, 12
EOT = 128


@pytest.fixture
def lm(randomise):
    return randomise(DecoderLM(N_VOCAB, 21, 3, P, n_layer=2)).eval()


@pytest.fixture
def generate_texts(lm, ascii_tokenizer):
    def generate_texts(prefixes, batch_size=1, max_new_tokens=MAX_NEW, temperature=0.0, model=lm):
        arguments = model, torch.device("cpu"), ascii_tokenizer, list(prefixes), batch_size
        n_tokens, errors = max(map(len, prefixes), default=0) + max_new_tokens, ()
        what, hint = (
            f"prefixes {prefixes}: expected texts",
            "an empty prefix has no token: let it be <|endoftext|>",
        )
        if "" in prefixes:
            errors = IndexError, ValueError, RuntimeError
        elif n_tokens > P:
            errors = IndexError, ValueError, RuntimeError  # what a model raises for too many tokens
            what = f"{n_tokens} tokens with n_positions = {P}: expected a text"
            hint = "does the model get only the last n_positions tokens and their mask?"
        with explained(what, hint, *errors):
            texts = generate.generate(*arguments, max_new_tokens=max_new_tokens, temperature=temperature)
        assert isinstance(texts, list) and all(isinstance(text, str) for text in texts), (
            f"generate: expected a list of texts, got {texts!r:.60}: is each row decoded and returned?"
        )
        what = f"number of texts for {len(prefixes)} prefixes in batches of {batch_size}"
        check_equal(len(texts), len(prefixes), what, hint="is a last, smaller batch lost?")
        return texts

    return generate_texts


@torch.no_grad()
def with_constant_logits(model, logits: dict[int, float]):
    """Make the model give the same after every context: these logits, -100 for all other tokens."""
    model.ln.weight.zero_()
    model.ln.bias.zero_()
    model.ln.bias[0] = 1.0
    model.token_embeddings.weight[:, 0] = -100.0
    for token, logit in logits.items():
        model.token_embeddings.weight[token, 0] = logit
    return model


def check_greedy(model, prefix, text, hint="", max_new_tokens=MAX_NEW, n_padding=0):
    """Assert that each token of `text`, and its end, has the highest logit after the P tokens before it.

    n_padding: the number of tokens by which the longest prefix of its batch is longer (for the guess).
    """
    __tracebackhide__ = True
    prompt, new = [ord(c) for c in prefix] or [EOT], [ord(c) for c in text]
    after = f"greedy text after {prefix!r}"
    if len(new) > max_new_tokens:
        guess = ": is the prompt returned with it?" if prefix and text.startswith(prefix) else ""
        raise AssertionError(f"{after}: expected at most {max_new_tokens} tokens, got {len(new)}, {text!r}{guess}")
    for i in range(min(len(new) + 1, max_new_tokens)):
        logits = model(torch.tensor([(prompt + new[:i])[-P:]]))[0, -1]
        got = new[i] if i < len(new) else EOT
        if logits[got] < logits.max() - 1e-3:  # closer logits may be swapped by rounding
            best = logits.argmax().item()
            right = "the text to end" if best == EOT else repr(chr(best))
            if i == len(new):
                guess = hint or "is the last token lost, or does a row end where another does?"
                raise AssertionError(f"{after}: expected {right} as new token {i}, got the end; {guess}")
            guess = mistakes.of_greedy_text(model, prompt, new, EOT, n_padding) or hint
            guess = guess or "is each token chosen after all before?"
            raise AssertionError(f"{after}, new token {i}: expected {right}, got {chr(got)!r}; {guess}")


# --- softmax_with_temperature ---


def normalised(weights):
    weights = torch.tensor(weights)
    return weights / weights.sum(dim=-1, keepdim=True)


@pytest.mark.question("3.1", "softmax_with_temperature")
class TestSoftmaxWithTemperature:
    # Two rows of logits with the probabilities 1/8, 2/8, 5/8 and 6/9, 2/9, 1/9 at temperature 1.
    logits = normalised([[1.0, 2, 5], [6, 2, 1]]).log() + torch.tensor([[3.0], [-2.0]])

    @pytest.mark.parametrize(
        "temperature, weights",
        [
            (1.0, [[1.0, 2, 5], [6, 2, 1]]),
            (0.5, [[1.0, 4, 25], [36, 4, 1]]),  # the squares
            (2.0, [[1.0, 1.414214, 2.236068], [2.449490, 1.414214, 1]]),  # the square roots
        ],
    )
    def test_softmax_of_logits_over_temperature(self, temperature, weights):
        got = generate.softmax_with_temperature(self.logits.clone(), temperature)
        wrong = mistakes.softmax_with_temperature(self.logits, temperature)
        check_close(got, normalised(weights), f"softmax_with_temperature at T = {temperature}", wrong)

    def test_zero_is_greedy(self):
        logits = torch.tensor([[1.0, 3.0, 2.0, -5.0], [900.0, 100.0, -900.0, 899.5]])
        got = generate.softmax_with_temperature(logits, 0.0)
        what, hint = "softmax_with_temperature at T = 0", "all mass on the arg max"
        assert not got.isnan().any(), f"{what}: expected {hint}, got NaN (0/0)"
        right = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
        check_close(got, right, what, {"temperature ignored": logits.softmax(-1)}, hint)

    def test_extreme_logits_do_not_overflow(self):
        logits = torch.tensor([[1000.0, 1001.0], [-1000.0, -1002.0]])
        what, hint = "probabilities of logits near ±1000", "exp overflows: use torch's softmax"
        got = generate.softmax_with_temperature(logits, 1.0)
        check_close(got, normalised([[1.0, 2.718282], [7.389056, 1.0]]), what, hint=hint)
        got = generate.softmax_with_temperature(logits, 1e-4)
        check_close(got, [[0.0, 1.0], [1.0, 0.0]], f"{what} at T = 0.0001")

    def test_logits_are_left_alone(self):
        logits = self.logits.clone()
        for temperature in (0.0, 0.5):
            generate.softmax_with_temperature(logits, temperature)
            check_close(
                logits, self.logits, f"the logits passed in, after T = {temperature}", hint="changed in place"
            )


# --- generate ---


PREFIXES = ["To be", "a", "or not", "th", "que"]
LONG = ["The decoder reads", "nine char", "12345678", "once more unto the breach"]  # at least P = 8 tokens


@pytest.mark.question("3.1", "generate")
class TestGenerate:
    def test_greedy_text_within_the_context(self, lm, generate_texts):
        for prefix in PREFIXES:
            room = P - len(prefix)
            (text,), (again,) = (generate_texts([prefix], max_new_tokens=room) for _ in range(2))
            assert text == again, f"T = 0: expected the same text twice, got {text!r}, {again!r}: is it sampled?"
            check_greedy(lm, prefix, text, max_new_tokens=room)

    def test_the_window_slides_past_the_context(self, lm, generate_texts):
        for prefix in PREFIXES:
            (text,) = generate_texts([prefix])
            check_greedy(lm, prefix, text, hint="does every token depend on exactly the last n_positions tokens?")

    def test_prompts_as_long_as_the_context_or_longer(self, lm, generate_texts):
        for prefix in LONG:
            (text,) = generate_texts([prefix])
            check_greedy(lm, prefix, text, hint="of a long prompt the last n_positions tokens count")

    @pytest.mark.parametrize("prefixes, batch_size", [(PREFIXES, 2), (PREFIXES + LONG, 4), (LONG + PREFIXES, 20)])
    def test_batches_change_nothing(self, lm, generate_texts, prefixes, batch_size):
        texts = generate_texts(prefixes, batch_size)
        alone = [generate_texts([prefix])[0] for prefix in prefixes]
        reordered = texts != alone and sorted(texts) == sorted(alone)
        assert not reordered, "texts: expected them in the order of the prefixes, got another order"
        hint = f"batches of {batch_size}: pad on the left, mask the padding, extend the mask by each"
        if len(set(texts[:batch_size])) == 1:
            hint = "all rows of a batch get the same tokens: is one token chosen for all of them?"
        for i, (prefix, text) in enumerate(zip(prefixes, texts, strict=True)):
            batch = prefixes[i - i % batch_size :][:batch_size]
            n_padding = min(P, max(map(len, batch))) - min(P, len(prefix))
            check_greedy(lm, prefix, text, hint, n_padding=n_padding)

    def test_an_empty_prefix_starts_from_endoftext(self, lm, generate_texts):
        for prefixes in ([""], ["", "To be"], ["unto the breach", ""]):
            texts = generate_texts(prefixes, batch_size=2)
            hint = "an empty prefix is one <|endoftext|>, a real token, not padding"
            for prefix, text in zip(prefixes, texts, strict=True):
                check_greedy(lm, prefix, text, hint)

    def test_a_row_ends_at_endoftext(self, lm, generate_texts):
        # A longer embedding gives <|endoftext|> larger logits: with this one it ends rows early and late.
        lm.token_embeddings.weight.data[EOT] *= -2.5
        prefixes = [f"{a}{b}" for a in "aeiou" for b in "mnr"]
        texts = generate_texts(prefixes, batch_size=6)
        for prefix, text in zip(prefixes, texts, strict=True):
            after = f"text after {prefix!r}"
            assert "<|endoftext|>" not in text, f"{after}: expected no <|endoftext|> in it, got {text!r}"
            check_greedy(lm, prefix, text, hint="a row ends at its own <|endoftext|>, and no row at another's")
        lengths = {len(text) for text in texts}
        assert len(lengths) > 3 and MAX_NEW in lengths, (
            f"rows that end early and late: expected texts of several lengths, got {lengths}: a longer embedding "
            "of <|endoftext|> must give it a larger logit: is the output matrix tied (question 1.3)?"
        )

    def test_a_row_that_ends_at_once_is_empty(self, lm, generate_texts):
        with_constant_logits(lm, {EOT: 5.0, ord("a"): 0.0})
        check_equal(generate_texts(PREFIXES, batch_size=3), [""] * 5, "texts where <|endoftext|> comes first")

    @pytest.mark.parametrize("mode", ["training", "evaluation"])
    def test_dropout_is_off_and_the_mode_restored(self, lm, randomise, generate_texts, mode):
        model = randomise(DecoderLM(N_VOCAB, 21, 3, P, n_layer=2, p_dropout=0.5)).train(mode == "training")
        for prefix, text in zip(PREFIXES, generate_texts(PREFIXES, 5, model=model), strict=True):
            check_greedy(lm, prefix, text, hint="is dropout off while generating?")
        hint = "put the model back into the mode it was in"
        check_equal(
            model.training, mode == "training", f"model.training after generate, {mode} mode before", hint=hint
        )

    @pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
    def test_sampling_follows_the_temperature(self, lm, generate_texts, temperature):
        # 20 rows of 100 independent draws: 2000 draws, sigma of a count sqrt(2000 p (1 - p)) <= 22.4.
        weights = {"a": 5.0, "b": 2.0, "c": 1.0}  # their probabilities at temperature 1, times 8
        with_constant_logits(lm, {ord(c): math.log(w) for c, w in weights.items()})
        texts = generate_texts(["x"] * 20, 16, max_new_tokens=100, temperature=temperature)
        what = "lengths of texts of 100 new tokens, none of them <|endoftext|>"
        check_equal({len(text) for text in texts}, {100}, what)
        hint = "greedy, or one draw for all rows?"
        check_equal(len(set(texts)), 20, "number of different texts in 20 sampled rows", hint=hint)
        counts = Counter("".join(texts))
        hint = "other tokens have a logit of -100: is temperature applied after softmax?"
        check_equal(set(counts), set("abc"), "tokens sampled", hint=hint)

        def expected(t):
            total = sum(w ** (1 / t) for w in weights.values())
            return [2000 * w ** (1 / t) / total for w in weights.values()]

        what = f"how often of 2000 'a', 'b' and 'c' are sampled at T = {temperature}"
        wrong = {f"T = {t}, temperature ignored or inverted": expected(t) for t in {1.0, 0.5, 2.0} - {temperature}}
        check_close([counts[c] for c in "abc"], expected(temperature), what, wrong, atol=112)  # 5 sigma

    def test_sampled_rows_end_at_endoftext(self, lm, generate_texts):
        with_constant_logits(lm, {EOT: 0.0, ord("a"): 0.0})
        texts = generate_texts(["x", "longer"] * 200, 50, max_new_tokens=6, temperature=1.0)
        check_equal(set("".join(texts)), {"a"}, "tokens in the texts")
        # 400 draws with p = 1/2: 200 with sigma 10, 5 sigma = 50
        what = "number of empty texts of 400, <|endoftext|> with probability 1/2"
        check_close(texts.count(""), 200, what, atol=50)

    def test_two_samples_differ(self, generate_texts):
        first, second = (generate_texts(["To be"], temperature=1.5, max_new_tokens=30) for _ in range(2))
        assert first != second, f"two calls at T = 1.5: expected two texts, got twice {first}: seeded inside?"


# --- More of the interface, without points ---


def test_the_seed_of_torch_repeats_a_sample(generate_texts):
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(generate_texts(PREFIXES, 2, temperature=1.0))
        random.random(), np.random.rand()  # draws of other generators must not matter
    check_equal(texts[1], texts[0], "texts after the same torch.manual_seed (no points)")


def test_no_prefixes_no_texts(generate_texts):
    check_equal(generate_texts([]), [], "texts for no prefixes")


def test_a_literal_endoftext_in_a_prefix_is_text(lm, generate_texts):
    prefix = "a<|endoftext|>"
    check_greedy(lm, prefix, generate_texts([prefix])[0], hint="encode_ordinary reads it as plain characters")


def test_a_model_in_double_precision(lm, generate_texts):
    for prefix, text in zip(PREFIXES, generate_texts(PREFIXES, 3, model=lm.double()), strict=True):
        check_greedy(lm, prefix, text)


def test_softmax_with_temperature_keeps_excluded_tokens_out():
    got = generate.softmax_with_temperature(torch.tensor([[0.0, -torch.inf, 0.0]]), 0.7)
    check_close(got, [[0.5, 0.0, 0.5]], "probabilities where one logit is -inf")


def test_equal_logits_at_temperature_zero():
    got = generate.softmax_with_temperature(torch.tensor([[2.0, 1.0, 2.0]]), 0.0)
    check_close(got.sum(), 1.0, "the sum of probabilities")
    check_close(got[0, 1], 0.0, "the probability of the lower logit")
