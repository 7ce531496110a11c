"""Training data: what is chosen, how text becomes tokens and splits, and which files are refused."""

import gzip
import importlib.util
import io
import json
import math
import os
import random
import re
import zipfile

import numpy as np
import pytest

from support import corpus as corpus_module
from support import hub, token_files
from support.corpus import Corpus, load_corpus, unigram_entropy
from support.errors import UserError
from support.paths import DATA
from support.state import fingerprint
from support.text import n_held_out, read_documents, tokenise
from support.token_files import evenly_spaced
from support.tokenizer import get_tokenizer

N_VOCAB, EOT = 50257, 50256


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens.npz"
    np.savez(path, train=np.arange(500, dtype=np.uint16), val=np.arange(70, dtype=np.uint16))
    return path


def encode(text):
    return get_tokenizer().encode_ordinary(text)


def documents_in(tokens):
    """The texts between `<|endoftext|>`; a split of whole documents ends with one."""
    assert tokens[-1] == EOT, "a document was cut, or is not followed by <|endoftext|>"
    return get_tokenizer().decode(tokens.tolist()).split("<|endoftext|>")[:-1]


# --- which data ---------------------------------------------------------------------------------------------


def test_without_data_and_network_the_sample_stands_in_loudly(monkeypatch, tmp_path):
    (tmp_path / "sample.npz").write_bytes((DATA / "sample.npz").read_bytes())
    monkeypatch.setattr(corpus_module, "DATA", tmp_path)
    monkeypatch.setattr(hub, "DATA", tmp_path)
    corpus = load_corpus(None, N_VOCAB)
    assert "sample of C4" in corpus.note and "with a margin" in corpus.note
    assert "HF_HUB_OFFLINE" in corpus.note, "the note does not say why"
    assert load_corpus("sample", N_VOCAB).note is None, "the sample was asked for, so there is nothing to note"
    with pytest.raises(UserError, match="data: c4.*HF_HUB_OFFLINE.*data: sample"):
        load_corpus("c4", N_VOCAB)
    assert [path.name for path in tmp_path.iterdir()] == ["sample.npz"]


@pytest.mark.parametrize("data", [None, "c4"])
def test_the_courses_token_file_is_taken_when_it_is_there(monkeypatch, tmp_path, token_file, data):
    monkeypatch.setattr(hub, "DATA", tmp_path)
    monkeypatch.chdir("/")
    corpus = load_corpus(data, N_VOCAB)
    assert (len(corpus.train), corpus.note) == (500, None)


@pytest.mark.parametrize("dtype", ["uint16", "int64", ">i4", "uint64"])
def test_tokens_of_any_integer_type_are_read_and_never_widened(tmp_path, dtype):
    tokens = np.array([0, 7, 50256, 300], dtype=dtype)
    np.savez_compressed(tmp_path / "t.npz", train=tokens, val=tokens[:2])
    corpus = load_corpus(str(tmp_path / "t.npz"), N_VOCAB)
    assert (corpus.train.tolist(), corpus.val.tolist()) == ([0, 7, 50256, 300], [0, 7])
    assert corpus.train.itemsize == tokens.itemsize


# --- token folders ------------------------------------------------------------------------------------------


@pytest.fixture
def token_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    np.save(folder / "train.npy", np.arange(300, dtype=np.uint16))
    np.save(folder / "val.npy", np.arange(30, dtype=np.uint16))
    return folder


def test_folder_is_memory_mapped_and_its_ids_are_checked(token_folder):
    corpus = load_corpus(str(token_folder), N_VOCAB)
    assert isinstance(corpus.train, np.memmap) and corpus.train[299] == 299
    with pytest.raises(UserError, match="299.*0 to 298"):
        load_corpus(str(token_folder), 299)
    np.save(token_folder / "train.npy", np.array([0, 50257, 1], dtype=np.uint16))
    with pytest.raises(UserError, match=r"train\.npy contains the token id 50257"):
        load_corpus(str(token_folder), N_VOCAB)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("val", np.array(["pickled"], dtype=object), "not a numpy array"),
        ("val", np.ones((2, 3), dtype=np.int32), r"shape \(2, 3\)"),
        ("train", np.ones(5), "float64"),
        ("train", np.ones(5, dtype="m8[s]"), "timedelta"),
        ("train", b"<html>", "not a numpy array"),
        ("train", b"", "not a numpy array"),
        ("val", None, "not a numpy array.*No such file"),
    ],
)
def test_folder_with_a_foreign_file_is_refused(token_folder, name, content, message):
    path = token_folder / f"{name}.npy"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(UserError, match=message) as refusal:
        load_corpus(str(token_folder), N_VOCAB)
    assert str(path) in str(refusal.value)


def test_truncated_folder_is_refused(token_folder):
    load_corpus(str(token_folder), N_VOCAB)
    path = token_folder / "train.npy"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"train\.npy"):
        load_corpus(str(token_folder), N_VOCAB)


# --- text to tokens -----------------------------------------------------------------------------------------


def test_documents_of_a_text_keep_every_character(tmp_path):
    draw = random.Random(7)
    parts = ["word", " word", "  ", "\n", "\n\n", "1234", "don't", "é", "<|", "。", "\t", "\u00a0", "\x1c"]
    texts = ["".join(draw.choices(parts, k=400)) for _ in range(3)]
    path = tmp_path / "text.txt"
    path.write_bytes("<|endoftext|>".join(texts).encode())
    assert [*read_documents(path)] == texts
    spool = io.BytesIO()
    lengths = [*tokenise(texts, get_tokenizer(), spool)]
    tokens = np.frombuffer(spool.getvalue(), np.uint16).tolist()
    assert tokens == [token for text in texts for token in [*encode(text), EOT]]
    assert lengths == [len(encode(text)) + 1 for text in texts]


def test_text_file_splits_at_literal_end_of_text(tmp_path):
    path = tmp_path / "tales.txt"
    texts = [f"Tale {i}: once upon a time there were {i} mice." for i in range(40)]
    path.write_text("<|endoftext|>".join([*texts, "\n"]))  # the blank rest is not a document
    corpus = load_corpus(str(path), N_VOCAB)
    assert documents_in(np.concatenate([corpus.train, corpus.val])) == texts


def test_single_text_holds_out_its_last_part(tmp_path):
    path = tmp_path / "novel.txt"
    novel = "".join(f"Sentence number {i} of a long novel. " for i in range(300))
    path.write_text(novel)
    corpus = load_corpus(str(path), N_VOCAB)
    tokens = [*encode(novel), EOT]
    assert [*corpus.train, *corpus.val] == tokens
    assert len(corpus.val) == math.ceil(len(tokens) / 10)


@pytest.mark.parametrize("name", ["pages.jsonl", "pages.jsonl.gz"])
def test_jsonl_keeps_a_literal_end_of_text_as_characters(tmp_path, name):
    texts = [f"Page {i} says <|endoftext|> aloud." for i in range(10)]
    content = "\n".join(json.dumps({"text": text, "title": "t"}) for text in texts).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    corpus = load_corpus(str(path), N_VOCAB)
    tokens = np.concatenate([corpus.train, corpus.val])
    documents = np.split(tokens, np.flatnonzero(tokens == EOT) + 1)[:-1]
    assert sorted(d.tolist() for d in documents) == sorted([*encode(text), EOT] for text in texts)


def test_held_out_amount():
    assert n_held_out(50_000) == 5_000, "10% of a small corpus"
    assert n_held_out(2_000_000) == 65_536, "65,536 tokens of a middling one"
    assert n_held_out(10_000_000) == 100_000, "1% of a large one"


# --- tokens of a text are kept ------------------------------------------------------------------------------


def test_tokens_of_a_text_are_reused_only_for_the_same_source(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("A first text. " * 50)
    first = load_corpus(str(path), N_VOCAB)
    with monkeypatch.context() as patch:
        patch.setattr(token_files, "tokenise", lambda *_: pytest.fail("tokenised again"))
        again = load_corpus(str(path), N_VOCAB)
    assert np.array_equal(again.train, first.train) and np.array_equal(again.val, first.val)
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "text.txt.tokens"}

    path.write_text("Another text! " * 50)  # the same size, another time
    os.utime(path, ns=(1, 1))
    assert "Another" in get_tokenizer().decode(load_corpus(str(path), N_VOCAB).train.tolist())


def test_truncated_tokens_of_a_text_are_refused_with_the_remedy(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Some text. " * 50)
    load_corpus(str(path), N_VOCAB)
    (tmp_path / "text.txt.tokens" / "train.npy").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"train\.npy: not a numpy array .* delete the folder"):
        load_corpus(str(path), N_VOCAB)
    (tmp_path / "text.txt.tokens" / "source.json").unlink()
    assert len(load_corpus(str(path), N_VOCAB).train) > 0, "without source.json it is converted again"


# --- refused files ------------------------------------------------------------------------------------------


def test_hostile_npz_is_refused_with_file_and_reason(tmp_path, token_file):
    good = np.arange(50, dtype=np.int32)
    marker = tmp_path / "code ran"

    class Bomb:
        def __reduce__(self):
            return marker.touch, ()

    arrays = {
        "float": ({"train": good / 2, "val": good}, "float64"),
        "bool": ({"train": good > 2, "val": good}, "bool"),
        "two dimensions": ({"train": good.reshape(5, 10), "val": good}, r"\(5, 10\)"),
        "no dimension": ({"train": np.int64(3), "val": good}, r"\(\)"),
        "empty": ({"train": good, "val": good[:0]}, r"'val'.*\(0,\)"),
        "negative": ({"train": good, "val": good - 1}, "'val'.* -1"),
        "too large": ({"train": good + (N_VOCAB - 49), "val": good}, f"{N_VOCAB}.*0 to {N_VOCAB - 1}"),
        "missing key": ({"train": good, "valid": good}, r"'val' is missing, found train, valid"),
        "pickle": ({"train": np.array([Bomb()]), "val": good}, "allow_pickle"),
    }
    for name, (content, message) in arrays.items():
        path = tmp_path / f"{name}.npz"
        np.savez(path, **content)
        with pytest.raises(UserError, match=message) as refusal:
            load_corpus(str(path), N_VOCAB)
        assert str(path) in str(refusal.value), "the message does not name the file"
    assert not marker.exists(), "loading a token file ran code"

    whole = token_file.read_bytes()
    files = {
        "html": (b"\n<!DOCTYPE html><html>Not found</html>", "web page"),
        "truncated": (whole[:-100], "truncated"),
        "nothing": (b"", "empty"),
        "npy": (b"\x93NUMPY\x01\x00", "foreign file instead of a .npz file"),
    }
    for name, (content, message) in files.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_corpus(str(path), N_VOCAB)


def test_member_that_is_no_array_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("train.npy", "no array")
        archive.writestr("val.npy", "no array")
    with pytest.raises(UserError, match=r"'train' has type \|S8"):
        load_corpus(str(tmp_path / "text.npz"), N_VOCAB)


def test_mutated_npz_loads_unchanged_or_is_refused(token_file):
    whole, draw = token_file.read_bytes(), random.Random(3)
    expected = load_corpus(str(token_file), N_VOCAB)
    refused = 0
    for _ in range(200):
        mutated = bytearray(whole)
        for _ in range(draw.choice([1, 1, 8])):
            mutated[draw.randrange(len(mutated))] ^= 1 << draw.randrange(8)
        token_file.write_bytes(mutated)
        try:
            corpus = load_corpus(str(token_file), N_VOCAB)
        except UserError:
            refused += 1
        else:
            assert np.array_equal(corpus.train, expected.train), "a flipped bit came through"
            assert np.array_equal(corpus.val, expected.val), "a flipped bit came through"
    assert refused > 100


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "line 3: not a JSON object"),
        ("b.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', "line 2.*'text'"),
        ("c.jsonl", b'{"text": 5}\n', "line 1.*'text'"),
        ("d.jsonl", b"[1]\n", "line 1"),
        ("e.jsonl.gz", b"no gzip", "cannot be read"),
        ("f.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-9], "cannot be read"),
        ("g.txt", b"caf\xe9", "UTF-8"),
        ("h.txt", b" \n ", "no text"),
        ("i.jsonl", b"", "no text"),
    ],
)
def test_bad_text_is_refused_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        load_corpus(str(tmp_path / name), N_VOCAB)
    assert name in str(refusal.value)
    assert [p.name for p in tmp_path.iterdir()] == [name], "a refused file left something behind"


def test_missing_path_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere.txt"):
        load_corpus(str(tmp_path / "nowhere.txt"), N_VOCAB)


# --- entropy, fingerprint and prepare.py --------------------------------------------------------------------


def test_unigram_entropy_by_hand():
    tokens = np.array([0, 0, 0, 0, 2, 2, 5, 5], dtype=np.uint16)  # 1/2, 1/4, 1/4: 1.5 bits
    assert unigram_entropy(tokens, 7) == pytest.approx(1.5 * math.log(2))
    even = np.tile(np.arange(11, dtype=np.uint16), 300_000)  # more than one slice
    assert unigram_entropy(even, 11) == pytest.approx(math.log(11))


def test_evenly_spaced_slices():
    tokens = np.arange(1 << 20)
    assert np.array_equal(np.concatenate([*evenly_spaced(tokens)]), tokens)
    assert np.array_equal(np.concatenate([*evenly_spaced(tokens[:99_999])]), tokens[:99_999])
    parts = [*evenly_spaced(tokens, at_most=1 << 18)]
    assert [part[0] >> 16 for part in parts] == [0, 4, 8, 12] and {len(part) for part in parts} == {1 << 16}


def test_fingerprint_depends_on_the_tokens_and_not_on_their_type():
    tokens = np.random.default_rng(0).integers(0, 50257, 70_000)
    first = fingerprint(Corpus("a", tokens, tokens[:9]))
    assert first == fingerprint(Corpus("b", tokens.astype(np.uint16), tokens[:9].astype(">u4")))
    assert first != fingerprint(Corpus("a", tokens, tokens[:8]))
    tokens[69_999] ^= 1
    assert first != fingerprint(Corpus("a", tokens, tokens[:9]))


@pytest.fixture
def prepare(capsys):
    """prepare(*arguments) runs data/prepare.py; it returns the exit status and what was printed."""
    spec = importlib.util.spec_from_file_location("prepare", DATA / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments) -> tuple[int, str]:
        try:
            module.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    return run


@pytest.fixture
def pages(tmp_path):
    """A jsonl of 200 pages."""
    source = tmp_path / "pages.jsonl"
    with source.open("w") as file:
        for i in range(200):
            content = f"Page {i} opens. " + "More of it follows here. " * (i % 40)
            file.write(json.dumps({"title": f"T{i}", "text": content}) + "\n")
    return source


def test_prepare_draws_whole_documents_and_repeats_itself(tmp_path, pages, prepare):
    options = ["--tokens", 3000, "--val-tokens", 400]
    for name in ("a.npz", "b.npz"):
        assert prepare(pages, tmp_path / name, *options)[0] == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    corpus = load_corpus(str(tmp_path / "a.npz"), N_VOCAB)
    train, val = documents_in(corpus.train), documents_in(corpus.val)
    assert 3000 <= len(corpus.train) < 3300 and 400 <= len(corpus.val) < 700
    numbers = [page.split()[1] for page in train + val]
    assert len(set(numbers)) == len(numbers), "a page was drawn twice"

    assert prepare(pages, tmp_path / "folder", *options)[0] == 0
    folder = load_corpus(str(tmp_path / "folder"), N_VOCAB)
    assert np.array_equal(folder.train, corpus.train) and np.array_equal(folder.val, corpus.val)

    status, error = prepare(pages, tmp_path / "c.npz", "--tokens", 99999)
    assert status == 2 and "--tokens" in error and not (tmp_path / "c.npz").exists()


def test_prepare_holds_out_as_training_on_the_source_itself_does(tmp_path, pages, prepare):
    status, shown = prepare(pages, tmp_path / "out")
    direct, prepared = (load_corpus(str(path), N_VOCAB) for path in (pages, tmp_path / "out"))
    assert np.array_equal(direct.train, prepared.train) and np.array_equal(direct.val, prepared.val)
    assert status == 0 and f"{len(prepared.train):,} train and {len(prepared.val):,} val tokens" in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.npy", "val.npy"}


def test_prepare_draws_from_a_text_file(tmp_path, prepare):
    source = tmp_path / "tales.txt"
    source.write_text("<|endoftext|>".join(f"Tale {i} is short." for i in range(40)))
    assert prepare(source, tmp_path / "tales.npz", "--tokens", 50)[0] == 0
    corpus = load_corpus(str(tmp_path / "tales.npz"), N_VOCAB)
    tales = documents_in(corpus.train) + documents_in(corpus.val)
    assert all(re.fullmatch(r"Tale \d+ is short\.", tale) for tale in tales) and len(set(tales)) == len(tales)


def test_prepare_makes_a_test_file_that_is_all_val(tmp_path, pages, prepare):
    status, shown = prepare(pages, tmp_path / "all.npz", "--val-only")
    assert prepare(pages, tmp_path / "split.npz")[0] == 0
    split = load_corpus(str(tmp_path / "split.npz"), N_VOCAB)
    with np.load(tmp_path / "all.npz") as archive:
        assert archive.files == ["val"]
        assert sorted(archive["val"]) == sorted([*split.train, *split.val])
    assert status == 0 and shown.strip().endswith(f"{len(split.train) + len(split.val):,} val tokens")
    assert prepare(pages, tmp_path / "part.npz", "--val-only", "--val-tokens", 400)[0] == 0
    with np.load(tmp_path / "part.npz") as archive:
        assert archive.files == ["val"] and 400 <= len(archive["val"]) < 700


def test_prepare_refuses_what_it_cannot_do_and_writes_nothing(tmp_path, pages, prepare):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "taken").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments, message in (
        (["nowhere.txt", tmp_path / "out"], "nowhere.txt: no such file"),
        ([pages, tmp_path / "no" / "out"], "no: no such folder"),
        ([pages, tmp_path / "taken"], "taken is a file"),
        ([tmp_path / "empty.txt", tmp_path / "out"], "no text found"),
        ([pages, tmp_path / "out", "--tokens", "0"], "give 1 or more"),
        ([pages, tmp_path / "out", "--val-only"], "out must be an .npz"),
        ([pages, tmp_path / "out.npz", "--val-only", "--tokens", "9"], "use --val-tokens in place of --tokens"),
        ([pages, tmp_path / "out", "--reviews", "10"], "pages.jsonl, line 1: label None"),
    ):
        status, error = prepare(*arguments)
        assert status == 2 and message in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_prepare_draws_reviews_of_both_labels(tmp_path, prepare):
    source = tmp_path / "reviews.jsonl"
    records = [{"text": f"this is review {i % 30}", "label": i % 2} for i in range(40)]
    source.write_text("\n".join(map(json.dumps, [*records, {"text": "too short", "label": 1}])))
    status, shown = prepare(source, tmp_path / "out.jsonl", "--reviews", 20)
    assert status == 0 and shown.endswith("out.jsonl: 20 reviews\n")
    drawn = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len({review["text"] for review in drawn}) == 20 and sum(review["label"] for review in drawn) == 10
    assert "has only 15 of label 0" in prepare(source, tmp_path / "more.jsonl", "--reviews", 32)[1]
    status, shown = prepare(source, tmp_path / "odd.jsonl", "--reviews", 21)
    assert status == 0 and shown.endswith("odd.jsonl: 21 reviews\n"), "an odd number yields one less"
