"""Question 3.1: generate.py.

The tokenizer of these tests has one token per ASCII character, so that a text tells which tokens were chosen:
each of them is held to what the model says after the last n_positions tokens. The model's weights are large
enough for the context to matter; an untrained model only repeats its last token.
"""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from points import check_close
from torch.func import functional_call

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
        try:
            texts = generate.generate(*arguments, max_new_tokens=max_new_tokens, temperature=temperature)
        except (IndexError, ValueError) as error:  # what a model raises for too many tokens
            n_tokens = max(map(len, prefixes)) + max_new_tokens
            if n_tokens <= P:
                raise
            raise AssertionError(
                f"{n_tokens} tokens with n_positions = {P}: expected a text, got {error!r}; does the model get "
                "only the last n_positions tokens and their mask?"
            ) from error
        assert isinstance(texts, list) and all(isinstance(text, str) for text in texts), (
            f"generate: expected a list of texts, got {texts!r:.60}: is each row decoded and returned?"
        )
        assert len(texts) == len(prefixes), (
            f"{len(prefixes)} prefixes in batches of {batch_size}: expected as many texts, got {len(texts)}: "
            "is a last, smaller batch lost?"
        )
        return texts

    return generate_texts


@torch.no_grad()
def with_constant_logits(model, logits: dict[int, float]):
    """Make the model say the same after every context: these logits, -100 for all other tokens."""
    model.ln.weight.zero_()
    model.ln.bias.zero_()
    model.ln.bias[0] = 1.0
    model.token_embeddings.weight[:, 0] = -100.0
    for token, logit in logits.items():
        model.token_embeddings.weight[token, 0] = logit
    return model


def check_greedy(model, prefix, text, hint="", max_new_tokens=MAX_NEW, n_padding=0):
    """Assert that each token of `text`, and its end, has the highest logit after the P tokens before it.

    n_padding: the tokens by which the longest prefix of its batch is longer, for the guess alone.
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
        if logits[got] < logits.max() - 1e-3:  # so near to each other, rounding may choose either
            best = logits.argmax().item()
            right = "its end" if best == EOT else repr(chr(best))
            if i == len(new):
                guess = hint or "is the last token lost, or does a row end where another does?"
                raise AssertionError(f"{after}: expected {right} as new token {i}, got its end; {guess}")
            guess = looks_like(model, prompt, new, n_padding) or hint or "is each token chosen after all before?"
            raise AssertionError(f"{after}, new token {i}: expected {right}, got {chr(got)!r}; {guess}")


def looks_like(model, prompt, new, n_padding=0) -> str:
    """The usual mistakes that would have given exactly the tokens `new`."""
    n, places, pad = len(prompt), torch.arange(P), [EOT] * n_padding

    def best(ids, mask=None, position=-1, places=places):
        """The arg max at a position, with other rows of the position embeddings where asked."""
        parameters = {"position_embeddings.weight": model.position_embeddings.weight[places]}
        mask = None if mask is None else torch.tensor([mask], dtype=torch.float)
        return functional_call(model, parameters, (torch.tensor([ids]), mask))[0, position].argmax().item()

    def without_blocks(ids):
        return model.token_logits(model.ln(model.embed(torch.tensor([ids]))))[0, -1].argmax().item()

    too_low = torch.where(places < n, places, places - 1)
    too_high = torch.where(places < n, places, places + 1).clamp(max=P - 1)
    mistakes = {  # name -> what it chooses as new token i, after all ids before it
        "the prompt is returned with the continuation": lambda i, ids: (prompt + new)[i],
        "the decoder blocks are skipped": lambda i, ids: without_blocks(ids[-P:]),
        "the model sees the last token alone": lambda i, ids: best(ids[-1:]),
        "the new tokens are not given to the model": lambda i, ids: best(prompt[-P:]),
        "the new tokens are masked: extend attention_mask too": lambda i, ids: best(
            ids[-P:], ([1] * n + [0] * i)[-P:]
        ),
        "the window does not slide, it keeps the first n_positions tokens": lambda i, ids: best(ids[:P]),
        "a long prompt must keep its last tokens, not its first": lambda i, ids: best((prompt[:P] + new[:i])[-P:]),
        "the window is one token too short": lambda i, ids: best(ids[-P + 1 :]),
        "the logits of the last position but one": lambda i, ids: (
            best(ids[-P:], position=-2) if len(ids) > 1 else None
        ),
        "positions of the new tokens are one too low": lambda i, ids: best(ids[-P:], places=too_low),
        "positions of the new tokens are one too high": lambda i, ids: best(ids[-P:], places=too_high),
    }
    if n_padding:
        mistakes |= {
            "padding on the right: the last column is padding": lambda i, ids: best(
                (ids[:n] + pad + ids[n:])[-P:], ([1] * n + [0] * n_padding + [1] * i)[-P:]
            ),
            "padding without an attention_mask": lambda i, ids: best((pad + ids)[-P:]),
            "attention_mask inverted: 1 is a real token": lambda i, ids: best(
                (pad + ids)[-P:], ([1] * n_padding + [0] * len(ids))[-P:]
            ),
        }
    matching = [
        text
        for text, choice in mistakes.items()
        if all(choice(i, prompt + new[:i]) == token for i, token in enumerate(new))
    ]
    return "looks like: " + " or ".join(matching) if new and matching else ""


# ---------------------------------------------------------------------------------------------------------
# softmax_with_temperature


@pytest.mark.question("3.1", "softmax_with_temperature")
class TestSoftmaxWithTemperature:
    # Two rows of logits with the probabilities 1/8, 2/8, 5/8 and 6/9, 2/9, 1/9 at temperature 1.
    p = torch.tensor([[1 / 8, 2 / 8, 5 / 8], [6 / 9, 2 / 9, 1 / 9]])
    logits = p.log() + torch.tensor([[3.0], [-2.0]])

    @pytest.mark.parametrize(
        "temperature, right",
        [
            (1.0, [[1 / 8, 2 / 8, 5 / 8], [6 / 9, 2 / 9, 1 / 9]]),
            (
                0.5,
                [[1 / 30, 4 / 30, 25 / 30], [36 / 41, 4 / 41, 1 / 41]],
            ),  # the squares of 1, 2, 5 and 6, 2, 1
            (2.0, [[0.215003, 0.304060, 0.480762], [0.503568, 0.290740, 0.205584]]),  # their square roots
        ],
    )
    def test_softmax_of_logits_over_temperature(self, temperature, right):
        if temperature == 2.0:  # rows sum to 1; the roots are 1, 1.414214, 2.236068 and 2.449490, 1.414214, 1
            roots = torch.tensor([[1.0, 2.0, 5.0], [6.0, 2.0, 1.0]]) ** 0.5
            right = roots / torch.tensor([[4.650282], [4.863703]])
        wrong = {
            "softmax over the batch, not over the vocabulary": (self.logits / temperature).softmax(0),
            "a log-softmax": torch.as_tensor(right).log(),
        }
        if temperature != 1.0:
            wrong |= {
                "temperature ignored": self.p,
                "temperature applied after softmax": self.p / temperature,
                "temperature applied after softmax, then a second softmax": (self.p / temperature).softmax(-1),
                "multiplied by temperature in place of divided": (self.logits * temperature).softmax(-1),
            }
        got = generate.softmax_with_temperature(self.logits.clone(), temperature)
        check_close(got, right, f"softmax_with_temperature at T = {temperature}", wrong)

    def test_zero_is_greedy(self):
        logits = torch.tensor([[1.0, 3.0, 2.0, -5.0], [900.0, 100.0, -900.0, 899.5]])
        got = generate.softmax_with_temperature(logits, 0.0)
        assert not got.isnan().any(), (
            "softmax_with_temperature at T = 0: expected all mass on the arg max, got NaN (0/0)"
        )
        right = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
        check_close(
            got,
            right,
            "softmax_with_temperature at T = 0",
            {"temperature ignored": logits.softmax(-1)},
            hint="all mass on the arg max",
        )

    def test_extreme_logits_do_not_overflow(self):
        logits = torch.tensor([[1000.0, 1001.0], [-1000.0, -1002.0]])
        right = torch.tensor([[1.0, 2.718282], [7.389056, 1.0]]) / torch.tensor([[3.718282], [8.389056]])
        got = generate.softmax_with_temperature(logits, 1.0)
        check_close(got, right, "probabilities of logits near ±1000", hint="exp overflows: use torch's softmax")
        got = generate.softmax_with_temperature(logits, 1e-4)
        check_close(
            got, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "probabilities of logits near ±1000 at T = 0.0001"
        )

    def test_logits_are_left_alone(self):
        logits = self.logits.clone()
        for temperature in (0.0, 0.5):
            generate.softmax_with_temperature(logits, temperature)
            check_close(logits, self.logits, f"the logits given, after T = {temperature}", hint="changed in place")


# ---------------------------------------------------------------------------------------------------------
# generate


PREFIXES = ["To be", "a", "or not", "th", "que"]
LONG = [
    "The decoder reads",
    "nine char",
    "12345678",
    "once more unto the breach",
]  # as long as P = 8, or longer


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
        assert not reordered, (
            "texts: expected one for each prefix in its order, got the order of the prefixes lost"
        )
        hint = f"batches of {batch_size}: pad on the left, mask the padding, extend the mask by each"
        if len(set(texts[:batch_size])) == 1:
            hint = "all rows of a batch get the same tokens: is one token chosen for all of them?"
        for i, (prefix, text) in enumerate(zip(prefixes, texts, strict=True)):
            batch = prefixes[i - i % batch_size :][:batch_size]
            n_padding = min(P, max(map(len, batch))) - min(P, len(prefix))
            check_greedy(lm, prefix, text, hint, n_padding=n_padding)

    def test_an_empty_prefix_starts_from_endoftext(self, lm, generate_texts):
        for prefixes in ([""], ["", "To be"], ["unto the breach", ""]):
            try:
                texts = generate_texts(prefixes, batch_size=2)
            except RuntimeError as error:
                raise AssertionError(
                    f"prefixes {prefixes}: expected texts, got {type(error).__name__}: an empty prefix has no "
                    "token, let it start from <|endoftext|>"
                ) from error
            for prefix, text in zip(prefixes, texts, strict=True):
                check_greedy(
                    lm, prefix, text, hint="an empty prefix is one <|endoftext|>, a real token, not padding"
                )

    def test_a_row_ends_at_endoftext(self, lm, generate_texts):
        # A longer embedding gives <|endoftext|> larger logits: with this one it ends rows early and late.
        lm.token_embeddings.weight.data[EOT] *= -2.5
        prefixes = [f"{a}{b}" for a in "aeiou" for b in "mnr"]
        texts = generate_texts(prefixes, batch_size=6)
        for prefix, text in zip(prefixes, texts, strict=True):
            assert "<|endoftext|>" not in text, (
                f"text after {prefix!r}: expected no <|endoftext|> in it, got {text!r}"
            )
            check_greedy(lm, prefix, text, hint="a row ends at its own <|endoftext|>, and no row at another's")
        lengths = {len(text) for text in texts}
        assert len(lengths) > 3 and MAX_NEW in lengths, (
            f"rows that end early and late: expected texts of several lengths, got {lengths}: a longer embedding "
            "of <|endoftext|> must give it a larger logit: is the output matrix tied (question 1.3)?"
        )
        with_constant_logits(lm, {EOT: 5.0, ord("a"): 0.0})
        texts = generate_texts(prefixes, batch_size=6)
        assert set(texts) == {""}, f"<|endoftext|> first: expected empty texts, got {sorted(set(texts))}"

    @pytest.mark.parametrize("mode", ["training", "evaluation"])
    def test_dropout_is_off_and_the_mode_restored(self, lm, randomise, generate_texts, mode):
        model = randomise(DecoderLM(N_VOCAB, 21, 3, P, n_layer=2, p_dropout=0.5)).train(mode == "training")
        for prefix, text in zip(PREFIXES, generate_texts(PREFIXES, 5, model=model), strict=True):
            check_greedy(lm, prefix, text, hint="is dropout off while generating?")
        assert model.training == (mode == "training"), (
            f"a model found in {mode} mode: expected it restored, got the other"
        )

    @pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
    def test_sampling_follows_the_temperature(self, lm, generate_texts, temperature):
        # 20 rows of 100 independent draws: 2000 draws, sigma of a count sqrt(2000 p (1 - p)) <= 22.4.
        weights = {"a": 5.0, "b": 2.0, "c": 1.0}  # their probabilities at temperature 1, times 8
        with_constant_logits(lm, {ord(c): float(np.log(w)) for c, w in weights.items()})
        texts = generate_texts(["x"] * 20, 16, max_new_tokens=100, temperature=temperature)
        lengths = {len(text) for text in texts}
        assert lengths == {100}, f"100 new tokens, none of them <|endoftext|>: expected 100 each, got {lengths}"
        n = len(set(texts))
        assert n == 20, f"20 sampled rows: expected 20 different texts, got {n}: greedy, or one draw for all rows?"
        counts = Counter("".join(texts))
        impossible = set(counts) - set("abc")
        assert not impossible, f"tokens of logit -100: expected none, got {impossible}: temperature after softmax?"

        def share(c, t):
            return weights[c] ** (1 / t) / sum(w ** (1 / t) for w in weights.values())

        for c in "abc":
            p = share(c, temperature)
            if abs(counts[c] - 2000 * p) > 5 * (2000 * p * (1 - p)) ** 0.5:
                as_if = [t for t in {1.0, 0.5, 2.0} - {temperature} if abs(counts[c] - 2000 * share(c, t)) < 112]
                raise AssertionError(
                    f"T = {temperature}: expected {c!r} about {2000 * p:.0f} times in 2000, got {counts[c]}"
                    + (f"; looks like: T = {as_if[0]}, temperature ignored or inverted" if as_if else "")
                )

    def test_sampled_rows_end_at_endoftext(self, lm, generate_texts):
        with_constant_logits(lm, {EOT: 0.0, ord("a"): 0.0})
        texts = generate_texts(["x", "longer"] * 200, 50, max_new_tokens=6, temperature=1.0)
        assert set("".join(texts)) == {"a"}, f"texts: expected only 'a' in them, got {sorted(set(''.join(texts)))}"
        empty = texts.count("")  # 400 draws with p = 1/2: 200 with sigma 10, 5 sigma = 50
        assert abs(empty - 200) < 50, (
            f"<|endoftext|> with probability 1/2: expected about 200 of 400 empty, got {empty}"
        )

    def test_sampling_draws_anew(self, lm, generate_texts):
        first, second = (generate_texts(["To be"], temperature=1.5, max_new_tokens=30) for _ in range(2))
        assert first != second, (
            f"two calls at T = 1.5: expected different texts, got twice {first}: seeded inside?"
        )


# ---------------------------------------------------------------------------------------------------------
# More of the interface, without points


def test_the_seed_of_torch_repeats_a_sample(lm, generate_texts):
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(generate_texts(PREFIXES, 2, temperature=1.0))
        random.random(), np.random.rand()  # draws of other generators must not matter
    assert texts[0] == texts[1], "the same torch.manual_seed: expected the same texts (no points)"


def test_no_prefixes_no_texts(generate_texts):
    assert generate_texts([]) == []


def test_a_literal_endoftext_in_a_prefix_is_text(lm, generate_texts):
    prefix = "a<|endoftext|>"
    check_greedy(lm, prefix, generate_texts([prefix])[0], hint="encode_ordinary reads it as plain characters")


def test_softmax_with_temperature_keeps_excluded_tokens_out():
    got = generate.softmax_with_temperature(torch.tensor([[0.0, -torch.inf, 0.0]]), 0.7)
    check_close(got, [[0.5, 0.0, 0.5]], "probabilities where one logit is -inf")


def test_equal_logits_at_temperature_zero():
    got = generate.softmax_with_temperature(torch.tensor([[2.0, 1.0, 2.0]]), 0.0)
    check_close(got.sum(), 1.0, "the sum of probabilities")
    check_close(got[0, 1], 0.0, "the probability of the lower logit")
