"""The plainest right model.py: what mutants.py breaks, and what fills the starter edition in its test."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, p_dropout: float = 0.1):
        super().__init__()
        if n_embd % n_head != 0:
            raise ValueError(f"n_embd = {n_embd} is not divisible by n_head = {n_head}")
        self.n_head = n_head
        self.head_size = n_embd // n_head
        self.q_attn = nn.Linear(n_embd, n_embd)
        self.k_attn = nn.Linear(n_embd, n_embd)
        self.v_attn = nn.Linear(n_embd, n_embd)
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(p_dropout)
        self.register_buffer("scale_factor", torch.tensor(1 / math.sqrt(self.head_size)))

    def q_kT_v(self, x: torch.Tensor):
        B, S, D = x.shape
        q = self.q_attn(x).view(B, S, self.n_head, self.head_size).transpose(1, 2)
        k = self.k_attn(x).view(B, S, self.n_head, self.head_size).transpose(1, 2)
        v = self.v_attn(x).view(B, S, self.n_head, self.head_size).transpose(1, 2)
        return q, k.transpose(2, 3), v

    def self_attention(self, q, kT, v, attention_mask=None):
        B, H, S, HD = q.shape
        scores = torch.matmul(q, kT) * self.scale_factor
        allowed = torch.tril(torch.ones(S, S, dtype=torch.bool, device=q.device))
        if attention_mask is not None:
            allowed = allowed & attention_mask.bool().view(B, 1, 1, S)
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1)
        weights = weights.masked_fill(~allowed, 0.0)
        weights = self.dropout(weights)
        attn = torch.matmul(weights, v)
        return attn.transpose(1, 2).reshape(B, S, H * HD)

    def projection(self, attn: torch.Tensor):
        return self.dropout(self.proj(attn))

    def forward(self, x: torch.Tensor, attention_mask=None):
        q, kT, v = self.q_kT_v(x)
        attn = self.self_attention(q, kT, v, attention_mask)
        return self.projection(attn)


class FeedForward(nn.Module):
    def __init__(self, n_embd: int, p_dropout: float = 0.1):
        super().__init__()
        self.linear_in = nn.Linear(n_embd, 4 * n_embd)
        self.linear_out = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(p_dropout)

    def forward(self, x: torch.Tensor):
        hidden = F.gelu(self.linear_in(x))
        return self.dropout(self.linear_out(hidden))


class DecoderBlock(nn.Module):
    def __init__(self, n_embd: int, n_head: int, p_dropout: float = 0.1):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.mha = MultiHeadAttention(n_embd, n_head, p_dropout)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.ff = FeedForward(n_embd, p_dropout)

    def forward(self, x: torch.Tensor, attention_mask):
        x = x + self.mha(self.ln_1(x), attention_mask)
        x = x + self.ff(self.ln_2(x))
        return x


class DecoderLM(nn.Module):
    def __init__(
        self, n_vocab: int, n_embd: int, n_head: int, n_positions: int, n_layer: int, p_dropout: float = 0.1
    ):
        super().__init__()
        self.n_vocab, self.n_embd, self.n_head = n_vocab, n_embd, n_head
        self.n_positions, self.n_layer, self.p_dropout = n_positions, n_layer, p_dropout
        self.token_embeddings = nn.Embedding(n_vocab, n_embd)
        self.position_embeddings = nn.Embedding(n_positions, n_embd)
        self.blocks = nn.ModuleList([DecoderBlock(n_embd, n_head, p_dropout=p_dropout) for _ in range(n_layer)])
        self.ln = nn.LayerNorm(n_embd)
        self.dropout = nn.Dropout(p_dropout)
        self._init_weights()

    def _init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)
        for block in self.blocks:
            nn.init.normal_(block.mha.proj.weight, mean=0.0, std=0.02 / math.sqrt(2 * self.n_layer))
            nn.init.normal_(block.ff.linear_out.weight, mean=0.0, std=0.02 / math.sqrt(2 * self.n_layer))

    @property
    def flops_per_token(self) -> int:
        n_parameters = sum(p.numel() for p in self.parameters())
        return 6 * n_parameters + 12 * self.n_layer * self.n_embd * self.n_positions

    def embed(self, input_ids: torch.Tensor, attention_mask=None):
        if attention_mask is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        else:
            position_ids = torch.cumsum(attention_mask.long(), dim=1) - 1
            position_ids = position_ids.clamp(min=0)
        x = self.token_embeddings(input_ids) + self.position_embeddings(position_ids)
        return self.dropout(x)

    def hidden_states(self, input_ids: torch.Tensor, attention_mask=None):
        x = self.embed(input_ids, attention_mask)
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.ln(x)

    def token_logits(self, x: torch.Tensor):
        return x @ self.token_embeddings.weight.T

    def forward(self, input_ids: torch.Tensor, attention_mask=None):
        return self.token_logits(self.hidden_states(input_ids, attention_mask))
