"""The tables of grade.py: grades.csv, a line for each hand-in, and grades.md with the reasons."""

import csv
from pathlib import Path

import points

from support.files import write_atomically


def total(result: dict) -> tuple[int, int]:
    """Points, and the most that there are."""
    return sum(row["points"] for row in result["rows"]), sum(row["max"] for row in result["rows"])


def plain(text: str) -> str:
    """The text in one line, without control characters."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def reasons_of(result: dict) -> list[str]:
    """The first message of each lost group, with all groups that share it in front; then advice and notes."""
    groups_of = {}  # of each message
    for row in [row for row in result["rows"] if row["points"] == 0]:
        written = [line for line in row["output"].splitlines() if points.NOT_WRITTEN not in line]
        message = written[0] if written else points.NOT_WRITTEN
        groups_of.setdefault(message, []).append(f"{row['question']} {row['part']}")
    reasons = [f"{', '.join(groups)}: {message}" for message, groups in groups_of.items()]
    if advice := [message for message in result["advice"] if points.NOT_WRITTEN not in message]:
        reasons.append(f"optional, no points ({len(advice)} failed): {advice[0]}")
    return [plain(reason) for reason in reasons + result["notes"]]


def write_table(out: Path, results: dict[str, dict]) -> None:
    """Write both files."""
    groups = list(dict.fromkeys((row["question"], row["part"]) for r in results.values() for row in r["rows"]))
    questions = sorted({question for question, _ in groups})
    lines = [["hand-in", "points", "of", *(" ".join(group) for group in groups), "perplexity", "messages"]]
    page = ["# Grades", "", f"| hand-in | points | {' | '.join(questions)} | perplexity |"]
    page += ["| --- " * (3 + len(questions)) + "|"]
    details = []
    for name, result in results.items():
        points_of = {(row["question"], row["part"]): row["points"] for row in result["rows"]}
        (got, most), reasons = total(result), reasons_of(result)
        value = "" if result["perplexity"] is None else f"{result['perplexity']:.2f}"
        sums = [str(sum(got for group, got in points_of.items() if group[0] == q)) for q in questions]
        shown = plain(name).replace("|", "\\|").replace("`", "'")
        page.append(f"| {shown} | {got} of {most} | {' | '.join(sums)} | {value} |")
        of_groups = [points_of.get(group, "") for group in groups]
        lines.append([plain(name), got, most, *of_groups, value, "\n".join(reasons)])
        if reasons:  # as code, because hand-ins choose parts of the messages
            details += ["", f"## {shown}: {got} of {most}", "", *(f"    {reason}" for reason in reasons)]
    write_atomically(out / "grades.md", "\n".join(page + details) + "\n")
    with open(out / "grades.csv", "w", newline="", encoding="utf-8") as file:
        for line in lines:  # a spreadsheet would compute what starts with =
            cells = [f"'{cell}" if str(cell).startswith(("=", "+", "-", "@")) else cell for cell in line]
            csv.writer(file).writerow(cells)
