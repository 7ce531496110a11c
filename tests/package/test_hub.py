"""The course's tokens, Yelp's reviews and datasets from a hub on 127.0.0.1, asked by the real clients."""

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hub_server import HubServer
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from tiny_run import ROOT, TinyRun, wait_until

from support import hub as hub_module
from support.corpus import C4, load_corpus
from support.errors import UserError
from support.hub import Unavailable, hub_file
from support.reviews import YELP, load_reviews
from support.tokenizer import get_tokenizer

N_VOCAB = 50257


def token_bytes() -> bytes:
    """A token file of 16 kB."""
    file = io.BytesIO()
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, 8000).astype(np.uint16)
    np.savez(file, train=tokens, val=tokens[:100])
    return file.getvalue()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty folder in place of data/."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(hub_module, "DATA", folder)
    return folder


@pytest.fixture
def hub(monkeypatch, data):
    """A hub with the course's file, which the clients of this process ask."""
    with HubServer() as server:
        server.add(*C4, token_bytes())
        for name, value in (("HF_ENDPOINT", server.url), ("NO_PROXY", "*"), ("HF_HUB_DISABLE_XET", "1")):
            monkeypatch.setenv(name, value)
        # The client of this process has read the environment already.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept when a connection breaks
        close_session()
        yield server
    close_session()


@pytest.fixture
def environment(tmp_path, hub):
    """The environment of a separate process that asks this hub."""
    changed = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **changed}


def names(folder) -> list[str]:
    """What a user sees in the folder."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


# --- the course's tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [None, "c4"])
def test_tokens_are_fetched_once_and_stay(hub, data, capsys, monkeypatch, wanted):
    corpus = load_corpus(wanted, N_VOCAB)
    assert (len(corpus.train), len(corpus.val), corpus.note) == (8000, 100, None)
    assert "C4" in corpus.name
    content = token_bytes()
    assert (data / "tokens.npz").read_bytes() == content
    assert names(data) == ["tokens.npz"]
    shown = capsys.readouterr().out
    assert "Downloading" in shown and "0.0 MB" in shown and "Ctrl-C" in shown and hub.url in shown

    n_requests = len(hub.log)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(load_corpus(wanted, N_VOCAB).train) == 8000
    assert len(hub.log) == n_requests and not capsys.readouterr().out, "a file that is there needs no network"


def test_sample_never_asks_the_hub(hub):
    assert len(load_corpus("sample", N_VOCAB).train) > 1_400_000
    assert len(load_reviews("sample", 10).texts) == 10
    assert hub.log == []


def test_broken_connection_is_taken_up_where_it_broke(hub, data):
    hub.break_after = [5500, 3300]
    assert hub_file(*C4, "tokens.npz").read_bytes() == token_bytes()
    assert hub.downloads() == [None, "bytes=5000-", "bytes=8000-"]
    assert names(data) == ["tokens.npz"]


def dead(hub):
    hub.shutdown()
    hub.server_close()


FAULTS = {
    "404": (lambda hub: setattr(hub, "status", 404), "HTTP 404"),
    "401": (lambda hub: setattr(hub, "status", 401), "HTTP 401"),
    "html page": (lambda hub: setattr(hub, "html", True), "web page"),
    "file is gone": (lambda hub: hub.files.update({C4[0]: {}}), "HTTP 404"),
    "dead server": (dead, "Connection refused"),
    "html page in place of the file": (lambda hub: setattr(hub, "sent_instead", b"<html>"), "should be of size"),
    "503": (lambda hub: setattr(hub, "status", 503), "HTTP 503"),
    "silent server": (lambda hub: setattr(hub, "silent_seconds", 60), "Timeout"),
}
SOAK = {"503", "silent server"}


@pytest.mark.parametrize("fault", [pytest.param(f, marks=[pytest.mark.soak] * (f in SOAK)) for f in FAULTS])
def test_unusable_hub_is_recognised_in_time_and_leaves_nothing(hub, data, fault):
    break_it, reason = FAULTS[fault]
    break_it(hub)
    started = time.monotonic()
    corpus = load_corpus(None, N_VOCAB)
    assert time.monotonic() - started < 10, "the user waits for a hub that is not there"
    assert "sample" in corpus.name and "with a margin" in corpus.note and reason in corpus.note
    assert "\n" not in corpus.note
    with pytest.raises(UserError, match=f"data: c4: .*{reason}.*data: sample"):
        load_corpus("c4", N_VOCAB)
    assert names(data) == [], "part of a file, or the wrong one, is left"


def test_full_disk_while_fetching_is_a_reason_and_no_crash(hub, data, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_module.os, "replace", full)
    with pytest.raises(Unavailable, match="No space left"):
        hub_file(*C4, "tokens.npz")
    assert names(data) == []


def test_two_at_once_download_once(hub, data):
    hub.bytes_per_second = 30_000
    threads = [threading.Thread(target=load_corpus, args=("c4", N_VOCAB)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hub.downloads()) == 1 and names(data) == ["tokens.npz"]


def test_command_says_in_one_line_that_c4_cannot_be_had(hub, data, tmp_path, capsys):
    hub.status = 404
    run = TinyRun(tmp_path / "run", data="c4")
    assert run.main() == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: data: c4") and errors.count("\n") == 1
    assert not run.out.exists(), "something was written for a run without data"


@pytest.mark.soak
def test_ctrl_c_while_a_slow_server_sends_leaves_nothing(hub, environment, tmp_path):
    package = tmp_path / "package"
    for folder in ("support", "data"):
        shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("tokens.npz*", ".*"))
    for file in ("model.py", "train.py", "generate.py"):
        shutil.copy(ROOT / file, package)
    command = [sys.executable, "train.py", TinyRun(tmp_path / "run", data="c4").config, "--dry-run"]
    hub.bytes_per_second = 2_000
    process = subprocess.Popen(
        command,
        cwd=package,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_until(hub.downloads)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert not (package / "data" / "tokens.npz").exists()
    assert [*(package / "data").rglob("*.incomplete")] == [], "part of the file is left"

    hub.bytes_per_second = float("inf")
    subprocess.run(command, cwd=package, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert (package / "data" / "tokens.npz").read_bytes() == token_bytes()


# --- Yelp ---------------------------------------------------------------------------------------------------


@pytest.fixture
def yelp(hub):
    """The hub with Yelp polarity; its texts are escaped as those of the original release."""
    from pyarrow import Table, parquet

    file = io.BytesIO()
    columns = {"text": ['Cold.\\n\\"Never again\\"', "Great", "Fine", "Poor"], "label": [0, 1, 1, 0]}
    parquet.write_table(Table.from_pydict(columns), file)
    hub.add(*YELP, file.getvalue())
    hub.add(YELP[0], "plain_text/train-00000-of-00001.parquet", b"large")
    return hub


@pytest.mark.parametrize("wanted", [None, "yelp"])
def test_yelps_test_split_is_fetched_once_and_alone(yelp, data, monkeypatch, wanted):
    reviews = load_reviews(wanted, 10)
    expected = {('Cold.\n"Never again"', 0), ("Great", 1), ("Fine", 1), ("Poor", 0)}
    assert set(zip(reviews.texts, reviews.labels, strict=True)) == expected
    assert reviews.note is None and "Yelp" in reviews.name
    assert len(yelp.downloads()) == 1 and not any("train-0" in path for _, path, _ in yelp.log)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_reviews(wanted, 10).texts == reviews.texts
    assert names(data) == ["yelp_test.parquet"]


@pytest.mark.parametrize("fault", ["404", "html page", "dead server"])
def test_without_yelp_the_bundled_reviews_stand_in_loudly(yelp, data, monkeypatch, fault):
    monkeypatch.setattr("support.reviews.DATA", ROOT / "data")
    break_it, reason = FAULTS[fault]
    break_it(yelp)
    reviews = load_reviews(None, 2000)
    assert "NOT Yelp" in reviews.note and reason in reviews.note and "Yelp" not in reviews.name
    assert (len(reviews.texts), sum(reviews.labels)) == (1000, 500)
    with pytest.raises(UserError, match=f"--data yelp: .*{reason}"):
        load_reviews("yelp", 10)


def test_foreign_parquet_is_refused(data):
    (data / "yelp_test.parquet").write_bytes(b"PAR1 and then nonsense")
    with pytest.raises(UserError, match=r"yelp_test\.parquet: cannot be read as parquet.*delete it"):
        load_reviews("yelp", 10)


# --- prepare.py hf:NAME -------------------------------------------------------------------------------------


@pytest.fixture
def prepare():
    """data/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*.jsonl
---
"""


@pytest.mark.soak
def test_dataset_is_streamed_as_far_as_needed(hub, environment, tmp_path):
    texts = [f"Page {i} of the web tells of {i} things." for i in range(400)]
    for shard in (0, 1):
        lines = [json.dumps({"text": text, "url": "u"}) + "\n" for text in texts[200 * shard : 200 * shard + 200]]
        hub.add("allenai/c4", f"en/train-{shard}.jsonl", "".join(lines).encode())
    hub.add("allenai/c4", "README.md", CARD.encode())
    options = ["--config", "en", "--tokens", "500", "--val-tokens", "50"]
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), "hf:allenai/c4", "out", *options]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    corpus = load_corpus(str(tmp_path / "out"), N_VOCAB)
    decoded = get_tokenizer().decode([*corpus.val.tolist(), *corpus.train.tolist()]).split("<|endoftext|>")[:-1]
    assert decoded == texts[: len(decoded)], "not the first documents in their order"
    assert 500 <= len(corpus.train) < 515 and 50 <= len(corpus.val) < 65
    assert not any("train-1" in path for method, path, _ in hub.log if method == "GET"), "too much was read"


def test_dataset_that_cannot_be_had_is_refused_in_one_line(prepare, tmp_path, capsys, monkeypatch):
    def run() -> str:
        with pytest.raises(SystemExit) as stop:
            prepare.main(["hf:some/thing", str(tmp_path / "out")])
        assert stop.value.code == 2 and list(tmp_path.iterdir()) == []
        return capsys.readouterr().err

    assert "HF_HUB_OFFLINE is set" in run()

    def broken_stream(*_, **__):
        yield {"text": "a first document"}
        raise ConnectionError("the line\nis dead")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"body": "text", "id": 1}])
    assert "hf:some/thing: no text in a column 'text' (found: body, id)" in run()
    monkeypatch.setattr("datasets.load_dataset", broken_stream)
    errors = run()
    assert "hf:some/thing: cannot be read beyond document 1 (ConnectionError: the line is dead)" in errors
    assert errors.count("\n") == 1
