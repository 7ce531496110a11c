"""The configuration of a training run: its command line and its YAML file, checked by pydantic.

config = load_config("configs/GPT-tiny.yaml", ["max_lr=1e-3", "model_config.n_embd=64"])
"""

import dataclasses
import json
import re
import reprlib
from argparse import Namespace
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from support.errors import ArgumentParser, UserError, first_line, require


def _whole(value):
    """Text such as 1e4 as a whole number."""
    whole = re.fullmatch(r"\d+\.?\d*e\d+", str(value)) and float(value).is_integer()
    return int(float(value)) if whole else value


Size = Annotated[int, BeforeValidator(_whole), Field(ge=1, lt=2**31)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**63)]
Real = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Interval = Annotated[str, Field(pattern=r"^([1-9]\d*|\d+(\.\d*)?s)$")]
CHECKED = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=CHECKED)
class ModelConfig:
    """The arguments of DecoderLM other than the vocabulary size."""

    n_embd: Size
    n_head: Size
    n_positions: Size
    n_layer: Size
    p_dropout: Annotated[Real, Field(lt=1)] = 0.1

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} should be a multiple of n_head = {self.n_head}")


@dataclass(frozen=True, config=CHECKED)
class TrainingConfig:
    """One training run. Keys with a default are optional; the defaults leave the mathematics unchanged."""

    output_dir: str
    tokenizer_encoding: str
    model_config: ModelConfig
    device: str
    batch_size: Size
    seq_len: Annotated[Size, Field(ge=2)]  # a row of one token has nothing to predict
    num_warmup_steps: Count
    num_training_steps: Size
    grad_accumulation_steps: Size
    min_lr: Real
    max_lr: Annotated[Real, Field(gt=0)]
    data: str | None = None  # a path, 'sample' or 'c4' (the course's tokens); None: c4, else the sample
    seed: Count = 0
    weight_decay: Real = 0.01  # AdamW's default
    grad_clip: Annotated[Real, Field(gt=0)] | None = None  # largest gradient norm; None: off
    compile: bool = False  # use torch.compile
    checkpoint_interval: Interval | None = None  # steps (500) or seconds (60s); None: about 1% of the time
    eval_interval: Size | None = None  # steps between validation losses during training; None: none
    init: str | None = None  # checkpoint to start from; None: random weights

    def __post_init__(self):
        values = vars(self) | vars(self.model_config)
        pairs = ["seq_len n_positions", "num_warmup_steps num_training_steps", "min_lr max_lr"]
        for small, large in map(str.split, pairs):
            if values[small] > values[large]:
                raise ValueError(f"{small} = {values[small]} should not exceed {large} = {values[large]}")

    def differing(self, other: dict) -> list[str]:
        """The keys, with both values, that differ from dataclasses.asdict of another one and affect the result."""
        ours, theirs = (_flat(values) for values in (dataclasses.asdict(self), other))
        for neutral in ("output_dir", "device", "data", "checkpoint_interval"):  # data is compared by its tokens
            theirs[neutral] = ours[neutral]
        keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        return [f"{key} ({reprlib.repr(theirs.get(key))} there, {ours.get(key)!r} here)" for key in keys]


def _flat(values: dict) -> dict:
    return values | {f"model_config.{key}": value for key, value in values.pop("model_config").items()}


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The command line of train.py; argv None reads sys.argv."""
    parser = ArgumentParser(description="Train the language model from a YAML file.")
    parser.add_argument("config", help="YAML file, such as configs/GPT-tiny.yaml")
    parser.add_argument("--name", help="train in outputs/NAME: short for --set output_dir=outputs/NAME")
    parser.add_argument("--data", help="tokens, a text or jsonl file, 'c4' or 'sample' (overrides the key data)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys")
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    parser.add_argument("--dry-run", action="store_true", help="show what training would cost, then exit")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--init", metavar="CHECKPOINT", help="start from these weights (overrides the key init)")
    weights.add_argument("--evaluate", metavar="CHECKPOINT", help="evaluate this checkpoint, then exit")
    args = parser.parse_args(argv)
    args.set += [f"output_dir={json.dumps(f'outputs/{args.name}')}"] if args.name else []  # quoted: "run #1"
    return args


def load_config(path: str, overrides: Sequence[str] = (), **keys: str | None) -> TrainingConfig:
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
    try:
        return TypeAdapter(TrainingConfig).validate_python(values)
    except ValidationError as error:
        mistakes = sorted(error.errors(), key=lambda mistake: mistake["type"] != "unexpected_keyword_argument")
        raise UserError(f"{path}: {_sentence(mistakes[0])}") from None


def _sentence(mistake: dict) -> str:
    """What pydantic found, in our words."""
    key, problem = ".".join(map(str, mistake["loc"])), mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "missing":
        return f"the key '{key}' is missing"
    if mistake["type"] == "unexpected_keyword_argument":
        keys = {field.name: field.name for field in dataclasses.fields(TrainingConfig)}
        keys |= {field.name: f"model_config.{field.name}" for field in dataclasses.fields(ModelConfig)}
        near = get_close_matches(key.rpartition(".")[2], keys, n=1, cutoff=0.75)
        return f"unknown key '{key}'" + (f"; did you mean '{keys[near[0]]}'?" if near else "")
    if mistake["type"] == "string_pattern_mismatch":
        problem = "should be a number of steps (500) or of seconds (60s)"
    if isinstance(mistake["input"], dict) or not key:  # a rule for several keys, which names them
        return problem.replace("Input", key)
    return f"{key} = {reprlib.repr(mistake['input'])} {problem.removeprefix('Input ')}"


def dump_config(config: TrainingConfig) -> str:
    """The configuration as YAML text; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which only builds plain data, with two differences: a duplicate key is an error, and all
    but null is text, because YAML 1.1 takes 0100 for 64 and 1:30 for 90."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"duplicate key '{key.value}'", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str | bytes, where: str):
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except Exception as error:  # PyYAML raises many types, for example for tags such as `!!int ""`
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{where}: {line}invalid YAML: {problem or first_line(error)}") from None
