"""The three commands end to end on a tiny model, the shipped files, and every mistake in their input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import classify
import generate
import train
from model import DecoderLM
from support import plan
from support.config import dump_config, load_config
from support.paths import DATA

ROOT = Path(train.__file__).resolve().parent
COURSE_YAML = """\
output_dir: outputs/course
tokenizer_encoding: gpt2
model_config: {n_embd: 8, n_head: 2, n_positions: 64, n_layer: 1}
device: auto
batch_size: 4
seq_len: 32
num_warmup_steps: 1
num_training_steps: 3
grad_accumulation_steps: 1
min_lr: 1e-4
max_lr: 5e-4
"""


def status(command, *arguments) -> int:
    """The exit status of `python command.py arguments`, run in this process."""
    try:
        command.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A folder in which the course's YAML has been trained, word for word, on a small token file."""
    folder = tmp_path_factory.mktemp("run")
    draw = np.random.default_rng(0)
    splits = {name: draw.integers(0, 50257, n).astype(np.uint16) for name, n in (("train", 900), ("val", 300))}
    np.savez(folder / "tokens.npz", **splits)
    (folder / "course.yaml").write_text(COURSE_YAML)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert status(train, "course.yaml", "--data", "tokens.npz") == 0
    return folder


@pytest.fixture
def inside(run_folder, monkeypatch):
    """The same folder as the current one; the speed of the machine was measured in the run already."""
    monkeypatch.chdir(run_folder)
    monkeypatch.setattr(plan, "matrix_product_rate", lambda hardware: 1e12)
    return run_folder


# --- the whole round ---------------------------------------------------------------------------------


def test_a_run_writes_what_the_readme_lists(inside):
    out = inside / "outputs/course"
    for name in ("config.yaml", "metrics.csv", "model.pt", "eval.json", "curve.png", "run.json"):
        assert (out / name).stat().st_size > 0, f"{name} is missing or empty"
    header, *rows = (out / "metrics.csv").read_text().splitlines()
    assert header == "step,tokens,flops,loss,train-loss,learning-rate"
    assert [row.split(",")[:2] for row in rows] == [["0", "128"], ["1", "256"], ["2", "384"]]
    evaluation = json.loads((out / "eval.json").read_text())
    # 300 tokens hold 9 rows of 32, each with 31 predictions; an incomplete last batch counts too.
    assert evaluation["tokens-predicted"] == 9 * 31
    assert evaluation["seq_len"] == 32
    assert evaluation["val-perplexity"] == pytest.approx(np.exp(evaluation["val-loss"]))
    assert json.loads((out / "run.json").read_text())["peak-memory-mib"] > 0


def test_model_pt_loads_with_nothing_but_torch(inside):
    state = torch.load("outputs/course/model.pt", weights_only=True)
    config = yaml.safe_load(Path("outputs/course/config.yaml").read_text())
    DecoderLM(50257, **config["model_config"]).load_state_dict(state)


def test_the_resolved_configuration_reads_back(inside):
    config = load_config("outputs/course/config.yaml")
    assert config == load_config("course.yaml", data="tokens.npz")
    assert yaml.safe_load(dump_config(config))["max_lr"] == 5e-4


def test_generate_finds_the_newest_model_and_writes_beside_it(inside, capsys):
    assert status(generate, "--prefixes", ROOT / "prefixs.json", "--max_new_tokens", 4) == 0
    assert "outputs/course/model.pt" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("outputs/course/generation.jsonl").read_text().splitlines()]
    assert [line["prefix"] for line in lines] == json.loads((ROOT / "prefixs.json").read_text())
    assert all(isinstance(line["generation"], str) for line in lines)


def test_a_seed_repeats_its_samples_and_another_one_differs(inside):
    def sample(seed):
        assert status(generate, "--temperature", 1, "--seed", seed, "--num_samples", 2, "--max_new_tokens", 4) == 0
        return Path("outputs/course/generation.jsonl").read_text()

    first = sample(1)
    assert len(first.splitlines()) == 6
    assert sample(1) == first
    assert sample(2) != first


def test_config_names_the_model_of_its_output_dir(inside, capsys):
    assert status(generate, "--config", "course.yaml", "--max_new_tokens", 1) == 0
    assert status(generate, "--config", "outputs/course/config.yaml", "--max_new_tokens", 1) == 0
    assert capsys.readouterr().out.count("outputs/course/model.pt") >= 2


def test_classify_prints_both_accuracies_and_writes_the_chosen_predictions(inside, capsys):
    assert status(classify, "outputs/course/model.pt", "--limit", 30) == 0
    out = capsys.readouterr().out
    assert "NOT Yelp" in out, "offline, the bundled reviews stand in and the screen must say so"
    assert "accuracy without calibration" in out
    assert "accuracy with calibration" in out
    plain = json.loads(Path("outputs/course/classification.json").read_text())
    assert Path("outputs/course/classification.png").stat().st_size > 0
    assert status(classify, "outputs/course/model.pt", "--limit", 30, "--calibrate") == 0
    calibrated = json.loads(Path("outputs/course/classification.json").read_text())
    p, boundary = calibrated["p-positive"], calibrated["boundary"]["with calibration"]
    assert plain["predictions"]["label"] == [int(x > 0.5) for x in p]
    assert calibrated["predictions"]["label"] == [int(x > boundary) for x in p]
    truth = np.array(calibrated["true-label"])
    accuracy = float((np.array(calibrated["predictions"]["label"]) == truth).mean())
    assert calibrated["accuracy"]["with calibration"] == pytest.approx(accuracy)
    assert calibrated["majority-share"] == pytest.approx(max(truth.mean(), 1 - truth.mean()))


def test_classify_scores_in_slices_and_keeps_two_columns(inside, monkeypatch):
    results = inside / "outputs/course/classification.json"
    assert status(classify, "outputs/course/model.pt", "--limit", 30) == 0
    whole = json.loads(results.read_text())
    sizes = []

    def counting_score(model, device, tokenizer, texts, batch_size):
        sizes.append(len(texts))
        return score(model, device, tokenizer, texts, batch_size)

    score = classify.score
    monkeypatch.setattr(classify, "score", counting_score)
    monkeypatch.setattr(classify, "TEXTS_PER_SLICE", 12)
    assert status(classify, "outputs/course/model.pt", "--limit", 30) == 0
    assert sizes == [12, 12, 6]
    sliced = json.loads(results.read_text())
    assert sliced["p-positive"] == pytest.approx(whole["p-positive"], abs=1e-6)  # other batches, other rounding


def test_evaluate_is_the_same_for_every_batch_size_and_writes_nothing(inside, capsys):
    before = sorted(path.name for path in inside.rglob("*"))
    losses = []
    for batch_size in (1, 2, 7, 64):
        arguments = ("course.yaml", "--data", "tokens.npz", "--evaluate", "outputs/course/model.pt")
        assert status(train, *arguments, "--set", f"batch_size={batch_size}") == 0
        losses.append(next(line for line in capsys.readouterr().out.splitlines() if "validation loss" in line))
    assert len(set(losses)) == 1, losses
    assert sorted(path.name for path in inside.rglob("*")) == before


def test_dry_run_says_what_it_would_take_and_writes_nothing(inside, capsys):
    before = sorted(path.name for path in inside.rglob("*"))
    assert status(train, "course.yaml", "--data", "tokens.npz", "--dry-run", "--set", "output_dir=new") == 0
    out = capsys.readouterr().out
    for fact in ("10.825 nats", "FLOPs", "parameters", "model.pt", "tokens/s", "the whole run would take"):
        assert fact in out, f"the dry run does not say '{fact}'"
    assert sorted(path.name for path in inside.rglob("*")) == before


def test_set_overrides_any_key_and_the_run_repeats_exactly(inside):
    keys = ("--set", "model_config.n_embd=4", "output_dir=outputs/a", "num_training_steps=2", "seed=3")
    assert status(train, "course.yaml", "--data", "tokens.npz", *keys) == 0
    again = [key.replace("outputs/a", "outputs/b") for key in keys]
    assert status(train, "course.yaml", "--data", "tokens.npz", *again) == 0
    for name in ("model.pt", "metrics.csv", "eval.json"):
        assert Path("outputs/a", name).read_bytes() == Path("outputs/b", name).read_bytes(), name
    assert torch.load("outputs/a/model.pt")["ln.weight"].shape == (4,)
    shutil.rmtree("outputs/a")
    shutil.rmtree("outputs/b")


def test_commands_work_from_another_folder(tmp_path, run_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status(generate, "--checkpoint", run_folder / "outputs/course/model.pt", "--max_new_tokens", 1) == 0


# --- shipped files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path):
    config = load_config(str(path))
    assert Path(config.output_dir).name == path.stem, "output_dir should carry the configuration's name"
    DecoderLM(50257, **vars(config.model_config))


def test_gpt_tiny_has_the_course_values():
    config = load_config(str(ROOT / "configs/GPT-tiny.yaml"))
    model = config.model_config
    assert (model.n_embd, model.n_head, model.n_positions, model.n_layer) == (32, 2, 128, 2)
    assert (config.batch_size, config.seq_len, config.grad_accumulation_steps) == (32, 128, 1)
    assert (config.num_warmup_steps, config.num_training_steps) == (10, 2000)
    assert (config.min_lr, config.max_lr) == (1e-4, 5e-4)


def test_the_header_note_names_the_sample_when_it_stands_in(inside, capsys):
    if (DATA / "tokens.npz").exists():
        pytest.skip("data/tokens.npz is there, so the sample does not stand in")
    assert status(train, "course.yaml", "--dry-run") == 0
    assert "with a margin" in " ".join(capsys.readouterr().out.split())


# --- bad input: one sentence on stderr, exit status 2, nothing written -----------------------------------


def edit(old: str, new: str) -> str:
    assert old in COURSE_YAML
    return COURSE_YAML.replace(old, new)


BAD_YAML = {
    "empty": ("", ["empty"]),
    "a list": ("- 1\n- 2\n", ["list"]),
    "syntax": (edit("batch_size: 4", "batch_size: [4"), ["line"]),
    "missing key": (edit("batch_size: 4\n", ""), ["batch_size", "missing"]),
    "unknown key": (edit("batch_size", "batchsize"), ["batchsize", "batch_size"]),
    "unknown model key": (edit("n_layer", "n_layers"), ["model_config.n_layers", "n_layer"]),
    "duplicate key": (COURSE_YAML + "batch_size: 5\n", ["duplicate key 'batch_size'", "line"]),
    "mistyped": (edit("batch_size: 4", "batch_size: four"), ["batch_size", "four"]),
    "fraction": (edit("batch_size: 4", "batch_size: 4.5"), ["batch_size", "4.5"]),
    "bool": (edit("batch_size: 4", "batch_size: true"), ["batch_size", "True"]),
    "model_config no mapping": (
        edit("{n_embd: 8, n_head: 2, n_positions: 64, n_layer: 1}", "7"),
        ["model_config", "7"],
    ),
    "heads": (edit("n_head: 2", "n_head: 3"), ["n_embd", "8", "n_head", "3"]),
    "seq_len long": (edit("seq_len: 32", "seq_len: 65"), ["seq_len", "65", "n_positions", "64"]),
    "seq_len short": (edit("seq_len: 32", "seq_len: 1"), ["seq_len", "1"]),
    "zero size": (edit("n_layer: 1", "n_layer: 0"), ["n_layer", "0"]),
    "negative": (edit("num_training_steps: 3", "num_training_steps: -3"), ["num_training_steps", "-3"]),
    "warm-up": (edit("num_warmup_steps: 1", "num_warmup_steps: 4"), ["num_warmup_steps", "num_training_steps"]),
    "rates swapped": (edit("min_lr: 1e-4", "min_lr: 1e-2"), ["min_lr", "max_lr"]),
    "negative rate": (edit("min_lr: 1e-4", "min_lr: -1e-4"), ["min_lr"]),
    "nan rate": (edit("max_lr: 5e-4", "max_lr: .nan"), ["max_lr", "nan"]),
    "tokenizer": (edit("gpt2", "gpt3"), ["gpt3", "gpt2"]),
    "device": (edit("device: auto", "device: gpu"), ["device", "gpu"]),
    "no data": (COURSE_YAML + "data: nowhere.npz\n", ["nowhere.npz"]),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml(name, tmp_path, monkeypatch, capsys):
    text, words = BAD_YAML[name]
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text)
    assert status(train, "bad.yaml") == 2
    if name not in ("tokenizer", "device", "no data"):  # whose messages name the key alone
        words = ["bad.yaml", *words]
    assert_one_sentence(capsys, words)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"], "nothing may be written"


def assert_one_sentence(capsys, words) -> None:
    """stderr holds one line that starts with `error:` and names these words."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, f"expected one line, got: {lines}"
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], f"'{word}' is not named in: {lines[0]}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here, so asking for one is right")
def test_cuda_asked_for_where_there_is_none(inside, capsys):
    assert status(train, "course.yaml", "--set", "device=cuda") == 2
    assert_one_sentence(capsys, ["cuda"])


BAD_ARGUMENTS = {
    "no yaml": (train, ["nowhere.yaml"], ["nowhere.yaml"]),
    "a folder for yaml": (train, ["outputs"], ["outputs"]),
    "set without =": (train, ["course.yaml", "--set", "max_lr"], ["max_lr", "key=value"]),
    "set unknown": (train, ["course.yaml", "--set", "lr=1"], ["lr"]),
    "set unknown, then known": (train, ["course.yaml", "--set", "lr=1", "--set", "seed=2"], ["lr"]),
    "short corpus": (
        train,
        ["course.yaml", "--data", "tokens.npz", "--set", "seq_len=301", "model_config.n_positions=400"],
        ["tokens.npz", "val", "300", "301"],
    ),
    "evaluate nothing": (train, ["course.yaml", "--evaluate", "nowhere.pt"], ["nowhere.pt"]),
    "evaluate other shapes": (
        train,
        ["course.yaml", "--evaluate", "outputs/course/model.pt", "--set", "model_config.n_embd=16"],
        ["n_embd", "8", "16"],
    ),
    "evaluate other heads": (
        train,
        ["course.yaml", "--evaluate", "outputs/course/model.pt", "--set", "model_config.n_head=4"],
        ["n_head", "2", "4"],
    ),
    "temperature": (generate, ["--temperature", "-1"], ["temperature", "-1"]),
    "temperature nan": (generate, ["--temperature", "nan"], ["temperature", "nan"]),
    "top_p": (generate, ["--top_p", "0"], ["top_p"]),
    "tokens": (generate, ["--max_new_tokens", "0"], ["max_new_tokens"]),
    "seed": (generate, ["--seed", str(2**63)], ["seed", "2^63"]),
    "no config": (generate, ["--checkpoint", "alone/model.pt"], ["alone/model.pt", "config.yaml", "--config"]),
    "no prefixes": (generate, ["--prefixes", "nowhere.json"], ["nowhere.json"]),
    "bad prefix line": (generate, ["--prefixes", "prefixes.jsonl"], ["prefixes.jsonl", "line 2"]),
    "no checkpoint": (generate, ["--checkpoint", "nowhere.pt"], ["nowhere.pt"]),
    "truncated checkpoint": (classify, ["broken/model.pt"], ["broken/model.pt"]),
    "limit": (classify, ["--limit", "0"], ["limit", "0"]),
    "no reviews": (classify, ["--data", "nowhere.csv"], ["nowhere.csv"]),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name, inside, capsys):
    (inside / "prefixes.jsonl").write_text('"good"\n{"text": "bad"}\n')
    (inside / "broken").mkdir(exist_ok=True)
    (inside / "broken/config.yaml").write_text(COURSE_YAML)
    (inside / "broken/model.pt").write_bytes((inside / "outputs/course/model.pt").read_bytes()[:5000])
    (inside / "alone").mkdir(exist_ok=True)
    shutil.copy(inside / "outputs/course/model.pt", inside / "alone")
    before = {path: path.stat().st_mtime_ns for path in inside.rglob("*") if path.is_file()}
    command, arguments, words = BAD_ARGUMENTS[name]
    assert status(command, *arguments) == 2
    assert_one_sentence(capsys, words)
    after = {path: path.stat().st_mtime_ns for path in inside.rglob("*") if path.is_file()}
    assert after == before, "bad input must leave every file as it was"
    (inside / "prefixes.jsonl").unlink()
    shutil.rmtree(inside / "broken")
    shutil.rmtree(inside / "alone")


@pytest.mark.parametrize(
    "text", ['["a\u2028", "b"]', '[{"prefix": "a\u2028"}, "b"]', '{"prefix": "a\u2028"}\r\n"b"\n']
)
def test_prefix_files_of_each_kind(text, inside):
    from support.generation import read_prefixes

    (inside / "p.json").write_text(text, encoding="utf-8", newline="")
    assert read_prefixes(inside / "p.json") == ["a\u2028", "b"], "U+2028 ends a line for str.splitlines alone"
    (inside / "p.json").unlink()
