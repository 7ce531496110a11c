"""The prompts of generate.py: a JSON list of texts or of {"prefix": text}, or one of these a line."""

import json
from pathlib import Path

from support.errors import UserError, require

BUNDLED = Path(__file__).resolve().parent.parent / "prefixs.json"


def read_prefixes(path: str | None) -> list[str]:
    """The prefixes in file order (None: the bundled prefixs.json). UserError names a bad entry's place."""
    where = path = path or BUNDLED
    entries = {}  # by place
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            entries = {f"{path}, entry {n}": entry for n, entry in enumerate(json.loads(text), start=1)}
        else:
            for n, line in enumerate(text.splitlines(), start=1):
                where = f"{path}, line {n}"
                if line.strip():
                    entries[where] = json.loads(line)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a JSON list of texts") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); give a list of texts, or one text a line") from None
    require(bool(entries), f"{path}: holds no prefix; give a JSON list of texts")
    prefixes = [entry.get("prefix") if isinstance(entry, dict) else entry for entry in entries.values()]
    for where, prefix in zip(entries, prefixes, strict=True):
        require(isinstance(prefix, str), f'{where}: neither a text nor {{"prefix": text}}; mend it')
    return prefixes
