"""The Hugging Face Hub as far as this package needs it, and a quick answer where it cannot be reached.

What is fetched is kept in data/, or in the user's cache folder where data/ cannot be written. A file gets its
name only when it is whole and has the sha256 that the hub announced; `<name>.json` beside it holds size and
sha256. HF_ENDPOINT names another hub; HF_HUB_OFFLINE=1 forbids to ask any.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from support.errors import first_line, in_background, require
from support.files import write_atomically

DATA = Path(__file__).resolve().parent.parent / "data"
PATIENCE_SECONDS = 8


class Unavailable(Exception):
    """The hub does not give what was asked of it; the message says why in a few words."""


def writable_or_cache_path(path: Path) -> Path:
    """The path or, where its folder cannot be written, one for it in the user's cache folder."""
    if path.exists() or os.access(path.parent, os.W_OK):
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decoder-from-scratch"
    return cache / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16] / path.name


def check_allowed() -> None:
    """Raise Unavailable where the person forbids to ask the hub."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise Unavailable("HF_HUB_OFFLINE is set")


def ask(question: Callable, *args, **options):
    """`question(*args, **options)` of the hub's client; Unavailable when that fails or takes too long."""
    check_allowed()
    # In a thread, because no timeout of an HTTP client bounds the time of the name look-up.
    outcome = in_background(lambda: question(*args, **options))
    try:
        return outcome.result(PATIENCE_SECONDS)
    except Exception as error:  # whatever the client raises: the hub is not there for us
        late = f"no answer within {PATIENCE_SECONDS} seconds"
        raise Unavailable(reason(error) if outcome.done() else late) from None


def reason(error: Exception) -> str:
    """An error of the hub's client in a few words."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"the hub answers HTTP {status}" if status else f"{type(error).__name__}: {first_line(error)}"


def hub_file(repo: str, filename: str, name: str) -> Path:
    """The path of a file of a dataset repository, kept under this name; it is fetched when it is not there.

    Raises Unavailable, and no file has changed then.
    """
    target = writable_or_cache_path(DATA / name)
    if not target.exists():
        try:
            check_allowed()
            print(f"{name} is not in data/: asking the Hugging Face Hub for it.", flush=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_name(f".{name}.lock")):  # the system releases it with its owner
                if not target.exists():  # else another process has fetched it meanwhile
                    _fetch(repo, filename, target)
        except Unavailable:
            raise
        except Exception as error:  # a broken connection, a full disk: the client raises dozens of kinds
            raise Unavailable(reason(error)) from None
    return target


def _fetch(repo: str, filename: str, target: Path) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    # The files are public, and an outdated token would be refused: token=False.
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    options = {"endpoint": endpoint, "token": False}
    url = hf_hub_url(repo, filename, repo_type="dataset", endpoint=endpoint)
    # Asked first and alone, because the client tries an unreachable hub again for more than a minute.
    facts = ask(get_hf_file_metadata, url, timeout=PATIENCE_SECONDS, **options)
    if facts.commit_hash is None or facts.size is None:
        raise Unavailable("what answers is no hub but a web page; does this network ask for a login?")
    print(f"Fetching {url}, {facts.size / 1e6:,.1f} MB, once. Ctrl-C stops it.", flush=True)
    staging = target.with_name(f".{target.name}.download")
    options |= {"local_dir": staging, "etag_timeout": PATIENCE_SECONDS}
    path = Path(hf_hub_download(repo, filename, repo_type="dataset", **options))
    description = verify_checksum(path)
    if re.fullmatch("[0-9a-f]{64}", facts.etag) and facts.etag not in description:
        path.unlink()
        raise Unavailable(f"the sha256 of what came is not {facts.etag}, which the hub had announced")
    write_atomically(target.with_name(f"{target.name}.json"), description)
    os.replace(path, target)
    shutil.rmtree(staging)
    print(f"It is {target} now.", flush=True)


def verify_checksum(path: Path) -> str:
    """Size and sha256 of a file as JSON. UserError when it was fetched and is no longer what came."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    description = json.dumps({"size": path.stat().st_size, "sha256": digest.hexdigest()})
    record = path.with_name(f"{path.name}.json")
    require(
        not record.exists() or record.read_text(errors="replace") == description,
        f"{path}: altered since it was fetched ({record.name} says another size or sha256); "
        "delete both, and it is fetched again",
    )
    return description
