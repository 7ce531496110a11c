"""Files from the Hugging Face Hub, and a quick answer where it cannot be reached.

Downloaded files are kept in data/, or in the user's cache folder if data/ is not writable. HF_ENDPOINT names
another hub; HF_HUB_OFFLINE=1 forbids any connection.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from support.background import in_background
from support.errors import first_line

DATA = Path(__file__).resolve().parent.parent / "data"
PATIENCE_SECONDS = 8


class Unavailable(Exception):
    """The Hub does not give what was asked for; the message is the reason in a few words."""


def writable_or_cache_path(path: Path) -> Path:
    """The path itself or, if its folder is not writable, a path of that name in the user's cache folder."""
    if path.exists() or os.access(path.parent, os.W_OK):
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decoder-from-scratch"
    return cache / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16] / path.name


def hub_file(repo: str, filename: str, name: str) -> Path:
    """The path of a file of a dataset repository, kept as data/<name>; downloads it if it is not there.

    Raises Unavailable, and then no file has changed.
    """
    target = writable_or_cache_path(DATA / name)
    if target.exists():
        return target
    try:
        check_allowed()
        print(f"{name} is not in data/: asking the Hugging Face Hub for it.", flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{name}.lock")):  # the system releases it when its owner ends
            if not target.exists():  # otherwise another process has downloaded it in the meantime
                _download(repo, filename, target)
    except Unavailable:
        raise
    except Exception as error:  # a broken connection, a full disk: the client raises dozens of types
        raise Unavailable(reason(error)) from None
    return target


def _download(repo: str, filename: str, target: Path) -> None:
    """Download into a folder beside the target and rename when the file is complete and has the right sha256."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    # The files are public, and an expired token would be refused: token=False.
    options = {"endpoint": os.environ.get("HF_ENDPOINT", "").rstrip("/") or None, "token": False}
    url = hf_hub_url(repo, filename, repo_type="dataset", endpoint=options["endpoint"])
    # Asked first and alone, because the download retries an unreachable hub for more than a minute.
    facts = ask(get_hf_file_metadata, url, timeout=PATIENCE_SECONDS, **options)
    if facts.commit_hash is None or facts.size is None:
        raise Unavailable("got a web page instead of the Hub; is there a captive portal?")
    print(f"Downloading {url}, {facts.size / 1e6:,.1f} MB, once. Press Ctrl-C to stop.", flush=True)
    staging = target.with_name(f".{target.name}.download")
    path = hf_hub_download(
        repo, filename, repo_type="dataset", local_dir=staging, etag_timeout=PATIENCE_SECONDS, **options
    )
    if re.fullmatch("[0-9a-f]{64}", facts.etag) and facts.etag != _sha256(Path(path)):
        shutil.rmtree(staging)
        raise Unavailable("the downloaded file is damaged: its sha256 is not the one that the Hub announced")
    os.replace(path, target)
    shutil.rmtree(staging)
    print(f"Saved to {target}.", flush=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def check_allowed() -> None:
    """Raise Unavailable if the user forbids to ask the Hub."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise Unavailable("HF_HUB_OFFLINE is set")


def ask(question: Callable, *args, **options):
    """`question(*args, **options)`, a call of the Hub's client; Unavailable if it fails or takes too long."""
    check_allowed()
    # In a thread, because no timeout of an HTTP client limits the name look-up.
    outcome = in_background(lambda: question(*args, **options))
    try:
        return outcome.result(PATIENCE_SECONDS)
    except Exception as error:  # whatever the client raises
        late = f"no answer within {PATIENCE_SECONDS} seconds"
        raise Unavailable(reason(error) if outcome.done() else late) from None


def reason(error: Exception) -> str:
    """An error of the Hub's client in a few words."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"the Hub answers HTTP {status}" if status else f"{type(error).__name__}: {first_line(error)}"
