"""Question 3.4: classify.py, with the small tokenizer and model of test_generate.py."""

import pytest
import torch
from checks import check_close, check_equal, check_shape
from mistakes import classify as mistakes
from mistakes.classify import last_logits

import classify
from model import DecoderLM

P, EOT = 8, 128
SHORT = ["good", "a", "or not", "bad", "the"]
TEXTS = SHORT + ["12345678", "a text longer than that"]
ATOL = 1e-4  # of the logits, which are sums of 21 products and reach 20


@pytest.fixture
def lm(randomise):
    return randomise(DecoderLM(EOT + 1, 21, 3, P, n_layer=2)).eval()


@pytest.fixture
def score(ascii_tokenizer):
    def score(model, texts, batch_size):
        got = classify.score(model, torch.device("cpu"), ascii_tokenizer, texts, batch_size)
        what = f"score of {len(texts)} texts in batches of {batch_size}"
        fewer = isinstance(got, torch.Tensor) and len(got) < len(texts)
        check_shape(got, (len(texts), EOT + 1), what, hint="is a last, smaller batch lost?" if fewer else "")
        return got

    return score


def ids_of(texts):
    return [[ord(c) for c in text] for text in texts]


# --- score ---


@pytest.mark.question("3.4", "score")
class TestScore:
    def test_logits_of_the_next_token(self, lm, score):
        for text, ids in zip(SHORT, ids_of(SHORT), strict=True):
            right, wrong = last_logits(lm, [ids]), mistakes.score_of_one_text(lm, ids)
            check_close(score(lm, [text], 1), right, f"score of {text!r}", wrong, atol=ATOL)

    @pytest.mark.parametrize("batch_size", [2, 3, 9])
    def test_rows_follow_the_texts_whatever_the_batches(self, lm, score, batch_size):
        ids, what = ids_of(SHORT), f"score of {len(SHORT)} texts in batches of {batch_size}"
        wrong = mistakes.score_in_batches(lm, ids, batch_size, pad_token=EOT)
        hint = "pad on the left, mask the padding; row i belongs to texts[i]"
        check_close(score(lm, SHORT, batch_size), last_logits(lm, ids), what, wrong, hint, atol=ATOL)

    def test_long_texts_keep_their_last_tokens(self, lm, score):
        first, last = ([ids[kept] for ids in ids_of(TEXTS)] for kept in (slice(P), slice(-P, None)))
        wrong = {"a long text keeps its first n_positions tokens: it must keep its last": last_logits(lm, first)}
        what = "score with texts longer than the context"
        check_close(score(lm, TEXTS, 4), last_logits(lm, last), what, wrong, atol=ATOL)

    @pytest.mark.parametrize("mode", ["training", "evaluation"])
    def test_dropout_is_off_and_the_mode_restored(self, lm, randomise, score, mode):
        model = randomise(DecoderLM(EOT + 1, 21, 3, P, n_layer=2, p_dropout=0.5)).train(mode == "training")
        right, hint = last_logits(lm, ids_of(SHORT)), "is dropout off while scoring?"
        check_close(score(model, SHORT, 3), right, f"score of a model in {mode} mode", hint=hint, atol=ATOL)
        what, hint = f"model.training after score, {mode} mode before", "put the model back into its mode"
        check_equal(model.training, mode == "training", what, hint=hint)


# --- classify_binary_sentiment ---


NEGATIVE, POSITIVE, N_VOCAB = 7, 3, 11


def logits_for(p_positive, others=0.0):
    """N×V logits: the two tokens of interest share their mass by p_positive (N,), the rest get `others`."""
    p = torch.tensor(p_positive, dtype=torch.float64)
    logits = torch.zeros(len(p), N_VOCAB, dtype=torch.float64) + torch.as_tensor(others).double().view(-1, 1)
    logits[:, NEGATIVE], logits[:, POSITIVE] = (1 - p).log(), p.log()
    return logits.float()


def check_labels(logits, calibrate, right, what, wrong):
    __tracebackhide__ = True
    got = classify.classify_binary_sentiment(logits, [NEGATIVE, POSITIVE], calibrate=calibrate)
    assert hasattr(got, "__iter__"), f"{what}: expected {right}, got {got!r}: is the return missing?"
    hint = "question 3.6: what may be assumed about how many reviews are positive?" if calibrate else ""
    check_equal([int(label) for label in got], right, what + (", calibrated" if calibrate else ""), wrong, hint)


@pytest.mark.question("3.4", "classify_binary_sentiment")
class TestClassifyBinarySentiment:
    def test_the_likelier_of_the_two_tokens(self):
        # All other tokens are likelier still, which must not matter.
        logits, what = logits_for([0.9, 0.2, 0.51, 0.49, 0.7], others=3.0), "p(positive) 0.9, 0.2, 0.51, 0.49, 0.7"
        check_labels(logits, False, [1, 0, 1, 0, 1], what, mistakes.LIKELIER_TOKEN)

    def test_equal_logits_are_not_positive(self):
        logits, what = logits_for([0.5, 0.6, 0.5, 0.4]), "p(positive) 0.5, 0.6, 0.5, 0.4"
        check_labels(logits, False, [0, 1, 0, 0], what, mistakes.EQUAL_LOGITS)

    def test_calibrated_boundary_above_one_half(self):
        # A model biased to "good"; the rest of the vocabulary turns the order of the rows around.
        p = [0.97, 0.55, 0.6, 0.66, 0.62, 0.51, 0.58, 0.98, 0.59]
        logits, what = logits_for(p, others=[0, 9, 2, 8, 0, 7, 1, 9, 1]), "nine p(positive), all above 0.5"
        check_labels(logits, True, [1, 0, 0, 1, 1, 0, 0, 1, 0], what, mistakes.BOUNDARY_ABOVE_ONE_HALF)

    def test_calibrated_boundary_below_one_half(self):
        # A model biased to "bad".
        logits, what = logits_for([0.1, 0.22, 0.2, 0.45, 0.15, 0.48, 0.12]), "seven p(positive), all below 0.5"
        check_labels(logits, True, [0, 1, 0, 1, 0, 1, 0], what, mistakes.BOUNDARY_BELOW_ONE_HALF)

    def test_calibration_of_an_even_number_of_rows(self):
        logits, what = logits_for([0.3, 0.9, 0.6, 0.2]), "p(positive) 0.3, 0.9, 0.6, 0.2"
        check_labels(logits, True, [0, 1, 1, 0], what, mistakes.EVEN_NUMBER)

    def test_equal_rows_are_all_negative_when_calibrated(self):
        check_labels(logits_for([0.8] * 5), True, [0] * 5, "p(positive) 0.8 five times", mistakes.EQUAL_ROWS)
        logits, what = logits_for([0.7, 0.3, 0.7, 0.7]), "p(positive) 0.7, 0.3, 0.7, 0.7"
        check_labels(logits, True, [0] * 4, what, mistakes.MOSTLY_EQUAL_ROWS)

    def test_large_logits_do_not_overflow(self):
        logits = torch.zeros(2, N_VOCAB)
        logits[0, NEGATIVE], logits[0, POSITIVE] = 300.0, 301.0
        logits[1, NEGATIVE], logits[1, POSITIVE] = -300.0, -302.0
        check_labels(logits, False, [1, 0], "logits near ±300", mistakes.LARGE_LOGITS)


# --- More of the interface, without points ---


def test_labels_are_plain_integers():
    got = classify.classify_binary_sentiment(logits_for([0.9, 0.2]), [NEGATIVE, POSITIVE])
    check_equal((type(got), [type(label) for label in got]), (list, [int, int]), "types of the labels")


def test_an_empty_text_starts_from_endoftext(lm, score):
    right = last_logits(lm, [[EOT], *ids_of(["good"])])
    check_close(score(lm, ["", "good"], 2), right, "score of an empty text", atol=ATOL)


def test_score_of_a_model_in_double_precision(lm, score):
    right = last_logits(lm, ids_of(SHORT))
    check_close(score(lm.double(), SHORT, 2), right, "score of a model in double precision", atol=ATOL)


def test_score_under_autocast(lm, score):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = score(lm, SHORT, 2)
    right = last_logits(lm, ids_of(SHORT))
    check_close(got, right, "score under bfloat16 autocast", atol=1.0, rtol=0.1)  # 8 bits of each product


def test_template_and_labels():
    assert "{text}" in classify.YELP_TEMPLATE, "YELP_TEMPLATE: expected a place {text} for the review"
    assert not classify.YELP_TEMPLATE.endswith(" "), "YELP_TEMPLATE: the space belongs to ' good' and ' bad'"
    check_equal(classify.YELP_LABEL_MAP, {0: " bad", 1: " good"}, "YELP_LABEL_MAP")
