"""Fast decoding for generate(): the keys and values of earlier tokens are kept.

    texts = generate(model, device, tokenizer, prefixes, batch_size, next_token_logits=CachedDecoder(model))

In a causal model the keys and values of a token do not change when tokens are appended, so each step has to run
the model on the new tokens only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from tqdm import tqdm

from model import DecoderLM
from support.checkpoint import TrainedModel
from support.errors import RunStopped, first_line
from support.screen import show_note

TOLERANCE = 1e-3  # of the largest logit: far above rounding, TF32's too, and far below a wrong context
NextTokenLogits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class CachedDecoder:
    """A callable, (input_ids B×S, attention_mask B×S) -> logits B×V of the token that follows each row.

    A call that appends tokens to those of the call before computes only the new ones; any other call starts over.
    The model runs its own forward, so a changed block is cached as it is. Keep the weights, and evaluation mode,
    between calls.
    """

    def __init__(self, model: DecoderLM):
        self.model = model
        self.input_ids = self.attention_mask = None  # of the call before
        self.cache = {}  # attention module -> kT (B, H, HD, S), v (B, H, S, HD)

    @torch.inference_mode()
    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return `model(input_ids, attention_mask)[:, -1]`."""
        n_known = self._n_known(input_ids, attention_mask)
        if n_known == 0:
            self.cache.clear()
        self.input_ids = None  # a call that fails half-way is not to be continued
        with self._reading_from(n_known):
            hidden = self.model.hidden_states(input_ids, attention_mask)  # (B, S - n_known, D)
        self.input_ids, self.attention_mask = input_ids, attention_mask
        return self.model.token_logits(hidden[:, -1])

    def _n_known(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
        """How many of the tokens are in the cache: those of the call before, or none."""
        if self.input_ids is None:
            return 0
        B, S = self.input_ids.shape
        continued = (
            (len(input_ids), input_ids.device) == (B, self.input_ids.device)
            and input_ids.shape[1] > S
            and torch.equal(input_ids[:, :S], self.input_ids)
            and torch.equal(attention_mask[:, :S], self.attention_mask)
        )
        return S if continued else 0

    @contextmanager
    def _reading_from(self, n_known: int) -> Iterator[None]:
        """Let embed() return the tokens from n_known on only, and q_kT_v() the cached keys and values too."""
        model = self.model
        embed = model.embed

        def embed_new(input_ids, attention_mask=None):
            return embed(input_ids, attention_mask)[:, n_known:]

        def extend(mha, q_kT_v):
            def q_kT_v_with_cache(x):
                q, kT, v = q_kT_v(x)
                if n_known:
                    old_kT, old_v = self.cache[mha]
                    kT, v = torch.cat([old_kT, kT], dim=3), torch.cat([old_v, v], dim=2)
                self.cache[mha] = kT, v
                return q, kT, v

            return q_kT_v_with_cache

        changed = [(model, "embed", embed_new)]
        changed += [(block.mha, "q_kT_v", extend(block.mha, block.mha.q_kT_v)) for block in model.blocks]
        try:
            for module, name, function in changed:  # an attribute of the object hides the method of its class
                setattr(module, name, function)
            yield
        finally:
            for module, name, _ in changed:
                vars(module).pop(name, None)


def choose_decoder(trained: TrainedModel, generate: Callable) -> dict[str, NextTokenLogits]:
    """The argument next_token_logits of generate(), if it has one: a CachedDecoder, or the model itself.

    The model itself, with a note, if the cache does not give its own logits on a small batch. Raises RunStopped if
    the logits are not finite, now or later.
    """
    model = trained.model

    def plain(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return model(input_ids, attention_mask)[:, -1]

    decoder = CachedDecoder(model)
    S = min(6, trained.config.model_config.n_positions)
    input_ids = torch.arange(S, device=trained.device).repeat(2, 1)
    mask = torch.ones(2, S, device=trained.device)
    mask[1, : S // 2] = 0.0  # padding
    with torch.inference_mode():
        for n_read in (max(1, S - 1), S):  # the second call continues the first
            batch = input_ids[:, :n_read], mask[:, :n_read]
            logits = _finite(plain(*batch))
            try:
                difference = ((decoder(*batch) - logits).abs().max() / logits.abs().max()).item()
                problem = None if difference < TOLERANCE else f"the logits differ by {difference:.2%}"
            except Exception as error:  # a changed model.py can fail in any way
                problem = first_line(error)
            if problem:
                show_note(f"Generating without cached keys and values, which do not fit this model.py: {problem}.")
                decoder = plain
                break
    if "next_token_logits" not in signature(generate).parameters:  # it has the handout's arguments only
        return {}
    return {"next_token_logits": lambda input_ids, attention_mask: _finite(decoder(input_ids, attention_mask))}


def _finite(logits: torch.Tensor) -> torch.Tensor:
    if not logits.sum().isfinite():  # ten times as fast as asking each of them
        raise RunStopped(
            "the model's logits are not finite numbers: its training diverged; use another checkpoint"
        )
    return logits


def score_by_length(
    score: Callable, trained: TrainedModel, texts: list[str], batch_size: int, tokens: list[int]
) -> torch.Tensor:
    """The logits of these tokens after each text, (N, len(tokens)), from score().

    Texts of similar length share a batch, so that little is padding; of the (N, V) logits only these are kept.
    """
    logits = torch.empty(len(texts), len(tokens))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in tqdm(range(0, len(texts), batch_size), "score", leave=False, disable=None):
        rows = order[start : start + batch_size]
        batch = [texts[i] for i in rows]
        scores = score(trained.model, trained.device, trained.tokenizer, batch, batch_size)
        logits[rows] = _finite(scores[:, tokens].float().cpu())
    return logits
