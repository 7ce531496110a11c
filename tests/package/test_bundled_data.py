"""The token files that come with the package: whole documents, and no held-out text in the training part."""

import hashlib
import json

import numpy as np
import pytest
from tiny_run import TinyRun

from data import build
from support.data import load_corpus
from support.files import DATA

N_VOCAB, EOT = 50257, 50256


@pytest.fixture(scope="module")
def bundled() -> dict[str, np.ndarray]:
    """The three token arrays by name."""
    sample = load_corpus("sample", N_VOCAB)
    with np.load(DATA / "heldout-wikipedia.npz") as file:
        return {"train": sample.train, "val": sample.val, "wikipedia": file["val"]}


def test_bundled_tokens_are_whole_documents_and_those_of_the_readme(bundled):
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for name, tokens in bundled.items():
        assert tokens.dtype == np.uint16 and tokens[-1] == EOT, f"{name}: the last document is cut"
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
        assert digest in readme, f"{name}: data/README.md lists another sha256 than {digest}"
        assert f"{len(tokens):,}" in readme, f"{name}: data/README.md gives another number than {len(tokens):,}"
    assert len(bundled["train"]) > 1_400_000 and 100_000 <= len(bundled["val"]) < 110_000


def test_nothing_held_out_is_in_the_sample_to_train_on(bundled):
    documents = {name: build.decode_documents(tokens) for name, tokens in bundled.items()}
    held_out = documents["val"] + documents["wikipedia"]
    overlapping = len(documents["train"]) - len(build.without_overlap(documents["train"], held_out))
    assert overlapping == 0, f"{overlapping} documents share {build.N_WORDS} words in a row with a held-out one"
    titles = build.HELD_OUT_TITLES.read_text(encoding="utf-8").splitlines()[1:]
    assert len(titles) == len(documents["wikipedia"]), "not one title for each held-out page"


def test_overlap_is_thirteen_words_in_a_row_whatever_the_punctuation():
    words = [f"w{i}" for i in range(13)]
    held_out = ["before it, " + " ".join(words)]
    same, shorter = "So: " + ", ".join(words).title() + "!", " ".join(words[1:])
    assert build.without_overlap([same, shorter, "short"], held_out) == [shorter, "short"]


def test_wikipedia_pages_lose_their_markup_and_short_ones_are_left_out():
    body = "'''Alder''' is a [[genus|group]] of [[tree]]s.{{stub {{x}}}}&lt;ref&gt;a book&lt;/ref&gt;\n"
    body += "== See also ==\n* a list\n"
    page = "<page><title>{}</title><text>{}</text></page>"
    texts = {"Alder": body + "y" * 500, "Stub": "too short", "Talk:Alder": body * 99}
    dump = "".join(page.format(title, text) for title, text in texts.items())
    assert list(build.wikipedia_pages(dump)) == [("Alder", "Alder is a group of trees.\n" + "y" * 500)]


def test_mixture_repeats_sources_and_contains_nothing_held_out(tmp_path, monkeypatch, capsys):
    passage = " ".join(f"p{i}" for i in range(20))
    lines = (json.dumps({"text": text}) + "\n" for text in ("As they say, " + passage, "own"))
    (tmp_path / "web.jsonl").write_text("".join(lines))
    c4 = {split: np.concatenate(build.encode([f"{split} of C4"])) for split in ("train", "val")}
    np.savez(tmp_path / "sample.npz", **c4)
    np.savez(tmp_path / "held.npz", val=np.concatenate(build.encode([passage])))
    paths = {"DATA": tmp_path / "data", "SAMPLE": tmp_path / "sample.npz", "HELD_OUT": tmp_path / "held.npz"}
    for name, path in {**paths, "OUTPUTS": tmp_path}.items():
        monkeypatch.setattr(build, name, path)
    build.main(["mixture", "sample:3", f"{tmp_path / 'web.jsonl'}:2"])
    assert "2 documents, 1 left out" in capsys.readouterr().out
    corpus = load_corpus(str(tmp_path / "mixture"), N_VOCAB)
    assert sorted(build.decode_documents(corpus.train)) == ["own"] * 2 + ["train of C4"] * 3
    assert np.array_equal(corpus.val, c4["val"])


def test_a_file_with_val_only_can_be_evaluated_but_not_trained_on(tmp_path, capsys):
    tiny = TinyRun(tmp_path)
    assert tiny.main() == 0
    held_out = tmp_path / "held_out.npz"
    np.savez(held_out, val=np.arange(90, dtype=np.uint16))
    assert tiny.main("--evaluate", str(tiny.out / "model.pt"), "--data", str(held_out)) == 0
    assert "77 predicted tokens" in capsys.readouterr().out
    assert tiny.main("--data", str(held_out), "--fresh") == 2
    assert "the train split has 0 tokens" in capsys.readouterr().err
