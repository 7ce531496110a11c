"""Question 1.3: model.py. All dimensions differ, so that a wrong transpose or reshape cannot fit by accident.

The references are PyTorch's scaled_dot_product_attention, values worked out by hand, and what the solution's own
smaller parts give; how a solution computes its result does not matter. Outputs at padding are not compared.
Tests marked `question` give points; those marked `advice` test what this package adds to the handout.
"""

import math

import pytest
import torch
from checks import check_close, check_equal, check_shape, distinct_values, explained, nearest
from mistakes import model as mistakes
from mistakes.model import attention, split_heads
from stand_ins import use_right_attention, use_right_parts, use_right_q_kT_v

from model import DecoderBlock, DecoderLM, FeedForward, MultiHeadAttention

B, S, H, HD, V, P, N_LAYER = 2, 5, 3, 7, 11, 13, 2
D = H * HD

LEFT_PADDED = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
WITH_A_HOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0, 0.0]])
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
IDS = torch.tensor([[4, 10, 7, 0, 6], [9, 1, 3, 3, 2]])
DROPOUT_TWICE = "dropout twice, one after the other"


@pytest.fixture
def mha(randomise):
    return randomise(MultiHeadAttention(D, H)).eval()


@pytest.fixture
def block(randomise):
    """A DecoderBlock whose attention is correct, so that a mistake there costs its own points only."""
    return use_right_attention(randomise(DecoderBlock(D, H)), H).eval()


@pytest.fixture
def raw_lm(randomise):
    return randomise(DecoderLM(V, D, H, P, N_LAYER)).eval()


@pytest.fixture
def lm(randomise):
    """A DecoderLM with correct parts to put together."""
    return randomise(use_right_parts(DecoderLM(V, D, H, P, N_LAYER))).eval()


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
        make_identity(mha.q_attn, bias=0.25)
        make_identity(mha.k_attn, factor=2.0, bias=0.5)
        make_identity(mha.v_attn, factor=-1.0, bias=0.75)
        q, k, v = x + 0.25, 2 * x + 0.5, 0.75 - x
        got_q, got_kT, got_v = mha.q_kT_v(x)
        wrong = {"k": k, "v": v, "q without its bias": x}
        check_close(got_q, split_heads(q, H), "q", mistakes.heads_of(q, wrong, H))
        wrong, hint = {"q": q, "v": v, "k without its bias": 2 * x}, "kT is B×H×HD×S: keys, last two swapped"
        check_close(got_kT, split_heads(k, H).transpose(2, 3), "kT", mistakes.keys(k, wrong, H), hint)
        wrong = {"k": k, "q": q, "v without its bias": -x}
        check_close(got_v, split_heads(v, H), "v", mistakes.heads_of(v, wrong, H))


# --- self_attention, projection and forward of MultiHeadAttention ---


@pytest.fixture
def qkv():
    # Scores with a standard deviation near 3: large enough for a wrong scale to show, too small to saturate.
    return 3 * torch.randn(B, H, S, HD), torch.randn(B, H, HD, S), torch.randn(B, H, S, HD)


@pytest.mark.question("1.3", "self_attention")
class TestSelfAttention:
    def test_equals_scaled_dot_product_attention(self, mha, qkv):
        got = mha.self_attention(*qkv)
        check_shape(got, (B, S, D), "self_attention", hint="are the heads merged at the end?")
        check_close(got, attention(*qkv, CAUSAL), "self_attention", mistakes.self_attention(*qkv))

    def test_large_scores_do_not_overflow(self, mha, qkv):
        q, kT, v = qkv
        got, right = mha.self_attention(100 * q, kT, v), attention(100 * q, kT, v, CAUSAL)
        hint = "if only large scores fail, exp overflows: use torch's softmax"
        check_close(got, right, "self_attention of scores near 300", hint=hint, atol=1e-4)  # weights near 0 or 1

    @pytest.mark.parametrize("mask", [WITH_A_HOLE, LEFT_PADDED], ids=["a hole", "left padding"])
    def test_padded_keys_get_no_weight(self, mha, qkv, mask):
        visible, real = CAUSAL & mask[:, None, None, :].bool(), mask.bool()  # (B, 1, S, S), (B, S)
        hint = "attention_mask is B×S, the scores B×H×S×S: put axes of size 1 between, so that it masks the keys"
        with explained("self_attention with padding: expected a tensor", hint, RuntimeError, IndexError):
            got = mha.self_attention(*qkv, mask)
        check_shape(got, (B, S, D), "self_attention with padding")
        wrong = {name: w[real] for name, w in mistakes.attention_with_padding(*qkv, mask).items()}
        what = "attention with padding, at the real tokens"
        check_close(got[real], attention(*qkv, visible)[real], what, wrong)

    def test_padding_gives_the_next_layer_no_nan(self, mha):
        # NaN of a query that sees no key reaches the real tokens in the next layer, since 0 · NaN = NaN.
        use_right_q_kT_v(mha, H)  # a mistake in q_kT_v costs its own points only
        got = mha(mha(torch.randn(B, S, D), LEFT_PADDED), LEFT_PADDED)[0, 2:]
        hint = "softmax of a row of -inf: fill with torch.finfo(q.dtype).min"
        assert not got.isnan().any(), f"real tokens after two layers with padding: got NaN; {hint}"

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

    def test_projection_then_dropout(self, mha):
        x = torch.randn(B, S, D)
        make_identity(mha.proj, factor=3.0, bias=0.25)
        wrong = {"no projection": x, "bias left out": 3 * x}
        check_close(mha.projection(x), 3 * x + 0.25, "projection in eval mode", wrong)
        mha = use_right_q_kT_v(MultiHeadAttention(D, H, p_dropout=0.5), H).train()
        make_constant(mha.proj, 1.0)
        what, wrong = "in training, p = 0.5, where proj gives 1", {DROPOUT_TWICE: [0.0, 4.0]}
        hint = "is dropout applied after proj?"
        check_equal(distinct_values(mha.projection(x)), [0.0, 2.0], f"values of projection {what}", wrong, hint)
        wrong["forward calls proj, not projection: its dropout is lost"] = [1.0]
        check_equal(distinct_values(mha(x)), [0.0, 2.0], f"values of forward {what}", wrong)

    def test_forward_joins_the_parts(self, mha):
        x = torch.randn(B, S, D)
        use_right_q_kT_v(mha, H)
        alone = mha.proj(mha.v_attn(x))  # the result of a token that sees only itself
        got = mha(x)
        check_shape(got, (B, S, D), "forward")
        what, wrong = "the first token, which sees only itself", {"proj left out": mha.v_attn(x)[:, 0]}
        check_close(got[:, 0], alone[:, 0], what, wrong, hint="do tokens see those after them?")
        right = mha.projection(mha.self_attention(*mha.q_kT_v(x), LEFT_PADDED))
        wrong = {"forward does not pass on attention_mask": got[0, 2:]}
        check_close(mha(x, LEFT_PADDED)[0, 2:], right[0, 2:], "forward with padding, at the real tokens", wrong)


@pytest.mark.advice("1.3", "self_attention")
class TestMoreOfSelfAttention:
    def test_a_query_without_any_key_gets_zero(self, mha, qkv):
        got = mha.self_attention(*qkv, LEFT_PADDED)[0, 0]  # the first token of row 0 sees only padding
        wrong = {"all keys at the same lowest score, so softmax averages every value": qkv[2][0].mean(1).flatten()}
        check_close(got, torch.zeros(D), "a query whose keys are all padding", wrong, atol=0.0)

    @pytest.mark.parametrize("S_q", [1, 2])
    def test_fewer_queries_than_keys_are_those_of_the_last_tokens(self, mha, qkv, S_q):
        q, kT, v = qkv
        what = f"self_attention of {S_q} queries and {S} keys (decoding with cached keys)"
        with explained(f"{what}: expected a tensor", "is the causal mask S_q×S_k?", RuntimeError):
            got = mha.self_attention(q[:, :, -S_q:], kT, v, LEFT_PADDED)
        check_close(got, mha.self_attention(q, kT, v, LEFT_PADDED)[:, -S_q:], what)


# --- FeedForward and DecoderBlock ---


@pytest.mark.question("1.3", "FeedForward and DecoderBlock")
class TestFeedForward:
    def test_exact_gelu_of_four_times_the_width(self, randomise):
        ff, x = randomise(FeedForward(D)).eval(), torch.randn(B, S, D)
        check_shape(ff.linear_in.weight, (4 * D, D), "linear_in.weight", hint="is the width 4·n_embd?")
        check_shape(ff.linear_out.weight, (D, 4 * D), "linear_out.weight", hint="is the width 4·n_embd?")
        right, wrong = mistakes.feed_forward(ff, x)
        check_close(ff(x), right, "FeedForward", wrong)

    def test_dropout_on_the_result_in_training_only(self):
        ff = FeedForward(D, p_dropout=0.5)
        make_constant(ff.linear_out, 1.0)
        x, hint = torch.randn(B, S, D), "dropout must be off at evaluation"
        check_close(ff.eval()(x), torch.ones(B, S, D), "FeedForward in eval mode, result 1", hint=hint)
        what, hint = "values of FeedForward in training, p = 0.5, result 1", "is dropout applied after linear_out?"
        check_equal(distinct_values(ff.train()(x)), [0.0, 2.0], what, {DROPOUT_TWICE: [0.0, 4.0]}, hint)


@pytest.mark.question("1.3", "FeedForward and DecoderBlock")
class TestDecoderBlock:
    @pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["no padding", "left padding"])
    def test_both_sublayers_with_their_norms_and_residuals(self, block, mask):
        x = 3 * torch.randn(B, S, D)
        rights, wrong = mistakes.block_outputs(block, x, mask)
        got, real = block(x, mask), slice(None) if mask is None else mask.bool()
        check_shape(got, (B, S, D), "DecoderBlock")
        right = nearest(got[real], [value[real] for value in rights])
        wrong = {name: value[real] for name, value in wrong.items()}
        hint = "attention, then feed-forward, each with its LayerNorm and a residual connection"
        check_close(got[real], right, "DecoderBlock", wrong, hint, atol=1e-4)

    def test_no_dropout_of_its_own(self, block):
        x = torch.randn(B, S, D)
        right = block(x, None)
        block.train()
        block.mha.eval(), block.ff.eval()
        hint = "a dropout in the block itself: mha and ff end with one"
        check_close(block(x, None), right, "DecoderBlock in training, mha and ff in eval mode", hint=hint)


# --- embed ---


@pytest.mark.question("1.3", "embed")
class TestEmbed:
    ids = torch.tensor([[4, 4, 7, 0, 10], [9, 1, 3, 3, 2]])

    def test_token_plus_position(self, raw_lm):
        right = raw_lm.token_embeddings.weight[self.ids] + raw_lm.position_embeddings.weight[:S]
        hint = "is dropout off in eval mode?"
        check_close(raw_lm.embed(self.ids), right, "embed", mistakes.embedding(raw_lm, self.ids), hint)

    @pytest.mark.parametrize(
        "mask, positions",
        [
            (LEFT_PADDED, [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]),
            (WITH_A_HOLE, [[0, 0, 0, 1, 2], [0, 0, 1, 2, 0]]),
        ],
        ids=["left padding", "a hole"],
    )
    def test_positions_count_real_tokens_only(self, raw_lm, mask, positions):
        hint = "is the position of padding on the left -1? any valid one will do"
        with explained("embed with padding: expected an embedding", hint, IndexError):
            got = raw_lm.embed(self.ids, mask)
        check_shape(got, (B, S, D), "embed with padding")
        real = mask.bool()
        right = raw_lm.position_embeddings.weight[torch.tensor(positions)]
        right = raw_lm.token_embeddings.weight[self.ids] + right
        wrong = {name: w[real] for name, w in mistakes.embedding_with_padding(raw_lm, self.ids, mask).items()}
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

    def test_no_more_positions_than_there_are(self, raw_lm):
        raw_lm.embed(torch.zeros(1, P, dtype=torch.long))  # exactly n_positions tokens are fine
        try:
            raw_lm.embed(torch.zeros(1, P + 1, dtype=torch.long))
        except Exception:  # which error is the solution's choice
            return
        raise AssertionError(f"{P + 1} tokens with n_positions = {P}: expected an error, got an embedding")


# --- DecoderLM ---


def parameter_names():
    block = "ln_1 ln_2 mha.q_attn mha.k_attn mha.v_attn mha.proj ff.linear_in ff.linear_out".split()  # noqa: SIM905
    modules = ["ln", *(f"blocks.{i}.{name}" for i in range(N_LAYER) for name in block)]
    names = {f"{name}.{p}" for name in modules for p in ("weight", "bias")}
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

    def test_parameters(self, raw_lm):
        names, right = {name for name, _ in raw_lm.named_parameters()}, parameter_names()
        missing, extra = sorted(right - names), sorted(names - right)
        hint = "is blocks a ModuleList of n_layer blocks, each with its own weights?"
        check_equal(missing[:2], [], f"{len(missing)} missing parameters", hint=hint)
        hint = "the output matrix is token_embeddings.weight itself, without a bias"
        check_equal(extra[:2], [], f"{len(extra)} parameters too many", hint=hint)

    def test_initialisation(self):
        check_initialisation(smaller_residual_projections=False)

    @pytest.mark.parametrize(
        "mask", [None, LEFT_PADDED, WITH_A_HOLE], ids=["no padding", "left padding", "a hole"]
    )
    def test_embedding_blocks_norm_and_logits(self, lm, mask):
        right, wrong = mistakes.logits(lm, IDS, mask)
        got = lm(IDS) if mask is None else lm(IDS, mask)
        check_shape(got, (B, S, V), "logits")
        real = slice(None) if mask is None else mask.bool()
        wrong = {name: value[real] for name, value in wrong.items()}
        hint = "embed, every block in its order, ln, then token_logits; embed and the blocks get attention_mask"
        check_close(got[real], right[real], "logits", wrong, hint, atol=1e-4)

    def test_no_dropout_after_the_last_norm(self, lm):
        u = torch.randn(D)
        right = torch.tensordot(lm.token_embeddings.weight.detach(), u, dims=1).expand(B, S, V)
        make_constant(lm.ln, u)
        hint = "a dropout after the final LayerNorm: dropout falls on the embeddings, and inside the blocks"
        check_close(lm.train()(IDS), right, "logits in training where ln always gives u", hint=hint, atol=1e-4)


def check_initialisation(smaller_residual_projections):
    """Assert that weights are N(0, 0.02), with mha.proj and ff.linear_out alike or smaller; biases are 0."""
    __tracebackhide__ = True
    n_layer, n_embd = 3, 60
    small = 0.02 / math.sqrt(2 * n_layer)
    for name, p in DecoderLM(211, n_embd, 4, 37, n_layer).named_parameters():
        values, n = p.detach().flatten(), p.numel()
        if name.endswith("bias") or ".ln" in name or name.startswith("ln"):
            value = 0.0 if name.endswith("bias") else 1.0
            assert (values == value).all(), f"{name}: expected {value:g} everywhere, got {values[0]:.4g} …"
            continue
        writes_residual = "mha.proj" in name or "ff.linear_out" in name
        smaller = writes_residual and smaller_residual_projections
        wrong, std = mistakes.initial_std(smaller, n_layer, fan_in=p.shape[-1]), small if smaller else 0.02
        if writes_residual and not smaller and 0.9 * small < values.std() < 0.02:
            continue
        # Relative to std, the deviation of n samples has a sigma of 1/sqrt(2 n), their mean 1/sqrt(n).
        check_close(values.std(), std, f"standard deviation of {name}", wrong, atol=0.0, rtol=5 / math.sqrt(2 * n))
        check_close(values.mean(), 0.0, f"mean of {name}", atol=5 * std / math.sqrt(n))


@pytest.mark.advice("1.3", "DecoderLM")
class TestMoreOfDecoderLM:
    def test_residual_projections_start_smaller(self):
        check_initialisation(smaller_residual_projections=True)

    def test_state_dict(self, raw_lm):
        right = parameter_names() | {f"blocks.{i}.mha.scale_factor" for i in range(N_LAYER)}
        hint = "scale_factor is a buffer (register_buffer); a mask kept as a buffer needs persistent=False"
        differences = sorted(right ^ set(raw_lm.state_dict()))
        check_equal(differences, [], "names in the state_dict that are missing or too many", hint=hint)

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
        right, hint = without.eval()(IDS), "a dropout is active at evaluation"
        check_close(model.eval()(IDS), right, "logits at evaluation, p_dropout = 1", hint=hint)
        hint = "some dropout does not get p_dropout"
        check_close(without.train()(IDS), right, "logits in training, p_dropout = 0", hint=hint)
