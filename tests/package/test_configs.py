"""Configurations for the course's budgets: five tune a model with 1e15 FLOPs, one trains it with 1e17."""

from pathlib import Path

import torch

import train
from model import DecoderLM
from support.config import load_config
from support.tokenizer import get_tokenizer

CONFIGS = Path(train.__file__).parent / "configs"
TUNING = sorted(CONFIGS.glob("tune-1e15-*.yaml"))


def flops(config) -> int:
    """FLOPs of the run, by the formula of the course."""
    with torch.device("meta"):
        model = DecoderLM(get_tokenizer().n_vocab, **vars(config.model_config))
    c = config
    return train.training_flops(model, c.num_training_steps, c.grad_accumulation_steps, c.batch_size, c.seq_len)


def test_budgets_are_kept_and_used():
    assert len(TUNING) == 5, "question 2.5 asks for at most five settings"
    for path in TUNING:
        assert 0.99e15 < flops(load_config(str(path))) <= 1e15, path.name
    assert 0.99e17 < flops(load_config(str(CONFIGS / "final-1e17.yaml"))) <= 1e17


def test_final_model_is_the_one_that_was_tuned():
    models = [load_config(str(path)).model_config for path in [*TUNING, CONFIGS / "final-1e17.yaml"]]
    assert models == [models[0]] * 6, "question 2.6: do not change the model's hyperparameters"


def test_tuning_settings_differ_in_what_they_train_with():
    def settings(path):
        config = load_config(str(path))
        return config.max_lr, config.batch_size, config.seq_len, config.num_training_steps

    assert len({settings(path) for path in TUNING}) == 5
