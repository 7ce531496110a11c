"""Reviews: formats, labels, the choice of those that fit, and the stand-in for Yelp."""

import json
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from support import reviews as reviews_module
from support.errors import UserError
from support.reviews import load_reviews


def pairs(reviews):
    return sorted(zip(reviews.texts, reviews.labels, strict=True))


def load(path, limit=100, **options):
    return load_reviews(str(path), limit, **options)


# --- formats ------------------------------------------------------------------------------------------------


def test_csv_with_header_in_any_order_with_further_columns(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text('\ufeffLabel,stars,Text\n1,5,"Good, ""really""\ngood"\n0,1,C:\\new bad\n\n', encoding="utf-8")
    assert pairs(load(path)) == [("C:\\new bad", 0), ('Good, "really"\ngood', 1)]


def test_csv_of_yelps_original_release(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text('"1","Cold food.\\n\\""Never again\\"""\n"2","Great"\n')
    assert pairs(load(path)) == [('Cold food.\n"Never again"', 0), ("Great", 1)]


def test_jsonl(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"label": 0, "text": "bad"}\n\n{"text": "good", "label": 1, "id": 7}\n')
    assert pairs(load(path)) == [("bad", 0), ("good", 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nfine,1\nbad,2\n", "line 3: the label is '2'.*0 or 1"),
        ("b.csv", "1,poor\n2,fine\n0,odd\n", "line 3: the label is '0'.*1 or 2"),
        ("c.csv", "text,label\nwell, well,1\n", "line 2: 3 fields"),
        ("d.csv", 'text,label\nfine,1\n"open,0\n', "line 3: not csv"),
        ("e.csv", "review,stars\nfine,1\n", "line 1: no header"),
        ("f.csv", "", "line 1: no header"),
        ("g.csv", "text,label\n  ,1\n", "line 2: the text is empty"),
        ("h.jsonl", '{"text": "fine", "label": 1}\n\n{"text": "fine"}\n', "line 3: the label is None"),
        ("i.jsonl", '{"text": "fine", "label": true}\n', "line 1: the label is True"),
        ("j.jsonl", '{"text": "fine", "label": 1}\n{"label": 1}\n', "line 2.*'text'"),
        ("k.parquet", "PAR1", "neither .csv nor .jsonl"),
        ("l.csv", "text,label\n", "none of the 0 reviews"),
    ],
)
def test_bad_file_is_refused_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        load(tmp_path / name)
    assert name in str(refusal.value)


def test_missing_file_and_foreign_encoding_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv"):
        load(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"text,label\ncaf\xe9,1\n")
    with pytest.raises(UserError, match="UTF-8"):
        load(tmp_path / "latin.csv")


# --- choice -------------------------------------------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path):
    path = tmp_path / "numbered.jsonl"
    path.write_text("".join(json.dumps({"text": str(i), "label": i % 2}) + "\n" for i in range(50)))
    return path


def test_limit_counts_reviews_that_fit(numbered):
    chosen = load(numbered, limit=10, fits=lambda text: int(text) >= 30)
    assert len(chosen.texts) == 10, "the limit was applied before the filter"
    assert all(int(text) >= 30 for text in chosen.texts)
    assert [int(text) % 2 for text in chosen.texts] == chosen.labels, "a label left its text"
    assert len(load(numbered, limit=99, fits=lambda text: int(text) >= 30).texts) == 20


def test_order_is_shuffled_and_depends_on_the_seed_alone(numbered):
    texts = load(numbered).texts
    assert texts == load(numbered).texts != load(numbered, seed=43).texts
    assert texts != sorted(texts, key=int)
    assert load(numbered, limit=5).texts == texts[:5]


def test_no_review_that_fits_is_refused(numbered):
    with pytest.raises(UserError, match=r"numbered\.jsonl: none of the 50"):
        load(numbered, fits=lambda text: False)


# --- Yelp and its stand-in ----------------------------------------------------------------------------------


@pytest.fixture
def fake_datasets(monkeypatch):
    """A `datasets` of two reviews that notes how it was asked."""
    module = types.ModuleType("datasets")
    module.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    module.calls = []

    def load_dataset(name, split):
        module.calls.append((name, split, module.config.HF_HUB_OFFLINE))
        return {"text": ["awful", "lovely"], "label": [0, 1]}

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize("answers", [True, False])
def test_yelp_comes_from_the_hub_or_else_from_the_cache(fake_datasets, monkeypatch, answers):
    monkeypatch.setattr(reviews_module, "_hub_answers", lambda: answers)
    reviews = load_reviews(None, 10)
    assert pairs(reviews) == [("awful", 0), ("lovely", 1)]
    assert reviews.note is None and "Yelp" in reviews.name
    assert fake_datasets.calls == [("fancyzhx/yelp_polarity", "test", not answers)]


def test_bundled_sample_stands_in_loudly(fake_datasets, monkeypatch):
    def fail(name, split):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(fake_datasets, "load_dataset", fail)
    monkeypatch.setattr(reviews_module, "_hub_answers", lambda: False)
    monkeypatch.chdir("/")
    reviews = load_reviews(None, 2000)
    assert "NOT Yelp" in reviews.note and "no route to the hub" in reviews.note and "\n" not in reviews.note
    assert "Yelp" not in reviews.name
    assert (len(reviews.texts), sum(reviews.labels), len(set(reviews.texts))) == (1000, 500, 1000)


class _Hub(BaseHTTPRequestHandler):
    status, wait = 200, 0.0

    def do_HEAD(self):
        time.sleep(self.wait)
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args):
        """Quiet."""


@pytest.mark.parametrize("hub", ["answers", "nobody listens", "error 503", "too slow"])
def test_whether_the_hub_answers_is_known_in_time(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(reviews_module, "HUB_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(_Hub, "status", 503 if hub == "error 503" else 200)
    monkeypatch.setattr(_Hub, "wait", 1.0 if hub == "too slow" else 0.0)
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    if hub == "nobody listens":
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    start = time.monotonic()
    assert reviews_module._hub_answers() == (hub == "answers")
    assert time.monotonic() - start < 3
    if hub != "nobody listens":
        server.shutdown()
        server.server_close()
