"""Input files: texts, reviews and prompts. What cannot be read is a UserError that names the place."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

from tqdm import tqdm

from support.errors import UserError, first_line, require
from support.files import ROOT

END_OF_TEXT = "<|endoftext|>"


def text_files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder in order of their names, without hidden ones."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    require(bool(files), f"{path}: a folder without texts or tokens; name a folder that has some")
    return files


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a file or of a folder's files, in order.

    Those of JSON or csv are the fields `text`; in any other file `<|endoftext|>` separates them.
    """
    for file in text_files(path):
        if is_json(file) or is_csv(file):
            records = read_json(file) if is_json(file) else read_csv(file)
            yield from (record["text"] or "" for _, record in records)
            continue
        parts = []
        for line in read_lines(file):
            *ends, rest = line.split(END_OF_TEXT)
            for end in ends:
                yield "".join([*parts, end])
                parts = []
            parts.append(rest)
        yield "".join(parts)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, which may be compressed with gzip; of a large one, shows a progress bar."""
    number = 0
    try:
        bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, delay=1, disable=None)
        with path.open("rb") as raw, bar:
            is_gzip = raw.peek(2)[:2] == b"\x1f\x8b"
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if is_gzip else raw, start=1):
                yield line.decode("utf-8" if number > 1 else "utf-8-sig").replace("\r\n", "\n")
                bar.update(raw.tell() - bar.n)
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {number}: not UTF-8 text; save it as UTF-8 (Excel: CSV UTF-8)") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be read ({reason}); choose another file") from None


def is_json(path: Path) -> bool:
    """Whether a file is JSON: by its name, or because it starts as a JSON object does."""
    if any(suffix.lower() in (".json", ".jsonl", ".ndjson") for suffix in path.suffixes):
        return True
    return re.match(r'\s*\{\s*"', next(filter(str.strip, read_lines(path)), "")) is not None


def is_csv(path: Path) -> bool:
    """Whether a file is csv: by its name, or because its first line names the columns `text` and `label`."""
    columns = {column.strip(' "\n').lower() for column in re.split("[,;\t]", next(read_lines(path), ""))}
    return path.name.lower().endswith((".csv", ".tsv", ".csv.gz", ".tsv.gz")) or {"text", "label"} <= columns


def read_json(path: Path, key: str = "text") -> Iterator[tuple[str, dict]]:
    """(place, object) for each entry of JSON lines or of a JSON list; a string counts as {key: string}."""
    lines = ((f"{path}, line {n}", line) for n, line in enumerate(read_lines(path), start=1) if line.strip())
    first = next(lines, (str(path), "[]"))
    if first[1].lstrip().startswith("["):
        text = "".join(line for _, line in chain([first], lines))
        entries = ((f"{path}, entry {n}", entry) for n, entry in enumerate(parse_json(str(path), text), start=1))
    else:
        entries = ((place, parse_json(place, line)) for place, line in chain([first], lines))
    for place, entry in entries:
        record = {key: entry} if isinstance(entry, str) else entry
        valid = isinstance(record, dict) and isinstance(record.get(key), str)
        require(valid, f"{place}: neither a string nor an object with a string '{key}'; fix or remove it")
        yield place, record


def parse_json(place: str, text: str):
    """The value; a UserError names the place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        wanted = "expected a list, or one object per line"
        raise UserError(f"{place}: invalid JSON ({first_line(error)}); {wanted}") from None


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, record) for each row of a csv with a column `text`, separated by commas, semicolons or tabs."""
    csv.field_size_limit(2**31 - 1)
    lines = read_lines(path)
    first = next(lines, "")
    # strict: an open quote would swallow the rest of the file
    rows = csv.reader(chain([first], lines), delimiter=max(",;\t", key=first.count), strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        problem = f"{path}, line 1: no column 'text' in the header {', '.join(header)[:80] or '(empty)'}"
        require("text" in header, f"{problem}; name the columns text and label")
        for row in filter(None, rows):
            problem = f"{path}, line {rows.line_num}: more fields than columns"
            require(len(row) <= len(header), f"{problem}; put a text that has commas into double quotes")
            yield f"{path}, line {rows.line_num}", dict(zip_longest(header, row))
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: invalid csv ({error}); fix it") from None


def read_reviews(path: Path) -> Iterator[tuple[str, int | None]]:
    """(text, label) of each row of a csv, parquet or JSON file, or (line, None) of each line of any other.

    The label is 0 or 1, or None if there is none.
    """
    if path.suffix.lower() == ".parquet":
        records = read_parquet(path)
    elif is_json(path):
        records = read_json(path)
    elif is_csv(path):
        records = read_csv(path)
    else:
        lines = enumerate(read_lines(path), start=1)
        records = ((f"{path}, line {n}", {"text": line.strip()}) for n, line in lines if line.strip())
    known = {"0": 0, "0.0": 0, "1": 1, "1.0": 1, "None": None}
    for place, record in records:
        text, label = record.get("text"), str(record.get("label")).strip()
        require(bool(text and text.strip()), f"{place}: no text in a column 'text'; add it or remove the row")
        require(label in known, f"{place}: the label is {label}; it must be 0 or 1")
        yield text, known[label]


def read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, record) for each row of a parquet file as Yelp polarity's, with line breaks and quotes escaped."""
    from pyarrow import parquet  # comes with datasets

    try:
        rows = parquet.read_table(path, columns=["text", "label"]).to_pylist()
        for n, row in enumerate(rows, start=1):
            text = row["text"].replace("\\n", "\n").replace('\\"', '"')
            yield f"{path}, row {n}", {"text": text, "label": row["label"]}
    except Exception as error:  # pyarrow raises many types for a file that is not parquet
        raise UserError(f"{path}: cannot be read as parquet ({first_line(error)}); choose another file") from None


def read_prefixes(path: str | None) -> list[str]:
    """The prompts of a JSON list or JSON lines, by default prefixs.json: strings, or {"prefix": "…"}."""
    path = Path(path or ROOT / "prefixs.json")
    prefixes = [record["prefix"] for _, record in read_json(path, "prefix")]
    require(bool(prefixes), f"{path}: contains no prefix; expected a JSON list of strings")
    return prefixes
