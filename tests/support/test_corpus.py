"""Training data: what is chosen, how text becomes tokens and splits, and which files are refused."""

import gzip
import json
import math
import os
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from support import corpus as corpus_module
from support.corpus import DATA, load_corpus, save_npz, split_held_out, unigram_entropy
from support.errors import UserError
from support.tokenizer import get_tokenizer

N_VOCAB, EOT = 50257, 50256


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens.npz"
    save_npz(path, train=np.arange(500, dtype=np.uint16), val=np.arange(70, dtype=np.uint16))
    return path


def encode(text):
    return get_tokenizer().encode_ordinary(text)


def documents_in(tokens):
    """The texts between `<|endoftext|>`; a split of whole documents ends with one."""
    assert tokens[-1] == EOT, "a document was cut, or is not followed by <|endoftext|>"
    return get_tokenizer().decode(tokens.tolist()).split("<|endoftext|>")[:-1]


# --- which data ---------------------------------------------------------------------------------------------


def test_without_data_the_sample_stands_in_loudly(monkeypatch, tmp_path):
    (tmp_path / "sample.npz").write_bytes((DATA / "sample.npz").read_bytes())
    monkeypatch.setattr(corpus_module, "DATA", tmp_path)
    corpus = load_corpus(None, N_VOCAB)
    assert "sample" in corpus.note and "not comparable" in corpus.note and "C4" in corpus.note
    assert load_corpus("sample", N_VOCAB).note is None, "the person asked for the sample: nothing stands in"


def test_without_data_the_courses_token_file_is_taken_when_it_is_there(monkeypatch, tmp_path, token_file):
    monkeypatch.setattr(corpus_module, "DATA", tmp_path)
    monkeypatch.chdir("/")
    corpus = load_corpus(None, N_VOCAB)
    assert (len(corpus.train), corpus.note) == (500, None)


def test_bundled_sample_is_what_its_readme_says():
    corpus = load_corpus("sample", N_VOCAB)
    assert corpus.train.dtype == corpus.val.dtype == np.uint16
    assert 990_000 < len(corpus.train) < 1_010_000 and 45_000 < len(corpus.val) < 55_000
    pages = {split: documents_in(getattr(corpus, split)) for split in ("train", "val")}
    assert not set(pages["train"]) & set(pages["val"]), "a page is in both splits"
    assert max(map(len, pages["train"] + pages["val"])) <= 4000
    titles = [line.split("\t") for line in (DATA / "sample_titles.txt").read_text("utf-8").splitlines()[1:]]
    assert [sum(split == wanted for split, _ in titles) for wanted in pages] == [*map(len, pages.values())]


def test_tokens_keep_their_narrow_type(token_file):
    assert load_corpus(str(token_file), N_VOCAB).train.dtype == np.uint16


def test_folder_is_memory_mapped(tmp_path):
    np.save(tmp_path / "train.npy", np.arange(300, dtype=np.uint16))
    np.save(tmp_path / "val.npy", np.arange(30, dtype=np.uint16))
    corpus = load_corpus(str(tmp_path), N_VOCAB)
    assert isinstance(corpus.train, np.memmap) and corpus.train[299] == 299
    np.save(tmp_path / "val.npy", np.array(["pickled"], dtype=object))
    with pytest.raises(UserError, match=r"val\.npy"):
        load_corpus(str(tmp_path), N_VOCAB)
    (tmp_path / "val.npy").unlink()
    with pytest.raises(UserError, match=r"val\.npy"):
        load_corpus(str(tmp_path), N_VOCAB)


# --- text to tokens -----------------------------------------------------------------------------------------


def test_long_text_read_in_blocks_gives_the_tokens_of_the_whole(tmp_path, monkeypatch):
    draw = random.Random(7)
    parts = ["word", " word", "  ", "\n", "\n\n", "1234", "don't", "é", "<|", "。", "\t", "\u00a0", "\x1c"]
    text = "".join(draw.choices(parts, k=4000)) + "<|endoftext|> second\n\n" + "x y" * 99
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    read = corpus_module._read_blocks
    monkeypatch.setattr(corpus_module, "_read_blocks", lambda path, bar, size: read(path, bar, 13))
    tokens, lengths = corpus_module.tokenise(corpus_module.read_pieces(path), get_tokenizer())
    first, second = text.split("<|endoftext|>")
    assert tokens.tolist() == [*encode(first), EOT, *encode(second), EOT], "a piece was cut inside a token"
    assert lengths == [len(encode(first)) + 1, len(encode(second)) + 1]


def test_text_file_splits_at_literal_end_of_text_and_holds_out_whole_documents(tmp_path):
    path = tmp_path / "tales.txt"
    texts = [f"Tale {i}: once upon a time there were {i} mice." for i in range(40)]
    path.write_text("<|endoftext|>".join([*texts, "\n"]))  # the blank rest is no document
    corpus = load_corpus(str(path), N_VOCAB)
    train, val = documents_in(corpus.train), documents_in(corpus.val)
    assert sorted(train + val) == sorted(texts)
    assert len(val) == 4, "10% of a small corpus is held out"


def test_single_text_holds_out_its_last_part(tmp_path):
    path = tmp_path / "novel.txt"
    text = "".join(f"Sentence number {i} of a long novel. " for i in range(300))
    path.write_text(text)
    corpus = load_corpus(str(path), N_VOCAB)
    tokens = [*encode(text), EOT]
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


@pytest.mark.parametrize(
    ("n_documents", "length", "target"),
    [
        (1000, 50, 5_000),  # 10% of a small corpus
        (2000, 1000, 65_536),  # 65,536 of a middling one
        (1000, 10_000, 100_000),  # 1% of a large one
        (3, 100, 30),  # whole documents even where one is more than twice the amount
    ],
)
def test_held_out_amount(n_documents, length, target):
    tokens = np.repeat(np.arange(n_documents, dtype=np.uint16), length)
    train, val = split_held_out(tokens, [length] * n_documents)
    assert target <= len(val) < target + length
    assert not set(np.unique(train)) & set(np.unique(val)), "a document is in both splits"
    assert len(train) + len(val) == len(tokens)


def test_one_huge_document_among_small_ones_never_starves_training():
    tokens, lengths = np.zeros(100_000, dtype=np.uint16), [99_000, 400, 600]
    train, val = split_held_out(tokens, lengths)
    assert (len(train), len(val)) == (90_000, 10_000)


# --- the cache ----------------------------------------------------------------------------------------------


def test_cache_is_reused_only_for_the_same_source(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("A first text. " * 50)
    first = load_corpus(str(path), N_VOCAB)
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "tokenise", lambda *_: pytest.fail("tokenised again despite the cache"))
        again = load_corpus(str(path), N_VOCAB)
    assert np.array_equal(again.train, first.train) and np.array_equal(again.val, first.val)

    path.write_text("Another text! " * 50)  # the same size, another time
    os.utime(path, ns=(1, 1))
    assert "Another" in get_tokenizer().decode(load_corpus(str(path), N_VOCAB).train.tolist())


def test_damaged_cache_is_made_anew(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Some text. " * 50)
    first = load_corpus(str(path), N_VOCAB)
    (tmp_path / "text.txt.tokens.npz").write_bytes(b"PK\x03\x04 torn")
    assert np.array_equal(load_corpus(str(path), N_VOCAB).train, first.train)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt", "text.txt.tokens.npz"], "a file was left"


def test_trains_without_a_cache_where_none_can_be_written(tmp_path, monkeypatch, capsys):
    path = tmp_path / "text.txt"
    path.write_text("Some text. " * 50)
    (tmp_path / "text.txt.tokens.npz").mkdir()  # not even the superuser can rename a file onto a folder
    assert len(load_corpus(str(path), N_VOCAB).train) > 100
    output = capsys.readouterr().out
    assert "not cached" in output and output.count("\n") == 1


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
        "missing key": ({"train": good, "valid": good}, "'val' is missing.*valid"),
        "pickle": ({"train": np.array([Bomb()]), "val": good}, "'train'"),
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
        "npy": (b"\x93NUMPY\x01\x00", "no .npz"),
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
    with pytest.raises(UserError, match="'train'"):
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
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "line 3.*not JSON"),
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


# --- entropy and prepare.py ---------------------------------------------------------------------------------


def test_unigram_entropy_by_hand():
    tokens = np.array([0, 0, 0, 0, 2, 2, 5, 5], dtype=np.uint16)  # 1/2, 1/4, 1/4: 1.5 bits
    assert unigram_entropy(tokens, 7) == pytest.approx(1.5 * math.log(2))
    even = np.tile(np.arange(11, dtype=np.uint16), 300_000)  # more than one slice
    assert unigram_entropy(even, 11) == pytest.approx(math.log(11))


def test_prepare_draws_whole_documents_and_repeats_itself(tmp_path):
    source = tmp_path / "pages.jsonl"
    with source.open("w") as file:
        for i in range(200):
            text = f"Page {i} opens. " + "More of it follows here. " * (i % 40)
            file.write(json.dumps({"title": f"T{i}", "text": text}) + "\n")
    command = [sys.executable, str(DATA / "prepare.py"), str(source)]
    options = ["--tokens", "3000", "--val-tokens", "400", "--max-chars-per-document", "300"]
    for name in ("a.npz", "b.npz"):
        subprocess.run([*command, str(tmp_path / name), *options], check=True, cwd=tmp_path)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    corpus = load_corpus(str(tmp_path / "a.npz"), N_VOCAB)
    train, val = documents_in(corpus.train), documents_in(corpus.val)
    assert 3000 <= len(corpus.train) < 3100 and 400 <= len(corpus.val) < 500
    assert max(map(len, train + val)) <= 300 and all(text.rstrip().endswith(".") for text in train + val)
    titles = (tmp_path / "a_titles.txt").read_text().splitlines()[1:]
    drawn = {(split, text.split()[1]) for split, texts in (("train", train), ("val", val)) for text in texts}
    assert {tuple(line.split("\tT")) for line in titles} == drawn

    too_many = [*command, str(tmp_path / "c.npz"), "--tokens", "99999"]
    refusal = subprocess.run(too_many, capture_output=True, text=True)
    assert refusal.returncode == 2 and "--tokens" in refusal.stderr and not (tmp_path / "c.npz").exists()
