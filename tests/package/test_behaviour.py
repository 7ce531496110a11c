"""What a second run in a folder does, where a run may start, the loss during training, and how flags are given."""

import csv
import io
import json
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch
from tiny_run import TinyRun, at_batches, leave_out_what_is_slow, wait_until

import classify
import generate
import train
from support import tracking
from support.arguments import ArgumentParser


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    leave_out_what_is_slow(monkeypatch)


@pytest.fixture
def finished(tmp_path):
    tiny = TinyRun(tmp_path)
    assert tiny.main() == 0
    return tiny


def files(tiny: TinyRun) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tiny.out.iterdir()}


# --- a folder that holds a finished run -------------------------------------------------------------------


def test_finished_run_with_another_configuration_is_kept(finished, capsys):
    before = files(finished)
    assert finished.main("--set", "max_lr=0.5", "seed=1") == 2
    error = capsys.readouterr().err
    assert "finished run there has another configuration" in error and "--fresh" in error
    assert "max_lr (0.01 there, 0.5 here)" in error and "seed (0 there, 1 here)" in error
    assert files(finished) == before, "a refusal changes nothing"
    assert finished.main("--fresh", "--set", "max_lr=0.5", "seed=1") == 0
    assert json.loads((finished.out / "eval.json").read_text()) != json.loads(before["eval.json"])


def test_finished_run_with_other_data_is_kept(finished, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", train=np.arange(400, dtype=np.uint16), val=np.arange(90, dtype=np.uint16))
    before = files(finished)
    assert finished.main("--data", str(tmp_path / "other.npz")) == 2
    error = capsys.readouterr().err
    assert "finished run there has other data" in error and "tokens.npz" in error and "other.npz" in error
    assert files(finished) == before
    finished.tokens.rename(tmp_path / "moved.npz")
    assert finished.main("--data", str(tmp_path / "moved.npz")) == 0, "the same tokens under another name"


def test_same_run_again_says_that_it_replaces_the_finished_one(finished, capsys):
    words = f"The finished run in {finished.out} is replaced when this one ends."
    assert words not in capsys.readouterr().out
    before = finished.results()
    assert finished.main() == 0
    assert words in capsys.readouterr().out and finished.results() == before


@pytest.mark.parametrize("run_json", [None, "{}", "[]", "half of"])
def test_run_without_a_fingerprint_is_compared_by_its_configuration(finished, capsys, run_json):
    (finished.out / "run.json").unlink()
    if run_json is not None:
        (finished.out / "run.json").write_text(run_json)
    assert finished.main("--set", "max_lr=0.5") == 2
    assert finished.main() == 0
    assert "is replaced" in capsys.readouterr().out


# --- init -------------------------------------------------------------------------------------------------


def first_loss(tiny: TinyRun) -> float:
    return float(next(csv.DictReader((tiny.out / "metrics.csv").open()))["loss"])


@pytest.mark.parametrize("by", ["flag", "key", "folder"])
def test_init_starts_from_these_weights(finished, tmp_path, capsys, by):
    path = finished.out if by == "folder" else finished.out / "model.pt"
    keys = {"init": str(path)} if by == "key" else {}
    arguments = () if by == "key" else ("--init", str(path))
    further = TinyRun(tmp_path / "further", num_training_steps=2, model_config=NO_DROPOUT, **keys)
    assert further.main(*arguments) == 0
    assert f"init: {path}" in (further.out / "config.yaml").read_text()
    assert str(path) in capsys.readouterr().out
    random_start = TinyRun(tmp_path / "random", num_training_steps=2, model_config=NO_DROPOUT)
    assert random_start.main() == 0
    assert first_loss(further) < first_loss(random_start) - 0.05


NO_DROPOUT = {"n_embd": 8, "n_head": 2, "n_positions": 16, "n_layer": 1, "p_dropout": 0.0}


def test_init_is_compared_and_not_read_again_on_resuming(finished, tmp_path, monkeypatch, capsys):
    start = tmp_path / "start.pt"
    start.write_bytes((finished.out / "model.pt").read_bytes())
    whole = TinyRun(tmp_path / "whole")
    assert whole.main("--init", str(start)) == 0
    tiny = TinyRun(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        at_batches(patch, {5: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        assert tiny.main("--init", str(start)) == 143
    assert tiny.main() == 2
    assert "init" in capsys.readouterr().err
    start.unlink()
    assert tiny.main("--init", str(start)) == 0
    assert tiny.results() == whole.results()


def test_init_that_cannot_be_used(finished, tmp_path, capsys):
    tiny = TinyRun(tmp_path / "new")
    assert tiny.main("--init", str(tmp_path / "nowhere.pt")) == 2
    assert "nowhere.pt: no such checkpoint" in capsys.readouterr().err
    assert tiny.main("--init", str(finished.out), "--set", "model_config.n_embd=16") == 2
    assert "n_embd = 8" in capsys.readouterr().err
    assert tiny.main("--init", "a.pt", "--evaluate", "b.pt") == 2
    assert "not allowed with" in capsys.readouterr().err


# --- the validation loss during training ------------------------------------------------------------------


def validation(tiny: TinyRun, name: str = "validation.csv") -> list[tuple[int, float]]:
    header, *rows = csv.reader((tiny.out / name).open())
    assert header == ["step", "val-loss"]
    return [(int(step), float(loss)) for step, loss in rows]


def test_validation_losses_leave_the_training_unchanged(finished, tmp_path, capsys):
    tiny = TinyRun(tmp_path / "evaluated", eval_interval=2)
    assert tiny.main() == 0
    assert tiny.results() == finished.results(), "training must be bit-identical with and without evaluation"
    losses = validation(tiny)
    assert [step for step, _ in losses] == [1, 3, 5]
    assert losses[-1][1] == json.loads((tiny.out / "eval.json").read_text())["val-loss"]
    assert len({loss for _, loss in losses}) == 3, "each row should be the loss of its own step"
    out = capsys.readouterr().out
    assert f"step 2/6  validation loss {losses[0][1]:.3f}" in out and "validation.csv" in out
    assert not (tiny.out / "validation.partial.csv").exists()


@pytest.mark.parametrize("batch", [3, 7, 9, 11])
def test_validation_losses_of_an_interrupted_run(tmp_path, monkeypatch, batch):
    whole, tiny = (
        TinyRun(tmp_path / name, eval_interval=2, checkpoint_interval=4) for name in ("whole", "stopped")
    )
    assert whole.main() == 0
    with monkeypatch.context() as patch:
        at_batches(patch, {batch: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        assert tiny.main() == 143
    with (tiny.out / "validation.partial.csv").open("a") as file:
        file.write("1")  # a row that a kill cut off
    assert tiny.main() == 0
    assert validation(tiny) == validation(whole) and tiny.results() == whole.results()


@pytest.mark.soak
def test_validation_rows_past_the_resumed_step_are_dropped(tmp_path):
    tiny = TinyRun(tmp_path, num_training_steps=2000, eval_interval=1, checkpoint_interval=5)
    process = tiny.process()
    wait_until(lambda: tiny.rows() > 8 or not process.is_alive())
    process.kill()
    process.join()
    step = torch.load(tiny.state, weights_only=True)["progress"]["next_step"]
    with pytest.MonkeyPatch.context() as patch:
        at_batches(patch, {0: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        assert tiny.main() == 143
    assert [n for n, _ in validation(tiny, "validation.partial.csv")] == list(range(step + 1))


def test_validation_losses_reach_the_curve_and_wandb(tmp_path, monkeypatch):
    monkeypatch.undo()
    from support import plan

    monkeypatch.setattr(plan, "matrix_product_rate", lambda hardware: 1e12)
    monkeypatch.setattr(generate, "generate", lambda *args, **kwargs: [""])
    from matplotlib.axes import Axes

    lines, logged = [], []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, *args, **k: lines.append(list(x)) or plot(self, x, *args, **k)
    )
    monkeypatch.setattr(tracking.wandb, "run", FakeRun())
    monkeypatch.setattr(tracking.wandb, "log", lambda values, step: logged.append((step, values)))
    monkeypatch.setattr(tracking.wandb, "finish", lambda **kwargs: None)
    assert TinyRun(tmp_path, eval_interval=3).main() == 0
    assert [2, 5] in lines, "the curve should have the points of validation.csv"
    assert [step for step, values in logged if "val-loss" in values] == [2, 5]


def test_run_without_an_interval_leaves_no_validation_csv(tmp_path):
    tiny = TinyRun(tmp_path, eval_interval=3)
    assert tiny.main() == 0 and (tiny.out / "validation.csv").exists()
    tiny = TinyRun(tmp_path)
    assert tiny.main("--fresh") == 0 and not (tiny.out / "validation.csv").exists()


def test_eval_interval_without_sense_is_refused(tmp_path, capsys):
    assert TinyRun(tmp_path, eval_interval=0).main() == 2
    assert "eval_interval = 0 must be at least 1" in capsys.readouterr().err


# --- W&B's place ------------------------------------------------------------------------------------------


class FakeRun:
    """An offline W&B run, as far as the package looks at it."""

    id, url, settings = "abc", None, type("Settings", (), {"sync_dir": "wandb/offline-run-1"})

    def __init__(self, url=None):
        self.url, self.offline, self.summary = url, url is None, {}


@pytest.mark.parametrize(
    ("url", "words"),
    [("https://wandb.ai/me/run", "W&B: https://wandb.ai/me/run"), (None, "wandb sync wandb/offline-run-1")],
)
def test_wandb_says_where_the_run_is(monkeypatch, capsys, url, words):
    monkeypatch.setattr(tracking.wandb, "run", FakeRun(url))
    monkeypatch.setattr(tracking.wandb, "finish", lambda **kwargs: None)
    tracking.finish_tracking({"val-loss": 1.0})
    assert words in capsys.readouterr().out


# --- flags and screens ------------------------------------------------------------------------------------


def test_flags_take_hyphens_or_underscores():
    parser = ArgumentParser()
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--top_k")
    parser.add_argument("words", nargs="*")
    for arguments in (["--dry-run", "--top-k=a-b", "c-d"], ["--dry_run", "--top_k", "a-b", "c-d"]):
        args = parser.parse_args(arguments)
        assert (args.dry_run, args.top_k, args.words) == (True, "a-b", ["c-d"])


def test_prompt_in_place_of_a_file(finished, monkeypatch, capsys):
    monkeypatch.setattr(generate, "generate", lambda model, device, tokenizer, prompts, *_, **__: prompts)
    arguments = ["--checkpoint", str(finished.out), "--max-new-tokens", "2"]
    generate.main([*arguments, "--prompt", "Once upon", "The city", "--top_p", "0.9", "--seed", "3"])
    lines = (finished.out / "generation.jsonl").read_text().splitlines()
    assert [json.loads(line)["prefix"] for line in lines] == ["Once upon", "The city"]
    assert "--top_p, --seed: no effect at temperature 0" in capsys.readouterr().out
    generate.main([*arguments, "--prompt", "a", "--top_p", "0.9", "--temperature", "1"])
    assert "no effect" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        generate.main(["--prompt", "a", "--prefixes", "b.json"])


def test_folder_of_a_run_stands_for_its_model(finished, capsys):
    assert finished.main("--evaluate", str(finished.out)) == 0
    out = capsys.readouterr().out
    assert str(finished.out / "model.pt") in out and "validation loss" in out


@pytest.mark.parametrize(
    ("given", "meant"),
    [("n_embd=64", "model_config.n_embd"), ("batchsize=4", "batch_size"), ("max_rl=1", "max_lr")],
)
def test_unknown_key_suggests_where_it_is(tmp_path, capsys, given, meant):
    assert TinyRun(tmp_path).main("--set", given) == 2
    assert f"did you mean '{meant}'?" in capsys.readouterr().err


def test_header_is_printed_before_the_evaluation(finished, monkeypatch, capsys):
    seen = []
    original = train.evaluate

    def watched(model, batches, *args, **kwargs):
        seen.append(capsys.readouterr().out)
        return original(model, batches, *args, **kwargs)

    monkeypatch.setattr(train, "evaluate", watched)
    assert finished.main("--evaluate", str(finished.out / "model.pt")) == 0
    assert "the val split of" in seen[0] and "77 predicted tokens" in seen[0]
    assert finished.main() == 0
    assert seen[1].endswith("evaluating\n")


def test_terminal_shows_the_evaluation_as_a_bar(finished, monkeypatch, capsys):
    bar = io.StringIO()
    bar.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", bar)
    assert finished.main("--evaluate", str(finished.out / "model.pt")) == 0
    assert "evaluating" in bar.getvalue() and "0/6 " in bar.getvalue()  # 90 tokens: 11 rows of 8, 2 at once
    assert finished.main() == 0
    assert bar.getvalue().count("0/6 [") >= 2 and "evaluating\n" not in capsys.readouterr().out


def test_course_budget_is_named_only_where_it_is_meant(tmp_path, capsys):
    assert TinyRun(tmp_path).main("--dry-run") == 0
    assert "the course's" not in capsys.readouterr().out
    steps = str(round(1e15 / 7.75e7))  # FLOPs per step
    assert TinyRun(tmp_path).main("--dry-run", "--set", f"num_training_steps={steps}") == 0
    assert re.search(r"\d% of the course's 1e15\n", capsys.readouterr().out)


def test_classify_says_how_many_reviews_fit(finished, tmp_path, capsys):
    reviews = tmp_path / "reviews.csv"
    reviews.write_text("text,label\nGood.,1\nBad.,0\n" + '"' + "word " * 40 + '",0\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "YELP_TEMPLATE", "{text} is")
        classify.main([str(finished.out), "--data", str(reviews)])
    assert "2 of 3 fit into 16 tokens" in capsys.readouterr().out


def test_memory_that_the_model_exhausts_is_the_models(finished, monkeypatch, capsys):
    def no_memory(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(train, "DecoderLM", no_memory)
        assert finished.main("--evaluate", str(finished.out)) == 1
    assert "the model is too large: 403 k parameters take 0.00161 GB" in capsys.readouterr().err
    monkeypatch.setattr(train, "evaluate", no_memory)
    assert finished.main("--evaluate", str(finished.out)) == 1
    assert "batch_size 2 × seq_len 8 does not fit" in capsys.readouterr().err
