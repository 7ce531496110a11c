"""Question 2.6 is graded with `python train.py CONFIG --evaluate model.pt --data test.npz`."""

import json
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import KEYS, ROOT, TinyRun

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


@pytest.mark.soak
def test_the_commands_of_the_guide_grade_a_zip_file(graded, tmp_path):
    run, folder, loss = graded
    for name in ("tests", "train.py"):  # what the commands call in the package's folder
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "test.npz").symlink_to(folder / "test.npz")
    with zipfile.ZipFile(tmp_path / "ada.zip", "w") as archive:
        for name in ("model.py", "train.py", "generate.py", "classify.py"):
            archive.write(ROOT / name, name)
        archive.write(folder / "model.pt", "model.pt")
        archive.write(run.config, "config.yaml")
    (commands,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "grading.md").read_text(), flags=re.DOTALL)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    bash = subprocess.run(
        ["bash", "-ec", commands], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert bash.returncode == 0, bash.stdout + bash.stderr
    assert json.loads((tmp_path / "graded" / "results.json").read_text())["score"] == 65
    assert f"loss {loss:.4f} nats per token" in bash.stdout, bash.stdout
