"""Question 3.4: classify.py, with the small tokenizer and model of test_generate.py."""

import pytest
import torch
from points import check_close

import classify
from model import DecoderLM

P, EOT = 8, 128
SHORT = ["good", "a", "or not", "bad", "the"]
TEXTS = SHORT + ["12345678", "a text longer than that"]


@pytest.fixture
def lm(randomise):
    return randomise(DecoderLM(EOT + 1, 21, 3, P, n_layer=2)).eval()


def ids_of(text):
    return [ord(c) for c in text]


@torch.no_grad()
def last_logits(model, rows, masks=None):
    """The logits after each row of token ids, one at a time: N×V. Without masks no token is padding."""
    masks = masks or [[1.0] * len(row) for row in rows]
    pairs = zip(rows, masks, strict=True)
    return torch.stack([model(torch.tensor([row]), torch.tensor([mask]))[0, -1] for row, mask in pairs])


# ---------------------------------------------------------------------------------------------------------
# score


@pytest.mark.question("3.4", "score")
class TestScore:
    def score(self, model, tokenizer, texts, batch_size):
        got = classify.score(model, torch.device("cpu"), tokenizer, texts, batch_size)
        assert isinstance(got, torch.Tensor), f"score: expected a tensor N×V, got a {type(got).__name__}"
        assert tuple(got.shape) == (len(texts), EOT + 1), (
            f"score of {len(texts)} texts in batches of {batch_size}: "
            f"expected shape {(len(texts), EOT + 1)}, got {tuple(got.shape)}"
            + (": is a last, smaller batch lost?" if len(got) < len(texts) else "")
        )
        return got

    def test_logits_of_the_next_token(self, lm, ascii_tokenizer):
        for text in SHORT:
            right = last_logits(lm, [ids_of(text)])
            wrong = {
                "probabilities, not logits": right.softmax(-1),
                "log-probabilities, not logits": right.log_softmax(-1),
                "the decoder blocks are skipped": lm.token_logits(lm.ln(lm.embed(torch.tensor([ids_of(text)]))))[
                    :, -1
                ],
            }
            if len(text) > 1:
                wrong["the logits of the first position"] = last_logits(lm, [ids_of(text)[:1]])
                wrong["the logits of the last position but one"] = last_logits(lm, [ids_of(text)[:-1]])
            # atol 1e-4 here and below: the logits are sums of 21 products and reach 20
            check_close(self.score(lm, ascii_tokenizer, [text], 1), right, f"score of {text!r}", wrong, atol=1e-4)

    @pytest.mark.parametrize("batch_size", [2, 3, 9])
    def test_rows_follow_the_texts_whatever_the_batches(self, lm, ascii_tokenizer, batch_size):
        batches = [SHORT[i : i + batch_size] for i in range(0, len(SHORT), batch_size)]
        padding = [[EOT] * (max(map(len, batch)) - len(text)) for batch in batches for text in batch]
        rows = [ids_of(text) for text in SHORT]
        right = last_logits(lm, rows)
        by_length = sorted(range(len(SHORT)), key=lambda i: len(SHORT[i]))
        padded = list(zip(padding, rows, strict=True))
        wrong = {
            "the order of the texts is lost: sorted by length": right[by_length],
            "the order of the texts is lost: sorted by length, longest first": right[by_length[::-1]],
            "padding on the right: the last column is padding": last_logits(
                lm,
                [row + pad for pad, row in padded],
                [[1.0] * len(row) + [0.0] * len(pad) for pad, row in padded],
            ),
            "padding on the right, without an attention_mask": last_logits(lm, [row + pad for pad, row in padded]),
            "padding on the left without an attention_mask": last_logits(lm, [pad + row for pad, row in padded]),
        }
        check_close(
            self.score(lm, ascii_tokenizer, SHORT, batch_size),
            right,
            f"score of {len(SHORT)} texts in batches of {batch_size}",
            wrong,
            atol=1e-4,
            hint="pad on the left, mask the padding; row i belongs to texts[i]",
        )

    def test_long_texts_keep_their_last_tokens(self, lm, ascii_tokenizer):
        rows = [ids_of(text) for text in TEXTS]
        wrong = {
            "a long text must keep its last n_positions tokens, not its first": last_logits(
                lm, [r[:P] for r in rows]
            )
        }
        check_close(
            self.score(lm, ascii_tokenizer, TEXTS, 4),
            last_logits(lm, [r[-P:] for r in rows]),
            "score with texts longer than the context",
            wrong,
            atol=1e-4,
        )

    def test_dropout_is_off_and_the_mode_restored(self, lm, randomise, ascii_tokenizer):
        model = randomise(DecoderLM(EOT + 1, 21, 3, P, n_layer=2, p_dropout=0.5))
        right = last_logits(lm, [ids_of(text) for text in SHORT])
        for training in (True, False):
            got = self.score(model.train(training), ascii_tokenizer, SHORT, 3)
            check_close(
                got,
                right,
                f"score, given a model with training={training}",
                atol=1e-4,
                hint="is dropout off while scoring?",
            )
            assert model.training == training, f"score: expected training={training} restored, got the other mode"


# ---------------------------------------------------------------------------------------------------------
# classify_binary_sentiment


NEGATIVE, POSITIVE, N_VOCAB = 7, 3, 11


def logits_for(p_positive, others=0.0):
    """N×V logits: the two tokens of interest share their mass by p_positive (N,), the rest get `others`."""
    p = torch.tensor(p_positive, dtype=torch.float64)
    logits = torch.zeros(len(p), N_VOCAB, dtype=torch.float64) + torch.as_tensor(others).double().view(-1, 1)
    logits[:, NEGATIVE], logits[:, POSITIVE] = (1 - p).log(), p.log()
    return logits.float()


@pytest.mark.question("3.4", "classify_binary_sentiment")
class TestClassifyBinarySentiment:
    def check(self, logits, calibrate, right, what, mistakes):
        __tracebackhide__ = True
        got = classify.classify_binary_sentiment(logits, [NEGATIVE, POSITIVE], calibrate=calibrate)
        mistakes = {text: wrong for text, wrong in mistakes.items() if wrong != right}
        assert hasattr(got, "__iter__"), f"{what}: expected {right}, got {got!r}: is the return missing?"
        got = [int(label) for label in got]
        guess = [text for text, wrong in mistakes.items() if wrong == got]
        assert got == right, f"{what}: expected {right}, got {got}" + (
            f"; looks like: {' or '.join(guess)}" if guess else ""
        )

    def test_the_likelier_of_the_two_tokens(self):
        # All other tokens are likelier still, which must not matter.
        logits = logits_for([0.9, 0.2, 0.51, 0.49, 0.7], others=3.0)
        self.check(
            logits,
            False,
            [1, 0, 1, 0, 1],
            "p(positive) 0.9, 0.2, 0.51, 0.49, 0.7",
            {
                "tokens_of_interest is [negative, positive], here swapped": [0, 1, 0, 1, 0],
                "probabilities of the whole vocabulary, not of the two tokens": [0, 0, 0, 0, 0],
                "calibrated though calibrate is False": [1, 0, 0, 0, 1],
            },
        )

    def test_equal_logits_are_not_positive(self):
        self.check(
            logits_for([0.5, 0.6, 0.5, 0.4]),
            False,
            [0, 1, 0, 0],
            "p(positive) 0.5, 0.6, 0.5, 0.4",
            {
                "a row is 1 where p(positive) > 0.5, not >=": [1, 1, 1, 0],
                "tokens_of_interest is [negative, positive], here swapped": [0, 0, 0, 1],
            },
        )

    def test_calibrated_boundary_is_the_median(self):
        # The median is 0.6, the mean 0.68; the rest of the vocabulary turns the order of the rows around.
        logits = logits_for(
            [0.97, 0.55, 0.6, 0.66, 0.62, 0.51, 0.58, 0.98, 0.59], others=[0, 9, 2, 8, 0, 7, 1, 9, 1]
        )
        self.check(
            logits,
            True,
            [1, 0, 0, 1, 1, 0, 0, 1, 0],
            "p(positive) with the median 0.6, calibrated",
            {
                "calibrate ignored: boundary 0.5": [1] * 9,
                "the mean, or the middle of the range, in place of the median": [1, 0, 0, 0, 0, 0, 0, 1, 0],
                "a row is 1 where p(positive) > median, not >=, and not > another quantile": [
                    1,
                    0,
                    1,
                    1,
                    1,
                    0,
                    0,
                    1,
                    0,
                ],
                "probabilities of the whole vocabulary, not of the two tokens": [1, 0, 0, 0, 1, 0, 1, 0, 1],
                "tokens_of_interest is [negative, positive], here swapped": [0, 1, 0, 0, 0, 1, 1, 0, 1],
            },
        )

    def test_calibrated_boundary_below_one_half(self):
        # A model biased to "bad": all below 0.5, median 0.2, mean 0.246.
        self.check(
            logits_for([0.1, 0.22, 0.2, 0.45, 0.15, 0.48, 0.12]),
            True,
            [0, 1, 0, 1, 0, 1, 0],
            "p(positive) with the median 0.2, calibrated",
            {
                "calibrate ignored: boundary 0.5": [0] * 7,
                "the mean in place of the median": [0, 0, 0, 1, 0, 1, 0],
                "calibrated only upwards": [0] * 7,
            },
        )

    def test_an_even_number_of_rows_takes_the_lower_middle(self):
        self.check(
            logits_for([0.3, 0.9, 0.6, 0.2]),
            True,
            [0, 1, 1, 0],
            "p(positive) 0.3, 0.9, 0.6, 0.2, calibrated",
            {
                "the upper middle value: torch.median is the lower one": [0, 1, 0, 0],
                "a row is 1 where p(positive) > median, not >=": [1, 1, 1, 0],
            },
        )

    def test_equal_rows_are_all_negative_when_calibrated(self):
        self.check(
            logits_for([0.8] * 5),
            True,
            [0] * 5,
            "p(positive) 0.8 five times, calibrated",
            {
                "a row is 1 where p(positive) > median, not >=; or calibrate ignored": [1] * 5,
                "ties broken by order: equal rows must get equal labels": [0, 0, 0, 1, 1],
                "ties broken by order, the first ones positive": [1, 1, 0, 0, 0],
            },
        )
        self.check(
            logits_for([0.7, 0.3, 0.7, 0.7]),
            True,
            [0] * 4,
            "p(positive) 0.7, 0.3, 0.7, 0.7, calibrated",
            {
                "ties broken by order: half of the rows are made positive": [1, 0, 1, 0],
                "a row is 1 where p(positive) > median, not >=": [1, 0, 1, 1],
                "calibrate ignored: boundary 0.5": [1, 0, 1, 1],
            },
        )

    def test_large_logits_do_not_overflow(self):
        logits = torch.zeros(2, N_VOCAB)
        logits[0, NEGATIVE], logits[0, POSITIVE] = 300.0, 301.0
        logits[1, NEGATIVE], logits[1, POSITIVE] = -300.0, -302.0
        self.check(logits, False, [1, 0], "logits near ±300", {"exp overflows: use torch's softmax": [0, 0]})


# ---------------------------------------------------------------------------------------------------------
# More of the interface, without points


def test_labels_are_plain_integers():
    got = classify.classify_binary_sentiment(logits_for([0.9, 0.2]), [NEGATIVE, POSITIVE])
    assert isinstance(got, list) and [type(label) for label in got] == [int, int], (
        f"expected list[int], got {got!r}"
    )


def test_an_empty_text_starts_from_endoftext(lm, ascii_tokenizer):
    got = classify.score(lm, torch.device("cpu"), ascii_tokenizer, ["", "good"], 2)
    check_close(got, last_logits(lm, [[EOT], ids_of("good")]), "score of an empty text", atol=1e-4)


def test_template_and_labels():
    assert "{text}" in classify.YELP_TEMPLATE, "YELP_TEMPLATE: expected a place {text} for the review"
    assert not classify.YELP_TEMPLATE.endswith(" "), "YELP_TEMPLATE: the space belongs to ' good' and ' bad'"
    assert classify.YELP_LABEL_MAP == {0: " bad", 1: " good"}
