"""Check a solution as the course will, and put it into a zip file.

    python tests/submit.py ANDREW_ID --checkpoint outputs/final/model.pt --report answers.pdf

Prints `[OK]`, or `[FAIL]` with a remedy, for each requirement of the course and for the points of the tests. If
all are met, or with --force, it writes ANDREW_ID.zip into the current folder.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from support.errors import ArgumentParser, UserError, exit_on_user_error, first_line, require  # noqa: E402
from support.files import atomic_file  # noqa: E402
from support.screen import bold, heading  # noqa: E402

CODE = ("model.py", "train.py", "generate.py", "classify.py")
PACKAGES = {"torch", "numpy", "yaml", "wandb", "datasets", "tqdm", "tiktoken", "einops", "omegaconf"}
ALLOWED = PACKAGES | sys.stdlib_module_names | {name.removesuffix(".py") for name in CODE} | {"support"}
READY_MADE = {"Transformer", "TransformerEncoder", "TransformerEncoderLayer", "TransformerDecoder"}
READY_MADE |= {"TransformerDecoderLayer", "MultiheadAttention", "multi_head_attention_forward"}
READY_MADE |= {"scaled_dot_product_attention", "flex_attention"}
# This homework does not need it, and it could change the tests: a grader looks at such a line.
UNUSUAL = re.compile(
    r"(?<![.\w])(exec|eval|__import__)\(|__builtins__|\bsys\.(modules|_getframe|set)|\b(_exit|abort|fork|kill)\("
    r"|^\s*(torch|nn|F|np|numpy|pytest)\.\w+ = |^main\(|\bos\.(system|popen|exec)"
    r"|^\s*(import|from) .*\b(atexit|builtins|ctypes|gc|importlib|inspect|signal|subprocess|thread\w*|unittest)\b"
)
MOST_MEGABYTES, MOST_FLOPS = 100, 1e17


def inspect_code(name: str, source: bytes) -> dict[str, list[str]]:
    """What is wrong with a graded file: {"refused": why it cannot run, "ready-made": …, "flags": to look at}."""
    found = {"refused": [], "ready-made": [], "flags": []}
    try:
        tree = ast.parse(source, name)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deep
        return found | {"refused": [f"{name} is not valid Python: {first_line(error)}; fix it"]}
    forbidden = {}
    for node in ast.walk(tree):
        names = {getattr(node, "attr", ""), getattr(node, "id", "")}
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names}
            paths = names if isinstance(node, ast.Import) else {f"{'.' * node.level}{node.module or ''}"}
            packages = {path.partition(".")[0] or "." for path in paths}
            forbidden |= {package: node.lineno for package in packages - ALLOWED}
        for word in sorted(names & READY_MADE):
            found["ready-made"].append(f"{name}, line {node.lineno}, uses {word}; write it with tensor operations")
    if forbidden:
        imports = ", ".join(f"'{package}' (line {line})" for package, line in sorted(forbidden.items()))
        found["refused"].append(f"{name} imports {imports}: not allowed; remove it")
    for number, line in enumerate(source.decode(errors="replace").split("\n"), start=1):
        if UNUSUAL.search(line):
            found["flags"].append(f"{name}, line {number}: {line.strip()[:80]}")
    return found


def check_code(files: dict[str, Path]) -> str:
    """The four files exist, are valid Python, and import and use only what the assignment allows."""
    files |= {name: ROOT / name for name in CODE}  # all of them, also for --force
    for name in CODE:
        require(files[name].is_file(), f"{name} is missing; put it into {ROOT}")
    found = [inspect_code(name, files[name].read_bytes()) for name in CODE]
    problems = [sentence for one in found for sentence in one["refused"] + one["ready-made"]]
    require(not problems, "\n       ".join(problems))
    for sentence in [sentence for one in found for sentence in one["flags"]]:
        print(f"note: unusual, a grader will look at {sentence}")
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
        error = imported.stderr.strip().rpartition("\n")[2] or "it ended at import: does main() run there?"
        require(imported.returncode == 0, f"the files do not run alone ({error}); import nothing of your own")
        tested = run("-m", "pytest", "-p", "no:cacheprovider", "--points-json=points", "tests")
        points = Path(folder, "points")
        require(points.exists(), f"the tests did not run ({tested.stdout.strip()[-200:]}); try pytest tests/")
        rows = json.loads(points.read_text(encoding="utf-8"))
    got, full = sum(row["points"] or 0 for row in rows), sum(row["max"] for row in rows)
    lost = [f"{row['question']} {row['part']}" for row in rows if not row["points"]]
    require(not lost, f"the tests give {got} of {full} points, lost: {', '.join(lost)}; run pytest tests/")
    return f"the files run alone and get {got} of {full} points in the tests"


def load_own_model(path: Path):
    """The TrainedModel in a model.pt, its megabytes and training FLOPs. UserError if it is against the rules."""
    from support.checkpoint import load_trained_model  # here, because it imports model.py

    trained = load_trained_model(None, str(path), "cpu")
    megabytes = path.stat().st_size / 1e6
    require(megabytes < MOST_MEGABYTES, f"{path} has {megabytes:.1f} MB; train a model under {MOST_MEGABYTES} MB")
    c, size = trained.config, trained.config.model_config
    n_parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    tokens = c.num_training_steps * c.grad_accumulation_steps * c.batch_size * c.seq_len
    flops = (6 * n_parameters + 12 * size.n_layer * size.n_embd * size.n_positions) * tokens
    require(flops <= MOST_FLOPS, f"{path} took {flops:.3g} FLOPs, more than the 1e17 allowed; train fewer steps")
    return trained, megabytes, flops


def check_checkpoint(files: dict[str, Path], named: str | None) -> str:
    """model.pt is small enough, and loads with the config.yaml beside it."""
    from support.checkpoint import find_checkpoint

    path = find_checkpoint(None, named)[0]
    files |= {"model.pt": path, "config.yaml": path.parent / "config.yaml"}
    require(path.name == "model.pt", f"{path}: the course asks for the exact name model.pt; rename it")
    _, megabytes, flops = load_own_model(path)
    return f"{path}: {megabytes:.1f} MB, fits the config.yaml beside it, {flops:.3g} of 1e17 FLOPs"


def check_report(files: dict[str, Path], name: str, path: Path) -> str:
    """The written answers are a PDF."""
    remedy = "make it from report/template.tex, or name it with --report"
    require(path.is_file(), f"{path} is missing; {remedy}")
    require(path.read_bytes()[:5] == b"%PDF-", f"{path} is not a PDF; {remedy}")
    files[name] = path
    return f"{path}: the written answers, packed as {name}"


def main(argv: list[str] | None = None) -> None:
    """Print the checks and write the zip file."""
    parser = ArgumentParser(description="Check and pack a solution.")
    parser.add_argument("andrew_id", metavar="ANDREW_ID", help="names the zip file")
    parser.add_argument("--checkpoint", help="your final model.pt (default: the newest in outputs/)")
    parser.add_argument("--report", metavar="PDF", help="your answers (default: report/answers.pdf)")
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
        passes(check_report, f"{args.andrew_id}.pdf", Path(args.report or ROOT / "report/answers.pdf"))
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
