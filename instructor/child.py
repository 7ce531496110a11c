"""Runs Python and the tests on a hand-in, in a process of its own with limits; for grade.py."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

from submit import CODE

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("tests/*.py", "tests/mistakes/*.py", "support/*.py", "data/gpt2.tiktoken")
MEMORY_KB, FILE_KB = 4 << 20, 64 << 10
# Without a network, tiktoken.get_encoding("gpt2") gives the bundled vocabulary.
SITE = "from tiktoken import registry\nfrom support.tokenizer import get_tokenizer\n"
SITE += "registry.ENCODINGS['gpt2'] = get_tokenizer()\n"


def run_python(folder: Path, arguments: list[str], seconds: float) -> tuple[int | None, str]:
    """Run Python in the folder, within limits: its exit status (None: timed out) and its last output."""
    (folder / "home").mkdir(exist_ok=True)
    limits = f'ulimit -c 0 -d {MEMORY_KB} -f {FILE_KB} && exec "$0" "$@"'
    own = dict.fromkeys(("HOME", "TMPDIR"), str(folder / "home")) | {"PYTHONPATH": str(folder)}
    own |= {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"}
    own |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", limits, sys.executable, "-B", "-X", "faulthandler", *arguments],
            cwd=folder,
            env=own | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        status = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # faulthandler then prints the line where it hangs
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, (folder / "output.txt").read_text(errors="replace")[-20_000:]


def why_it_ended(status: int | None, output: str) -> str:
    """A sentence on how Python ended, with the line of the hand-in if it was printed."""
    places = re.findall(rf'File "[^"]*?({"|".join(map(re.escape, CODE))})", line (\d+)', output)
    why = "timed out: is there an infinite loop?"
    if status == 1 and "Traceback" in output:
        places = places[::-1]  # a traceback ends with the innermost line, faulthandler's begins with it
        why = output.strip().rpartition("\n")[2]
    elif status is not None:
        why = f"the process ended with {signal.strsignal(-status) if status < 0 else f'exit status {status}'}"
    return (f"{places[0][0]}, line {places[0][1]}: " if places else "") + why


def fresh_folder(top: str | Path, handed_in: Path) -> Path:
    """A new folder with the tests, support/ and the handed-in files."""
    folder = Path(tempfile.mkdtemp(dir=top))
    for path in [path for pattern in COPIED for path in ROOT.glob(pattern)]:
        (folder / path.relative_to(ROOT).parent).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / path.relative_to(ROOT))
    shutil.copytree(handed_in, folder, dirs_exist_ok=True)
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "sitecustomize.py").write_text(SITE)
    return folder


def in_report(node: str) -> tuple[str, str]:
    """(class, test) as pytest's report has them, of a node id."""
    path, bracket, parameters = node.partition("[")
    file, *classes, name = path.split("::")
    return ".".join([file.removesuffix(".py").replace("/", "."), *classes]), name + bracket + parameters


def run_tests(folder: Path, tests: list[str], seconds: float) -> tuple[dict[tuple[str, str], str], str]:
    """{(class, test): "" if it passed, else the first line of its message}, and how pytest ended."""
    options = ["-q", "-s", "--junitxml=report.xml", "-c", "pytest.ini", "--rootdir=."]
    options += ["-p", "no:cacheprovider", "-p", "no:faulthandler"]
    status, output = run_python(folder, ["-m", "pytest", *options, *tests], seconds)
    found = {}
    with suppress(OSError, ElementTree.ParseError):
        for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
            test = case.get("classname"), case.get("name")
            bad = [part for part in case if part.tag in ("failure", "error", "skipped")]
            message = (bad[0].get("message") or bad[0].tag).splitlines()[0] if bad else ""
            found[test] = "reported twice" if test in found else message
    return found, why_it_ended(status, output)
