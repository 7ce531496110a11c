"""Model weights: written whole or not at all, read without trusting the file, found when not named."""

import dataclasses
import io
import math
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
from torch import nn

from model import DecoderLM
from support.config import ModelConfig, TrainingConfig, load_config
from support.errors import UserError, check, first_line, is_out_of_memory
from support.hardware import choose_hardware
from support.screen import count
from support.tokenizer import get_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WRAPPERS = re.compile(r"^((_orig_mod|module)\.)+")  # prefixes that torch.compile and DistributedDataParallel add
RETRY = "copy it again or train the model anew"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def packed_weights(model: nn.Module) -> memoryview:
    """The model's state_dict, tensors only, as torch.save writes it."""
    return packed({key: tensor.detach().cpu() for key, tensor in model.state_dict().items()})


def packed(values: dict) -> memoryview:
    """What torch.save writes. In memory, so that a full disk is later an OSError of one file, nothing else."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getbuffer()  # not a copy: the state of a large model is gigabytes


def load_archive(path: Path, least_bytes: float, most_bytes: float, remedy: str = RETRY) -> dict:
    """The dict that torch.save wrote, never running code from it.

    Raises UserError when it cannot be read, is damaged (every byte counts in a CRC, which torch.load
    itself does not compare), asks for anything but plain tensors, or unpacks to more or fewer bytes.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            n_bytes = sum(entry.file_size for entry in entries)
            check(
                least_bytes <= n_bytes <= most_bytes,
                f"{path}: declares {n_bytes / 2**20:.2f} MiB, but its configuration needs "
                f"{least_bytes / 2**20:.2f} to {most_bytes / 2**20:.2f}; the two do not belong together; {remedy}",
            )
            unique = len({entry.filename for entry in entries}) == len(entries)
            check(unique, f"{path}: an entry stands in it twice; {remedy}")  # two readers could read two files
            damaged = archive.testzip()
            check(damaged is None, f"{path}: damaged ('{damaged}' fails its checksum); {remedy}")
            file.seek(0)
            values = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train one with python train.py") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a checkpoint; give the model.pt in it") from None
    except zipfile.BadZipFile:
        raise UserError(f"{path}: no PyTorch checkpoint but {_foreign_kind(path)}; {remedy}") from None
    except Exception as error:  # a foreign or hostile archive fails in a dozen ways; none may run or trace back
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{path}: holds more than plain tensors, or is damaged ({first_line(error)}); {remedy}"
        ) from None
    check(isinstance(values, dict), f"{path}: holds a {type(values).__name__}, not a state dict; {remedy}")
    return values


def _foreign_kind(path: Path) -> str:
    """What a file that is no zip archive seems to be."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    kinds = {b"<": "a web page", b"\x80": "a bare pickle, which could run code", b"PK": "truncated"}
    if not start:
        return "empty"
    return next((kind for magic, kind in kinds.items() if start.startswith(magic)), "foreign or damaged")


def load_weights(model: DecoderLM, path: str | Path, config: ModelConfig) -> None:
    """Load `path` into the model, checked against its configuration.

    Prefixes of compiled or distributed models are stripped, half precision is widened and a missing
    scale_factor, which is no learned weight, stays as the model made it.
    """
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    _fill(model, load_archive(Path(path), *_plausible_bytes(n_parameters)), Path(path), config)


def _fill(model: DecoderLM, loaded: dict, path: Path, config: ModelConfig) -> None:
    """Put what `path` held into the model, or say what does not fit."""
    wanted = model.state_dict()
    state = {WRAPPERS.sub("", str(key), count=1): value for key, value in loaded.items()}

    _compare_fields(state, wanted, config, path)
    for key, expected in wanted.items():
        if key not in state and key.endswith("scale_factor"):
            state[key] = expected
        check(key in state, f"{path}: the tensor '{key}' is missing; it is not a checkpoint of this model")
        tensor = state[key]
        check(
            _is_plain(tensor) and tensor.shape == expected.shape,
            f"{path}: '{key}' is {_describe(tensor)} where {_describe(expected)} is expected",
        )
        check(
            bool(torch.isfinite(tensor).all()),
            f"{path}: '{key}' holds values that are not finite; the run diverged, use another checkpoint",
        )
    for key in state:
        check(key in wanted, f"{path}: the tensor '{key:.80}' is unknown; it is not a checkpoint of this model")
    model.load_state_dict(state)


def _plausible_bytes(n_parameters: int) -> tuple[float, float]:
    """What an archive of so many weights may unpack to: from half to double precision, and its index."""
    return 1.9 * n_parameters, 8.1 * n_parameters + 2**20


def _is_plain(value) -> bool:
    """Whether it is an ordinary tensor of floats; a hostile file may hold sparse, nested or empty shells."""
    return (
        isinstance(value, torch.Tensor)
        and not value.is_nested
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.dtype in FLOATS
    )


def _describe(value) -> str:
    if not _is_plain(value):
        return f"a {type(value).__name__} of another kind"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def _compare_fields(state: dict, wanted: dict, config: ModelConfig, path: Path) -> None:
    """Name the first field of the configuration that the shapes contradict."""

    def fields(tensors: dict) -> dict[str, int]:
        found = {}
        for key, names in (
            ("token_embeddings.weight", ("n_vocab", "n_embd")),
            ("position_embeddings.weight", ("n_positions", "n_embd")),
        ):
            if _is_plain(tensors.get(key)) and tensors[key].dim() == 2:
                found |= dict(zip(names, tensors[key].shape, strict=True))
        blocks = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
        found["n_layer"] = len(blocks)
        scale = tensors.get("blocks.0.mha.scale_factor")
        if _is_plain(scale) and scale.numel() == 1 and 0 < float(scale) < math.inf:
            found["n_head"] = round(config.n_embd * float(scale) ** 2)  # scale = 1 / sqrt(D / H)
        return found

    theirs, ours = fields(state), fields(wanted)
    for name in ("n_vocab", "n_embd", "n_positions", "n_layer", "n_head"):
        if name in theirs and name in ours and theirs[name] != ours[name]:
            raise UserError(
                f"{path}: its weights have {name} = {theirs[name]}, but its configuration says "
                f"{name} = {ours[name]}; give the config.yaml that belongs to it"
            )


@dataclass(frozen=True)
class TrainedModel:
    """A model ready for use, and where it came from."""

    model: DecoderLM
    config: TrainingConfig
    tokenizer: tiktoken.Encoding
    device: torch.device
    path: Path
    how_found: str

    @property
    def folder(self) -> Path:
        """Where results of this model go."""
        return self.path.parent

    def facts(self) -> dict[str, str]:
        """What a command says about it."""
        n_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "model": f"{self.path}, {count(n_parameters, 'parameters')} ({self.how_found})",
            "device": str(choose_hardware()),
        }


def load_trained_model(config_path: str | None, checkpoint: str | None) -> TrainedModel:
    """The model that the two flags name, or else the newest one; on the best device there is."""
    path, how_found = find_checkpoint(config_path, checkpoint)
    check(path.is_file(), f"{path}: no such checkpoint; train one with python train.py")
    beside = path.parent / "config.yaml"
    check(
        config_path is not None or beside.exists(),
        f"{beside}: missing, so the shape of {path} is unknown; name its YAML with --config",
    )
    config = load_config(config_path or str(beside))
    hardware = choose_hardware()
    tokenizer = get_tokenizer(config.tokenizer_encoding)
    n_parameters = config.model_config.n_parameters(tokenizer.n_vocab)
    loaded = load_archive(path, *_plausible_bytes(n_parameters))  # before a model is built that may not fit
    model = DecoderLM(tokenizer.n_vocab, **dataclasses.asdict(config.model_config))
    _fill(model, loaded, path, config.model_config)
    return TrainedModel(model.to(hardware.device).eval(), config, tokenizer, hardware.device, path, how_found)


def find_checkpoint(config_path: str | None, checkpoint: str | None) -> tuple[Path, str]:
    """The checkpoint's path and how it was chosen. Raises UserError when there is none."""
    if checkpoint:
        return Path(checkpoint), "as named"
    if config_path:
        return Path(load_config(config_path).output_dir) / "model.pt", f"output_dir of {config_path}"
    runs = [path for folder in {Path.cwd(), ROOT} for path in folder.glob("outputs/*/model.pt")]
    if runs:
        newest = max(runs, key=lambda path: path.stat().st_mtime)
        return Path(os.path.relpath(newest)), "the newest in outputs/; name another to use that"
    if (ROOT / "model.pt").exists():
        return Path(os.path.relpath(ROOT / "model.pt")), "it comes with the package; name another to use that"
    raise UserError("no trained model found; train one with python train.py configs/GPT-tiny.yaml")
