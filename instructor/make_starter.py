"""Write the student's edition of this package: the same files, with the graded bodies left to write.

    python instructor/make_starter.py OUT_DIR

A graded function keeps its signature and docstring; its body becomes `raise NotImplementedError("question …")`.
Helpers that only the solution needs are left out. A definition that no table below names is an error.
"""

import argparse
import ast
import re
import shutil
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = Path(__file__).resolve().parent / "starter_README.md"

# What both editions have; a pattern that matches no file is an error.
COPIED = (
    *("LICENSE", "requirements.txt", "pyproject.toml", ".gitignore", "prefixs.json", "report/template.tex"),
    "docs/assignment.md",
    # Of the configurations only those that answer no question: tuning (2.5) and the final model (2.6) do.
    *("configs/GPT-tiny.yaml", "configs/smoke.yaml", "support/*.py", "tests/*.py", "tests/mistakes/*.py"),
    *("data/README.md", "data/*.py", "data/gpt2.tiktoken", "data/sample.npz", "data/*.jsonl"),
    *("data/heldout-wikipedia.*",),
)

# The functions to write with their question; of a class, its methods.
GRADED = {
    "model.py": dict.fromkeys(("MultiHeadAttention", "FeedForward", "DecoderBlock", "DecoderLM"), "1.3"),
    "train.py": {
        **dict.fromkeys(("random_batch_sampler", "sequential_batch_sampler", "cosine_lr_schedule"), "2.1"),
        **dict.fromkeys(("compute_language_modeling_loss", "train"), "2.1"),
    },
    "generate.py": {"softmax_with_temperature": "3.1", "generate": "3.1"},
    "classify.py": {
        **dict.fromkeys(("score", "p_positive", "classify_binary_sentiment"), "3.4"),
        "decision_boundary": "3.6",
    },
}
GIVEN = {"DecoderLM.flops_per_token", "set_lr", "StepResult", "evaluate", "training_flops", "parse_arguments"}
GIVEN |= {"keep_likely", "main"}
DROPPED = {"left_pad", "encode_prompt"}

# The names that a constructor must create: tests and checkpoints rely on them.
CONSTRUCTORS = {
    "MultiHeadAttention": """Create q_attn, k_attn, v_attn and proj (Linear D -> D with bias), the buffer
scale_factor (a scalar, 1 / sqrt(HD)) and dropout, applied to the attention weights after the softmax and to the
output of proj.
""",
    "FeedForward": "Create linear_in (Linear D -> 4 D), linear_out (Linear 4 D -> D) and dropout, for the result.",
    "DecoderBlock": "Create ln_1, mha, ln_2 and ff; p_dropout is for both mha and ff.",
    "DecoderLM": """Create token_embeddings (Embedding V x D), position_embeddings (Embedding P x D), blocks (a
ModuleList), ln (applied after the last block) and dropout (to the sum of the embeddings); p_dropout is for every
dropout. Keep the arguments as attributes, and initialise the weights.
""",
}

# The docstring of decision_boundary answers a written question; TASK takes its place.
ANSWER = re.compile(r"(?<=0\.5 or, calibrated, )the median of .*? are then called positive\.\n", re.DOTALL)
TASK = """a value that depends only on all p (N,).

    Question 3.6 asks for it. Texts with equal p(positive) must get equal labels.
"""


def student_source(name: str) -> str:
    """The text of a graded file in the student's edition."""
    text, n_answers = ANSWER.subn(TASK, (ROOT / name).read_text(encoding="utf-8"))
    if n_answers != (name == "classify.py"):
        raise ValueError(f"{name}: {n_answers} texts match ANSWER; it is for decision_boundary only")
    lines = text.splitlines()
    # From the end, so that the line numbers before stay valid.
    for node, path in reversed(definitions(ast.parse(text))):
        owner = path.rpartition(".")[0]
        question = GRADED[name].get(path) or GRADED[name].get(owner)
        if path in DROPPED:
            start = node.lineno - 1
            while not lines[start - 1].strip():
                start -= 1
            del lines[start : node.end_lineno]
        elif path in GIVEN or owner in GIVEN or isinstance(node, ast.ClassDef) and question:
            continue
        elif question:
            first = node.body[0]
            end_of_docstring = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
            lines[end_of_docstring : node.end_lineno] = stub(node, path, question)
        else:
            raise ValueError(f"{name}: {path} is in none of GRADED, GIVEN and DROPPED")
    imports = [f"from {Path(file).stem} import {', '.join(sorted(DROPPED))}" for file in GRADED]
    return "\n".join(line for line in lines if line not in imports) + "\n"


def definitions(tree: ast.Module) -> list[tuple[ast.FunctionDef | ast.ClassDef, str]]:
    """Functions, classes and methods in their order, with their names, such as DecoderLM.embed."""
    found = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append((node, node.name))
        if isinstance(node, ast.ClassDef):
            found += [(n, f"{node.name}.{n.name}") for n in node.body if isinstance(n, ast.FunctionDef)]
    return found


def stub(node: ast.FunctionDef, path: str, question: str) -> list[str]:
    """The lines that take the place of the function's body."""
    lines = [f'raise NotImplementedError("question {question}: {path} is not written yet")']
    if node.name == "__init__":
        lines = [f'"""{CONSTRUCTORS[path.partition(".")[0]]}"""', "super().__init__()", *lines]
    return textwrap.indent("\n".join(lines), " " * node.body[0].col_offset).splitlines()


def make_starter(folder: Path) -> None:
    """Write the student's edition to an empty or new folder."""
    texts = {name: student_source(name) for name in GRADED}  # first, so that an error leaves nothing behind
    for pattern in COPIED:
        found = [path for path in ROOT.glob(pattern) if path.is_file()]
        if not found:
            raise FileNotFoundError(f"no file {pattern} in {ROOT}")
        for path in found:
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    shutil.copyfile(README, folder / "README.md")
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Write the student's edition and print the next command."""
    parser = argparse.ArgumentParser(description="Write the student's edition of this package.")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="a new or empty folder")
    folder = parser.parse_args(argv).out_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        print(f"error: {folder}: exists and is not an empty folder; choose another", file=sys.stderr)
        raise SystemExit(2)
    make_starter(folder)
    print(f"{folder}: {sum(path.is_file() for path in folder.rglob('*'))} files. Next: cd {folder}; pytest tests/")


if __name__ == "__main__":
    main()
