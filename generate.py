"""Continue prompts with a trained language model (question 3.1).

    python generate.py --prefixes prefixs.json                       greedy: the likeliest token at each step
    python generate.py --prompt "Once upon a time" "The city"        texts of your own
    python generate.py outputs/GPT-tiny/model.pt --temperature 0.8 --seed 1              sampled

Shapes: B sequences in a batch, S tokens in each, V vocabulary size, P the model's n_positions.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import DecoderLM


def softmax_with_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities softmax(logits / temperature): (B, V) -> (B, V).

    Temperatures below 1 favour likely tokens, above 1 unlikely ones. At 0, the limit of small temperatures,
    all mass is on the arg max. Raises ValueError if the temperature is negative or NaN.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature = {temperature} must be 0 or more")
    if temperature <= torch.finfo(logits.dtype).tiny:  # would divide by zero
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    # Subtract the maximum first: divided by a small temperature, it would overflow.
    return F.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)


def keep_likely(probs: torch.Tensor, top_k: int | None = None, top_p: float | None = None) -> torch.Tensor:
    """Cut the tail off the distribution and scale the rest, so that it sums to one again: (B, V) -> (B, V).

    top_k keeps the k likeliest tokens (Fan et al. 2018, "Hierarchical Neural Story Generation"), top_p the
    fewest likeliest ones with total probability p or more (nucleus sampling, Holtzman et al. 2020, "The
    Curious Case of Neural Text Degeneration"). With both, a token has to pass both.
    """
    if top_k is None and top_p is None:
        return probs
    ordered, tokens = probs.sort(dim=-1, descending=True)
    if top_p is not None and top_p < 1:  # at 1, a rounded sum would drop the last tokens
        mass_before = ordered.cumsum(dim=-1) - ordered
        ordered[:, 1:].masked_fill_(mass_before[:, 1:] >= top_p, 0.0)
    if top_k is not None:
        ordered[:, top_k:] = 0.0
    kept = torch.zeros_like(probs).scatter(-1, tokens, ordered)
    return kept / kept.sum(dim=-1, keepdim=True)


def encode_prompt(tokenizer, text: str, n_positions: int) -> list[int]:
    """The last P tokens of the text; for an empty one `<|endoftext|>`, which starts a document."""
    return tokenizer.encode_ordinary(text)[-n_positions:] or [tokenizer.eot_token]


def left_pad(rows: list[list[int]], pad_token: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the left, so that the last column is every row's last token: (B, S) ids, (B, S) mask, 1.0 = real."""
    S = max(map(len, rows))
    input_ids = torch.tensor([[pad_token] * (S - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0.0] * (S - len(row)) + [1.0] * len(row) for row in rows], device=device)
    return input_ids, mask


def generate(
    model: DecoderLM,
    device: torch.device | str,
    tokenizer,
    prefixes: list[str],
    batch_size: int,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    next_token_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> list[str]:
    """Continue each prefix by up to max_new_tokens tokens; return the continuations only, in order.

    Batches are padded on the left with tokenizer.eot_token, and masked. Each new token depends on exactly the last
    P tokens, or on all while there are fewer. A row ends at `<|endoftext|>`, which is not part of its text.
    Sampling (temperature > 0) draws from torch's global generator.
    next_token_logits: input_ids (B, S), mask (B, S) -> the logits after each row (B, V); default: the model's.
    """
    next_token_logits = next_token_logits or (lambda input_ids, mask: model(input_ids, mask)[:, -1])
    P, eot_token = model.n_positions, tokenizer.eot_token
    was_training = model.training
    model.eval()
    texts = []
    with torch.inference_mode():
        for start in tqdm(range(0, len(prefixes), batch_size), "generate", leave=False, disable=None):
            prompts = [encode_prompt(tokenizer, text, P) for text in prefixes[start : start + batch_size]]
            input_ids, mask = left_pad(prompts, eot_token, device)
            n_prompt = input_ids.shape[1]
            ended = torch.zeros(len(input_ids), dtype=torch.bool, device=device)
            for _ in range(max_new_tokens):
                logits = next_token_logits(input_ids[:, -P:], mask[:, -P:])  # (B, V)
                if temperature == 0:
                    tokens = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
                else:
                    probs = keep_likely(softmax_with_temperature(logits, temperature), top_k, top_p)
                    tokens = torch.multinomial(probs, 1)
                input_ids = torch.cat([input_ids, tokens], dim=1)
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                ended |= tokens[:, 0] == eot_token
                if ended.all():
                    break
            for row in input_ids[:, n_prompt:].tolist():
                texts.append(tokenizer.decode(row[: row.index(eot_token)] if eot_token in row else row))
    model.train(was_training)
    return texts


def main(argv: list[str] | None = None) -> None:
    """Continue prompts, print the texts and write generation.jsonl."""
    from support import results
    from support.decoding import choose_decoder
    from support.errors import exit_on_user_error, positive_int, probability_mass, seed, temperature

    parser = results.model_arguments("Continue prompts with a trained language model.", batch_size=8)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prefixes", metavar="FILE", help="JSON list or JSON lines (default: prefixs.json)")
    source.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="texts to continue")
    source.add_argument("--interactive", action="store_true", help="continue each line of standard input")
    parser.add_argument("--max_new_tokens", type=positive_int, default=32, metavar="N", help="(default: 32)")
    parser.add_argument("--temperature", type=temperature, default=0.0, metavar="T", help="0 = greedy (default)")
    parser.add_argument("--top_k", type=positive_int, metavar="K", help="sample from the K likeliest tokens only")
    parser.add_argument("--top_p", type=probability_mass, metavar="P", help="sample from the likeliest of mass P")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the sampling (default: 0)")
    parser.add_argument("--num_samples", type=positive_int, default=1, metavar="N", help="per prompt (default: 1)")
    args = parser.parse_args(argv)

    with exit_on_user_error():
        trained, folder = results.load_model(args)
        results.show_generation_header(trained, args)
        options = {"top_k": args.top_k, "top_p": args.top_p} if args.top_k or args.top_p else {}
        options |= choose_decoder(trained, generate)
        torch.manual_seed(args.seed)
        started, pairs = time.perf_counter(), []
        for prompts in results.prompt_groups(args):  # all at once, unless they are typed
            settings = args.batch_size, args.max_new_tokens, args.temperature
            texts = generate(trained.model, trained.device, trained.tokenizer, prompts, *settings, **options)
            pairs += results.show_texts(trained, prompts, texts)
        results.write_texts(trained, folder, pairs, time.perf_counter() - started)


if __name__ == "__main__":
    main()
