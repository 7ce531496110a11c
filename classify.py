"""Zero-shot sentiment classification with a trained language model (question 3.4).

    python classify.py model.pt
    python classify.py --config configs/GPT-tiny.yaml --calibrate
    python classify.py outputs/GPT-tiny/model.pt --data my_reviews.csv

Each review is put into a template that ends just before the verdict; the model then says whether " good" or
" bad" is more likely as the next token.

Shapes: N texts, B of them in a batch, S tokens in each, V vocabulary size.
"""

import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from generate import encode_prompt, left_pad
from model import DecoderLM

YELP_TEMPLATE = "Here is a review from Yelp: {text}\nOverall, the place was"
YELP_LABEL_MAP = {0: " bad", 1: " good"}


def score(
    model: DecoderLM, device: torch.device | str, tokenizer, texts: list[str], batch_size: int
) -> torch.Tensor:
    """Logits of the token that follows each text: N texts -> (N, V), row i for texts[i].

    Of a text longer than n_positions only the last tokens are read. `tokenizer` is a tiktoken.Encoding.
    """
    was_training = model.training
    model.eval()
    logits = [torch.empty(0, tokenizer.n_vocab, device=device)]
    with torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            rows = [encode_prompt(tokenizer, text, model.n_positions) for text in batch]
            input_ids, mask = left_pad(rows, tokenizer.eot_token, device)
            logits.append(model.token_logits(model.hidden_states(input_ids, mask)[:, -1]))
    model.train(was_training)
    return torch.cat(logits)


def p_positive(logits: torch.Tensor, tokens_of_interest: list[int]) -> torch.Tensor:
    """The share of the positive token in a softmax over [negative id, positive id]: (N, V) -> (N,)."""
    return F.softmax(logits[:, tokens_of_interest], dim=-1)[:, 1]


def decision_boundary(p: torch.Tensor, calibrate: bool) -> float:
    """The value that p(positive) must exceed: 0.5 or, calibrated, the median of all p (N,) (question 3.6).

    A model that favours " good" does so for all texts alike. If about half of the texts are positive, the
    median separates the two halves, and needs no labels. torch.median takes the lower of two middle values: of
    an even number of texts without ties, exactly half are then called positive.
    """
    return p.median().item() if calibrate else 0.5


def classify_binary_sentiment(
    logits: torch.Tensor, tokens_of_interest: list[int], calibrate: bool = False
) -> list[int]:
    """1 where p(positive) > boundary, else 0: logits (N, V), tokens [negative id, positive id] -> N ints."""
    p = p_positive(logits, tokens_of_interest)
    return (p > decision_boundary(p, calibrate)).int().tolist()


def main(argv: list[str] | None = None) -> None:
    """Classify reviews, print both accuracies and write classification.csv, .json and .png."""
    from support import downstream as results
    from support.arguments import positive_int
    from support.checkpoint import load_trained_model
    from support.data import load_reviews
    from support.errors import exit_on_user_error

    parser = results.model_arguments("Call reviews good or bad with a trained language model.")
    parser.add_argument("--calibrate", action="store_true", help="write the calibrated predictions")
    parser.add_argument(
        "--data", help="csv, jsonl or text file, with or without labels; 'yelp' (default), 'sample'"
    )
    parser.add_argument("--limit", type=positive_int, default=1000, metavar="N", help="at most N (default: 1000)")
    parser.add_argument("--batch_size", type=positive_int, default=16, metavar="B", help="at once (default: 16)")
    args = parser.parse_args(argv)

    with exit_on_user_error():
        trained = load_trained_model(args.config, args.checkpoint, args.device)
        folder = results.results_folder(args.out, trained)
        model, tokenizer, n_positions = trained.model, trained.tokenizer, trained.config.model_config.n_positions

        def fits(text: str) -> bool:
            return len(tokenizer.encode_ordinary(YELP_TEMPLATE.format(text=text))) <= n_positions

        reviews = load_reviews(args.data, args.limit, fits)
        results.show_classification_header(trained, reviews, YELP_TEMPLATE, YELP_LABEL_MAP)

        prompts = [YELP_TEMPLATE.format(text=text) for text in reviews.texts]
        label_tokens = [tokenizer.encode_ordinary(YELP_LABEL_MAP[label])[0] for label in (0, 1)]
        started = time.perf_counter()
        logits = torch.empty(len(prompts), 2)  # of the N x V logits only the two that count are kept
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # so that little is padding
        for start in tqdm(range(0, len(prompts), args.batch_size), "score", leave=False, disable=None):
            rows = by_length[start : start + args.batch_size]
            texts = [prompts[i] for i in rows]
            logits[rows] = score(model, trained.device, tokenizer, texts, len(rows))[:, label_tokens].float().cpu()
        seconds = time.perf_counter() - started

        p = p_positive(logits, [0, 1])
        predictions = [classify_binary_sentiment(logits, [0, 1], calibrate) for calibrate in (False, True)]
        boundaries = [decision_boundary(p, calibrate) for calibrate in (False, True)]
        results.report_classification(
            trained, folder, reviews, p.numpy(), predictions, boundaries, args.calibrate, seconds
        )


if __name__ == "__main__":
    main()
