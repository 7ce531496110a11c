"""Grading: what is unpacked, the points and reasons of right, wrong, cheating and broken hand-ins, the tables."""

import csv
import errno
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import child
import grade
import mutants
import numpy as np
import perplexity
import points
import pytest
import table
import torch
import yaml
from right_solutions import POST_LN
from submit import CODE
from tiny_run import KEYS, python, status

from model import DecoderLM

ROOT = Path(grade.ROOT)


def zipped(path: Path, files: dict[str, str | bytes | Path]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content.read_bytes() if isinstance(content, Path) else content)
    return path


class TestUnpack:
    FILES = {name: f"# {name}" for name in (*CODE, "model.pt", "config.yaml")}

    PLACES = {
        "hw2/hw2/{name}": {},
        "hw2\\{name}": {},
        "new/{name}": {"old/model.py": "# old"},
        "{name}/{name}": {},
        "{name}": {"a:b": "", ".": "", "../outside.py": "", "__MACOSX/model.py": "", "conftest.py": "assert 0"},
    }

    @pytest.mark.parametrize("place", PLACES)
    def test_the_files_are_found_among_others(self, tmp_path, place):
        files = {place.format(name=name): text for name, text in self.FILES.items()} | self.PLACES[place]
        (tmp_path / "to").mkdir()
        problems, notes = grade.unpack(zipped(tmp_path / "a.zip", files), tmp_path / "to")
        assert problems == {} and "no PDF" in notes[0]
        assert "conftest.py" not in self.PLACES[place] or "ignored in the zip: " in notes[1]
        assert {path.name: path.read_text() for path in (tmp_path / "to").iterdir()} == self.FILES
        assert not (tmp_path / "outside.py").exists()

    def test_what_is_wrong_costs_its_file_only(self, tmp_path):
        big = self.FILES | {"generate.py": b"#" * (2 << 20), "classify.py": "# a checksum that is wrong"}
        path = zipped(tmp_path / "a.ZIP", {n: t for n, t in big.items() if n != "train.py"})
        with zipfile.ZipFile(path, "a") as archive:
            link = zipfile.ZipInfo("train.py")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
            crc = archive.getinfo("classify.py").CRC.to_bytes(4, "little")
        path.write_bytes(path.read_bytes().replace(crc, b"0000"))
        problems, _ = grade.unpack(path, tmp_path)
        assert {"train.py", "generate.py", "classify.py"} == set(problems)
        assert "link" in problems["train.py"] and "more than 1 MiB" in problems["generate.py"]
        assert "CRC" in problems["classify.py"]

    def test_no_zip_file(self, tmp_path):
        (tmp_path / "folder.zip").mkdir()
        (tmp_path / "link.zip").symlink_to("nowhere")
        (tmp_path / "text.zip").write_bytes(b"PK, but no zip file")
        for path in tmp_path.iterdir():
            problems, _ = grade.unpack(path, tmp_path)
            assert all(f"{path.name} is not a zip file" in problems[name] for name in CODE)


def test_names_and_messages_cannot_break_the_tables_and_a_starter_gets_one_line(tmp_path):
    rows = [{"question": q, "part": p, "max": most, "points": 0} for (q, p), (most, _) in points.GROUPS.items()]
    starter = {"rows": [row | {"output": f"test_x: {row['part']} is not written yet"} for row in rows]}
    odd = {"rows": [row | {"output": "x: expected 'a\tb\x1b[2J'"} for row in rows]}
    odd, starter = (result | {"perplexity": None, "notes": [], "advice": []} for result in (odd, starter))
    table.write_table(tmp_path, {"=1+1": starter, "a\n| b\x07": odd})
    for line in csv.reader(io.StringIO((tmp_path / "grades.csv").read_text())):
        assert not line[0].startswith("=") and all(c.isprintable() for cell in line for c in cell)
    page = (tmp_path / "grades.md").read_text()
    assert len(re.findall(r"(?m)^\| (=1\+1|a\\x0a\\\| b\\x07) \| 0 of 65 ", page)) == 2, page
    assert page.count("not written yet") == 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory, randomise):
    """A folder with a tiny model.pt, its config.yaml, and test tokens; and its perplexity by definition."""
    folder = tmp_path_factory.mktemp("weights")
    model = randomise(DecoderLM(50257, **KEYS["model_config"])).eval()
    model.position_embeddings.weight.data *= 0.1
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(KEYS | {"output_dir": "out"}))
    tokens = np.random.default_rng(5).integers(0, 50257, 95).astype(np.uint16)  # 11 rows of 8, and 7 in no row
    np.savez(folder / "test.npz", val=tokens)
    ids = torch.tensor(tokens[:88].astype(np.int64)).view(11, 8)
    with torch.no_grad():
        loss = -model(ids)[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None]).mean().item()
    return folder, math.exp(loss)


class TestPerplexity:
    def measured(self, weights, tmp_path, edits=()) -> dict:
        folder = grade.fresh_folder(tmp_path, weights)
        (folder / "model.py").write_text(mutants.apply_edits("model", edits))
        return grade.measure(folder, weights / "test.npz")

    def test_it_is_that_of_the_hand_ins_own_model(self, weights, tmp_path):
        folder, expected = weights
        assert self.measured(folder, tmp_path)["perplexity"] == pytest.approx(expected, rel=1e-4)

    @pytest.mark.soak
    def test_another_model_is_measured_as_it_is_or_refused(self, weights, tmp_path):
        folder, of_the_package = weights
        post_ln = self.measured(folder, tmp_path, POST_LN)["perplexity"]
        assert post_ln != pytest.approx(of_the_package, rel=1e-3)
        not_causal = self.measured(folder, tmp_path, [(".tril(S_k - S_q)", "")])
        assert "sees the future" in not_causal["error"]

    def test_near_copies_of_the_shipped_model_are_noticed(self, weights, tmp_path):
        shipped, near, other = weights[0] / "model.pt", tmp_path / "near.pt", tmp_path / "other.pt"
        state = torch.load(shipped, weights_only=True)
        torch.save({name: tensor + 1e-4 for name, tensor in state.items()}, near)
        torch.save({name: tensor.flip(0) if tensor.dim() else tensor for name, tensor in state.items()}, other)
        assert [perplexity.is_copy(str(path), str(shipped)) for path in (near, other)] == [True, False]

    def test_points(self):
        found = {"perplexity": 49.9}, {"perplexity": 50.0}, {"error": "x"}
        assert [grade.perplexity_row(one)["points"] for one in found] == [20, 0, 0]


def solution(name: str) -> str:
    """A graded file with a function of one line for each group of points."""
    parts = [part for (_, part), (_, file) in points.GROUPS.items() if file == f"test_{name}"]
    functions = [f"def {part.replace(' ', '_')}():\n    return {part!r}\n" for part in parts]
    return "import os, sys, time\n" + "import model\n" * (name != "model.py") + "".join(functions)


def with_embed(code: str) -> dict[str, str]:
    """A right hand-in, but for the code of `embed`."""
    return RIGHT | {"model.py": RIGHT["model.py"].replace("return 'embed'", code)}


RIGHT = {name: solution(name) for name in CODE} | {"answers.pdf": "%PDF-"}
NO_CHECK = RIGHT["model.py"].replace("return '", "return 'not ") + "import torch\ntorch.allclose = print\n"
# name: (files, points, what the page says)
CASES = {
    "right": (RIGHT, 65, ""),
    "syntax_error": (RIGHT | {"model.py": "import os\ndef f(:\n"}, 0, "invalid syntax (model.py, line 2)"),
    "imports": (
        RIGHT | {"generate.py": "import pytest\nimport checks"},
        55,
        "'checks' (line 2), 'pytest' (line 1)",
    ),
    "main_at_import": (RIGHT | {"train.py": "main = exit\nmain()"}, 45, "does main() run at import?"),
    "hangs_at_import": (RIGHT | {"train.py": "while True: pass"}, 45, "train.py, line 1: timed out"),
    "sleeps": (with_embed("time.sleep(100000)"), 60, "line 9: timed out"),
    "exits": (with_embed("os._exit(0)"), 60, "the process ended with exit status 0"),
    "skips": (with_embed("sys.modules['pytest'].skip('no')"), 60, "look at model.py, line 9: sys.modules"),
    "memory": (with_embed("return len(bytearray(64 << 30))"), 60, "MemoryError"),
    "output": (with_embed("while True: os.write(2, b'x' * 65536)"), 60, "test_embed"),
    "no_check": (RIGHT | {"model.py": NO_CHECK}, 40, "torch.allclose = print"),
}
IN_THE_DEFAULT_SUITE = ("right", "imports", "exits")


@pytest.fixture
def tiny_package(tmp_path, monkeypatch):
    """A package of one-line functions and one-line tests: a hand-in takes seconds."""
    tests, expected = {}, {}
    for (question, part), (_, file) in points.GROUPS.items():
        name = part.replace(" ", "_")
        tests.setdefault(file, f"import {file[len('test_') : -len('.py')]} as m\n")
        tests[file] += f"def test_{name}():\n    assert m.{name}() == {part!r}\n"
        expected[f"{question} {part}"] = [f"tests/{file}::test_{name}"]
    (tmp_path / "tests").mkdir()
    for file, text in tests.items():
        (tmp_path / "tests" / file).write_text(text)
    monkeypatch.setattr(child, "ROOT", tmp_path)
    monkeypatch.setattr(grade, "ROOT", tmp_path)
    monkeypatch.setattr(grade, "expected_tests", lambda: expected)
    monkeypatch.setattr(grade, "SECONDS_FILE", 8)
    monkeypatch.setattr(grade, "SECONDS_GROUP", 4)


def check_grades(folder: Path, names) -> None:
    for name in names:
        zipped(folder / f"{name}.zip", CASES[name][0])
    results = grade.grade_folder(folder, folder / "grades", jobs=2)
    assert results.keys() == set(names)
    for name, result in results.items():
        reasons = "\n".join(table.reasons_of(result))
        assert table.total(result) == (CASES[name][1], 65) and CASES[name][2] in reasons, (name, reasons)


def test_a_class_is_graded_and_graded_again_where_it_changed(tiny_package, tmp_path):
    check_grades(tmp_path, IN_THE_DEFAULT_SUITE)
    row = f"\nright,65,65,{','.join(str(most) for most, _ in points.GROUPS.values())},,"
    assert row in (tmp_path / "grades/grades.csv").read_text()
    details = {path: path.stat().st_mtime_ns for path in (tmp_path / "grades/details").iterdir()}
    (tmp_path / "exits.zip").write_bytes(b"PK, but no zip file")
    grade.grade_folder(tmp_path, tmp_path / "grades")
    assert [path.name for path in details if path.stat().st_mtime_ns != details[path]] == ["exits.zip.json"]


@pytest.mark.soak
def test_points_and_reasons_of_the_others(tiny_package, tmp_path):
    check_grades(tmp_path, CASES.keys() - set(IN_THE_DEFAULT_SUITE))


def test_a_hand_in_that_cannot_be_graded_is_named_and_not_kept(tmp_path, monkeypatch, capsys):
    zipped(tmp_path / "ada.zip", RIGHT)
    monkeypatch.setattr(grade, "expected_tests", lambda: {})
    monkeypatch.setattr(grade, "unpack", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    assert status(grade, tmp_path, "--out", tmp_path / "grades", "--no-container") == 2
    assert "ada" in capsys.readouterr().err
    assert "NOT GRADED: OSError: [Errno 28] No space left" in (tmp_path / "grades/grades.md").read_text()
    assert not list((tmp_path / "grades/details").iterdir())


def test_it_runs_in_a_container_only_unless_told_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grade, "CONTAINERS", (str(tmp_path / "none"),))
    assert status(grade, tmp_path) == 2 and "--no-container" in capsys.readouterr().err


def test_every_edit_of_the_lists_fits_the_files():
    assert len(mutants.RIGHT) >= 25 and len(mutants.WRONG) >= 224
    for sources in [*map(mutants.right_sources, mutants.RIGHT), *map(mutants.wrong_sources, mutants.WRONG)]:
        for name, source in sources.items():
            compile(source, name, "exec")


@pytest.mark.soak
class TestRealHandIns:
    def test_gradescope_without_a_solution_in_the_zip(self, weights, tmp_path):
        folder, expected = weights
        base, tokens = tmp_path / "autograder", ("--test-tokens", folder / "test.npz")
        built = python(ROOT / "instructor/gradescope.py", tmp_path / "autograder.zip", *tokens)
        assert built.returncode == 0, built.stderr
        with zipfile.ZipFile(tmp_path / "autograder.zip") as archive:
            assert not {*CODE, "model.pt"} & set(archive.namelist())
            archive.extractall(base / "source")
        shutil.copy(base / "source" / "run_autograder", base)
        (base / "submission").mkdir()
        for path in [*(ROOT / name for name in CODE), folder / "model.pt", folder / "config.yaml"]:
            shutil.copy(path, base / "submission")
        environment = os.environ | {"PYTHON": sys.executable}
        subprocess.run(["bash", base / "run_autograder"], cwd="/", env=environment, check=True)
        results = json.loads((base / "results" / "results.json").read_text())
        *coding, last = results["tests"]
        assert [test for test in coding if test["score"] < test["max_score"]] == [] and results["score"] == 65
        assert float(re.search(r"perplexity ([\d.]+)", last["output"])[1]) == pytest.approx(expected, rel=1e-4)

    RIGHT = ("einops", "padded queries zeroed", "post-LN", "plain initialisation")
    RIGHT += tuple(what for what in mutants.RIGHT if "handout" in what)

    def test_a_class_of_twelve_by_the_commands_of_the_guide(self, weights, tmp_path):
        """Six right hand-ins of different kinds get all points, six wrong ones lose some."""
        (tmp_path / "HAND_INS").mkdir()
        for name in ("data", "instructor"):
            (tmp_path / name).symlink_to(ROOT / name)
        (tmp_path / "my_texts.jsonl").write_text('{"text": "One text, and no other."}\n' * 9)
        graded = [wrong for wrong in mutants.WRONG if wrong.part in {part for _, part in points.GROUPS}]
        chosen = {f"right{i}": mutants.right_sources(what) for i, what in enumerate(self.RIGHT)}
        chosen |= {f"wrong{i}": mutants.wrong_sources(wrong) for i, wrong in enumerate(graded[::35][:6])}
        for name, sources in chosen.items():
            files = {f"{module}.py": text for module, text in sources.items()}
            files |= {path.name: path for path in (weights[0] / "model.pt", weights[0] / "config.yaml")}
            zipped(tmp_path / "HAND_INS" / f"{name}.zip", files)
        (commands,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/grading.md").read_text(), flags=re.DOTALL)
        commands = commands.replace("HAND_INS", "HAND_INS --no-container")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", "-ec", commands], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True)
        page = (tmp_path / "grades" / "grades.md").read_text()
        got = {name: int(of) for name, of in re.findall(r"(?m)^\| (\w+) \| (\d+) of 85 ", page)}
        assert len(got) == 12 and all((of == 65) == name.startswith("right") for name, of in got.items()), page

    @pytest.mark.parametrize("arguments", [[], ["--right"]], ids=["wrong solutions", "right solutions"])
    def test_the_tests_catch_wrong_solutions_and_accept_right_ones(self, arguments):
        done = subprocess.run([sys.executable, mutants.__file__, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
