"""The report: the answers show the numbers of report/results, and the statistics are right."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import reproduce
from test_configs import flops

import train
from support.config import load_config

ROOT = Path(train.__file__).parent
REPORT = ROOT / "report"
CONFIGS = sorted((REPORT / "configs").glob("*.yaml"))
ANSWERS = (REPORT / "answers.tex").read_text(encoding="utf-8")
RUN_AGAIN = "run python report/reproduce.py all --draw && python report/reproduce.py pdf, and commit"


# ---------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_loads_and_names_its_own_folder(path):
    assert load_config(str(path)).output_dir == f"outputs/report/{path.stem}"


def test_settings_of_2_5_and_2_2_have_one_budget():
    settings = [path for path in CONFIGS if path.stem.startswith("2.5-")]
    assert 3 <= len(settings) <= 5, "question 2.5 asks for at most five settings"
    for path in [*settings, *(path for path in CONFIGS if path.stem.startswith("2.2-"))]:
        assert 0.99 * 5e13 < flops(load_config(str(path))) <= 5e13, path.name


def differences(one: str, other: str) -> set[str]:
    """The keys in which two configurations differ, but for where they write and run."""
    first, second = (dataclasses.asdict(load_config(str(ROOT / path))) for path in (one, other))
    return {key for key in first if first[key] != second[key]} - {"output_dir", "device", "data"}


def test_compared_runs_differ_only_in_what_is_compared():
    assert not differences("report/configs/2.3-2000.yaml", "configs/GPT-tiny.yaml")
    assert differences("report/configs/2.3-1000.yaml", "configs/GPT-tiny.yaml") == {"num_training_steps"}
    assert differences("report/configs/2.2-constant.yaml", "report/configs/2.5-d64-l8-lr8e-3.yaml") == {"min_lr"}


@pytest.mark.parametrize("path", sorted((REPORT / "results").glob("2.*.json")), ids=lambda path: path.stem)
def test_result_is_of_the_committed_configuration(path):
    setting, _, seed = path.stem.partition("-seed")
    expected = dataclasses.asdict(load_config(str(REPORT / f"configs/{setting}.yaml")))
    expected |= {"output_dir": f"outputs/report/{path.stem}", "seed": int(seed or 0)}
    measured = json.loads(path.read_text())["config"]
    for key in measured.keys() | expected.keys():  # a key that came later is at its default, None
        assert measured.get(key) == expected.get(key), f"{key}: run python report/reproduce.py QUESTION --fresh"


def test_what_is_trained_is_measured_and_replaces_the_result(tmp_path, monkeypatch, capsys):
    tokens = np.random.default_rng(0).integers(50257, size=400).astype(np.uint16)
    np.savez(tmp_path / "tokens.npz", train=tokens, val=tokens)
    configs, results = tmp_path / "configs", tmp_path / "results"
    configs.mkdir(), results.mkdir()
    (configs / "2.6-final.yaml").write_text(
        f"output_dir: {tmp_path}/2.6-final\ntokenizer_encoding: gpt2\ndevice: cpu\ndata: {tmp_path}/tokens.npz\n"
        "model_config: {n_embd: 2, n_head: 1, n_positions: 8, n_layer: 1}\nbatch_size: 2\nseq_len: 8\n"
        "num_warmup_steps: 1\nnum_training_steps: 3\ngrad_accumulation_steps: 1\nmin_lr: 1e-4\nmax_lr: 1e-3\n"
    )
    for module, name, path in (
        (reproduce.tables, "CONFIGS", configs),
        (reproduce.tables, "RESULTS", results),
        (reproduce, "RESULTS", results),
        (reproduce, "OUTPUTS", tmp_path),
    ):
        monkeypatch.setattr(module, name, path)
    drawn, shipped = [], []
    monkeypatch.setattr(reproduce, "draw_question", drawn.append)
    monkeypatch.setitem(reproduce.downstream.MEASURE, "2.6", lambda: shipped.append("2.6"))
    result = results / "2.6-final.json"

    for fresh in (False, False, True):  # the committed result of another machine, then of the run in outputs
        result.write_text('{"val-loss": 99.0}')
        reproduce.main(["2.6", *["--fresh"] * fresh])
        assert 10 < json.loads(result.read_text())["val-loss"] < 12, "the run was not measured"
        assert len((results / "2.6-final.csv").read_text().splitlines()) == 1 + 3
    assert drawn == shipped == ["2.6"] * 3
    capsys.readouterr()
    result.write_text('{"val-loss": 99.0}')
    reproduce.main(["2.6", "--draw"])
    assert "nothing was trained or measured" in capsys.readouterr().out
    assert json.loads(result.read_text()) == {"val-loss": 99.0} and shipped == ["2.6"] * 3


# ---------------------------------------------------------------------------------------------------
# Text and results
# ---------------------------------------------------------------------------------------------------


def test_draw_gives_the_committed_numbers_tables_and_figures(tmp_path, monkeypatch):
    for folder in ("GENERATED", "FIGURES"):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(reproduce.tables, folder, tmp_path / folder)
    reproduce.main(["all", "--draw"])
    for name, folder in (("generated", "GENERATED"), ("figures", "FIGURES")):
        committed = {path.name for path in (REPORT / name).iterdir()}
        assert {path.name for path in (tmp_path / folder).iterdir()} == committed, RUN_AGAIN
    for path in (tmp_path / "GENERATED").iterdir():
        assert path.read_text() == (REPORT / "generated" / path.name).read_text(), f"{path.name}: {RUN_AGAIN}"


def test_every_result_that_is_shown_exists():
    generated = "".join(path.read_text() for path in sorted((REPORT / "generated").iterdir()))
    defined = set(re.findall(r"^\\setresult\{([^}]+)\}", generated, flags=re.M))
    asked_for = set(re.findall(r"\\ifresult\{([^}#]+)\}", ANSWERS))
    optional = ("2.2-", "2.4-", "2.3-half", "2.3-gain", "2.5-spread")  # shown only inside \ifresult
    shown = set(re.findall(r"\\result(?:table)?\{([^}#]+)\}", ANSWERS))
    assert {name for name in shown - defined - asked_for if not name.startswith(optional)} == set()
    assert len(defined & shown) > 20, "the answers show next to nothing that was measured"


def test_no_measured_number_is_typed_by_hand():
    names = r"\\(if)?result(table|figure)?\{[^}]*\}|\\question\{[^}]*\}|questions? \d\.\d|(?<!\\)%.*"
    text = re.sub(names, "", ANSWERS)
    text = text.partition(r"\begin{document}")[2].partition(r"\section*{Sources}")[0]
    decimals = set(re.findall(r"\d+\.\d+", text))
    given = {"0.5", "53.1", "7.05"}  # of the handout and the course
    levels = {"7.9", "9.5"}  # of the curves of 2.4
    others = {"0.7", "1.5", "12.0", "0.1"}  # temperatures, millions of training tokens, weight decay
    assert decimals <= given | levels | others, r"write \result{NAME} instead"


def test_all_questions_of_the_template_are_answered():
    template = (REPORT / "template.tex").read_text(encoding="utf-8")
    questions = [re.findall(r"\\question\{.*?\}\{.*?\}\{.*", text) for text in (template, ANSWERS)]
    assert questions[0] == questions[1] and len(questions[0]) == 11
    assert r"\answer{0mm}{}" not in ANSWERS


def test_pdf_is_made_from_the_committed_sources():
    pdf = (REPORT / "answers.pdf").read_bytes()
    assert f"sources {reproduce.sources_digest()}".encode() in pdf, RUN_AGAIN


# ---------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------


def test_resamples_keep_the_number_of_each_class():
    labels = np.array([0, 1, 1, 0, 1, 1, 1])
    drawn = reproduce.downstream.resamples(labels)
    assert (labels[drawn].sum(axis=1) == 5).all() and drawn.shape == (reproduce.downstream.N_RESAMPLES, 7)
    assert len(np.unique(drawn, axis=0)) > 100


def test_constant_classifier_has_no_interval_and_a_rule_does_not_differ_from_itself():
    labels = np.repeat([0, 1], 50)
    p = np.linspace(0.6, 0.9, 100)  # all positive at 0.5, perfectly ranked
    drawn = reproduce.downstream.resamples(labels)
    constant = reproduce.downstream.accuracies(p[drawn], labels[drawn], 0.5)
    assert (constant == 0.5).all(), "the resamples are not drawn within each class"
    assert reproduce.downstream.accuracies(p, labels, None) == 1.0
    median = reproduce.downstream.accuracies(p[drawn], labels[drawn], None)
    assert (median == 1.0).all(), "the median is not computed in each resample"


def test_distinct_trigrams():
    assert reproduce.downstream.distinct_trigrams([1, 2, 3, 4, 5]) == 1.0
    assert reproduce.downstream.distinct_trigrams([1, 2, 3, 1, 2, 3, 1, 2, 3, 1]) == 3 / 8


def test_generated_text_is_escaped_for_tex():
    assert reproduce.tables.tex(" 50% of {A_1}\n\\\u2028x ") == r"50\% of \{A\_1\} / \textbackslash{}?x"
