"""Model checkpoints: loading them without trusting the file, and finding one when none is named."""

import io
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

from model import DecoderLM
from support.config import ModelConfig, TrainingConfig, load_config
from support.errors import UserError, first_line, is_out_of_memory, require
from support.files import zip_problem
from support.hardware import Hardware, choose_hardware
from support.paths import ROOT
from support.screen import count
from support.tokenizer import get_tokenizer

WRAPPERS = re.compile(r"^((_orig_mod|module)\.)+")  # prefixes that torch.compile and DistributedDataParallel add
RETRY = "copy it again or retrain the model"


def to_bytes(values: dict) -> memoryview:
    """What torch.save writes, in memory, so that a full disk only ever shows as an OSError of `write_together`."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getbuffer()  # not a copy: the state of a large model is gigabytes


def load_archive(path: Path, least_bytes: float, most_bytes: float, remedy: str = RETRY) -> dict:
    """The dict that torch.save wrote to `path`. No code in the file is run.

    Raises UserError if the file is missing or damaged (it compares the CRCs, which torch.load does not), contains
    anything but tensors and plain values, or unpacks to a number of bytes outside the two bounds.
    """
    require(path.is_file(), f"{path}: no such checkpoint; train one with python train.py")
    require(zipfile.is_zipfile(path), f"{path}: {zip_problem(path, 'PyTorch checkpoint')}; {remedy}")
    try:
        with zipfile.ZipFile(path) as archive:
            n_mib = sum(entry.file_size for entry in archive.infolist()) / 2**20
            needed = f"the configuration needs {least_bytes / 2**20:.2f} to {most_bytes / 2**20:.2f}"
            fits = least_bytes <= n_mib * 2**20 <= most_bytes
            require(fits, f"{path}: {n_mib:.2f} MiB of values, but {needed}; {remedy}")
            wrong = archive.testzip()
            require(wrong is None, f"{path}: damaged PyTorch checkpoint (wrong CRC of '{wrong}'); {remedy}")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a foreign archive fails in many ways
        if is_out_of_memory(error):
            raise
        problem = f"damaged, or not a checkpoint of plain tensors ({first_line(error)})"
        raise UserError(f"{path}: {problem}; {remedy}") from None
    require(isinstance(values, dict), f"{path}: contains a {type(values).__name__}, not a state dict; {remedy}")
    return values


def load_weights(model: DecoderLM, path: str | Path, config: ModelConfig) -> None:
    """Load the checkpoint `path`, also a compiled, distributed or half-precision one, into a model of this shape.

    Raises UserError if the file is damaged or belongs to another configuration.
    """
    path = checkpoint_file(path)
    _load_into(model, _read_weights(path, config, model.n_vocab), path, config)


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint that a path names: the file itself, or the model.pt of a run's folder."""
    return Path(path) / "model.pt" if Path(path).is_dir() else Path(path)


def _read_weights(path: Path, config: ModelConfig, n_vocab: int) -> dict:
    """The state dict of a checkpoint. Its size has to fit this configuration in half to double precision."""
    n_parameters = config.n_parameters(n_vocab)
    loaded = load_archive(path, 1.9 * n_parameters, 8.1 * n_parameters + 2**20)  # and its index
    return {WRAPPERS.sub("", str(key), count=1): value for key, value in loaded.items()}


def _load_into(model: DecoderLM, state: dict, path: str | Path, config: ModelConfig) -> None:
    try:
        n_positions, n_embd = state["position_embeddings.weight"].shape
        found = {"n_embd": n_embd, "n_positions": n_positions}
        scale_factor = state.get("blocks.0.mha.scale_factor")  # 1 / sqrt(n_embd / n_head)
        if scale_factor is not None:
            found["n_head"] = round(n_embd * float(scale_factor) ** 2)
        for name, value in found.items():
            wanted = getattr(config, name)
            problem = f"the weights have {name} = {value}, but the configuration says {name} = {wanted}"
            require(value == wanted, f"{path}: {problem}; use the config.yaml that was saved with them")
        for key, value in model.state_dict().items():
            if key.endswith("scale_factor"):  # a constant, which half precision would round
                state[key] = value
        model.load_state_dict(state)  # names missing and unknown tensors and other shapes
    except (RuntimeError, LookupError, AttributeError, ValueError, TypeError, ArithmeticError) as error:
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
    hardware: Hardware
    path: Path
    how_found: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.hardware.device

    @property
    def folder(self) -> Path:
        """Where the results of this model go."""
        return self.path.parent

    def facts(self) -> dict[str, str]:
        """What a command prints about the model."""
        n_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "model": f"{self.path}, {count(n_parameters, 'parameters')} ({self.how_found})",
            "device": str(self.hardware),
        }


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
    hardware = choose_hardware(device)
    tokenizer = get_tokenizer(config.tokenizer_encoding)
    # The file is read first: a configuration that is far too large for it never becomes a model in memory.
    state = _read_weights(path, config.model_config, tokenizer.n_vocab)
    model = DecoderLM(tokenizer.n_vocab, **vars(config.model_config))
    _load_into(model, state, path, config.model_config)
    model = model.to(hardware.device).eval()
    return TrainedModel(model, config, tokenizer, hardware, path, how_found)


def find_checkpoint(config_path: str | None, checkpoint: str | None) -> tuple[Path, str]:
    """The path of the checkpoint and how it was chosen. Raises UserError if there is none to choose."""
    if checkpoint:
        return checkpoint_file(checkpoint), "as named"
    if config_path:
        return Path(load_config(config_path).output_dir) / "model.pt", f"output_dir of {config_path}"
    runs = [path for folder in {Path.cwd(), ROOT} for path in folder.glob("outputs/*/model.pt")]
    newest = max(runs, key=lambda path: path.stat().st_mtime, default=ROOT / "model.pt")
    require(newest.exists(), "no trained model found; train one with python train.py configs/GPT-tiny.yaml")
    how_found = "the newest in outputs/" if runs else "it comes with the package"
    return Path(os.path.relpath(newest)), f"{how_found}; give a path to use another"
