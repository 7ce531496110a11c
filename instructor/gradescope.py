"""Build autograder.zip for Gradescope; its run_autograder grades with grade.py.

    python instructor/gradescope.py autograder.zip --test-tokens test.npz

The zip has no solution. Only with test tokens, which question 2.6 is measured on, it has the model and `evaluate`;
hand-ins run as a separate user, who can read neither these nor the results.
"""

import argparse
import json
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

import grade  # noqa: E402  (it puts the package on the path)

from support.errors import exit_on_user_error, first_line  # noqa: E402
from support.files import atomic_file, json_text, write_atomically  # noqa: E402

PACKED = ("tests/*.py", "tests/mistakes/*.py", "support/*.py", "requirements.txt")
PACKED += tuple(f"instructor/{name}.py" for name in ("grade", "child", "examine", "gradescope"))
PACKED_WITH_TOKENS = ("model.py", "train.py", "data/gpt2.tiktoken")
TEST_TOKENS = "test_tokens.npz"
SECONDS_IN_ALL, SECONDS_PERPLEXITY = 300, 240  # together less than Gradescope's usual limit of 10 minutes
SETUP = """#!/usr/bin/env bash
set -e
apt-get update
apt-get install -y python3 python3-venv
python3 -m venv /opt/grader
/opt/grader/bin/pip install -r /autograder/source/requirements.txt
"""
RUN = """#!/usr/bin/env bash
base=$(dirname "$(readlink -f "$0")")
mkdir -p "$base/results"
echo '{"score": 0, "output": "The grading did not end. Tell the course staff."}' > "$base/results/results.json"
exec "${PYTHON:-/opt/grader/bin/python}" "$base/source/instructor/gradescope.py" --run "$base"
"""


def build(out: Path, test_tokens: Path | None) -> None:
    """Write the zip file; the tests to expect are collected now, with the solution."""
    expected, _ = grade.begin(test_tokens, [])
    patterns = PACKED + (PACKED_WITH_TOKENS if test_tokens else ())
    with atomic_file(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
            archive.write(path, path.relative_to(ROOT))
        archive.writestr("instructor/expected.json", json.dumps(expected))
        for name, text in (("setup.sh", SETUP), ("run_autograder", RUN)):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o755 << 16
            archive.writestr(entry, text)
        if test_tokens:
            archive.write(test_tokens, TEST_TOKENS)
    print(f"{out}: {len(expected)} tests; upload it under Configure Autograder")


def run(base: Path) -> None:
    """Grade base/submission and write base/results/results.json."""
    for folder in ("source", "submission", "results"):
        (base / folder).chmod(0o700)  # closed to the user that hand-ins run as
    grade.SECONDS_IN_ALL, grade.SECONDS_PERPLEXITY = SECONDS_IN_ALL, SECONDS_PERPLEXITY
    test_tokens = ROOT / TEST_TOKENS if (ROOT / TEST_TOKENS).exists() else None
    try:
        expected, separate = grade.begin(test_tokens, [base / "results"])
        with tempfile.TemporaryDirectory() as folder:
            path = zipped(base / "submission", Path(folder))
            result = grade.grade(path, expected, test_tokens, 0 if separate else None)
        tests = [
            {
                "name": f"{row['question']} {row['part']}",
                "score": row["points"],
                "max_score": row["max"],
                "output": row["output"] or "all tests passed",
            }
            for row in result["rows"]
        ]
        answer = {"score": grade.total(result)[0], "output": "\n".join(result["notes"]), "tests": tests}
    except Exception as error:  # whatever happens, there are results
        answer = {"score": 0, "output": f"Not graded: {type(error).__name__}: {first_line(error)}"}
    write_atomically(base / "results" / "results.json", json_text(answer))


def zipped(submission: Path, folder: Path) -> Path:
    """The submission as a zip file: the one in it, or its files and those of the folders in it."""
    if len(found := list(submission.glob("*.zip"))) == 1:
        return found[0]
    path = folder / "submission.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in [*submission.glob("*"), *submission.glob("*/*")]:
            if file.is_file() and not file.is_symlink():
                archive.write(file, file.relative_to(submission))
    return path


def main(argv: list[str] | None = None) -> None:
    """Build the zip file, or be what Gradescope runs."""
    parser = argparse.ArgumentParser(description="Build autograder.zip for Gradescope.")
    parser.add_argument("out", metavar="ZIP", type=Path, nargs="?", default=Path("autograder.zip"))
    parser.add_argument("--test-tokens", type=Path, metavar="NPZ", help="measure question 2.6 on its `val` tokens")
    parser.add_argument("--run", type=Path, metavar="BASE", help="grade BASE/submission, as run_autograder does")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        run(args.run) if args.run else build(args.out, args.test_tokens)


if __name__ == "__main__":
    main()
