"""Model weights: read without trusting the file, found when not named."""

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
from support.hardware import Hardware, choose_hardware
from support.screen import count
from support.tokenizer import get_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WRAPPERS = re.compile(r"^((_orig_mod|module)\.)+")  # prefixes that torch.compile and DistributedDataParallel add
RETRY = "copy it again or train the model anew"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FIELDS = {  # of the configuration, by the shapes that show them
    "token_embeddings.weight": ("n_vocab", "n_embd"),
    "position_embeddings.weight": ("n_positions", "n_embd"),
}


def to_bytes(values: dict) -> memoryview:
    """What torch.save writes. In memory, so that a full disk is later an OSError of one file, nothing else."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getbuffer()  # not a copy: the state of a large model is gigabytes


def load_archive(path: Path, least_bytes: float, most_bytes: float, remedy: str = RETRY) -> dict:
    """The dict that torch.save wrote, never running code from it.

    Raises UserError when it cannot be read, is damaged (every byte counts in a CRC, which torch.load
    itself does not compare), asks for anything but plain tensors, or unpacks to more or fewer bytes.
    """
    require(path.is_file(), f"{path}: no such checkpoint; train one with python train.py")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            n_bytes = sum(entry.file_size for entry in entries)
            require(
                least_bytes <= n_bytes <= most_bytes,
                f"{path}: declares {n_bytes / 2**20:.2f} MiB, but its configuration needs "
                f"{least_bytes / 2**20:.2f} to {most_bytes / 2**20:.2f}; the two do not belong together; {remedy}",
            )
            unique = len({entry.filename for entry in entries}) == len(entries)
            require(unique, f"{path}: an entry stands in it twice; {remedy}")  # two readers could read two files
            damaged = archive.testzip()
            require(damaged is None, f"{path}: damaged ('{damaged}' fails its checksum); {remedy}")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except zipfile.BadZipFile:
        raise UserError(f"{path}: no PyTorch checkpoint but {_foreign_kind(path)}; {remedy}") from None
    except Exception as error:  # a foreign or hostile archive fails in a dozen ways; none may run or trace back
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{path}: holds more than plain tensors, or is damaged ({first_line(error)}); {remedy}"
        ) from None
    require(isinstance(values, dict), f"{path}: holds a {type(values).__name__}, not a state dict; {remedy}")
    return values


def _foreign_kind(path: Path) -> str:
    """What a file that is no zip archive seems to be."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    kinds = {b"<": "a web page", b"\x80": "a bare pickle, which could run code", b"PK": "truncated"}
    kind = next((kind for magic, kind in kinds.items() if start.startswith(magic)), "foreign or damaged")
    return kind if start else "empty"


def load_weights(model: DecoderLM, path: str | Path, config: ModelConfig) -> None:
    """Load `path` into the model, checked against its configuration.

    Prefixes of compiled or distributed models are stripped, half precision is widened and a missing
    scale_factor, which is no learned weight, stays as the model made it.
    """
    n_vocab = model.token_embeddings.num_embeddings
    _fill(model, _load_plausible(Path(path), config, n_vocab), path, config)


def _load_plausible(path: Path, config: ModelConfig, n_vocab: int) -> dict:
    """The archive, if it unpacks to the weights of this configuration, from half to double precision."""
    n_parameters = config.n_parameters(n_vocab)
    return load_archive(path, 1.9 * n_parameters, 8.1 * n_parameters + 2**20)  # with its index


def _fill(model: DecoderLM, loaded: dict, path: str | Path, config: ModelConfig) -> None:
    """Put what `path` held into the model, or say what does not fit."""
    state = {WRAPPERS.sub("", str(key), count=1): value for key, value in loaded.items()}
    wanted = model.state_dict()

    def same(name: str, theirs, ours) -> None:
        require(
            theirs == ours,
            f"{path}: its weights have {name} = {theirs}, but its configuration says {name} = {ours}; "
            "give the config.yaml that belongs to it",
        )

    same("n_layer", len({key.split(".")[1] for key in state if key.startswith("blocks.")}), config.n_layer)
    for key, expected in wanted.items():
        if key.endswith("scale_factor"):
            state.setdefault(key, expected)
        require(key in state, f"{path}: the tensor '{key}' is missing; it is not a checkpoint of this model")
        tensor = state[key]
        # A hostile file may hold sparse, nested or empty shells.
        plain = isinstance(tensor, torch.Tensor) and not tensor.is_nested and tensor.layout == torch.strided
        plain = plain and tensor.device.type == "cpu" and tensor.dtype in FLOATS
        require(plain, f"{path}: '{key}' is a {type(tensor).__name__} of another kind; {RETRY}")
        for name, theirs, ours in zip(FIELDS.get(key, ()), tensor.shape, expected.shape):  # noqa: B905
            same(name, theirs, ours)
        found = f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
        fits = tensor.shape == expected.shape
        require(fits, f"{path}: '{key}' is {found}, not of shape {tuple(expected.shape)}; {RETRY}")
        finite = bool(tensor.isfinite().all())
        require(finite, f"{path}: '{key}' holds values that are not finite; the run diverged, use another one")
        if key.endswith("scale_factor"):  # 1 / sqrt(D / H)
            same("n_head", *(f"{config.n_embd * scale.float() ** 2:.0f}" for scale in (tensor, expected)))
            state[key] = expected  # half precision would have rounded it
    for key in state:
        require(key in wanted, f"{path}: the tensor '{key:.80}' is unknown; it is not a checkpoint of this model")
    model.load_state_dict(state)


@dataclass(frozen=True)
class TrainedModel:
    """A model ready for use, and where it came from."""

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
        """Where results of this model go."""
        return self.path.parent

    def facts(self) -> dict[str, str]:
        """What a command says about it."""
        n_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "model": f"{self.path}, {count(n_parameters, 'parameters')} ({self.how_found})",
            "device": str(self.hardware),
        }


def load_trained_model(config_path: str | None, checkpoint: str | None) -> TrainedModel:
    """The model that the two flags name, or else the newest one; on the best device there is."""
    path, how_found = find_checkpoint(config_path, checkpoint)
    require(path.is_file(), f"{path}: no such checkpoint; train one with python train.py")
    beside = path.parent / "config.yaml"
    require(
        config_path is not None or beside.exists(),
        f"{beside}: missing, so the shape of {path} is unknown; name its YAML with --config",
    )
    config = load_config(config_path or str(beside))
    hardware = choose_hardware()
    tokenizer = get_tokenizer(config.tokenizer_encoding)
    # Before the model is built, which may not fit into memory.
    loaded = _load_plausible(path, config.model_config, tokenizer.n_vocab)
    model = DecoderLM(tokenizer.n_vocab, **vars(config.model_config))
    _fill(model, loaded, path, config.model_config)
    return TrainedModel(model.to(hardware.device).eval(), config, tokenizer, hardware, path, how_found)


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
    shipped = Path(os.path.relpath(ROOT / "model.pt"))
    require(shipped.exists(), "no trained model found; train one with python train.py configs/GPT-tiny.yaml")
    return shipped, "it comes with the package; name another to use that"
