"""The YAML file of a training run, read into a frozen and checked dataclass.

    config = load_config("configs/GPT-tiny.yaml", ["max_lr=1e-3", "model_config.n_embd=64"])

Every mistake in the file is a UserError that names the file, the key and the value.
"""

import dataclasses
import math
import re
import reprlib
import typing
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from pathlib import Path

import yaml

from support.errors import UserError, require


@dataclass(frozen=True)
class ModelConfig:
    """The arguments of DecoderLM beside the vocabulary size."""

    n_embd: int
    n_head: int
    n_positions: int
    n_layer: int
    p_dropout: float = 0.1

    def n_parameters(self, n_vocab: int) -> int:
        """Parameters of the DecoderLM that these arguments make, without making it."""
        D = self.n_embd
        block = 12 * D**2 + 13 * D  # attention 4 (D² + D), feed-forward 8 D² + 5 D, two LayerNorms 4 D
        return (n_vocab + self.n_positions) * D + self.n_layer * block + 2 * D


@dataclass(frozen=True)
class TrainingConfig:
    """One training run. The keys with a default are optional and leave the mathematics unchanged."""

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
    compile: bool = False  # the loss of the model, by torch.compile
    checkpoint_interval: int | str | None = None  # steps (500) or seconds (60s); None: by what writing costs

    def flat(self) -> dict:
        """All values by key, those of model_config as `model_config.n_embd`."""
        model_keys = {f"model_config.{key}": value for key, value in vars(self.model_config).items()}
        return {key: value for key, value in vars(self).items() if key != "model_config"} | model_keys

    def differing(self, flat: dict) -> list[str]:
        """The keys with another value in `flat`, of those that the result of the run depends on."""
        neutral = {"output_dir", "device", "data", "checkpoint_interval"}
        ours = self.flat()
        return [key for key in sorted({*ours, *flat} - neutral) if ours.get(key) != flat.get(key)]


def load_config(path: str, overrides: typing.Sequence[str] = (), data: str | None = None) -> TrainingConfig:
    """Read and check a configuration; each override is `key=value` or `model_config.key=value`.

    `data` overrides the key of that name.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; give a YAML file such as configs/GPT-tiny.yaml") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); see configs/ for examples") from None
    values = _parse(text, path)
    found = "empty" if values is None else f"a {type(values).__name__}"
    require(isinstance(values, dict), f"{path}: {found}, no mapping `key: value`; see configs/GPT-tiny.yaml")
    for override in overrides:
        key, equals, text = override.partition("=")
        require(bool(equals), f"--set {override}: write it as key=value, such as --set max_lr=1e-3")
        section, dot, name = key.strip().rpartition(".")
        target = values.get(section) if dot else values
        require(isinstance(target, dict), f"--set {override}: there is no section '{section}'; see {path}")
        target[name] = _parse(text, f"--set {override}")
    if data is not None:
        values["data"] = data
    config = _build(TrainingConfig, values, path)
    _check_rules(config, path)
    return config


def dump_config(config: TrainingConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """The safe loader, which builds plain data only, refusing a key that stands twice."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(None, None, f"'{key.value}' stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _parse(text: str, where: str):
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except Exception as error:  # tags such as `!!int ""` fail in a dozen ways inside PyYAML
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        what = getattr(error, "problem", None) or " ".join(str(error).split()) or "nested too deeply"
        raise UserError(f"{where}: {line}not valid YAML ({what}); mend it") from None


def _build(cls, values: dict, path: str, prefix: str = ""):
    """An instance of the dataclass from the mapping, every key known and of its type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        nearest = get_close_matches(str(key), fields, n=1, cutoff=0)[0]
        require(key in fields, f"{path}: unknown key '{prefix}{key}'; did you mean '{nearest}'?")
    for name, field in fields.items():
        there = name in values or field.default is not MISSING
        require(there, f"{path}: the key '{prefix}{name}' is missing; add it")
    return cls(**{name: _convert(value, hints[name], path, prefix + name) for name, value in values.items()})


def _convert(value, hint, path: str, key: str):
    """The value as the type of its field, or a UserError that says what was expected."""
    kinds = typing.get_args(hint) or (hint,)  # (X, None) of X | None
    where = f"{path}: {key} = {reprlib.repr(value)}"  # shortened: aliases can make a value astronomically long
    if value is None and type(None) in kinds:
        return None
    if ModelConfig in kinds:
        require(isinstance(value, dict), f"{where} must be a mapping of its own keys")
        return _build(ModelConfig, value, path, f"{key}.")
    if bool in kinds:
        require(isinstance(value, bool), f"{where} must be true or false")
        return value
    if str in kinds and isinstance(value, str) and value:
        return value
    require(kinds[0] is not str, f"{where} must be a text")
    try:
        # Of a text too: PyYAML reads `1e-4`, without a point, as the text "1e-4".
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if int in kinds:
        require(number.is_integer() and abs(number) < 2**63, f"{where} must be a whole number")
        return value if isinstance(value, int) else int(number)
    require(math.isfinite(number), f"{where} must be a finite number")
    return number


def _check_rules(config: TrainingConfig, path: str) -> None:
    """The ranges of the values and what holds between them; a sentence names all that take part."""
    c, m = config, config.model_config
    values = vars(c) | vars(m)
    sizes = ("n_embd", "n_head", "n_positions", "n_layer", "batch_size", "num_training_steps")
    least = dict.fromkeys((*sizes, "grad_accumulation_steps"), 1) | {"seq_len": 2}  # of 1 token none is predicted
    least |= dict.fromkeys(("num_warmup_steps", "seed", "weight_decay", "min_lr", "p_dropout"), 0)
    for name, bound in least.items():
        require(values[name] >= bound, f"{path}: {name} = {values[name]} must be at least {bound}")
    every = c.checkpoint_interval
    is_interval = every is None or (
        every >= 1 if isinstance(every, int) else re.fullmatch(r"\d{1,9}(\.\d*)?s", every)
    )
    rules = {
        "n_embd must be a multiple of n_head": m.n_embd % m.n_head == 0,
        "p_dropout must be less than 1": m.p_dropout < 1,
        "seq_len must not be more than n_positions": c.seq_len <= m.n_positions,
        "num_warmup_steps must not be more than num_training_steps": c.num_warmup_steps <= c.num_training_steps,
        "max_lr must not be less than min_lr": c.max_lr >= c.min_lr,
        "max_lr must be more than 0": c.max_lr > 0,
        "grad_clip must be more than 0": c.grad_clip is None or c.grad_clip > 0,
        "checkpoint_interval must be a number of steps (500) or of seconds (60s)": bool(is_interval),
    }
    for rule, holds in rules.items():
        named = ", ".join(f"{name} = {value}" for name, value in values.items() if name in rule.split())
        require(holds, f"{path}: {rule}; here {named}")
