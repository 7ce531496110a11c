"""Common mistakes in classify.py (question 3.4) and what they give, for tests/test_classify.py."""

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


# --- classify_binary_sentiment: the labels that each mistake gives, by the rows' p(positive) ---
# None stands for a row whose p(positive) is a middle value: either label will do.

SWAPPED = "tokens_of_interest is [negative, positive], here swapped"
WHOLE_VOCABULARY = "probabilities of the whole vocabulary, not of the two tokens"
NOT_CALIBRATED = "calibrate ignored: boundary 0.5"
OUTLIERS = "a boundary that a few extreme rows can move, so that most rows get one label"

LIKELIER_TOKEN = {  # 0.9, 0.2, 0.51, 0.49, 0.7
    SWAPPED: [0, 1, 0, 1, 0],
    WHOLE_VOCABULARY: [0, 0, 0, 0, 0],
    "calibrated though calibrate is False": [1, 0, 0, 0, 1],
}
BOUNDARY_ABOVE_ONE_HALF = {  # 0.97, 0.55, 0.6, 0.66, 0.62, 0.51, 0.58, 0.98, 0.59
    NOT_CALIBRATED: [1, 1, None, 1, 1, 1, 1, 1, 1],
    f"{OUTLIERS}: the mean, or the middle of the range": [1, 0, None, 0, 0, 0, 0, 1, 0],
    WHOLE_VOCABULARY: [1, 0, None, 0, 1, 0, 1, 0, 1],
    SWAPPED: [0, 1, None, 0, 0, 1, 1, 0, 1],
}
BOUNDARY_BELOW_ONE_HALF = {  # 0.1, 0.22, 0.2, 0.45, 0.15, 0.48, 0.12
    f"{NOT_CALIBRATED}, or calibrated only upwards": [0, 0, None, 0, 0, 0, 0],
    f"{OUTLIERS}: the mean": [0, 0, None, 1, 0, 1, 0],
}
LARGE_LOGITS = {"exp overflows: use torch's softmax": [0, 0]}


def ties(p, calibrate):
    """p: p(positive) of each row, some of which equal the boundary."""
    middle = (len(p) - 1) // 2
    order = sorted(range(len(p)), key=lambda i: p[i])
    boundary = p[order[middle]] if calibrate else 0.5
    return {
        "ties counted as positive: compare with >, not >=": [int(x >= boundary) for x in p],
        "the upper middle value": [int(x > p[order[len(p) // 2]]) for x in p],
        "ties broken by order: equal rows must get equal labels": [
            int(order.index(i) > middle) for i in range(len(p))
        ],
        NOT_CALIBRATED: [int(x > 0.5) for x in p],
    }
