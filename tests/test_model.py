"""Question 1.3: model.py. Dimensions all differ, so that no wrong transpose or reshape fits by accident.

The references are torch's own scaled_dot_product_attention, values worked out by hand, and properties that
every right solution has; how a solution computes its result is its own affair.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from points import check_close

from model import DecoderBlock, DecoderLM, FeedForward, MultiHeadAttention

B, S, H, HD, V, P, N_LAYER = 2, 5, 3, 7, 11, 13, 2
D = H * HD

LEFT_PADDED = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
WITH_A_HOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0, 0.0]])
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()


@pytest.fixture
def mha(randomise):
    return randomise(MultiHeadAttention(D, H)).eval()


@pytest.fixture
def block(randomise):
    return randomise(DecoderBlock(D, H)).eval()


@pytest.fixture
def lm(randomise):
    return randomise(DecoderLM(V, D, H, P, N_LAYER)).eval()


@torch.no_grad()
def make_constant(module, value=0.0):
    """Let a Linear or LayerNorm give `value` (a number or a vector) whatever its input."""
    module.weight.zero_()
    module.bias.zero_()
    module.bias += value


@torch.no_grad()
def make_identity(linear, factor=1.0, bias=0.0):
    linear.weight.copy_(factor * torch.eye(len(linear.weight)))
    linear.bias.fill_(bias)


# ---------------------------------------------------------------------------------------------------------
# q_kT_v


@pytest.mark.question("1.3", "q_kT_v")
class TestQKTV:
    def test_each_head_gets_its_slice_of_the_features(self, mha):
        # Feature d of token s in row b is 1000 b + 100 s + d, so that each number tells where it came from.
        x = torch.tensor([[[1000.0 * b + 100 * s + d for d in range(D)] for s in range(S)] for b in range(B)])
        make_identity(mha.q_attn)
        make_identity(mha.k_attn, factor=2.0)
        make_identity(mha.v_attn, factor=-1.0, bias=0.5)
        q, kT, v = mha.q_kT_v(x)

        def features(feature_of):
            rows = [
                [
                    [[1000.0 * b + 100 * s + feature_of(h, i) for i in range(HD)] for s in range(S)]
                    for h in range(H)
                ]
                for b in range(B)
            ]
            return torch.tensor(rows)  # (B, H, S, HD)

        right = features(lambda h, i: HD * h + i)
        interleaved = features(lambda h, i: H * i + h)
        mixed = x.view(B, H, S, HD)
        wrong = {
            "heads interleaved: head h takes features h·HD to (h+1)·HD - 1": interleaved,
            "a view to (B, H, S, HD) mixes tokens and heads: split the last axis, then transpose": mixed,
        }
        check_close(
            q,
            right,
            "q",
            wrong | {"keys in place of queries": 2 * right, "q already scaled": right / math.sqrt(HD)},
        )
        wrong_kT = {name: 2 * value.transpose(2, 3) for name, value in wrong.items()}
        wrong_kT["a view to (HD, S) in place of a transpose"] = 2 * right.reshape(B, H, HD, S)
        wrong_kT["k, not yet transposed"] = 2 * right
        wrong_kT["queries in place of keys"] = right.transpose(2, 3)
        check_close(kT, 2 * right.transpose(2, 3), "kT", wrong_kT, hint="kT is B×H×HD×S: keys, last two swapped")
        wrong_v = {name: 0.5 - value for name, value in wrong.items()}
        wrong_v |= {"keys in place of values": 2 * right, "queries in place of values": right}
        check_close(v, 0.5 - right, "v", wrong_v)

    def test_each_projection_has_its_own_weights(self, mha):
        x = torch.randn(B, S, D)
        got = dict(zip(("q", "kT", "v"), mha.q_kT_v(x), strict=True))
        got["k"] = got.pop("kT").transpose(2, 3)
        layers = {"q": mha.q_attn, "k": mha.k_attn, "v": mha.v_attn}

        def heads(layer, bias=True):
            features = layer(x) if bias else layer(x) - layer.bias
            return torch.stack(features.split(HD, dim=-1), dim=1)  # (B, H, S, HD)

        for name, layer in layers.items():
            wrong = {f"{other}_attn used for {name}": heads(layers[other]) for other in layers if other != name}
            wrong[f"the bias of {name}_attn is left out"] = heads(layer, bias=False)
            check_close(got[name], heads(layer), f"{name} of random weights", wrong)


# ---------------------------------------------------------------------------------------------------------
# self_attention, projection and their forward


def sdpa(q, kT, v, visible=CAUSAL, scale=None):
    """The reference: (B, H, S, HD), not merged. `visible` broadcasts to (B, H, S, S)."""
    return F.scaled_dot_product_attention(q, kT.transpose(2, 3), v, attn_mask=visible, scale=scale)


def merged(heads):
    return torch.cat(list(heads.unbind(dim=1)), dim=-1)  # (B, H, S, HD) -> (B, S, D), head 0 first


@pytest.fixture
def qkv():
    # Scores of a standard deviation near 3: large enough for a wrong scale to show, too small to saturate.
    return 3 * torch.randn(B, H, S, HD), torch.randn(B, H, HD, S), torch.randn(B, H, S, HD)


@pytest.mark.question("1.3", "self_attention")
class TestSelfAttention:
    def test_weights_of_each_query_sum_to_one(self, mha, qkv):
        q, kT, v = qkv
        scores = q @ kT / math.sqrt(HD)

        def sums(weights):  # (B, H, S, S): what they give over values of 1
            return merged(weights.sum(dim=-1, keepdim=True).expand(B, H, S, HD))

        wrong = {
            "softmax runs over the queries, it must run over the keys": sums(
                scores.masked_fill(~CAUSAL, -torch.inf).softmax(-2)
            ),
            "softmax runs over the heads, it must run over the keys": sums(scores.softmax(1) * CAUSAL),
            "masked after softmax: mask the scores before it": sums(scores.softmax(-1) * CAUSAL),
            "the causal mask is strict: a token must see itself": torch.ones(B, S, D).index_fill(
                1, torch.tensor([0]), 0.0
            ),
        }
        got = mha.self_attention(q, kT, torch.ones_like(v))
        assert got is None or got.shape == (B, S, D), (
            f"self_attention: expected shape {(B, S, D)}, got {tuple(got.shape)}: are the heads merged at the end?"
        )
        check_close(
            got,
            torch.ones(B, S, D),
            "attention over values that are all 1",
            wrong,
            hint="each query's weights must sum to 1: does softmax run over the keys, is dropout off here?",
        )

    def test_equals_scaled_dot_product_attention(self, mha, qkv):
        q, kT, v = qkv
        right = sdpa(q, kT, v)
        # Without any key, softmax of equal lowest scores averages all values.
        strict = torch.where(CAUSAL.tril(-1).any(dim=1, keepdim=True), CAUSAL.tril(-1).float().log(), 0.0)
        q_of_strict = torch.cat([torch.zeros_like(q[:, :, :1]), q[:, :, 1:]], dim=2)
        wrong = {
            "no causal mask: tokens see the tokens after them": merged(sdpa(q, kT, v, None)),
            "the causal mask is transposed": merged(sdpa(q, kT, v, CAUSAL.T)),
            "the causal mask is strict: a token must see itself": merged(sdpa(q, kT, v, CAUSAL.tril(-1))),
            "the causal mask is strict, and the first token sees all": merged(sdpa(q_of_strict, kT, v, strict)),
            "masked scores are 0: make them -inf, or the lowest number, before softmax": merged(
                (q @ kT / math.sqrt(HD)).masked_fill(~CAUSAL, 0.0).softmax(-1) @ v
            ),
            "the scores are not scaled by 1/sqrt(HD)": merged(sdpa(q, kT, v, scale=1.0)),
            "the scores are multiplied by sqrt(HD), not divided": merged(sdpa(q, kT, v, scale=HD**0.5)),
            "the scores are scaled twice": merged(sdpa(q, kT, v, scale=1 / HD)),
            "the scores are scaled by 1/sqrt(D), not 1/sqrt(HD)": merged(sdpa(q, kT, v, scale=D**-0.5)),
            "heads merged without a transpose back to (B, S, H, HD)": right.reshape(B, S, D),
            "heads interleaved in the result": right.permute(0, 2, 3, 1).reshape(B, S, D),
        }
        check_close(mha.self_attention(q, kT, v), merged(right), "self_attention", wrong)

    def test_large_scores_do_not_overflow(self, mha, qkv):
        q, kT, v = qkv
        got = mha.self_attention(100 * q, kT, v)
        check_close(
            got,
            merged(sdpa(100 * q, kT, v)),
            "self_attention of scores near 300",
            atol=1e-4,
            hint="if only large scores fail, exp overflows: use torch's softmax",
        )  # atol: weights near 0 or 1

    @pytest.mark.parametrize("mask", [WITH_A_HOLE, LEFT_PADDED], ids=["a hole", "left padding"])
    def test_padded_keys_get_no_weight(self, mha, qkv, mask):
        q, kT, v = qkv
        keys = mask[:, None, None, :].bool()
        sees_something = (CAUSAL & keys).any(dim=-1)[:, 0]  # (B, S)

        def rows(heads):
            return merged(heads)[sees_something]

        wrong = {
            "attention_mask ignored": rows(sdpa(q, kT, v)),
            "padding masked on the queries, not on the keys": rows(
                sdpa(q, kT, v, CAUSAL & mask[:, None, :, None].bool()).nan_to_num()
            ),
            "attention_mask inverted: 1.0 is a real token": rows(sdpa(q, kT, v, CAUSAL & ~keys).nan_to_num()),
            "the causal mask is lost where attention_mask is given": rows(sdpa(q, kT, v, keys)),
            "row 0's mask is used for every row": rows(sdpa(q, kT, v, CAUSAL & keys[:1]).nan_to_num()),
            "attention_mask added to the scores as it is": rows(
                sdpa(q, kT, v, torch.where(CAUSAL, mask[:, None, None, :], -torch.inf))
            ),
        }
        got = mha.self_attention(q, kT, v, mask)
        assert got.shape == (B, S, D), f"self_attention: expected shape {(B, S, D)}, got {tuple(got.shape)}"
        check_close(got[sees_something], rows(sdpa(q, kT, v, CAUSAL & keys)), "attention with padding", wrong)

    def test_a_query_without_any_key_gets_zero(self, mha, qkv):
        q, kT, v = qkv
        got = mha.self_attention(q, kT, v, LEFT_PADDED)[0, 0]  # the first token of row 0 sees only padding
        average_all = v[0].mean(dim=1).flatten()
        itself = v[0, :, 0].flatten()
        wrong = {
            "all keys at the same lowest score, so softmax averages every value": average_all,
            "padding sees itself": itself,
            "softmax of a row of -inf is NaN": torch.full((D,), torch.nan),
        }
        if got.isnan().any():
            raise AssertionError(
                "a query whose keys are all padding: expected 0, got NaN (softmax of a row of -inf)"
            )
        wrong.pop("softmax of a row of -inf is NaN")
        check_close(got, torch.zeros(D), "a query whose keys are all padding", wrong, atol=0.0)

    def test_dropout_falls_on_the_weights_in_training_only(self):
        # With q = 0 all s + 1 visible keys of token s weigh 1 / (s + 1); with values 1 and p = 1/2 the result
        # is 2 · (weights kept) / (s + 1), the same for all features of a head.
        n_tokens = 50
        mha = MultiHeadAttention(D, H, p_dropout=0.5)
        zeros, ones = torch.zeros(B, H, n_tokens, HD), torch.ones(B, H, n_tokens, HD)
        q_kT_v = zeros, zeros.transpose(2, 3), ones
        check_close(
            mha.eval().self_attention(*q_kT_v),
            torch.ones(B, n_tokens, D),
            "self_attention in eval mode",
            hint="dropout must be off at evaluation: is the model's mode passed to it?",
        )
        got = mha.train().self_attention(*q_kT_v).detach()
        assert not torch.allclose(got, torch.ones_like(got)), (
            "self_attention in training mode: expected some weights dropped, got all of them: "
            "is dropout applied, and to the weights after softmax?"
        )
        by_head = got.view(B, n_tokens, H, HD)
        assert torch.allclose(by_head, by_head[..., :1].expand_as(by_head)), (
            "self_attention in training mode: expected the features of a head to share their weights, "
            "got different ones; looks like: dropout on the result in place of the attention weights"
        )
        kept = by_head[..., 0] * torch.arange(1, n_tokens + 1)[:, None] / 2
        check_close(
            kept,
            kept.round(),
            "the weights that dropout kept, counted",
            atol=1e-3,  # up to 50
            hint="kept weights must be scaled by 1/(1 - p) and not normalised again",
        )
        # B H n (n + 1) / 2 = 7650, each kept with 1/2: mean 3825, sigma sqrt(7650)/2 = 44, 5 of them 219
        total = kept.sum().item()
        assert abs(total - 3825) < 219, f"with p = 0.5 expected about 3825 of 7650 weights kept, got {total:.0f}"

    def test_projection_then_dropout(self, mha):
        x = torch.randn(B, S, D)
        make_identity(mha.proj, factor=3.0, bias=0.25)
        check_close(
            mha.projection(x),
            3 * x + 0.25,
            "projection in eval mode",
            {"no projection": x, "bias left out": 3 * x},
        )
        dropping = MultiHeadAttention(D, H, p_dropout=0.5).train()
        make_constant(dropping.proj, 1.0)
        values = sorted(set(dropping.projection(x).flatten().tolist()))
        assert values == [0.0, 2.0], (
            f"projection in training, p = 0.5, of what is 1: expected the values 0 and 2, got {values[:5]}: "
            "is dropout applied after proj?"
        )

    def test_forward_joins_the_parts(self, mha):
        x = torch.randn(B, S, D)
        token_alone = mha.proj(mha.v_attn(x))  # what a token gets that sees only itself
        got = mha(x)
        assert got.shape == (B, S, D), f"forward: expected shape {(B, S, D)}, got {tuple(got.shape)}"
        check_close(
            got[:, 0],
            token_alone[:, 0],
            "the first token, which sees only itself",
            {"proj left out": mha.v_attn(x)[:, 0]},
            hint="do tokens see those after them?",
        )
        only_first = torch.tensor([[1.0, 0, 0, 0, 0]]).expand(B, S)
        check_close(
            mha(x, only_first),
            token_alone[:, :1].expand(B, S, D),
            "forward where only token 0 is real",
            {"forward does not pass on attention_mask": got},
        )


# ---------------------------------------------------------------------------------------------------------
# FeedForward and DecoderBlock


@pytest.mark.question("1.3", "FeedForward and DecoderBlock")
class TestFeedForward:
    def test_exact_gelu_of_four_times_the_width(self):
        n_embd = 6
        ff = FeedForward(n_embd).eval()
        got_width = tuple(ff.linear_in.weight.shape), tuple(ff.linear_out.weight.shape)
        assert got_width == ((24, 6), (6, 24)), (
            f"linear_in, linear_out: expected (24, 6), (6, 24), got {got_width}: is the width 4·n_embd?"
        )
        # Hidden unit 6 c + d is x[d] + offset[c]; output d sums its four copies with the factors 1, 2, 3, 4.
        offsets, factors, x = [0.0, 0.5, -1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [-2.0, -1.0, -0.3, 0.4, 1.0, 2.0]
        with torch.no_grad():
            ff.linear_in.weight.copy_(torch.eye(n_embd).repeat(4, 1))
            ff.linear_in.bias.copy_(torch.tensor(offsets).repeat_interleave(n_embd))
            ff.linear_out.weight.copy_(
                torch.eye(n_embd).repeat(4, 1).T * torch.tensor(factors).repeat_interleave(6)
            )
            ff.linear_out.bias.fill_(7.0)

        def expected(activation):
            return [
                7 + sum(f * activation(value + o) for f, o in zip(factors, offsets, strict=True)) for value in x
            ]

        wrong = {
            "ReLU in place of GELU": expected(lambda u: max(u, 0.0)),
            "the tanh approximation of GELU: the exact one uses erf": expected(
                lambda u: 0.5 * u * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
            ),
            "SiLU in place of GELU": expected(lambda u: u / (1 + math.exp(-u))),
            "no activation": expected(lambda u: u),
        }
        exact = expected(lambda u: u * 0.5 * (1 + math.erf(u / math.sqrt(2))))  # u Φ(u)
        check_close(ff(torch.tensor([[x]])), [[exact]], "FeedForward", {n: [[w]] for n, w in wrong.items()})

    def test_dropout_on_the_result_in_training_only(self):
        ff = FeedForward(D, p_dropout=0.5)
        make_constant(ff.linear_out, 1.0)
        x = torch.randn(B, S, D)
        check_close(
            ff.eval()(x),
            torch.ones(B, S, D),
            "FeedForward in eval mode, result 1",
            hint="dropout must be off at evaluation",
        )
        values = sorted(set(ff.train()(x).flatten().tolist()))
        assert values == [0.0, 2.0], (
            f"FeedForward in training, p = 0.5, result 1: expected the values 0 and 2, got {values[:5]}: "
            "is dropout applied after linear_out?"
        )


@pytest.mark.question("1.3", "FeedForward and DecoderBlock")
class TestDecoderBlock:
    def test_residual_stream_carries_the_input(self, block):
        # Both branches reduced to constants, so that the result is known: x + a + c.
        x, a, c = torch.randn(B, S, D), torch.randn(D), torch.randn(D)
        make_constant(block.mha.proj, a)
        make_constant(block.ff.linear_out, c)

        def norm(y):
            return F.layer_norm(y, (D,))

        with torch.no_grad():
            post = {
                "LayerNorm after the addition (post-LN): it belongs before each sublayer": (
                    block.ln_2(block.ln_1(x + a) + c)
                ),
                "LayerNorm after the whole block": block.ln_2(x + a + c),
                "LayerNorm on the residual stream: x is replaced by ln_1(x)": block.ln_1(x) + a + c,
            }
        wrong = {
            "no residual connection around the attention": (a + c).expand(B, S, D),
            "no residual connection around the feed-forward": c.expand(B, S, D),
            "the feed-forward adds to x, and the attention's part is lost": x + c,
            "the feed-forward is left out": x + a,
            "x is added twice": 2 * x + a + c,
        }
        check_close(block(x, None), x + a + c, "a block that adds a, then c", wrong | post)

    def test_each_sublayer_reads_a_normalised_input(self, block):
        # LayerNorm removes scale and shift: what a normalised sublayer adds is the same for x and 30 x + 2.
        x = 10 * torch.randn(B, S, D)  # large, so that LayerNorm's eps does not show
        for silent, sublayer, norm in (
            (block.ff.linear_out, "attention", "ln_1"),
            (block.mha.proj, "feed-forward", "ln_2"),
        ):
            kept = silent.weight.detach().clone(), silent.bias.detach().clone()
            make_constant(silent)
            added = block(x, None) - x
            assert added.abs().max() > 0.1, f"the {sublayer} adds nothing to the residual stream: is it called?"
            y = 30 * x + 2
            # atol 1e-3: float32 differences of numbers up to 1000
            check_close(
                block(y, None) - y,
                added,
                f"what the {sublayer} adds to 30 x + 2",
                atol=1e-3,
                hint=f"its input is not normalised: does {norm} stand before it?",
            )
            with torch.no_grad():
                silent.weight.copy_(kept[0])
                silent.bias.copy_(kept[1])

    def test_each_sublayer_has_its_own_norm(self, block):
        x = torch.randn(B, S, D)

        def added_varies(norm, silent):
            """Whether what is added still depends on the token once `norm` gives a constant."""
            with torch.no_grad():
                kept = [p.clone() for p in (norm.weight, norm.bias, silent.weight, silent.bias)]
                make_constant(norm, 0.5)
                make_constant(silent)
                added = block(x, None) - x
                for p, value in zip((norm.weight, norm.bias, silent.weight, silent.bias), kept, strict=True):
                    p.copy_(value)
            return bool((added - added[:1, :1]).abs().max() > 1e-4)

        attention, feed_forward = block.mha.proj, block.ff.linear_out
        assert not added_varies(block.ln_1, feed_forward), "the attention must read ln_1(x): is it ln_2 there?"
        assert added_varies(block.ln_1, attention), "the feed-forward depends on ln_1: it must read ln_2's output"
        assert not added_varies(block.ln_2, attention), (
            "the feed-forward must read ln_2's output: is it ln_1 there?"
        )
        assert added_varies(block.ln_2, feed_forward), "the attention depends on ln_2: it must read ln_1's output"

    def test_feed_forward_reads_what_the_attention_wrote(self, block):
        # An attention that always adds a: the same block without attention, given x + a, must agree.
        x, a = torch.randn(B, S, D), 2 * torch.randn(D)
        make_constant(block.mha.proj)
        without = block(x + a, None)
        parallel = block(x, None) + a
        make_constant(block.mha.proj, a)
        check_close(
            block(x, None),
            without,
            "a block whose attention adds a",
            {"the feed-forward reads the block's input, not the attention's result": parallel},
        )

    def test_attention_mask_reaches_the_attention(self, block):
        x = torch.randn(B, S, D)
        other = x.clone()
        other[0, :2] = torch.randn(2, D)  # where row 0 has its padding
        changed = (block(x, LEFT_PADDED) - block(other, LEFT_PADDED))[0, 2:].abs().max().item()
        assert changed < 1e-5, (
            f"padding changed: expected real tokens as before, got a difference of {changed:.3g}: "
            "does the block pass attention_mask on?"
        )
        assert (block(x, None) - block(other, None))[0, 2:].abs().max() > 1e-3, (
            "tokens changed, no mask: expected later tokens to change, got none: is the attention called?"
        )

    def test_no_token_sees_those_after_it(self, block):
        x = torch.randn(B, S, D)
        other = x.clone()
        other[:, 3:] = torch.randn(B, 2, D)
        changed = (block(x, None) - block(other, None))[:, :3].abs().max().item()
        assert changed < 1e-5, (
            f"tokens 3 and 4 changed: expected 0 to 2 as before, got a difference of {changed:.3g}"
        )


# ---------------------------------------------------------------------------------------------------------
# embed


@pytest.mark.question("1.3", "embed")
class TestEmbed:
    ids = torch.tensor([[4, 4, 7, 0, 10], [9, 1, 3, 3, 2]])

    def parts(self, lm, positions):
        token, position = lm.token_embeddings.weight.detach(), lm.position_embeddings.weight.detach()
        return token[self.ids], position[torch.tensor(positions)]

    def test_token_plus_position(self, lm):
        token, position = self.parts(lm, [0, 1, 2, 3, 4])
        wrong = {
            "no positions": token.expand(B, S, D),
            "positions start at 1, not 0": token + self.parts(lm, [1, 2, 3, 4, 5])[1],
            "positions without tokens": position.expand(B, S, D),
            "one position for all tokens of a row": token + position[:1],
            "token embeddings scaled by sqrt(D)": token * math.sqrt(D) + position,
        }
        check_close(lm.embed(self.ids), token + position, "embed", wrong, hint="is dropout off in eval mode?")

    @pytest.mark.parametrize(
        "mask, positions",
        [
            (LEFT_PADDED, [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]),
            (WITH_A_HOLE, [[0, 0, 0, 1, 2], [0, 0, 1, 2, 0]]),
        ],
        ids=["left padding", "a hole"],
    )
    def test_positions_count_real_tokens_only(self, lm, mask, positions):
        real = mask.bool()
        token, position = self.parts(lm, positions)
        wrong = {
            "attention_mask ignored: positions count the padding": token + self.parts(lm, [0, 1, 2, 3, 4])[1],
            "positions start at 1: cumsum(mask) counts the token itself": token
            + self.parts(lm, [[p + 1 for p in row] for row in positions])[1],
            "no positions": token,
        }
        if positions[1][1] == 0:  # a hole: row 1's own padding is not on the left
            left_only = [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
            wrong["only the padding on the left is counted off"] = token + self.parts(lm, left_only)[1]
        try:
            got = lm.embed(self.ids, mask)
        except IndexError as error:
            raise AssertionError(
                "embed with padding: expected an embedding, got an IndexError: is the position of padding "
                "cumsum(mask) - 1 = -1? clamp it to 0"
            ) from error
        assert got.shape == (B, S, D), f"embed: expected shape {(B, S, D)}, got {tuple(got.shape)}"
        wrong = {name: value[real] for name, value in wrong.items()}
        check_close(got[real], (token + position)[real], "embed of the real tokens, with padding", wrong)

    def test_dropout_in_training_only(self, randomise):
        model = randomise(DecoderLM(V, D, H, P, N_LAYER, p_dropout=0.5))
        evaluated, trained = model.eval().embed(self.ids), model.train().embed(self.ids)
        check_close(
            model.eval().embed(self.ids),
            evaluated,
            "embed in eval mode, a second time",
            hint="dropout must be off at evaluation",
        )
        dropped = trained == 0
        assert dropped.any(), (
            "embed in training mode, p = 0.5: expected about half 0, got none: is dropout applied to the sum?"
        )
        check_close(
            trained,
            torch.where(dropped, 0.0, 2 * evaluated),
            "embed in training mode, p = 0.5",
            hint="dropout falls on the sum of token and position embeddings",
        )

    def test_no_more_positions_than_there_are(self, lm):
        lm.embed(torch.zeros(1, P, dtype=torch.long))  # exactly n_positions tokens are fine
        try:
            lm.embed(torch.zeros(1, P + 1, dtype=torch.long))
        except Exception:  # which error is the solution's choice
            return
        raise AssertionError(f"{P + 1} tokens with n_positions = {P}: expected an error, got an embedding")


# ---------------------------------------------------------------------------------------------------------
# DecoderLM


@pytest.mark.question("1.3", "DecoderLM")
class TestDecoderLM:
    ids = torch.tensor([[4, 10, 7, 0, 6], [9, 1, 3, 3, 2]])

    def test_output_matrix_is_the_embedding_matrix(self, lm):
        with torch.no_grad():
            # Entry (v, d) is 100 v + d; written after the model was built, so that a copy stays behind.
            lm.token_embeddings.weight.copy_(100.0 * torch.arange(V)[:, None] + torch.arange(D))
        x = torch.zeros(1, 3, D)
        x[0, 0, 2] = x[0, 1, 20] = x[0, 2, 5] = 1.0
        right = torch.tensor([[[100.0 * v + d for v in range(V)] for d in (2, 20, 5)]])
        check_close(
            lm.token_logits(x),
            right,
            "token_logits of unit vectors 2, 20, 5",
            {"a bias or a scale on the logits": right / math.sqrt(D)},
            hint="untied, or a copy: logits are x times token_embeddings.weight transposed, without bias",
        )
        # The derivative of the summed logits by row v of the matrix is the sum of x, for every v.
        x = torch.randn(B, S, D)
        lm.zero_grad()
        logits = lm.token_logits(x)
        assert logits.requires_grad, "token_logits: expected a gradient, got none: is the matrix detached?"
        logits.sum().backward()
        gradient = lm.token_embeddings.weight.grad
        assert gradient is not None, (
            "token_logits: expected a gradient for token_embeddings.weight, got none: detached?"
        )
        check_close(gradient, x.sum(dim=(0, 1)).expand(V, D), "the gradient of token_logits for the embeddings")

    def test_parameters_are_those_of_the_interface(self, lm):
        def linear(*names):
            return [f"{name}.{p}" for name in names for p in ("weight", "bias")]

        keys = {"token_embeddings.weight", "position_embeddings.weight", *linear("ln")}
        for i in range(N_LAYER):
            keys |= {f"blocks.{i}.{name}" for name in linear("ln_1", "ln_2", "ff.linear_in", "ff.linear_out")}
            keys |= {f"blocks.{i}.mha.{name}" for name in linear("q_attn", "k_attn", "v_attn", "proj")}
            keys.add(f"blocks.{i}.mha.scale_factor")
        missing, extra = sorted(keys - set(lm.state_dict())), sorted(set(lm.state_dict()) - keys)
        assert not missing, (
            f"state_dict: expected {missing[0]} and {len(missing) - 1} more in it, got none of these: is blocks a "
            "ModuleList, scale_factor a buffer (register_buffer), and every name that of the docstring?"
        )
        assert not extra, (
            f"state_dict: expected nothing more in it, got {', '.join(extra)}: the output matrix is "
            "token_embeddings itself, and a mask kept as a buffer needs persistent=False"
        )
        # V D + P D embeddings; a block has 12 D² + 13 D; the final LayerNorm 2 D
        right = V * D + P * D + N_LAYER * (12 * D * D + 13 * D) + 2 * D
        got = sum(p.numel() for p in lm.parameters())
        one_block = right - (N_LAYER - 1) * (12 * D * D + 13 * D)
        guess = "one block serves for all layers" if got == one_block else "is the output matrix a second one?"
        assert got == right, f"parameters: expected {right}, got {got}: {guess}"

    def test_initialisation(self):
        n_layer, n_embd = 3, 60
        model = DecoderLM(211, n_embd, 4, 37, n_layer)
        residual = 0.02 / math.sqrt(2 * n_layer)
        for name, p in model.named_parameters():
            values = p.detach().flatten()
            if name.endswith("bias") or ".ln" in name or name.startswith("ln"):
                value = 0.0 if name.endswith("bias") else 1.0
                assert (values == value).all(), f"{name}: expected {value:g} everywhere, got {values[0]:.4g} …"
                continue
            writes_residual = "mha.proj" in name or "ff.linear_out" in name
            std = residual if writes_residual else 0.02
            got = values.std().item()
            looks_like = {
                "torch's default initialisation": 1 / math.sqrt(3 * p.shape[-1]),
                "N(0, 1), torch's default of embeddings": 1.0,
                "n_layer in place of 2·n_layer": 0.02 / math.sqrt(n_layer),
                "the smaller start belongs to mha.proj and ff.linear_out only": residual,
                "no 1/sqrt(2·n_layer) for mha.proj and ff.linear_out: do their names match?": 0.02,
            }
            guess = [text for text, value in looks_like.items() if abs(got / value - 1) < 0.05 and value != std]
            # Relative to std, the deviation of n samples has a sigma of 1/sqrt(2 n), their mean 1/sqrt(n).
            n = len(values)
            assert abs(got / std - 1) < 5 / math.sqrt(2 * n), (
                f"{name}: expected a standard deviation of {std:.4g}, got {got:.4g}"
                + (f"; looks like: {guess[0]}" if guess else "")
            )
            mean = values.mean().item()
            assert abs(mean) < 5 * std / math.sqrt(n), f"{name}: expected mean 0, got {mean:.4g}"
            # Of 2000 normal samples some lie beyond 2.5 sigma (none: 1e-11); uniform ones end at 1.73.
            assert values.abs().max() > 2.5 * std, (
                f"{name}: expected a normal distribution, got a bounded one (uniform?)"
            )

    def test_final_norm_comes_last(self, lm):
        # A final LayerNorm that gives u whatever it reads makes all logits those of u.
        u = torch.randn(D)
        expected = torch.tensordot(lm.token_embeddings.weight.detach(), u, dims=1).expand(B, S, V)
        make_constant(lm.ln, u)
        check_close(
            lm(self.ids),
            expected,
            "logits where ln always gives u",
            atol=1e-4,  # sums of 21 products
            hint="is ln applied, after the last block?",
        )

    def test_without_blocks_the_embedding_is_normalised(self, lm):
        for block in lm.blocks:
            make_constant(block.mha.proj)
            make_constant(block.ff.linear_out)
        x = lm.embed(self.ids).detach()
        check_close(
            lm(self.ids),
            lm.token_logits(F.layer_norm(x, (D,), lm.ln.weight, lm.ln.bias)),
            "logits where all blocks add nothing",
            {
                "the final ln is skipped": lm.token_logits(x),
                "token 0 is taken for padding: only attention_mask says what is": lm.token_logits(
                    F.layer_norm(lm.embed(self.ids, (self.ids != 0).float()), (D,), lm.ln.weight, lm.ln.bias)
                ),
            },
            atol=1e-4,
        )

    def test_every_block_is_applied_in_its_order(self, lm):
        logits = lm(self.ids)
        for i, block in enumerate(lm.blocks):
            kept = block.ff.linear_out.bias.detach().clone()
            make_bias = block.ff.linear_out.bias.data
            make_bias += 1.0 * torch.randn(D)
            assert not torch.allclose(lm(self.ids), logits, atol=1e-3), f"block {i} has no effect: is it skipped?"
            make_bias.copy_(kept)
        # Block 0 reduced to adding c: the same as c in the embeddings, if the other block comes after it.
        c = 2 * torch.randn(D)
        make_constant(lm.blocks[0].mha.proj)
        make_constant(lm.blocks[0].ff.linear_out, c)
        got = lm(self.ids)
        make_constant(lm.blocks[0].ff.linear_out)
        lm.position_embeddings.weight.data += c
        check_close(
            got,
            lm(self.ids),
            "logits where block 0 adds c",
            hint="is block 0 the first to be applied?",
            atol=1e-4,
        )  # logits near 10

    def test_no_logit_depends_on_later_tokens(self, lm):
        other = self.ids.clone()
        other[:, 3:] = torch.tensor([[1, 2], [8, 5]])
        check_close(
            lm(other)[:, :3],
            lm(self.ids)[:, :3].detach(),
            "logits of tokens 0 to 2, later tokens changed",
            hint="the model sees the token that it shall predict",
        )

    def test_attention_mask_reaches_every_block(self, lm):
        # Positions set aside: only the attention can tell padding from tokens here.
        torch.nn.init.zeros_(lm.position_embeddings.weight)
        real = lm(self.ids[:1, 2:])
        for padding in (1, 10):
            padded = torch.tensor([[padding, padding, 7, 0, 6]])
            check_close(
                lm(padded, LEFT_PADDED[:1])[:, 2:],
                real.detach(),
                "logits of tokens behind padding",
                {"attention_mask does not reach the blocks": lm(padded)[:, 2:].detach()},
                hint="does every block get attention_mask?",
                atol=1e-4,
            )  # logits near 10

    def test_left_padding_changes_no_logit(self, lm):
        alone = lm(self.ids[:1, 2:]).detach()
        ids = torch.tensor([[5, 5, 7, 0, 6], [9, 1, 3, 3, 2]])
        padded = lm(ids, LEFT_PADDED).detach()
        x = lm.embed(ids)
        for block in lm.blocks:
            x = block(x, LEFT_PADDED)
        check_close(
            padded[:1, 2:],
            alone,
            "logits of tokens behind padding",
            {
                "attention_mask ignored": lm(ids)[:1, 2:],
                "embed does not get attention_mask": lm.token_logits(lm.ln(x))[:1, 2:],
            },
            hint="do positions count real tokens only, and does every block get the mask?",
            atol=1e-4,
        )
        check_close(padded[1], lm(ids[1:])[0].detach(), "logits of a row that has no padding itself", atol=1e-4)

    def test_no_token_id_is_special(self, lm):
        # A twin of token 3 (or 4) must act as token 3: a real <|endoftext|> or a token 0 is no padding.
        for special, twin in ((V - 1, 3), (0, 4)):
            lm.token_embeddings.weight.data[special] = lm.token_embeddings.weight.data[twin]
            twins = torch.where(self.ids == special, twin, self.ids)
            check_close(
                lm(self.ids),
                lm(twins).detach(),
                f"logits with token {special} for its twin {twin}",
                hint=f"is token {special} taken for padding? only attention_mask says what is padding",
            )
        check_close(
            lm(self.ids, torch.ones(B, S)), lm(self.ids).detach(), "logits with a mask of ones, or without"
        )

    def test_p_dropout_reaches_every_dropout(self, randomise):
        # With p = 1 everything that a dropout follows is 0 in training, and nothing changes at evaluation.
        model = randomise(DecoderLM(V, D, H, P, N_LAYER, p_dropout=1.0)).train()
        x = torch.randn(B, S, D)

        def all_zero(tensor, what):
            assert (tensor == 0).all(), (
                f"{what}, p_dropout = 1, training: expected all 0, got values: p_dropout not passed?"
            )

        all_zero(model.embed(self.ids), "embed")
        for i, block in enumerate(model.blocks):
            all_zero(block.ff(x), f"blocks[{i}].ff")
            all_zero(block.mha.projection(x), f"blocks[{i}].mha.projection")
            all_zero(block.mha.self_attention(*block.mha.q_kT_v(x)), f"blocks[{i}].mha.self_attention")
        without = randomise(DecoderLM(V, D, H, P, N_LAYER, p_dropout=0.0))
        right = without.eval()(self.ids).detach()
        check_close(
            model.eval()(self.ids),
            right,
            "logits at evaluation, p_dropout = 1",
            hint="a dropout is active at evaluation",
        )
        check_close(
            without.train()(self.ids),
            right,
            "logits in training, p_dropout = 0",
            hint="some dropout does not get p_dropout",
        )


# ---------------------------------------------------------------------------------------------------------
# More of the interface, without points


def test_hidden_states_are_what_the_logits_are_computed_from(lm):
    if not hasattr(lm, "hidden_states"):
        pytest.skip("this DecoderLM has no hidden_states (optional for the points)")
    ids = TestDecoderLM.ids
    hidden = lm.hidden_states(ids, LEFT_PADDED)
    assert hidden.shape == (B, S, D), f"hidden_states: expected shape {(B, S, D)}, got {tuple(hidden.shape)}"
    check_close(lm.token_logits(hidden), lm(ids, LEFT_PADDED).detach(), "token_logits(hidden_states(…))")


def test_flops_per_token(lm):
    # 6 (231 + 273 + 2·5565 + 42) + 12·2·21·13, worked out by hand
    assert lm.flops_per_token == 76608, f"flops_per_token: expected 76608, got {lm.flops_per_token}"


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_masks_of_other_types_mean_the_same(lm, dtype):
    ids = TestDecoderLM.ids
    check_close(lm(ids, WITH_A_HOLE.to(dtype)), lm(ids, WITH_A_HOLE).detach(), f"logits with a mask of {dtype}")


def test_a_fully_masked_row_has_finite_gradients(lm):
    mask = torch.zeros(B, S)
    mask[1] = 1.0
    lm(TestDecoderLM.ids, mask).sum().backward()
    bad = [name for name, p in lm.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not bad, f"gradients with a row of padding only: expected finite numbers, got none in {bad}"
