"""Common mistakes in generate.py (question 3.1) and what they give, for tests/test_generate.py."""

from functools import partial

import torch


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


def continued(prompt: list[int], n_new: int, choose, end: int | None = None) -> list[int]:
    """The n_new tokens after the prompt, or those before the first `end`; choose(i, ids) gives new token i."""
    new = []
    for i in range(n_new):
        token = choose(i, prompt + new)
        if token == end:
            break
        new.append(token)
    return new


@torch.no_grad()
def likeliest(model, ids, mask=None, position=-1):
    """The arg max of the logits at a position."""
    mask = None if mask is None else torch.tensor([mask], dtype=torch.float)
    return model(torch.tensor([ids]), mask)[0, position].argmax().item()


def greedy(model, prompt: list[int], n_new: int, end: int | None = None) -> list[int]:
    """The correct tokens: each is the likeliest one after the last n_positions tokens."""
    P = len(model.position_embeddings.weight)
    return continued(prompt, n_new, lambda i, ids: likeliest(model, ids[-P:]), end)


def of_greedy_text(model, tokenizer, prefix, n_new, text, n_padding=0) -> str:
    """The mistakes that would have given exactly `text` after `prefix`, as a guess; "" for none.

    n_padding: the number of padding tokens before the prompt in its batch.
    """
    P, end = len(model.position_embeddings.weight), tokenizer.eot_token
    prompt = tokenizer.encode_ordinary(prefix) or [end]
    characters = tokenizer.encode_ordinary(prefix[-P:])
    n, pad = len(prompt), [end] * n_padding

    best = partial(likeliest, model)

    def without_blocks(ids):
        return model.token_logits(model.ln(model.embed(torch.tensor([ids]))))[0, -1].argmax().item()

    choices = {  # name -> what it chooses as new token i, after all ids before it
        "encode(text)[-P:], not encode(text[-P:]): n_positions counts tokens, not characters": (
            lambda i, ids: best((characters + ids[n:])[-P:])
        ),
        "the decoder blocks are skipped": lambda i, ids: without_blocks(ids[-P:]),
        "the model sees the last token alone": lambda i, ids: best(ids[-1:]),
        "the new tokens are not given to the model": lambda i, ids: best(prompt[-P:]),
        "the new tokens are masked: extend attention_mask too": (
            lambda i, ids: best(ids[-P:], ([1] * n + [0] * i)[-P:])
        ),
        "the window does not slide, it keeps the first n_positions tokens": lambda i, ids: best(ids[:P]),
        "a long prompt must keep its last tokens": lambda i, ids: best((prompt[:P] + ids[n:])[-P:]),
        "a long prompt is cut to n_positions - max_new_tokens tokens: keep its last n_positions": (
            lambda i, ids: best((prompt[-max(1, P - n_new) :] + ids[n:])[-P:])
        ),
        "the window is one token too short": lambda i, ids: best(ids[-P + 1 :]),
        "the logits of the last position but one": (
            lambda i, ids: best(ids[-P:], position=-2) if len(ids) > 1 else None
        ),
    }
    if n_padding:
        choices |= {
            "padding on the right: the last column is padding": lambda i, ids: best(
                (ids[:n] + pad + ids[n:])[-P:], ([1] * n + [0] * n_padding + [1] * i)[-P:]
            ),
            "padding on the right, without an attention_mask": lambda i, ids: best((ids[:n] + pad + ids[n:])[-P:]),
            "padding without an attention_mask": lambda i, ids: best((pad + ids)[-P:]),
            "attention_mask inverted: 1 must mean a real token": (
                lambda i, ids: best((pad + ids)[-P:], ([1] * n_padding + [0] * len(ids))[-P:])
            ),
        }
    right, longer = greedy(model, prompt, n_new, end), greedy(model, prompt, n_new + 1, end)
    texts = {
        "the prompt is returned with the continuation": tokenizer.decode(prompt + right),
        "one token more than max_new_tokens": tokenizer.decode(longer),
        "one token less than max_new_tokens": tokenizer.decode(right[:-1]),
        "<|endoftext|> belongs to no text": tokenizer.decode([*right, end]),
        "generation ends where the window is full": tokenizer.decode(right[: P - n]),
        "the text is stripped: return it as it is decoded": tokenizer.decode(right).strip(),
        "tokens joined by spaces: decode all of them at once": " ".join(tokenizer.decode([t]) for t in right),
    }
    matching = [name for name, wrong in texts.items() if wrong == text]
    for name, choose in choices.items():
        try:
            if tokenizer.decode(continued(prompt, n_new, choose, end)) == text:
                matching.append(name)
        except (IndexError, RuntimeError, ValueError, TypeError):  # a mistake that fails here
            pass
    return f"looks like: {' or '.join(matching)}" if text and matching else ""
