"""Question 2.6 is graded with `python train.py CONFIG --evaluate model.pt --data test.npz`."""

import math
import re

import numpy as np
import pytest
import torch
from tiny_run import KEYS, TinyRun

import train
from model import DecoderLM

N_TOKENS, SEQ_LEN = 95, KEYS["seq_len"]  # 11 rows of 8, and 7 tokens that no row holds


@pytest.fixture(scope="module")
def graded(tmp_path_factory, randomise):
    """A tiny configuration, a checkpoint of it, a test set, and the loss that a plain computation gives."""
    folder = tmp_path_factory.mktemp("grading")
    model = randomise(DecoderLM(50257, **KEYS["model_config"])).eval()
    torch.save(model.state_dict(), folder / "model.pt")
    tokens = np.random.default_rng(5).integers(0, 50257, N_TOKENS).astype(np.uint16)
    np.savez(folder / "test.npz", train=tokens[:20], val=tokens)
    ids = torch.tensor(tokens[: 11 * SEQ_LEN].astype(np.int64)).view(11, SEQ_LEN)
    with torch.no_grad():
        log_probs = model(ids)[:, :-1].double().log_softmax(-1)
    loss = -log_probs.gather(2, ids[:, 1:, None]).mean().item()
    return TinyRun(folder), folder, loss


@pytest.mark.parametrize("batch_size", [1, 2, 3, 11, 64])  # 11 rows: the last batch is mostly incomplete
def test_loss_perplexity_and_count_for_every_batch_size(graded, capsys, batch_size):
    run, folder, loss = graded
    arguments = ["--evaluate", str(folder / "model.pt"), "--data", str(folder / "test.npz")]
    train.main([str(run.config), *arguments, "--set", f"batch_size={batch_size}"])
    printed = capsys.readouterr().out
    pattern = r"loss ([\d.]+) nats per token, perplexity ([\d.e+]+)\s+over ([\d,]+) predicted tokens"
    found = re.search(pattern, printed)
    assert found, printed
    assert found[3] == "77", "11 rows of 8 tokens have 77 predictions"
    assert float(found[1]) == pytest.approx(loss, abs=1e-4)
    assert float(found[2]) == pytest.approx(math.exp(loss), rel=2e-4)  # five digits are printed
    assert not run.out.exists(), "evaluating must not touch the output folder"


def test_a_test_set_shorter_than_a_row_is_refused(graded, capsys):
    run, folder, _ = graded
    np.savez(folder / "short.npz", train=np.arange(20), val=np.arange(SEQ_LEN - 1))
    assert run.main("--evaluate", str(folder / "model.pt"), "--data", str(folder / "short.npz")) == 2
    assert "short.npz" in capsys.readouterr().err
