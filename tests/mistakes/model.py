"""Common mistakes in model.py (question 1.3) and the values they give, for tests/test_model.py."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

IDENTITY = nn.Identity()


def split_heads(x, n_head):
    """(B, S, D) -> (B, H, S, HD): head h takes the features h HD to (h + 1) HD - 1."""
    return torch.stack(x.chunk(n_head, dim=-1), dim=1)


def merge_heads(heads):
    """(B, H, S, HD) -> (B, S, D), the features of head 0 first."""
    return torch.cat(heads.unbind(dim=1), dim=-1)


def attention(q, kT, v, visible=None, scale=None):
    """The reference: PyTorch's own attention, heads merged. `visible` broadcasts to (B, H, S, S)."""
    return merge_heads(F.scaled_dot_product_attention(q, kT.transpose(2, 3), v, attn_mask=visible, scale=scale))


def _causal(S):
    return torch.ones(S, S, dtype=torch.bool).tril()


# --- q_kT_v ---


def heads_of(x, others, n_head):
    """x: what the correct linear layer gives, (B, S, D); others: {name: what would be wrong in its place}."""
    B, S, D = x.shape
    wrong = {f"{name} in place of it": split_heads(other, n_head) for name, other in others.items()}
    return wrong | {
        "heads interleaved: head h must take features h·HD to (h+1)·HD - 1": (
            x.view(B, S, D // n_head, n_head).permute(0, 3, 1, 2)
        ),
        "a view to (B, H, S, HD) mixes tokens and heads: split the last axis, then transpose": (
            x.view(B, n_head, S, D // n_head)
        ),
        "already scaled": split_heads(x, n_head) / math.sqrt(D // n_head),
    }


def keys(k, others, n_head):
    right = split_heads(k, n_head)
    return {name: value.transpose(2, 3) for name, value in heads_of(k, others, n_head).items()} | {
        "a view to (HD, S) in place of a transpose": right.reshape(right.transpose(2, 3).shape),
        "k, not yet transposed": right,
    }


# --- self_attention, projection, forward ---


def self_attention(q, kT, v):
    B, H, S, HD = q.shape
    causal = _causal(S)
    strict = causal.tril(-1)
    heads = split_heads(attention(q, kT, v, causal), H)
    scores, lowest = q @ kT / math.sqrt(HD), torch.finfo(q.dtype).min
    # A first token that sees no key averages all values when its scores all have the same lowest value.
    first_sees_all = torch.where(strict.any(dim=1, keepdim=True), strict.float().log(), 0.0)
    q_0 = torch.cat([torch.zeros_like(q[:, :, :1]), q[:, :, 1:]], dim=2)
    return {
        "no causal mask: tokens see the tokens after them": attention(q, kT, v),
        "the causal mask is transposed": attention(q, kT, v, causal.T),
        "the causal mask is strict: a token must see itself": attention(q, kT, v, strict),
        "the causal mask is strict, and the first token sees all": attention(q_0, kT, v, first_sees_all),
        "masked scores are 0: make them -inf, or the lowest number, before softmax": (
            merge_heads(scores.masked_fill(~causal, 0.0).softmax(-1) @ v)
        ),
        "softmax runs over the queries, it must run over the keys": (
            merge_heads(scores.masked_fill(~causal, -torch.inf).softmax(-2) @ v)
        ),
        "softmax runs over the heads, it must run over the keys": (
            merge_heads(scores.masked_fill(~causal, lowest).softmax(1) @ v)
        ),
        "masked after softmax: mask the scores before it": merge_heads(scores.softmax(-1) * causal @ v),
        "the scores are not scaled by 1/sqrt(HD)": attention(q, kT, v, causal, scale=1.0),
        "the scores are multiplied by sqrt(HD), not divided": attention(q, kT, v, causal, scale=HD**0.5),
        "the scores are scaled twice": attention(q, kT, v, causal, scale=1 / HD),
        "the scores are scaled by 1/sqrt(D), not 1/sqrt(HD)": attention(q, kT, v, causal, scale=(H * HD) ** -0.5),
        "heads merged without a transpose back to (B, S, H, HD)": heads.reshape(B, S, H * HD),
        "heads interleaved in the result": heads.permute(0, 2, 3, 1).reshape(B, S, H * HD),
    }


def attention_with_padding(q, kT, v, mask):
    causal, keys = _causal(q.shape[2]), mask[:, None, None, :].bool()
    return {
        "attention_mask ignored": attention(q, kT, v, causal),
        "padding masked on the queries, not on the keys": (
            attention(q, kT, v, causal & keys.transpose(2, 3)).nan_to_num()
        ),
        "attention_mask inverted: 1.0 must mean a real token": attention(q, kT, v, causal & ~keys).nan_to_num(),
        "the causal mask is lost where attention_mask is given": attention(q, kT, v, keys),
        "row 0's mask is used for every row": attention(q, kT, v, causal & keys[:1]).nan_to_num(),
        "attention_mask added to the scores as it is": (
            attention(q, kT, v, torch.where(causal, mask[:, None, None, :], -torch.inf))
        ),
    }


# --- FeedForward, DecoderBlock ---


def feed_forward(ff, x):
    """The correct output of a FeedForward with these layers, and those of common mistakes."""

    def through(activation):
        return ff.linear_out(activation(ff.linear_in(x)))

    return through(F.gelu), {
        "ReLU in place of GELU": through(F.relu),
        "the tanh approximation of GELU: the exact one uses erf": through(partial(F.gelu, approximate="tanh")),
        "SiLU in place of GELU": through(F.silu),
        "no activation": through(IDENTITY),
        "GELU before linear_in: it belongs after it": ff.linear_out(ff.linear_in(F.gelu(x))),
        "GELU after linear_out: it belongs before it": F.gelu(through(IDENTITY)),
    }


@torch.no_grad()
def block_outputs(block, x, mask=None):
    """The two correct outputs of a block, pre-LN and post-LN, and those of common mistakes."""
    ln_1, ln_2, ff = block.ln_1, block.ln_2, block.ff

    def mha(x):
        return block.mha(x, mask)

    def pre(norm_1=ln_1, norm_2=ln_2, mha=mha):
        y = x + mha(norm_1(x))
        return y + ff(norm_2(y))

    def post(norm_1=ln_1, norm_2=ln_2, mha=mha):
        y = norm_1(x + mha(x))
        return norm_2(y + ff(y))

    added = x + mha(ln_1(x))
    wrong = {
        "no residual connection around the attention": mha(ln_1(x)) + ff(ln_2(mha(ln_1(x)))),
        "no residual connection around the feed-forward": ff(ln_2(added)),
        "no residual connections": ff(ln_2(mha(ln_1(x)))),
        "the feed-forward is left out": added,
        "the attention is left out": x + ff(ln_2(x)),
        "attention and feed-forward side by side: the second must read what the first wrote": (
            x + mha(ln_1(x)) + ff(ln_2(x))
        ),
        "the feed-forward adds to x, and the attention's part is lost": x + ff(ln_2(added)),
        "x is added twice": added + x + ff(ln_2(added)),
        "LayerNorm on the residual stream: x is replaced by ln_1(x)": (
            (y := ln_1(x) + mha(ln_1(x))) + ff(ln_2(y))
        ),
        "LayerNorm on the residual stream: x is replaced by ln_2(x)": ln_2(added) + ff(ln_2(added)),
        "no LayerNorm at all": pre(IDENTITY, IDENTITY),
        "no LayerNorm before the attention": pre(norm_1=IDENTITY),
        "no LayerNorm before the feed-forward": pre(norm_2=IDENTITY),
        "no LayerNorm after the attention": post(norm_1=IDENTITY),
        "no LayerNorm after the feed-forward": post(norm_2=IDENTITY),
        "ln_1 in both places": pre(norm_2=ln_1),
        "ln_2 in both places": pre(norm_1=ln_2),
        "ln_1 and ln_2 swapped": pre(ln_2, ln_1),
        "LayerNorm before the residual connection is added (post-LN)": (y := x + ln_1(mha(x))) + ln_2(ff(y)),
    }
    if mask is not None:
        wrong["attention_mask is not passed to the attention"] = pre(mha=block.mha)
        wrong["attention_mask is not passed to the attention (post-LN)"] = post(mha=block.mha)
    return [pre(), post()], wrong


# --- DecoderLM ---


def embedding(lm, ids):
    token, position = lm.token_embeddings.weight[ids], lm.position_embeddings.weight
    B, S, D = token.shape
    return {
        "no positions": token,
        "positions start at 1, not 0": token + position[1 : S + 1],
        "positions without tokens": position[:S].expand(B, S, D),
        "one position for all tokens of a row": token + position[:1],
        "token embeddings scaled by sqrt(D)": token * math.sqrt(D) + position[:S],
    }


def embedding_with_padding(lm, ids, mask):
    token, position = lm.token_embeddings.weight[ids], lm.position_embeddings.weight
    real_tokens, columns = mask.long().cumsum(dim=1), torch.arange(ids.shape[1])
    wrong = {
        "attention_mask ignored: positions count the padding": token + position[columns],
        "positions start at 1: cumsum(mask) counts the token itself": token + position[real_tokens],
        "no positions": token,
    }
    left_only = (columns - mask.argmax(dim=1, keepdim=True)).clamp(min=0)
    if (left_only != real_tokens - 1)[mask.bool()].any():
        wrong["only the padding on the left is counted off"] = token + position[left_only]
    return wrong


def initial_std(smaller, n_layer, fan_in):
    wrong = {
        "torch's default initialisation": 1 / math.sqrt(3 * fan_in),
        "N(0, 1), torch's default of embeddings": 1.0,
    }
    if smaller:
        return wrong | {
            "n_layer in place of 2·n_layer": 0.02 / math.sqrt(n_layer),
            "no 1/sqrt(2·n_layer) for mha.proj and ff.linear_out: do their names match?": 0.02,
        }
    return wrong | {"the smaller start belongs to mha.proj and ff.linear_out only": 0.02 / math.sqrt(2 * n_layer)}


@torch.no_grad()
def logits(lm, ids, mask=None):
    """The correct logits of a model with these parts, and those of common mistakes in putting them together."""

    def through(blocks=lm.blocks, embed_mask=mask, block_mask=mask, before=IDENTITY, after=lm.ln):
        x = before(lm.embed(ids, embed_mask))
        for block in blocks:
            x = block(x, block_mask)
        return lm.token_logits(after(x))

    wrong = {
        "the blocks are skipped": through([]),
        "only the first block is applied": through(lm.blocks[:1]),
        "the blocks are applied twice": through([*lm.blocks, *lm.blocks]),
        "each block is applied twice": through([block for block in lm.blocks for _ in range(2)]),
        "the first block is applied in place of the others": through([lm.blocks[0]] * len(lm.blocks)),
        "the blocks are applied in reverse order": through(list(lm.blocks)[::-1]),
        "the final ln is skipped": through(after=IDENTITY),
        "ln comes before the blocks, it must come after them": through(before=lm.ln, after=IDENTITY),
        "ln before the blocks and after them": through(before=lm.ln),
        "probabilities, not logits": through().softmax(-1),
    }
    if mask is None:
        for token in (0, len(lm.token_embeddings.weight) - 1):
            name = f"token {token} is taken for padding: only attention_mask says what is"
            wrong[name] = through(embed_mask=(ids != token).float(), block_mask=(ids != token).float())
    else:
        wrong |= {
            "attention_mask ignored": through(embed_mask=None, block_mask=None),
            "embed does not get attention_mask": through(embed_mask=None),
            "the blocks do not get attention_mask": through(block_mask=None),
        }
    return through(), wrong
