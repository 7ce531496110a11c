"""Files from the Hugging Face Hub, and a quick answer where it cannot be reached.

Downloaded files stay in data/. The client, huggingface_hub, resumes broken connections and obeys HF_ENDPOINT (a
mirror) and HF_HUB_OFFLINE=1 (no network).
"""

import os
import shutil
from pathlib import Path

from filelock import FileLock

from support.errors import first_line
from support.paths import DATA

HUB_SECONDS = 8  # to wait for the Hub's first answer


class Unavailable(Exception):
    """The file cannot be fetched from the Hub; the message says why in a few words."""


def hub_file(repo: str, filename: str, name: str) -> Path:
    """The path of a file of a dataset repository, kept as data/<name>; downloads it if it is not there.

    Raises Unavailable, and then no file has changed.
    """
    target = DATA / name
    if not target.exists():
        try:
            _download(repo, filename, target)
        except Exception as error:  # a broken connection, a full disk: the client raises dozens of types
            raise Unavailable(reason(error)) from None
    return target


def _download(repo: str, filename: str, target: Path) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    # Asked first and alone, because the download retries an unreachable Hub for more than a minute.
    # The files are public, and an expired token would be refused: token=False.
    url = hf_hub_url(repo, filename, repo_type="dataset")
    print(f"{target.name} is not in data/: asking the Hugging Face Hub for it.", flush=True)
    facts = get_hf_file_metadata(url, token=False, timeout=HUB_SECONDS)
    if facts.commit_hash is None or facts.size is None:
        raise Unavailable("got a web page instead of the Hub; is there a captive portal?")
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.exists():  # another process downloaded it meanwhile
            return
        print(f"Downloading {url}, {facts.size / 1e6:,.1f} MB, once. Press Ctrl-C to stop.", flush=True)
        staging = target.with_name(f".{target.name}.download")
        path = hf_hub_download(repo, filename, repo_type="dataset", local_dir=staging, token=False)
        os.replace(path, target)
        shutil.rmtree(staging)
        print(f"Saved to {target}.", flush=True)


def reason(error: Exception) -> str:
    """An error of the Hub's client in a few words."""
    if isinstance(error, Unavailable):
        return str(error)
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"the Hub answers HTTP {status}" if status else f"{type(error).__name__}: {first_line(error)}"
