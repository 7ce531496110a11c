"""What makes generating and scoring fast, handed to the plain functions or wrapped around them.

In a causal model, the keys and values of a token do not change when tokens are appended to it: CachedDecoder keeps
them, so that each step of generate() reads the new tokens only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from model import DecoderLM
from support.checkpoint import TrainedModel
from support.errors import RunStopped, accepted, first_line, require
from support.screen import show_note

TOLERANCE = 1e-3  # of the largest logit: far above rounding, far below a wrong context


class CachedDecoder:
    """A callable, (input_ids B×S, attention_mask B×S) -> logits B×V of the token that follows each row.

    A call that appends tokens to those of the call before computes only the new ones; any other call starts over.
    The model runs its own forward, so a changed block is cached as it is. The weights must stay the same.
    """

    def __init__(self, model: DecoderLM):
        self.model = model
        self.read = None  # input_ids and attention_mask of the call before
        self.cache = {}  # attention module -> kT (B, H, HD, S), v (B, H, S, HD)

    @torch.inference_mode()
    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return `model(input_ids, attention_mask)[:, -1]`."""
        n_cached, self.read = self._n_cached(input_ids, attention_mask), None  # in case the call fails half-way
        with self._reading_from(n_cached):
            hidden = self.model.hidden_states(input_ids, attention_mask)  # (B, S - n_cached, D)
        self.read = input_ids, attention_mask
        return self.model.token_logits(hidden[:, -1])

    def _n_cached(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
        """How many of the tokens are in the cache: those of the call before if this one continues it, or none."""
        S = self.read[0].shape[1] if self.read else 0
        start = input_ids[:, :S], attention_mask[:, :S]
        return S if self.read and input_ids.shape[1] > S and all(map(torch.equal, start, self.read)) else 0

    @contextmanager
    def _reading_from(self, n_cached: int) -> Iterator[None]:
        """Let embed() return the tokens from n_cached on only, and q_kT_v() the cached keys and values too."""
        embed, modules = self.model.embed, [block.mha for block in self.model.blocks]

        def with_cache(mha, q_kT_v):
            def extended(x):
                q, kT, v = q_kT_v(x)
                if n_cached > 0:
                    old_kT, old_v = self.cache[mha]
                    kT, v = torch.cat([old_kT, kT], dim=3), torch.cat([old_v, v], dim=2)
                self.cache[mha] = kT, v
                return q, kT, v

            return extended

        try:  # an attribute of the object hides the method of its class
            self.model.embed = lambda input_ids, mask=None: embed(input_ids, mask)[:, n_cached:]
            for mha in modules:
                mha.q_kT_v = with_cache(mha, mha.q_kT_v)
            yield
        finally:
            vars(self.model).pop("embed", None)
            for mha in modules:
                vars(mha).pop("q_kT_v", None)


def choose_decoder(trained: TrainedModel, generate: Callable) -> dict[str, Callable]:
    """The argument next_token_logits of generate(), if it has one: a CachedDecoder, or the model itself.

    The model itself, with a note, if the cache does not give its own logits on a small batch. Raises RunStopped if
    the logits are not finite, now or later.
    """
    if not accepted(generate, next_token_logits=None):  # only the handout's arguments
        return {}

    def plain(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return trained.model(input_ids, attention_mask)[:, -1]

    decoder = CachedDecoder(trained.model)
    S = min(6, trained.config.model_config.n_positions)
    input_ids = torch.arange(S, device=trained.device).repeat(2, 1)
    mask = torch.ones(2, S, device=trained.device)
    mask[1, : S // 2] = 0.0  # padding
    batches = [(input_ids[:, :n], mask[:, :n]) for n in (max(1, S - 1), S)]  # the second continues the first
    with torch.inference_mode():
        expected = [finite(plain(*batch)) for batch in batches]
        try:
            for batch, logits in zip(batches, expected, strict=True):
                atol = TOLERANCE * logits.abs().max().item()
                require(torch.allclose(decoder(*batch), logits, rtol=0, atol=atol), "its logits differ")
        except Exception as error:  # a changed model.py can fail in any way
            problem = first_line(error)
            show_note(f"Generating without the key/value cache, which does not match this model.py: {problem}.")
            decoder = plain
    return {"next_token_logits": lambda input_ids, attention_mask: finite(decoder(input_ids, attention_mask))}


def score_by_length(
    score: Callable, trained: TrainedModel, texts: list[str], batch_size: int, tokens: list[int]
) -> torch.Tensor:
    """The logits of these tokens after each text, from score(): (N, len(tokens)).

    Texts of similar length share a batch, so that little is padding; of the (N, V) logits only these are kept.
    """
    logits, order = torch.empty(len(texts), len(tokens)), sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in tqdm(range(0, len(texts), batch_size), "score", leave=False, disable=None):
        rows = order[start : start + batch_size]
        batch = [texts[i] for i in rows]
        scores = score(trained.model, trained.device, trained.tokenizer, batch, batch_size)
        logits[rows] = finite(scores[:, tokens]).float().cpu()
    return logits


def finite(logits: torch.Tensor) -> torch.Tensor:
    """The logits; RunStopped if one of them is NaN or infinite."""
    if not logits.sum().isfinite():  # ten times as fast as asking each of them
        raise RunStopped(
            "the model's logits are not finite numbers: its training diverged; use another checkpoint"
        )
    return logits
