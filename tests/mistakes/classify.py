"""Common mistakes in classify.py (question 3.4) and what they give, for tests/test_classify.py."""

import math

import torch

# --- score: `rows` are the token ids of each text ---


@torch.no_grad()
def last_logits(model, rows, masks=None):
    """The logits after each row of token ids, one at a time: N×V. Without masks no token is padding."""
    masks = masks or [[1.0] * len(row) for row in rows]
    pairs = zip(rows, masks, strict=True)
    return torch.stack([model(torch.tensor([row]), torch.tensor([mask]))[0, -1] for row, mask in pairs])


@torch.no_grad()
def score_of_one_text(model, tokenizer, text):
    P, row = len(model.position_embeddings.weight), tokenizer.encode_ordinary(text)
    right = last_logits(model, [row])
    wrong = {
        "probabilities, not logits": right.softmax(-1),
        "log-probabilities, not logits": right.log_softmax(-1),
        "the decoder blocks are skipped": model.token_logits(model.ln(model.embed(torch.tensor([row]))))[:, -1],
    }
    if len(text) > P:
        name = "encode(text)[-P:], not encode(text[-P:]): n_positions counts tokens, not characters"
        wrong[name] = last_logits(model, [tokenizer.encode_ordinary(text[-P:])])
    if len(row) > 1:
        wrong["the logits of the first position"] = last_logits(model, [row[:1]])
        wrong["the logits of the last position but one"] = last_logits(model, [row[:-1]])
    return wrong


def score_in_batches(model, rows, batch_size, pad_token):
    right = last_logits(model, rows)
    shortest_first = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    longest = [max(map(len, rows[i - i % batch_size :][:batch_size])) for i in range(len(rows))]
    padding = [[pad_token] * (n - len(row)) for n, row in zip(longest, rows, strict=True)]
    left = [pad + row for pad, row in zip(padding, rows, strict=True)]
    right_padded = [row + pad for pad, row in zip(padding, rows, strict=True)]
    masks = [[1.0] * len(row) + [0.0] * len(pad) for pad, row in zip(padding, rows, strict=True)]
    return {
        "the order of the texts is lost: sorted by length": right[shortest_first],
        "the order of the texts is lost: sorted by length, longest first": right[longest_first],
        "padding on the right: the last column is padding": last_logits(model, right_padded, masks),
        "padding on the right, without an attention_mask": last_logits(model, right_padded),
        "padding on the left without an attention_mask": last_logits(model, left),
    }


# --- classify_binary_sentiment ---


def labels(p, others, calibrate):
    """What each mistake gives. p: p(positive) of each row; others: the logit of the row's nine other tokens."""

    def above(values, calibrate=calibrate):
        boundary = sorted(values)[(len(values) - 1) // 2] if calibrate else 0.5
        return [int(value > boundary) for value in values]

    n, ordered, by_order = len(p), sorted(p), sorted(range(len(p)), key=lambda i: p[i])
    middle = (n - 1) // 2
    median = ordered[middle]
    wrong = {
        "calibrate is ignored" if calibrate else "calibrated though calibrate is False": above(p, not calibrate),
        "tokens_of_interest is [negative, positive], here swapped": above([1 - x for x in p]),
        "probabilities of the whole vocabulary, not of the two tokens": (
            above([x / (1 + 9 * math.exp(other)) for x, other in zip(p, others, strict=True)])
        ),
        "ties counted as positive: compare with >, not >=": [int(x >= (median if calibrate else 0.5)) for x in p],
    }
    if calibrate:
        wrong |= {
            "the boundary is the mean, which a few extreme rows can move": [int(x > sum(p) / n) for x in p],
            "the boundary is the middle of the range": [int(x > (ordered[0] + ordered[-1]) / 2) for x in p],
            "calibrated only upwards": [int(x > max(0.5, median)) for x in p],
            "the boundary is the upper middle value": [int(x > ordered[n // 2]) for x in p],
            "ties broken by order: equal rows get equal labels": [
                int(by_order.index(i) > middle) for i in range(n)
            ],
        }
    return wrong
