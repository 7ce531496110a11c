"""Check a solution as the course will, and put it into a zip file.

    python tests/submit.py ANDREW_ID --checkpoint outputs/final/model.pt --report answers.pdf

Prints `[OK]`, or `[FAIL]` with a remedy, for each requirement of the course and for the points of the tests. If
all are met, or with --force, it writes ANDREW_ID.zip into the current folder.
"""

import argparse
import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from support.errors import UserError, exit_on_user_error, require  # noqa: E402
from support.files import atomic_file  # noqa: E402
from support.screen import bold, heading  # noqa: E402

CODE = ("model.py", "train.py", "generate.py", "classify.py")
ALLOWED = {"torch", "numpy", "yaml", "wandb", "datasets", "tqdm", "tiktoken"}  # the assignment's packages
ALLOWED |= sys.stdlib_module_names | {name.removesuffix(".py") for name in CODE} | {"support"}
# What the homework never needs, but what could reach the process or the tests that grade it
ALLOWED -= {"_thread", "atexit", "builtins", "concurrent", "ctypes", "importlib", "multiprocessing", "pkgutil"}
ALLOWED -= {"pty", "runpy", "signal", "site", "socket", "subprocess", "threading", "unittest"}
UNSAFE = {"__import__", "__builtins__", "exec", "eval", "os._exit", "os.abort", "os.fork", "os.getppid", "os.kill"}
UNSAFE |= {"os.killpg", "os.popen", "os.setsid", "os.system", "sys._getframe", "sys.modules", "sys.setprofile"}
UNSAFE |= {"sys.settrace", "gc.get_objects", "gc.get_referrers", "inspect.currentframe", "inspect.stack"}
READY_MADE = {"Transformer", "TransformerEncoder", "TransformerEncoderLayer", "TransformerDecoder"}
READY_MADE |= {"TransformerDecoderLayer", "MultiheadAttention", "multi_head_attention_forward"}
READY_MADE |= {"scaled_dot_product_attention", "flex_attention"}
MOST_MEGABYTES, MOST_FLOPS = 100, 1e17
MAKE_PDF = "make it from report/template.tex, or name it with --report"
# sha256 of every model.pt that the package has shipped with
SHIPPED_SHA256 = frozenset({"7867b933b8997c03d6579ea370373f9039eca0df7a6b537d3a435bb98651b28f"})


def broken_rules(name: str, source: bytes) -> Iterator[tuple[str, bool]]:
    """What the assignment does not allow in a graded file: (sentence, whether the file can still be run)."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deep
        line = f", line {error.lineno}," if isinstance(error, SyntaxError) and error.lineno else ""
        problem = getattr(error, "msg", None) or f"{error}" or "nested too deep"
        yield f"{name}{line} is not valid Python ({problem}); fix it", False
        return
    for node in ast.walk(tree):
        names, packages = [getattr(node, "attr", ""), getattr(node, "id", "")], []
        dotted = [getattr(node, "id", ""), f"{getattr(getattr(node, 'value', ''), 'id', '')}.{names[0]}"]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = packages = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            packages, dotted = [node.module or "."], [f"{node.module}.{name}" for name in names]
        # main() may use support; `check_alone` finds an import of it at the top of a file.
        for package in {path.partition(".")[0] or "." for path in packages} - ALLOWED:
            yield f"{name}, line {node.lineno}, imports '{package}': not allowed; remove it", False
        for word in UNSAFE.intersection(dotted):
            yield f"{name}, line {node.lineno}, uses {word}: not allowed; remove it", False
        for word in READY_MADE.intersection(names):
            yield f"{name}, line {node.lineno}, uses {word}; write it with tensor operations", True


def check_code(files: dict[str, Path]) -> str:
    """The four files exist, are valid Python, and import and use only what the assignment allows."""
    files |= {name: ROOT / name for name in CODE}  # all of them, also for --force
    for name in CODE:
        require(files[name].is_file(), f"{name} is missing; put it into {ROOT}")
        for sentence, _ in broken_rules(name, files[name].read_bytes()):
            raise UserError(sentence)
    return f"{', '.join(CODE)}: allowed imports only, no ready-made layers"


def check_alone(files: dict[str, Path]) -> str:
    """The four files load and run in a folder with only the tests beside them."""
    with tempfile.TemporaryDirectory() as folder:

        def run(*arguments: str) -> subprocess.CompletedProcess:
            command = [sys.executable, "-E", *arguments]  # -E: no PYTHONPATH
            return subprocess.run(command, cwd=folder, capture_output=True, text=True)

        for name in CODE:
            shutil.copy(files[name], folder)
        others = shutil.ignore_patterns("package", "__pycache__")
        shutil.copytree(ROOT / "tests", f"{folder}/tests", ignore=others)
        imported = run("-c", "import model, train, generate, classify")
        error = imported.stderr.strip().rpartition("\n")[2]
        require(imported.returncode == 0, f"the files do not run alone ({error}); import nothing of your own")
        tested = run("-m", "pytest", "-p", "no:cacheprovider", "--points-json=points", "tests")
        points = Path(folder, "points")
        require(points.exists(), f"the tests did not run ({tested.stdout.strip()[-200:]}); try pytest tests/")
        parts = json.loads(points.read_text(encoding="utf-8"))["tests"]
    got, full = (sum(part[key] for part in parts) for key in ("score", "max_score"))
    lost = [part["name"] for part in parts if part["score"] < part["max_score"]]
    require(not lost, f"the tests give {got} of {full} points, lost: {', '.join(lost)}; run pytest tests/")
    return f"the files run alone and get {got} of {full} points in the tests"


def load_own_model(path: Path):
    """The TrainedModel in a model.pt, its megabytes and training FLOPs. UserError if it is against the rules."""
    from support.checkpoint import load_trained_model  # here, because it imports model.py

    trained = load_trained_model(None, str(path))
    shipped = hashlib.sha256(path.read_bytes()).hexdigest() in SHIPPED_SHA256
    require(not shipped, f"{path} came with the package; hand in one of your own")
    megabytes = path.stat().st_size / 1e6
    limit = f"the course takes under {MOST_MEGABYTES}; train a smaller model"
    require(megabytes < MOST_MEGABYTES, f"{path} has {megabytes:.1f} MB, {limit}")
    c = trained.config
    tokens = c.num_training_steps * c.grad_accumulation_steps * c.batch_size * c.seq_len
    flops = trained.model.flops_per_token * tokens
    require(flops <= MOST_FLOPS, f"{path} took {flops:.3g} FLOPs, more than the 1e17 allowed; train fewer steps")
    return trained, megabytes, flops


def check_checkpoint(files: dict[str, Path], named: str | None) -> str:
    """model.pt is the student's own, small enough, and loads with the config.yaml beside it."""
    from support.checkpoint import find_checkpoint

    path = find_checkpoint(None, named)[0]
    files |= {"model.pt": path, "config.yaml": path.parent / "config.yaml"}
    require(path.name == "model.pt", f"{path}: the course asks for the exact name model.pt; rename it")
    _, megabytes, flops = load_own_model(path)
    return f"{path}: {megabytes:.1f} MB, fits the config.yaml beside it, {flops:.3g} of 1e17 FLOPs"


def check_report(files: dict[str, Path], name: str, path: str | None) -> str:
    """There is a PDF of the written answers: the named one, or the only one in the root or report/."""
    found = [Path(path)] if path else sorted([*ROOT.glob("*.pdf"), *ROOT.glob("report/*.pdf")])
    require(len(found) <= 1, f"several PDFs ({', '.join(pdf.name for pdf in found)}); name one with --report")
    require(bool(found) and found[0].is_file(), f"{path or 'the PDF of your answers'} is missing; {MAKE_PDF}")
    require(found[0].read_bytes()[:5] == b"%PDF-", f"{found[0]} is not a PDF; {MAKE_PDF}")
    files[name] = found[0]
    return f"{found[0]}: the written answers, packed as {name}"


def main(argv: list[str] | None = None) -> None:
    """Print the checks and write the zip file."""
    parser = argparse.ArgumentParser(prog="python tests/submit.py", description="Check and pack a solution.")
    parser.add_argument("andrew_id", metavar="ANDREW_ID", help="names the zip file")
    parser.add_argument("--checkpoint", help="your final model.pt (default: the newest in outputs/)")
    parser.add_argument("--report", metavar="PDF", help="your answers (default: the PDF here or in report/)")
    parser.add_argument("--force", action="store_true", help="write the zip file even if checks fail")
    args = parser.parse_args(argv)
    files, failed = {}, []  # {name in the zip file: where it is}, the checks that failed

    def passes(check, *arguments) -> bool:
        try:
            print(f"[OK] {check(files, *arguments)}", flush=True)
        except Exception as error:  # the student's code may raise anything
            print(f"[FAIL] {error if isinstance(error, UserError) else f'your code raised {error!r}; fix it'}")
            failed.append(check)
        return check not in failed

    with exit_on_user_error():
        require(bool(re.fullmatch("[a-z][a-z0-9]*", args.andrew_id)), f"'{args.andrew_id}' is not an Andrew ID")
        heading(f"submit {args.andrew_id}")
        if passes(check_code):
            passes(check_alone)
        passes(check_checkpoint, args.checkpoint)
        passes(check_report, f"{args.andrew_id}.pdf", args.report)
        n_failed = f"{len(failed)} check{'s' * (len(failed) > 1)} failed"
        require(not failed or args.force, f"{n_failed}, nothing is packed; fix it, or pack as it is with --force")
        target = Path(f"{args.andrew_id}.zip")
        with atomic_file(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, path in files.items():
                if path.is_file():
                    archive.write(path, name)
        verdict = f"WARNING: {n_failed}, packed anyway" if failed else "Ready to hand in"
        print("\n" + bold(f"{verdict}: {target}") + f" ({target.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
