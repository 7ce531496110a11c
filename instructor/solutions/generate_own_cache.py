"""A correct generate.py with a key-value cache that does not call the model's attention.

Positions are absolute: when the window is full and slides, every token gets another position, so from then on
each step reads the whole window.
"""

import torch


def softmax_with_temperature(logits: torch.Tensor, temperature: float):
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    return torch.softmax(logits / temperature, dim=-1)


def read(model, cache, new_ids, mask):
    """The logits after new_ids (B, S_new); mask (B, S) covers the tokens in the cache as well."""
    n_new = new_ids.shape[1]
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -n_new:]
    x = model.token_embeddings(new_ids) + model.position_embeddings(positions)
    S = mask.shape[1]
    allowed = torch.ones(S, S, dtype=torch.bool, device=mask.device).tril()[-n_new:] & mask.bool()[:, None, None]
    for i, block in enumerate(model.blocks):
        q, kT, v = block.mha.q_kT_v(block.ln_1(x))
        if i in cache:
            kT, v = torch.cat([cache[i][0], kT], dim=3), torch.cat([cache[i][1], v], dim=2)
        cache[i] = kT, v
        scores = (q @ kT * block.mha.scale_factor).masked_fill(~allowed, torch.finfo(q.dtype).min)
        heads = scores.softmax(dim=-1).masked_fill(~allowed, 0.0) @ v
        x = x + block.mha.proj(heads.transpose(1, 2).flatten(2))
        x = x + block.ff(block.ln_2(x))
    return model.token_logits(model.ln(x))[:, -1]


def generate(model, device, tokenizer, prefixes, batch_size, max_new_tokens=32, temperature=0.0):
    n_positions = model.position_embeddings.weight.shape[0]
    eot = tokenizer.eot_token
    was_training = model.training
    model.eval()
    texts = []
    with torch.no_grad():
        for start in range(0, len(prefixes), batch_size):
            rows = [tokenizer.encode_ordinary(prefix) or [eot] for prefix in prefixes[start : start + batch_size]]
            rows = [row[-n_positions:] for row in rows]
            longest = max(len(row) for row in rows)
            ids = torch.tensor([[eot] * (longest - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0.0] * (longest - len(row)) + [1.0] * len(row) for row in rows], device=device)
            cache = {}
            for _ in range(max_new_tokens):
                if ids.shape[1] > n_positions:
                    cache = {}
                n_read = cache[0][1].shape[2] if cache else max(0, ids.shape[1] - n_positions)
                logits = read(model, cache, ids[:, n_read:], mask[:, -n_positions:])
                new = torch.multinomial(softmax_with_temperature(logits, temperature), 1)
                ids = torch.cat([ids, new], dim=1)
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            for row in ids[:, longest:].tolist():
                texts.append(tokenizer.decode(row[: row.index(eot)] if eot in row else row))
    model.train(was_training)
    return texts
