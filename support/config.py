"""The YAML file of a training run, as a frozen dataclass with checked values.

config = load_config("configs/GPT-tiny.yaml", ["max_lr=1e-3", "model_config.n_embd=64"])
"""

import dataclasses
import math
import re
import reprlib
import typing
from contextlib import suppress
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from pathlib import Path

import yaml

from support.errors import UserError, first_line, require


@dataclass(frozen=True)
class ModelConfig:
    """The arguments of DecoderLM other than the vocabulary size."""

    n_embd: int
    n_head: int
    n_positions: int
    n_layer: int
    p_dropout: float = 0.1

    def n_parameters(self, n_vocab: int) -> int:
        """Number of parameters of a DecoderLM with these arguments, without building it."""
        D = self.n_embd
        block = 12 * D**2 + 13 * D  # attention 4 (D² + D), feed-forward 8 D² + 5 D, two LayerNorms 4 D
        return (n_vocab + self.n_positions) * D + self.n_layer * block + 2 * D


@dataclass(frozen=True)
class TrainingConfig:
    """One training run. Keys with a default are optional; the defaults leave the mathematics unchanged."""

    output_dir: str
    tokenizer_encoding: str
    model_config: ModelConfig
    device: str
    batch_size: int
    seq_len: int
    num_warmup_steps: int
    num_training_steps: int
    grad_accumulation_steps: int
    min_lr: float
    max_lr: float
    data: str | None = None  # a path, 'sample' or 'c4' (the course's tokens); None: c4, else the sample
    seed: int = 0
    weight_decay: float = 0.01  # AdamW's default
    grad_clip: float | None = None  # largest gradient norm; None: off
    compile: bool = False  # use torch.compile
    checkpoint_interval: int | str | None = None  # steps (500) or seconds (60s); None: under 1% of the time
    eval_interval: int | None = None  # steps between validation losses during training; None: none
    init: str | None = None  # checkpoint to start from; None: random weights

    def flat(self) -> dict:
        """All values by key, those of model_config as `model_config.n_embd`."""
        values = dict(vars(self))
        model = vars(values.pop("model_config"))
        return values | {f"model_config.{key}": value for key, value in model.items()}

    def differing(self, flat: dict) -> list[str]:
        """The keys whose values differ from those in `flat`, except those that do not affect the result."""
        neutral = {"output_dir", "device", "data", "checkpoint_interval"}
        ours = self.flat()
        return [key for key in sorted({*ours, *flat} - neutral) if ours.get(key) != flat.get(key)]


def load_config(path: str, overrides: typing.Sequence[str] = (), **keys: str | None) -> TrainingConfig:
    """Read a configuration file; UserError says what is wrong with it.

    Each override is `key=value` or `model_config.key=value`; `keys` that are not None override keys of the YAML.
    """
    try:
        values = _parse(Path(path).read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; see configs/ for examples") from None
    found = "is empty" if values is None else f"contains a {type(values).__name__}"
    require(isinstance(values, dict), f"{path}: {found}, not `key: value` lines; see configs/ for examples")
    for override in overrides:
        key, equals, text = override.partition("=")
        require(bool(equals), f"--set {override}: write key=value, such as --set max_lr=1e-3")
        section, dot, name = key.strip().rpartition(".")
        target = values.get(section) if dot else values
        require(isinstance(target, dict), f"--set {override}: there is no section '{section}'; see {path}")
        target[name] = _parse(text, f"--set {override}")
    values |= {key: value for key, value in keys.items() if value is not None}
    config = _build(TrainingConfig, values, path)
    _check_values(config, path)
    return config


def dump_config(config: TrainingConfig) -> str:
    """The configuration as YAML text; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which only builds plain data, with an error for duplicate keys."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"duplicate key '{key.value}'", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _parse(text: str | bytes, where: str):
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except Exception as error:  # PyYAML raises many types, for example for tags such as `!!int ""`
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{where}: {line}invalid YAML: {problem or first_line(error)}") from None


def _build(cls, values: dict, path: str, prefix: str = ""):
    """An instance of the dataclass from a mapping with exactly its keys, each value of the right type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    known = {name: prefix + name for name in fields}
    if cls is TrainingConfig:  # model_config.n_embd is easily given as n_embd
        known |= {field.name: f"model_config.{field.name}" for field in dataclasses.fields(ModelConfig)}
    for key in values:
        nearest = known[get_close_matches(str(key), known, n=1, cutoff=0)[0]]
        require(key in fields, f"{path}: unknown key '{prefix}{key}'; did you mean '{nearest}'?")
    for name, field in fields.items():
        given = name in values or field.default is not MISSING
        require(given, f"{path}: the key '{prefix}{name}' is missing")
    return cls(**{name: _convert(value, types[name], path, prefix + name) for name, value in values.items()})


EXPECTED = {bool: "true or false", str: "a string", int: "a whole number", float: "a finite number"}


def _convert(value, hint, path: str, key: str):
    """The value as the type of its field; UserError if it has another type."""
    types = typing.get_args(hint) or (hint,)  # (X, NoneType) for X | None
    if hint is ModelConfig and isinstance(value, dict):
        return _build(ModelConfig, value, path, f"{key}.")
    if type(value) in (int, float, str) and (int in types or float in types):
        with suppress(ValueError, OverflowError):
            number = float(value)  # of a string too, because PyYAML reads `1e-4`, without a point, as one
            if int in types and number.is_integer() and abs(number) < 2**63:
                return int(number)
            if float in types and math.isfinite(number):
                return number
    if type(value) in types and type(value) not in (int, float):
        return value
    shortened = reprlib.repr(value)  # YAML aliases can make it astronomically long
    raise UserError(f"{path}: {key} = {shortened} must be {EXPECTED.get(types[0], 'a mapping')}")


LEAST_VALUES = dict.fromkeys(("n_embd", "n_head", "n_positions", "n_layer", "batch_size"), 1)
LEAST_VALUES |= dict.fromkeys(("num_training_steps", "grad_accumulation_steps"), 1)
LEAST_VALUES |= dict.fromkeys(("num_warmup_steps", "seed", "weight_decay", "min_lr", "p_dropout"), 0)
LEAST_VALUES["seq_len"] = 2  # a row of one token has nothing to predict


def _check_values(c: TrainingConfig, path: str) -> None:
    """Raise UserError for a value out of range, or for values that do not go together."""
    m, steps, interval = c.model_config, c.num_training_steps, c.checkpoint_interval
    values = vars(c) | vars(m)
    for name, least in LEAST_VALUES.items():
        require(values[name] >= least, f"{path}: {name} = {values[name]} must be at least {least}")
    seconds = isinstance(interval, str) and bool(re.fullmatch(r"\d+(\.\d*)?s", interval))
    rules = {
        f"n_embd = {m.n_embd} must be a multiple of n_head = {m.n_head}": m.n_embd % m.n_head == 0,
        f"p_dropout = {m.p_dropout} must be less than 1": m.p_dropout < 1,
        f"seq_len = {c.seq_len} must not exceed n_positions = {m.n_positions}": c.seq_len <= m.n_positions,
        f"num_warmup_steps = {c.num_warmup_steps} must not exceed num_training_steps = {steps}": (
            c.num_warmup_steps <= steps
        ),
        f"max_lr = {c.max_lr} must not be less than min_lr = {c.min_lr}": c.max_lr >= c.min_lr,
        f"max_lr = {c.max_lr} must be more than 0": c.max_lr > 0,
        f"grad_clip = {c.grad_clip} must be more than 0": c.grad_clip is None or c.grad_clip > 0,
        f"eval_interval = {c.eval_interval} must be at least 1": c.eval_interval is None or c.eval_interval >= 1,
        f"checkpoint_interval = {interval} must be a number of steps (500) or of seconds (60s)": (
            interval is None or seconds or (isinstance(interval, int) and interval >= 1)
        ),
    }
    for rule, holds in rules.items():
        require(holds, f"{path}: {rule}")
