"""Write the student's edition of this package: the same files, with the graded bodies left to write.

    python tests/instructor/make_starter.py OUT_DIR

Both editions come from one source. A graded function keeps its signature and docstring; its body becomes
`raise NotImplementedError("question 1.3: …")`. Helpers that only the solution needs are left out, and the few
places that name them are edited by the tables below, as are the README's sections that tell results. A table that
no longer fits the files stops with an error, so that it cannot fall behind them.
"""

import argparse
import ast
import re
import shutil
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What the student's edition has; a pattern may match nothing only where it names no single file.
COPIED = (
    *("README.md", "LICENSE", "requirements.txt", "pyproject.toml", ".gitignore", "prefixs.json"),
    # Of the configurations only those that answer no question: tuning (2.5) and the final model (2.6) do.
    *("configs/GPT-tiny.yaml", "configs/smoke.yaml", "data/*", "support/*.py", "report/template.tex"),
    *("tests/conftest.py", "tests/points.py", "tests/test_*.py", "tests/package/test_parity.py"),
)
# What was fetched, whole or in part.
NOT_COPIED = {f"data/{name}{suffix}" for name in ("tokens.npz", "yelp_test.parquet") for suffix in ("", ".json")}
NOT_COPIED_SUFFIXES = (".npy", ".tmp", ".lock")

# The graded functions and classes by file, with their question. Of a class every method is graded …
GRADED = {
    "model.py": dict.fromkeys(("MultiHeadAttention", "FeedForward", "DecoderBlock", "DecoderLM"), "1.3"),
    "train.py": dict.fromkeys(
        (
            "train",
            "random_batch_sampler",
            "sequential_batch_sampler",
            "cosine_lr_schedule",
            "compute_language_modeling_loss",
        ),
        "2.1",
    ),
    "generate.py": dict.fromkeys(("softmax_with_temperature", "generate"), "3.1"),
    "classify.py": dict.fromkeys(("score", "classify_binary_sentiment"), "3.4"),
}
# … but this one. All else that is kept as it is:
GIVEN = {
    "model.py": {"Dropout", "DecoderLM.flops_per_token"},
    "train.py": {*("RUNNING_MEAN_STEPS", "set_lr", "StepResult", "evaluate", "training_flops", "main")},
    "generate.py": {"main"},
    "classify.py": {"YELP_TEMPLATE", "YELP_LABEL_MAP", "main"},
}
# Helpers that contain a graded body, or that only a faster one needs.
DROPPED = {
    "model.py": {"MOST_SCORES", "KeyValueCache", "DecoderLM.kv_caches", "DecoderLM.next_token_logits"},
    "train.py": {"_ChunkedCrossEntropy", "_loss_and_gradients", "LanguageModelingLoss", "_loss_module"},
    "generate.py": {*("keep_likely", "left_pad", "encode_prompt", "last_logits", "_continue_batch")},
    "classify.py": {"TOKENS_PER_BATCH", "_batches_of_like_length", "p_positive", "decision_boundary"},
}
DROPPED_PARAMETERS = {"cache", "caches", "n_past", "top_k", "top_p"}  # keyword-only, theirs

# The names that a constructor must create are part of the interface: tests and checkpoints meet them.
CONSTRUCTORS = {
    "MultiHeadAttention": """Create q_attn, k_attn, v_attn and proj (Linear D -> D with bias), dropout, and
        the buffer scale_factor (a scalar, 1 / sqrt(HD)).""",
    "FeedForward": "Create linear_in (Linear D -> 4 D), linear_out (Linear 4 D -> D) and dropout.",
    "DecoderBlock": "Create ln_1, mha, ln_2 and ff; p_dropout is for both mha and ff.",
    "DecoderLM": """Create token_embeddings (Embedding V x D), position_embeddings (Embedding P x D), blocks (a
        ModuleList), ln and dropout; p_dropout is for every dropout. Keep the arguments as attributes, and
        initialise the weights.""",
}

# Sections of the README, up to the next heading of their level, that tell results or solutions.
README_SECTIONS = (
    *("What you see", "Results", "Speed", "Nothing lost", "For instructors", "Deviations from the handout"),
)

# (file, text, what the student's edition has in its place); each text stands there exactly once.
# ruff: noqa: E501 (as long as they are there)
EDITS = [
    ("README.md", "This is the complete package of the homework", "This is the student's edition of the homework"),
    (
        "README.md",
        """the solution, its tests with the points per
question, and all it needs to run on a laptop without a GPU, an account or, once installed, a network.
""",
        """the functions to write, their
tests with the points per question, and all it needs to run on a laptop without a GPU, an account or, once
installed, a network.
""",
    ),
    (
        "README.md",
        """In a hurry? A small trained model comes along, so

    python generate.py --prefixes prefixs.json --temperature 0.7
    python classify.py model.pt
    python train.py configs/smoke.yaml

take seconds: sample from it, classify with it, and a training run of half a minute.
""",
        "In a hurry? `python train.py configs/smoke.yaml` is a training run of half a minute.\n",
    ),
    ("README.md", "Run all tests (about 2 minutes), which end", "Run all tests (half a minute), which end"),
    ("README.md", "for the questions; tests/package/ for the rest", "for the questions, with points"),
    (
        "README.md",
        "answers to the written questions; reproduce.py repeats their experiments",
        "template.tex for your answers",
    ),
    (
        "README.md",
        """    docs/        more than fits here
    model.pt config.yaml    the final model of question 2.6
""",
        "",
    ),
    (
        "README.md",
        """Two committed files are over 1 MB: `data/sample.npz` (2.2 MB) lets training start offline, and `model.pt` (7.3 MB), the
final model of question 2.6, lets everything else.
""",
        "`data/sample.npz` (2.2 MB), the one file over 1 MB, lets training start offline.\n",
    ),
    (
        "README.md",
        """`configs/tune-1e15-*.yaml` and `final-1e17.yaml` are for the course's budgets on C4;
[docs/scaling.md](docs/scaling.md) says what they take on larger hardware, [docs/data.md](docs/data.md) more on data.
""",
        "",
    ),
    ("README.md", "`classification.json`, `.png` |", "`classification.json` |"),
    (
        "README.md",
        "| `pytest tests/ -m soak` | the long tests (10 minutes) |\n",
        """| `pytest tests/ -k embed` | only the tests with that word in their names |
| `python -m support.submit ANDREW_ID --checkpoint PATH` | checks what you hand in and packs it |
""",
    ),
    (
        "README.md",
        "Read `model.py` from top to bottom to learn the transformer, then `train.py`, `generate.py` and `classify.py`.",
        """Write what raises `NotImplementedError` in `model.py`, then in `train.py`, `generate.py` and `classify.py`; the
docstrings say what each function takes and gives. After each, run the tests: they end with your points, and the
first line of a failure says what was expected, what came, and the likely mistake. The answers to the written
questions go into `report/template.tex`; `python -m support.submit ANDREW_ID` checks and packs all you hand in.
The commands below work once the functions are written.""",
    ),
    ("README.md", " --top_p 0.9", ""),
    ("model.py", "the two classes before it only save time", "the class before it only saves time"),
    (
        "model.py",
        """ With a key-value
        cache there are more keys (S_k) than queries (S_q): the queries are the last S_q tokens.

        q (B, H, S_q, HD), kT (B, H, HD, S_k), v (B, H, S_k, HD) -> (B, S_q, D)
        attention_mask (B, S_k): 1.0""",
        """

        q (B, H, S, HD), kT (B, H, HD, S), v (B, H, S, HD) -> (B, S, D)
        attention_mask (B, S): 1.0""",
    ),
    (
        "model.py",
        """ With a cache, x holds the new tokens and the mask covers all.

        On a CPU the sequences go through in groups whose scores fit its caches; they never meet anyway.
        \"""",
        '"',
    ),
    ("model.py", "With an attention_mask (B, n_past + S) positions", "With an attention_mask (B, S) positions"),
    ("model.py", " `n_past` tokens before these are already in the cache.", ""),
    (
        "model.py",
        """

        With `caches` (from `kv_caches`), input_ids are the tokens that follow those already read, and
        attention_mask covers both.
        \"""",
        '"',
    ),
    (
        "train.py",
        """(Loshchilov and Hutter 2017, "SGDR", eq. 5).

    With a = num_warmup_steps and b = num_training_steps, the learning rate of step t is

        max_lr t / a                                                      for t in [0, a)
        min_lr + (max_lr - min_lr) (1 + cos(pi (t - a) / (b - a))) / 2    for t in [a, b)
        min_lr                                                            for t >= b
    \"""",
        """(Loshchilov and Hutter 2017, "SGDR").

    The function returned maps a step t to its learning rate, as question 2.2 describes it with
    a = num_warmup_steps and b = num_training_steps.
    \"""",
    ),
    (
        "train.py",
        """ This is the definition; `LanguageModelingLoss`
    computes the same without ever holding all logits.
""",
        "\n",
    ),
    (
        "train.py",
        """; if it has an attribute `recent_losses` (a
    deque), the running mean lives there and so can be continued by a later call.""",
        ".",
    ),
    (
        "train.py",
        """ `model` may
    also be its LanguageModelingLoss, distributed or compiled.
""",
        "\n",
    ),
    ("train.py", "loss = LanguageModelingLoss(model)", "loss = model"),
    ("train.py", "    loss_of = _loss_module(model).eval()\n", "    model.eval()\n"),
    (
        "train.py",
        """                with autocast:
                    loss = loss_of(input_ids)
                total_loss""",
        """                with autocast:
                    loss = compute_language_modeling_loss(input_ids, model(input_ids))
                total_loss""",
    ),
    (
        "generate.py",
        """    parser.add_argument("--top_k", type=int, metavar="K", help="sample from the K likeliest tokens only")
    parser.add_argument("--top_p", type=float, metavar="P", help="sample from the likeliest tokens of mass P")
""",
        "",
    ),
    (
        "generate.py",
        """        require(args.top_k is None or args.top_k >= 1, f"--top_k {args.top_k}: give 1 or more")
        require(args.top_p is None or 0 < args.top_p <= 1, f"--top_p {args.top_p}: give more than 0, at most 1")
""",
        "",
    ),
    (
        "generate.py",
        """        limits = [f"{name} {value:g}" for name in ("top_k", "top_p") if (value := getattr(args, name))]
""",
        "",
    ),
    ("generate.py", "[sampling, *limits, *seed,", "[sampling, *seed,"),
    ("generate.py", "            top_k=args.top_k,\n            top_p=args.top_p,\n", ""),
    (
        "classify.py",
        """    Texts of like length go through the model together (at most batch_size of them), so that little is
    padding. Of a text longer than n_positions the last tokens count. `tokenizer`""",
        """    At most batch_size texts go through the model together. Of a text longer than n_positions the last
    tokens count. `tokenizer`""",
    ),
    (
        "classify.py",
        'tokens [negative id, positive id] -> N ints."',
        """tokens [negative id, positive id] -> N ints.

    p(positive) is the softmax over the two tokens; the boundary is 0.5, with calibrate=True that of question 3.6.
    \"""",
    ),
    ("classify.py", "        p = p_positive(logits, tokens)\n        accuracy, boundaries,", "        accuracy,"),
    ("classify.py", "predictions = {}, {}, {}\n", "predictions = {}, {}\n"),
    ("classify.py", "            boundaries[name] = decision_boundary(p, calibrate)\n", ""),
    ("classify.py", "        auc = area_under_roc(p.numpy(), labels.numpy())\n", ""),
    ("classify.py", 'accuracy {name}, boundary {boundaries[name]:.4f}")', 'accuracy {name}")'),
    (
        "classify.py",
        """this set's majority class")
        print(f"  {auc:6.3f}  AUC: 0.5 is chance, 1 ranks every positive above every negative\\n")
""",
        """this set's majority class\\n")
""",
    ),
    ("classify.py", '            "boundary": boundaries,\n', ""),
    ("classify.py", '            "auc": auc,\n', ""),
    ("classify.py", '            "p-positive": p.tolist(),\n', ""),
    ("classify.py", '        figure = trained.folder / "classification.png"\n', ""),
    (
        "classify.py",
        """        plot_classification(p.numpy(), labels.numpy(), boundaries, f"{trained.path}, {reviews.name}", figure)
""",
        "",
    ),
    ("classify.py", "/classification.json, .png", "/classification.json"),
    ("classify.py", "write classification.json and .png beside", "write classification.json beside"),
    ("classify.py", "    from support.metrics import area_under_roc\n", ""),
    ("classify.py", "    from support.plots import plot_classification\n", ""),
]


def edited(name: str) -> str:
    """The text of a file after EDITS. Raises ValueError when one of them does not fit."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for file, old, new in EDITS:
        if file == name:
            if text.count(old) != 1:
                raise ValueError(f"{name}: {text.count(old)} times instead of once: {old!r}; mend EDITS")
            text = text.replace(old, new)
    return text


def student_readme() -> str:
    """The README without README_SECTIONS. Raises ValueError when one of them is not there."""
    text = edited("README.md")
    for title in README_SECTIONS:
        text, found = re.subn(rf"^## {title}\n.*?(?=^## |\Z)", "", text, flags=re.DOTALL | re.MULTILINE)
        if found != 1:
            raise ValueError(f"README.md: {found} sections '## {title}' instead of one; mend README_SECTIONS")
    return text


def student_source(name: str) -> str:
    """The text of a graded file as the student gets it."""
    text = edited(name)
    lines = text.splitlines()
    found = definitions(ast.parse(text))
    if gone := (DROPPED[name] | GIVEN[name]) - {path for _, path in found}:
        raise ValueError(f"{name}: {', '.join(sorted(gone))} not there; mend DROPPED and GIVEN")
    # From the end, so that the line numbers of what comes before stay right.
    for node, path in sorted(found, key=lambda item: -item[0].lineno):
        owner = path.rpartition(".")[0]
        question = GRADED[name].get(path) or GRADED[name].get(owner)
        if isinstance(node, ast.ImportFrom):
            if {alias.name for alias in node.names} <= DROPPED.get(f"{node.module}.py", set()):
                del lines[node.lineno - 1 : node.end_lineno]
        elif path in DROPPED[name]:
            _cut(lines, node)
        elif path in GIVEN[name] or owner in DROPPED[name] | GIVEN[name] or isinstance(node, ast.ClassDef):
            continue
        elif question:
            lines[node.lineno - 1 : node.end_lineno] = _stub(node, path, question).splitlines()
        else:
            raise ValueError(f"{name}: say in GRADED, GIVEN or DROPPED what becomes of {path}")
    return "\n".join(lines) + "\n"


def definitions(tree: ast.Module) -> list[tuple[ast.stmt, str]]:
    """Imports, constants, functions, classes and methods with their names, such as DecoderLM.embed."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            found.append((node, f"from {node.module}"))
        if isinstance(node, ast.Assign):
            found.append((node, node.targets[0].id))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append((node, node.name))
        if isinstance(node, ast.ClassDef):
            found += [(n, f"{node.name}.{n.name}") for n in node.body if isinstance(n, ast.FunctionDef)]
    return found


def _cut(lines: list[str], node: ast.stmt) -> None:
    """Take the definition out, with its decorators and the blank lines before it."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while first > 0 and not lines[first - 1].strip():
        first -= 1
    del lines[first : node.end_lineno]


def _stub(node: ast.FunctionDef, path: str, question: str) -> str:
    """The function with its signature and docstring, and nothing written yet."""
    docstring = ast.get_docstring(node, clean=False)
    body = []
    if node.name == "__init__":
        docstring = CONSTRUCTORS[path.partition(".")[0]]
        body.append("super().__init__()")
    body.append(f'raise NotImplementedError("question {question}: {path} is not written yet")')
    if docstring:
        body.insert(0, f'"""{docstring}"""')
    return textwrap.indent(_signature(node), " " * node.col_offset) + "".join(
        f"\n{' ' * (node.col_offset + 4)}{line}" for line in body
    )


def _signature(node: ast.FunctionDef) -> str:
    """The `def` line, without DROPPED_PARAMETERS; one parameter to a line where it would be too long."""
    a = node.args
    plain, keyword_only = list(a.posonlyargs + a.args), list(zip(a.kwonlyargs, a.kw_defaults, strict=True))
    defaults = [None] * (len(plain) - len(a.defaults)) + list(a.defaults)
    parameters = [_parameter(*pair) for pair in zip(plain, defaults, strict=True)]
    kept = [_parameter(arg, default) for arg, default in keyword_only if arg.arg not in DROPPED_PARAMETERS]
    parameters += ["*", *kept] if kept else []
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"def {node.name}({', '.join(parameters)}){result}:"
    if len(line) + node.col_offset > 110:
        line = f"def {node.name}(\n" + "".join(f"    {p},\n" for p in parameters) + f"){result}:"
        line = line.replace("nullcontext(),", "nullcontext(),  # noqa: B008 (stateless)")
    return line


def _parameter(arg: ast.arg, default: ast.expr | None) -> str:
    text = f"{arg.arg}: {ast.unparse(arg.annotation)}" if arg.annotation else arg.arg
    if default is not None:
        text += f" = {ast.unparse(default)}" if arg.annotation else f"={ast.unparse(default)}"
    return text


def copied_files() -> list[Path]:
    """The files that both editions share, relative to the root. Raises FileNotFoundError when one lacks."""
    files = []
    for pattern in COPIED:
        found = sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern) if path.is_file())
        if not found:
            raise FileNotFoundError(f"{pattern}: nothing of that name in {ROOT}")
        files += found
    return [f for f in files if f.as_posix() not in NOT_COPIED and not f.name.endswith(NOT_COPIED_SUFFIXES)]


def make_starter(folder: Path) -> None:
    """Write the student's edition into an empty or new folder."""
    # All texts first, so that nothing is written when one of them fails.
    texts = {name: student_source(name) for name in GRADED} | {"README.md": student_readme()}
    for file in copied_files():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, target)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Write the student's edition and say what is in it."""
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
