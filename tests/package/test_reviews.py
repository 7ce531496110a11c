"""Reviews: formats, labels, the choice of those that fit, and the stand-in for Yelp."""

import json

import pytest

from support import hub
from support.errors import UserError
from support.reviews import load_reviews


def pairs(reviews):
    return sorted(zip(reviews.texts, reviews.labels, strict=True))


def load(path, limit=100, **options):
    return load_reviews(str(path), limit, **options)


# --- formats ------------------------------------------------------------------------------------------------


def test_csv_with_header_in_any_order_with_further_columns(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text('\ufefflabel,stars,text\n1,5,"Good, ""really""\ngood"\n0,1,C:\\new bad\n\n', encoding="utf-8")
    assert pairs(load(path)) == [("C:\\new bad", 0), ('Good, "really"\ngood', 1)]


def test_jsonl(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"label": 0, "text": "bad"}\n\n{"text": "good", "label": 1, "id": 7}\n')
    assert pairs(load(path)) == [("bad", 0), ("good", 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nfine,1\nbad,2\n", "line 3: the label is 2.*0 or 1"),
        ("b.csv", "1,poor\n2,fine\n", "line 1: the header '1', 'poor' lacks text and label"),
        ("c.csv", "text,label\nwell, well,1\n", "line 2: more fields.*quotes"),
        ("d.csv", 'text,label\nfine,1\n"open,0\n', "line 3: invalid csv"),
        ("e.csv", "review,label\nfine,1\n", "line 1: the header 'review', 'label' lacks text;"),
        ("f.csv", "", "line 1: the header .empty. lacks text and label"),
        ("g.csv", "text,label\n  ,1\n", "line 2: the text is empty"),
        ("h.jsonl", '{"text": "fine", "label": 1}\n\n{"text": "fine"}\n', "line 3: the label is None"),
        ("i.jsonl", '{"text": "fine", "label": true}\n', "line 1: the label is True"),
        ("j.jsonl", '{"text": "fine", "label": 1}\n{"label": 1}\n', "line 2.*'text'"),
        ("k.parquet", "PAR1", "neither .csv nor .jsonl"),
        ("l.csv", "text,label\n", "contains no review"),
        ("m.csv", "label,text\n1\n", "line 2: the text is empty"),
        ("n.csv", "review,stars\nfine,1\n", "line 1: the header 'review', 'stars' lacks text and label"),
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


def test_choice_is_random_by_the_seed_and_keeps_the_order_of_the_file(numbered):
    chosen, again, other = load(numbered, limit=9), load(numbered, limit=9), load(numbered, limit=9, seed=43)
    assert chosen.texts == again.texts != other.texts
    assert chosen.texts == sorted(chosen.texts, key=int) and int(chosen.texts[-1]) > 9
    assert chosen.rows == [int(text) for text in chosen.texts]
    assert set(load(numbered, limit=5).texts) < set(chosen.texts), "a smaller limit chooses other reviews"


def test_no_review_that_fits_is_refused(numbered):
    with pytest.raises(UserError, match=r"numbered\.jsonl: none of the 50"):
        load(numbered, fits=lambda text: False)


# --- Yelp's stand-in (test_hub.py has Yelp itself) ----------------------------------------------------------


def test_bundled_sample_stands_in_loudly(monkeypatch, tmp_path):
    monkeypatch.chdir("/")
    monkeypatch.setattr(hub, "DATA", tmp_path)  # an empty folder, where Yelp was never fetched
    reviews = load_reviews(None, 2000)
    assert "NOT Yelp" in reviews.note and "HF_HUB_OFFLINE" in reviews.note and "\n" not in reviews.note
    assert "Yelp" not in reviews.name
    assert (len(reviews.texts), sum(reviews.labels), len(set(reviews.texts))) == (1000, 500, 1000)
    assert load_reviews("sample", 5).note is None, "the sample was asked for, so there is nothing to note"
    with pytest.raises(UserError, match="--data yelp: .*HF_HUB_OFFLINE.*--data sample"):
        load_reviews("yelp", 5)
