"""Continue prompts with a trained language model (question 3.1).

    python generate.py --prefixes prefixs.json                       greedy: the likeliest token at each step
    python generate.py --prefixes prefixs.json --temperature 0.8 --seed 1                       sampled
    python generate.py --prefixes prefixs.json --checkpoint outputs/GPT-tiny/model.pt

Shapes: B sequences in a batch, S tokens in each, V vocabulary size, P the longest sequence that the
model can read (n_positions).
"""

import argparse
import json
import math
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import DecoderLM

# --- From logits to a token ---


def softmax_with_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities softmax(logits / temperature): (B, V) -> (B, V).

    Below 1 the likely tokens gain, above 1 the unlikely ones. At 0 all mass is on the arg max (greedy
    decoding), the limit for small temperatures. Raises ValueError when it is negative or NaN.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature = {temperature} must be 0 or more")
    if temperature <= torch.finfo(logits.dtype).tiny:  # would divide by zero
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    # The maximum is taken off first: divided by a small temperature it would overflow.
    return F.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)


def keep_likely(probs: torch.Tensor, top_k: int | None = None, top_p: float | None = None) -> torch.Tensor:
    """Set the tail of the distribution to zero: (B, V) -> (B, V), no longer summing to one.

    top_k keeps the k likeliest tokens (Fan et al. 2018, "Hierarchical Neural Story Generation"); top_p,
    nucleus sampling, the fewest likeliest tokens whose mass reaches p (Holtzman et al. 2020, "The Curious
    Case of Neural Text Degeneration"). Given both, a token has to pass both.
    """
    if top_k is not None or top_p is not None:
        ordered, tokens = probs.sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(dim=-1) - ordered
        if top_p is not None:
            ordered = ordered.masked_fill(mass_before >= top_p, 0.0)
        if top_k is not None:
            ordered[:, top_k:] = 0.0
        probs = torch.zeros_like(probs).scatter(-1, tokens, ordered)
    return probs


# --- Decoding ---


def left_pad(
    rows: list[list[int]], pad_token: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids, padded on the left to one length: (B, S) ids, (B, S) mask with 1.0 = real token.

    On the left, so that the last column is the last token of every row: its logits are those of the next.
    """
    S = max(map(len, rows))
    input_ids = torch.tensor([[pad_token] * (S - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0.0] * (S - len(row)) + [1.0] * len(row) for row in rows], device=device)
    return input_ids, mask


def encode_prompt(tokenizer, text: str, n_positions: int) -> list[int]:
    """The last P tokens of the text; `<|endoftext|>`, the start of a document, when it is empty."""
    return tokenizer.encode_ordinary(text)[-n_positions:] or [tokenizer.eot_token]


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
) -> list[str]:
    """Continue each prefix by up to max_new_tokens tokens; return the continuations alone, in order.

    Every new token depends on exactly the last P tokens, or on all while they are fewer. A row ends at
    `<|endoftext|>`, which is not part of its text. Tokens are drawn from torch's global generator;
    temperature 0 takes the likeliest. `tokenizer` is a tiktoken.Encoding.
    """
    n_positions = model.position_embeddings.num_embeddings
    prompts = [encode_prompt(tokenizer, prefix, n_positions) for prefix in prefixes]

    def next_tokens(logits: torch.Tensor) -> torch.Tensor:  # (B, V) -> (B,)
        probs = keep_likely(softmax_with_temperature(logits, temperature), top_k, top_p)
        return probs.argmax(dim=-1) if temperature == 0 else torch.multinomial(probs, 1).squeeze(-1)

    was_training = model.training
    model.eval()
    continuations = []
    try:
        with torch.inference_mode():
            for start in tqdm(range(0, len(prompts), batch_size), "generate", leave=False, disable=None):
                batch = left_pad(prompts[start : start + batch_size], tokenizer.eot_token, device)
                continuations += _continue_batch(model, *batch, next_tokens, max_new_tokens, tokenizer.eot_token)
    finally:
        model.train(was_training)
    return [tokenizer.decode(tokens) for tokens in continuations]


def _continue_batch(model, input_ids, mask, next_tokens, max_new_tokens, eot_token) -> list[list[int]]:
    """The new tokens of each row of one left-padded batch: input_ids (B, S), mask (B, S).

    Keys and values of earlier tokens are cached, so that a step reads one token. That holds until the window
    of P tokens is full: positions are absolute and learned, so when the window slides, every token in it gets
    another position, and with it other keys and values. Each step from there on reads the whole window.
    """
    prompt_len = input_ids.shape[1]
    continuations = [[] for _ in input_ids]
    going = torch.arange(len(input_ids), device=input_ids.device)  # the rows of the batch not yet ended
    n_positions = model.position_embeddings.num_embeddings
    caches = model.kv_caches() if hasattr(model, "kv_caches") else []
    padded = not mask.all()

    for _ in range(max_new_tokens):
        if caches and input_ids.shape[1] <= n_positions:
            new_ids = input_ids[:, caches[0].length :]
            logits = model.next_token_logits(new_ids, mask if padded else None, caches=caches)
        else:
            logits = last_logits(model, input_ids[:, -n_positions:], mask[:, -n_positions:])
        tokens = next_tokens(logits)[:, None]
        input_ids = torch.cat([input_ids, tokens], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)

        ended = (tokens == eot_token).squeeze(1)
        if ended.any():  # they leave the batch, and cost no more
            for row, ids in zip(going[ended].tolist(), input_ids[ended].tolist(), strict=True):
                continuations[row] = ids[prompt_len:-1]
            going, input_ids, mask = going[~ended], input_ids[~ended], mask[~ended]
            for cache in caches:
                cache.keep_rows(~ended)
            if len(going) == 0:
                break
    for row, ids in zip(going.tolist(), input_ids.tolist(), strict=True):
        continuations[row] = ids[prompt_len:]
    return continuations


def last_logits(model: DecoderLM, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`model(input_ids, mask)[:, -1]`, of the last position alone where the model can: (B, S) -> (B, V)."""
    if hasattr(model, "next_token_logits"):
        return model.next_token_logits(input_ids, mask)
    return model(input_ids, mask)[:, -1]


# --- Command ---


def main(argv: list[str] | None = None) -> None:
    """Continue the prefixes of a file, print the texts and write generation.jsonl beside the checkpoint."""
    parser = argparse.ArgumentParser(description="Continue prompts with a trained language model.")
    parser.add_argument("--prefixes", default=None, help="JSON list or JSON lines (default: prefixs.json)")
    parser.add_argument("--config", help="training YAML of the model; it is then <output_dir>/model.pt")
    parser.add_argument("--checkpoint", help="model.pt to use (default: the newest in outputs/)")
    parser.add_argument("--max_new_tokens", type=int, default=32, metavar="N", help="(default: 32)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 = greedy (default)")
    parser.add_argument("--top_k", type=int, metavar="K", help="sample from the K likeliest tokens only")
    parser.add_argument("--top_p", type=float, metavar="P", help="sample from the likeliest tokens of mass P")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="texts per prefix (default: 1)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="B", help="prompts at once (default: 8)")
    args = parser.parse_args(argv)

    from support.checkpoint import load_trained_model
    from support.errors import exit_on_user_error, require
    from support.files import write_atomically
    from support.prefixes import read_prefixes
    from support.screen import heading, next_commands, show_facts, show_text

    with exit_on_user_error():
        require(args.max_new_tokens >= 1, f"--max_new_tokens {args.max_new_tokens}: give 1 or more")
        require(0 <= args.temperature < math.inf, f"--temperature {args.temperature}: give 0 (greedy) or more")
        require(args.top_k is None or args.top_k >= 1, f"--top_k {args.top_k}: give 1 or more")
        require(args.top_p is None or 0 < args.top_p <= 1, f"--top_p {args.top_p}: give more than 0, at most 1")
        require(args.num_samples >= 1, f"--num_samples {args.num_samples}: give 1 or more")
        require(args.batch_size >= 1, f"--batch_size {args.batch_size}: give 1 or more")
        prefixes = read_prefixes(args.prefixes)
        trained = load_trained_model(args.config, args.checkpoint)

        heading("generate")
        sampling = "greedy (temperature 0)" if args.temperature == 0 else f"temperature {args.temperature:g}"
        limits = [f"{name} {value:g}" for name in ("top_k", "top_p") if (value := getattr(args, name))]
        seed = [f"seed {args.seed}"] if args.temperature > 0 else []
        sampling = ", ".join([sampling, *limits, *seed, f"up to {args.max_new_tokens} new tokens"])
        show_facts({**trained.facts(), "sampling": sampling})

        if trained.device.type == "cpu":  # one row at a time: what support/hardware.py chose for many is slower
            torch.set_float32_matmul_precision("highest")
        torch.manual_seed(args.seed)
        started = time.perf_counter()
        prompts = [prefix for prefix in prefixes for _ in range(args.num_samples)]
        texts = generate(
            trained.model,
            trained.device,
            trained.tokenizer,
            prompts,
            args.batch_size,
            args.max_new_tokens,
            args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
        )
        seconds = time.perf_counter() - started

        for prompt, text in zip(prompts, texts, strict=True):
            show_text(prompt, text)
        path = trained.folder / "generation.jsonl"
        pairs = zip(prompts, texts, strict=True)
        lines = [json.dumps({"prefix": p, "generation": g}, ensure_ascii=False) + "\n" for p, g in pairs]
        write_atomically(path, "".join(lines))
        print(f"{len(texts)} texts in {seconds:.1f} s, written to {path}")
        next_commands(f"python generate.py --checkpoint {trained.path} --temperature 0.8")


if __name__ == "__main__":
    main()
