"""Checkpoints and saved states: what loads, what is refused, and that a failed write costs nothing."""

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


class Bomb:
    """Unpickled, it makes the file code_ran, which assert_refused would notice."""

    def __reduce__(self):
        return open, ("code_ran", "w")


def to_bytes(values) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def with_bomb(content: bytes) -> bytes:
    """The checkpoint with a bomb for its pickle, and checksums that fit."""
    buffer, bomb = io.BytesIO(), pickle.dumps(Bomb(), protocol=2)
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, bomb if name.endswith("data.pkl") else source.read(name))
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: that of a checkpoint, with its config.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**KEYS, "output_dir": "out"}))
    return tmp_path


def state_of(**changes) -> dict:
    """The state dict of a model with these changes of its configuration."""
    return DecoderLM(V, **{**SHAPE, **changes}).state_dict()


def damaged_checkpoints() -> dict[str, tuple[bytes, list[str]]]:
    """{kind of file: (its content, words of the message)}."""
    state = state_of()
    whole, weights = to_bytes(state), state["token_embeddings.weight"].numpy().tobytes()
    flipped = bytearray(whole)
    flipped[whole.find(weights[4000:4016])] ^= 1  # torch.load does not mind
    without = {key: value for key, value in state.items() if key != "ln.weight"}
    return {
        "web page": (b"\n<!DOCTYPE html><title>404</title>" * 20, []),
        "truncated": (whole[: len(whole) // 2], []),
        "flipped bit": (bytes(flipped), []),
        "bomb": (with_bomb(whole), []),
        "other n_positions": (to_bytes(state_of(n_positions=32)), ["n_positions", "32"]),
        "other n_head": (to_bytes(state_of(n_head=4)), ["n_head", "4"]),
        "wrong shape": (to_bytes({**state, "ln.weight": torch.ones(9)}), ["ln.weight"]),
        "missing": (to_bytes(without), ["ln.weight"]),
        "unknown": (to_bytes({**state, "extra": torch.ones(1)}), ["extra"]),
        "NaN": (to_bytes({**state, "ln.weight": torch.full((8,), math.nan)}), ["ln.weight"]),
    }


def test_damaged_and_foreign_checkpoints_are_refused(folder, capsys):
    for kind, (content, words) in damaged_checkpoints().items():
        (folder / "model.pt").write_bytes(content)
        print(kind)  # pytest shows the last one where this fails
        assert_refused(capsys, folder, ["model.pt", *words], generate, "model.pt", "--prompt", "It is")
    pickle.loads(pickle.dumps(Bomb())).close()
    assert (folder / "code_ran").exists(), "the bomb would not have gone off"


def test_checkpoint_of_another_configuration_or_without_one_is_refused(folder, capsys):
    """The likeliest mistake: GPT-tiny's YAML with the package's larger model.pt. The file is fine."""
    torch.save(state_of(n_embd=64, n_layer=3), folder / "model.pt")
    for flag in ("--evaluate", "--init"):
        error = assert_refused(capsys, folder, ["n_embd", "64"], train, "config.yaml", flag, "model.pt")
        assert "MiB" not in error and "copy" not in error and "config.yaml" in error
    (folder / "config.yaml").unlink()
    for command in (generate, classify):
        assert_refused(capsys, folder, ["model.pt", "config.yaml", "--config"], command, "model.pt")
        assert_refused(capsys, folder, ["nowhere.pt"], command, "nowhere.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_wrapped_models_load(folder, dtype):
    """The scale factor 1 / sqrt(7) has no exact bfloat16; a rounded one would change every attention score."""
    shape = {"n_embd": 14, "n_head": 2, "n_positions": 8, "n_layer": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump({**KEYS, "output_dir": "out", "model_config": shape}))
    state = DecoderLM(V, **shape).to(dtype).state_dict()
    for prefix in ("", "_orig_mod.", "module._orig_mod."):
        torch.save({prefix + key: value for key, value in state.items()}, folder / "model.pt")
        loaded = load_trained_model(None, "model.pt", "cpu").model.state_dict()
        assert loaded["blocks.0.mha.scale_factor"].item() == pytest.approx(7**-0.5, rel=1e-7)
        for key, value in loaded.items():
            assert value.dtype == torch.float32
            assert "scale_factor" in key or torch.equal(value, state[key].float())


def test_damaged_and_foreign_training_states_are_refused(tmp_path, monkeypatch, capsys, quick):
    monkeypatch.chdir(tmp_path)
    tiny = TinyRun(tmp_path)
    at_batches(monkeypatch, {3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert tiny.main() == 143
    path = tiny.out / "training_state.pt"
    good = path.read_bytes()
    foreign = to_bytes(torch.load(path, weights_only=True)["model"])
    for content in (good[:-1000], b"", foreign, pickle.dumps(Bomb()), with_bomb(good)):
        path.write_bytes(content)
        assert_refused(capsys, tmp_path, ["training_state.pt", "--fresh"], train, tiny.config)
    path.write_bytes(good)
    assert tiny.main() == 0


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
