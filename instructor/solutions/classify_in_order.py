"""A correct classify.py in its plainest form: the texts go through the model in their order."""

import torch

YELP_TEMPLATE = "Here is a review from Yelp: {text}\nOverall, the place was"
YELP_LABEL_MAP = {0: " bad", 1: " good"}


def score(model, device, tokenizer, texts, batch_size):
    n_positions = model.position_embeddings.weight.shape[0]
    eot = tokenizer.eot_token
    was_training = model.training
    model.eval()
    logits = []
    with torch.no_grad():
        for start in range(0, len(texts), batch_size):
            rows = [tokenizer.encode_ordinary(text) or [eot] for text in texts[start : start + batch_size]]
            rows = [row[-n_positions:] for row in rows]
            longest = max(len(row) for row in rows)
            ids = torch.tensor([[eot] * (longest - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0.0] * (longest - len(row)) + [1.0] * len(row) for row in rows], device=device)
            logits.append(model(ids, mask)[:, -1])
    model.train(was_training)
    return torch.cat(logits)


def classify_binary_sentiment(logits, tokens_of_interest, calibrate=False):
    p = torch.softmax(logits[:, tokens_of_interest], dim=-1)[:, 1]
    boundary = torch.median(p) if calibrate else 0.5
    return [int(label) for label in p > boundary]
