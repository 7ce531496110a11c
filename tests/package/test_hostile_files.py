"""Damaged and foreign files: a command either succeeds or ends with one sentence and exit status 2."""

import copy
import io
import math
import os
import pickle
import random
import re
import signal
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import KEYS, TinyRun, at_batches

import generate
from model import DecoderLM
from support import plan, results
from support.checkpoint import load_weights, to_bytes
from support.config import ModelConfig, load_config
from support.errors import UserError

SHAPE = ModelConfig(**KEYS["model_config"])
V = 50257


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leave out what takes long and reads no file."""
    monkeypatch.setattr(plan, "matrix_product_rate", lambda hardware: 1e12)
    monkeypatch.setattr(results, "plot_curve", lambda *args: None)


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(3)
    return DecoderLM(V, **vars(SHAPE))


@pytest.fixture(scope="module")
def whole(original):
    """The bytes of a good model.pt."""
    return bytes(to_bytes(original.state_dict()))


@pytest.fixture
def folder(tmp_path):
    """A folder for a checkpoint, with its config.yaml and a file of prefixes."""
    values = {**KEYS, "output_dir": str(tmp_path), "model_config": vars(SHAPE)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "prefixes.json").write_text('["It is"]')
    return tmp_path


def generate_from(folder: Path) -> int:
    """Exit status of `generate.py` on the folder's model.pt."""
    named = ["--prefixes", str(folder / "prefixes.json"), "--checkpoint", str(folder / "model.pt")]
    try:
        generate.main([*named, "--max_new_tokens", "1"])
    except SystemExit as stop:
        return stop.code
    return 0


def loads_as_the_original(path: Path, original) -> bool:
    """Whether the file is refused with one sentence (False) or gives exactly the original's tensors (True)."""
    model = DecoderLM(V, **vars(SHAPE))
    try:
        load_weights(model, path, SHAPE)
    except UserError as error:
        assert "\n" not in str(error)
        return False
    pairs = zip(model.state_dict().values(), original.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs), "a damaged file gave other weights without any error"
    return True


# --- checkpoints that are refused ------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes the marker file that its argument names."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def zipped(entries, compression=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def entries_of(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def with_changes(original, **changes) -> bytes:
    state = dict(original.state_dict())
    for key, change in changes.items():
        key = key.replace("__", ".")
        state[key] = change(state[key]) if callable(change) else change
    return to_bytes(state)


def damaged_checkpoints(original, whole: bytes, marker: Path) -> dict[str, tuple[bytes, str]]:
    """{kind of file: (its content, a regular expression for the error message)}."""
    small, state = torch.ones(1), original.state_dict()
    bomb_in_place = [
        (n, pickle.dumps(Bomb(marker)) if n.endswith("data.pkl") else c) for n, c in entries_of(whole)
    ]
    zip_bomb = zipped([*entries_of(whole), ("archive/data/99", bytes(1 << 28))], zipfile.ZIP_DEFLATED)
    page = b"\n<!DOCTYPE html><title>404</title>" * 20
    return {
        "empty": (b"", "empty file instead of a PyTorch checkpoint"),
        "web page": (page, "web page instead of a PyTorch checkpoint"),
        "text": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "foreign file instead of a PyTorch checkpoint",
        ),
        "truncated": (whole[: len(whole) // 2], "truncated or damaged PyTorch checkpoint"),
        "end only": (whole[len(whole) // 2 :], "damaged"),
        "bare pickle bomb": (pickle.dumps(Bomb(marker)), "foreign file"),
        "pickle bomb": (zipped(bomb_in_place), "plain tensors"),
        "bomb beside the weights": (with_changes(original, bomb=Bomb(marker)), "plain tensors"),
        "whole model": (to_bytes({"model": original}), "plain tensors"),
        "zip bomb": (zip_bomb, "but the configuration needs"),
        "too small": (to_bytes({"ln.weight": small}), "but the configuration needs"),
        "another zip": (zipped([("word/document.xml", os.urandom(len(whole)))]), "plain tensors"),
        "list": (to_bytes(list(state.values())), "contains a list, not a state dict"),
        "wrong shape": (with_changes(original, ln__weight=torch.ones(9)), "size mismatch for ln.weight"),
        "another model": (to_bytes(DecoderLM(V, 8, 2, 32, 1).state_dict()), "n_positions = 32"),
        "missing": (to_bytes({k: t for k, t in state.items() if k != "ln.weight"}), 'Missing .*"ln.weight"'),
        "unknown": (with_changes(original, extra=small), 'Unexpected .*"extra"'),
        "NaN": (with_changes(original, ln__weight=lambda t: t * math.nan), "'ln.weight' has values .* not finite"),
        "infinite": (
            with_changes(original, ln__bias=lambda t: t - math.inf),
            "'ln.bias' has values .* not finite",
        ),
        "no tensor": (with_changes(original, ln__weight="ones"), "not a checkpoint of this model .*ln.weight"),
    }


def test_damaged_and_foreign_checkpoints(folder, capsys, original, whole):
    marker = folder / "code ran"
    for kind, (content, words) in damaged_checkpoints(original, whole, marker).items():
        (folder / "model.pt").write_bytes(content)
        assert generate_from(folder) == 2, kind
        error = capsys.readouterr().err
        assert error.startswith(f"error: {folder / 'model.pt'}: ") and error.count("\n") == 1, error
        assert re.search(words, error), f"{kind}: expected {words!r} in: {error}"
        assert not marker.exists(), f"{kind}: code from the file ran"
        assert not (folder / "generation.jsonl").exists()


def test_the_bomb_would_have_gone_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker"))).close()
    assert (tmp_path / "marker").exists()


def test_configuration_far_larger_than_its_checkpoint(folder, capsys, whole):
    (folder / "model.pt").write_bytes(whole)
    for change in ({"n_layer": 10**8}, {"n_embd": 10**6}, {"n_positions": 10**9}):
        values = yaml.safe_load((folder / "config.yaml").read_text())
        values["model_config"] = {**vars(SHAPE), **change}
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        assert generate_from(folder) == 2
        assert "but the configuration needs" in capsys.readouterr().err


# --- checkpoints that load -------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_stripped(tmp_path, original, prefix):
    path = tmp_path / "model.pt"
    path.write_bytes(to_bytes({prefix + key: tensor for key, tensor in original.state_dict().items()}))
    assert loads_as_the_original(path, original)


def test_missing_scale_factor_is_rebuilt(tmp_path, original):
    path = tmp_path / "model.pt"
    state = {key: tensor for key, tensor in original.state_dict().items() if "scale_factor" not in key}
    path.write_bytes(to_bytes(state))
    assert loads_as_the_original(path, original)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load(tmp_path, original, dtype):
    path = tmp_path / "model.pt"
    other = copy.deepcopy(original).to(dtype)
    path.write_bytes(to_bytes(other.state_dict()))
    model = DecoderLM(V, **vars(SHAPE))
    load_weights(model, path, SHAPE)
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, other.state_dict()[key].float())


def test_scale_factor_is_never_that_of_half_precision(tmp_path):
    """1 / sqrt(7) has no exact bfloat16, and every attention score is multiplied by it."""
    shape = ModelConfig(n_embd=14, n_head=2, n_positions=5, n_layer=1)
    model = DecoderLM(V, **vars(shape))
    (tmp_path / "model.pt").write_bytes(to_bytes(copy.deepcopy(model).bfloat16().state_dict()))
    load_weights(model, tmp_path / "model.pt", shape)
    assert model.blocks[0].mha.scale_factor.item() == pytest.approx(7**-0.5, rel=1e-7)


# --- training states -------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(tmp_path, monkeypatch, capsys):
    """A run with a training_state.pt after step 2, and the values in it."""
    tiny = TinyRun(tmp_path)
    with monkeypatch.context() as patch:
        at_batches(patch, {3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        assert tiny.main() == 143
    capsys.readouterr()
    return tiny, torch.load(tiny.state, weights_only=True)


def test_damaged_and_foreign_training_states(interrupted, capsys):
    tiny, values = interrupted
    marker = tiny.out / "code ran"
    good = tiny.state.read_bytes()

    def changed(*keys, to):
        copied = copy.deepcopy(values)
        inner = copied
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        return to_bytes(copied)

    contents = {
        "truncated": good[:-1000],
        "empty": b"",
        "a model.pt": to_bytes(values["model"]),
        "bomb": changed("bomb", to=Bomb(marker)),
        "bare bomb": pickle.dumps(Bomb(marker)),
        "no progress": changed("progress", to={}),
        "step beyond the end": changed("progress", "next_step", to=10**9),
        "no optimizer": changed("optimizer", to={}),
        "too large": changed("more", to=torch.zeros(1 << 25)),
    }
    for kind, content in contents.items():
        tiny.state.write_bytes(content)
        assert tiny.main() == 2, kind
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 1000, f"{kind}: {error}"
        assert "training_state.pt" in error and "--fresh" in error, f"{kind}: {error}"
        assert not marker.exists(), f"{kind}: code from the file ran"
    tiny.state.write_bytes(good)
    assert tiny.main() == 0


# --- random damage ---------------------------------------------------------------------------------------


def flip_bits(path, whole, original, times: int, draw: random.Random) -> int:
    """Flip one bit at random offsets, a file for each; return how many files still loaded."""
    harmless = 0
    for _ in range(times):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        harmless += loads_as_the_original(path, original)
    return harmless


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The content with a few bytes changed, inserted, removed, repeated or swapped for hostile ones."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        at, length = draw.randrange(len(content) + 1), draw.choice([1, 1, 1, 2, 9, 300])
        piece = content[at : at + length]
        content[at : at + draw.choice([0, length])] = draw.choice(
            [b"", bytes(piece[::-1]), draw.randbytes(length), draw.randbytes(1), piece * 2, draw.choice(HOSTILE)]
        )
    return bytes(content[: draw.choice([len(content)] * 19 + [draw.randrange(len(content) + 1)])])


def mutated_archive(content: bytes, draw: random.Random) -> bytes:
    """Damage anywhere in a zip file, or inside an entry (most often the first) with a checksum that fits."""
    if draw.random() < 0.3:
        return mutated(content, draw)
    entries = entries_of(content)
    at = draw.choice([0, 0, 0, draw.randrange(len(entries))])
    entries[at] = (entries[at][0], mutated(entries[at][1], draw))
    return zipped(entries)


HOSTILE = [
    b"\0",
    b": ",
    b"\n",
    b"- ",
    b"{",
    b"[",
    b"&a",
    b"*a",
    b"!!int ",
    b"!!python/object:os.system ",
    b"<<: ",
    b"'",
    b"-",
    b".",
    b"e9",
    b"nan",
    b".inf",
    b"\xff\xfe",
    b"\t",
    b"? ",
    b"# ",
    b"99999999",
    b"PK\x03\x04",
]


def one_line_or_success(status: int, captured) -> bool:
    assert status in (0, 2), f"exit status {status}: {captured.err}"
    assert "Traceback" not in captured.err
    if status == 2:
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return status == 0


def try_mutated_yaml(tmp_path, capsys, times: int, draw: random.Random) -> int:
    """Run `train.py --dry-run` with mutated YAML; return how many succeeded."""
    tiny, successes = TinyRun(tmp_path), 0
    good = tiny.config.read_bytes()
    usual = load_config(str(tiny.config))
    for _ in range(times):
        tiny.config.write_bytes(mutated(good, draw))
        try:
            config = load_config(str(tiny.config))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            # A larger run is valid, but takes too long for a test.
            sizes = [
                (c.batch_size * c.seq_len * c.grad_accumulation_steps, *vars(c.model_config).values())
                for c in (config, usual)
            ]
            if any(size > 20 * normal for size, normal in zip(*sizes, strict=True)):
                successes += 1
                continue
        successes += one_line_or_success(tiny.main("--dry-run"), capsys.readouterr())
    return successes


def try_mutated_npz(tmp_path, capsys, times: int, draw: random.Random) -> int:
    """Run `train.py --dry-run` with mutated token files; return how many succeeded."""
    tiny, successes = TinyRun(tmp_path), 0
    good = tiny.tokens.read_bytes()
    for _ in range(times):
        tiny.tokens.write_bytes(mutated_archive(good, draw))
        successes += one_line_or_success(tiny.main("--dry-run"), capsys.readouterr())
    return successes


def try_mutated_checkpoints(folder, capsys, whole, times: int, draw: random.Random) -> int:
    """Run `generate.py` on mutated checkpoints, most with valid checksums; return how many succeeded."""
    successes = 0
    for _ in range(times):
        (folder / "model.pt").write_bytes(mutated_archive(whole, draw))
        successes += one_line_or_success(generate_from(folder), capsys.readouterr())
    return successes


def test_flipped_bits(tmp_path, whole, original):
    flip_bits(tmp_path / "model.pt", whole, original, 12, random.Random(1))


def test_flipped_bit_in_a_tensor_is_noticed(tmp_path, whole, original):
    damaged = bytearray(whole)
    at = whole.find(original.token_embeddings.weight.detach().numpy().tobytes()[4000:4016])
    damaged[at] ^= 1
    (tmp_path / "model.pt").write_bytes(damaged)
    other = torch.load(tmp_path / "model.pt", weights_only=True)["token_embeddings.weight"]
    assert not torch.equal(other, original.token_embeddings.weight), "torch.load itself does not notice"
    assert not loads_as_the_original(tmp_path / "model.pt", original)


def test_mutated_yaml(tmp_path, capsys):
    try_mutated_yaml(tmp_path, capsys, 30, random.Random(1))


def test_mutated_npz(tmp_path, capsys):
    try_mutated_npz(tmp_path, capsys, 15, random.Random(1))


def test_mutated_checkpoints(folder, capsys, whole):
    try_mutated_checkpoints(folder, capsys, whole, 15, random.Random(1))


@pytest.mark.soak
def test_soak_random_damage(folder, tmp_path, capsys, whole, original):
    draw = random.Random(11)
    counts = {
        "bit flips": flip_bits(tmp_path / "model.pt", whole, original, 100, draw),
        "mutated YAML": try_mutated_yaml(tmp_path, capsys, 200, draw),
        "mutated npz": try_mutated_npz(tmp_path, capsys, 200, draw),
        "mutated checkpoints": try_mutated_checkpoints(folder, capsys, whole, 200, draw),
    }
    with capsys.disabled():
        print(f"\nharmless of 100 bit flips, 200 YAML, 200 npz, 200 checkpoints: {counts}")


# --- YAML ------------------------------------------------------------------------------------------------


BILLION = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    "text",
    [
        "max_lr: !!python/object/apply:os.system ['touch code_ran']\n",
        "max_lr: !!int ''\n",
        "max_lr: !!bool perhaps\n",
        "max_lr: !!timestamp soon\n",
        "max_lr: !!map 5\n",
        "max_lr: !!binary '*'\n",
        "? [a, b]\n: 5\n",
        "max_lr: &loop [*loop]\n",
        "max_lr: " + "[" * 1500 + "\n",
        "max_lr: " + "9" * 5000 + "\n",
        BILLION,
        BILLION.replace("a59:", "max_lr:"),
        BILLION.replace("a59:", "output_dir:"),
        BILLION.replace("a59:", "model_config:"),
    ],
    ids=range(14),
)
def test_hostile_yaml(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    tiny = TinyRun(tmp_path)
    lines = tiny.config.read_text().splitlines(keepends=True)
    named = text.partition(":")[0] if text[0] != "a" else re.findall(r"^(max_lr|output_dir):", text, re.M)[-1:]
    keep = [line for line in lines if not line.startswith(tuple(named) if isinstance(named, list) else named)]
    tiny.config.write_text("".join(keep) + text)
    one_line_or_success(status := tiny.main("--dry-run"), captured := capsys.readouterr())
    assert status == 2 and len(captured.err) < 2000
    assert not (tmp_path / "code_ran").exists()
