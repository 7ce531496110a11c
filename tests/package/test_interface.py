"""The shipped package has what the student's tests skip when it is absent (tests/test_*.py without points)."""

import inspect

import pytest
import torch
from points import check_close

import classify
import generate
import model
import train

KEYWORD_ONLY = {
    train.train: {"start_step": 0, "on_step": None},
    train.sequential_batch_sampler: {"drop_last": True},
    generate.generate: {"top_k": None, "top_p": None},
    model.DecoderBlock.__init__: {"p_dropout": 0.1},
    model.DecoderLM.hidden_states: {"caches": None},
    model.DecoderLM.next_token_logits: {"caches": None},
}


@pytest.mark.parametrize("function", KEYWORD_ONLY, ids=lambda function: function.__qualname__)
def test_keyword_only_extras(function):
    parameters = inspect.signature(function).parameters
    for name, default in KEYWORD_ONLY[function].items():
        assert name in parameters, f"{function.__qualname__} has lost {name}"
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == default


def test_extras_are_there():
    assert issubclass(train.LanguageModelingLoss, torch.nn.Module)
    assert train.StepResult._fields == ("step", "loss", "train_loss", "learning_rate")
    lm = model.DecoderLM(11, 8, 2, 5, 1)
    assert len(lm.kv_caches()) == 1
    assert lm.hidden_states(torch.tensor([[1, 2]])).shape == (1, 2, 8)
    assert classify.YELP_LABEL_MAP == {0: " bad", 1: " good"}


# What the handout and its tests call, in the order of the arguments; what comes after it is keyword-only.
POSITIONAL = {
    model.MultiHeadAttention: "n_embd n_head p_dropout",
    model.FeedForward: "n_embd p_dropout",
    model.DecoderBlock: "n_embd n_head",
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


@pytest.fixture
def lm(randomise):
    return randomise(model.DecoderLM(129, 12, 2, 8, 1)).eval()


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 1e-9}], ids=str)
def test_the_likeliest_token_alone_is_greedy_decoding(lm, ascii_tokenizer, limits):
    arguments = lm, "cpu", ascii_tokenizer, ["To be", "or"], 2, 12
    assert generate.generate(*arguments, 1.3, **limits) == generate.generate(*arguments, 0.0)


def test_generation_and_scores_of_a_model_without_the_extras(lm, ascii_tokenizer):
    class Plain(torch.nn.Module):
        """What the handout asks of a DecoderLM, and no more."""

        def __init__(self, lm):
            super().__init__()
            self.lm = lm
            self.token_embeddings, self.position_embeddings = lm.token_embeddings, lm.position_embeddings

        def forward(self, input_ids, attention_mask=None):
            return self.lm(input_ids, attention_mask)

    texts = ["To be", "or", "not to be, that is"]
    for function in (generate.generate, classify.score):
        ours, plain = (function(m, "cpu", ascii_tokenizer, texts, 2) for m in (lm, Plain(lm)))
        if function is classify.score:
            check_close(plain, ours, "scores of a plain model", atol=1e-4)  # logits of a few tens
        else:
            assert plain == ours


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: model.MultiHeadAttention(7, 2), "n_embd = 7 is not divisible by n_head = 2"),
        (lambda: generate.softmax_with_temperature(torch.zeros(1, 3), -0.5), "-0.5 must be 0 or more"),
        (lambda: generate.softmax_with_temperature(torch.zeros(1, 3), float("nan")), "must be 0 or more"),
        (lambda: next(train.random_batch_sampler(torch.arange(4), "cpu", 1, 5)), "no row of seq_len = 5"),
        (lambda: train.evaluate(model.DecoderLM(11, 8, 2, 5, 1), []), "no batch to evaluate"),
    ],
    ids=["heads", "negative temperature", "no temperature", "short corpus", "no batch"],
)
def test_what_cannot_be_done_is_said(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
