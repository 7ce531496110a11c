"""Question 3.1: generate.py. Each text is compared with what the model gives token by token, without padding.

The model's weights are large enough for the context to matter; an untrained model only repeats its last token.
Tests marked `question` give points; those marked `advice` test what this package adds to the handout.
"""

import math
from collections import Counter

import pytest
import torch
from checks import check_close, check_equal, check_rows, explained
from mistakes import generate as mistakes

import generate

P, MAX_NEW = 16, 6


@pytest.fixture
def lm(make_lm):
    return make_lm()


@pytest.fixture
def generate_texts(lm, tokenizer, monkeypatch):
    """generate() with a correct softmax_with_temperature, so that a mistake in it costs its own points only."""
    own_softmax = generate.softmax_with_temperature

    def right_softmax(logits, temperature, *args, **kwargs):
        right = (logits / max(temperature, 1e-5)).softmax(-1)
        try:
            own = own_softmax(logits, temperature, *args, **kwargs)
        except Exception:  # whatever a wrong or unfinished one raises
            return right
        return right if isinstance(own, torch.Tensor) and own.shape == right.shape else own

    monkeypatch.setattr(generate, "softmax_with_temperature", right_softmax)

    def generate_texts(prefixes, batch_size=1, max_new_tokens=MAX_NEW, temperature=0.0, model=lm):
        arguments = model, torch.device("cpu"), tokenizer, list(prefixes), batch_size
        n_tokens = max((len(tokenizer.encode_ordinary(p)) for p in prefixes), default=0) + max_new_tokens
        what = f"{len(prefixes)} prefixes, up to {n_tokens} tokens with n_positions = {P}: expected texts"
        hint = "the model gets only the last n_positions tokens and their mask, an empty prefix is <|endoftext|>"
        fits = "" not in prefixes and n_tokens <= P
        with explained(what, hint, *(() if fits else (IndexError, ValueError, RuntimeError, AssertionError))):
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


@pytest.fixture
def check_greedy(lm, tokenizer):
    def check_greedy(prefix, text, hint="", max_new_tokens=MAX_NEW, n_padding=0, model=lm):
        """Assert that `text` has the likeliest token after all before it, again and again.

        n_padding: the number of tokens by which the longest prefix of its batch is longer (for the guess).
        """
        __tracebackhide__ = True
        prompt = tokenizer.encode_ordinary(prefix) or [tokenizer.eot_token]
        right = tokenizer.decode(mistakes.greedy(model.eval(), prompt, max_new_tokens, tokenizer.eot_token))
        if text != right:
            guess = mistakes.of_greedy_text(model, tokenizer, prefix, max_new_tokens, text, n_padding)
            guess = guess or hint or "is each token chosen after all before?"
            raise AssertionError(f"greedy text after {prefix!r}: expected {right!r}, got {text!r}; {guess}")

    return check_greedy


# --- softmax_with_temperature ---


def normalised(weights):
    weights = torch.tensor(weights)
    return weights / weights.sum(dim=-1, keepdim=True)


# Two rows of logits with the probabilities 1/8, 2/8, 5/8 and 6/9, 2/9, 1/9 at temperature 1.
LOGITS = normalised([[1.0, 2, 5], [6, 2, 1]]).log() + torch.tensor([[3.0], [-2.0]])


@pytest.mark.question("3.1", "softmax_with_temperature")
class TestSoftmaxWithTemperature:
    @pytest.mark.parametrize(
        "temperature, weights",
        [
            (1.0, [[1.0, 2, 5], [6, 2, 1]]),
            (0.5, [[1.0, 4, 25], [36, 4, 1]]),  # the squares
            (2.0, [[1.0, 1.414214, 2.236068], [2.449490, 1.414214, 1]]),  # the square roots
        ],
    )
    def test_softmax_of_logits_over_temperature(self, temperature, weights):
        got = generate.softmax_with_temperature(LOGITS.clone(), temperature)
        wrong = mistakes.softmax_with_temperature(LOGITS, temperature)
        check_close(got, normalised(weights), f"softmax_with_temperature at T = {temperature}", wrong)

    def test_zero_is_greedy(self):
        logits = torch.tensor([[1.0, 3.0, 2.0, -5.0], [900.0, 100.0, -900.0, 899.5]])
        what, hint = "softmax_with_temperature at T = 0", "all mass on the arg max"
        with explained(f"{what}: expected {hint}", "division by 0", ZeroDivisionError):
            got = generate.softmax_with_temperature(logits, 0.0)
        assert not torch.as_tensor(got).isnan().any(), f"{what}: expected {hint}, got NaN (0/0)"
        right = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
        check_close(got, right, what, {"temperature ignored": logits.softmax(-1)}, hint)

    def test_extreme_logits_do_not_overflow(self):
        logits = torch.tensor([[1000.0, 1001.0], [-1000.0, -1002.0]])
        what, hint = "probabilities of logits near ±1000", "exp overflows: use torch's softmax"
        got = generate.softmax_with_temperature(logits.clone(), 1.0)
        check_close(got, normalised([[1.0, 2.718282], [7.389056, 1.0]]), what, hint=hint)
        got = generate.softmax_with_temperature(logits.clone(), 1e-4)
        check_close(got, [[0.0, 1.0], [1.0, 0.0]], f"{what} at T = 0.0001")


@pytest.mark.advice("3.1", "softmax_with_temperature")
class TestMoreOfSoftmax:
    def test_logits_are_left_alone(self):
        for temperature in (0.0, 0.5):
            logits = LOGITS.clone()
            generate.softmax_with_temperature(logits, temperature)
            check_close(logits, LOGITS, f"the logits passed in, after T = {temperature}", hint="changed in place")


# --- generate ---

# The longest has 33 characters, twice n_positions, but only 8 tokens.
PREFIXES = ["To be or not", "a", "Once upon a time there was a time", "th", " the café"]


@pytest.mark.question("3.1", "generate")
class TestGenerate:
    @pytest.mark.parametrize("prefix", PREFIXES)
    def test_greedy_text(self, generate_texts, check_greedy, prefix):
        (text,), (again,) = generate_texts([prefix]), generate_texts([prefix])
        assert text == again, f"T = 0: expected the same text twice, got {text!r}, {again!r}: is it sampled?"
        check_greedy(prefix, text)

    @pytest.mark.parametrize("batch_size", [2, 3, 20])
    def test_batches_change_nothing(self, generate_texts, check_greedy, tokenizer, batch_size):
        texts = generate_texts(PREFIXES, batch_size)
        alone = [generate_texts([prefix])[0] for prefix in PREFIXES]
        reordered = texts != alone and sorted(texts) == sorted(alone)
        assert not reordered, "texts: expected them in the order of the prefixes, got another order"
        hint = f"batches of {batch_size}: pad on the left, mask the padding, extend the mask by each"
        if len(set(texts[:batch_size])) == 1:
            hint = "all rows of a batch get the same tokens: is one token chosen for all of them?"
        lengths = [len(tokenizer.encode_ordinary(prefix)) for prefix in PREFIXES]
        for i, (prefix, text) in enumerate(zip(PREFIXES, texts, strict=True)):
            longest = max(lengths[i - i % batch_size :][:batch_size])
            check_greedy(prefix, text, hint, n_padding=longest - lengths[i])

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_no_more_rows_at_once_than_batch_size(self, lm, generate_texts, batch_size):
        check_rows(lm, lambda: generate_texts(PREFIXES, batch_size), batch_size, len(PREFIXES))

    @pytest.mark.parametrize("token", [b" the ", b"\xa9 \xc3"], ids=["spaces", "half characters"])
    def test_the_text_is_what_all_new_tokens_decode_to(self, lm, generate_texts, tokenizer, token):
        token = tokenizer.encode_single_token(token)
        with_constant_logits(lm, {token: 5.0})
        right, alone = tokenizer.decode([token] * 4), tokenizer.decode([token])
        wrong = {
            "decoded token by token, which breaks characters of several bytes": alone * 4,
            "tokens joined by spaces": " ".join([alone] * 4),
            "the text is stripped": right.strip(),
        }
        wrong = {name: text for name, text in wrong.items() if text != right}
        (text,) = generate_texts(["To be"], max_new_tokens=4)
        check_equal(repr(text), repr(right), "text", {name: repr(text) for name, text in wrong.items()})

    @pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
    def test_sampling_follows_the_temperature(self, lm, generate_texts, temperature):
        # 200 rows of 10 independent draws: 2000 draws, sigma of a count sqrt(2000 p (1 - p)) <= 22.4.
        weights = {"a": 5.0, "b": 2.0, "c": 1.0}  # their probabilities at temperature 1, times 8
        with_constant_logits(lm, {ord(c): math.log(w) for c, w in weights.items()})
        texts = generate_texts(["x"] * 200, 64, max_new_tokens=10, temperature=temperature)
        check_equal({len(text) for text in texts}, {10}, "lengths of texts of 10 new tokens")
        # The likeliest text of all, at T = 0.5, has a probability of 0.17: 34 of 200, sigma 5.3.
        common = Counter(texts).most_common(1)[0][1]
        assert common < 64, (
            f"200 sampled rows: expected many texts, got one {common} times: greedy, or one draw for all rows?"
        )
        counts = Counter("".join(texts))
        hint = "other tokens have a logit of -100: is temperature applied after softmax?"
        check_equal(set(counts), set("abc"), "tokens sampled", hint=hint)

        def expected(t):
            total = sum(w ** (1 / t) for w in weights.values())
            return [2000 * w ** (1 / t) / total for w in weights.values()]

        what = f"how often of 2000 'a', 'b' and 'c' are sampled at T = {temperature}"
        wrong = {f"T = {t}, temperature ignored or inverted": expected(t) for t in {1.0, 0.5, 2.0} - {temperature}}
        check_close([counts[c] for c in "abc"], expected(temperature), what, wrong, atol=112)  # 5 sigma

    def test_two_samples_differ(self, generate_texts):
        first, second = (generate_texts(["a"] * 4, temperature=3.0, max_new_tokens=15) for _ in range(2))
        assert first != second, f"two calls at T = 3: expected other texts, got twice {first}: seeded inside?"


LONG = ["Once upon a time" * 5, "To be or not To be or not To be or not To be or not To", "nine char" * 3]


@pytest.mark.advice("3.1", "generate")
class TestMoreOfGenerate:
    @pytest.mark.parametrize("batch_size", [1, 3, 20])
    def test_the_window_slides_past_the_context(self, generate_texts, check_greedy, batch_size):
        hint = "every token depends on exactly the last n_positions tokens; window and mask slide together"
        prefixes, n_new = PREFIXES + LONG, P + 5
        for prefix, text in zip(prefixes, generate_texts(prefixes, batch_size, n_new), strict=True):
            check_greedy(prefix, text, hint, n_new)

    def test_an_empty_prefix_starts_from_endoftext(self, generate_texts, check_greedy):
        for prefixes in ([""], ["", "To be"], [" the time", ""]):
            hint = "an empty prefix is one <|endoftext|>, a real token, not padding"
            for prefix, text in zip(prefixes, generate_texts(prefixes, batch_size=2), strict=True):
                check_greedy(prefix, text, hint)

    def test_a_row_ends_at_endoftext(self, lm, generate_texts, check_greedy):
        with torch.no_grad():  # a longer embedding gives <|endoftext|> larger logits, here of either sign
            lm.token_embeddings.weight[-1] = 6.0 * torch.randn(21, generator=torch.Generator().manual_seed(3))
        prefixes = [f"{a}{b}" for a in "aeiou" for b in "mnr"]
        texts = generate_texts(prefixes, batch_size=6)
        hint = "a row ends at its own <|endoftext|>, and no row at another's"
        for prefix, text in zip(prefixes, texts, strict=True):
            assert "<|endoftext|>" not in text, f"text after {prefix!r}: expected no <|endoftext|>, got {text!r}"
            check_greedy(prefix, text, hint)

    def test_sampled_rows_end_at_endoftext(self, lm, generate_texts, tokenizer):
        with_constant_logits(lm, {tokenizer.eot_token: 0.0, ord("a"): 0.0})
        texts = generate_texts(["x", "longer"] * 200, 50, temperature=1.0)
        hint = "a row ends at its first <|endoftext|>, whatever is drawn after it"
        # 400 draws with p = 1/2: 200 with sigma 10, 5 sigma = 50
        what = "number of empty texts of 400, <|endoftext|> with probability 1/2"
        check_close(texts.count(""), 200, what, hint=hint, atol=50)

    @pytest.mark.parametrize("mode", ["training", "evaluation"])
    def test_dropout_is_off_and_the_mode_restored(self, make_lm, generate_texts, check_greedy, mode):
        model = make_lm(p_dropout=0.5).train(mode == "training")
        texts = generate_texts(PREFIXES, 5, model=model)
        what, hint = f"model.training after generate, {mode} mode before", "put the model back into its mode"
        check_equal(model.training, mode == "training", what, hint=hint)
        for prefix, text in zip(PREFIXES, texts, strict=True):
            check_greedy(prefix, text, hint="is dropout off while generating?", model=model)

    def test_a_literal_endoftext_in_a_prefix_is_text(self, generate_texts, check_greedy):
        (text,) = generate_texts(["a<|endoftext|>"])
        check_greedy("a<|endoftext|>", text, hint="encode_ordinary reads it as plain characters")
