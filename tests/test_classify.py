"""Question 3.4: classify.py, with the small tokenizer and model of test_generate.py.

Tests marked `question` give points; those marked `advice` test what this package adds to the handout.
"""

import pytest
import torch
from checks import check_close, check_equal, check_rows, check_shape
from mistakes import classify as mistakes
from mistakes.classify import last_logits

import classify

P = 16
# The longest has 41 characters, more than twice n_positions, but only 10 tokens.
TEXTS = ["good", "a", "or not", "Once upon a time there was a good review", " the café"]
LONG = ["Once upon a time" * 5, "a text longer than that"]
ATOL = 1e-4  # of the logits, which are sums of 21 products and reach 20


@pytest.fixture
def lm(make_lm):
    return make_lm()


@pytest.fixture
def score(tokenizer):
    def score(model, texts, batch_size):
        got = classify.score(model, torch.device("cpu"), tokenizer, texts, batch_size)
        what = f"score of {len(texts)} texts in batches of {batch_size}"
        fewer = isinstance(got, torch.Tensor) and len(got) < len(texts)
        check_shape(
            got, (len(texts), tokenizer.n_vocab), what, hint="is a last, smaller batch lost?" if fewer else ""
        )
        return got

    return score


@pytest.fixture
def ids_of(tokenizer):
    return lambda texts: [tokenizer.encode_ordinary(text) for text in texts]


# --- score ---


@pytest.mark.question("3.4", "score")
class TestScore:
    @pytest.mark.parametrize("text", TEXTS)
    def test_logits_of_the_next_token(self, lm, score, ids_of, tokenizer, text):
        right, wrong = last_logits(lm, ids_of([text])), mistakes.score_of_one_text(lm, tokenizer, text)
        check_close(score(lm, [text], 1), right, f"score of {text!r}", wrong, atol=ATOL)

    @pytest.mark.parametrize("batch_size", [2, 3, 9])
    def test_rows_follow_the_texts_whatever_the_batches(self, lm, score, ids_of, tokenizer, batch_size):
        ids, what = ids_of(TEXTS), f"score of {len(TEXTS)} texts in batches of {batch_size}"
        wrong = mistakes.score_in_batches(lm, ids, batch_size, tokenizer.eot_token)
        hint = "pad on the left, mask the padding; row i belongs to texts[i]"
        check_close(score(lm, TEXTS, batch_size), last_logits(lm, ids), what, wrong, hint, atol=ATOL)

    def test_no_more_rows_at_once_than_batch_size(self, lm, score):
        check_rows(lm, lambda: score(lm, TEXTS, 2), 2, len(TEXTS))


@pytest.mark.advice("3.4", "score")
class TestMoreOfScore:
    def test_long_texts_keep_their_last_tokens(self, lm, score, ids_of):
        first, last = ([ids[kept] for ids in ids_of(TEXTS + LONG)] for kept in (slice(P), slice(-P, None)))
        wrong = {"a long text keeps its first n_positions tokens: it must keep its last": last_logits(lm, first)}
        what = "score with texts longer than the context"
        check_close(score(lm, TEXTS + LONG, 4), last_logits(lm, last), what, wrong, atol=ATOL)

    def test_an_empty_text_starts_from_endoftext(self, lm, score, ids_of, tokenizer):
        right = last_logits(lm, [[tokenizer.eot_token], *ids_of(["good"])])
        check_close(score(lm, ["", "good"], 2), right, "score of an empty text", atol=ATOL)

    @pytest.mark.parametrize("mode", ["training", "evaluation"])
    def test_dropout_is_off_and_the_mode_restored(self, make_lm, score, ids_of, mode):
        model = make_lm(p_dropout=0.5)
        right, hint = last_logits(model, ids_of(TEXTS)), "is dropout off while scoring?"
        got = score(model.train(mode == "training"), TEXTS, 3)
        check_close(got, right, f"score of a model in {mode} mode", hint=hint, atol=ATOL)
        what, hint = f"model.training after score, {mode} mode before", "put the model back into its mode"
        check_equal(model.training, mode == "training", what, hint=hint)


# --- classify_binary_sentiment ---


NEGATIVE, POSITIVE, N_VOCAB = 7, 3, 11


def check_labels(p, others, calibrate, right):
    """Assert that rows with these p(positive), and this logit of all other tokens, get the labels `right`.

    None stands for either label.
    """
    __tracebackhide__ = True
    others = others if isinstance(others, list) else [others] * len(p)
    two = torch.tensor(p, dtype=torch.float64)
    logits = torch.tensor(others).double().view(-1, 1).repeat(1, N_VOCAB)
    logits[:, NEGATIVE], logits[:, POSITIVE] = (1 - two).log(), two.log()
    got = classify.classify_binary_sentiment(logits.float(), [NEGATIVE, POSITIVE], calibrate=calibrate)
    what = f"labels for p(positive) {p}" + (", calibrated" if calibrate else "")
    assert hasattr(got, "__iter__"), f"{what}: expected {right}, got {got!r}: is the return missing?"
    check_equal(len(list(got)), len(p), f"number of {what}")

    def masked(labels):
        return [None if free is None else int(label) for label, free in zip(labels, right, strict=True)]

    wrong = {name: masked(labels) for name, labels in mistakes.labels(p, others, calibrate).items()}
    hint = "question 3.6: what may be assumed about how many reviews are positive?" if calibrate else ""
    check_equal(masked(got), right, what, wrong, hint)


NINE = [0.97, 0.55, 0.6, 0.66, 0.62, 0.51, 0.58, 0.98, 0.59]


@pytest.mark.question("3.4", "classify_binary_sentiment")
class TestClassifyBinarySentiment:
    # A calibrated boundary is a middle value: what a row with exactly that value gets is the solution's choice.
    @pytest.mark.parametrize(
        "p, others, calibrate, right",
        [
            # All other tokens are likelier still, which must not matter.
            ([0.9, 0.2, 0.51, 0.49, 0.7], 3, False, [1, 0, 1, 0, 1]),
            # A model biased to "good"; the other tokens turn the order of the rows around.
            (NINE, [0, 9, 2, 8, 0, 7, 1, 9, 1], True, [1, 0, None, 1, 1, 0, 0, 1, 0]),
            # A model biased to "bad".
            ([0.1, 0.22, 0.2, 0.45, 0.15, 0.48, 0.12], 0, True, [0, 1, None, 1, 0, 1, 0]),
            ([0.3, 0.9, 0.6, 0.2, 0.8, 0.1], 0, True, [None, 1, None, 0, 1, 0]),
        ],
        ids=["not calibrated", "boundary above 0.5", "boundary below 0.5", "an even number of rows"],
    )
    def test_labels(self, p, others, calibrate, right):
        check_labels(p, others, calibrate, right)

    def test_large_logits_do_not_overflow(self):
        logits = torch.zeros(2, N_VOCAB)
        logits[0, NEGATIVE], logits[0, POSITIVE] = 300.0, 301.0
        logits[1, NEGATIVE], logits[1, POSITIVE] = -300.0, -302.0
        got = [int(x) for x in classify.classify_binary_sentiment(logits, [NEGATIVE, POSITIVE])]
        check_equal(got, [1, 0], "labels for logits near ±300", hint="exp overflows: use torch's softmax")


@pytest.mark.advice("3.4", "classify_binary_sentiment")
class TestMoreOfClassifyBinarySentiment:
    @pytest.mark.parametrize(
        "p, calibrate, right",
        [
            ([0.5, 0.6, 0.5, 0.4], False, [0, 1, 0, 0]),
            (NINE, True, [1, 0, 0, 1, 1, 0, 0, 1, 0]),
            ([0.3, 0.9, 0.6, 0.2], True, [0, 1, 1, 0]),
            ([0.8] * 5, True, [0] * 5),
            ([0.7, 0.3, 0.7, 0.7], True, [0] * 4),
        ],
    )
    def test_rows_at_the_boundary_are_negative(self, p, calibrate, right):
        check_labels(p, 0, calibrate, right)

    def test_template_and_labels(self):
        assert "{text}" in classify.YELP_TEMPLATE, "YELP_TEMPLATE: expected a place {text} for the review"
        assert not classify.YELP_TEMPLATE.endswith(" "), "YELP_TEMPLATE: the space belongs to ' good' and ' bad'"
        check_equal(classify.YELP_LABEL_MAP, {0: " bad", 1: " good"}, "YELP_LABEL_MAP")
