"""The report: the runs are those of the committed configurations, and the answers say what was measured."""

import dataclasses
import json
import re
from pathlib import Path

import answers
import experiments
import numpy as np
import pytest
import torch

import train
from data import build
from model import DecoderLM
from support.config import load_config

REPORT = Path(experiments.__file__).parent
ANSWERS = (REPORT / "answers.tex").read_text(encoding="utf-8")
RUNS = [run for runs in experiments.RUNS.values() for run in runs]
RUN_AGAIN = "run python report/answers.py and commit"


def config_of(name: str) -> dict:
    """The keys of report/configs/NAME.yaml, with defaults."""
    return dataclasses.asdict(load_config(str(REPORT / f"configs/{name}.yaml")))


def different_keys(one: dict, other: dict) -> set[str]:
    return {key for key in one if one[key] != other[key]} - {"output_dir", "device", "data"}


@pytest.mark.parametrize("setting, seed", RUNS, ids=lambda value: str(value))
def test_result_is_of_the_committed_configuration(setting, seed):
    measured = answers.result(experiments.run_name(setting, seed))
    config = config_of(setting)
    assert config["output_dir"] == f"outputs/report/{setting}"
    assert not different_keys({**config, "seed": seed}, {**config, **measured["config"]})
    with torch.device("meta"):
        model = DecoderLM(50257, **config["model_config"])
    sizes = (config[key] for key in ("num_training_steps", "grad_accumulation_steps", "batch_size", "seq_len"))
    assert measured["flops"] == train.training_flops(model, *sizes)
    assert measured["flops"] <= {"2.5": 1e15, "2.2": 1e15, "2.6": 1e17}.get(setting[:3], 1e18)


def test_compared_runs_differ_only_in_what_is_compared():
    tiny = dataclasses.asdict(load_config(str(REPORT.parent / "configs/GPT-tiny.yaml")))
    for setting, _ in experiments.RUNS["2.3"]:
        assert different_keys(config_of(setting), tiny) <= {"num_training_steps"}
    assert different_keys(config_of("2.2-constant"), config_of("2.2-cosine")) == {"min_lr"}
    assert config_of("2.6-final")["model_config"] == config_of("2.5-d128-lr4e-3")["model_config"]
    settings = {setting: config_of(setting) for setting, _ in experiments.RUNS["2.5"]}
    assert len(settings) == 5, "2.5 asks for at most five settings"
    others = {key for config in settings.values() for key in different_keys(config, settings["2.5-d128-lr4e-3"])}
    assert others == {"max_lr", "min_lr", "model_config", "num_training_steps"}


def test_what_is_trained_is_measured(tmp_path, monkeypatch, capsys):
    tokens = np.random.default_rng(0).integers(50257, size=400).astype(np.uint16)
    np.savez(tmp_path / "tokens.npz", train=tokens, val=tokens)
    (tmp_path / "report/configs").mkdir(parents=True)
    (tmp_path / "report/configs/2.6-final.yaml").write_text(
        f"output_dir: {tmp_path}/2.6-final\ntokenizer_encoding: gpt2\ndevice: cpu\ndata: {tmp_path}/tokens.npz\n"
        "model_config: {n_embd: 2, n_head: 1, n_positions: 8, n_layer: 1}\nbatch_size: 2\nseq_len: 8\n"
        "num_warmup_steps: 1\nnum_training_steps: 3\ngrad_accumulation_steps: 1\nmin_lr: 1e-4\nmax_lr: 1e-3\n"
    )
    for name, path in {"ROOT": tmp_path, "OUTPUTS": tmp_path, "RESULTS": tmp_path}.items():
        monkeypatch.setattr(experiments, name, path)
    monkeypatch.setattr(experiments, "held_out", lambda: {"c4": tokens})
    for _ in range(2):  # the second time it is finished, and only measured
        experiments.run_question("2.6")
        measured = json.loads((tmp_path / "2.6-final.json").read_text())
        assert 10 < measured["losses"]["c4"] < 12
        assert len((tmp_path / "2.6-final.csv").read_text().splitlines()) == 1 + 3
        (tmp_path / "2.6-final.json").unlink()


def test_mixture_repeats_its_sources_and_has_nothing_held_out(tmp_path, monkeypatch, capsys):
    passage = " ".join(f"p{i}" for i in range(20))
    lines = (json.dumps({"text": text}) + "\n" for text in ("So: " + passage.title(), "own"))
    (tmp_path / "web.jsonl").write_text("".join(lines))
    np.savez(tmp_path / "sample.npz", **{split: build.encode([split])[0] for split in ("train", "val")})
    np.savez(tmp_path / "heldout-wikipedia.npz", val=build.encode([passage.replace(" ", ", ")])[0])
    monkeypatch.setattr(build, "DATA", tmp_path)
    build.main(f"{tmp_path}/mixture", "sample:3", f"{tmp_path}/web.jsonl:2")
    assert "2 documents, 1 left out" in capsys.readouterr().out
    documents = build.decode_documents(np.load(tmp_path / "mixture/train.npy"))
    assert sorted(documents) == ["own"] * 2 + ["train"] * 3
    assert build.decode_documents(np.load(tmp_path / "mixture/val.npy")) == ["val"]


GIVEN = {  # numbers in the sentences that no run gives: of settings, of the figures in the handout, of papers
    "2.2": {"0.008", "2006"},
    "2.3": {"2,000", "16,000", "100,000", "128,000", "0.03", "1.5"},
    "2.4": {"7.9", "9.5", "300", "1,000", "180", "128", "200", "500", "100"},
    "2.5": {"0.1", "0.004", "0.008", "0.002", "128", "256", "73.3"},
    "2.6": {"0.004", "13,000", "128", "256", "100"},
    "3.2": {"0.7", "1.5", "100"},
    "3.5": {"0.5", "1,000"},
    "3.6": {"0.5", "53.1"},
}


@pytest.mark.parametrize("question", [*answers.QUESTIONS, "3.6"])
def test_numbers_in_the_sentences_are_those_of_the_results(question, tmp_path, monkeypatch):
    """Every number of a sentence with a decimal point, a comma or three digits, rounded as it is written."""
    monkeypatch.setattr(answers, "GENERATED", tmp_path)
    numbers = list(answers.QUESTIONS.get(question, answers.sentiment)().values())
    for path in tmp_path.glob("*.tex"):
        table = path.read_text()
        assert table == (REPORT / "generated" / path.name).read_text(), RUN_AGAIN
        numbers += [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", table)]
    text = ANSWERS.partition(rf"\question{{{question}}}")[2].partition(r"\question{")[0]
    text = text.partition(r"\answer")[2].partition(r"\section*{Sources}")[0]
    other = r"\\(generated\w*|input|verbatiminput|texttt)\{[^}]*\}|questions? \d\.\d|\$[^$]*\$|(?<!\\)%.*"
    for typed in re.findall(r"\d[\d,]*(?:\.\d+)?", re.sub(other, "", text)):
        typed = typed.rstrip(",")
        if not re.search(r"[.,]|\d{3}", typed) or typed in GIVEN.get(question, ()):
            continue
        digits = len(typed.partition(".")[2])
        shown = {f"{abs(value) * scale:.{digits}f}" for value in numbers for scale in (1, 100)}
        assert typed.replace(",", "") in shown, f"question {question}: {typed} is not among the results"


def test_all_questions_of_the_template_are_answered():
    template = (REPORT / "template.tex").read_text(encoding="utf-8")
    questions = [re.findall(r"\\question\{.*?\}\{.*?\}\{.*", text) for text in (template, ANSWERS)]
    assert questions[0] == questions[1] and len(questions[0]) == 11
    assert r"\answer{0mm}{}" not in ANSWERS


def test_pdf_is_made_from_the_committed_sources():
    assert f"sources {answers.sources_digest()}".encode() in (REPORT / "answers.pdf").read_bytes(), RUN_AGAIN


def test_generated_text_is_described_and_escaped_for_tex():
    assert experiments.distinct_trigrams([1, 2, 3, 1, 2, 3, 1, 2, 3, 1]) == 3 / 8
    assert answers.tex(" 50% of {A_1}\n\\\u2028x ") == r"50\% of \{A\_1\} / \textbackslash{}?x"
