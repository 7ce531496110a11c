"""Models that the report compares with DecoderLM. They take its place in train.py, see reproduce.py.

Both leave torch's generator where DecoderLM leaves it, so that at the same seed they are trained on the same
batches.
"""

import torch
from torch import nn

from model import DecoderLM


class UntiedLM(DecoderLM):
    """DecoderLM with a second V x D matrix for its inputs; `token_embeddings` is the output matrix alone."""

    def __init__(self, n_vocab: int, n_embd: int, *args, **kwargs):
        super().__init__(n_vocab, n_embd, *args, **kwargs)
        with torch.random.fork_rng():
            self.input_embeddings = nn.Embedding(n_vocab, n_embd)
            nn.init.normal_(self.input_embeddings.weight, std=0.02)

    def embed(self, input_ids, attention_mask=None):
        """As DecoderLM's, for rows without padding (training, and a single prompt)."""
        if attention_mask is not None:
            raise NotImplementedError("padded rows")
        positions = self.position_embeddings.weight[: input_ids.shape[1]]  # (S, D)
        return self.dropout(self.input_embeddings(input_ids) + positions)


class GPT2(nn.Module):
    """GPT2LMHeadModel of transformers with its own initialisation, and DecoderLM's arguments.

    `hidden_states` and `token_embeddings` let train.py compute its loss in chunks, as DecoderLM's: the loss of
    GPT2LMHeadModel to rounding (tests/package/test_report.py), in less time and memory.
    """

    def __init__(self, n_vocab: int, n_embd: int, n_head: int, n_positions: int, n_layer: int, p_dropout=0.1):
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        ours = DecoderLM(n_vocab, n_embd, n_head, n_positions, n_layer, p_dropout)  # draws what ours draws
        self.n_vocab, self.flops_per_token = n_vocab, ours.flops_per_token
        config = GPT2Config(
            vocab_size=n_vocab,
            n_positions=n_positions,
            n_embd=n_embd,
            n_layer=n_layer,
            n_head=n_head,
            use_cache=False,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), p_dropout),
        )
        with torch.random.fork_rng():
            self.gpt2 = GPT2LMHeadModel(config)
        self.position_embeddings = self.gpt2.transformer.wpe  # generate() asks it for n_positions

    @property
    def token_embeddings(self) -> nn.Embedding:
        """The input embeddings, which are the output matrix as well."""
        return self.gpt2.transformer.wte

    def hidden_states(self, input_ids):
        """(B, S) -> (B, S, D), after the final LayerNorm"""
        return self.gpt2.transformer(input_ids).last_hidden_state

    def forward(self, input_ids, attention_mask=None):
        """(B, S) -> logits (B, S, V)"""
        return self.gpt2(input_ids, attention_mask=attention_mask).logits
