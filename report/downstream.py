"""What the shipped model does with text: questions 2.6 (the file itself), 3.2, 3.3, 3.5 and 3.6."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tables import OUTPUTS, RESULTS, ROOT, best_tuned

import train
from classify import YELP_LABEL_MAP, YELP_TEMPLATE, decision_boundary, score
from data.build import HELD_OUT, SAMPLE
from generate import encode_prompt, generate, softmax_with_temperature
from support.checkpoint import load_trained_model, to_bytes
from support.chunked_loss import ChunkedLanguageModelingLoss
from support.classification import area_under_roc
from support.config import dump_config
from support.files import write_atomically, write_together
from support.generation import read_prefixes
from support.reviews import load_reviews

SHIPPED = ROOT / "model.pt"
MOST_BYTES = 16_000_000
TEMPERATURES = (0.0, 0.3, 0.7, 1.0, 1.5)
N_TEXTS, N_NEW_TOKENS = 20, 100  # per prefix and temperature (one where it is 0), and in each of them
N_RESAMPLES = 2000  # of the bootstrap


def keep(name: str, values: dict) -> None:
    """Write report/results/NAME.json."""
    write_atomically(RESULTS / f"{name}.json", json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def load(path: Path):
    """The model of this checkpoint."""
    return load_trained_model(None, str(path))


# ---------------------------------------------------------------------------------------------------
# 2.6: the file that ships
# ---------------------------------------------------------------------------------------------------


def ship() -> None:
    """Store the final run's weights as bfloat16 in model.pt, config.yaml beside it; measure what that costs."""
    trained = load(OUTPUTS / "2.6-final" / "model.pt")
    loss = {"float32": held_out_loss(trained, held_out_c4())}
    weights = {
        # scale_factor is no weight: rounded, it would change every attention score.
        key: tensor if key.endswith("scale_factor") else tensor.bfloat16()
        for key, tensor in trained.model.state_dict().items()
    }
    archive = to_bytes(weights)
    if len(archive) > MOST_BYTES:
        raise ValueError(f"model.pt would have {len(archive):,} bytes, more than {MOST_BYTES:,}")
    neutral = {"output_dir": "outputs/final", "device": "auto", "data": "sample", "checkpoint_interval": None}
    config = dataclasses.replace(trained.config, **neutral)  # the sample is held-out C4 that every clone has
    write_together({SHIPPED: archive, ROOT / "config.yaml": dump_config(config).encode()})
    shipped = load(SHIPPED)
    loss["bfloat16"] = held_out_loss(shipped, held_out_c4())
    result = {"bytes": len(archive), "val-loss": loss, "interval": held_out_interval(shipped, held_out_c4())}
    result["wikipedia-loss"] = held_out_loss(shipped, held_out_wikipedia())
    result["wikipedia-interval"] = held_out_interval(shipped, held_out_wikipedia())
    keep("model-file", result)


def held_out_c4() -> np.ndarray:
    """Tokens of the bundled sample's held-out documents."""
    return np.load(SAMPLE)["val"]


def held_out_wikipedia() -> np.ndarray:
    """Tokens of the held-out Wikipedia pages."""
    return np.load(HELD_OUT)["val"]


def held_out_loss(trained, tokens: np.ndarray) -> float:
    """Loss on these tokens, nats per token, as train.py evaluates."""
    c = trained.config
    batches = train.sequential_batch_sampler(tokens, trained.device, 8, c.seq_len, drop_last=False)
    return train.evaluate(trained.model, batches, loss_fn=ChunkedLanguageModelingLoss(trained.model))["val-loss"]


@torch.inference_mode()
def held_out_interval(trained, tokens: np.ndarray) -> list[float]:
    """95% interval of that loss, from a bootstrap over the documents."""
    ends = tokens == trained.tokenizer.eot_token
    document = np.concatenate([[0], np.cumsum(ends)[:-1]])  # of each token, its own end included
    losses, documents = [], []
    batches = [
        train.sequential_batch_sampler(array, trained.device, 1, trained.config.seq_len)
        for array in (tokens, document)
    ]
    for input_ids, document_ids in zip(*batches, strict=True):  # one row each, whose logits are 50 MB
        logits = trained.model(input_ids)[0, :-1]  # (S - 1, V)
        losses.append(F.cross_entropy(logits, input_ids[0, 1:], reduction="none"))
        documents.append(document_ids[0, 1:])
    documents = torch.cat(documents).numpy()
    sums, counts = np.bincount(documents, torch.cat(losses).numpy()), np.bincount(documents)
    drawn = np.random.default_rng(0).integers(len(sums), size=(N_RESAMPLES, len(sums)))
    return np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [0.025, 0.975]).tolist()


# ---------------------------------------------------------------------------------------------------
# 3.2, 3.3: generation
# ---------------------------------------------------------------------------------------------------


class _TokenIds:
    """The tokenizer, but what `generate` returns stays token ids: decoded and encoded again they can differ."""

    def __init__(self, tokenizer):
        self.encode_ordinary, self.eot_token = tokenizer.encode_ordinary, tokenizer.eot_token

    def decode(self, tokens: list[int]) -> list[int]:
        return tokens


def distinct(tokens: list[int], n: int) -> float:
    """Distinct n-grams of one text as a share of all its n-grams; 1 = nothing is said twice."""
    ngrams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(ngrams)) / len(ngrams)


@torch.inference_mode()
def measure_texts(model, pairs: list[tuple[list[int], list[int]]], temperature: float) -> dict[str, float]:
    """Means over the tokens of (prompt, continuation) pairs, read by the model that wrote them.

    The entropy is that of the model's own distribution, and of the one at this temperature, in nats.
    """
    nll, entropy, entropy_sampled = [], [], []
    for prompt, new in pairs:
        logits = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]  # (new tokens, V)
        nll.append(F.cross_entropy(logits, torch.tensor(new), reduction="none"))
        entropy.append(torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1))
        entropy_sampled.append(torch.special.entr(softmax_with_temperature(logits, temperature)).sum(dim=-1))
    long_enough = [new for _, new in pairs if len(new) >= 3]
    return {
        "texts": len(pairs),
        "tokens": sum(len(new) for _, new in pairs),
        **{f"distinct-{n}": float(np.mean([distinct(new, n) for new in long_enough])) for n in (1, 2, 3)},
        "entropy": torch.cat(entropy).mean().item(),
        "entropy-sampled": torch.cat(entropy_sampled).mean().item(),
        "perplexity": torch.cat(nll).mean().exp().item(),
    }


def sample_texts(trained, temperature: float) -> list[tuple[list[int], list[int]]]:
    """(prompt, continuation) of each bundled prefix, N_TEXTS times (once where the temperature is 0)."""
    prefixes = read_prefixes(None) * (N_TEXTS if temperature else 1)
    tokenizer, n_positions = trained.tokenizer, trained.model.n_positions
    torch.manual_seed(0)
    new = generate(trained.model, "cpu", _TokenIds(tokenizer), prefixes, 32, N_NEW_TOKENS, temperature)
    prompts = [encode_prompt(tokenizer, prefix, n_positions) for prefix in prefixes]
    return [pair for pair in zip(prompts, new, strict=True) if pair[1]]


def people_texts(tokenizer) -> list[tuple[list[int], list[int]]]:
    """The beginnings of held-out pages, cut like the samples: 10 tokens of prompt, then N_NEW_TOKENS."""
    tokens = held_out_wikipedia()
    ends = np.flatnonzero(tokens == tokenizer.eot_token)
    pages = [page[page != tokenizer.eot_token].tolist() for page in np.split(tokens, ends)]
    wanted = 10 + N_NEW_TOKENS
    return [(page[:10], page[10:wanted]) for page in pages if len(page) >= wanted][: 3 * N_TEXTS]


def temperatures() -> None:
    """3.2: texts of the shipped model at five temperatures, with people's for comparison."""
    trained = load(SHIPPED)
    measured, shown = {}, {}
    for temperature in TEMPERATURES:
        pairs = sample_texts(trained, temperature)
        measured[f"{temperature:g}"] = measure_texts(trained.model, pairs, temperature)
        firsts = pairs[: len(read_prefixes(None))]
        shown[f"{temperature:g}"] = [trained.tokenizer.decode(new[:32]) for _, new in firsts]
    measured["people"] = measure_texts(trained.model, people_texts(trained.tokenizer), 1.0)
    keep("3.2", {"measured": measured, "texts": shown, "prefixes": read_prefixes(None)})


def more_training() -> None:
    """3.3: the same model with a tenth of the training, and the shipped one."""
    measured = {}
    for name, path in (("1e14", OUTPUTS / best_tuned() / "model.pt"), ("1e15", SHIPPED)):
        trained = load(path)
        measured[name] = {
            "val-loss": held_out_loss(trained, held_out_c4()),
            "greedy": measure_texts(trained.model, sample_texts(trained, 0.0), 0.0),
            "sampled": measure_texts(trained.model, sample_texts(trained, 1.0), 1.0),
            "people": measure_texts(trained.model, people_texts(trained.tokenizer), 1.0),
            "text": trained.tokenizer.decode(sample_texts(trained, 0.7)[0][1][:32]),
        }
    keep("3.3", measured)


# ---------------------------------------------------------------------------------------------------
# 3.5, 3.6: sentiment
# ---------------------------------------------------------------------------------------------------

TEMPLATES = {
    "Yelp": YELP_TEMPLATE,
    "product": "Here is a review of a product: {text}\nOverall, the product was",
    "bare": "{text} It was",
}
WORDS = {
    "bad / good": ([YELP_LABEL_MAP[0]], [YELP_LABEL_MAP[1]]),
    "terrible / great": ([" terrible"], [" great"]),
    "poor / excellent": ([" poor"], [" excellent"]),
    "four words each": ([" bad", " terrible", " poor", " worse"], [" good", " great", " excellent", " better"]),
}
CONTENT_FREE = ("N/A", "[MASK]", "")  # the three of Zhao et al. 2021


def log_odds(logits: torch.Tensor, tokenizer, words: tuple[list[str], list[str]]) -> np.ndarray:
    """log p(positive words) - log p(negative words): (N, V) -> (N,)."""
    negative, positive = ([tokenizer.encode_single_token(word) for word in side] for side in words)
    log_p = logits.double().log_softmax(dim=-1)
    return (log_p[:, positive].logsumexp(dim=-1) - log_p[:, negative].logsumexp(dim=-1)).numpy()


def boundaries(odds: np.ndarray, empty: np.ndarray, premise: float) -> dict[str, float]:
    """What the log odds must exceed under each rule; none of them uses a label.

    With two labels, contextual calibration and PMI scoring both subtract a constant from the log odds.
    """
    mean_p = (1 / (1 + np.exp(-empty))).mean()  # as Zhao et al. 2021 average over their content-free inputs
    return {
        "0.5": 0.0,
        "contextual": math.log(mean_p / (1 - mean_p)),
        "PMI": premise,  # Holtzman et al. 2021: p(label | text) / p(label | the template's end alone)
        "median": decision_boundary(torch.from_numpy(odds), calibrate=True),
    }


def sentiment() -> None:
    """3.5, 3.6: every template with every pair of label words under every rule, on the bundled reviews."""
    trained = load(SHIPPED)
    tokenizer, n_positions = trained.tokenizer, trained.model.n_positions
    longest = max(TEMPLATES.values(), key=lambda text: len(tokenizer.encode_ordinary(text)))

    def fits(text: str) -> bool:
        return len(tokenizer.encode_ordinary(longest.format(text=text))) <= n_positions

    reviews = load_reviews("sample", 1000, fits=fits)
    labels = np.array(reviews.labels)
    rows, draw = [], np.random.default_rng(0).integers(len(labels), size=(N_RESAMPLES, len(labels)))
    for template_name, template in TEMPLATES.items():
        texts = [template.format(text=text) for text in (*reviews.texts, *CONTENT_FREE)]
        end = template.partition("{text}")[2].lstrip("\n")  # "Overall, the place was"
        logits = score(trained.model, "cpu", tokenizer, [*texts, end], 64)
        for words_name, words in WORDS.items():
            all_odds = log_odds(logits, tokenizer, words)
            odds, empty, premise = all_odds[: len(labels)], all_odds[len(labels) : -1], all_odds[-1]
            aucs = [area_under_roc(odds[rows_], labels[rows_]) for rows_ in draw[:500]]
            row = {
                "template": template_name,
                "words": words_name,
                "auc": area_under_roc(odds, labels),
                "auc-interval": np.quantile(aucs, [0.025, 0.975]).tolist(),
                "rules": {},
            }
            drawn = [(odds[i], labels[i], boundaries(odds[i], empty, premise)) for i in draw]
            for rule, boundary in boundaries(odds, empty, premise).items():
                resampled = [((some > limits[rule]) == truth).mean() for some, truth, limits in drawn]
                row["rules"][rule] = {
                    "accuracy": float(((odds > boundary) == labels).mean()),
                    "interval": np.quantile(resampled, [0.025, 0.975]).tolist(),
                    "boundary": 1 / (1 + math.exp(-boundary)),
                    "positive-share": float((odds > boundary).mean()),
                }
            rows.append(row)
            if (template_name, words_name) == ("Yelp", "bad / good"):
                p = 1 / (1 + np.exp(-odds))
    keep("3.6", {"reviews": reviews.name, "n": len(labels), "positive": int(labels.sum()), "rows": rows})
    lines = [f"{value:.5f},{label}\n" for value, label in zip(p, labels, strict=True)]
    write_atomically(RESULTS / "3.6.csv", "p-positive,label\n" + "".join(lines))


MEASURE = {"2.6": ship, "3.2": temperatures, "3.3": more_training, "3.6": sentiment}
