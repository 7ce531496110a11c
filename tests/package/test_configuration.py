"""The YAML file: what it may say, how its numbers are read, and the files that are shipped."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import ROOT, assert_refused

import train
from model import DecoderLM
from support.config import dump_config, load_config

COURSE_YAML = """\
output_dir: outputs/course
tokenizer_encoding: gpt2
model_config: {n_embd: 8, n_head: 2, n_positions: 64, n_layer: 1}
device: auto
batch_size: 4
seq_len: 32
num_warmup_steps: 1
num_training_steps: 3
grad_accumulation_steps: 1
min_lr: 1e-4
max_lr: 5e-4
"""


def keys_of(path, *overrides, **keys) -> dict:
    """The configuration as a run writes it into config.yaml."""
    return yaml.safe_load(dump_config(load_config(str(path), overrides, **keys)))


@pytest.fixture
def course(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("course.yaml").write_text(COURSE_YAML)
    return tmp_path


def edit(old: str, new: str) -> str:
    assert old in COURSE_YAML
    return COURSE_YAML.replace(old, new)


BAD_YAML = {
    "syntax": (edit("batch_size: 4", "batch_size: [4"), ["line"]),
    "missing key": (edit("batch_size: 4\n", ""), ["batch_size"]),
    "unknown key": (edit("batch_size", "batchsize"), ["batchsize", "batch_size"]),
    "duplicate key": (COURSE_YAML + "batch_size: 5\n", ["batch_size"]),
    "mistyped": (edit("batch_size: 4", "batch_size: four"), ["batch_size", "four"]),
    "model_config no mapping": (re.sub("model_config: .*", "model_config: 7", COURSE_YAML), ["model_config"]),
    "heads": (edit("n_head: 2", "n_head: 3"), ["n_embd", "8", "n_head", "3"]),
    "seq_len": (edit("seq_len: 32", "seq_len: 65"), ["seq_len", "65", "n_positions", "64"]),
    "warm-up": (edit("num_warmup_steps: 1", "num_warmup_steps: 4"), ["num_warmup_steps", "num_training_steps"]),
    "checkpoint_interval": (COURSE_YAML + "checkpoint_interval: 1h\n", ["checkpoint_interval"]),
    "device": (edit("device: auto", "device: gpu"), ["device", "gpu"]),
    "code": (edit("5e-4", "!!python/object/apply:os.system ['touch code_ran']"), []),
    "sexagesimal": (edit("num_training_steps: 3", "num_training_steps: 1:30"), ["num_training_steps", "1:30"]),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_is_refused_with_its_key(name, course, capsys):
    text, words = BAD_YAML[name]
    Path("bad.yaml").write_text(text)
    assert_refused(capsys, course, words, train, "bad.yaml")


def test_unknown_key_suggests_the_near_one_only(course, capsys):
    for given, meant in {"n_embd": "model_config.n_embd", "batchsize": "batch_size", "max_rl": "max_lr"}.items():
        assert_refused(capsys, course, [given, meant], train, "course.yaml", "--set", f"{given}=1")
    far = assert_refused(capsys, course, ["colour"], train, "course.yaml", "--set", "colour=red")
    assert "did you mean" not in far


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("max_lr", "1e-3", 1e-3),  # a string to YAML 1.1
        ("max_lr", "1", 1.0),
        ("num_training_steps", "2e3", 2000),
        ("num_training_steps", "0100", 100),  # 64 to YAML 1.1
        ("output_dir", "0100", "0100"),
        ("data", "1e-4", "1e-4"),
    ],
)
def test_values_are_what_their_writer_means_and_read_back(course, key, text, value):
    Path("new.yaml").write_text(re.sub(f"{key}: .*", "", COURSE_YAML) + f"{key}: {text}")
    for keys in (keys_of("new.yaml"), keys_of("course.yaml", f"{key}={text}")):
        assert keys[key] == value and type(keys[key]) is type(value)
        Path("again.yaml").write_text(yaml.safe_dump(keys))
        assert keys_of("again.yaml") == keys


# --- shipped files ---------------------------------------------------------------------------------------


def test_shipped_configurations_name_their_folder_and_gpt_tiny_is_the_courses():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert Path(keys_of(path)["output_dir"]).name == path.stem
    keys = keys_of(ROOT / "configs/GPT-tiny.yaml")
    expected = {"n_embd": 32, "n_head": 2, "n_positions": 128, "n_layer": 2}
    assert expected.items() <= keys["model_config"].items()
    sizes = {"batch_size": 32, "seq_len": 128, "grad_accumulation_steps": 1, "min_lr": 1e-4, "max_lr": 5e-4}
    assert (sizes | {"num_warmup_steps": 10, "num_training_steps": 2000}).items() <= keys.items()


def flops(path) -> int:
    """FLOPs of the run, by the formula of the course."""
    keys = keys_of(path)
    with torch.device("meta"):
        model = DecoderLM(50257, **keys["model_config"])
    sizes = ("num_training_steps", "grad_accumulation_steps", "batch_size", "seq_len")
    return train.training_flops(model, *(keys[size] for size in sizes))


def test_budgets_are_kept_and_used():
    tuning, final = sorted((ROOT / "configs").glob("tune-1e15-*.yaml")), ROOT / "configs/final-1e17.yaml"
    assert len(tuning) == 5, "question 2.5 asks for at most five settings"
    assert all(0.99e15 < flops(path) <= 1e15 for path in tuning)
    assert 0.99e17 < flops(final) <= 1e17
    models = [keys_of(path)["model_config"] for path in [*tuning, final]]
    assert models == [models[0]] * 6, "question 2.6: do not change the model's hyperparameters"
