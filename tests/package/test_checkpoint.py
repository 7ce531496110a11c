"""Checkpoints: what loads, what is refused in one sentence, and that a failed write leaves the former file."""

import io
import json
import math
import os
import pickle
import signal
import zipfile

import pytest
import torch
import yaml
from tiny_run import KEYS, TinyRun, assert_refused, at_batches, files

import classify
import generate
import train
from model import DecoderLM
from support.checkpoint import load_trained_model
from support.files import atomic_file

V, SHAPE = 50257, KEYS["model_config"]


def to_bytes(values) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(3)
    return DecoderLM(V, **SHAPE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: that of a checkpoint, with its config.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**KEYS, "output_dir": "out"}))
    return tmp_path


# --- checkpoints that are refused ------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes the folder code_ran."""

    def __reduce__(self):
        return (os.mkdir, ("code_ran",))


def rezipped(content: bytes, change, compression=zipfile.ZIP_STORED) -> bytes:
    """The zip archive with each (name, bytes) changed, and checksums that fit."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w", compression) as archive:
        for name in source.namelist():
            archive.writestr(name, change(name, source.read(name)))
    return buffer.getvalue()


def damaged_checkpoints(original) -> dict[str, tuple[bytes, list[str]]]:
    """{kind of file: (its content, words of the message)}."""
    state, whole = original.state_dict(), to_bytes(original.state_dict())
    flipped = bytearray(whole)
    values = state["token_embeddings.weight"].numpy().tobytes()
    flipped[whole.find(values[4000:4016])] ^= 1  # torch.load does not mind
    bomb = rezipped(whole, lambda name, data: pickle.dumps(Bomb()) if name.endswith("data.pkl") else data)

    def changed(**changes):
        return to_bytes({**state, **{key.replace("__", "."): value for key, value in changes.items()}})

    return {
        "empty": (b"", []),
        "web page": (b"\n<!DOCTYPE html><title>404</title>" * 20, []),
        "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", []),
        "truncated": (whole[: len(whole) // 2], []),
        "flipped bit": (bytes(flipped), []),
        "bare pickle bomb": (pickle.dumps(Bomb()), []),
        "pickle bomb": (bomb, []),
        "whole model": (to_bytes({"model": original}), []),
        "another zip": (rezipped(whole, lambda name, data: os.urandom(len(data))), []),
        "wrong shape": (changed(ln__weight=torch.ones(9)), ["ln.weight"]),
        "other n_positions": (to_bytes(DecoderLM(V, 8, 2, 32, 1).state_dict()), ["n_positions", "32"]),
        "other n_embd": (to_bytes(DecoderLM(V, 4, 2, 16, 1).state_dict()), ["n_embd", "4"]),
        "other n_head": (to_bytes(DecoderLM(V, 8, 4, 16, 1).state_dict()), ["n_head", "4"]),
        "more layers": (to_bytes(DecoderLM(V, 8, 2, 16, 3).state_dict()), ["n_layer", "3"]),
        "missing": (to_bytes({k: t for k, t in state.items() if k != "ln.weight"}), ["ln.weight"]),
        "unknown": (changed(extra=torch.ones(1)), ["extra"]),
        "no tensor": (changed(ln__weight="ones"), ["ln.weight"]),
        "NaN": (changed(ln__weight=state["ln.weight"] * math.nan), ["ln.weight"]),
    }


def test_damaged_and_foreign_checkpoints_are_refused(folder, capsys, original):
    for kind, (content, words) in damaged_checkpoints(original).items():
        (folder / "model.pt").write_bytes(content)
        print(kind)  # pytest shows the last one where this fails
        assert_refused(capsys, folder, ["model.pt", *words], generate, "model.pt", "--prompt", "It is")
        assert not (folder / "code_ran").exists(), f"{kind}: code from the file ran"
    pickle.loads(pickle.dumps(Bomb()))
    assert (folder / "code_ran").exists(), "the bomb would not have gone off"


def test_checkpoint_of_another_configuration_or_without_one_is_refused(folder, capsys):
    """The likeliest mistake: GPT-tiny's YAML with the package's larger model.pt. The file is fine."""
    big = {"n_embd": 64, "n_head": 2, "n_positions": 16, "n_layer": 3}
    torch.save(DecoderLM(V, **big).state_dict(), folder / "model.pt")
    for flag in ("--evaluate", "--init"):
        error = assert_refused(capsys, folder, ["n_embd", "64"], train, "config.yaml", flag, "model.pt")
        assert "MiB" not in error and "copy" not in error and "config.yaml" in error
    (folder / "config.yaml").unlink()
    for command in (generate, classify):
        assert_refused(capsys, folder, ["model.pt", "config.yaml", "--config"], command, "model.pt")
        assert_refused(capsys, folder, ["nowhere.pt"], command, "nowhere.pt")


# --- checkpoints that load -------------------------------------------------------------------------------


def test_prefixes_of_wrappers_are_stripped(folder, original):
    for prefix in ("_orig_mod.", "module._orig_mod."):
        torch.save({prefix + key: value for key, value in original.state_dict().items()}, folder / "model.pt")
        loaded = load_trained_model(None, "model.pt", "cpu").model.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in original.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load(folder, dtype):
    """The scale factor 1 / sqrt(7) has no exact bfloat16; a rounded one would change every attention score."""
    shape = {"n_embd": 14, "n_head": 2, "n_positions": 8, "n_layer": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump({**KEYS, "output_dir": "out", "model_config": shape}))
    state = DecoderLM(V, **shape).to(dtype).state_dict()
    torch.save(state, folder / "model.pt")
    loaded = load_trained_model(None, "model.pt", "cpu").model.state_dict()
    assert loaded["blocks.0.mha.scale_factor"].item() == pytest.approx(7**-0.5, rel=1e-7)
    for key, value in loaded.items():
        assert value.dtype == torch.float32
        assert "scale_factor" in key or torch.equal(value, state[key].float())


# --- training states -------------------------------------------------------------------------------------


def test_damaged_and_foreign_training_states_are_refused(tmp_path, monkeypatch, capsys, quick):
    monkeypatch.chdir(tmp_path)
    tiny = TinyRun(tmp_path)
    with monkeypatch.context() as patch:
        at_batches(patch, {3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        assert tiny.main() == 143
    path = tiny.out / "training_state.pt"
    good, values = path.read_bytes(), torch.load(path, weights_only=True)
    contents = {
        "truncated": good[:-1000],
        "empty": b"",
        "a model.pt": to_bytes(values["model"]),
        "bare bomb": pickle.dumps(Bomb()),
        "bomb": to_bytes({**values, "bomb": Bomb()}),
        **{f"no {key}": to_bytes({**values, key: {}}) for key in ("model", "optimizer")},
    }
    for kind, content in contents.items():
        path.write_bytes(content)
        print(kind)
        assert_refused(capsys, tmp_path, ["training_state.pt", "--fresh"], train, tiny.config)
        assert not (tmp_path / "code_ran").exists(), f"{kind}: code from the file ran"
    path.write_bytes(good)
    assert tiny.main() == 0


# --- writing ---------------------------------------------------------------------------------------------


def test_write_that_fails_halfway_leaves_the_former_file(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"former")
    with pytest.raises(OSError, match="full"), atomic_file(path) as file:
        file.write(bytes(10_000))
        raise OSError(28, "the disk is full")
    assert files(tmp_path) == {"model.pt": b"former"}


def test_results_are_json_whatever_the_numbers(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(train, "evaluate", lambda *args, **keys: {"val-loss": 800.0, "val-perplexity": math.inf})
    tiny = TinyRun(tmp_path)
    assert tiny.main() == 0
    for name in ("eval.json", "run.json"):
        json.loads((tiny.out / name).read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
