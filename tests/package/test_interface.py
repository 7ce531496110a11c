"""The package's own solution has the whole interface, also the extras that a student may leave out."""

import inspect
from types import SimpleNamespace

import pytest
import torch

import classify
import generate
import model
import train

# What the handout and its tests call, in the order of the arguments; what comes after * is keyword-only.
SIGNATURES = {
    model.MultiHeadAttention: "n_embd n_head p_dropout",
    model.DecoderBlock: "n_embd n_head p_dropout",
    model.DecoderLM: "n_vocab n_embd n_head n_positions n_layer p_dropout",
    model.MultiHeadAttention.self_attention: "self q kT v attention_mask",
    model.DecoderBlock.forward: "self x attention_mask",
    model.DecoderLM.embed: "self input_ids attention_mask",
    model.DecoderLM.forward: "self input_ids attention_mask",
    train.random_batch_sampler: "tokens device batch_size seq_len",
    train.sequential_batch_sampler: "tokens device batch_size seq_len * drop_last",
    train.cosine_lr_schedule: "num_warmup_steps num_training_steps min_lr max_lr",
    train.compute_language_modeling_loss: "input_ids logits",
    train.train: "model batch_sampler optimizer lr_schedule autocast num_training_steps grad_accumulation_steps"
    " * loss_fn grad_clip start_step on_step previous_losses",
    train.evaluate: "model batch_sampler autocast * loss_fn",
    train.training_flops: "model num_training_steps grad_accumulation_steps batch_size seq_len",
    generate.softmax_with_temperature: "logits temperature",
    generate.generate: "model device tokenizer prefixes batch_size max_new_tokens temperature"
    " * top_k top_p next_token_logits",
    classify.score: "model device tokenizer texts batch_size",
    classify.classify_binary_sentiment: "logits tokens_of_interest calibrate",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_parameters_are_the_interfaces(function):
    positional, _, extras = SIGNATURES[function].partition(" * ")
    parameters = inspect.signature(function).parameters.values()
    ordered = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert ordered == positional.split()
    assert {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY} >= set(extras.split())


@pytest.mark.parametrize(
    "limits, kept",
    [
        ({"top_k": 2}, [{1, 2}, {0, 2}]),
        ({"top_k": 9}, [{0, 1, 2, 3}, {0, 1, 2, 3}]),
        ({"top_p": 0.65}, [{1, 2}, {0}]),  # 0.4 is less than 0.65, 0.7 is not
        ({"top_p": 0.75}, [{1, 2, 3}, {0, 2}]),
        ({"top_p": 1e-50}, [{1}, {0}]),  # the likeliest always stays
        ({"top_p": 0.95, "top_k": 1}, [{1}, {0}]),
        ({"top_p": 1.0}, [{0, 1, 2, 3}, {0, 1, 2, 3}]),
    ],
    ids=str,
)
def test_sampling_draws_the_likely_tokens_only(limits, kept):
    """Ninety texts of three new tokens: one of probability 0.05 is missing in 1.3 of 10^6 cases."""
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2, 0.0], [0.7, 0.1, 0.15, 0.05, 0.0]]).log().repeat(45, 1)
    letters = SimpleNamespace(eot_token=4, encode_ordinary=lambda text: [0], decode=lambda ids: [*map(int, ids)])
    options = {"temperature": 1.0, "next_token_logits": lambda *_: logits, **limits}
    rows = generate.generate(model.DecoderLM(5, 4, 2, 8, 1), "cpu", letters, ["A"] * 90, 90, 3, **options)
    assert [{token for row in rows[i::2] for token in row} for i in (0, 1)] == kept
