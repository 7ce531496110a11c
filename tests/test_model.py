"""Question 1.3: model.py. All dimensions differ, so that a wrong transpose or reshape cannot fit by accident.

The references are PyTorch's scaled_dot_product_attention, values worked out by hand, and properties of every
correct solution; how a solution computes its result does not matter.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from checks import check_close, check_equal, check_shape, distinct_values, explained
from mistakes import model as mistakes
from mistakes.model import attention, split_heads

from model import DecoderBlock, DecoderLM, FeedForward, MultiHeadAttention

B, S, H, HD, V, P, N_LAYER = 2, 5, 3, 7, 11, 13, 2
D = H * HD

LEFT_PADDED = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
WITH_A_HOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0, 0.0]])
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
IDS = torch.tensor([[4, 10, 7, 0, 6], [9, 1, 3, 3, 2]])


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
    """Make a Linear or LayerNorm give `value` (a number or a vector) whatever its input."""
    module.weight.zero_()
    module.bias.zero_()
    module.bias += value


@torch.no_grad()
def make_identity(linear, factor=1.0, bias=0.0):
    linear.weight.copy_(factor * torch.eye(len(linear.weight)))
    linear.bias.fill_(bias)


# --- q_kT_v ---


@pytest.mark.question("1.3", "q_kT_v")
class TestQKTV:
    def test_each_head_gets_its_slice_of_the_features(self, mha):
        # Feature d of token s in row b is 1000 b + 100 s + d, so that a wrong number shows where it came from.
        x = torch.arange(B).view(B, 1, 1) * 1000.0 + torch.arange(S).view(S, 1) * 100 + torch.arange(D)
        make_identity(mha.q_attn)
        make_identity(mha.k_attn, factor=2.0)
        make_identity(mha.v_attn, factor=-1.0, bias=0.5)
        q, kT, v = mha.q_kT_v(x)
        of_x = x, 2 * x, 0.5 - x
        check_close(q, split_heads(x, H), "q", mistakes.queries(*of_x, H))
        hint = "kT is B×H×HD×S: keys, last two swapped"
        check_close(kT, split_heads(2 * x, H).transpose(2, 3), "kT", mistakes.keys(*of_x, H), hint)
        check_close(v, split_heads(0.5 - x, H), "v", mistakes.values(*of_x, H))

    def test_each_projection_has_its_own_weights(self, mha):
        x = torch.randn(B, S, D)
        q, kT, v = mha.q_kT_v(x)
        check_close(q, split_heads(mha.q_attn(x), H), "q of random weights", mistakes.projected(mha, x, "q"))
        k = kT.transpose(2, 3)
        check_close(k, split_heads(mha.k_attn(x), H), "k of random weights", mistakes.projected(mha, x, "k"))
        check_close(v, split_heads(mha.v_attn(x), H), "v of random weights", mistakes.projected(mha, x, "v"))


# --- self_attention, projection and forward of MultiHeadAttention ---


@pytest.fixture
def qkv():
    # Scores with a standard deviation near 3: large enough for a wrong scale to show, too small to saturate.
    return 3 * torch.randn(B, H, S, HD), torch.randn(B, H, HD, S), torch.randn(B, H, S, HD)


@pytest.mark.question("1.3", "self_attention")
class TestSelfAttention:
    def test_weights_of_each_query_sum_to_one(self, mha, qkv):
        q, kT, v = qkv
        got = mha.self_attention(q, kT, torch.ones_like(v))
        check_shape(got, (B, S, D), "self_attention", hint="are the heads merged at the end?")
        hint = "each query's weights must sum to 1: does softmax run over the keys, is dropout off here?"
        wrong = mistakes.sums_of_weights(q, kT)
        check_close(got, torch.ones(B, S, D), "attention over values that are all 1", wrong, hint)

    def test_equals_scaled_dot_product_attention(self, mha, qkv):
        got = mha.self_attention(*qkv)
        check_close(got, attention(*qkv, CAUSAL), "self_attention", mistakes.self_attention(*qkv))

    def test_large_scores_do_not_overflow(self, mha, qkv):
        q, kT, v = qkv
        got, right = mha.self_attention(100 * q, kT, v), attention(100 * q, kT, v, CAUSAL)
        hint = "if only large scores fail, exp overflows: use torch's softmax"
        check_close(got, right, "self_attention of scores near 300", hint=hint, atol=1e-4)  # weights near 0 or 1

    @pytest.mark.parametrize("mask", [WITH_A_HOLE, LEFT_PADDED], ids=["a hole", "left padding"])
    def test_padded_keys_get_no_weight(self, mha, qkv, mask):
        visible = CAUSAL & mask[:, None, None, :].bool()  # (B, 1, S, S)
        sees_a_key = visible.any(dim=-1)[:, 0]  # (B, S)
        hint = "attention_mask is B×S, the scores B×H×S×S: put axes of size 1 between, so that it masks the keys"
        with explained("self_attention with padding: expected a tensor", hint, RuntimeError, IndexError):
            got = mha.self_attention(*qkv, mask)
        check_shape(got, (B, S, D), "self_attention with padding")
        wrong = {name: w[sees_a_key] for name, w in mistakes.attention_with_padding(*qkv, mask).items()}
        check_close(got[sees_a_key], attention(*qkv, visible)[sees_a_key], "attention with padding", wrong)

    def test_a_query_without_any_key_gets_zero(self, mha, qkv):
        got = mha.self_attention(*qkv, LEFT_PADDED)[0, 0]  # the first token of row 0 sees only padding
        what = "a query whose keys are all padding"
        assert not got.isnan().any(), f"{what}: expected 0, got NaN (softmax of a row of -inf)"
        check_close(got, torch.zeros(D), what, mistakes.query_without_any_key(qkv[2][0]), atol=0.0)

    def test_dropout_falls_on_the_weights_in_training_only(self):
        # With q = 0 all s + 1 visible keys of token s weigh 1 / (s + 1); with values 1 and p = 1/2 the result
        # is 2 · (weights kept) / (s + 1), the same for all features of a head.
        n_tokens = 50
        mha = MultiHeadAttention(D, H, p_dropout=0.5)
        zeros, ones = torch.zeros(B, H, n_tokens, HD), torch.ones(B, H, n_tokens, HD)
        q_kT_v = zeros, zeros.transpose(2, 3), ones
        hint = "dropout must be off at evaluation: is the model's mode passed to it?"
        got = mha.eval().self_attention(*q_kT_v)
        check_close(got, torch.ones(B, n_tokens, D), "self_attention in eval mode", hint=hint)

        what = "self_attention in training mode"
        got = mha.train().self_attention(*q_kT_v).detach().view(B, n_tokens, H, HD)
        assert not torch.allclose(got, torch.ones_like(got)), (
            f"{what}: expected some weights dropped, got all of them: "
            "is dropout applied, and to the weights after softmax?"
        )
        assert torch.allclose(got, got[..., :1].expand_as(got)), (
            f"{what}: expected the features of a head to share their weights, got different ones; "
            "looks like: dropout on the result in place of the attention weights"
        )
        kept = got[..., 0] * torch.arange(1, n_tokens + 1)[:, None] / 2
        hint = "kept weights must be scaled by 1/(1 - p) and not normalised again"
        check_close(kept, kept.round(), "the weights that dropout kept, counted", hint=hint, atol=1e-3)
        # B H n (n + 1) / 2 = 7650, each kept with 1/2: mean 3825, sigma sqrt(7650)/2 = 44, 5 of them 219
        total = kept.sum().item()
        assert abs(total - 3825) < 219, f"{what}, p = 0.5: expected about 3825 of 7650 kept, got {total:.0f}"

    def test_projection_then_dropout(self, mha):
        x = torch.randn(B, S, D)
        make_identity(mha.proj, factor=3.0, bias=0.25)
        wrong = {"no projection": x, "bias left out": 3 * x}
        check_close(mha.projection(x), 3 * x + 0.25, "projection in eval mode", wrong)
        mha = MultiHeadAttention(D, H, p_dropout=0.5).train()
        make_constant(mha.proj, 1.0)
        what = "values of projection in training, p = 0.5, where proj gives 1"
        check_equal(distinct_values(mha.projection(x)), [0.0, 2.0], what, hint="is dropout applied after proj?")

    def test_forward_joins_the_parts(self, mha):
        x = torch.randn(B, S, D)
        alone = mha.proj(mha.v_attn(x))  # the result of a token that sees only itself
        got = mha(x)
        check_shape(got, (B, S, D), "forward")
        what, wrong = "the first token, which sees only itself", {"proj left out": mha.v_attn(x)[:, 0]}
        check_close(got[:, 0], alone[:, 0], what, wrong, hint="do tokens see those after them?")
        only_first = torch.tensor([[1.0, 0, 0, 0, 0]]).expand(B, S)
        wrong = {"forward does not pass on attention_mask": got}
        right = alone[:, :1].expand(B, S, D)
        check_close(mha(x, only_first), right, "forward where only token 0 is real", wrong)


# --- FeedForward and DecoderBlock ---


@pytest.mark.question("1.3", "FeedForward and DecoderBlock")
class TestFeedForward:
    def test_exact_gelu_of_four_times_the_width(self):
        n_embd = 6
        ff = FeedForward(n_embd).eval()
        check_shape(ff.linear_in.weight, (24, 6), "linear_in.weight", hint="is the width 4·n_embd?")
        check_shape(ff.linear_out.weight, (6, 24), "linear_out.weight", hint="is the width 4·n_embd?")
        # Hidden unit 6 c + d is x[d] + offset[c]; output d sums its four copies with the factors 1, 2, 3, 4.
        offsets, factors, x = [0.0, 0.5, -1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [-2.0, -1.0, -0.3, 0.4, 1.0, 2.0]
        copies = torch.eye(n_embd).repeat(4, 1)
        with torch.no_grad():
            ff.linear_in.weight.copy_(copies)
            ff.linear_in.bias.copy_(torch.tensor(offsets).repeat_interleave(n_embd))
            ff.linear_out.weight.copy_(copies.T * torch.tensor(factors).repeat_interleave(n_embd))
            ff.linear_out.bias.fill_(7.0)

        def output(activation):
            pairs = list(zip(factors, offsets, strict=True))
            return [[[7 + sum(f * activation(u + o) for f, o in pairs) for u in x]]]

        right = output(lambda u: u * 0.5 * (1 + math.erf(u / math.sqrt(2))))  # u Φ(u)
        wrong = {name: output(activation) for name, activation in mistakes.ACTIVATIONS.items()}
        check_close(ff(torch.tensor([[x]])), right, "FeedForward", wrong)

    def test_dropout_on_the_result_in_training_only(self):
        ff = FeedForward(D, p_dropout=0.5)
        make_constant(ff.linear_out, 1.0)
        x, hint = torch.randn(B, S, D), "dropout must be off at evaluation"
        check_close(ff.eval()(x), torch.ones(B, S, D), "FeedForward in eval mode, result 1", hint=hint)
        what, hint = "values of FeedForward in training, p = 0.5, result 1", "is dropout applied after linear_out?"
        check_equal(distinct_values(ff.train()(x)), [0.0, 2.0], what, hint=hint)


@pytest.mark.question("1.3", "FeedForward and DecoderBlock")
class TestDecoderBlock:
    def test_residual_stream_carries_the_input(self, block):
        # Both branches reduced to constants, so that the result is known.
        x, a, c = torch.randn(B, S, D), torch.randn(D), torch.randn(D)
        make_constant(block.mha.proj, a)
        make_constant(block.ff.linear_out, c)
        wrong = mistakes.residual_stream(block, x, a, c)
        check_close(block(x, None), x + a + c, "a block that adds a, then c", wrong)

    @pytest.mark.parametrize("sublayer", ["attention", "feed-forward"])
    def test_each_sublayer_reads_a_normalised_input(self, block, sublayer):
        # LayerNorm removes scale and shift: what a normalised sublayer adds is the same for x and 30 x + 2.
        silent, norm = (block.ff.linear_out, "ln_1") if sublayer == "attention" else (block.mha.proj, "ln_2")
        make_constant(silent)
        x = 10 * torch.randn(B, S, D)  # large, so that LayerNorm's eps does not show
        y = 30 * x + 2
        added = block(x, None) - x
        assert added.abs().max() > 0.1, f"the {sublayer} adds nothing to the residual stream: is it called?"
        what, hint = f"what the {sublayer} adds to 30 x + 2", f"its input is not normalised: is {norm} before it?"
        check_close(block(y, None) - y, added, what, hint=hint, atol=1e-3)  # differences of numbers up to 1000

    def test_each_sublayer_has_its_own_norm(self, block):
        x = torch.randn(B, S, D)

        def added_varies(norm, silent):
            """Whether what is added still depends on the token once `norm` gives a constant."""
            weights = {name: p.clone() for name, p in block.state_dict().items()}
            make_constant(norm, 0.5)
            make_constant(silent)
            added = block(x, None) - x
            block.load_state_dict(weights)
            return bool((added - added[:1, :1]).abs().max() > 1e-4)

        attention, feed_forward = block.mha.proj, block.ff.linear_out
        assert not added_varies(block.ln_1, feed_forward), "the attention must read ln_1(x): is it ln_2 there?"
        assert added_varies(block.ln_1, attention), "the feed-forward depends on ln_1: it must read ln_2's output"
        assert not added_varies(block.ln_2, attention), "the feed-forward must read ln_2(x): is it ln_1 there?"
        assert added_varies(block.ln_2, feed_forward), "the attention depends on ln_2: it must read ln_1's output"

    def test_feed_forward_reads_what_the_attention_wrote(self, block):
        # An attention that always adds a: the same block without attention, given x + a, must agree.
        x, a = torch.randn(B, S, D), 2 * torch.randn(D)
        make_constant(block.mha.proj)
        right, parallel = block(x + a, None), block(x, None) + a
        make_constant(block.mha.proj, a)
        wrong = {"the feed-forward reads the block's input, not the attention's result": parallel}
        check_close(block(x, None), right, "a block whose attention adds a", wrong)

    def test_attention_mask_reaches_the_attention(self, block):
        x = torch.randn(B, S, D)
        other = x.clone()
        other[0, :2] = torch.randn(2, D)  # where row 0 has its padding
        got, right = (block(values, LEFT_PADDED)[0, 2:] for values in (other, x))
        what, hint = "real tokens after other values of the padding", "does the block pass attention_mask on?"
        check_close(got, right, what, hint=hint)
        assert (block(x, None) - block(other, None))[0, 2:].abs().max() > 1e-3, (
            "tokens changed, no mask: expected later tokens to change, got none: is the attention called?"
        )

    def test_no_token_sees_those_after_it(self, block):
        x = torch.randn(B, S, D)
        other = x.clone()
        other[:, 3:] = torch.randn(B, 2, D)
        check_close(block(other, None)[:, :3], block(x, None)[:, :3], "tokens 0 to 2, tokens 3 and 4 changed")


# --- embed ---


@pytest.mark.question("1.3", "embed")
class TestEmbed:
    ids = torch.tensor([[4, 4, 7, 0, 10], [9, 1, 3, 3, 2]])

    def test_token_plus_position(self, lm):
        right = lm.token_embeddings.weight[self.ids] + lm.position_embeddings.weight[:S]
        hint = "is dropout off in eval mode?"
        check_close(lm.embed(self.ids), right, "embed", mistakes.embedding(lm, self.ids), hint)

    @pytest.mark.parametrize(
        "mask, positions",
        [
            (LEFT_PADDED, [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]),
            (WITH_A_HOLE, [[0, 0, 0, 1, 2], [0, 0, 1, 2, 0]]),
        ],
        ids=["left padding", "a hole"],
    )
    def test_positions_count_real_tokens_only(self, lm, mask, positions):
        hint = "is the position of padding on the left -1? any valid one will do"
        with explained("embed with padding: expected an embedding", hint, IndexError):
            got = lm.embed(self.ids, mask)
        check_shape(got, (B, S, D), "embed with padding")
        real = mask.bool()
        right = lm.token_embeddings.weight[self.ids] + lm.position_embeddings.weight[torch.tensor(positions)]
        wrong = {name: w[real] for name, w in mistakes.embedding_with_padding(lm, self.ids, mask).items()}
        check_close(got[real], right[real], "embed of the real tokens, with padding", wrong)

    def test_dropout_in_training_only(self, randomise):
        model = randomise(DecoderLM(V, D, H, P, N_LAYER, p_dropout=0.5))
        evaluated, again = model.eval().embed(self.ids), model.embed(self.ids)
        hint = "dropout must be off at evaluation"
        check_close(again, evaluated, "embed in eval mode, a second time", hint=hint)
        trained = model.train().embed(self.ids)
        dropped, what = trained == 0, "embed in training mode, p = 0.5"
        assert dropped.any(), f"{what}: expected about half 0, got none: is dropout applied to the sum?"
        hint = "dropout falls on the sum of token and position embeddings"
        check_close(trained, torch.where(dropped, 0.0, 2 * evaluated), what, hint=hint)

    def test_no_more_positions_than_there_are(self, lm):
        lm.embed(torch.zeros(1, P, dtype=torch.long))  # exactly n_positions tokens are fine
        try:
            lm.embed(torch.zeros(1, P + 1, dtype=torch.long))
        except Exception:  # which error is the solution's choice
            return
        raise AssertionError(f"{P + 1} tokens with n_positions = {P}: expected an error, got an embedding")


# --- DecoderLM ---


def parameter_names():
    """The state_dict of the interface."""
    linear = ["ln", *(f"blocks.{i}.{name}" for i in range(N_LAYER) for name in ("ln_1", "ln_2"))]
    linear += [f"blocks.{i}.ff.{name}" for i in range(N_LAYER) for name in ("linear_in", "linear_out")]
    linear += [f"blocks.{i}.mha.{name}" for i in range(N_LAYER) for name in ("q_attn", "k_attn", "v_attn", "proj")]
    names = {f"{name}.{p}" for name in linear for p in ("weight", "bias")}
    names |= {f"blocks.{i}.mha.scale_factor" for i in range(N_LAYER)}
    return names | {"token_embeddings.weight", "position_embeddings.weight"}


@pytest.mark.question("1.3", "DecoderLM")
class TestDecoderLM:
    # atol 1e-4 where logits are compared: they are sums of 21 products and come near 10

    def test_output_matrix_is_the_embedding_matrix(self, lm):
        with torch.no_grad():
            # Entry (v, d) is 100 v + d; written after the model was built, so that a copy does not follow.
            lm.token_embeddings.weight.copy_(100.0 * torch.arange(V)[:, None] + torch.arange(D))
        x = torch.zeros(1, 3, D)
        x[0, 0, 2] = x[0, 1, 20] = x[0, 2, 5] = 1.0
        right = torch.tensor([[[100.0 * v + d for v in range(V)] for d in (2, 20, 5)]])
        wrong = {"a bias or a scale on the logits": right / math.sqrt(D)}
        hint = "untied, or a copy? the output matrix is token_embeddings.weight itself, without a bias"
        check_close(lm.token_logits(x), right, "token_logits of unit vectors 2, 20, 5", wrong, hint)

    def test_output_matrix_gets_its_gradient(self, lm):
        # The derivative of the summed logits by row v of the matrix is the sum of x, for every v.
        x = torch.randn(B, S, D)
        logits = lm.token_logits(x)
        assert logits.requires_grad, "token_logits: expected a gradient, got none: is the matrix detached?"
        logits.sum().backward()
        gradient, what = lm.token_embeddings.weight.grad, "the gradient of token_logits for the embeddings"
        assert gradient is not None, f"{what}: expected a tensor, got none: is token_embeddings.weight detached?"
        check_close(gradient, x.sum(dim=(0, 1)).expand(V, D), what)

    def test_parameters_are_those_of_the_interface(self, lm):
        names, right = set(lm.state_dict()), parameter_names()
        missing, extra = sorted(right - names), sorted(names - right)
        assert not missing, (
            f"state_dict: expected {missing[0]} and {len(missing) - 1} more in it, got none of these: is blocks a "
            "ModuleList, scale_factor a buffer (register_buffer), and every name that of the docstring?"
        )
        assert not extra, (
            f"state_dict: expected nothing more in it, got {', '.join(extra)}: the output matrix is "
            "token_embeddings itself, and a mask kept as a buffer needs persistent=False"
        )
        # V D + P D embeddings; a block has 12 D² + 13 D; the final LayerNorm 2 D
        n_block = 12 * D * D + 13 * D
        n_right = V * D + P * D + N_LAYER * n_block + 2 * D
        wrong = {"one block serves for all layers": n_right - (N_LAYER - 1) * n_block}
        n_parameters = sum(p.numel() for p in lm.parameters())
        check_equal(n_parameters, n_right, "number of parameters", wrong, "is the output matrix a second one?")

    def test_initialisation(self):
        n_layer, n_embd = 3, 60
        model = DecoderLM(211, n_embd, 4, 37, n_layer)
        for name, p in model.named_parameters():
            values, n = p.detach().flatten(), p.numel()
            if name.endswith("bias") or ".ln" in name or name.startswith("ln"):
                value = 0.0 if name.endswith("bias") else 1.0
                assert (values == value).all(), f"{name}: expected {value:g} everywhere, got {values[0]:.4g} …"
                continue
            writes_residual = "mha.proj" in name or "ff.linear_out" in name
            std = 0.02 / math.sqrt(2 * n_layer) if writes_residual else 0.02
            wrong = mistakes.initial_std(writes_residual, n_layer, fan_in=p.shape[-1])
            # Relative to std, the deviation of n samples has a sigma of 1/sqrt(2 n), their mean 1/sqrt(n).
            what = f"standard deviation of {name}"
            check_close(values.std(), std, what, wrong, atol=0.0, rtol=5 / math.sqrt(2 * n))
            check_close(values.mean(), 0.0, f"mean of {name}", atol=5 * std / math.sqrt(n))
            # Of 2000 normal samples some lie beyond 2.5 sigma (none: 1e-11); uniform ones end at 1.73.
            assert values.abs().max() > 2.5 * std, (
                f"{name}: expected a normal distribution, got a bounded one (uniform?)"
            )

    def test_final_norm_comes_last(self, lm):
        # A final LayerNorm that gives u whatever it reads makes all logits those of u.
        u = torch.randn(D)
        right = torch.tensordot(lm.token_embeddings.weight.detach(), u, dims=1).expand(B, S, V)
        make_constant(lm.ln, u)
        hint = "is ln applied, after the last block?"
        check_close(lm(IDS), right, "logits where ln always gives u", hint=hint, atol=1e-4)

    def test_without_blocks_the_embedding_is_normalised(self, lm):
        for block in lm.blocks:
            make_constant(block.mha.proj)
            make_constant(block.ff.linear_out)
        right = lm.token_logits(F.layer_norm(lm.embed(IDS), (D,), lm.ln.weight, lm.ln.bias))
        wrong = mistakes.without_blocks(lm, IDS)
        check_close(lm(IDS), right, "logits where all blocks add nothing", wrong, atol=1e-4)

    def test_every_block_is_applied(self, lm):
        logits = lm(IDS)
        for i, block in enumerate(lm.blocks):
            bias = block.ff.linear_out.bias.data
            before = bias.clone()
            bias += torch.randn(D)
            assert not torch.allclose(lm(IDS), logits, atol=1e-3), f"block {i} has no effect: is it skipped?"
            bias.copy_(before)

    def test_blocks_are_applied_in_their_order(self, lm):
        # Block 0 reduced to adding c: the same as c in the embeddings, if the other block comes after it.
        c = 2 * torch.randn(D)
        make_constant(lm.blocks[0].mha.proj)
        make_constant(lm.blocks[0].ff.linear_out, c)
        got = lm(IDS)
        make_constant(lm.blocks[0].ff.linear_out)
        lm.position_embeddings.weight.data += c
        hint = "is block 0 the first to be applied?"
        check_close(got, lm(IDS), "logits where block 0 adds c", hint=hint, atol=1e-4)

    def test_no_logit_depends_on_later_tokens(self, lm):
        other = IDS.clone()
        other[:, 3:] = torch.tensor([[1, 2], [8, 5]])
        what = "logits of tokens 0 to 2, later tokens changed"
        check_close(lm(other)[:, :3], lm(IDS)[:, :3], what, hint="the model sees the token it should predict")

    def test_attention_mask_reaches_every_block(self, lm):
        # Without position embeddings, only the attention can tell padding from tokens.
        torch.nn.init.zeros_(lm.position_embeddings.weight)
        right, hint = lm(IDS[:1, 2:]), "does every block get attention_mask?"
        for padding in (1, 10):
            padded = torch.tensor([[padding, padding, 7, 0, 6]])
            got, ignored = lm(padded, LEFT_PADDED[:1])[:, 2:], lm(padded)[:, 2:]
            wrong = {"attention_mask does not reach the blocks": ignored}
            check_close(got, right, "logits of tokens behind padding", wrong, hint, atol=1e-4)

    def test_left_padding_changes_no_logit(self, lm):
        ids = torch.tensor([[5, 5, 7, 0, 6], [9, 1, 3, 3, 2]])
        padded = lm(ids, LEFT_PADDED)
        wrong = {name: value[:1, 2:] for name, value in mistakes.left_padding(lm, ids, LEFT_PADDED).items()}
        hint = "do positions count real tokens only, and does every block get the mask?"
        check_close(padded[:1, 2:], lm(ids[:1, 2:]), "logits of tokens behind padding", wrong, hint, atol=1e-4)
        check_close(padded[1], lm(ids[1:])[0], "logits of a row that has no padding itself", atol=1e-4)

    def test_no_token_id_is_special(self, lm):
        # A twin of token 3 (or 4) must act as token 3: <|endoftext|> or token 0 in a text is not padding.
        for special, twin in ((V - 1, 3), (0, 4)):
            lm.token_embeddings.weight.data[special] = lm.token_embeddings.weight.data[twin]
            what = f"logits with token {special} for its twin {twin}"
            hint = f"is token {special} taken for padding? only attention_mask says what is padding"
            check_close(lm(IDS), lm(torch.where(special == IDS, twin, IDS)), what, hint=hint)
        check_close(lm(IDS, torch.ones(B, S)), lm(IDS), "logits with a mask of ones, or without")

    def test_p_dropout_reaches_every_dropout(self, randomise):
        # With p = 1 everything that a dropout follows is 0 in training, and nothing changes at evaluation.
        model = randomise(DecoderLM(V, D, H, P, N_LAYER, p_dropout=1.0)).train()
        x = torch.randn(B, S, D)
        results = {"embed": model.embed(IDS)}
        for i, block in model.blocks.named_children():
            results[f"blocks[{i}].ff"] = block.ff(x)
            results[f"blocks[{i}].mha.projection"] = block.mha.projection(x)
            results[f"blocks[{i}].mha.self_attention"] = block.mha.self_attention(*block.mha.q_kT_v(x))
        for name, result in results.items():
            what, hint = f"{name} in training, p_dropout = 1", "is p_dropout passed to it?"
            check_close(result, torch.zeros_like(result), what, hint=hint)
        without = randomise(DecoderLM(V, D, H, P, N_LAYER, p_dropout=0.0))
        right = without.eval()(IDS)
        hint = "a dropout is active at evaluation"
        check_close(model.eval()(IDS), right, "logits at evaluation, p_dropout = 1", hint=hint)
        hint = "some dropout does not get p_dropout"
        check_close(without.train()(IDS), right, "logits in training, p_dropout = 0", hint=hint)


# --- More of the interface, without points ---


@pytest.mark.parametrize("S_q", [1, 2])
@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["no padding", "left padding"])
def test_fewer_queries_than_keys_are_those_of_the_last_tokens(mha, qkv, S_q, mask):
    q, kT, v = qkv
    what = f"self_attention of {S_q} queries and {S} keys (decoding with cached keys, no points)"
    with explained(f"{what}: expected a tensor", "is the causal mask S_q×S_k?", RuntimeError):
        got = mha.self_attention(q[:, :, -S_q:], kT, v, mask)
    check_close(got, mha.self_attention(q, kT, v, mask)[:, -S_q:], what)


def test_logits_are_those_of_the_hidden_states(lm):
    if not hasattr(lm, "hidden_states"):
        pytest.skip("this DecoderLM has no hidden_states (optional for the points)")
    hidden = lm.hidden_states(IDS, LEFT_PADDED)
    check_shape(hidden, (B, S, D), "hidden_states")
    check_close(lm.token_logits(hidden), lm(IDS, LEFT_PADDED), "token_logits(hidden_states(…))")


def test_flops_per_token(lm):
    # 6 (231 + 273 + 2·5565 + 42) + 12·2·21·13, worked out by hand
    check_equal(lm.flops_per_token, 76608, "flops_per_token")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_masks_of_other_types_mean_the_same(lm, dtype):
    check_close(lm(IDS, WITH_A_HOLE.to(dtype)), lm(IDS, WITH_A_HOLE), f"logits with a mask of {dtype}")


def test_a_fully_masked_row_has_finite_gradients(lm):
    mask = torch.zeros(B, S)
    mask[1] = 1.0
    lm(IDS, mask).sum().backward()
    bad = [name for name, p in lm.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    check_equal(bad, [], "gradients that are not finite with a row of padding only")
