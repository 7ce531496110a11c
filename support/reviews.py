"""Labelled reviews for classify.py: Yelp polarity, a person's own file, or the bundled sample."""

import csv
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from support.corpus import DATA, read_jsonl
from support.errors import UserError

YELP = "fancyzhx/yelp_polarity"
HUB_TIMEOUT_SECONDS = 5
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

    `data` is a .csv or .jsonl with text and label, or None: the Yelp polarity test set, or the bundled sample
    (and a note) where that cannot be had. Raises UserError for a bad file, and when no review fits.
    """
    note = None
    if data is not None:
        name, reviews = data, list(_read_file(Path(data)))
    else:
        try:
            name, reviews = "Yelp polarity, test split", _load_yelp()
        except Exception as error:  # no network, cache or disk space, an altered hub: all have this remedy
            name, reviews = "bundled sample of product reviews", list(_read_file(DATA / "reviews.jsonl"))
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            note = (
                "NOTE: this is NOT Yelp but the bundled sample of product reviews, so its accuracies are not "
                f"comparable with Yelp's; {YELP} could not be loaded ({reason})."
            )
    random.Random(seed).shuffle(reviews)
    chosen = list(islice((review for review in reviews if fits(review[0])), limit))
    if not chosen:
        raise UserError(f"{name}: none of the {len(reviews)} reviews fits the model; give shorter ones")
    texts, labels = zip(*chosen, strict=True)
    return Reviews(name, list(texts), list(labels), note)


def _load_yelp() -> list[tuple[str, int]]:
    import datasets

    # Left to itself, the hub's client retries an unreachable server for 23 seconds before it reads the cache.
    if not datasets.config.HF_HUB_OFFLINE and not _hub_answers():
        datasets.config.HF_HUB_OFFLINE = True
    yelp = datasets.load_dataset(YELP, split="test")
    return list(zip(yelp["text"], yelp["label"], strict=True))


def _hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    answers = []

    def ask():
        try:
            response = get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS)
            answers.append(response.status_code < 500)
        except Exception:  # whatever the HTTP client raises: the hub is not there for us
            answers.append(False)

    # In a thread, because no timeout of an HTTP client bounds the time of the name look-up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS)
    return answers == [True]


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
                    unescaped = row[text].replace("\\n", "\n").replace('\\"', '"')
                    yield _review(unescaped, row[label], YELP_LABELS, where)
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
