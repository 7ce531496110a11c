"""Zero-shot sentiment classification with a trained language model (question 3.4).

    python classify.py model.pt
    python classify.py outputs/GPT-tiny/model.pt --calibrate --data my_reviews.csv

Each review is put into a template that ends just before the verdict; the model then says whether " good" or
" bad" is more likely as the next token. Shapes: N texts, S tokens in each, V vocabulary size.
"""

import time

import torch
import torch.nn.functional as F

from generate import encode_prompt, left_pad
from model import DecoderLM

YELP_TEMPLATE = "Here is a review from Yelp: {text}\nOverall, the place was"
YELP_LABEL_MAP = {0: " bad", 1: " good"}


def score(model: DecoderLM, device, tokenizer, texts: list[str], batch_size: int) -> torch.Tensor:
    """Logits of the token that follows each text: N texts -> (N, V), row i for texts[i].

    Batches are padded on the left with tokenizer.eot_token, and masked. Of a text longer than P = n_positions only
    the last tokens are read. `tokenizer` is a tiktoken.Encoding.
    """
    P, was_training = model.n_positions, model.training
    model.eval()
    logits = [torch.empty(0, tokenizer.n_vocab, device=device)]
    with torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            prompts = [encode_prompt(tokenizer, text, P) for text in texts[start : start + batch_size]]
            input_ids, mask = left_pad(prompts, tokenizer.eot_token, device)
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


def classify_binary_sentiment(logits: torch.Tensor, tokens_of_interest: list[int], calibrate=False) -> list[int]:
    """1 where p(positive) > boundary, else 0: logits (N, V), tokens [negative id, positive id] -> N ints."""
    p = p_positive(logits, tokens_of_interest)
    return (p > decision_boundary(p, calibrate)).int().tolist()


def main(argv: list[str] | None = None) -> None:
    """Classify reviews, print both accuracies and write classification.csv, .json and .png."""
    from support import results
    from support.data import load_reviews
    from support.decoding import score_by_length
    from support.errors import exit_on_user_error, positive_int

    parser = results.model_arguments("Call reviews good or bad with a trained language model.", batch_size=16)
    parser.add_argument("--calibrate", action="store_true", help="write the calibrated predictions")
    parser.add_argument("--data", help="a csv, jsonl or text file, 'yelp' (default) or 'sample'")
    parser.add_argument("--limit", type=positive_int, default=1000, metavar="N", help="at most N labelled texts")
    args = parser.parse_args(argv)

    with exit_on_user_error():
        trained, folder = results.load_model(args)
        encode, n_positions = trained.tokenizer.encode_ordinary, trained.config.model_config.n_positions
        reviews = load_reviews(
            args.data, args.limit, fits=lambda text: len(encode(YELP_TEMPLATE.format(text=text))) <= n_positions
        )
        results.show_classification_header(trained, reviews, YELP_TEMPLATE, YELP_LABEL_MAP)

        started = time.perf_counter()
        prompts = [YELP_TEMPLATE.format(text=text) for text in reviews.texts]
        label_tokens = [encode(YELP_LABEL_MAP[label])[0] for label in (0, 1)]
        logits = score_by_length(score, trained, prompts, args.batch_size, label_tokens)  # (N, 2)
        p, seconds = p_positive(logits, [0, 1]), time.perf_counter() - started

        predictions = [classify_binary_sentiment(logits, [0, 1], calibrate) for calibrate in (False, True)]
        thresholds = [decision_boundary(p, calibrate) for calibrate in (False, True)]
        summary = results.show_accuracies(reviews, p, predictions, thresholds)
        results.write_classification(trained, folder, reviews, p, predictions, args, summary, seconds)


if __name__ == "__main__":
    main()
