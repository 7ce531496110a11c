"""The YAML file of a training run, read into a frozen and checked dataclass.

    config = load_config("configs/GPT-tiny.yaml", ["max_lr=1e-3", "model_config.n_embd=64"])

Every mistake in the file is a UserError that names the file, the key and the value.
"""

import dataclasses
import math
import re
import reprlib
import types
import typing
from dataclasses import MISSING, dataclass
from pathlib import Path

import yaml

from support.errors import UserError, check, did_you_mean

_SECONDS = re.compile(r"\d{1,9}(\.\d*)?s")


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
    checkpoint_interval: int | str | None = None  # steps (500) or seconds (60s); None: by what writing costs


def load_config(path: str, overrides: typing.Sequence[str] = (), data: str | None = None) -> TrainingConfig:
    """Read and check a configuration; each override is `key=value` or `model_config.key=value`.

    `data` overrides the key of that name.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply_override(values, override)
    if data is not None:
        values["data"] = data
    config = _build(TrainingConfig, values, str(path), "")
    _cross_check(config, str(path))
    return config


def dump_config(config: TrainingConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """The safe loader, which builds plain data only, refusing a key that stands twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, typing.Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice; keep one", key_node.start_mark
                )
            if isinstance(key, typing.Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> dict:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; give a YAML file such as configs/GPT-tiny.yaml") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); see configs/ for examples") from None
    try:
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except Exception as error:  # tags such as `!!int ""` fail in a dozen ways inside PyYAML
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        what = getattr(error, "problem", None) or " ".join(str(error).split()) or "nested too deeply"
        raise UserError(f"{path}: {where}not valid YAML ({what}); mend the file") from None
    if not isinstance(values, dict):
        found = "an empty file" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{path}: {found} where a mapping `key: value` is expected; see configs/GPT-tiny.yaml")
    return values


def _apply_override(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    check(bool(equals), f"--set {override}: write it as key=value, such as --set max_lr=1e-3")
    section, dot, name = key.strip().rpartition(".")
    target = values.setdefault(section, {}) if dot else values
    check(isinstance(target, dict), f"--set {override}: '{section}' has no keys of its own")
    try:
        target[name] = yaml.safe_load(text)
    except Exception:  # as in _read_yaml
        raise UserError(f"--set {override}: '{text}' is no YAML value; quote it") from None


def _build(cls, values: dict, path: str, prefix: str):
    """An instance of the dataclass from the mapping, every key known and of its type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        check(key in fields, f"{path}: unknown key '{prefix}{key}'; {did_you_mean(key, list(fields))}")
    built = {}
    for name, field in fields.items():
        if name in values:
            built[name] = _convert(values[name], hints[name], path, prefix + name)
        else:
            check(field.default is not MISSING, f"{path}: the key '{prefix}{name}' is missing; add it")
    return cls(**built)


def _convert(value, hint, path: str, key: str):
    """The value as the type of its field, or a UserError that says what was expected."""
    if isinstance(hint, types.UnionType):  # X | None
        if value is None:
            return None
        kinds = typing.get_args(hint)
        hint = str if str in kinds and isinstance(value, str) else kinds[0]
    shown = reprlib.repr(value)  # shortened: aliases can make a small file's value astronomically long
    if dataclasses.is_dataclass(hint):
        check(isinstance(value, dict), f"{path}: {key} = {shown} must be a mapping of its own keys")
        return _build(hint, value, path, f"{key}.")
    if hint is str:
        check(isinstance(value, str) and bool(value), f"{path}: {key} = {shown} must be a text")
        return value
    kind = "a whole number" if hint is int else "a number"
    number = _as_number(value)
    check(number is not None, f"{path}: {key} = {shown} must be {kind}")
    check(math.isfinite(number), f"{path}: {key} = {shown} must be finite")
    if hint is int:
        check(number == int(number) and abs(number) < 2**63, f"{path}: {key} = {shown} must be {kind}")
        return int(number)
    return float(number)


def _as_number(value) -> int | float | None:
    """The number its writer meant: PyYAML reads `1e-4`, without a point, as the text "1e-4"."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63) else None


def _cross_check(config: TrainingConfig, path: str) -> None:
    """The rules between values; each sentence names all keys that take part."""
    c, m = config, config.model_config
    for name in ("batch_size", "seq_len", "num_training_steps", "grad_accumulation_steps"):
        check(getattr(c, name) >= 1, f"{path}: {name} = {getattr(c, name)} must be at least 1")
    for name in ("n_embd", "n_head", "n_positions", "n_layer"):
        check(getattr(m, name) >= 1, f"{path}: model_config.{name} = {getattr(m, name)} must be at least 1")
    for name in ("num_warmup_steps", "seed", "weight_decay", "min_lr", "max_lr"):
        check(getattr(c, name) >= 0, f"{path}: {name} = {getattr(c, name)} must not be negative")
    check(0 <= m.p_dropout < 1, f"{path}: model_config.p_dropout = {m.p_dropout} must be in [0, 1)")
    check(c.grad_clip is None or c.grad_clip > 0, f"{path}: grad_clip = {c.grad_clip} must be above 0")
    check(
        m.n_embd % m.n_head == 0,
        f"{path}: model_config.n_embd = {m.n_embd} is not divisible by model_config.n_head = {m.n_head}",
    )
    check(
        c.seq_len <= m.n_positions,
        f"{path}: seq_len = {c.seq_len} is longer than model_config.n_positions = {m.n_positions}",
    )
    check(c.seq_len >= 2, f"{path}: seq_len = {c.seq_len} leaves no next token to predict; give 2 or more")
    check(
        c.num_warmup_steps <= c.num_training_steps,
        f"{path}: num_warmup_steps = {c.num_warmup_steps} is more than "
        f"num_training_steps = {c.num_training_steps}",
    )
    check(c.max_lr >= c.min_lr, f"{path}: max_lr = {c.max_lr} is less than min_lr = {c.min_lr}")
    check(c.max_lr > 0, f"{path}: max_lr = {c.max_lr} must be above 0, or nothing is learned")
    every = c.checkpoint_interval
    check(
        every is None or (every >= 1 if isinstance(every, int) else bool(_SECONDS.fullmatch(every))),
        f"{path}: checkpoint_interval = {every} must be a number of steps (500) or of seconds (60s)",
    )
