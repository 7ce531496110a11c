"""A decoder-only transformer language model, written from tensor operations (question 1.3).

    model = DecoderLM(n_vocab=50257, n_embd=32, n_head=2, n_positions=128, n_layer=2)
    logits = model(input_ids)                          # (B, S) token ids -> (B, S, V) next-token logits

Read it from top to bottom: attention mixes information between tokens, the feed-forward layer works on
each token separately, a decoder block combines the two, and the language model adds an embedding below a
stack of blocks and a projection to the vocabulary above it.

Shapes use these letters throughout:

    B  sequences in the batch       H   attention heads (n_head)
    S  tokens in a sequence         HD  size of one head, D / H
    D  hidden size (n_embd)         V   vocabulary size (n_vocab)
    P  longest sequence the model can read (n_positions)

Sources: Vaswani et al. 2017, "Attention Is All You Need" (the decoder); Radford et al. 2019, "Language
Models are Unsupervised Multitask Learners" (GPT-2: pre-LN blocks, learned positions, initialisation);
Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training" (GPT: the 0.02);
Press and Wolf 2017, "Using the Output Embedding to Improve Language Models" (the tied output matrix).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class MultiHeadAttention(nn.Module):
    """Masked multi-head self-attention (Vaswani et al. 2017, section 3.2).

    Raises ValueError if n_embd is not divisible by n_head.
    """

    def __init__(self, n_embd: int, n_head: int, p_dropout: float = 0.1):
        super().__init__()
        if n_embd % n_head != 0:
            raise ValueError(f"n_embd = {n_embd} is not divisible by n_head = {n_head}")
        self.n_head = n_head
        self.q_attn = nn.Linear(n_embd, n_embd)
        self.k_attn = nn.Linear(n_embd, n_embd)
        self.v_attn = nn.Linear(n_embd, n_embd)
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(p_dropout)
        # Scores of unit-variance q and k have standard deviation sqrt(HD): without this, softmax would saturate.
        self.register_buffer("scale_factor", torch.tensor(1.0 / math.sqrt(n_embd // n_head)))

    def q_kT_v(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the queries, transposed keys and values of each head.

        x (B, S, D) -> q (B, H, S, HD), kT (B, H, HD, S), v (B, H, S, HD)
        """
        B, S, D = x.shape
        heads = (B, S, self.n_head, D // self.n_head)
        q = self.q_attn(x).view(heads).transpose(1, 2)  # (B, H, S, HD)
        kT = self.k_attn(x).view(heads).permute(0, 2, 3, 1)  # (B, H, HD, S)
        v = self.v_attn(x).view(heads).transpose(1, 2)  # (B, H, S, HD)
        return q, kT, v

    def self_attention(
        self, q: torch.Tensor, kT: torch.Tensor, v: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Average the values that each token may attend to: softmax(q kT / sqrt(HD)) v.

        A token attends to itself and the tokens before it, never to padding. If there are fewer queries
        than keys (decoding with cached keys), the queries belong to the last S_q tokens.

        q (B, H, S_q, HD), kT (B, H, HD, S_k), v (B, H, S_k, HD) -> (B, S_q, D)
        attention_mask (B, S_k): 1.0 = real token, 0.0 = padding. A query that can see no key gets exactly 0.
        """
        S_q, S_k = q.shape[-2], kT.shape[-1]
        scores = (q * self.scale_factor) @ kT  # (B, H, S_q, S_k); cheaper than scaling the scores

        visible = torch.ones(S_q, S_k, dtype=torch.bool, device=q.device).tril(S_k - S_q)
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None, :].bool()  # (B, 1, S_q, S_k)
        # The lowest finite number, not -inf: a row with no visible key would become inf - inf = NaN.
        scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)

        weights = self.dropout(F.softmax(scores, dim=-1))
        attn = weights @ v  # (B, H, S_q, HD)
        if attention_mask is not None:  # softmax made rows with no visible key uniform
            attn = attn.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)
        return attn.transpose(1, 2).flatten(start_dim=2)  # (B, S_q, D), head 0's features first

    def projection(self, attn: torch.Tensor) -> torch.Tensor:
        """Mix the results of the heads: (B, S, D) -> (B, S, D)."""
        return self.dropout(self.proj(attn))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, S, D), attention_mask (B, S) or None -> (B, S, D)"""
        q, kT, v = self.q_kT_v(x)
        return self.projection(self.self_attention(q, kT, v, attention_mask))


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between them, applied to each token separately."""

    def __init__(self, n_embd: int, p_dropout: float = 0.1):
        super().__init__()
        self.linear_in = nn.Linear(n_embd, 4 * n_embd)
        self.linear_out = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(p_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, S, D) -> (B, S, D)"""
        return self.dropout(self.linear_out(F.gelu(self.linear_in(x))))


class DecoderBlock(nn.Module):
    """Attention, then feed-forward, each added to the residual stream.

    LayerNorm comes before each of the two (pre-LN, as in GPT-2), so the residual stream itself is never
    normalised and gradients reach the lowest block undamped (Xiong et al. 2020, "On Layer Normalization
    in the Transformer Architecture").
    """

    def __init__(self, n_embd: int, n_head: int, p_dropout: float = 0.1):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.mha = MultiHeadAttention(n_embd, n_head, p_dropout)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.ff = FeedForward(n_embd, p_dropout)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """x (B, S, D), attention_mask (B, S) or None -> (B, S, D)"""
        x = x + self.mha(self.ln_1(x), attention_mask)
        return x + self.ff(self.ln_2(x))


class DecoderLM(nn.Module):
    """The language model: maps token ids to the logits of each next token."""

    def __init__(
        self, n_vocab: int, n_embd: int, n_head: int, n_positions: int, n_layer: int, p_dropout: float = 0.1
    ):
        super().__init__()
        self.n_vocab = n_vocab
        self.n_embd = n_embd
        self.n_head = n_head
        self.n_positions = n_positions
        self.n_layer = n_layer
        self.p_dropout = p_dropout

        self.token_embeddings = nn.Embedding(n_vocab, n_embd)
        self.position_embeddings = nn.Embedding(n_positions, n_embd)
        self.blocks = nn.ModuleList(DecoderBlock(n_embd, n_head, p_dropout) for _ in range(n_layer))
        self.ln = nn.LayerNorm(n_embd)
        self.dropout = nn.Dropout(p_dropout)
        self._init_weights()

    def _init_weights(self) -> None:
        """Draw weights from N(0, 0.02) and set biases to 0, as in GPT (Radford et al. 2018, section 4.1).

        Each block adds to the residual stream twice, so the stream's variance is a sum of 2 n_layer terms.
        The projections that write to it therefore start smaller by the square root of that number
        (Radford et al. 2019, section 2.3).
        """
        residual_std = 0.02 / math.sqrt(2 * self.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes_residual = name.endswith(("mha.proj", "ff.linear_out"))
                nn.init.normal_(module.weight, std=residual_std if writes_residual else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token, counting a multiply-add as two.

        6 per parameter for forward and backward (Kaplan et al. 2020, "Scaling Laws for Neural Language
        Models"; they leave out embeddings, but tied ones are also the output matrix, so they count), plus
        12 n_layer n_embd n_positions for q kT and weights v (Chowdhery et al. 2022, "PaLM", appendix B).
        """
        n_parameters = sum(parameter.numel() for parameter in self.parameters())
        return 6 * n_parameters + 12 * self.n_layer * self.n_embd * self.n_positions

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Add token and position embeddings, then apply dropout: (B, S) -> (B, S, D).

        With an attention_mask (B, S), positions count the real tokens only: the mask [0, 0, 1, 1, 1]
        gives positions [., ., 0, 1, 2]. Raises ValueError if S is larger than n_positions.
        """
        S = input_ids.shape[1]
        if self.n_positions < S:
            raise ValueError(f"a sequence of {S} tokens is longer than n_positions = {self.n_positions}")
        if attention_mask is None:
            position_ids = torch.arange(S, device=input_ids.device)  # (S,)
        else:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, S)
        return self.dropout(self.token_embeddings(input_ids) + self.position_embeddings(position_ids))

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the embedding, all blocks and the final LayerNorm: (B, S) -> (B, S, D)."""
        x = self.embed(input_ids, attention_mask)
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.ln(x)

    def token_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Score every token of the vocabulary against the hidden states: (B, S, D) -> (B, S, V).

        The token embeddings double as the output matrix (weight tying): no second matrix, no bias.
        """
        return F.linear(x, self.token_embeddings.weight)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """input_ids (B, S), attention_mask (B, S) with 1.0 = real token -> logits (B, S, V)"""
        return self.token_logits(self.hidden_states(input_ids, attention_mask))
