"""Build autograder.zip for Gradescope; its run_autograder grades with grade.py.

    python instructor/gradescope.py autograder.zip --test-tokens test.npz

The zip has no solution. Test tokens, which question 2.6 is measured on, come with it if given.
"""

import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

import grade  # noqa: E402  (it puts the package on the path)

from support.errors import ArgumentParser, exit_on_user_error, first_line  # noqa: E402
from support.files import atomic_file, json_text, write_atomically  # noqa: E402

PACKED = (*grade.COPIED, "requirements.txt")
PACKED += tuple(f"instructor/{name}.py" for name in ("grade", "child", "table", "perplexity", "gradescope"))
TOKENS = "test_tokens.npz"
# Gradescope's usual limit is 10 minutes in all.
grade.SECONDS_FILE, grade.SECONDS_GROUP, grade.SECONDS_PERPLEXITY = 60, 20, 180
SETUP = """#!/usr/bin/env bash
set -e
apt-get update
apt-get install -y python3 python3-venv
python3 -m venv /opt/grader
/opt/grader/bin/pip install -r /autograder/source/requirements.txt einops omegaconf
"""
RUN = """#!/usr/bin/env bash
base=$(dirname "$(readlink -f "$0")")
mkdir -p "$base/results"
echo '{"score": 0, "output": "The grading did not finish. Tell the course staff."}' > "$base/results/results.json"
exec "${PYTHON:-/opt/grader/bin/python}" "$base/source/instructor/gradescope.py" --run "$base"
"""


def build(out: Path, test_tokens: Path | None) -> None:
    """Write the zip file; the tests to expect are collected now, with the solution."""
    if test_tokens:
        grade.check_test_tokens(test_tokens)
    expected = grade.expected_tests()
    with atomic_file(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for pattern in PACKED for path in ROOT.glob(pattern)):
            archive.write(path, path.relative_to(ROOT))
        archive.writestr("instructor/expected.json", json.dumps(expected))
        for name, text in (("setup.sh", SETUP), ("run_autograder", RUN)):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o755 << 16
            archive.writestr(entry, text)
        if test_tokens:
            archive.write(test_tokens, TOKENS)
    print(f"{out}: {sum(map(len, expected.values()))} tests; upload it under Configure Autograder")


def run(base: Path) -> None:
    """Grade base/submission, a zip file or the files of one, and write base/results/results.json."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            zips = [file for file in (base / "submission").iterdir() if file.suffix.lower() == ".zip"]
            if len(zips) != 1:  # Gradescope has unpacked it
                zips = [Path(shutil.make_archive(f"{folder}/submission", "zip", base / "submission"))]
            tokens = ROOT / TOKENS if (ROOT / TOKENS).exists() else None
            result = grade.grade(zips[0], grade.expected_tests(), tokens)
        tests = [
            {"name": f"{r['question']} {r['part']}", "score": r["points"], "max_score": r["max"]}
            | {"output": r["output"] or "all tests passed"}
            for r in result["rows"]
        ]
        notes = [note for note in result["notes"] if not note.startswith("look at ")]
        notes += [f"optional, no points: {advice}" for advice in result["advice"]]
        answer = {"score": grade.total(result)[0], "output": "\n".join(notes), "tests": tests}
    except Exception as error:  # whatever happens, there are results
        answer = {"score": 0, "output": f"Not graded: {type(error).__name__}: {first_line(error)}"}
    write_atomically(base / "results" / "results.json", json_text(answer))


def main(argv: list[str] | None = None) -> None:
    """Build the zip file, or be what Gradescope runs."""
    parser = ArgumentParser(description="Build autograder.zip for Gradescope.")
    parser.add_argument("out", metavar="ZIP", type=Path, nargs="?", default=Path("autograder.zip"))
    parser.add_argument("--test-tokens", type=Path, metavar="NPZ", help="measure question 2.6 on its `val` tokens")
    parser.add_argument("--run", type=Path, metavar="BASE", help="grade BASE/submission, as run_autograder does")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        run(args.run) if args.run else build(args.out, args.test_tokens)


if __name__ == "__main__":
    main()
