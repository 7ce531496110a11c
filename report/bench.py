"""Speed of training, generation and scoring, beside the plain code and GPT2LMHeadModel of transformers.

    python report/bench.py                           # on a CPU; also --quick, --only train
    python report/bench.py --device cuda --quick     # on a GPU: at most 150 seconds
    python report/bench.py --tiny                    # seconds: small models, to try this script

The contenders do the same work with as many parameters, in the same precision:

- this package: with the loss and the decoder that train.py and generate.py choose on this device;
- plain: with the definition of the loss, and a loop that computes everything again for each token;
- transformers: GPT-2 with SDPA, its own loss and its own cache, where transformers is installed.

"% of products": the FLOPs of a step, by the formula in model.py, against the rate of one large matrix product.
"""

import argparse
import gc
import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classify import score  # noqa: E402
from generate import generate  # noqa: E402
from model import DecoderLM  # noqa: E402
from support.chunked_loss import PlainLoss, choose_loss, compiled  # noqa: E402
from support.decoding import CachedDecoder, score_by_length  # noqa: E402
from support.device import choose_device  # noqa: E402
from train import compute_language_modeling_loss  # noqa: E402

STARTED, QUICK_SECONDS = time.monotonic(), 100  # after these, a quick bench compiles nothing more
CONTENDERS = ["plain", "this package"] + ["transformers"] * (importlib.util.find_spec("transformers") is not None)
N_VOCAB, EOT, WORD = 50257, 50256, 262  # GPT-2's, and any token


def shape(n_embd, n_head, n_positions, n_layer, batch_size, p_dropout=0.1) -> SimpleNamespace:
    """A model, and the batch that it trains on: batch_size rows of n_positions tokens."""
    model_config = {"n_embd": n_embd, "n_head": n_head, "n_positions": n_positions, "n_layer": n_layer}
    return SimpleNamespace(model_config=model_config, rows=(batch_size, n_positions), p_dropout=p_dropout)


SHAPES = {"GPT-tiny": shape(32, 2, 128, 2, 32), "d256": shape(256, 8, 256, 4, 16)}
LARGEST = {"cpu": {"d512": shape(512, 8, 256, 8, 8)}, "cuda": {"final-1e17": shape(256, 8, 256, 8, 64, 0.0)}}
TOKENIZER = SimpleNamespace(eot_token=EOT, n_vocab=N_VOCAB)  # its texts are ids: a prompt has the length wanted
TOKENIZER.encode_ordinary = lambda text: [int(word) for word in text.split()]
TOKENIZER.decode = lambda ids: " ".join(map(str, ids))


def transformers_model(shape: SimpleNamespace) -> nn.Module:
    """GPT-2 with its defaults (SDPA), but our exact GELU and dropout, and no token that ends generation."""
    from transformers import GPT2Config, GPT2LMHeadModel

    options = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape.p_dropout)
    options |= {"activation_function": "gelu", "bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=N_VOCAB, **shape.model_config, **options))
    model.loss_type = "ForCausalLM"  # its default, named because version 5 warns otherwise
    return model


def training_step(contender: str, shape: SimpleNamespace, hardware) -> Callable[[], None]:
    """A step of the contender's model, loss and optimizer, always on the same batch."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # else a later model is compiled for unknown sizes, and slower
    device, (kind, _, suffix) = hardware.device, contender.partition(", ")
    input_ids = torch.randint(N_VOCAB, shape.rows).to(device)
    if kind == "transformers":
        model = transformers_model(shape).to(device)
        forward = torch.compile(model) if suffix else model
        loss_fn = lambda ids: forward(ids, labels=ids).loss  # noqa: E731
    else:
        model = DecoderLM(N_VOCAB, **shape.model_config, p_dropout=shape.p_dropout).to(device)
        definition = compute_language_modeling_loss
        loss_fn = PlainLoss(model, definition) if kind == "plain" else choose_loss(model, definition, device)
        loss_fn = compiled(loss_fn, device) if suffix else loss_fn
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=hardware.device.type != "mps")

    def step() -> None:
        optimizer.zero_grad()
        with hardware.autocast():
            loss = loss_fn(input_ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def median_seconds(function, device: torch.device, repetitions: int, calls: int = 1) -> float:
    """Of one call."""
    wait, times = torch.get_device_module(device).synchronize, []
    for _ in range(repetitions):
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        times.append((time.perf_counter() - started) / calls)
    return median(times)


def product_rate(hardware) -> float:
    """FLOP/s of one large matrix product in the precision of training."""
    size = 8192 if hardware.device.type == "cuda" else 2048
    a = torch.randn(size, size, device=hardware.device, dtype=hardware.dtype)
    return 2 * size**3 / median_seconds(lambda: a @ a, hardware.device, 5, 4)


def measure_training(contender: str, shape: SimpleNamespace, hardware, repetitions: int) -> list[float]:
    """ms of a step, tokens/s, TFLOPS, and peak memory in GB: on a GPU used and reserved, else of this process."""
    device, on_gpu = hardware.device, hardware.device.type == "cuda"
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step = training_step(contender, shape, hardware)
    for _ in range(3 if on_gpu else 1):
        step()
    seconds, n_tokens = median_seconds(step, device, repetitions, 10 if on_gpu else 1), math.prod(shape.rows)
    flops = DecoderLM(N_VOCAB, **shape.model_config).flops_per_token * n_tokens
    if on_gpu:
        memory = [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)]
    elif sys.platform == "linux":
        memory = [1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])]
    else:
        memory = [math.nan]
    return [1e3 * seconds, n_tokens / seconds, flops / seconds / 1e12, *(n / 1e9 for n in memory)]


def bench_training(args: argparse.Namespace, hardware) -> None:
    """A row for each shape and contender, on a CPU in a process of its own. What is compiled comes last."""
    on_gpu, rate = hardware.device.type == "cuda", product_rate(hardware)
    print(f"\nTraining steps; one large matrix product reaches {rate / 1e12:.3g} TFLOPS\n")
    print_header("ms/step", "tokens/s", "TFLOPS", "peak GB", *["GB reserved"] * on_gpu, "% of products")
    runs = [(name, contender) for name in args.shapes for contender in CONTENDERS]
    runs += [(name, f"{kind}, compiled") for kind in CONTENDERS[1:] for name in reversed(args.shapes) if on_gpu]
    for name, contender in runs:
        if "compiled" in contender and args.quick and time.monotonic() - STARTED > QUICK_SECONDS:
            print(f"{name}, {contender}: left out, a quick bench has no time for it", flush=True)
            continue
        try:
            if on_gpu:
                row = measure_training(contender, args.shapes[name], hardware, args.repetitions)
            else:
                options = ["--quick"] * args.quick + ["--tiny"] * args.tiny + ["--one", name, contender]
                command = [sys.executable, __file__, *options]
                row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print_row(f"{name}, {contender}", *row, 1e14 * row[2] / rate)
        except Exception as error:  # out of memory, no compiler: the other contenders' figures are still of use
            print(f"{name}, {contender}: failed, {type(error).__name__}: {error}"[:300], flush=True)


def bench_generation(args: argparse.Namespace, hardware) -> None:
    """Greedy. At its initial weights, a model repeats its last token: no text ends early."""
    n_prompt, n_new = (8, 4) if args.tiny else (64, 128)
    print(f"\nGreedy generation, d256, {n_prompt} + {n_new} tokens\n")
    print_header("ms/step", "ms/token")
    torch.manual_seed(0)
    device, shape = hardware.device, args.shapes["d256"]
    model = DecoderLM(N_VOCAB, **shape.model_config).to(device).eval()
    gpt2 = transformers_model(shape).to(device).eval() if "transformers" in CONTENDERS else None

    def run(contender: str, B: int, n: int) -> None:
        if contender == "transformers":
            input_ids = torch.full((B, n_prompt), WORD, device=device)
            options = {"attention_mask": torch.ones_like(input_ids), "do_sample": False, "pad_token_id": EOT}
            gpt2.generate(input_ids, max_new_tokens=n, **options)
        else:
            decoder = CachedDecoder(model) if contender == "this package" else None
            prompts = [f"{WORD} " * n_prompt] * B
            generate(model, device, TOKENIZER, prompts, B, n, next_token_logits=decoder)

    for contender in CONTENDERS:
        for B in (1, 8):
            run(contender, B, 2)
            ms = 1e3 * median_seconds(partial(run, contender, B, n_new), device, args.repetitions) / n_new
            print_row(f"batch {B}, {contender}", ms, ms / B)


def bench_scoring(args: argparse.Namespace, hardware) -> None:
    """Texts of 20 to 250 tokens, the logarithm of the length uniform: most reviews are short."""
    n_texts, low, high = (8, 2, 10) if args.tiny else (1000, 20, 250)
    torch.manual_seed(0)
    model = DecoderLM(N_VOCAB, **args.shapes["d256"].model_config).to(hardware.device).eval()
    trained = SimpleNamespace(model=model, device=hardware.device, tokenizer=TOKENIZER)
    lengths = torch.empty(n_texts).uniform_(math.log(low), math.log(high)).exp().int()
    texts = [f"{WORD} " * length for length in lengths.tolist()]
    print(f"\nNext-token scores, d256, {n_texts} texts of {lengths.float().mean():.0f} tokens on average\n")
    print_header("seconds", "texts/s")
    score_by_length(score, trained, texts[:16], 16, [0, 1])
    run = partial(score_by_length, score, trained, texts, 16, [0, 1])
    seconds = median_seconds(run, hardware.device, args.repetitions)
    print_row("classify.py, batches of 16", seconds, n_texts / seconds)


def print_header(*columns: str) -> None:
    print(f"| {'':32} | " + " | ".join(f"{column:>13}" for column in columns) + " |")
    print(f"| {'-' * 32} | " + " | ".join(["-" * 12 + ":"] * len(columns)) + " |")


def print_row(label: str, *values: float) -> None:
    cells = (f"{value:,.0f}" if value >= 100 else f"{value:#.3g}" for value in values)
    print(f"| {label:32} | " + " | ".join(f"{cell:>13}" for cell in cells) + " |", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Measure what the module's docstring lists."""
    parts = {"generate": bench_generation, "score": bench_scoring, "train": bench_training}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:1")
    parser.add_argument("--only", choices=list(parts), help="one part of the bench")
    parser.add_argument("--quick", action="store_true", help="one repetition of everything")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try this script")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    args.repetitions, hardware = 1 if args.quick or args.tiny else 3, choose_device(args.device, training=True)
    args.shapes = {"d256": shape(8, 2, 16, 1, 2)} if args.tiny else SHAPES | LARGEST[hardware.device.type]
    if args.one:
        values = measure_training(args.one[1], args.shapes[args.one[0]], hardware, args.repetitions)
        return print(json.dumps(values))

    print(f"{hardware}; {torch.get_num_threads()} CPU threads; PyTorch {torch.__version__}")
    for name, bench in parts.items():
        if args.only in (None, name):
            bench(args, choose_device(args.device, training=name == "train"))
    print(f"\n{time.monotonic() - STARTED:.0f} s in all")


if __name__ == "__main__":
    main()
