"""Write the student's edition of this package: the same files, with the graded bodies left to write.

    python instructor/make_starter.py OUT_DIR

A graded function keeps its signature and docstring; its body becomes `raise NotImplementedError("question …")`.
Helpers that only the solution needs are left out. The tables below say what becomes of each definition; one that
no longer fits the files is an error.
"""

import argparse
import ast
import shutil
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = Path(__file__).resolve().parent / "starter_README.md"

# What both editions have; a pattern that matches no file is an error.
COPIED = (
    *("LICENSE", "requirements.txt", "pyproject.toml", ".gitignore", "prefixs.json", "report/template.tex"),
    # Of the configurations only those that answer no question: tuning (2.5) and the final model (2.6) do.
    *("configs/GPT-tiny.yaml", "configs/smoke.yaml", "data/*", "support/*.py"),
    *("tests/*.py", "tests/mistakes/*.py"),
)
# Downloads and temporary files
NOT_COPIED = {"data/tokens.npz", "data/yelp_test.parquet"}
NOT_COPIED_SUFFIXES = (".npy", ".tmp", ".lock")

# The functions and classes to write, with their question; of a class all methods but those in GIVEN.
GRADED = {
    "model.py": dict.fromkeys(("MultiHeadAttention", "FeedForward", "DecoderBlock", "DecoderLM"), "1.3"),
    "train.py": {
        "random_batch_sampler": "2.1",
        "sequential_batch_sampler": "2.1",
        "cosine_lr_schedule": "2.1",
        "compute_language_modeling_loss": "2.1",
        "train": "2.1",
    },
    "generate.py": {"softmax_with_temperature": "3.1", "generate": "3.1"},
    "classify.py": {
        "score": "3.4",
        "p_positive": "3.4",
        "decision_boundary": "3.6",
        "classify_binary_sentiment": "3.4",
    },
}
# Definitions that stay as they are.
GIVEN = {
    "model.py": {"DecoderLM.flops_per_token"},
    "train.py": {
        *("RUNNING_MEAN_STEPS", "set_lr", "plain_loss", "StepResult", "evaluate"),
        *("training_flops", "parse_arguments", "main"),
    },
    "generate.py": {"keep_likely", "main"},
    "classify.py": {"YELP_TEMPLATE", "YELP_LABEL_MAP", "TEXTS_PER_SLICE", "main"},
}
# Helpers of the solution, left out.
DROPPED = {
    "model.py": set(),
    "train.py": set(),
    "generate.py": {
        *("sample_next_token", "left_pad", "encode_prompt", "inference", "last_token_logits", "CachedDecoder"),
    },
    "classify.py": set(),
}

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

# Docstrings that differ: no answers to written questions, but the rules that the solution's helpers follow.
# (file, text, its replacement); each text occurs exactly once.
EDITS = [
    (
        "train.py",
        """    loss_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    grad_clip: float | None = None,
    start_step: int = 0,
    previous_losses: Iterable[float] = (),
    on_step: Callable[[StepResult], None] | None = None,
) -> None:
    \"""Train the model in place for the steps start_step .. num_training_steps - 1.

""",
        """    loss_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,  # loss = loss_fn(input_ids)
    grad_clip: float | None = None,  # nn.utils.clip_grad_norm_, if it is not None
    start_step: int = 0,  # for step in range(start_step, num_training_steps)
    previous_losses: Iterable[float] = (),  # the running mean starts with the last of them
    on_step: Callable[[StepResult], None] | None = None,  # on_step(StepResult(step, …)), if it is not None
) -> None:
    \"""Train the model in place for the steps start_step .. num_training_steps - 1.

    The model is put into training mode, and called inside `with autocast:`. If a W&B run is active (wandb.run is
    not None), each step logs {"train-loss": …, "learning-rate": …} with its number; the train-loss is the mean
    over the last RUNNING_MEAN_STEPS steps, the loss of a step the mean of its undivided micro-batch losses.

    The options after the * give no points, but train.py passes them, and each is one line of your loop. Start with
    `loss_fn = loss_fn or partial(plain_loss, model)` and take every loss from it: on a CPU, the loss that train.py
    passes makes GPT-tiny about five times as fast, minutes instead of an hour. Without on_step a run shows no
    progress, saves no state to resume from and draws no curve; without start_step it cannot resume.

""",
    ),
    (
        "generate.py",
        """    torch's global generator. `tokenizer` is a tiktoken.Encoding.
    \"""
""",
        """    torch's global generator. `tokenizer` is a tiktoken.Encoding.

    The prefixes of a batch are padded on the left with tokenizer.eot_token, and masked: a greedy text does not
    depend on the rest of its batch. An empty prefix is one `<|endoftext|>`, a real token; in a prefix that text is
    plain characters (encode_ordinary). Dropout is off, and the model's mode, training or evaluation, is restored
    at the end. top_k and top_p, for keep_likely, give no points.
    \"""
""",
    ),
    (
        "generate.py",
        "all mass is on the arg max. Raises",
        "all mass is on the arg max. The logits passed in stay as they are. Raises",
    ),
    (
        "classify.py",
        """Texts of similar length share a batch, so that little is padding. Of a text longer than n_positions only
    the last tokens are read. `tokenizer`""",
        """Of a text longer than n_positions only the last tokens are read; an empty one is one `<|endoftext|>`.
    Batches are padded on the left with tokenizer.eot_token, and masked. Dropout is off, and the model's mode,
    training or evaluation, is restored at the end. `tokenizer`""",
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
    a = num_warmup_steps and b = num_training_steps. Each of the two phases may be empty.
    \"""",
    ),
    (
        "classify.py",
        """0.5 or, calibrated, the median of all p (N,) (question 3.6).

    A model that favours " good" does so for all texts alike. If about half of the texts are positive, the
    median separates the two halves, and needs no labels. torch.median takes the lower of two middle values: of
    an even number of texts without ties, exactly half are then called positive.
    \"""",
        """0.5 or, calibrated, a value that depends only on all p (N,).

    Question 3.6 asks for it. Texts with equal p(positive) must get equal labels.
    \"""",
    ),
]


def edited(name: str) -> str:
    """The text of a file after EDITS. Raises ValueError if one of them does not fit."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for file, old, new in EDITS:
        if file == name:
            if text.count(old) != 1:
                raise ValueError(f"{name}: expected this text once, found it {text.count(old)} times: {old!r}")
            text = text.replace(old, new)
    return text


def student_source(name: str) -> str:
    """The text of a graded file in the student's edition."""
    text = edited(name)
    lines = text.splitlines()
    found = definitions(ast.parse(text))
    if missing := (DROPPED[name] | GIVEN[name]) - {path for _, path in found}:
        raise ValueError(f"{name}: {', '.join(sorted(missing))} in DROPPED or GIVEN, but not in the file")
    # From the end, so that the line numbers before stay valid.
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
            body = _docstring_end(node)
            lines[body : node.end_lineno] = _stub(node, path, question)
        else:
            raise ValueError(f"{name}: {path} is in none of GRADED, GIVEN and DROPPED")
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
    """Remove the definition with its decorators and the blank lines before it."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while first > 0 and not lines[first - 1].strip():
        first -= 1
    del lines[first : node.end_lineno]


def _docstring_end(node: ast.FunctionDef) -> int:
    """The number of lines up to the end of the function's docstring, or of its signature if it has none."""
    first = node.body[0]
    return first.end_lineno if ast.get_docstring(node) else first.lineno - 1


def _stub(node: ast.FunctionDef, path: str, question: str) -> list[str]:
    """The lines that take the place of the function's body."""
    lines = [f'raise NotImplementedError("question {question}: {path} is not written yet")']
    if node.name == "__init__":
        lines = [f'"""{CONSTRUCTORS[path.partition(".")[0]]}"""', "super().__init__()", *lines]
    return textwrap.indent("\n".join(lines), " " * node.body[0].col_offset).splitlines()


def copied_files() -> list[Path]:
    """The files that both editions share, relative to the root. Raises FileNotFoundError if one is missing."""
    files = []
    for pattern in COPIED:
        found = sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern) if path.is_file())
        if not found:
            raise FileNotFoundError(f"no file {pattern} in {ROOT}")
        files += found
    return [f for f in files if f.as_posix() not in NOT_COPIED and not f.name.endswith(NOT_COPIED_SUFFIXES)]


def make_starter(folder: Path) -> None:
    """Write the student's edition to an empty or new folder."""
    texts = {name: student_source(name) for name in GRADED}  # first, so that an error leaves nothing behind
    for file in copied_files():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, target)
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
