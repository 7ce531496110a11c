"""A decoder-only transformer language model, written by hand from tensor operations (question 1.3).

    model = DecoderLM(n_vocab=50257, n_embd=32, n_head=2, n_positions=128, n_layer=2)
    logits = model(input_ids)                          # (B, S) token ids -> (B, S, V) next-token logits

Read it from top to bottom: attention lets every token look at the tokens before it, the feed-forward
layer works on each token alone, a decoder block joins the two, and the language model puts an embedding
below a stack of blocks and a projection to the vocabulary above it. At first, begin at `MultiHeadAttention`:
the two classes before it only save time.

Shapes are written with these letters throughout:

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

MOST_SCORES = 2**21  # attention scores at a time on a CPU: 8 MiB in float32, because more leave its caches


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws 16 random bits for an element: p is exact to 2^-17.

    On a CPU the library draws its random numbers one by one, a tenth of a training step. Here one
    64-bit draw from the same generator serves four elements.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero each element with probability p, in training only, and divide the others by 1 - p."""
        if not (self.training and 0 < self.p < 1 and x.is_cpu):
            return super().forward(x)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)  # uniform over -2^15 .. 2^15 - 1
        kept = bits.float().ge_(round(self.p * 2**16) - 2**15)  # 1.0 or 0.0
        return x * kept.mul_(1 / (1 - self.p)).to(x.dtype)


class KeyValueCache:
    """The keys and values of one attention layer for the tokens read so far.

    In a causal model they never change when tokens are appended, so a decoding step only has to
    compute those of its own token. Room for `n_positions` tokens is taken at the first use.
    """

    def __init__(self, n_positions: int):
        self.n_positions = n_positions
        self.length = 0  # tokens read so far
        self.kT = self.v = None  # (B, H, HD, P) and (B, H, P, HD)

    def extend(self, kT: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append kT (B, H, HD, S) and v (B, H, S, HD); return those of all tokens so far."""
        if self.kT is None:
            B, H, HD, _ = kT.shape
            self.kT = kT.new_empty(B, H, HD, self.n_positions)
            self.v = v.new_empty(B, H, self.n_positions, HD)
        start, self.length = self.length, self.length + v.shape[2]
        self.kT[..., start : self.length] = kT
        self.v[:, :, start : self.length] = v
        return self.kT[..., : self.length], self.v[:, :, : self.length]

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Forget every sequence of the batch but `rows` (a (B,) boolean mask)."""
        self.kT, self.v = self.kT[rows], self.v[rows]


class MultiHeadAttention(nn.Module):
    """Masked multi-head self-attention (Vaswani et al. 2017, section 3.2).

    Raises ValueError when n_embd is not divisible by n_head.
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
        self.dropout = Dropout(p_dropout)
        # The dot product of HD pairs of unit variance has standard deviation sqrt(HD): softmax would saturate.
        self.register_buffer("scale_factor", torch.tensor(1.0 / math.sqrt(n_embd // n_head)))

    def q_kT_v(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, transposed keys and values of each head.

        x (B, S, D) -> q (B, H, S, HD), kT (B, H, HD, S), v (B, H, S, HD)
        """
        B, S, D = x.shape
        heads = (B, S, self.n_head, D // self.n_head)
        q = self.q_attn(x).view(heads).transpose(1, 2)  # (B, H, S, HD)
        k = self.k_attn(x).view(heads).transpose(1, 2).contiguous()  # else the product copies kT, slowly
        v = self.v_attn(x).view(heads).transpose(1, 2)  # (B, H, S, HD)
        return q, k.transpose(2, 3), v

    def self_attention(
        self, q: torch.Tensor, kT: torch.Tensor, v: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mix the values of the tokens that each token may look at: softmax(q kT / sqrt(HD)) v.

        A token may look at itself and at the tokens before it, but at no padding. With a key-value
        cache there are more keys (S_k) than queries (S_q): the queries are the last S_q tokens.

        q (B, H, S_q, HD), kT (B, H, HD, S_k), v (B, H, S_k, HD) -> (B, S_q, D)
        attention_mask (B, S_k): 1.0 = real token, 0.0 = padding. A query that may look at no key at
        all gets exactly 0 from every head.
        """
        S_q, S_k = q.shape[-2], kT.shape[-1]
        scores = (q * self.scale_factor) @ kT  # (B, H, S_q, S_k); scaling q is cheaper than the scores

        visible = torch.ones(S_q, S_k, dtype=torch.bool, device=q.device).tril(S_k - S_q)
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None, :].bool()  # (B, 1, S_q, S_k)
        # Adding the mask instead of filling it in costs nothing in the backward pass. The lowest finite
        # number rather than -inf: a row without any visible key then has no inf - inf = NaN.
        lowest = torch.finfo(scores.dtype).min
        scores += torch.zeros_like(visible, dtype=scores.dtype).masked_fill(~visible, lowest)

        weights = F.softmax(scores, dim=-1)
        if attention_mask is not None:  # such a row is uniform after softmax: make it 0
            weights = weights.masked_fill(~visible, 0.0)
        weights = self.dropout(weights)

        attn = weights @ v  # (B, H, S_q, HD)
        return attn.transpose(1, 2).flatten(start_dim=2)  # (B, S_q, D), head 0's features first

    def projection(self, attn: torch.Tensor) -> torch.Tensor:
        """Let the heads' results mix: (B, S, D) -> (B, S, D)."""
        return self.dropout(self.proj(attn))

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, *, cache: KeyValueCache | None = None
    ) -> torch.Tensor:
        """x (B, S, D) -> (B, S, D). With a cache, x holds the new tokens and the mask covers all.

        On a CPU the sequences go through in groups whose scores fit its caches; they never meet anyway.
        """
        q, kT, v = self.q_kT_v(x)
        if cache is not None:
            kT, v = cache.extend(kT, v)
        group = max(1, MOST_SCORES // (self.n_head * q.shape[2] * v.shape[2]))
        if len(x) <= group or not x.is_cpu:
            return self.projection(self.self_attention(q, kT, v, attention_mask))
        masks = [None] * len(x) if attention_mask is None else attention_mask.split(group)
        groups = zip(q.split(group), kT.split(group), v.split(group), masks, strict=False)
        return self.projection(torch.cat([self.self_attention(*tensors) for tensors in groups]))


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between them, applied to every token alone."""

    def __init__(self, n_embd: int, p_dropout: float = 0.1):
        super().__init__()
        self.linear_in = nn.Linear(n_embd, 4 * n_embd)
        self.linear_out = nn.Linear(4 * n_embd, n_embd)
        self.dropout = Dropout(p_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, S, D) -> (B, S, D)"""
        return self.dropout(self.linear_out(F.gelu(self.linear_in(x))))


class DecoderBlock(nn.Module):
    """Attention, then feed-forward, each added to the residual stream.

    The LayerNorm stands before each of them (pre-LN, as in GPT-2): the residual stream itself is never
    normalised, so gradients reach the lowest block undamped (Xiong et al. 2020, "On Layer Normalization
    in the Transformer Architecture").
    """

    def __init__(self, n_embd: int, n_head: int, *, p_dropout: float = 0.1):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.mha = MultiHeadAttention(n_embd, n_head, p_dropout)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.ff = FeedForward(n_embd, p_dropout)

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None, *, cache: KeyValueCache | None = None
    ) -> torch.Tensor:
        """x (B, S, D), attention_mask (B, S) or None -> (B, S, D)"""
        x = x + self.mha(self.ln_1(x), attention_mask, cache=cache)
        return x + self.ff(self.ln_2(x))


class DecoderLM(nn.Module):
    """The language model: token ids in, the logits of each next token out."""

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
        self.blocks = nn.ModuleList(DecoderBlock(n_embd, n_head, p_dropout=p_dropout) for _ in range(n_layer))
        self.ln = nn.LayerNorm(n_embd)
        self.dropout = Dropout(p_dropout)
        self._init_weights()

    def _init_weights(self) -> None:
        """N(0, 0.02) everywhere and biases 0, as in GPT (Radford et al. 2018, section 4.1).

        Every block adds twice to the residual stream, so its variance would grow with 2 n_layer terms:
        the projections that write into the stream start smaller by the square root of their number
        (GPT-2: Radford et al. 2019, section 2.3).
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
        """Training FLOPs per token, a multiply-add counted as two: 6 per parameter (forward and
        backward; Kaplan et al. 2020, "Scaling Laws for Neural Language Models", who leave embeddings
        out; tied, they are the output matrix and count) and attention's
        12 n_layer n_embd n_positions for q kT and weights v (Chowdhery et al. 2022, "PaLM", appendix B).
        """
        n_parameters = sum(parameter.numel() for parameter in self.parameters())
        return 6 * n_parameters + 12 * self.n_layer * self.n_embd * self.n_positions

    def kv_caches(self) -> list[KeyValueCache]:
        """Empty caches, one for each block, to pass to `hidden_states`."""
        return [KeyValueCache(self.n_positions) for _ in self.blocks]

    def embed(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, n_past: int = 0
    ) -> torch.Tensor:
        """Token plus position embeddings, then dropout: (B, S) -> (B, S, D).

        With an attention_mask (B, n_past + S) positions count the real tokens only: the mask
        [0, 0, 1, 1, 1] gives [., ., 0, 1, 2]. `n_past` tokens before these are already in the cache.

        Raises ValueError when the sequence is longer than n_positions.
        """
        length = n_past + input_ids.shape[1]
        if length > self.n_positions:
            raise ValueError(f"a sequence of {length} tokens is longer than n_positions = {self.n_positions}")
        if attention_mask is None:
            position_ids = torch.arange(n_past, length, device=input_ids.device)  # (S,)
        else:
            real_tokens = attention_mask.long().cumsum(dim=1)[:, n_past:]
            position_ids = (real_tokens - 1).clamp(min=0)  # (B, S); padding has no position, 0 serves
        x = self.token_embeddings(input_ids) + self.position_embeddings(position_ids)
        return self.dropout(x)

    def hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, caches: list | None = None
    ) -> torch.Tensor:
        """Embedding, all blocks and the final LayerNorm: (B, S) -> (B, S, D).

        With `caches` (from `kv_caches`), input_ids are the tokens that follow those already read, and
        attention_mask covers both.
        """
        n_past = caches[0].length if caches else 0
        x = self.embed(input_ids, attention_mask, n_past=n_past)
        for i, block in enumerate(self.blocks):
            x = block(x, attention_mask, cache=caches[i] if caches else None)
        return self.ln(x)

    def token_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Score every token of the vocabulary against the hidden states: (B, S, D) -> (B, S, V).

        The token embeddings serve as the output matrix (LM head) too: weight tying, no bias, no second matrix.
        """
        return F.linear(x, self.token_embeddings.weight)

    def next_token_logits(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, caches: list | None = None
    ) -> torch.Tensor:
        """`forward(input_ids, attention_mask)[:, -1]` without the other logits: (B, S) -> (B, V).

        The time goes into reading the embeddings once. A CPU's library does that at full speed when the
        matrix stands first and meets at least two columns, so a lone row is doubled.
        """
        last = self.hidden_states(input_ids, attention_mask, caches=caches)[:, -1]  # (B, D)
        rows = last if len(last) > 1 else last.repeat(2, 1)
        return (self.token_embeddings.weight @ rows.T)[:, : len(last)].T.contiguous()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """input_ids (B, S), attention_mask (B, S) with 1.0 = real token -> logits (B, S, V)"""
        return self.token_logits(self.hidden_states(input_ids, attention_mask))
