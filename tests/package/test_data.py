"""What people bring: token files, texts, reviews; what is bundled; and data/prepare.py."""

import gzip
import hashlib
import json
import math
import os
import random

import numpy as np
import pytest
from tiny_run import ROOT, TinyRun, assert_refused, files, python, status

import train
from data import prepare
from support.data import load_corpus, load_reviews
from support.errors import UserError
from support.tokenizer import get_tokenizer

N_VOCAB, EOT = 50257, 50256
BLANKS = " " * 1_000_000  # they would overflow the stack of the tokenizer's regular expression


def all_tokens(path) -> np.ndarray:
    corpus = load_corpus(str(path), N_VOCAB)
    return np.concatenate([corpus.train, corpus.val])


def encode(text):
    return get_tokenizer().encode_ordinary(text)


def documents_in(tokens):
    """The texts between `<|endoftext|>`; a split of whole documents ends with one."""
    assert tokens[-1] == EOT, "a document was cut, or is not followed by <|endoftext|>"
    return get_tokenizer().decode(tokens.tolist()).split("<|endoftext|>")[:-1]


def refused(load, path, *words):
    """The reader says in one short sentence which file it is, and these words."""
    with pytest.raises(UserError) as refusal:
        load(str(path))
    message = str(refusal.value)
    assert path.name in message and "\n" not in message and len(message) < 1000, message
    for word in words:
        assert word in message, f"'{word}' is not in: {message}"


# --- token files -----------------------------------------------------------------------------------------


def corpus_of(path):
    return load_corpus(str(path), N_VOCAB)


@pytest.mark.parametrize("dtype", ["uint16", "int64", ">i4", "uint64"])
def test_tokens_of_any_integer_type_are_read_and_never_widened(tmp_path, dtype):
    tokens = np.array([0, 7, 50256, 300], dtype=dtype)
    np.savez_compressed(tmp_path / "t.npz", train=tokens, val=tokens[:2])
    corpus = corpus_of(tmp_path / "t.npz")
    assert (corpus.train.tolist(), corpus.val.tolist()) == ([0, 7, 50256, 300], [0, 7])
    assert corpus.train.itemsize == tokens.itemsize


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("code_ran",)


GOOD = np.arange(50, dtype=np.int32)
BAD_TOKENS = {
    "float": (GOOD / 2, ["float64"]),
    "two dimensions": (GOOD.reshape(5, 10), ["(5, 10)"]),
    "no dimension": (np.int64(3), []),
    "negative": (GOOD - 1, ["-1"]),
    "too large": (GOOD + (N_VOCAB - 49), [str(N_VOCAB)]),
    "pickle": (np.array([Bomb()]), []),
}


@pytest.mark.parametrize("kind", BAD_TOKENS)
def test_bad_tokens_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    tokens, words = BAD_TOKENS[kind]
    np.savez("bad.npz", train=tokens, val=GOOD)
    np.save("train.npy", tokens)
    np.save("val.npy", GOOD)
    refused(corpus_of, tmp_path / "bad.npz", *words)
    refused(corpus_of, tmp_path, "train.npy", *words)
    assert not (tmp_path / "code_ran").exists(), "loading a token file ran code"


def test_foreign_and_damaged_token_files_are_refused(tmp_path):
    path = tmp_path / "tokens.npz"
    np.savez(path, train=GOOD, valid=GOOD)
    refused(corpus_of, path, "val", "valid")
    np.savez(path, train=GOOD, val=GOOD)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(GOOD.tobytes()) + 40] ^= 1
    for content in (b"<!DOCTYPE html>", b"", b"\x93NUMPY\x01\x00", whole[:-100], bytes(flipped)):
        path.write_bytes(content)
        refused(corpus_of, path)


def test_token_folder_is_memory_mapped_and_a_truncated_one_is_refused(tmp_path):
    for name, n in (("train", 300), ("val", 30)):
        np.save(tmp_path / f"{name}.npy", np.arange(n, dtype=np.uint16))
    assert isinstance(corpus_of(tmp_path).train, np.memmap)
    path = tmp_path / "train.npy"
    path.write_bytes(path.read_bytes()[:-10])
    refused(corpus_of, tmp_path, "train.npy")


def test_held_out_tokens_alone_can_be_evaluated_but_not_trained_on(tmp_path, capsys, quick):
    tiny, held_out = TinyRun(tmp_path), tmp_path / "held_out.npz"
    assert tiny.main() == 0
    np.savez(held_out, val=np.arange(90, dtype=np.uint16))
    assert tiny.main("--evaluate", tiny.out / "model.pt", "--data", held_out) == 0
    assert "77" in capsys.readouterr().out, "11 rows of 8 tokens have 77 predictions"
    assert_refused(capsys, tmp_path, ["held_out.npz", "train"], train, tiny.config, "--fresh", "--data", held_out)
    longer = ("--set", "seq_len=91", "model_config.n_positions=99", "output_dir=new")
    assert_refused(capsys, tmp_path, ["tokens.npz", "val", "90", "91"], train, tiny.config, *longer)


# --- texts -----------------------------------------------------------------------------------------------


def test_text_keeps_every_character_and_splits_at_end_of_text(tmp_path):
    draw = random.Random(7)
    parts = ["word", " word", "  ", "\n", "\n\n", "1234", "don't", "é", "<|", "。", "\t", "\u00a0", "\x1c"]
    texts = ["".join(draw.choices(parts, k=400)) for _ in range(30)] + ["before" + " " * 900 + "after" * 30]
    path = tmp_path / "text.txt"
    path.write_bytes("<|endoftext|>".join([*texts, "\n"]).encode())  # the blank rest is not a document
    assert documents_in(all_tokens(path)) == texts
    assert all_tokens(path).tolist()[: len(encode(texts[0])) + 1] == [*encode(texts[0]), EOT]


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "c4-train.00000.json.gz", "a.json", "a.ndjson", "A.JSONL", "a.txt"]
)
def test_json_lines_are_known_by_their_content(tmp_path, name):
    """C4's own shards end in .json.gz; a literal <|endoftext|> in a record is characters, not the token."""
    texts = [f"Page {i} says <|endoftext|> aloud." for i in range(10)]
    content = "\n".join(json.dumps({"text": text, "title": "t"}) for text in texts).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    tokens = all_tokens(tmp_path / name)
    documents = np.split(tokens, np.flatnonzero(tokens == EOT) + 1)[:-1]
    assert sorted(d.tolist() for d in documents) == sorted([*encode(text), EOT] for text in texts)


def test_folder_of_texts_is_read_in_the_order_of_names_and_another_never_deleted(tmp_path):
    texts = [f"Tale {i} of a city." for i in range(10)]
    for i in reversed(range(10)):
        (tmp_path / f"{i}.txt").write_text(texts[i])
    assert documents_in(all_tokens(tmp_path)) == texts
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    with pytest.raises(UserError) as refusal:
        corpus_of(tmp_path / "photos")
    assert "photos" in str(refusal.value) and "delete" not in str(refusal.value)


def test_single_text_holds_out_its_last_tenth(tmp_path):
    novel = "".join(f"Sentence number {i} of a long novel. " for i in range(300))
    (tmp_path / "novel.txt").write_text(novel)
    corpus = corpus_of(tmp_path / "novel.txt")
    tokens = [*encode(novel), EOT]
    assert [*corpus.train, *corpus.val] == tokens and len(corpus.val) == math.ceil(len(tokens) / 10)
    (tmp_path / "blanks.txt").write_text("before" + BLANKS + "after " * 30)
    words = get_tokenizer().decode(all_tokens(tmp_path / "blanks.txt").tolist()).split()
    assert words == ["before", *["after"] * 30, "<|endoftext|>"]


def test_tokens_of_a_text_are_reused_only_for_the_same_source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A first text. " * 50)
    first, made = all_tokens(path), files(tmp_path)
    assert np.array_equal(all_tokens(path), first) and files(tmp_path) == made
    path.write_text("Another text! " * 50)  # the same size, another time
    os.utime(path, ns=(1, 1))
    assert "Another" in get_tokenizer().decode(all_tokens(path).tolist())


BAD_TEXTS = {
    "a.jsonl": (b'{"text": "x"}\n\n{"text": \n', ["line 3"]),
    "b.jsonl": (b'{"text": "x"}\n{"txt": "x"}\n', ["line 2", "text"]),
    "c.jsonl": (b'{"text": 5}\n', ["line 1"]),
    "d.jsonl.gz": (b"no gzip", []),
    "e.jsonl.gz": (gzip.compress(b'{"text": "x"}\n' * 99)[:-9], []),
    "f.txt": (b"caf\xe9", ["UTF-8"]),
    "h.png": (b"\x89PNG\r\n\x1a\n\0\0", []),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_text_is_refused_with_file_and_line(tmp_path, name):
    (tmp_path / name).write_bytes(BAD_TEXTS[name][0])
    refused(corpus_of, tmp_path / name, *BAD_TEXTS[name][1])
    assert [p.name for p in tmp_path.iterdir()] == [name], "a refused file left something behind"


# --- the course's data, what stands in for it, and the tokenizer ---------------------------------------------


@pytest.mark.skipif((ROOT / "data/tokens.npz").exists(), reason="C4 is in data/, so nothing stands in for it")
@pytest.mark.parametrize("error", [None, ConnectionError("no\nroute"), OSError(28, "No space left on device")])
def test_without_c4_and_yelp_the_samples_stand_in_loudly(monkeypatch, tmp_path, capsys, error):
    def fail(*_, **__):
        raise error

    if error:
        for name in ("hf_hub_download", "get_hf_file_metadata"):
            monkeypatch.setattr(f"huggingface_hub.{name}", fail)
    for load in (lambda data: load_corpus(data, N_VOCAB), lambda data: load_reviews(data, 2000, bool)):
        assert load("sample").note is None, "the sample was asked for, so there is nothing to note"
        assert "\n" not in load(None).note
    reviews = load_reviews(None, 2000, bool)
    assert "NOT Yelp" in reviews.note and (len(set(reviews.texts)), sum(reviews.labels)) == (1000, 500)
    assert_refused(capsys, tmp_path, ["c4"], train, TinyRun(tmp_path).config, "--data", "c4")
    with pytest.raises(UserError, match="yelp"):
        load_reviews("yelp", 5, bool)


def test_bundled_tokens_are_whole_documents_and_those_of_the_readme():
    readme, sample = (ROOT / "data/README.md").read_text(encoding="utf-8"), load_corpus("sample", N_VOCAB)
    with np.load(ROOT / "data/heldout-wikipedia.npz") as file:
        bundled = {"train": sample.train, "val": sample.val, "wikipedia": file["val"]}
    for name, tokens in bundled.items():
        assert tokens.dtype == np.uint16 and tokens[-1] == EOT, f"{name}: the last document is cut"
        assert hashlib.sha256(tokens.tobytes()).hexdigest() in readme, f"{name}: data/README.md has another sha256"
        assert f"{len(tokens):,}" in readme, f"{name}: data/README.md gives another number than {len(tokens):,}"


def test_tokenizer_is_gpt2s():
    tokenizer = get_tokenizer()
    assert [encode(text) for text in ("Hello world", " good", " bad", "")] == [[15496, 995], [922], [2089], []]
    assert (tokenizer.n_vocab, tokenizer.eot_token, tokenizer.decode([EOT])) == (N_VOCAB, EOT, "<|endoftext|>")
    text = "one <|endoftext|> two\t, breaks\r\n\n, 1234567 numbers, naïve Ω 漢字 🙂, can't  stop   "
    assert EOT not in encode(text) and tokenizer.decode(encode(text)) == text


# --- reviews ---------------------------------------------------------------------------------------------


def reviews_of(path, limit=100, fits=bool):
    return load_reviews(str(path), limit, fits)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", '\ufefflabel,stars,text\n1,5,"Good, ""really""\ngood"\n0,1,C:\\new bad\n\n'),
        ("B.CSV", 'Text,Label\n"Good, ""really""\ngood",1.0\nC:\\new bad,0.0\n'),
        (
            "c.jsonl",
            '{"label": 0, "text": "C:\\\\new bad"}\n\n{"text": "Good, \\"really\\"\\ngood", "label": 1}\n',
        ),
        ("f.json", '{"label": 0, "text": "C:\\\\new bad"}\n{"text": "Good, \\"really\\"\\ngood", "label": 1}\n'),
    ],
)
def test_reviews_of_each_format(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    reviews = reviews_of(tmp_path / name)
    pairs = sorted(zip(reviews.texts, reviews.labels, strict=True))
    assert pairs == [("C:\\new bad", 0), ('Good, "really"\ngood', 1)]


GOOD_LINES = "text,label\n" + "fine food,1\n" * 1400
BAD_REVIEWS = {
    "a label.csv": (b"text,label\nfine,1\nbad,2\n", ["line 3", "2"]),
    "no header.csv": (b"x" * 95_000 + b",1\n", ["text"]),
    "another header.csv": (b"review,stars\nfine,1\n", ["review", "text"]),
    "a comma.csv": (b"text,label\nwell, well,1\n", ["line 2"]),
    "an open quote.csv": (b'text,label\nfine,1\n"open,0\n', ["line 3"]),
    "empty.csv": (b"", []),
    "no row.csv": (b"text,label\n", []),
    "no text.csv": (b"text,label\n  ,1\n", ["line 2"]),
    "a short row.csv": (b"label,text\n1\n", ["line 2"]),
    "cp1252.csv": ((GOOD_LINES + "café,1\n").encode("cp1252"), ["line 1402", "UTF-8"]),
    "UTF-16.csv": (GOOD_LINES.encode("utf-16"), ["UTF-8"]),
    "label.jsonl": (b'{"text": "fine", "label": 1}\n' * 2 + b'{"text": "fine", "label": true}', ["line 3"]),
    "text.jsonl": (b'{"text": "fine", "label": 1}\n' * 2 + b'{"label": 1}', ["line 3"]),
}


@pytest.mark.parametrize("name", BAD_REVIEWS)
def test_bad_reviews_are_refused_with_their_line(tmp_path, name):
    (tmp_path / name).write_bytes(BAD_REVIEWS[name][0])
    refused(reviews_of, tmp_path / name, *BAD_REVIEWS[name][1])


def test_reviews_are_chosen_at_random_among_those_that_fit(tmp_path):
    path = tmp_path / "numbered.jsonl"
    path.write_text("".join(json.dumps({"text": str(i), "label": i % 2}) + "\n" for i in range(50)))
    chosen = reviews_of(path, limit=10, fits=lambda text: int(text) >= 30)
    assert len(chosen.texts) == 10, "the limit was applied before the filter"
    assert chosen.texts == sorted(chosen.texts, key=int) and int(chosen.texts[0]) >= 30
    assert [int(text) % 2 for text in chosen.texts] == chosen.labels, "a label left its text"
    nine = reviews_of(path, limit=9).texts
    assert nine == reviews_of(path, limit=9).texts and int(nine[-1]) > 9, "not at random"
    (tmp_path / "long.csv").write_text(f"text,label\n{'long ' * 40_000},1\nshort{BLANKS}one,0\n")
    assert reviews_of(tmp_path / "long.csv").labels == [1, 0]


# --- prepare.py ------------------------------------------------------------------------------------------


def write_pages(path, n_pages):
    with path.open("w") as file:
        for i in range(n_pages):
            text = f"Page {i} opens. " + "More of it follows here. " * (i % 40)
            file.write(json.dumps({"text": text, "label": i % 2}) + "\n")
    return path


@pytest.fixture
def pages(tmp_path):
    return write_pages(tmp_path / "pages.jsonl", 200)


def test_prepare_draws_whole_documents_repeats_itself_and_draws_reviews(tmp_path, pages):
    for name in ("a.npz", "b.npz", "folder"):
        assert status(prepare, pages, tmp_path / name, "--tokens", 3000, "--val-tokens", 400) == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    corpus, folder = corpus_of(tmp_path / "a.npz"), corpus_of(tmp_path / "folder")
    assert 3000 <= len(corpus.train) < 3300 and 400 <= len(corpus.val) < 700
    numbers = [page.split()[1] for page in documents_in(corpus.train) + documents_in(corpus.val)]
    assert len(set(numbers)) == len(numbers), "a page was drawn twice"
    assert np.array_equal(folder.train, corpus.train) and np.array_equal(folder.val, corpus.val)
    assert status(prepare, pages, tmp_path / "all.npz", "--val-only") == 0
    with np.load(tmp_path / "all.npz") as archive:
        assert archive.files == ["val"] and sorted(archive["val"]) == sorted(all_tokens(pages))
    assert status(prepare, pages, tmp_path / "out.jsonl", "--reviews", 20) == 0
    drawn = reviews_of(tmp_path / "out.jsonl")
    assert len(set(drawn.texts)) == 20 and sum(drawn.labels) == 10, "half of each label"


def test_prepare_refuses_what_it_cannot_do(tmp_path, pages, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "one.txt").write_text("One long document. " * 500)
    for arguments, words in (
        (["nowhere.txt", "out"], ["nowhere.txt"]),
        ([pages, "no/out"], ["no"]),
        ([pages, "taken"], ["taken"]),
        (["empty.txt", "out"], ["empty.txt"]),
        ([pages, "out", "--tokens", "0"], ["tokens", "0"]),
        ([pages, "c.npz", "--tokens", 99999], ["tokens"]),
        (["one.txt", "out", "--tokens", 100], ["document"]),
        ([pages, "out", "--val-only"], ["out", "npz"]),
        (["one.txt", "out", "--reviews", "10"], ["one.txt"]),
        ([pages, "new.jsonl", "--reviews", "999"], ["999", "label"]),
        ([pages, pages, "--reviews", "10"], ["pages.jsonl"]),
        ([pages, "out", "--tokns", "10"], ["tokns", "tokens"]),
        (["hf:some/thing", "out"], ["some/thing"]),
    ):
        assert_refused(capsys, tmp_path, words, prepare, *arguments)


@pytest.mark.soak
def test_prepare_takes_the_same_memory_for_a_corpus_of_any_size(tmp_path):
    resource, peaks = pytest.importorskip("resource"), []
    for n_pages in (2_000, 80_000):  # 0.2 and 9 million tokens
        write_pages(tmp_path / "pages.jsonl", n_pages)
        assert python(ROOT / "data/prepare.py", tmp_path / "pages.jsonl", tmp_path / "out").returncode == 0
        peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    assert peaks[1] < 1.2 * peaks[0], peaks
