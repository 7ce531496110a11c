"""The report: its configurations, the models that it compares with, and that its tables come from its results."""

import re
import sys
from pathlib import Path

import pytest
import torch
from test_configs import flops

import train
from model import DecoderLM
from support.chunked_loss import ChunkedLanguageModelingLoss
from support.config import load_config

REPORT = Path(train.__file__).parent / "report"
CONFIGS = sorted((REPORT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def reproduce():
    """report/reproduce.py as a module."""
    sys.path.insert(0, str(REPORT))
    try:
        import reproduce

        yield reproduce
    finally:
        sys.path.remove(str(REPORT))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_loads_and_names_its_own_folder(path):
    assert load_config(str(path)).output_dir == f"outputs/report/{path.stem}"


def test_settings_of_2_5_have_one_budget():
    settings = [path for path in CONFIGS if path.stem.startswith("2.5-")]
    assert 3 <= len(settings) <= 5, "question 2.5 asks for at most five settings"
    for path in settings:
        assert 0.99 * 5e13 < flops(load_config(str(path))) <= 5e13, path.name


def test_every_question_with_configurations_has_a_table(reproduce):
    questions = {path.stem.partition("-")[0] for path in CONFIGS}
    assert questions <= set(reproduce.tables.DRAW)


def test_draw_gives_the_committed_tables_and_figures(reproduce, tmp_path, monkeypatch):
    copy = tmp_path / "answers.md"
    committed = (REPORT / "answers.md").read_text(encoding="utf-8")
    copy.write_text(re.sub(r"(<!-- begin (\S+) -->\n).*?(?=<!-- end \2 -->)", r"\1", committed, flags=re.DOTALL))
    monkeypatch.setattr(reproduce, "ANSWERS", copy)
    monkeypatch.setattr(sys.modules["figures"], "FIGURES", tmp_path)
    reproduce.main(["all", "--draw"])
    assert copy.read_text(encoding="utf-8") == committed, "run python report/reproduce.py all --draw and commit"
    names = set(re.findall(r"\]\(figures/([^)]+)\)", committed))
    assert names <= {path.name for path in tmp_path.iterdir()}, "a figure of the answers is drawn by nothing"
    assert all((REPORT / "figures" / name).exists() for name in names)


def ours_and(variant) -> tuple:
    """A DecoderLM and one of the models compared with it, both made from seed 0."""
    models, states = [], []
    for model_class in (DecoderLM, variant):
        torch.manual_seed(0)
        models.append(model_class(n_vocab=61, n_embd=12, n_head=3, n_positions=7, n_layer=2, p_dropout=0.0))
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "the two would be trained on different batches"
    return tuple(models)


def test_untied_model_is_untied_and_tied_in_nothing_else(reproduce):
    tied, untied = ours_and(reproduce.UntiedLM)
    n = [sum(parameter.numel() for parameter in model.parameters()) for model in (tied, untied)]
    assert n[1] - n[0] == 61 * 12
    ids = torch.randint(61, (2, 7))
    untied.input_embeddings.weight.data.copy_(tied.token_embeddings.weight)
    torch.testing.assert_close(untied(ids), tied(ids))
    before = untied(ids).detach()
    untied.input_embeddings.weight.data.mul_(2)
    assert not torch.allclose(untied(ids), before), "the input embeddings are not used"

    ChunkedLanguageModelingLoss(untied)(ids).backward()
    unused = sorted(set(range(61)) - set(ids[:, :-1].flatten().tolist()))
    assert unused, "the rows tested below must exist"
    assert not untied.input_embeddings.weight.grad[unused].any(), "the input matrix gets the output's gradient"
    assert untied.token_embeddings.weight.grad[unused].any(dim=1).all(), "the output matrix gets no gradient"


def test_gpt2_of_transformers_is_of_the_same_size_and_sees_the_same_batches(reproduce):
    pytest.importorskip("transformers", reason="transformers is not installed: python -m pip install transformers")
    ours, gpt2 = ours_and(reproduce.GPT2)
    assert sum(p.numel() for p in gpt2.parameters()) == sum(p.numel() for p in ours.parameters())
    assert gpt2.flops_per_token == ours.flops_per_token
    assert gpt2.gpt2.transformer.drop.p == 0.0
    ids = torch.randint(61, (2, 7))
    assert gpt2(ids).shape == (2, 7, 61)
    losses = gpt2.gpt2(ids, labels=ids).loss, ChunkedLanguageModelingLoss(gpt2)(ids)
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, list(gpt2.parameters())) for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)  # float32 sums in another order
