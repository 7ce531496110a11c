"""Random damage to every kind of file: the command succeeds or ends with one sentence and exit status 2."""

import io
import json
import random
import zipfile

import pytest
import yaml
from tiny_run import TinyRun, status

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
        new = draw.choice(
            [b"", piece[::-1], draw.randbytes(length), draw.randbytes(1), piece * 2, draw.choice(HOSTILE)]
        )
        content[at : at + draw.choice([0, length])] = new
    return bytes(content[: draw.choice([len(content)] * 19 + [draw.randrange(len(content) + 1)])])


def damaged_archive(content: bytes, draw: random.Random) -> bytes:
    """Damage anywhere in a zip file, or inside an entry (most often the first) with a checksum that fits."""
    if draw.random() < 0.3:
        return damaged(content, draw)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as archive:
        names = source.namelist()
        hit = draw.choice([names[0]] * 3 + names)
        for name in names:
            data = source.read(name)
            archive.writestr(name, damaged(data, draw) if name == hit else data)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A finished run, with a file of each kind."""
    tiny = TinyRun(tmp_path_factory.mktemp("damage"))
    assert tiny.main() == 0
    folder = tiny.config.parent
    (folder / "prefixes.json").write_text(json.dumps(["It is", {"prefix": "a “b”"}]))
    (folder / "reviews.csv").write_text('text,label\n"good, really",1\nbad,0\n')
    (folder / "reviews.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n')
    (folder / "texts.jsonl").write_text('{"text": "A city and its people, once."}\n' * 30)
    return tiny


def too_large(path) -> bool:
    """Whether a damaged configuration is valid but asks for a run far too large for a test."""
    try:
        keys = yaml.safe_load(dump_config(load_config(str(path))))
    except UserError:
        return False
    sizes = [
        keys["batch_size"] * keys["seq_len"] * keys["grad_accumulation_steps"],
        *keys["model_config"].values(),
    ]
    return max(sizes) > 1000


KINDS = [
    "tiny.yaml",
    "tokens.npz",
    "texts.jsonl",
    "model.pt",
    "config.yaml",
    "prefixes.json",
    "reviews.csv",
    "reviews.jsonl",
]


@pytest.mark.parametrize("kind", KINDS)
def test_soak_damage(tiny, kind, capsys):
    folder, draw, n_good = tiny.config.parent, random.Random(11), 0
    path = tiny.out / kind if kind in ("model.pt", "config.yaml") else folder / kind
    whole, damage = path.read_bytes(), damaged_archive if kind in ("tokens.npz", "model.pt") else damaged
    prompt = [tiny.out, "--prompt", "a", "--max_new_tokens", "1"]
    dry = [tiny.config, "--dry-run", "--set", f"output_dir={folder / 'new'}"]
    line = {
        "tiny.yaml": (train, dry),
        "tokens.npz": (train, dry),
        "texts.jsonl": (train, [*dry, "--data", path]),
        "model.pt": (generate, prompt),
        "config.yaml": (generate, prompt),
        "prefixes.json": (generate, [tiny.out, "--prefixes", path, "--max_new_tokens", "1"]),
    }.get(kind, (classify, [tiny.out, "--data", path]))
    try:
        for number in range(120):
            path.write_bytes(damage(whole, draw))
            if kind == "tiny.yaml" and too_large(path):
                continue
            got = status(*[line[0], *line[1]])
            error = capsys.readouterr().err
            one_line = error.startswith("error: ") and error.count("\n") == 1
            assert got == 0 or (got == 2 and one_line), f"{kind}, damage {number}: exit {got}: {error}"
            n_good += got == 0
    finally:
        path.write_bytes(whole)
    assert status(*[line[0], *line[1]]) == 0 and n_good < 120
