"""The shipped package has what the student's tests skip when it is absent (tests/test_*.py without points)."""

import inspect

import pytest
import torch

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
