"""The prompts of generate.py: JSON or JSON lines, each entry a string or an object like {"prefix": "…"}."""

import json
from pathlib import Path

from support.errors import UserError, require
from support.paths import ROOT


def read_prefixes(path: str | None) -> list[str]:
    """The prefixes in file order (None: of prefixs.json). UserError names the entry or line that is wrong."""
    where = path = path or ROOT / "prefixs.json"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            entries = [(f"{path}, entry {n}", entry) for n, entry in enumerate(json.loads(text), start=1)]
        else:
            entries = []
            for n, line in enumerate(text.splitlines(), start=1):
                where = f"{path}, line {n}"
                if line.strip():
                    entries.append((where, json.loads(line)))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a JSON list of strings") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: invalid JSON ({error}); give a list of strings, or one per line") from None
    require(bool(entries), f"{path}: contains no prefix; give a JSON list of strings")
    prefixes = []
    for where, entry in entries:
        prefix = entry.get("prefix") if isinstance(entry, dict) else entry
        require(isinstance(prefix, str), f'{where}: neither a string nor an object like {{"prefix": "…"}}')
        prefixes.append(prefix)
    return prefixes
