"""Continue prompts with a trained language model (question 3.1).

    python generate.py --prefixes prefixs.json                       greedy: the likeliest token at each step
    python generate.py --prompt "Once upon a time" "The city"        texts of your own
    python generate.py --prefixes prefixs.json --temperature 0.8 --seed 1                       sampled
    python generate.py --prefixes prefixs.json --checkpoint outputs/GPT-tiny/model.pt

Shapes: B sequences in a batch, S tokens in each, V vocabulary size, P the longest sequence that the
model can read (n_positions).
"""

import time
from contextlib import contextmanager

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
    """Set the tail of the distribution to zero: (B, V) -> (B, V), which no longer sums to one.

    top_k keeps the k likeliest tokens (Fan et al. 2018, "Hierarchical Neural Story Generation"); top_p, or
    nucleus sampling, keeps the fewest likeliest tokens with total probability p or more (Holtzman et al.
    2020, "The Curious Case of Neural Text Degeneration"). With both, a token has to pass both.
    """
    ordered, tokens = probs.sort(dim=-1, descending=True)
    if top_p is not None and top_p < 1:  # at 1, a rounded sum would drop the last tokens
        mass_before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(mass_before >= top_p, 0.0)
    if top_k is not None:
        ordered[:, top_k:] = 0.0
    return torch.zeros_like(probs).scatter(-1, tokens, ordered)


def sample_next_token(
    logits: torch.Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """Draw each row's next token from torch's global generator, at temperature 0 the likeliest: (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = softmax_with_temperature(logits, temperature)
    if top_k is not None or top_p is not None:
        probs = keep_likely(probs, top_k, top_p)
    return torch.multinomial(probs, 1).squeeze(-1)


def left_pad(
    rows: list[list[int]], pad_token: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows of token ids on the left: (B, S) ids and (B, S) mask with 1.0 = real token.

    On the left, so that the last column holds the last token of every row.
    """
    S = max(map(len, rows))
    input_ids = torch.tensor([[pad_token] * (S - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0.0] * (S - len(row)) + [1.0] * len(row) for row in rows], device=device)
    return input_ids, mask


def encode_prompt(tokenizer, text: str, n_positions: int) -> list[int]:
    """The last P tokens of the text; for an empty one `<|endoftext|>`, which starts a document."""
    return tokenizer.encode_ordinary(text)[-n_positions:] or [tokenizer.eot_token]


@contextmanager
def inference(model: torch.nn.Module):
    """Put the model in evaluation and inference mode inside the block; every module's mode is restored."""
    training_modules = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training_modules:
            module.training = True


def last_token_logits(model: DecoderLM, hidden: torch.Tensor) -> torch.Tensor:
    """Return `model.token_logits(hidden)[:, -1]` without the other logits: (B, S, D) -> (B, V).

    On a CPU, the embeddings as left factor and two or more columns make it up to three times as fast.
    """
    last = hidden[:, -1]  # (B, D)
    columns = last.T if len(last) > 1 else last.repeat(2, 1).T
    return (model.token_embeddings.weight @ columns)[:, : len(last)].T.contiguous()


class CachedDecoder:
    """Runs a DecoderLM on a growing sequence, computing the keys and values of each token only once.

    In a causal model they do not change when tokens are appended, so a step reads only the new tokens.
    """

    def __init__(self, model: DecoderLM):
        self.model = model
        self.n_read = 0
        self.cache = [None] * len(model.blocks)  # per block: kT (B, H, HD, n_read), v (B, H, n_read, HD)

    def next_token_logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return `model(input_ids, attention_mask)[:, -1]`: (B, S) -> (B, V).

        input_ids must start with the tokens of the previous call.
        """
        x = self.model.embed(input_ids, attention_mask)[:, self.n_read :]  # (B, S_new, D)
        self.n_read = input_ids.shape[1]
        for i, block in enumerate(self.model.blocks):
            q, kT, v = block.mha.q_kT_v(block.ln_1(x))
            if self.cache[i] is not None:
                kT = torch.cat([self.cache[i][0], kT], dim=3)
                v = torch.cat([self.cache[i][1], v], dim=2)
            self.cache[i] = kT, v
            x = x + block.mha.projection(block.mha.self_attention(q, kT, v, attention_mask))
            x = x + block.ff(block.ln_2(x))
        return last_token_logits(self.model, self.model.ln(x))


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
    """Continue each prefix by up to max_new_tokens tokens; return the continuations only, in order.

    Each new token depends on exactly the last P tokens, or on all while there are fewer. A row ends at
    `<|endoftext|>`, which is not part of its text. Temperature 0 is greedy; otherwise tokens are drawn from
    torch's global generator. `tokenizer` is a tiktoken.Encoding.
    """
    n_positions = model.position_embeddings.num_embeddings
    eot_token = tokenizer.eot_token
    prompts = [encode_prompt(tokenizer, prefix, n_positions) for prefix in prefixes]
    texts = []
    with inference(model):
        for start in tqdm(range(0, len(prompts), batch_size), "generate", leave=False, disable=None):
            input_ids, mask = left_pad(prompts[start : start + batch_size], eot_token, device)
            n_prompt = input_ids.shape[1]
            decoder = CachedDecoder(model)
            ended = torch.zeros(len(input_ids), dtype=torch.bool, device=device)
            for _ in range(max_new_tokens):
                if input_ids.shape[1] > n_positions:  # the window slides: every token gets a new position
                    decoder = CachedDecoder(model)
                logits = decoder.next_token_logits(input_ids[:, -n_positions:], mask[:, -n_positions:])
                tokens = sample_next_token(logits, temperature, top_k, top_p)
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                ended |= tokens == eot_token
                if ended.all():
                    break
            for row in input_ids[:, n_prompt:].tolist():
                texts.append(tokenizer.decode(row[: row.index(eot_token)] if eot_token in row else row))
    return texts


def main(argv: list[str] | None = None) -> None:
    """Continue the prefixes of a file, print the texts and write generation.jsonl beside the checkpoint."""
    from support.arguments import ArgumentParser, positive_int, probability_mass, seed, temperature
    from support.checkpoint import load_trained_model
    from support.errors import exit_on_user_error
    from support.generation import read_prefixes, report_texts, show_generation_header

    parser = ArgumentParser(description="Continue prompts with a trained language model.")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prefixes", metavar="FILE", help="JSON list or JSON lines (default: prefixs.json)")
    prompts.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="texts to continue")
    parser.add_argument("--config", help="training YAML of the model; it is then <output_dir>/model.pt")
    parser.add_argument("--checkpoint", help="model.pt to use (default: the newest in outputs/)")
    parser.add_argument("--max_new_tokens", type=positive_int, default=32, metavar="N", help="(default: 32)")
    parser.add_argument("--temperature", type=temperature, default=0.0, metavar="T", help="0 = greedy (default)")
    parser.add_argument("--top_k", type=positive_int, metavar="K", help="sample from the K likeliest tokens only")
    parser.add_argument("--top_p", type=probability_mass, metavar="P", help="sample from the likeliest of mass P")
    parser.add_argument("--seed", type=seed, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--num_samples", type=positive_int, default=1, metavar="N", help="per prefix (default: 1)")
    parser.add_argument("--batch_size", type=positive_int, default=8, metavar="B", help="at once (default: 8)")
    parser.add_argument("--device", default="auto", help="auto (default), cuda, mps or cpu, as in the YAML")
    args = parser.parse_args(argv)

    with exit_on_user_error():
        prefixes = args.prompt or read_prefixes(args.prefixes)
        prompts = [prefix for prefix in prefixes for _ in range(args.num_samples)]
        trained = load_trained_model(args.config, args.checkpoint, args.device)
        show_generation_header(trained, args)

        torch.manual_seed(args.seed)
        started = time.perf_counter()
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
        report_texts(trained, prompts, texts, time.perf_counter() - started)


if __name__ == "__main__":
    main()
