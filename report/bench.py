"""Speed and memory of training, generation and scoring, against alternatives and the machine's limit.

    python report/bench.py                           # everything: under 9 minutes on 2 CPU cores
    python report/bench.py --only train --quick      # one part, one repetition
    LD_PRELOAD=libtcmalloc.so.4 python report/bench.py --json bench.json    # with another allocator
    python report/bench.py --device cuda             # on a GPU: see bench_gpu.py

Three contenders do the same work in float32 on the CPU, each with its defaults:

- this package: DecoderLM, ChunkedLanguageModelingLoss and fused AdamW, as train.py puts them together, with the
  library for float32 products that its commands choose (support/hardware.py);
- the textbook model below, written as most solutions of the assignment are: all logits, F.cross_entropy,
  masked_fill, nn.Dropout, torch's default AdamW; everything recomputed for each new token;
- GPT2LMHeadModel of transformers with its own loss, SDPA, key-value cache and torch's default AdamW. It is not a
  dependency of this package: its columns say "not installed" until `pip install transformers`.

All have dropout 0.1 in training, the same number of parameters and the same batch.

The contenders take turns in every repetition, so that drift of a shared machine affects all of them. Times are
medians, ratios are medians of the ratios within each repetition, limits use the best rates measured between
the repetitions and of either library. Peak memory is that of a whole fresh process that takes two training steps.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

N_VOCAB, EOT, CPU = 50257, 50256, torch.device("cpu")
PROMPT_TOKENS, NEW_TOKENS = 64, 128
N_TEXTS, TEXTBOOK_TEXTS, SCORING_BATCH = 1000, 200, 16
CONTENDERS = ["ours", "textbook"] + ["transformers"] * (importlib.util.find_spec("transformers") is not None)
CONFIGS = {
    "GPT-tiny": {"n_embd": 32, "n_head": 2, "n_positions": 128, "n_layer": 2},
    "d256 L4": {"n_embd": 256, "n_head": 8, "n_positions": 256, "n_layer": 4},
    "d512 L8": {"n_embd": 512, "n_head": 8, "n_positions": 256, "n_layer": 8},
}
BATCH_SIZES = {"GPT-tiny": 32, "d256 L4": 16, "d512 L8": 8}  # training, with sequences of n_positions tokens
DECODER = CONFIGS["d256 L4"]  # the model that generates and scores


# --- The contenders -----------------------------------------------------------------------------------------


class TextbookBlock(nn.Module):
    """A pre-LN block with explicit attention; its parameters have model.py's names, so that weights load."""

    def __init__(self, n_embd: int, n_head: int, p_dropout: float):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        projections = ("q_attn", "k_attn", "v_attn", "proj")
        self.mha = nn.ModuleDict({name: nn.Linear(n_embd, n_embd) for name in projections})
        self.ff = nn.ModuleDict({"linear_in": nn.Linear(n_embd, 4 * n_embd)})
        self.ff["linear_out"] = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(p_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, S, D = x.shape
        h = self.ln_1(x)
        q, k, v = (
            self.mha[name](h).view(B, S, self.n_head, D // self.n_head).transpose(1, 2)  # B×H×S×HD
            for name in ("q_attn", "k_attn", "v_attn")
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(D // self.n_head)  # B×H×S×S
        scores = scores.masked_fill(torch.tril(torch.ones(S, S)) == 0, float("-inf"))
        attn = self.dropout(F.softmax(scores, dim=-1)) @ v
        x = x + self.dropout(self.mha["proj"](attn.transpose(1, 2).reshape(B, S, D)))
        return x + self.dropout(self.ff["linear_out"](F.gelu(self.ff["linear_in"](self.ln_2(x)))))


class TextbookLM(nn.Module):
    """The decoder without any thought of cost: B×S ids to all B×S×V logits."""

    def __init__(self, n_embd: int, n_head: int, n_positions: int, n_layer: int, p_dropout: float = 0.1):
        super().__init__()
        self.token_embeddings = nn.Embedding(N_VOCAB, n_embd)
        self.position_embeddings = nn.Embedding(n_positions, n_embd)
        self.blocks = nn.ModuleList(TextbookBlock(n_embd, n_head, p_dropout) for _ in range(n_layer))
        self.ln = nn.LayerNorm(n_embd)
        self.dropout = nn.Dropout(p_dropout)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(input_ids.shape[1])
        x = self.dropout(self.token_embeddings(input_ids) + self.position_embeddings(positions))
        for block in self.blocks:
            x = block(x)
        return self.ln(x) @ self.token_embeddings.weight.T

    def load(self, model: nn.Module) -> None:
        """Takes our model's weights (ours also stores the constant scale_factor)."""
        self.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("scale_factor")})


def textbook_loss(model: TextbookLM, input_ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids)
    return F.cross_entropy(logits[:, :-1].reshape(-1, N_VOCAB), input_ids[:, 1:].reshape(-1))


@torch.no_grad()
def textbook_generate(model: TextbookLM, input_ids: torch.Tensor, n_new: int) -> torch.Tensor:
    """B×n_new greedy tokens, everything recomputed for each."""
    ids = input_ids
    for _ in range(n_new):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids[:, input_ids.shape[1] :]


@torch.no_grad()
def textbook_score(model: TextbookLM, texts: list[list[int]]) -> torch.Tensor:
    """N×V next-token logits, in batches of the given order, padded on the right (causal, so unmasked)."""
    scores = []
    for i in range(0, len(texts), SCORING_BATCH):
        batch = texts[i : i + SCORING_BATCH]
        lengths = torch.tensor([len(ids) for ids in batch])
        logits = model(torch.tensor([ids + [EOT] * (int(lengths.max()) - len(ids)) for ids in batch]))
        scores.append(logits[torch.arange(len(batch)), lengths - 1])
    return torch.cat(scores)


def transformers_model(config: dict[str, int], **options) -> nn.Module:
    """GPT-2 with its defaults (SDPA, dropout 0.1), but our exact GELU and no token that ends generation."""
    from transformers import GPT2Config, GPT2LMHeadModel

    unlike_gpt2 = {"activation_function": "gelu", "bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=N_VOCAB, **config, **unlike_gpt2, **options))
    model.loss_type = "ForCausalLM"  # its default, named because version 5 warns otherwise
    return model


class Trainer:
    """A contender's model, loss and optimizer; each call is a training step on the same batch.

    It imports only what its contender needs, because imports are part of peak memory.
    """

    def __init__(self, contender: str, name: str):
        torch.manual_seed(0)
        config = CONFIGS[name]
        self.input_ids = torch.randint(N_VOCAB, (BATCH_SIZES[name], config["n_positions"]))
        if contender == "ours":
            from model import DecoderLM
            from support.chunked_loss import ChunkedLanguageModelingLoss

            self.model = DecoderLM(N_VOCAB, **config)
            self.loss = ChunkedLanguageModelingLoss(self.model)
        elif contender == "textbook":
            self.model = TextbookLM(**config)
            self.loss = lambda ids: textbook_loss(self.model, ids)
        else:
            self.model = transformers_model(config)
            self.loss = lambda ids: self.model(ids, labels=ids).loss
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=contender == "ours")
        self.adamw_seconds: list[float] = []

    def __call__(self, repetition: int) -> None:
        self.loss(self.input_ids).backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.adamw_seconds.append(time.perf_counter() - start)
        self.optimizer.zero_grad()


# --- Measuring ----------------------------------------------------------------------------------------------


def default_products(contender: str) -> None:
    """Leave PyTorch's switch for float32 products at its default for every contender."""
    torch.set_float32_matmul_precision("highest")


def choose_products(contender: str) -> None:
    """Set PyTorch's switch for float32 products: as our commands do for ours, the default for the others."""
    default_products(contender)
    if contender == "ours":
        from support.hardware import choose_float32_products

        choose_float32_products()


def interleave(runs: dict[str, Callable], probes: dict[str, Callable], repetitions: int, choose=choose_products):
    """Seconds of each run per repetition, its last result, and the best value of each probe.

    A run is called with the number of the repetition, and once before with -1 to warm up.
    """
    for name, run in runs.items():
        choose(name)
        run(-1)
    seconds, results, best = {name: [] for name in runs}, {}, dict.fromkeys(probes, 0.0)
    for repetition in range(repetitions):
        for name, run in runs.items():
            choose(name)
            start = time.perf_counter()
            results[name] = run(repetition)
            seconds[name].append(time.perf_counter() - start)
        best = {name: max(best[name], probe()) for name, probe in probes.items()}
    return seconds, results, best


def compare(seconds: dict, unit: str, convert: Callable, others=("textbook", "transformers")) -> dict:
    """Columns: each contender's median in `unit`, and how many times as fast as each of the others we are."""
    columns = {f"{name} {unit}": "not installed" for name in ("ours", *others)}
    columns |= {f"{name} {unit}": convert(median(times)) for name, times in seconds.items()}
    for name in others:
        ratios = [other / ours for ours, other in zip(seconds["ours"], seconds.get(name, []), strict=False)]
        columns[f"× {name}"] = median(ratios) if ratios else "not installed"
    return columns


def best_rate(work: float, function: Callable, *args, calls: int = 4, **kwargs) -> float:
    """Work per second in the fastest of some calls."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function(*args, **kwargs)
        times.append(time.perf_counter() - start)
    return work / min(times)


def product_rate(shapes: list[tuple[int, int, int]]) -> float:
    """FLOP/s, the best over a 2048-square product and over m×k @ k×n for each (m, k, n) of `shapes`."""
    rates = []
    for contender in ("ours", "textbook"):
        choose_products(contender)
        for m, k, n in [(2048, 2048, 2048), *shapes]:
            a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
            rates.append(best_rate(2 * m * k * n, torch.mm, a, b, out=out))
    return max(rates)


def exp_rate() -> float:
    """exp in elements/s: 65,536 per thread fit a core's second-level cache, and none of them underflows."""
    x = torch.randn(65_536 * torch.get_num_threads())
    return best_rate(x.numel(), torch.exp, x, out=torch.empty_like(x), calls=200)


def read_rate() -> float:
    """Bytes/s at which 256 MiB, more than the caches, are summed or (as in decoding) times a vector."""
    matrix = torch.ones(65_536, 1024)
    return max(best_rate(4 * matrix.numel(), matrix.sum), best_rate(4 * matrix.numel(), matrix.mv, matrix[0]))


def block_shapes(n_tokens: int, D: int) -> list[tuple[int, int, int]]:
    return [(n_tokens, D, D), (n_tokens, D, 4 * D), (n_tokens, 4 * D, D)]


def print_peak_memory(name: str, contender: str) -> None:
    """MiB; run in a separate process."""
    trainer = Trainer(contender, name)
    choose_products(contender)
    trainer(0)
    trainer(1)  # now with the optimizer's state from the start
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def bench_memory(name: str) -> dict:
    row = {"model": name, "ours": 0.0, "textbook": 0.0, "transformers": "not installed"}
    for contender in CONTENDERS:
        command = [sys.executable, __file__, "--peak", name, contender]
        row[contender] = float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return row


def bench_training(name: str, repetitions: int) -> dict:
    trainers = {contender: Trainer(contender, name) for contender in CONTENDERS}
    check_same_loss(trainers["ours"], trainers["textbook"])
    assert len({sum(p.numel() for p in t.model.parameters()) for t in trainers.values()}) == 1
    D, S, L = (CONFIGS[name][key] for key in ("n_embd", "n_positions", "n_layer"))
    V, N = N_VOCAB, BATCH_SIZES[name] * S
    n = min(N, 512)  # of the products with V: with all N rows one would time the memory behind the logits
    shapes = [(n, D, V), (n, V, D), (V, n, D), *block_shapes(N, D)]
    probes = {"R": lambda: product_rate(shapes), "E": exp_rate}
    seconds, _, best = interleave(trainers, probes, repetitions)
    adamw = median(trainers["ours"].adamw_seconds[1:])  # the first step also allocates
    limit = (6 * N * D * V + 72 * L * D**2 * N + 12 * L * D * S * N) / best["R"] + N * V / best["E"] + adamw
    return {
        "model": name,
        **compare(seconds, "tok/s", lambda s: N / s),
        "limit tok/s": N / limit,
        "time / limit": median(seconds["ours"]) / limit,
        "R GFLOP/s": best["R"] / 1e9,
        "E G/s": best["E"] / 1e9,
        "AdamW ms": 1e3 * adamw,
    }


def check_same_loss(ours: Trainer, textbook: Trainer) -> None:
    """With equal weights and no dropout the two losses are equal."""
    textbook.model.load(ours.model.eval())
    textbook.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.loss(ours.input_ids[:2]), textbook.loss(ours.input_ids[:2]))
    ours.model.train()
    textbook.model.train()


def decoding_setup() -> tuple:
    """The tokenizer, our model and the textbook's with equal weights, and a maker of random texts.

    The maker takes numbers of tokens and returns ids and texts. It draws from tokens like " word", which
    encode to themselves whatever stands before them.
    """
    from model import DecoderLM
    from support.tokenizer import get_tokenizer

    torch.manual_seed(0)
    tokenizer = get_tokenizer()
    ours, textbook = DecoderLM(N_VOCAB, **DECODER).eval(), TextbookLM(**DECODER).eval()
    with torch.no_grad():  # at their initial size the blocks change too little to ever leave the last token
        for module in ours.blocks.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(5)
    textbook.load(ours)
    words = [i for i in range(1000, 20_000) if re.fullmatch(" [a-z]{3,}", tokenizer.decode([i]))]

    def random_texts(lengths: list[int]) -> tuple[list[list[int]], list[str]]:
        ids = [torch.tensor(words)[torch.randint(len(words), (length,))].tolist() for length in lengths]
        texts = [tokenizer.decode(row) for row in ids]
        assert [tokenizer.encode(text) for text in texts] == ids
        return ids, texts

    return tokenizer, ours, textbook, random_texts


def bench_generation(batch_size: int, repetitions: int) -> dict:
    """The limit: each step reads every weight, but for the position embeddings, once for the whole batch."""
    from generate import generate

    tokenizer, ours, textbook, random_texts = decoding_setup()
    prompts, prefixes = random_texts([PROMPT_TOKENS] * batch_size)
    input_ids = torch.tensor(prompts)

    def n_new(repetition: int) -> int:
        return 4 if repetition < 0 else NEW_TOKENS

    runs = {
        "ours": lambda r: generate(ours, CPU, tokenizer, prefixes, batch_size, max_new_tokens=n_new(r)),
        "textbook": lambda r: textbook_generate(textbook, input_ids, n_new(r)),
    }
    if "transformers" in CONTENDERS:
        gpt2 = transformers_model(DECODER).eval()
        options = {"attention_mask": torch.ones_like(input_ids), "do_sample": False, "pad_token_id": EOT}
        runs["transformers"] = lambda r: gpt2.generate(input_ids, max_new_tokens=n_new(r), **options)
    # generate.py keeps PyTorch's default
    seconds, results, best = interleave(runs, {"read": read_rate}, repetitions, default_products)
    assert EOT not in results["textbook"], "a row ended early, so times per token are wrong: use another seed"
    expected = [tokenizer.decode(ids) for ids in results["textbook"].tolist()]
    equal = [a == b for a, b in zip(results["ours"], expected, strict=True)]
    weight_bytes = 4 * (sum(p.numel() for p in ours.parameters()) - ours.position_embeddings.weight.numel())
    limit = NEW_TOKENS * weight_bytes / best["read"]
    n_tokens = batch_size * NEW_TOKENS
    return {
        "batch": str(batch_size),
        **compare(seconds, "ms/token", lambda s: 1e3 * s / n_tokens),
        "limit ms/token": 1e3 * limit / n_tokens,
        "time / limit": median(seconds["ours"]) / limit,
        "read GiB/s": best["read"] / 2**30,
        "texts equal to textbook's": f"{sum(equal)} of {batch_size}",
    }


def bench_scoring(repetitions: int) -> dict:
    from classify import score

    tokenizer, ours, textbook, random_texts = decoding_setup()
    # Short reviews are more common than long ones: the logarithm of the length is uniform over 20 to 250.
    lengths = torch.empty(N_TEXTS).uniform_(math.log(20), math.log(250)).exp().round().int().tolist()
    ids, texts = random_texts(lengths)

    def part(repetition: int) -> slice:
        """All the texts would take the textbook more than a minute: each repetition has the next part."""
        start = repetition * TEXTBOOK_TEXTS % N_TEXTS
        return slice(0, 32) if repetition < 0 else slice(start, start + TEXTBOOK_TEXTS)

    runs = {
        "ours": lambda r: score(ours, CPU, tokenizer, texts[part(r)] if r < 0 else texts, SCORING_BATCH),
        "textbook": lambda r: textbook_score(textbook, ids[part(r)]),
    }
    L, D = DECODER["n_layer"], DECODER["n_embd"]
    probes = {"R": lambda: product_rate(block_shapes(2048, D))}
    seconds, results, best = interleave(runs, probes, repetitions)
    seconds["textbook"] = [s * N_TEXTS / TEXTBOOK_TEXTS for s in seconds["textbook"]]  # as if for all texts
    same_texts = results["ours"][part(repetitions - 1)]
    torch.testing.assert_close(same_texts, results["textbook"], atol=1e-4, rtol=0)
    limit = sum(24 * L * D**2 * n + 4 * L * D * n**2 + 2 * D * N_VOCAB for n in lengths) / best["R"]
    return {
        "texts": f"{N_TEXTS}, mean {sum(lengths) / N_TEXTS:.0f} tokens",
        **compare(seconds, "texts/s", lambda s: N_TEXTS / s, others=("textbook",)),
        "limit texts/s": N_TEXTS / limit,
        "time / limit": median(seconds["ours"]) / limit,
        "R GFLOP/s": best["R"] / 1e9,
    }


# --- Reporting ----------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    transformers = importlib.metadata.version("transformers") if len(CONTENDERS) == 3 else "not installed"
    cpuinfo, maps = Path("/proc/cpuinfo"), Path("/proc/self/maps")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    preloaded = re.search(r"lib(tcmalloc|jemalloc|mimalloc)", maps.read_text()) if maps.exists() else None
    return {
        "date": datetime.date.today().isoformat(),
        "CPU": cpu[1] if cpu else platform.processor(),
        "threads": str(torch.get_num_threads()),
        "load average": f"{os.getloadavg()[0]:.1f}",
        "allocator": preloaded[1] if preloaded else " ".join(["malloc of", *platform.libc_ver()]),
        "torch": torch.__version__,
        "transformers": transformers,
    }


def print_table(title: str, rows: list[dict]) -> None:
    """A Markdown table; numbers get three digits."""

    def cell(value: float | str) -> str:
        return value if isinstance(value, str) else f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"

    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    print(f"\n{title}\n")
    for line in lines:
        padded = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        print("| " + " | ".join([line[0].ljust(widths[0]), *padded]) + " |", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repetition of everything")
    parser.add_argument("--only", choices=["train", "generate", "score"], help="one part of the bench")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:1")
    parser.add_argument("--json", metavar="FILE", help="write the unrounded tables to FILE")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.peak:
        return print_peak_memory(*args.peak)

    results: dict = {"environment": environment()}
    print("; ".join(f"{key} {value}" for key, value in results["environment"].items()), flush=True)
    if args.device == "cpu":
        bench_cpu(args, results)
    else:
        from bench_gpu import bench_gpu

        bench_gpu(args.device, args.quick, results)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def bench_cpu(args: argparse.Namespace, results: dict) -> None:
    """Measure, print and keep the tables in `results`."""

    def report(title: str, bench: Callable[..., dict], *calls: tuple) -> None:
        results[title] = [bench(*call) for call in calls]
        print_table(title, results[title])

    def repetitions(n: int) -> int:
        return 1 if args.quick else n

    if args.only in (None, "train"):
        # First, while this process is small: on Linux a child's peak starts at that of its parent.
        report("Peak memory of a training process, MiB", bench_memory, *((name,) for name in CONFIGS))
        calls = (("GPT-tiny", repetitions(7)), ("d256 L4", repetitions(3)), ("d512 L8", repetitions(3)))
        report("Training steps: forward, backward, AdamW", bench_training, *calls)
    if args.only in (None, "generate"):
        title = f"Greedy generation, d256 L4, {PROMPT_TOKENS} + {NEW_TOKENS} tokens"
        report(title, bench_generation, (1, repetitions(3)), (8, repetitions(2)))
    if args.only in (None, "score"):
        report("Next-token scores, d256 L4", bench_scoring, (repetitions(2),))


if __name__ == "__main__":
    main()
