"""The package's own solution has the whole interface, also the extras that a student may leave out."""

import inspect
from contextlib import nullcontext

import pytest
import torch
from checks import check_close, check_equal

import classify
import generate
import model
import train

KEYWORD_ONLY = {
    train.train: {"loss_fn": None, "grad_clip": None, "start_step": 0, "on_step": None},
    train.evaluate: {"loss_fn": None},
    train.sequential_batch_sampler: {"drop_last": True},
    generate.generate: {"top_k": None, "top_p": None},
}


@pytest.mark.parametrize("function", KEYWORD_ONLY, ids=lambda function: function.__qualname__)
def test_keyword_only_extras(function):
    parameters = inspect.signature(function).parameters
    for name, default in KEYWORD_ONLY[function].items():
        assert name in parameters, f"{function.__qualname__} lacks {name}"
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == default


def test_extras_are_there():
    assert train.StepResult._fields == ("step", "loss", "train_loss", "learning_rate")
    lm = model.DecoderLM(11, 8, 2, 5, 1)
    assert lm.hidden_states(torch.tensor([[1, 2]])).shape == (1, 2, 8)
    assert classify.YELP_LABEL_MAP == {0: " bad", 1: " good"}


# What the handout and its tests call, in the order of the arguments; what comes after it is keyword-only.
POSITIONAL = {
    model.MultiHeadAttention: "n_embd n_head p_dropout",
    model.FeedForward: "n_embd p_dropout",
    model.DecoderBlock: "n_embd n_head p_dropout",
    model.DecoderLM: "n_vocab n_embd n_head n_positions n_layer p_dropout",
    model.MultiHeadAttention.q_kT_v: "self x",
    model.MultiHeadAttention.self_attention: "self q kT v attention_mask",
    model.MultiHeadAttention.projection: "self attn",
    model.MultiHeadAttention.forward: "self x attention_mask",
    model.DecoderBlock.forward: "self x attention_mask",
    model.DecoderLM.embed: "self input_ids attention_mask",
    model.DecoderLM.token_logits: "self x",
    model.DecoderLM.forward: "self input_ids attention_mask",
    train.random_batch_sampler: "tokens device batch_size seq_len",
    train.sequential_batch_sampler: "tokens device batch_size seq_len",
    train.cosine_lr_schedule: "num_warmup_steps num_training_steps min_lr max_lr",
    train.set_lr: "optimizer lr",
    train.compute_language_modeling_loss: "input_ids logits",
    train.train: "model batch_sampler optimizer lr_schedule autocast num_training_steps grad_accumulation_steps",
    train.evaluate: "model batch_sampler autocast",
    train.training_flops: "model num_training_steps grad_accumulation_steps batch_size seq_len",
    generate.softmax_with_temperature: "logits temperature",
    generate.generate: "model device tokenizer prefixes batch_size max_new_tokens temperature",
    classify.score: "model device tokenizer texts batch_size",
    classify.classify_binary_sentiment: "logits tokens_of_interest calibrate",
}


@pytest.mark.parametrize("function", POSITIONAL, ids=lambda function: function.__qualname__)
def test_positional_parameters_are_the_interfaces(function):
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == POSITIONAL[function].split()


P = [[0.1, 0.4, 0.3, 0.2], [0.7, 0.1, 0.1, 0.1]]


@pytest.mark.parametrize(
    "limits, kept",
    [
        ({}, P),
        ({"top_k": 2}, [[0, 0.4, 0.3, 0], None]),  # of equal tokens in row 1 either may stay
        ({"top_k": 9}, P),
        ({"top_p": 0.65}, [[0, 0.4, 0.3, 0], [0.7, 0, 0, 0]]),  # 0.4 is less than 0.65, 0.7 is not
        ({"top_p": 0.75}, [[0, 0.4, 0.3, 0.2], None]),
        ({"top_p": 1e-9}, [[0, 0.4, 0, 0], [0.7, 0, 0, 0]]),  # the likeliest always stays
        ({"top_p": 0.95, "top_k": 1}, [[0, 0.4, 0, 0], [0.7, 0, 0, 0]]),
        ({"top_p": 1.0}, P),
    ],
    ids=str,
)
def test_keep_likely(limits, kept):
    got = generate.keep_likely(torch.tensor(P), **limits)
    for row, expected in zip(got, kept, strict=True):
        if expected is None:
            assert row[0] == 0.7 and (row[1:] == 0.1).sum() == 1, f"{limits}: expected two tokens, got {row}"
        else:
            check_close(row, expected, f"keep_likely with {limits}")


def test_top_p_1_keeps_every_token():
    """Rounding takes the cumulative sum of 50,257 probabilities beyond 1 before the last ones."""
    probs = torch.randn(8, 50257).softmax(dim=-1)
    assert torch.equal(generate.keep_likely(probs, top_p=1.0), probs)


@pytest.fixture
def lm(randomise):
    return randomise(model.DecoderLM(129, 12, 2, 8, 1)).eval()


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 1e-9}], ids=str)
def test_the_likeliest_token_alone_is_greedy_decoding(lm, ascii_tokenizer, limits):
    arguments = lm, "cpu", ascii_tokenizer, ["To be", "or"], 2, 12
    assert generate.generate(*arguments, 1.3, **limits) == generate.generate(*arguments, 0.0)


CALLS = {
    "evaluate": lambda lm, _: train.evaluate(lm, [torch.tensor([[1, 2, 3]])]),
    "generate": lambda lm, tokenizer: generate.generate(lm, "cpu", tokenizer, ["To be", "or"], 2, 4),
    "score": lambda lm, tokenizer: classify.score(lm, "cpu", tokenizer, ["To be", "or"], 2),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_the_mode_of_every_module_is_restored(lm, ascii_tokenizer, name, fails):
    lm.train().blocks[0].eval()
    before = {name: module.training for name, module in lm.named_modules()}
    seen = []

    def watch(block, _):
        seen.append(any(module.training for module in lm.modules()))
        if fails:
            raise ZeroDivisionError

    lm.blocks[0].ln_1.register_forward_pre_hook(watch)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        CALLS[name](lm, ascii_tokenizer)
    assert seen and not any(seen), f"{name}: expected evaluation mode"
    check_equal({name: module.training for name, module in lm.named_modules()}, before, f"modes after {name}")


@pytest.mark.parametrize("batch_size, sizes", [(1, [1] * 5), (2, [2, 2, 1]), (64, [5])])
def test_score_reads_batch_size_texts_at_once(lm, ascii_tokenizer, batch_size, sizes):
    got = []
    lm.blocks[0].register_forward_pre_hook(lambda block, inputs: got.append(len(inputs[0])))
    classify.score(
        lm, "cpu", ascii_tokenizer, ["good", "a", "or not", "bad", "a text too long for it"], batch_size
    )
    check_equal(got, sizes, f"sizes of the batches of 5 texts, batch_size = {batch_size}")


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: model.MultiHeadAttention(7, 2), "n_embd = 7 is not divisible by n_head = 2"),
        (lambda: generate.softmax_with_temperature(torch.zeros(1, 3), -0.5), "-0.5 must be 0 or more"),
        (lambda: generate.softmax_with_temperature(torch.zeros(1, 3), float("nan")), "must be 0 or more"),
        (lambda: next(train.random_batch_sampler(torch.arange(4), "cpu", 1, 5)), "no row of seq_len = 5"),
        (lambda: train.evaluate(model.DecoderLM(11, 8, 2, 5, 1), []), "nothing to evaluate"),
    ],
    ids=["heads", "negative temperature", "no temperature", "short corpus", "no batch"],
)
def test_impossible_arguments_raise_value_error(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
