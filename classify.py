"""Zero-shot sentiment classification with a trained language model (question 3.4).

    python classify.py model.pt
    python classify.py --config configs/GPT-tiny.yaml --calibrate
    python classify.py outputs/GPT-tiny/model.pt --data my_reviews.csv

Each review is put into a template that ends where the verdict would stand, and the model says whether
" good" or " bad" is the likelier next token.

Shapes: N texts, B of them in a batch, S tokens in each, V vocabulary size.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from generate import encode_prompt, last_logits, left_pad
from model import DecoderLM

YELP_TEMPLATE = "Here is a review from Yelp: {text}\nOverall, the place was"
YELP_LABEL_MAP = {0: " bad", 1: " good"}

TOKENS_PER_BATCH = 2048  # larger batches only leave the caches of a CPU


def score(
    model: DecoderLM, device: torch.device | str, tokenizer, texts: list[str], batch_size: int
) -> torch.Tensor:
    """Logits of the token that follows each text: N texts -> (N, V), row i for texts[i].

    Texts of like length go through the model together (at most batch_size of them), so that little is
    padding. Of a text longer than n_positions the last tokens count. `tokenizer` is a tiktoken.Encoding.
    """
    n_positions = model.position_embeddings.num_embeddings
    prompts = [encode_prompt(tokenizer, text, n_positions) for text in texts]
    logits = torch.empty(len(texts), model.token_embeddings.num_embeddings, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), tqdm(total=len(texts), desc="score", leave=False, disable=None) as bar:
            for indices in _batches_of_like_length(prompts, batch_size):
                input_ids, mask = left_pad([prompts[i] for i in indices], tokenizer.eot_token, device)
                logits[indices] = last_logits(model, input_ids, mask)
                bar.update(len(indices))
    finally:
        model.train(was_training)
    return logits


def _batches_of_like_length(prompts: list[list[int]], batch_size: int) -> list[list[int]]:
    """The indices of all prompts, longest first, in batches of at most TOKENS_PER_BATCH padded tokens."""
    batches: list[list[int]] = []
    rows = 0
    for index in sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True):
        if not batches or len(batches[-1]) == rows:
            rows = max(1, min(batch_size, TOKENS_PER_BATCH // len(prompts[index])))
            batches.append([])
        batches[-1].append(index)
    return batches


def p_positive(logits: torch.Tensor, tokens_of_interest: list[int]) -> torch.Tensor:
    """Softmax over the two tokens [negative id, positive id], the second one's share: (N, V) -> (N,)."""
    return F.softmax(logits[:, tokens_of_interest], dim=-1)[:, 1]


def decision_boundary(p: torch.Tensor, calibrate: bool) -> float:
    """What p(positive) must exceed: 0.5, or calibrated the median of all p (N,) (question 3.6).

    A model that says " good" too often is biased for all texts alike. With about as many positive as
    negative ones, the median separates them, and no label is needed for it. torch.median is the lower
    middle value: without ties, half of an even number of texts are positive.
    """
    return p.median().item() if calibrate else 0.5


def classify_binary_sentiment(
    logits: torch.Tensor, tokens_of_interest: list[int], calibrate: bool = False
) -> list[int]:
    """1 where p(positive) > boundary, else 0: logits (N, V), tokens [negative id, positive id] -> N ints."""
    p = p_positive(logits, tokens_of_interest)
    return (p > decision_boundary(p, calibrate)).int().tolist()


# --- Command ---


def main(argv: list[str] | None = None) -> None:
    """Classify reviews, print both accuracies and write classification.json and .png beside the model."""
    parser = argparse.ArgumentParser(description="Call reviews good or bad with a trained language model.")
    parser.add_argument("checkpoint", nargs="?", help="model.pt to use (default: the newest in outputs/)")
    parser.add_argument("--config", help="training YAML of the model; it is then <output_dir>/model.pt")
    parser.add_argument("--calibrate", action="store_true", help="write the calibrated predictions")
    parser.add_argument("--data", help="csv or jsonl with text and label, 'yelp' (the default) or 'sample'")
    parser.add_argument("--limit", type=int, default=1000, metavar="N", help="reviews to take (default: 1000)")
    parser.add_argument("--batch_size", type=int, default=64, metavar="B", help="reviews at once (default: 64)")
    args = parser.parse_args(argv)

    from support.checkpoint import load_trained_model
    from support.errors import exit_on_user_error, require
    from support.files import json_text, write_atomically
    from support.metrics import area_under_roc
    from support.plots import plot_classification
    from support.reviews import load_reviews
    from support.screen import bold, heading, next_commands, show_facts, show_note

    with exit_on_user_error():
        require(args.limit >= 1, f"--limit {args.limit}: give 1 or more")
        require(args.batch_size >= 1, f"--batch_size {args.batch_size}: give 1 or more")
        trained = load_trained_model(args.config, args.checkpoint)
        model, tokenizer = trained.model, trained.tokenizer

        def prompt_fits(text: str) -> bool:
            return len(tokenizer.encode_ordinary(YELP_TEMPLATE.format(text=text))) <= model.n_positions

        reviews = load_reviews(args.data, args.limit, fits=prompt_fits)
        labels = torch.tensor(reviews.labels)
        majority = max((labels == label).float().mean().item() for label in YELP_LABEL_MAP)

        heading("classify")
        if reviews.note:
            show_note(reviews.note)
        template = YELP_TEMPLATE.replace("\n", "\\n")
        words = [YELP_LABEL_MAP[label] for label in (0, 1)]
        show_facts(
            {
                **trained.facts(),
                "reviews": f"{reviews.name}: {len(labels)} that fit into {model.n_positions} tokens, "
                f"{labels.float().mean():.1%} positive",
                "prompt": f'"{template}", then "{words[1]}" or "{words[0]}"',
            }
        )

        started = time.perf_counter()
        prompts = [YELP_TEMPLATE.format(text=text) for text in reviews.texts]
        tokens = [tokenizer.encode_ordinary(word)[0] for word in words]
        logits = score(model, trained.device, tokenizer, prompts, args.batch_size).cpu()
        seconds = time.perf_counter() - started

        p = p_positive(logits, tokens)
        accuracy, boundaries, predictions = {}, {}, {}
        for name, calibrate in (("without calibration", False), ("with calibration", True)):
            predictions[name] = classify_binary_sentiment(logits, tokens, calibrate)
            accuracy[name] = (torch.tensor(predictions[name]) == labels).float().mean().item()
            boundaries[name] = decision_boundary(p, calibrate)
        auc = area_under_roc(p.numpy(), labels.numpy())

        for name in accuracy:
            print("  " + bold(f"{accuracy[name]:6.1%}") + f"  accuracy {name}, boundary {boundaries[name]:.4f}")
        print(f"  {0.5:6.1%}  a coin flip\n  {majority:6.1%}  always this set's majority class")
        print(f"  {auc:6.3f}  AUC: 0.5 is chance, 1 ranks every positive above every negative\n")

        chosen = "with calibration" if args.calibrate else "without calibration"
        results = {
            "checkpoint": str(trained.path),
            "reviews": reviews.name,
            "n": len(labels),
            "accuracy": accuracy,
            "boundary": boundaries,
            "majority-share": majority,
            "auc": auc,
            "predictions": {"kind": chosen, "label": predictions[chosen]},
            "true-label": reviews.labels,
            "p-positive": p.tolist(),
        }
        write_atomically(trained.folder / "classification.json", json_text(results))
        figure = trained.folder / "classification.png"
        plot_classification(p.numpy(), labels.numpy(), boundaries, f"{trained.path}, {reviews.name}", figure)
        print(f"{len(labels)} reviews in {seconds:.1f} s, written to {trained.folder}/classification.json, .png")
        next_commands(f"python generate.py --checkpoint {trained.path} --temperature 0.8")


if __name__ == "__main__":
    main()
