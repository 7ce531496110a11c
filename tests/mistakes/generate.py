"""Common mistakes in generate.py (question 3.1) and what they give, for tests/test_generate.py."""

import torch
from torch.func import functional_call


def softmax_with_temperature(logits, temperature):
    p = logits.softmax(-1)
    right = (logits / temperature).softmax(-1)
    wrong = {
        "softmax over the batch, not over the vocabulary": (logits / temperature).softmax(0),
        "a log-softmax": right.log(),
    }
    if temperature != 1.0:
        wrong |= {
            "temperature ignored": p,
            "temperature applied after softmax": p / temperature,
            "temperature applied after softmax, then a second softmax": (p / temperature).softmax(-1),
            "multiplied by temperature instead of divided": (logits * temperature).softmax(-1),
        }
    return wrong


def of_greedy_text(model, prompt: list[int], new: list[int], pad_token: int, n_padding: int = 0) -> str:
    """The mistakes that would have given exactly the tokens `new` after `prompt`, as a guess; "" for none.

    n_padding: the number of padding tokens before the prompt in its batch.
    """
    P = model.position_embeddings.weight.shape[0]
    n, places, pad = len(prompt), torch.arange(P), [pad_token] * n_padding

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
        "the new tokens are masked: extend attention_mask too": (
            lambda i, ids: best(ids[-P:], ([1] * n + [0] * i)[-P:])
        ),
        "the window does not slide, it keeps the first n_positions tokens": lambda i, ids: best(ids[:P]),
        "a long prompt must keep its last tokens": lambda i, ids: best((prompt[:P] + new[:i])[-P:]),
        "the window is one token too short": lambda i, ids: best(ids[-P + 1 :]),
        "the logits of the last position but one": (
            lambda i, ids: best(ids[-P:], position=-2) if len(ids) > 1 else None
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
            "attention_mask inverted: 1 must mean a real token": (
                lambda i, ids: best((pad + ids)[-P:], ([1] * n_padding + [0] * len(ids))[-P:])
            ),
        }
    matching = [
        name
        for name, choice in mistakes.items()
        if all(choice(i, prompt + new[:i]) == token for i, token in enumerate(new))
    ]
    return "looks like: " + " or ".join(matching) if new and matching else ""
