"""Repeat the experiments of report/answers.tex. From the root:

    python report/experiments.py 2.5         train the runs of a question and measure them
    python report/experiments.py model.pt    measure what model.pt does: questions 2.6, 3.2, 3.5 and 3.6
    python report/experiments.py ship        make the final run's weights model.pt, then measure it

A run is a file report/configs/SETTING.yaml, trained by train.py into outputs/report/SETTING (with -seed1 or
-seed2 for other seeds). The same command resumes it; one that is finished is only measured again. The data of 2.2,
2.5 and 2.6 come first: data/README.md says how to build outputs/report/mixture. What was measured goes to
report/results/; report/answers.py makes tables, figures and the pdf of it.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import classify  # noqa: E402
import train  # noqa: E402
from generate import encode_prompt, generate  # noqa: E402
from support.checkpoint import load_trained_model  # noqa: E402
from support.chunked_loss import ChunkedLanguageModelingLoss  # noqa: E402
from support.decoding import CachedDecoder  # noqa: E402

RESULTS, OUTPUTS = ROOT / "report/results", ROOT / "outputs/report"
RUNS = {  # question: (setting, seed) of its runs
    "2.2": [(f"2.2-{schedule}", seed) for schedule in ("cosine", "constant") for seed in (0, 1)],
    "2.3": [(f"2.3-{n_steps}", 0) for n_steps in (1000, 2000, 4000, 8000, 16000)],
    "2.4": [("2.4-expected", 0), ("2.4-expected-no-warmup", 0), ("2.4-low-rate", 0)]
    + [(f"2.4-high-rate{warmup}", 0) for warmup in ("", "-warmup", "-warmup100")],
    "2.5": [
        ("2.5-d128-lr2e-3", 0),
        *(("2.5-d128-lr4e-3", seed) for seed in (0, 1, 2)),
        *(("2.5-d128-lr8e-3", seed) for seed in (0, 1, 2)),
        ("2.5-d96-lr4e-3", 0),
        ("2.5-d64-lr4e-3", 0),
    ],
    "2.6": [("2.6-final", 0)],
}


def run_name(setting: str, seed: int) -> str:
    """Name of a run's output folder and of its results."""
    return f"{setting}-seed{seed}" if seed else setting


def write_result(name: str, values: dict) -> None:
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


# --- The runs -----------------------------------------------------------------------------------------------


def held_out() -> dict[str, np.ndarray]:
    """Held-out tokens by name. Settings are chosen on every other document of C4, and reported on the rest."""
    c4, wikipedia = (np.load(ROOT / f"data/{name}.npz")["val"] for name in ("sample", "heldout-wikipedia"))
    documents = np.split(c4, np.flatnonzero(c4 == 50256)[:-1] + 1)
    halves = {"choose": np.concatenate(documents[::2]), "report": np.concatenate(documents[1::2])}
    return {"c4": c4, **halves, "wikipedia": wikipedia}


def run_question(question: str) -> None:
    """Train what is not trained, and measure every run of the question."""
    for setting, seed in RUNS[question]:
        name = run_name(setting, seed)
        other = ["--set", f"seed={seed}", f"output_dir={OUTPUTS / name}"] if seed else []
        train.main([str(ROOT / f"report/configs/{setting}.yaml"), *other])
        measure_run(name)
        print(f"{question}: outputs/report/{name} -> report/results/{name}.json")


def held_out_losses(trained) -> dict[str, float]:
    """As train.py evaluates, in float32."""
    losses, loss_fn = {}, ChunkedLanguageModelingLoss(trained.model)
    for name, tokens in held_out().items():
        seq_len = trained.config.seq_len
        batches = train.sequential_batch_sampler(tokens, trained.device, 32, seq_len, drop_last=False)
        losses[name] = train.evaluate(trained.model, batches, loss_fn=loss_fn)["val-loss"]
    return losses


def measure_run(name: str) -> None:
    """Write the losses of a finished run and what it took; and its curve, with fewer points."""
    folder = OUTPUTS / name
    losses = held_out_losses(load_trained_model(None, str(folder / "model.pt")))
    of_run = json.loads((folder / "run.json").read_text())
    facts = {key: of_run[key] for key in ("flops", "seconds", "tokens-per-second", "device", "torch")}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    write_result(name, {"losses": losses, **facts, "config": config})
    with (folder / "metrics.csv").open() as file:
        write_curve(name, list(csv.DictReader(file)))


def write_curve(name: str, rows: list[dict[str, str]]) -> None:
    """Write report/results/NAME.csv from metrics.csv: step, loss and its mean over 20 steps, thinned."""
    every = -(-len(rows) // 500)
    kept = [row for i, row in enumerate(rows) if i < 50 or i % every == 0 or i == len(rows) - 1]
    lines = [f"{row['step']},{float(row['loss']):.4f},{float(row['train-loss']):.4f}\n" for row in kept]
    (RESULTS / f"{name}.csv").write_text("step,loss,mean\n" + "".join(lines))


# --- The file model.pt --------------------------------------------------------------------------------------


def ship() -> None:
    """Store the final run's weights as bfloat16 in model.pt, and config.yaml beside it."""
    final = OUTPUTS / run_name(*RUNS["2.6"][0])
    state = torch.load(final / "model.pt", weights_only=True)
    # scale_factor is not a weight: rounded, it would change every attention score.
    weights = {key: value if key.endswith("scale_factor") else value.bfloat16() for key, value in state.items()}
    torch.save(weights, ROOT / "model.pt")
    config = yaml.safe_load((final / "config.yaml").read_text())
    config |= {"output_dir": "outputs/final", "data": "sample", "device": "auto", "compile": False}
    note = (
        "# Of model.pt, which was trained on the mixture (report/configs/2.6-final.yaml); data: to evaluate on.\n"
    )
    (ROOT / "config.yaml").write_text(note + yaml.safe_dump(config, sort_keys=False))


TEMPERATURES = (0.0, 0.3, 0.7, 1.0, 1.5)
OWN_PROMPTS = ["The best way to cook rice is", "Dear customer, thank you for", "The president said on Monday that"]
N_TEXTS, N_NEW_TOKENS, N_SHOWN = 10, 100, 24  # texts per prompt (one at temperature 0), tokens in each


def distinct_trigrams(tokens: list[int]) -> float:
    """Distinct trigrams of one text as a share of all its trigrams; 1 = nothing is repeated."""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(trigrams)) / len(trigrams)


@torch.inference_mode()
def describe(model, pairs: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    """Means over (prompt, continuation) pairs: distinct trigrams, and the model's loss on the continuation."""
    loss = []
    for prompt, new in pairs:
        logits = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]  # (new tokens, V)
        loss.append(F.cross_entropy(logits, torch.tensor(new), reduction="none"))
    new_trigrams = np.mean([distinct_trigrams(new) for _, new in pairs if len(new) >= 3])
    return {"texts": len(pairs), "new-trigrams": float(new_trigrams), "loss": torch.cat(loss).mean().item()}


def measure_texts(trained) -> None:
    """3.2: texts at five temperatures, and human text for comparison."""
    tokenizer, n_positions = trained.tokenizer, trained.model.n_positions
    bundled = json.loads((ROOT / "prefixs.json").read_text(encoding="utf-8"))
    prefixes = bundled + OWN_PROMPTS
    # generate() decodes what it drew; encoded again, the tokens can differ. This one leaves them as they are.
    ids = SimpleNamespace(encode_ordinary=tokenizer.encode_ordinary, eot_token=tokenizer.eot_token, decode=list)
    measured, shown = {}, {}
    for temperature in TEMPERATURES:
        repeated = prefixes * (N_TEXTS if temperature else 1)
        torch.manual_seed(0)
        decoder = CachedDecoder(trained.model)
        new = generate(
            trained.model, "cpu", ids, repeated, 30, N_NEW_TOKENS, temperature, next_token_logits=decoder
        )
        shown[f"{temperature:g}"] = [tokenizer.decode(row[:N_SHOWN]) for row in new[: len(prefixes)]]
        prompts = (encode_prompt(tokenizer, prefix, n_positions) for prefix in repeated)
        pairs = [(prompt, row) for prompt, row in zip(prompts, new, strict=True) if row]
        measured[f"{temperature:g}"] = describe(trained.model, pairs)
    c4 = held_out()["c4"]
    documents = (row.tolist()[:-1] for row in np.split(c4, np.flatnonzero(c4 == tokenizer.eot_token) + 1))
    human = [(row[:10], row[10 : 10 + N_NEW_TOKENS]) for row in documents if len(row) >= 10 + N_NEW_TOKENS]
    measured["held-out C4"] = describe(trained.model, human)
    write_result("3.2", {"measured": measured, "texts": shown, "prefixes": prefixes, "bundled": len(bundled)})


def measure_sentiment(trained) -> None:
    """3.5, 3.6: what classify.py says about the bundled reviews, what about an empty one, and a reason."""
    folder = OUTPUTS / "3.5"
    folder.mkdir(parents=True, exist_ok=True)
    classify.main([str(trained.path), "--data", "sample", "--device", "cpu", "--out", str(folder)])
    result = json.loads((folder / "classification.json").read_text())
    label_tokens = [trained.tokenizer.encode_single_token(classify.YELP_LABEL_MAP[label]) for label in (0, 1)]
    empty = classify.YELP_TEMPLATE.format(text="")
    logits = classify.score(trained.model, "cpu", trained.tokenizer, [empty], 1)
    c4 = np.load(ROOT / "data/sample.npz")["train"]
    bad, good = (int((c4 == token).sum()) for token in label_tokens)
    result |= {
        "p-of-empty": classify.p_positive(logits, label_tokens).item(),
        "bad-in-c4": bad,
        "good-in-c4": good,
    }
    write_result("3.5", {key: value for key, value in result.items() if key != "checkpoint"})
    with (folder / "classification.csv").open(encoding="utf-8") as file:
        lines = [f"{float(row['p']):.5f},{row['label']}\n" for row in csv.DictReader(file)]
    (RESULTS / "3.5.csv").write_text("p-positive,label\n" + "".join(lines))


def main(argv: list[str] | None = None) -> None:
    """Do what the module's docstring lists."""
    parser = argparse.ArgumentParser(description="Repeat the experiments of report/answers.tex.")
    parser.add_argument("what", nargs="+", choices=[*RUNS, "model.pt", "ship"])
    for what in parser.parse_args(argv).what:
        if what in RUNS:
            run_question(what)
            continue
        if what == "ship":
            ship()
        trained = load_trained_model(None, str(ROOT / "model.pt"), "cpu")
        write_result("2.6-model", {"bytes": trained.path.stat().st_size, "losses": held_out_losses(trained)})
        measure_texts(trained)
        measure_sentiment(trained)


if __name__ == "__main__":
    main()
