"""Model checkpoints: loading them without trusting the file, and finding one when none is named."""

import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

from model import DecoderLM
from support.config import ModelConfig, TrainingConfig, load_config
from support.device import Device, choose_device
from support.errors import UserError, first_line, is_out_of_memory, require
from support.files import ROOT, atomic_file
from support.screen import count
from support.tokenizer import get_tokenizer

WRAPPERS = re.compile(r"^((_orig_mod|module)\.)+")  # prefixes that torch.compile and DistributedDataParallel add
RETRY = "copy it again or retrain the model"


def read_archive(path: Path, remedy: str = RETRY) -> dict:
    """The dict that torch.save wrote to `path`. No code in the file is run.

    Raises UserError if the file is missing or damaged (it compares the checksums, which torch.load does not), or
    contains anything but tensors and plain values.
    """
    require(path.is_file(), f"{path}: no such checkpoint; train one with python train.py")
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        require(wrong is None, f"{path}: damaged (wrong checksum of '{wrong}'); {remedy}")
        values = torch.load(path, map_location="cpu", weights_only=True)
        require(isinstance(values, dict), f"{path}: a {type(values).__name__} instead of a state dict; {remedy}")
    except UserError:
        raise
    except Exception as error:  # a foreign or damaged archive fails in many ways
        if is_out_of_memory(error):
            raise
        problem = f"not a PyTorch checkpoint of plain tensors, or damaged ({first_line(error)})"
        raise UserError(f"{path}: {problem}; {remedy}") from None
    return values


def save_tensors(path: Path, values: dict) -> None:
    """Replace the file `path` by what torch.save writes. May raise OSError; the former file is then unchanged."""
    try:
        with atomic_file(path) as file:
            torch.save(values, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch.save fails again when it ends a file on a full disk
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from None
        raise


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint that a path names: the file itself, or the model.pt of a run's folder."""
    return Path(path) / "model.pt" if Path(path).is_dir() else Path(path)


def load_weights(model: DecoderLM, path: str | Path, config: ModelConfig) -> None:
    """Load the checkpoint `path`, also a compiled, distributed or half-precision one, into a model of this shape.

    Raises UserError if the file is damaged or belongs to another configuration.
    """
    path = checkpoint_file(path)
    _load_into(model, _read_weights(path, config), path)


def _read_weights(path: Path, config: ModelConfig) -> dict:
    """The state dict of a checkpoint, whose sizes are those of the configuration."""
    state = {WRAPPERS.sub("", str(key), count=1): value for key, value in read_archive(path).items()}
    found = {"n_layer": len({key.split(".")[1] for key in state if key.startswith("blocks.")}) or config.n_layer}
    positions = state.get("position_embeddings.weight")
    if isinstance(positions, torch.Tensor) and positions.dim() == 2:
        found["n_positions"], found["n_embd"] = positions.shape
    scale_factor = state.get("blocks.0.mha.scale_factor")  # 1 / sqrt(n_embd / n_head)
    if isinstance(scale_factor, torch.Tensor) and scale_factor.numel() == 1 and scale_factor.isfinite():
        found["n_head"] = round(found.get("n_embd", config.n_embd) * float(scale_factor) ** 2)
    wanted = vars(config)
    differing = [f"{key} = {value}, not {wanted[key]}" for key, value in found.items() if value != wanted[key]]
    beside = path.with_name("config.yaml")
    remedy = f"use the configuration saved with them, {beside if beside.is_file() else 'config.yaml'}"
    require(not differing, f"{path}: the weights have {'; '.join(differing)} as in this configuration; {remedy}")
    return state


def _load_into(model: DecoderLM, state: dict, path: Path) -> None:
    """Load a state dict with exactly the model's keys and shapes, and finite values."""
    constants = {key: value for key, value in model.state_dict().items() if key.endswith("scale_factor")}
    try:
        model.load_state_dict({**state, **constants})  # which half precision would have rounded
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint of this model ({first_line(error)}); {RETRY}") from None
    for name, parameter in model.named_parameters():
        problem = f"{path}: '{name}' has values that are not finite: the run diverged; use another checkpoint"
        require(bool(parameter.isfinite().all()), problem)


@dataclass(frozen=True)
class TrainedModel:
    """A model that is ready to use, and where it came from."""

    model: DecoderLM
    config: TrainingConfig
    tokenizer: tiktoken.Encoding
    hardware: Device
    path: Path
    how_found: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.hardware.device

    def facts(self) -> dict[str, str]:
        """What a command prints about the model."""
        size = count(sum(parameter.numel() for parameter in self.model.parameters()), "parameters")
        return {"model": f"{self.path}, {size} ({self.how_found})", "device": str(self.hardware)}


def load_trained_model(config_path: str | None, checkpoint: str | None, device: str = "auto") -> TrainedModel:
    """The model that the two flags name, by default the newest one, on the device.

    Raises UserError if there is none, or if it cannot be loaded.
    """
    path, how_found = find_checkpoint(config_path, checkpoint)
    require(path.is_file(), f"{path}: no such checkpoint; train one with python train.py")
    beside = path.parent / "config.yaml"
    configured = bool(config_path) or beside.is_file()
    require(configured, f"{path}: no config.yaml beside it; name the model's YAML with --config")
    config = load_config(config_path or str(beside))
    hardware = choose_device(device)
    tokenizer = get_tokenizer(config.tokenizer_encoding)
    # The file is read first: a configuration that is far too large for it never becomes a model in memory.
    state = _read_weights(path, config.model_config)
    model = DecoderLM(tokenizer.n_vocab, **vars(config.model_config))
    _load_into(model, state, path)
    model = model.to(hardware.device).eval()
    return TrainedModel(model, config, tokenizer, hardware, path, how_found)


def find_checkpoint(config_path: str | None, checkpoint: str | None) -> tuple[Path, str]:
    """The path of the checkpoint and how it was chosen. Raises UserError if there is none to choose."""
    if checkpoint:
        return checkpoint_file(checkpoint), "from the command line"
    if config_path:
        return Path(load_config(config_path).output_dir) / "model.pt", f"output_dir of {config_path}"
    runs = [path for folder in {Path.cwd(), ROOT} for path in folder.glob("outputs/*/model.pt")]
    newest = max(runs, key=lambda path: path.stat().st_mtime, default=ROOT / "model.pt")
    require(newest.exists(), "no trained model found; train one with python train.py configs/GPT-tiny.yaml")
    how_found = "the newest in outputs/" if runs else "the bundled model"
    return Path(os.path.relpath(newest)), f"{how_found}; name a path to use another"
