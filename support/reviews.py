"""Labelled reviews for classify.py: Yelp polarity, a person's own file, or the bundled sample."""

import csv
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from support.errors import UserError, first_line, require
from support.hub import DATA, Unavailable, hub_file, verify_checksum
from support.text import read_jsonl

# The dataset repository on the Hugging Face Hub, and the one file of its test split.
YELP = ("fancyzhx/yelp_polarity", "plain_text/test-00000-of-00001.parquet")
LABELS = {"0": 0, "1": 1}
YELP_LABELS = {"1": 0, "2": 1}  # in the csv files of the original release


@dataclass(frozen=True)
class Reviews:
    """Texts with their labels: 0 negative, 1 positive."""

    name: str
    texts: list[str]
    labels: list[int]
    note: str | None = None  # what the reader of the results must know; printed loudly


def load_reviews(
    data: str | None, limit: int, seed: int = 42, fits: Callable[[str], bool] = lambda text: True
) -> Reviews:
    """The first `limit` shuffled reviews for which `fits(text)` holds; fewer when the data hold fewer.

    `data` is a .csv or .jsonl with text and label; 'yelp', the test split of Yelp polarity, fetched at the first
    use; or 'sample'. None is yelp where it can be had, else the sample, with a note. Raises UserError for a bad
    file, and when no review fits.
    """
    name, note, reviews = data, None, None
    if data is None or data == "yelp":
        try:
            name, reviews = "Yelp polarity, test split", _read_yelp(hub_file(*YELP, "yelp_test.parquet"))
        except Unavailable as error:
            remedy = "try again with a network, or give --data sample"
            require(data is None, f"--data yelp: it is not in data/ and cannot be fetched ({error}); {remedy}")
            data = "sample"
            note = (
                "NOTE: this is NOT Yelp but the bundled sample of product reviews, so its accuracies are not "
                f"comparable with Yelp's; {YELP[0]} cannot be fetched ({error})."
            )
    if data == "sample":
        name, reviews = "bundled sample of product reviews", list(_read_file(DATA / "reviews.jsonl"))
    elif reviews is None:
        reviews = list(_read_file(Path(data)))
    random.Random(seed).shuffle(reviews)
    chosen = list(islice((review for review in reviews if fits(review[0])), limit))
    require(bool(chosen), f"{name}: none of the {len(reviews)} reviews fits the model; give shorter ones")
    texts, labels = zip(*chosen, strict=True)
    return Reviews(name, list(texts), list(labels), note)


def _read_yelp(path: Path) -> list[tuple[str, int]]:
    from pyarrow import parquet  # comes with datasets

    verify_checksum(path)  # compares it with what was fetched
    try:
        columns = parquet.read_table(path, columns=["text", "label"]).to_pydict()
    except Exception as error:  # a foreign file fails in a dozen ways inside pyarrow
        remedy = "delete it, and it is fetched again"
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {remedy}") from None
    return list(zip(map(_unescape, columns["text"]), columns["label"], strict=True))


def _unescape(text: str) -> str:
    """A text of Yelp's original release, which writes line breaks and quotes with a backslash."""
    return text.replace("\\n", "\n").replace('\\"', '"')


def _read_file(path: Path) -> Iterator[tuple[str, int]]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give a .csv or .jsonl with text and label")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        for number, record in read_jsonl(path):
            yield _review(record["text"], record.get("label"), LABELS, f"{path}, line {number}")
    elif path.suffix == ".csv":
        yield from _read_csv(path)
    else:
        raise UserError(f"{path}: neither .csv nor .jsonl; give one of these, with text and label")


def _read_csv(path: Path) -> Iterator[tuple[str, int]]:
    """A file with text and label in its header, or Yelp's original release: no header, label before text."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)  # strict: an open quote would swallow the rest of the file
            first = next(rows, [])
            names = [name.strip().lower() for name in first]
            is_yelp = len(first) == 2 and first[0] in YELP_LABELS
            if not is_yelp and not {"text", "label"} <= set(names):
                raise UserError(f"{path}, line 1: no header with text and label; add the line text,label")
            text, label = (1, 0) if is_yelp else (names.index("text"), names.index("label"))
            for row in chain([first] if is_yelp else [], rows):
                where = f"{path}, line {rows.line_num}"
                if len(row) not in (0, len(first)):
                    raise UserError(f"{where}: {len(row)} fields, {len(first)} in line 1; quote the text")
                if row and is_yelp:
                    yield _review(_unescape(row[text]), row[label], YELP_LABELS, where)
                elif row:
                    yield _review(row[text], row[label], LABELS, where)
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: not csv ({error}); mend its quotes") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it") from None


def _review(text: str, label: object, known: dict[str, int], where: str) -> tuple[str, int]:
    if str(label).strip() not in known:
        raise UserError(f"{where}: the label is {label!r}; it must be {' or '.join(known)}")
    if not text.strip():
        raise UserError(f"{where}: the text is empty; add it or drop the line")
    return text, known[str(label).strip()]
