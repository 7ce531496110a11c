"""Labelled reviews for classify.py: Yelp polarity, the user's own file, or the bundled sample."""

import csv
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from support.errors import UserError, first_line, require
from support.hub import Unavailable, hub_file
from support.paths import DATA
from support.text import read_jsonl

# The dataset repository on the Hugging Face Hub, and the one file of its test split.
YELP = ("fancyzhx/yelp_polarity", "plain_text/test-00000-of-00001.parquet")
SAMPLE_NOTE = (
    "NOTE: this is NOT Yelp, which cannot be downloaded ({}), but the bundled sample of product reviews. Its "
    "accuracies are not comparable with Yelp's."
)


@dataclass(frozen=True)
class Reviews:
    """Texts with their labels: 0 negative, 1 positive."""

    name: str
    texts: list[str]
    labels: list[int]
    rows: list[int]  # their positions in the data, from 0
    n_read: int  # reviews tried until these were found
    note: str | None = None  # what the reader of the results must know; printed loudly


def load_reviews(
    data: str | None, limit: int, seed: int = 42, fits: Callable[[str], bool] = lambda text: True
) -> Reviews:
    """At most `limit` random reviews for which `fits(text)` is true, in the order of the data.

    `data` is a .csv or .jsonl with text and label, 'yelp' (Yelp polarity's test split) or 'sample'. None means
    yelp, or the sample with a note if Yelp is not available. Raises UserError for a bad file or if no review fits.
    """
    note = None
    if data is None or data == "yelp":
        try:
            name, reviews = "Yelp polarity, test split", _read_yelp(hub_file(*YELP, "yelp_test.parquet"))
        except Unavailable as error:
            problem = f"not in data/, and it cannot be downloaded ({error})"
            require(data is None, f"--data yelp: {problem}; retry with a network, or give --data sample")
            data, note = "sample", SAMPLE_NOTE.format(error)
    if data == "sample":
        name, reviews = "bundled sample of product reviews", list(_read_file(DATA / "reviews.jsonl"))
    elif data not in (None, "yelp"):
        name, reviews = data, list(_read_file(Path(data)))
    require(bool(reviews), f"{name}: contains no review; add some or give another file")
    shuffled = list(range(len(reviews)))
    random.Random(seed).shuffle(shuffled)
    fitting = list(islice((n for n, row in enumerate(shuffled) if fits(reviews[row][0])), limit))
    require(bool(fitting), f"{name}: none of the {len(reviews)} reviews fits the model; use shorter ones")
    n_read = fitting[-1] + 1 if len(fitting) == limit else len(reviews)
    rows = sorted(shuffled[n] for n in fitting)
    texts, labels = zip(*(reviews[row] for row in rows), strict=True)
    return Reviews(name, list(texts), list(labels), rows, n_read, note)


def _read_yelp(path: Path) -> list[tuple[str, int]]:
    from pyarrow import parquet  # comes with datasets

    try:
        columns = parquet.read_table(path, columns=["text", "label"]).to_pydict()
    except Exception as error:  # pyarrow raises many types for a file that is not parquet
        problem = f"cannot be read as parquet ({first_line(error)})"
        raise UserError(f"{path}: {problem}; delete it to download it again") from None
    # Line breaks and quotes are escaped in the original data.
    texts = [text.replace("\\n", "\n").replace('\\"', '"') for text in columns["text"]]
    return list(zip(texts, columns["label"], strict=True))


def _read_file(path: Path) -> Iterator[tuple[str, int]]:
    is_jsonl = path.name.endswith((".jsonl", ".jsonl.gz"))
    require(path.is_file(), f"{path}: no such file; give a .csv or .jsonl with text and label")
    require(is_jsonl or path.suffix == ".csv", f"{path}: neither .csv nor .jsonl; convert it")
    for line, record in read_jsonl(path) if is_jsonl else _read_csv(path):
        text, label = record["text"] or "", str(record.get("label")).strip()
        require(label in ("0", "1"), f"{path}, line {line}: the label is {label}; it must be 0 or 1")
        require(bool(text.strip()), f"{path}, line {line}: the text is empty; add it or remove the line")
        yield text, int(label)


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, record) for a csv file with text and label in its header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)  # strict: an open quote would swallow the rest of the file
        try:
            header = list(rows.fieldnames or ())
            missing = [name for name in ("text", "label") if name not in header]
            problem = f"the header {', '.join(map(repr, header)) or '(empty)'} lacks {' and '.join(missing)}"
            require(not missing, f"{path}, line 1: {problem}; name the columns text and label")
            for record in rows:
                problem = f"{path}, line {rows.line_num}: more fields than columns"
                require(None not in record, f"{problem}; put a text that has commas into double quotes")
                yield rows.line_num, record
        except (csv.Error, UnicodeDecodeError) as error:
            where = f"{path}, line {rows.reader.line_num}"
            raise UserError(f"{where}: invalid csv or not UTF-8 text ({error}); fix it") from None
