"""Measure a hand-in's model.pt with its own model.py, for question 2.6; grade.py runs it in the hand-in's folder.

    python perplexity.py TOKENS.npz SHIPPED_MODEL.pt

Writes perplexity.json: {"perplexity": over all predicted tokens of `val`}, or {"error": a sentence}.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.append("tests")
BATCH_TOKENS = 1024


def is_copy(path: str, shipped: str) -> bool:
    """Whether the weights are those that came with the package, or nearly so."""
    if not Path(shipped).exists():
        return False
    ours, theirs = (torch.load(file, weights_only=True) for file in (shipped, path))
    same = ours.keys() <= theirs.keys() and all(ours[name].shape == theirs[name].shape for name in ours)
    return same and all((ours[n] - theirs[n]).norm() <= 0.05 * ours[n].norm() for n in ours if ours[n].dim() > 1)


def sees_the_future(model: torch.nn.Module, input_ids: torch.Tensor) -> bool:
    """Whether other tokens in the second half (B, S) change the logits of the first."""
    half = input_ids.shape[1] // 2
    changed = input_ids.clone()
    changed[:, half:] = input_ids[:, half:].flip(1) // 2
    before, after = model(input_ids)[:, :half], model(changed)[:, :half]
    return not torch.allclose(before, after, rtol=1e-3, atol=1e-3, equal_nan=True)


@torch.inference_mode()
def perplexity(tokens: str, shipped: str) -> float:
    """The perplexity of model.pt in this folder. UserError if it is against the rules."""
    from submit import load_own_model  # imports the hand-in's model.py

    from support.errors import require

    require(not is_copy("model.pt", shipped), "model.pt is (nearly) the one that came with the package")
    trained, _, _ = load_own_model(Path("model.pt"))
    model, S = trained.model.eval(), trained.config.seq_len
    with np.load(tokens) as file:
        val = torch.from_numpy(file["val"].astype(np.int64))
    rows = val[: len(val) // S * S].view(-1, S)
    require(len(rows) > 0, f"seq_len = {S}, more than all test tokens")
    require(not sees_the_future(model, rows[:2]), "the model sees the future: its logits depend on later tokens")
    total = 0.0
    for input_ids in rows.split(max(1, BATCH_TOKENS // S)):
        logits = model(input_ids)[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum").item()
    loss = total / rows[:, 1:].numel()
    require(math.isfinite(loss), f"the loss is {loss}")
    return math.exp(loss)


def main() -> None:
    """Write the answer."""
    try:
        answer = {"perplexity": perplexity(*sys.argv[1:])}
    except Exception as error:  # whatever the hand-in's code and files raise
        line = (str(error).splitlines() or [""])[0]
        answer = {"error": line if type(error).__name__ == "UserError" else f"{type(error).__name__}: {line}"}
    Path("perplexity.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
