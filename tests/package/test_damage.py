"""Random damage to every kind of file: the command succeeds or ends with one sentence, not with a traceback.

The status is 2, or 1 where the file itself is whole but gives a model that computes nothing finite.
"""

import json
import random
from pathlib import Path

import pytest
import yaml
from tiny_run import TinyRun, rezipped, status

import classify
import generate
import train
from support.config import dump_config, load_config
from support.errors import UserError

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("quick")]
HOSTILE = rb"""\0 :\  - { [ &a *a !!int !!python/object:os.system <<: ' - . e9 nan .inf \xff\xfe \t ? # 99999999
PK\3\4 " , ; \ \ud800 null true 0100 1:30 <|endoftext|>""".split()


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content with a few bytes changed, inserted, removed, repeated or swapped for hostile ones."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        at, length = draw.randrange(len(content) + 1), draw.choice([1, 1, 1, 2, 9, 300])
        piece = content[at : at + length]
        new = draw.choice([b"", piece[::-1], draw.randbytes(length), piece * 2, draw.choice(HOSTILE)])
        content[at : at + draw.choice([0, length])] = new
    return bytes(content[: draw.choice([len(content)] * 19 + [draw.randrange(len(content) + 1)])])


def damaged_archive(content: bytes, draw: random.Random) -> bytes:
    """Damage anywhere in a zip file, or inside entries with a checksum that fits."""
    if draw.random() < 0.3:
        return damaged(content, draw)
    return rezipped(content, lambda name, data: damaged(data, draw) if draw.random() < 0.5 else data)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A finished run, with a file of each kind."""
    tiny = TinyRun(tmp_path_factory.mktemp("damage"))
    assert tiny.main() == 0
    for name, text in {
        "prefixes.json": json.dumps(["It is", {"prefix": "a “b”"}]),
        "reviews.csv": 'text,label\n"good, really",1\nbad,0\n',
        "reviews.jsonl": '{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n',
        "texts.jsonl": '{"text": "A city and its people, once."}\n' * 30,
    }.items():
        (tiny.config.parent / name).write_text(text)
    return tiny


def too_large(path) -> bool:
    """Whether a damaged configuration is valid but asks for a run far too large for a test."""
    try:
        keys = yaml.safe_load(dump_config(load_config(str(path))))
    except UserError:
        return False
    rows = keys["batch_size"] * keys["seq_len"] * keys["grad_accumulation_steps"]
    return max(rows, *keys["model_config"].values()) > 1000


PROMPT = ["--prompt", "a", "--max_new_tokens", "1"]
KINDS = {  # file: the command that reads it, with {} in place of its path
    "tiny.yaml": (train, ["{}", "--dry-run"]),
    "tokens.npz": (train, ["tiny.yaml", "--dry-run"]),
    "texts.jsonl": (train, ["tiny.yaml", "--dry-run", "--data", "{}"]),
    "out/model.pt": (generate, ["{}", *PROMPT]),
    "out/config.yaml": (generate, ["out", *PROMPT]),
    "prefixes.json": (generate, ["out", "--prefixes", "{}", "--max_new_tokens", "1"]),
    "reviews.csv": (classify, ["out", "--data", "{}"]),
    "reviews.jsonl": (classify, ["out", "--data", "{}"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_soak_damage(tiny, kind, monkeypatch, capsys):
    monkeypatch.chdir(tiny.config.parent)
    path, draw, statuses = Path(kind), random.Random(11), []
    whole, damage = path.read_bytes(), damaged_archive if path.suffix in (".npz", ".pt") else damaged
    script, arguments = KINDS[kind][0], [argument.format(kind) for argument in KINDS[kind][1]]
    try:
        for number in range(120):
            path.write_bytes(damage(whole, draw))
            if kind == "tiny.yaml" and too_large(path):
                continue
            statuses.append(status(script, *arguments))
            error = capsys.readouterr().err
            one_line = statuses[-1] in (1, 2) and error.startswith("error: ") and error.count("\n") == 1
            assert statuses[-1] == 0 or one_line, f"{kind}, damage {number}: exit {statuses[-1]}: {error}"
    finally:
        path.write_bytes(whole)
    assert status(script, *arguments) == 0 and 2 in statuses
