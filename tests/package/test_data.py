"""What people bring: token files, texts and reviews; what is bundled; and data/prepare.py."""

import gzip
import hashlib
import io
import json
import math
import random

import numpy as np
import pytest
from tiny_run import ROOT, TinyRun, assert_refused, files, python, random_tokens, status

import classify
import train
from data import prepare
from support.data import load_corpus, load_reviews
from support.errors import UserError
from support.tokenizer import get_tokenizer

N_VOCAB, EOT = 50257, 50256
BLANKS = " " * 1_000_000  # they would overflow the stack of the tokenizer's regular expression


def corpus_of(path):
    return load_corpus(str(path), N_VOCAB)


def reviews_of(path, limit=100, fits=bool):
    return load_reviews(str(path), limit, fits)


def all_tokens(path) -> np.ndarray:
    corpus = corpus_of(path)
    return np.concatenate([corpus.train, corpus.val])


def encode(text):
    return get_tokenizer().encode_ordinary(text)


def documents_in(tokens):
    """The texts between `<|endoftext|>`; a split of whole documents ends with one."""
    assert tokens[-1] == EOT, "a document was cut, or is not followed by <|endoftext|>"
    return get_tokenizer().decode(tokens.tolist()).split("<|endoftext|>")[:-1]


# --- what is refused -------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes the file code_ran, which assert_refused would notice."""

    def __reduce__(self):
        return open, ("code_ran", "w")


def damaged(content: bytes) -> bytes:
    flipped = bytearray(content)
    flipped[content.index(GOOD.tobytes()) + 40] ^= 1
    return bytes(flipped)


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


GOOD = np.arange(50, dtype=np.int32)
GOOD_LINES = "text,label\n" + "fine food,1\n" * 1400
BAD_FILES = {
    "float.npz": (npz(train=GOOD / 2, val=GOOD), ["float64"]),
    "too large.npz": (npz(train=GOOD + (N_VOCAB - 49), val=GOOD), [str(N_VOCAB)]),
    "code.npz": (npz(train=np.array([Bomb()]), val=GOOD), []),
    "damaged.npz": (damaged(npz(train=GOOD, val=GOOD)), []),
    "no json.jsonl": (b'{"text": "x"}\n\n{"text": \n', ["line 3"]),
    "no text.jsonl": (b'{"text": "x"}\n{"txt": "x"}\n', ["line 2", "text"]),
    "blank.txt": (b" \n ", []),
    "a label.csv": (b"text,label\nfine,1\nbad,2\n", ["line 3", "2"]),
    "no header.csv": (b"x" * 95_000 + b",1\n", ["text"]),
    "a short row.csv": (b"label,text\n1\n", ["line 2"]),
    "cp1252.csv": ((GOOD_LINES + "café,1\n").encode("cp1252"), ["line 1402", "UTF-8"]),
    "label.json": (b'{"text": "fine", "label": 1}\n' * 2 + b'{"text": "fine", "label": true}', ["line 3"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_with_its_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    reviews = name.endswith((".csv", ".json"))
    command = (classify, ROOT / "model.pt") if reviews else (train, TinyRun(tmp_path).config)
    assert_refused(capsys, tmp_path, [name, *words], *command, "--data", name)


# --- tokens and texts ------------------------------------------------------------------------------------


def test_tokens_keep_their_type_and_a_folder_is_memory_mapped(tmp_path):
    for dtype in ("uint16", "int64", ">i4"):
        tokens = np.array([0, 7, 50256, 300], dtype=dtype)
        np.savez_compressed(tmp_path / "t.npz", train=tokens, val=tokens[:2])
        corpus = corpus_of(tmp_path / "t.npz")
        assert (corpus.train.tolist(), corpus.val.tolist()) == ([0, 7, 50256, 300], [0, 7])
        assert corpus.train.itemsize == tokens.itemsize
    for name in ("train", "val"):
        np.save(tmp_path / f"{name}.npy", random_tokens(300))
    assert isinstance(corpus_of(tmp_path).train, np.memmap)
    (tmp_path / "train.npy").write_bytes((tmp_path / "train.npy").read_bytes()[:-10])
    with pytest.raises(UserError, match=tmp_path.name):
        corpus_of(tmp_path)


def test_held_out_tokens_alone_can_be_evaluated_but_not_trained_on(tmp_path, capsys, quick):
    tiny, held_out = TinyRun(tmp_path), tmp_path / "held_out.npz"
    assert tiny.main() == 0
    np.savez(held_out, val=np.arange(90, dtype=np.uint16))
    assert tiny.main("--evaluate", tiny.out / "model.pt", "--data", held_out) == 0
    assert "77" in capsys.readouterr().out, "11 rows of 8 tokens have 77 predictions"
    assert_refused(capsys, tmp_path, ["held_out.npz", "train"], train, tiny.config, "--fresh", "--data", held_out)


def test_text_keeps_every_character_and_splits_at_end_of_text(tmp_path):
    draw = random.Random(7)
    parts = ["word", " word", "  ", "\n", "\n\n", "1234", "don't", "é", "<|", "。", "\t", "\u00a0", "\x1c"]
    texts = ["".join(draw.choices(parts, k=400)) for _ in range(30)] + ["before" + " " * 900 + "after" * 30]
    path = tmp_path / "text.txt"
    path.write_bytes("<|endoftext|>".join([*texts, "\n"]).encode())  # the blank rest is not a document
    first, made = all_tokens(path), files(tmp_path)
    assert documents_in(first) == texts and first.tolist()[: len(encode(texts[0]))] == encode(texts[0])
    assert len(corpus_of(path).val) == math.ceil(len(first) / 10), "a tenth of a small text is held out"
    assert files(tmp_path) == made, "the tokens should be reused"
    path.write_bytes(path.read_bytes().replace(b"before", b"before" + BLANKS.encode() + b"behind"))
    changed = get_tokenizer().decode(all_tokens(path).tolist())
    assert "behind" in changed, "tokens of an older text were used"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "c4-train.00.json.gz", "a.json", "a.ndjson", "A.JSONL", "a.txt"])
def test_json_lines_are_known_by_their_content(tmp_path, name):
    """C4's own shards end in .json.gz; a literal <|endoftext|> in a record is characters, not the token."""
    texts = [f"Page {i} says <|endoftext|> aloud." for i in range(10)]
    content = "\n".join(json.dumps({"text": text, "title": "t"}) for text in texts).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert all_tokens(tmp_path / name).tolist() == [token for text in texts for token in [*encode(text), EOT]]


def test_folder_of_texts_is_read_in_the_order_of_names_and_another_never_deleted(tmp_path):
    texts = [f"Tale {i} of a city." for i in range(10)]
    for i in reversed(range(10)):
        (tmp_path / f"{i}.txt").write_text(texts[i])
    assert documents_in(all_tokens(tmp_path)) == texts
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    with pytest.raises(UserError, match="photos") as refusal:
        corpus_of(tmp_path / "photos")
    assert "delete" not in str(refusal.value)


# --- the course's data, what stands in for it, and the tokenizer ---------------------------------------------


@pytest.mark.skipif((ROOT / "data/tokens.npz").exists(), reason="C4 is in data/, so nothing stands in for it")
@pytest.mark.parametrize("error", [None, ConnectionError("no\nroute"), OSError(28, "No space left on device")])
def test_without_c4_and_yelp_the_samples_stand_in_loudly(monkeypatch, tmp_path, capsys, error):
    def fail(*_, **__):
        raise error

    if error:
        monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    for load in (lambda data: load_corpus(data, N_VOCAB), lambda data: load_reviews(data, 2000, bool)):
        assert load("sample").note is None, "the sample was asked for, so there is nothing to note"
        assert "\n" not in load(None).note
    reviews = load_reviews(None, 2000, bool)
    assert "NOT Yelp" in reviews.note and (len(set(reviews.texts)), sum(reviews.labels)) == (1000, 500)
    assert_refused(capsys, tmp_path, ["c4"], train, TinyRun(tmp_path).config, "--data", "c4")
    assert_refused(capsys, tmp_path, ["yelp"], classify, ROOT / "model.pt", "--data", "yelp")


def test_bundled_tokens_are_whole_documents_and_those_of_the_readme():
    readme, sample = (ROOT / "data/README.md").read_text(encoding="utf-8"), load_corpus("sample", N_VOCAB)
    with np.load(ROOT / "data/heldout-wikipedia.npz") as file:
        bundled = {"train": sample.train, "val": sample.val, "wikipedia": file["val"]}
    for name, tokens in bundled.items():
        assert tokens.dtype == np.uint16 and tokens[-1] == EOT, f"{name}: the last document is cut"
        assert hashlib.sha256(tokens.tobytes()).hexdigest() in readme, f"{name}: data/README.md has another sha256"


def test_tokenizer_is_gpt2s():
    tokenizer = get_tokenizer()
    assert [encode(text) for text in ("Hello world", " good", " bad", "")] == [[15496, 995], [922], [2089], []]
    assert (tokenizer.n_vocab, tokenizer.eot_token, tokenizer.decode([EOT])) == (N_VOCAB, EOT, "<|endoftext|>")
    text = "one <|endoftext|> two\t, breaks\r\n\n, 1234567 numbers, naïve Ω 漢字 🙂, can't  stop   "
    assert EOT not in encode(text) and tokenizer.decode(encode(text)) == text


# --- reviews and prepare.py ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", '\ufefflabel,stars,text\n1,5,"Good, ""really""\ngood"\n0,1,C:\\new bad\n\n'),
        ("B.TXT", 'Text,Label\n"Good, ""really""\ngood",1.0\nC:\\new bad,0.0\n'),
        ("c.csv", 'text;label\n"Good, ""really""\ngood";1\nC:\\new bad;0\n'),
        ("d.json", '{"label": 0, "text": "C:\\\\new bad"}\n{"text": "Good, \\"really\\"\\ngood", "label": 1}\n'),
    ],
)
def test_reviews_of_each_format(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    reviews = reviews_of(tmp_path / name)
    pairs = sorted(zip(reviews.texts, reviews.labels, strict=True))
    assert pairs == [("C:\\new bad", 0), ('Good, "really"\ngood', 1)]


def test_reviews_are_chosen_at_random_among_those_that_fit(tmp_path):
    path = tmp_path / "numbered.jsonl"
    path.write_text("".join(json.dumps({"text": str(i), "label": i % 2}) + "\n" for i in range(50)))
    chosen = reviews_of(path, limit=10, fits=lambda text: int(text) >= 30)
    assert len(chosen.texts) == 10, "the limit was applied before the filter"
    assert [int(text) % 2 for text in chosen.texts] == chosen.labels, "a label left its text"
    nine = reviews_of(path, limit=9).texts
    assert nine == reviews_of(path, limit=9).texts == sorted(nine, key=int) and int(nine[-1]) > 9, "not at random"
    (tmp_path / "long.csv").write_text(f"text,label\n{'long ' * 40_000},1\nshort{BLANKS}one,0\n")
    assert reviews_of(tmp_path / "long.csv").labels == [1, 0]


def write_pages(path, n_pages):
    with path.open("w") as file:
        for i in range(n_pages):
            text = f"Page {i} opens. " + "More of it follows here. " * (i % 40)
            file.write(json.dumps({"text": text, "label": i % 2}) + "\n")
    return path


def test_prepare_takes_whole_documents_in_order(tmp_path):
    pages = write_pages(tmp_path / "pages.jsonl", 200)
    for name in ("tokens.npz", "folder"):
        assert status(prepare, pages, tmp_path / name, "--tokens", 3000) == 0
    corpus = corpus_of(tmp_path / "tokens.npz")
    assert 3000 <= len(corpus.train) < 3300 and 150 <= len(corpus.val) < 450, "a twentieth is held out"
    numbers = [int(page.split()[1]) for page in documents_in(corpus.train) + documents_in(corpus.val)]
    assert numbers == list(range(len(numbers)))
    assert np.array_equal(all_tokens(tmp_path / "folder"), all_tokens(tmp_path / "tokens.npz"))
    assert status(prepare, pages, tmp_path / "all.npz", "--val-only") == 0
    with np.load(tmp_path / "all.npz") as archive:
        assert archive.files == ["val"] and np.array_equal(archive["val"], all_tokens(pages))


def test_prepare_refuses_what_it_cannot_do(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages = write_pages(tmp_path / "pages.jsonl", 20)
    (tmp_path / "one.txt").write_text("One long document. " * 500)
    for arguments, words in (
        (["nowhere.txt", "out"], ["nowhere.txt"]),
        ([pages, "no/out"], ["no"]),
        ([pages, "c.npz", "--tokens", 99999], ["tokens"]),
        (["one.txt", "out", "--tokens", 100], ["document"]),
        ([pages, pages], ["pages.jsonl"]),
        ([pages, "out", "--tokns", "10"], ["tokns", "tokens"]),
        (["hf:some/thing", "out"], ["some/thing"]),
    ):
        assert_refused(capsys, tmp_path, words, prepare, *arguments)


@pytest.mark.soak
def test_prepare_takes_the_same_memory_for_a_corpus_of_any_size(tmp_path):
    resource, peaks = pytest.importorskip("resource"), []
    for n_pages in (2_000, 80_000):  # 0.2 and 9 million tokens
        pages = write_pages(tmp_path / "pages.jsonl", n_pages)
        assert python(ROOT / "data/prepare.py", pages, tmp_path / "out").returncode == 0
        peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    assert peaks[1] < 1.2 * peaks[0], peaks
