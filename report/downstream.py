"""What the shipped model does with text: questions 2.6 (the file itself), 3.2, 3.5 and 3.6."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tables import OUTPUTS, REPORT, RESULTS

import train
from classify import YELP_LABEL_MAP, YELP_TEMPLATE, decision_boundary, p_positive, score
from data.build import HELD_OUT, SAMPLE, decode_documents
from generate import encode_prompt, generate, softmax_with_temperature
from support.checkpoint import load_trained_model, to_bytes
from support.classification import area_under_roc
from support.config import dump_config
from support.files import write_atomically, write_together
from support.generation import read_prefixes
from support.reviews import load_reviews

ROOT = REPORT.parent
SHIPPED = ROOT / "model.pt"
N_RESAMPLES = 2000  # of each bootstrap


def keep(name: str, values: dict) -> None:
    """Write report/results/NAME.json."""
    write_atomically(RESULTS / f"{name}.json", json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def with_interval(value: float, resampled: np.ndarray) -> list[float]:
    """[value, lower, upper end of the 95% interval]"""
    return [float(value), *np.quantile(resampled, [0.025, 0.975]).tolist()]


def ship() -> None:
    """Store the final run's weights as bfloat16 in model.pt, config.yaml beside it, and measure that file."""
    trained = load_trained_model(None, str(OUTPUTS / "2.6-final" / "model.pt"))
    weights = {
        # scale_factor is not a weight: rounded, it would change every attention score.
        key: tensor if key.endswith("scale_factor") else tensor.bfloat16()
        for key, tensor in trained.model.state_dict().items()
    }
    neutral = {"output_dir": "outputs/final", "device": "auto", "data": "sample", "checkpoint_interval": None}
    config = dataclasses.replace(trained.config, **neutral)  # the sample is held-out C4 that every clone has
    note = "data: sample  # to evaluate on; trained on the mixture, see report/configs/2.6-final.yaml"
    text = dump_config(config).replace("data: sample", note)
    write_together({SHIPPED: to_bytes(weights), ROOT / "config.yaml": text.encode()})
    measure_shipped()


def measure_shipped() -> None:
    """The size and cost of the shipped model, and its losses on held-out text with their intervals."""
    shipped = load_trained_model(None, str(SHIPPED))
    c, model = shipped.config, shipped.model
    steps = c.num_training_steps, c.grad_accumulation_steps, c.batch_size, c.seq_len
    result = {
        "bytes": SHIPPED.stat().st_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "n_embd": c.model_config.n_embd,
        "n_layer": c.model_config.n_layer,
        "steps": c.num_training_steps,
        "max_lr": c.max_lr,
        "tokens": math.prod(steps),
        "flops": train.training_flops(model, *steps),
    }
    for name, path in (("c4", SAMPLE), ("wikipedia", HELD_OUT)):
        result[f"{name}-loss"] = held_out_loss(shipped, np.load(path)["val"])
    keep("model-file", result)


@torch.inference_mode()
def held_out_loss(trained, tokens: np.ndarray) -> list[float]:
    """Loss on these tokens as train.py evaluates, nats per token, with its 95% interval from a bootstrap over the
    documents: [loss, lower end, upper end].
    """
    ends = tokens == trained.tokenizer.eot_token
    document = np.concatenate([[0], np.cumsum(ends)[:-1]])  # of each token, its own end included
    losses, documents = [], []
    batches = [
        train.sequential_batch_sampler(array, trained.device, 1, trained.config.seq_len)
        for array in (tokens, document)
    ]
    for input_ids, document_ids in zip(*batches, strict=True):  # one row each: its logits are 50 MB
        logits = trained.model(input_ids)[0, :-1]  # (S - 1, V)
        losses.append(F.cross_entropy(logits, input_ids[0, 1:], reduction="none"))
        documents.append(document_ids[0, 1:])
    documents = torch.cat(documents).numpy()
    sums, counts = np.bincount(documents, torch.cat(losses).numpy()), np.bincount(documents)
    drawn = np.random.default_rng(0).integers(len(sums), size=(N_RESAMPLES, len(sums)))
    return with_interval(sums.sum() / counts.sum(), sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))


TEMPERATURES = (0.0, 0.3, 0.7, 1.0, 1.5)
OWN_PROMPTS = ["The best way to cook rice is", "Dear customer, thank you for", "The president said on Monday that"]
N_TEXTS, N_NEW_TOKENS, N_SHOWN = 10, 100, 24  # texts per prompt (one at temperature 0), tokens in each


def distinct_trigrams(tokens: list[int]) -> float:
    """Distinct trigrams of one text as a share of all its trigrams; 1 = nothing is repeated."""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(trigrams)) / len(trigrams)


@torch.inference_mode()
def measure_texts(model, pairs: list[tuple[list[int], list[int]]], temperature: float) -> dict[str, float]:
    """Means over (prompt, continuation) pairs: distinct trigrams; the model's loss on the continuation, and the
    entropy of the distributions at this temperature that its tokens are drawn from, nats per token.
    """
    loss, entropy = [], []
    for prompt, new in pairs:
        logits = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]  # (new tokens, V)
        loss.append(F.cross_entropy(logits, torch.tensor(new), reduction="none"))
        entropy.append(torch.special.entr(softmax_with_temperature(logits, temperature)).sum(dim=-1))
    return {
        "texts": len(pairs),
        "distinct-3": float(np.mean([distinct_trigrams(new) for _, new in pairs if len(new) >= 3])),
        "loss": torch.cat(loss).mean().item(),
        "entropy": torch.cat(entropy).mean().item(),
    }


def sample_texts(trained, prefixes: list[str], temperature: float) -> list[tuple[list[int], list[int]]]:
    """(prompt, continuation) of each prefix in order, all of them N_TEXTS times (once at temperature 0)."""
    prefixes = prefixes * (N_TEXTS if temperature else 1)
    tokenizer, n_positions = trained.tokenizer, trained.model.n_positions
    # Decoded and encoded again, tokens can differ: generate returns them as they are.
    undecoded = SimpleNamespace(
        encode_ordinary=tokenizer.encode_ordinary, eot_token=tokenizer.eot_token, decode=list
    )
    torch.manual_seed(0)
    new = generate(trained.model, "cpu", undecoded, prefixes, 30, N_NEW_TOKENS, temperature)
    prompts = [encode_prompt(tokenizer, prefix, n_positions) for prefix in prefixes]
    return list(zip(prompts, new, strict=True))


def people_texts(tokenizer) -> list[tuple[list[int], list[int]]]:
    """The beginnings of held-out documents of C4: 10 tokens as the prompt, then N_NEW_TOKENS."""
    documents = map(tokenizer.encode_ordinary, decode_documents(np.load(SAMPLE)["val"]))
    n = 10 + N_NEW_TOKENS
    return [(tokens[:10], tokens[10:n]) for tokens in documents if len(tokens) >= n]


def temperatures() -> None:
    """3.2: texts of the shipped model at five temperatures, with people's for comparison."""
    trained, bundled = load_trained_model(None, str(SHIPPED)), read_prefixes(None)
    prefixes = bundled + OWN_PROMPTS
    measured, shown = {}, {}
    for temperature in TEMPERATURES:
        pairs = sample_texts(trained, prefixes, temperature)
        shown[f"{temperature:g}"] = [trained.tokenizer.decode(new[:N_SHOWN]) for _, new in pairs[: len(prefixes)]]
        written = [(prompt, new) for prompt, new in pairs if new]
        measured[f"{temperature:g}"] = measure_texts(trained.model, written, temperature)
    measured["held-out C4"] = measure_texts(trained.model, people_texts(trained.tokenizer), 1.0)
    keep("3.2", {"measured": measured, "texts": shown, "prefixes": prefixes, "bundled": len(bundled)})


CONTENT_FREE = ("N/A", "[MASK]", "")  # the three of Zhao et al. 2021
N_LAST = 5  # tokens of the review's end, to see whether the model uses more than those


def resamples(labels: np.ndarray) -> np.ndarray:
    """(N_RESAMPLES, N) indices, drawn within each class: the numbers of positive and negative texts are fixed."""
    generator = np.random.default_rng(0)
    classes = [np.flatnonzero(labels == label) for label in (0, 1)]
    return np.hstack([generator.choice(rows, size=(N_RESAMPLES, len(rows))) for rows in classes])


def accuracies(p: np.ndarray, labels: np.ndarray, boundary: float | None) -> np.ndarray:
    """Accuracy of p > boundary in each row of p and labels (..., N); None is the median of the row itself."""
    if boundary is None:
        boundary = torch.from_numpy(p).median(dim=-1, keepdim=True).values.numpy()  # the lower middle value
    return ((p > boundary) == labels).mean(axis=-1)


def sentiment() -> None:
    """3.5, 3.6: three decision boundaries on the same resamples of the reviews, and on the ends of reviews."""
    trained = load_trained_model(None, str(SHIPPED))
    tokenizer = trained.tokenizer

    def p_of(texts) -> np.ndarray:
        prompts = [YELP_TEMPLATE.format(text=text) for text in texts]
        logits = score(trained.model, "cpu", tokenizer, prompts, 32)
        return p_positive(logits, [tokenizer.encode_single_token(YELP_LABEL_MAP[i]) for i in (0, 1)]).numpy()

    def fits(text: str) -> bool:
        return len(tokenizer.encode_ordinary(YELP_TEMPLATE.format(text=text))) <= trained.model.n_positions

    reviews = load_reviews(None, 1000, fits=fits)
    labels, p = np.array(reviews.labels), p_of(reviews.texts)
    drawn = resamples(labels)
    boundaries = {"0.5": 0.5, "median": None, "contextual": float(p_of(CONTENT_FREE).mean())}
    observed = {rule: accuracies(p, labels, boundary) for rule, boundary in boundaries.items()}
    resampled = {rule: accuracies(p[drawn], labels[drawn], boundary) for rule, boundary in boundaries.items()}
    boundaries["median"] = decision_boundary(torch.from_numpy(p), calibrate=True)
    rules = {
        rule: {
            "boundary": boundary,
            "positive-share": float((p > boundary).mean()),
            "accuracy": with_interval(observed[rule], resampled[rule]),
            "minus-median": with_interval(
                observed[rule] - observed["median"], resampled[rule] - resampled["median"]
            ),
        }
        for rule, boundary in boundaries.items()
    }
    ends = p_of(tokenizer.decode(tokenizer.encode_ordinary(text)[-N_LAST:]) for text in reviews.texts)
    accuracy, of_ends = accuracies(ends, labels, None), accuracies(ends[drawn], labels[drawn], None)
    aucs = [area_under_roc(p[rows], labels[rows]) for rows in drawn]
    result = {
        "reviews": reviews.name,
        "n": len(labels),
        "positive": float(labels.mean()),
        "auc": with_interval(area_under_roc(p, labels), np.array(aucs)),
        "rules": rules,
        "n-last": N_LAST,
        "last": with_interval(accuracy, of_ends),
        "whole-minus-last": with_interval(observed["median"] - accuracy, resampled["median"] - of_ends),
    }
    keep("3.5", result)
    lines = [f"{value:.5f},{label}\n" for value, label in zip(p, labels, strict=True)]
    write_atomically(RESULTS / "3.5.csv", "p-positive,label\n" + "".join(lines))


MEASURE = {"2.6": ship, "3.2": temperatures, "3.5": sentiment}
