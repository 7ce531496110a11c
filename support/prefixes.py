"""The prompts of generate.py: a JSON list of texts or of {"prefix": text}, or one of these a line."""

import json
from pathlib import Path

from support.errors import UserError

BUNDLED = Path(__file__).resolve().parent.parent / "prefixs.json"


def read_prefixes(path: str | None) -> list[str]:
    """The prefixes in file order (None: the bundled prefixs.json). UserError names a bad entry's place."""
    path = BUNDLED if path is None else Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason}); give a JSON list of texts") from None
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(f"{path}{where}: not valid JSON ({error}); mend the list") from None
        placed = [(f"entry {number}", entry) for number, entry in enumerate(entries, start=1)]
    else:
        placed = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    placed.append((f"line {number}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {number}: not valid JSON ({error}); mend the line") from None
    if not placed:
        raise UserError(f"{path}: holds no prefix; give a JSON list of texts")
    return [_prefix(path, where, entry) for where, entry in placed]


def _prefix(path: Path, where: str, entry) -> str:
    text = entry.get("prefix") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise UserError(f'{path}, {where}: {str(entry)[:60]!r} is neither a text nor {{"prefix": text}}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}, {where}: holds half a surrogate pair, which is no character") from None
    return text
