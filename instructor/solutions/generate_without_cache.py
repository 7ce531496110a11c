"""A correct generate.py in its plainest form: the whole window goes through the model for each new token."""

import torch


def softmax_with_temperature(logits: torch.Tensor, temperature: float):
    if temperature == 0:
        probs = torch.zeros_like(logits)
        probs.scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
        return probs
    return torch.softmax(logits / temperature, dim=-1)


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
            for _ in range(max_new_tokens):
                logits = model(ids[:, -n_positions:], mask[:, -n_positions:])[:, -1]
                probs = softmax_with_temperature(logits, temperature)
                new = torch.multinomial(probs, 1)
                ids = torch.cat([ids, new], dim=1)
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            for row in ids[:, longest:].tolist():
                if eot in row:
                    row = row[: row.index(eot)]
                texts.append(tokenizer.decode(row))
    model.train(was_training)
    return texts
