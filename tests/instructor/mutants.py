"""Do the tests tell wrong solutions from right ones?

    python tests/instructor/mutants.py            every wrong solution must fail a test of its own part
    python tests/instructor/mutants.py --quick    one wrong solution of each family
    python tests/instructor/mutants.py --right    every right solution, however plain, must get all points

A mutant is one plain solution (tests/plain/) with one mistake written into it. It runs in a process of its
own, against the tests of the part that the mistake is in and no others; the first failure is printed, as the
student would read it. Exit status 1 when a mutant survives, or a right solution loses a point.
"""

import argparse
import multiprocessing
import os
import sys
import types
from pathlib import Path
from typing import NamedTuple

os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # only the tests' own plugins, for speed

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

import points  # noqa: E402
import pytest  # noqa: E402
import tiktoken  # noqa: E402, F401  (imported before the fork, as wandb and torch are: seconds for each mutant)
import torch  # noqa: E402
import wandb  # noqa: E402, F401

MODULES = ("model", "train", "generate", "classify")
PATIENCE_SECONDS = 600  # for one mutant, which takes about one: a test that hangs must not hang this

FF, ATTENTION = "FeedForward and DecoderBlock", "self_attention"
LOSS, RANDOM, SEQUENTIAL = "compute_language_modeling_loss", "random_batch_sampler", "sequential_batch_sampler"
SOFTMAX, SENTIMENT = "softmax_with_temperature", "classify_binary_sentiment"

# The module that each part of the points belongs to. `evaluate` gives no points, but has tests all the same.
MODULE_OF = {
    part: file.removeprefix("test_").removesuffix(".py") for (_, part), (_, file) in points.GROUPS.items()
}
MODULE_OF["evaluate"] = "train"


class Mutant(NamedTuple):
    """A mistake: the texts `old` of the plain solution, each of which stands there once, become `new`."""

    what: str
    part: str  # whose tests must notice
    edits: tuple[tuple[str, str], ...]
    file: str | None = None  # in tests/plain, where it is not the part's module


def mistake(what: str, part: str, *texts: str, file: str | None = None) -> Mutant:
    return Mutant(what, part, tuple(zip(texts[::2], texts[1::2], strict=True)), file)


LEFT_IDS = "ids = torch.tensor([[eot] * (longest - len(row)) + row for row in rows], device=device)"
RIGHT_IDS = "ids = torch.tensor([row + [eot] * (longest - len(row)) for row in rows], device=device)"
LEFT_MASK = "[0.0] * (longest - len(row)) + [1.0] * len(row)"
RIGHT_MASK = "[1.0] * len(row) + [0.0] * (longest - len(row))"
MODEL_OF_WINDOW = "model(ids[:, -n_positions:], mask[:, -n_positions:])"
CACHED = "generate_with_cache"

# fmt: off
# ruff: noqa: E501 (one mutant, one line)
FAMILIES = {
    "feed-forward": [
        mistake("ReLU in place of GELU", FF, "F.gelu(", "F.relu("),
        mistake("the tanh approximation of GELU", FF, "F.gelu(self.linear_in(x))", 'F.gelu(self.linear_in(x), approximate="tanh")'),
        mistake("SiLU in place of GELU", FF, "F.gelu(", "F.silu("),
        mistake("no activation", FF, "F.gelu(self.linear_in(x))", "self.linear_in(x)"),
        mistake("no dropout", FF, "self.dropout(self.linear_out(hidden))", "self.linear_out(hidden)"),
        mistake("dropout on the hidden units", FF, "self.dropout(self.linear_out(hidden))", "self.linear_out(self.dropout(hidden))"),
        mistake("width 2 D", FF, "nn.Linear(n_embd, 4 * n_embd)", "nn.Linear(n_embd, 2 * n_embd)", "nn.Linear(4 * n_embd, n_embd)", "nn.Linear(2 * n_embd, n_embd)"),
    ],
    "evaluation": [
        mistake("in training mode", "evaluate", "model.eval()\n    total, count", "total, count"),
        mistake("the mode found is not restored", "evaluate", "model.train(was_training)", "model.train()"),
        mistake("mean of the means of unequal batches", "evaluate", "n = input_ids[:, 1:].numel()", "n = 1"),
        mistake("weighted by tokens, not by predictions", "evaluate", "n = input_ids[:, 1:].numel()", "n = input_ids.numel()"),
        mistake("perplexity in base 2", "evaluate", "math.exp(total / count)", "2 ** (total / count)"),
        mistake("perplexity averaged over batches", "evaluate", "total += n * loss.item()", "total += n * math.exp(loss.item())", '{"val-loss": total / count, "val-perplexity": math.exp(total / count)}', '{"val-loss": math.log(total / count), "val-perplexity": total / count}'),
        mistake("the weights are changed", "evaluate", "    model.train(was_training)", "    model.ln.weight.data *= 0.999\n    model.train(was_training)"),
        mistake("with gradients", "evaluate", "torch.inference_mode()", "torch.enable_grad()"),
    ],
    "attention": [
        mistake("no causal mask", ATTENTION, "torch.tril(torch.ones(S, S, dtype=torch.bool, device=q.device))", "torch.ones(S, S, dtype=torch.bool, device=q.device)"),
        mistake("transposed causal mask", ATTENTION, "torch.tril(", "torch.triu("),
        mistake("strict causal mask", ATTENTION, "device=q.device))", "device=q.device), -1)"),
        mistake("no causal mask where a padding mask is given", ATTENTION, "allowed = allowed & attention_mask.bool()", "allowed = attention_mask.bool()"),
        mistake("no scale", ATTENTION, "torch.matmul(q, kT) * self.scale_factor", "torch.matmul(q, kT)"),
        mistake("scaled twice", ATTENTION, "* self.scale_factor", "* self.scale_factor**2"),
        mistake("scaled by 1/sqrt(D)", ATTENTION, "1 / math.sqrt(self.head_size)", "1 / math.sqrt(n_embd)"),
        mistake("softmax over the queries", ATTENTION, "torch.softmax(scores, dim=-1)", "torch.softmax(scores, dim=-2)"),
        mistake("softmax over the heads", ATTENTION, "torch.softmax(scores, dim=-1)", "torch.softmax(scores, dim=1)"),
        mistake("mask after softmax, rows not summing to 1", ATTENTION, "scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)\n", "\n"),
        mistake("masked scores 0, not lowest", ATTENTION, "torch.finfo(scores.dtype).min", "0.0", "        weights = weights.masked_fill(~allowed, 0.0)\n", ""),
        mistake("padding mask on the queries", ATTENTION, ".view(B, 1, 1, S)", ".view(B, 1, S, 1)"),
        mistake("padding mask ignored", ATTENTION, "allowed = allowed & attention_mask.bool().view(B, 1, 1, S)", "pass"),
        mistake("padding mask inverted", ATTENTION, "attention_mask.bool().view", "(~attention_mask.bool()).view"),
        mistake("row 0's padding mask for the whole batch", ATTENTION, "attention_mask.bool().view(B, 1, 1, S)", "attention_mask[0].bool()"),
        mistake("padding mask not passed on by forward", ATTENTION, "self.self_attention(q, kT, v, attention_mask)", "self.self_attention(q, kT, v)"),
        mistake("a row without keys is NaN", ATTENTION, "torch.finfo(scores.dtype).min", "-torch.inf", "        weights = weights.masked_fill(~allowed, 0.0)\n", ""),
        mistake("a row without keys averages all values", ATTENTION, "        weights = weights.masked_fill(~allowed, 0.0)\n", ""),
        mistake("heads merged in the wrong order", ATTENTION, "attn.transpose(1, 2).reshape", "attn.reshape"),
        mistake("heads interleaved when merged", ATTENTION, "attn.transpose(1, 2).reshape", "attn.permute(0, 2, 3, 1).reshape"),
        mistake("no dropout on the weights", ATTENTION, "weights = self.dropout(weights)\n", "\n"),
        mistake("dropout on the result, not on the weights", ATTENTION, "weights = self.dropout(weights)\n", "\n", "attn = torch.matmul(weights, v)", "attn = self.dropout(torch.matmul(weights, v))"),
        mistake("dropout before softmax", ATTENTION, "scores = torch.matmul(q, kT) * self.scale_factor", "scores = self.dropout(torch.matmul(q, kT) * self.scale_factor)", "weights = self.dropout(weights)\n", "\n"),
        mistake("dropout active at evaluation", ATTENTION, "self.dropout(weights)", "F.dropout(weights, self.dropout.p)"),
        mistake("no dropout after the projection", ATTENTION, "self.dropout(self.proj(attn))", "self.proj(attn)"),
        mistake("no output projection", ATTENTION, "self.dropout(self.proj(attn))", "self.dropout(attn)"),
        mistake("split by a view that mixes tokens and heads", "q_kT_v", "self.q_attn(x).view(B, S, self.n_head, self.head_size).transpose(1, 2)", "self.q_attn(x).view(B, self.n_head, S, self.head_size)"),
        mistake("heads interleaved when split", "q_kT_v", "self.v_attn(x).view(B, S, self.n_head, self.head_size).transpose(1, 2)", "self.v_attn(x).view(B, S, self.head_size, self.n_head).permute(0, 3, 1, 2)"),
        mistake("kT by a view", "q_kT_v", "k.transpose(2, 3)", "k.reshape(B, self.n_head, self.head_size, S)"),
        mistake("k's weights for v", "q_kT_v", "self.v_attn(x)", "self.k_attn(x)"),
        mistake("q scaled in q_kT_v already", "q_kT_v", "return q, k", "return q * self.scale_factor, k"),
    ],
    "embedding": [
        mistake("positions ignore the mask", "embed", "if attention_mask is None:", "if True:"),
        mistake("positions with a mask off by one", "embed", "torch.cumsum(attention_mask.long(), dim=1) - 1", "torch.cumsum(attention_mask.long(), dim=1)"),
        mistake("positions without a mask start at 1", "embed", "torch.arange(input_ids.shape[1], device=input_ids.device)", "torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)"),
        mistake("positions shifted by the padding on the left only", "embed", "torch.cumsum(attention_mask.long(), dim=1) - 1", "torch.arange(input_ids.shape[1]) - attention_mask.long().argmax(dim=1, keepdim=True)"),
        mistake("no positions", "embed", " + self.position_embeddings(position_ids)", ""),
        mistake("tokens scaled by sqrt(D)", "embed", "self.token_embeddings(input_ids)", "self.token_embeddings(input_ids) * self.n_embd**0.5"),
        mistake("no dropout", "embed", "        return self.dropout(x)\n", "        return x\n"),
        mistake("dropout active at evaluation", "embed", "        return self.dropout(x)\n", "        return F.dropout(x, self.dropout.p)\n"),
        mistake("positions beyond the last one clamped", "embed", "x = self.token_embeddings(input_ids)", "position_ids = position_ids.clamp(max=self.n_positions - 1)\n        x = self.token_embeddings(input_ids)"),
    ],
    "block": [
        mistake("post-norm for pre-norm", FF, "x = x + self.mha(self.ln_1(x), attention_mask)", "x = self.ln_1(x + self.mha(x, attention_mask))", "x = x + self.ff(self.ln_2(x))", "x = self.ln_2(x + self.ff(x))"),
        mistake("ln_1 for both", FF, "self.ln_2(x)", "self.ln_1(x)"),
        mistake("the norms swapped", FF, "self.ln_1(x)", "self.ln_2(x)", "self.ff(self.ln_2(x))", "self.ff(self.ln_1(x))"),
        mistake("no norm before the attention", FF, "self.mha(self.ln_1(x), attention_mask)", "self.mha(x, attention_mask)"),
        mistake("no norm before the feed-forward", FF, "self.ff(self.ln_2(x))", "self.ff(x)"),
        mistake("norm on the residual stream", FF, "x = x + self.mha(self.ln_1(x), attention_mask)", "x = self.ln_1(x)\n        x = x + self.mha(x, attention_mask)"),
        mistake("no residual around the attention", FF, "x = x + self.mha", "x = self.mha"),
        mistake("no residual around the feed-forward", FF, "x = x + self.ff", "x = self.ff"),
        mistake("no feed-forward", FF, "        x = x + self.ff(self.ln_2(x))\n", ""),
        mistake("attention and feed-forward side by side", FF, "x = x + self.mha(self.ln_1(x), attention_mask)\n        x = x + self.ff(self.ln_2(x))", "x = x + self.mha(self.ln_1(x), attention_mask) + self.ff(self.ln_2(x))"),
        mistake("padding mask not passed to the attention", FF, "self.mha(self.ln_1(x), attention_mask)", "self.mha(self.ln_1(x))"),
    ],
    "language model": [
        mistake("no final norm", "DecoderLM", "return self.ln(x)", "return x"),
        mistake("the final norm before the blocks", "DecoderLM", "x = self.embed(input_ids, attention_mask)", "x = self.ln(self.embed(input_ids, attention_mask))", "return self.ln(x)", "return x"),
        mistake("an output matrix of its own", "DecoderLM", "        self._init_weights()\n", "        self._init_weights()\n        self.head = nn.Linear(n_embd, n_vocab, bias=False)\n", "x @ self.token_embeddings.weight.T", "self.head(x)"),
        mistake("a copy of the embeddings as output matrix", "DecoderLM", "        self._init_weights()\n", "        self._init_weights()\n        self.head = [self.token_embeddings.weight.detach().clone()]\n", "x @ self.token_embeddings.weight.T", "x @ self.head[0].T"),
        mistake("the output matrix detached", "DecoderLM", "self.token_embeddings.weight.T", "self.token_embeddings.weight.detach().T"),
        mistake("a bias on the logits", "DecoderLM", "        self._init_weights()\n", "        self._init_weights()\n        self.bias = nn.Parameter(torch.zeros(n_vocab))\n", "x @ self.token_embeddings.weight.T", "x @ self.token_embeddings.weight.T + self.bias"),
        mistake("torch's default initialisation", "DecoderLM", "        self._init_weights()\n", ""),
        mistake("residual projections not smaller", "DecoderLM", "for block in self.blocks:\n            nn.init", "for block in []:\n            nn.init"),
        mistake("residual projections by sqrt(n_layer)", "DecoderLM", "nn.init.normal_(block.ff.linear_out.weight, mean=0.0, std=0.02 / math.sqrt(2 * self.n_layer))", "nn.init.normal_(block.ff.linear_out.weight, mean=0.0, std=0.02 / math.sqrt(self.n_layer))"),
        mistake("biases not 0", "DecoderLM", "                nn.init.zeros_(module.bias)\n", ""),
        mistake("the blocks are skipped", "DecoderLM", "for block in self.blocks:\n            x = ", "for block in []:\n            x = "),
        mistake("only the first block", "DecoderLM", "for block in self.blocks:\n            x = ", "for block in self.blocks[:1]:\n            x = "),
        mistake("one block for all layers", "DecoderLM", "nn.ModuleList([DecoderBlock(n_embd, n_head, p_dropout=p_dropout) for _ in range(n_layer)])", "nn.ModuleList([DecoderBlock(n_embd, n_head, p_dropout=p_dropout)] * n_layer)"),
        mistake("the blocks backwards", "DecoderLM", "for block in self.blocks:\n            x = ", "for block in reversed(self.blocks):\n            x = "),
        mistake("padding mask not passed to the blocks", "DecoderLM", "x = block(x, attention_mask)", "x = block(x, None)"),
        mistake("padding mask not passed to embed", "DecoderLM", "x = self.embed(input_ids, attention_mask)", "x = self.embed(input_ids)"),
        mistake("token 0 taken for padding", "DecoderLM", "x = self.embed(input_ids, attention_mask)", "attention_mask = (input_ids != 0).float()\n        x = self.embed(input_ids, attention_mask)"),
        mistake("p_dropout does not reach the blocks", "DecoderLM", "DecoderBlock(n_embd, n_head, p_dropout=p_dropout)", "DecoderBlock(n_embd, n_head)"),
        mistake("p_dropout does not reach the feed-forward", "DecoderLM", "FeedForward(n_embd, p_dropout)", "FeedForward(n_embd)"),
    ],
    "loss": [
        mistake("not shifted", LOSS, "labels = input_ids[:, 1:].reshape(-1)", "labels = input_ids.reshape(-1)", "logits[:, :-1]", "logits"),
        mistake("shifted the wrong way", LOSS, "input_ids[:, 1:].reshape(-1)", "input_ids[:, :-1].reshape(-1)", "logits[:, :-1]", "logits[:, 1:]"),
        mistake("summed", LOSS, "F.cross_entropy(predictions, labels)", 'F.cross_entropy(predictions, labels, reduction="sum")'),
        mistake("summed over tokens, averaged over rows", LOSS, "F.cross_entropy(predictions, labels)", 'F.cross_entropy(predictions, labels, reduction="sum") / len(input_ids)'),
        mistake("divided by B S", LOSS, "F.cross_entropy(predictions, labels)", 'F.cross_entropy(predictions, labels, reduction="sum") / input_ids.numel()'),
        mistake("labels padded with token 0", LOSS, "input_ids[:, 1:].reshape(-1)", "F.pad(input_ids[:, 1:], (0, 1)).reshape(-1)", "logits[:, :-1]", "logits"),
        mistake("first position lost", LOSS, "input_ids[:, 1:].reshape(-1)", "input_ids[:, 2:].reshape(-1)", "logits[:, :-1]", "logits[:, 1:-1]"),
        mistake("last position lost", LOSS, "input_ids[:, 1:].reshape(-1)", "input_ids[:, 1:-1].reshape(-1)", "logits[:, :-1]", "logits[:, :-2]"),
        mistake("softmax before the cross entropy", LOSS, "F.cross_entropy(predictions,", "F.cross_entropy(predictions.softmax(-1),"),
        mistake("log of a softmax", LOSS, "F.cross_entropy(predictions,", "F.nll_loss(predictions.softmax(-1).log(),"),
        mistake("in bits", LOSS, "F.cross_entropy(predictions, labels)", "F.cross_entropy(predictions, labels) / math.log(2)"),
        mistake("cut off from the graph", LOSS, "F.cross_entropy(predictions, labels)", "F.cross_entropy(predictions, labels).detach()"),
    ],
    "loop": [
        mistake("no zero_grad", "train", "        optimizer.zero_grad()\n", ""),
        mistake("zero_grad inside the accumulation", "train", "        optimizer.zero_grad()\n", "", "            (loss / grad", "            optimizer.zero_grad()\n            (loss / grad"),
        mistake("loss not divided", "train", "(loss / grad_accumulation_steps).backward()", "loss.backward()"),
        mistake("loss divided twice", "train", "(loss / grad_accumulation_steps).backward()", "(loss / grad_accumulation_steps**2).backward()"),
        mistake("learning rate never set", "train", "        set_lr(optimizer, lr)\n", ""),
        mistake("learning rate set once", "train", "        set_lr(optimizer, lr)\n", "        if step == 0:\n            set_lr(optimizer, lr)\n"),
        mistake("learning rate one step late", "train", "        set_lr(optimizer, lr)\n", "", "        optimizer.step()\n", "        optimizer.step()\n        set_lr(optimizer, lr)\n"),
        mistake("steps counted from 1", "train", "lr = lr_schedule(step)", "lr = lr_schedule(step + 1)"),
        mistake("learning rate of the first parameter group only", "train", "in optimizer.param_groups:", "in optimizer.param_groups[:1]:"),
        mistake("step inside the accumulation", "train", "        optimizer.step()\n", "", "(loss / grad_accumulation_steps).backward()\n", "(loss / grad_accumulation_steps).backward()\n            optimizer.step()\n"),
        mistake("no optimizer step", "train", "        optimizer.step()\n", ""),
        mistake("one batch for all micro-batches", "train", "        total = 0.0\n", "        total = 0.0\n        input_ids = next(batch_sampler)\n", "            input_ids = next(batch_sampler)\n", ""),
        mistake("one step too few", "train", "range(start_step, num_training_steps)", "range(start_step + 1, num_training_steps)"),
        mistake("divided loss logged", "train", "total / grad_accumulation_steps)", "total / grad_accumulation_steps**2)"),
        mistake("last micro-batch logged", "train", "total += loss.item()", "total = loss.item() * grad_accumulation_steps"),
        mistake("mean over all steps logged", "train", "step_losses[-20:]", "step_losses"),
        mistake("loss of the step alone logged", "train", "step_losses[-20:]", "step_losses[-1:]"),
        mistake("logged every tenth step", "train", "if wandb.run is not None:", "if wandb.run is not None and step % 10 == 0:"),
        mistake("left in evaluation mode", "train", "    model.train()\n    step_losses", "    step_losses"),
        mistake("put into evaluation mode", "train", "    model.train()\n    step_losses", "    model.eval()\n    step_losses"),
        mistake("autocast not used", "train", "with autocast:\n                logits", "with nullcontext():\n                logits"),
    ],
    "schedule": [
        mistake("warm-up one step early", "cosine_lr_schedule", "max_lr * t / num", "max_lr * (t + 1) / num"),
        mistake("warm-up from min_lr", "cosine_lr_schedule", "return max_lr * t / num_warmup_steps", "return min_lr + (max_lr - min_lr) * t / num_warmup_steps"),
        mistake("minimum one step early", "cosine_lr_schedule", "/ (num_training_steps - num_warmup_steps)", "/ (num_training_steps - 1 - num_warmup_steps)"),
        mistake("cosine from step 0", "cosine_lr_schedule", "(t - num_warmup_steps) / (num_training_steps - num_warmup_steps)", "t / num_training_steps"),
        mistake("cosine b steps long", "cosine_lr_schedule", "/ (num_training_steps - num_warmup_steps)", "/ num_training_steps"),
        mistake("a whole cosine", "cosine_lr_schedule", "math.pi * (t", "2 * math.pi * (t"),
        mistake("decay to 0", "cosine_lr_schedule", "min_lr + 0.5 * (max_lr - min_lr)", "0.5 * max_lr"),
        mistake("amplitude max_lr", "cosine_lr_schedule", "0.5 * (max_lr - min_lr)", "0.5 * max_lr"),
        mistake("the cosine goes on after the end", "cosine_lr_schedule", "if t >= num_training_steps:", "if False:"),
        mistake("division by zero without warm-up", "cosine_lr_schedule", "if t < num_warmup_steps:", "if t <= num_warmup_steps:"),
        mistake("division by zero where warm-up is all", "cosine_lr_schedule", "if t >= num_training_steps:", "if t > num_training_steps:"),
    ],
    "samplers": [
        mistake("last start missing", RANDOM, "len(tokens) - seq_len + 1\n    while", "len(tokens) - seq_len\n    while"),
        mistake("first start missing", RANDOM, "torch.randint(0, n_starts", "torch.randint(1, n_starts"),
        mistake("rows of scattered tokens", RANDOM, "torch.as_tensor(tokens[start : start + seq_len]).long() for start in starts", "torch.as_tensor(tokens).long()[torch.randint(0, len(tokens), (seq_len,))] for start in starts"),
        mistake("rows next to one another", RANDOM, "torch.randint(0, n_starts, (batch_size,)).tolist()", "[(first + i) % n_starts for first in [int(torch.randint(0, n_starts, ()))] for i in range(batch_size)]"),
        mistake("one start for all rows", RANDOM, "torch.randint(0, n_starts, (batch_size,)).tolist()", "[int(torch.randint(0, n_starts, ()))] * batch_size"),
        mistake("the same batch again", RANDOM, "    while True:\n        starts = torch.randint(0, n_starts, (batch_size,)).tolist()", "    starts = torch.randint(0, n_starts, (batch_size,)).tolist()\n    while True:"),
        mistake("starts at multiples of seq_len only", RANDOM, "torch.randint(0, n_starts, (batch_size,)).tolist()", "(torch.randint(0, (n_starts - 1) // seq_len + 1, (batch_size,)) * seq_len).tolist()"),
        mistake("ids read as int16", RANDOM, "[torch.as_tensor(tokens[start : start + seq_len]).long() for start", "[torch.as_tensor(tokens[start : start + seq_len]).to(torch.int16).long() for start"),
        mistake("one batch only", RANDOM, "while True:", "for _ in range(1):"),
        mistake("rows overlap by a token", SEQUENTIAL, "len(tokens) - seq_len + 1, seq_len)", "len(tokens) - seq_len + 1, seq_len - 1)"),
        mistake("incomplete last batch kept", SEQUENTIAL, "if rows and not drop_last:", "if rows:"),
        mistake("last full batch dropped", SEQUENTIAL, "range(0, len(tokens) - seq_len + 1, seq_len)", "range(0, len(tokens) - seq_len, seq_len)"),
        mistake("rows of shuffled order", SEQUENTIAL, "        if len(rows) == batch_size:\n            yield torch.stack(rows)", "        if len(rows) == batch_size:\n            yield torch.stack(rows[::-1])"),
        mistake("rows run through the batches", SEQUENTIAL, "    rows = []\n    for start in range(0, len(tokens) - seq_len + 1, seq_len):", "    rows = []\n    n = len(tokens) // seq_len // batch_size\n    for start in [seq_len * (b + n * r) for b in range(n) for r in range(batch_size)]:"),
        mistake("without end", SEQUENTIAL, "    rows = []\n    for start in range(0, len(tokens) - seq_len + 1, seq_len):", "    rows = []\n    for start in list(range(0, len(tokens) - seq_len + 1, seq_len)) * 30:"),
    ],
    "decoding": [
        mistake("temperature ignored", SOFTMAX, "torch.softmax(logits / temperature,", "torch.softmax(logits,"),
        mistake("temperature applied after softmax", SOFTMAX, "torch.softmax(logits / temperature, dim=-1)", "torch.softmax(logits, dim=-1) / temperature"),
        mistake("multiplied by temperature", SOFTMAX, "logits / temperature", "logits * temperature"),
        mistake("softmax over the batch", SOFTMAX, "temperature, dim=-1)", "temperature, dim=0)"),
        mistake("NaN at temperature 0", SOFTMAX, "if temperature == 0:", "if False:"),
        mistake("plain softmax at temperature 0", SOFTMAX, "if temperature == 0:", "if temperature == 0:\n        return torch.softmax(logits, dim=-1)\n    if False:"),
        mistake("log-softmax", SOFTMAX, "torch.softmax(logits /", "torch.log_softmax(logits /"),
        mistake("exp overflows", SOFTMAX, "return torch.softmax(logits / temperature, dim=-1)", "e = torch.exp(logits / temperature)\n    return e / e.sum(dim=-1, keepdim=True)"),
        mistake("logits changed in place", SOFTMAX, "torch.softmax(logits / temperature,", "torch.softmax(logits.div_(temperature),"),
        mistake("arg max at every temperature", "generate", "torch.multinomial(probs, 1)", "probs.argmax(dim=1, keepdim=True)"),
        mistake("sampled at temperature 0", "generate", "softmax_with_temperature(logits, temperature)", "softmax_with_temperature(logits, temperature or 1.0)"),
        mistake("one draw for all rows", "generate", "torch.multinomial(probs, 1)", "torch.multinomial(probs[:1], 1).expand(len(ids), 1)"),
        mistake("seeded inside", "generate", "    was_training = model.training\n", "    torch.manual_seed(0)\n    was_training = model.training\n"),
        mistake("prompt returned", "generate", "ids[:, longest:].tolist()", "ids.tolist()"),
        mistake("decoder blocks skipped", "generate", MODEL_OF_WINDOW, "model.token_logits(model.ln(model.embed(ids[:, -n_positions:], mask[:, -n_positions:])))"),
        mistake("last token alone given to the model", "generate", MODEL_OF_WINDOW, "model(ids[:, -1:], mask[:, -1:])"),
        mistake("new tokens not given to the model", "generate", MODEL_OF_WINDOW, "model(ids[:, :longest], mask[:, :longest])"),
        mistake("right padding", "generate", LEFT_IDS, RIGHT_IDS, LEFT_MASK, RIGHT_MASK),
        mistake("mask ignored", "generate", MODEL_OF_WINDOW, "model(ids[:, -n_positions:])"),
        mistake("mask not extended", "generate", "torch.ones_like(mask[:, :1])", "torch.zeros_like(mask[:, :1])"),
        mistake("every <|endoftext|> masked as padding", "generate", "device=device)\n            for _", "device=device)\n            mask = (ids != eot).float()\n            for _"),
        mistake("order lost", "generate", "    with torch.no_grad():\n        for start", "    prefixes = sorted(prefixes, key=len)\n    with torch.no_grad():\n        for start"),
        mistake("partial batch lost", "generate", "range(0, len(prefixes), batch_size)", "range(0, len(prefixes) - batch_size + 1, batch_size)"),
        mistake("window does not slide", "generate", MODEL_OF_WINDOW, "model(ids[:, :n_positions], mask[:, :n_positions])"),
        mistake("generation ends where the window is full", "generate", "                probs = soft", "                if ids.shape[1] > n_positions:\n                    break\n                probs = soft"),
        mistake("window one token short", "generate", MODEL_OF_WINDOW, "model(ids[:, 1 - n_positions :], mask[:, 1 - n_positions :])"),
        mistake("long prompts keep their first tokens", "generate", "row[-n_positions:] for row", "row[:n_positions] for row"),
        mistake("long prompts keep P - max_new_tokens tokens", "generate", "row[-n_positions:] for row", "row[-max(1, n_positions - max_new_tokens) :] for row"),
        mistake("one token too many", "generate", "range(max_new_tokens)", "range(max_new_tokens + 1)"),
        mistake("an empty prefix crashes", "generate", "tokenizer.encode_ordinary(prefix) or [eot]", "tokenizer.encode_ordinary(prefix)"),
        mistake("<|endoftext|> returned as text", "generate", "row = row[: row.index(eot)]", "row = row[: row.index(eot) + 1]"),
        mistake("<|endoftext|> does not end a row", "generate", "row = row[: row.index(eot)]", "row = [token for token in row if token != eot]"),
        mistake("one row's end ends all", "generate", "                mask = torch.cat([mask", "                if (new == eot).any():\n                    break\n                mask = torch.cat([mask"),
        mistake("dropout active", "generate", "    model.eval()\n", ""),
        mistake("the mode found is not restored", "generate", "    model.train(was_training)\n", ""),
        mistake("cache: positions one too low", "generate", "positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -n_new:]", "positions = (mask.long().cumsum(dim=1) - 1 - int(bool(cache))).clamp(min=0)[:, -n_new:]", file=CACHED),
        mistake("cache: positions count the padding", "generate", "positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -n_new:]", "positions = torch.arange(mask.shape[1])[-n_new:] if cache else (mask.long().cumsum(dim=1) - 1).clamp(min=0)", file=CACHED),
        mistake("cache: stale when the window slides", "generate", "                    cache = {}\n                n_read = cache[0][1].shape[2] if", "                    cache = {i: (kT[..., 1:], v[:, :, 1:]) for i, (kT, v) in cache.items()}\n                n_read = ids.shape[1] - 1 if", file=CACHED),
        mistake("cache: padding visible after the first step", "generate", "mask.bool()[:, None, None]", "(mask.bool()[:, None, None] | bool(cache))", file=CACHED),
        mistake("cache: of the batch before", "generate", "            cache = {}\n            for", "            cache = cache if start and len(rows) == batch_size else {}\n            for", file=CACHED),
    ],
    "classification": [
        mistake("classes swapped", SENTIMENT, "dim=-1)[:, 1]", "dim=-1)[:, 0]"),
        mistake("probabilities over the whole vocabulary", SENTIMENT, "torch.softmax(logits[:, tokens_of_interest], dim=-1)[:, 1]", "torch.softmax(logits, dim=-1)[:, tokens_of_interest[1]]"),
        mistake("calibration ignored", SENTIMENT, "torch.median(p) if calibrate else 0.5", "0.5"),
        mistake("always calibrated", SENTIMENT, "torch.median(p) if calibrate else 0.5", "torch.median(p)"),
        mistake("the labels' known share of positives used", SENTIMENT, "torch.median(p) if", "torch.quantile(p, 0.469) if"),
        mistake("mean for median", SENTIMENT, "torch.median(p)", "torch.mean(p)"),
        mistake("middle of the range for median", SENTIMENT, "torch.median(p)", "(p.min() + p.max()) / 2"),
        mistake("upper middle value", SENTIMENT, "torch.median(p)", "p.sort().values[len(p) // 2]"),
        mistake("ties are positive", SENTIMENT, "p > boundary", "p >= boundary"),
        mistake("ties broken by order", SENTIMENT, "    boundary = ", "    if calibrate:\n        rank = p.argsort(stable=True).argsort()\n        return [int(r > (len(p) - 1) // 2) for r in rank]\n    boundary = "),
        mistake("calibrated upwards only", SENTIMENT, "torch.median(p)", "max(0.5, torch.median(p))"),
        mistake("exp overflows", SENTIMENT, "p = torch.softmax(logits[:, tokens_of_interest], dim=-1)[:, 1]", "e = torch.exp(logits[:, tokens_of_interest])\n    p = e[:, 1] / e.sum(dim=1)"),
        mistake("right padding", "score", LEFT_IDS, RIGHT_IDS, LEFT_MASK, RIGHT_MASK),
        mistake("mask ignored", "score", "model(ids, mask)", "model(ids)"),
        mistake("order lost", "score", "    with torch.no_grad():\n        for start", "    texts = sorted(texts, key=len)\n    with torch.no_grad():\n        for start"),
        mistake("partial batch lost", "score", "range(0, len(texts), batch_size)", "range(0, len(texts) - batch_size + 1, batch_size)"),
        mistake("logits of the first position", "score", "[:, -1])\n", "[:, 0])\n"),
        mistake("log-probabilities", "score", "model(ids, mask)[:, -1]", "model(ids, mask)[:, -1].log_softmax(-1)"),
        mistake("long texts keep their first tokens", "score", "row[-n_positions:] for row", "row[:n_positions] for row"),
        mistake("decoder blocks skipped", "score", "model(ids, mask)", "model.token_logits(model.ln(model.embed(ids, mask)))"),
        mistake("dropout active", "score", "    model.eval()\n", ""),
        mistake("the mode found is not restored", "score", "    model.train(was_training)\n", ""),
    ],
}

FUSED_QKV = """weight = torch.cat([self.q_attn.weight, self.k_attn.weight, self.v_attn.weight])
        bias = torch.cat([self.q_attn.bias, self.k_attn.bias, self.v_attn.bias])
        q, k, v = F.linear(x, weight, bias).view(B, S, 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)
"""
SOFTMAX_BY_HAND = """scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values) * allowed
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30)
"""
SORTED_SCORES = """order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    texts = [texts[i] for i in order]
    with torch.no_grad():
        for start"""
ONE_BY_ONE = """
def generate(model, device, tokenizer, prefixes, batch_size, max_new_tokens=32, temperature=0.0):
    mode, texts = model.training, []
    model.eval()
    for prefix in prefixes:
        prompt = tokenizer.encode_ordinary(prefix) or [tokenizer.eot_token]
        ids = torch.tensor([prompt], device=device)
        for _ in range(max_new_tokens):
            with torch.inference_mode():
                logits = model(ids[:, -model.n_positions :])[:, -1]
            if temperature == 0:
                new = logits.argmax().item()
            else:
                new = torch.distributions.Categorical(logits=logits / temperature).sample().item()
            if new == tokenizer.eot_token:
                break
            ids = torch.cat([ids, torch.tensor([[new]], device=device)], dim=1)
        texts.append(tokenizer.decode(ids[0, len(prompt) :].tolist()))
    model.train(mode)
    return texts
"""
INIT_BY_NAME = """    def _init_weights(self):
        for name, p in self.named_parameters():
            if "ln" in name:
                continue
            std = 0.02 * (2 * self.n_layer) ** -0.5 if "proj" in name or "linear_out" in name else 0.02
            torch.nn.init.normal_(p, 0, std) if p.dim() == 2 else torch.nn.init.zeros_(p)
"""

# Right solutions: what each changes in the plain one, by module. None: the package's own files.
RIGHT = {
    "the package's own": None,
    "plain: masks by finfo.min, no cache, no chunked loss": {},
    "einsum for matmul": {"model": [("torch.matmul(q, kT)", 'torch.einsum("bhqd,bhdk->bhqk", q, kT)'), ("torch.matmul(weights, v)", 'torch.einsum("bhqk,bhkd->bhqd", weights, v)'), ("x @ self.token_embeddings.weight.T", 'torch.einsum("bsd,vd->bsv", x, self.token_embeddings.weight)')]},
    "-inf, and NaN made 0": {"model": [("torch.finfo(scores.dtype).min", "-torch.inf"), ("weights = weights.masked_fill(~allowed, 0.0)", "weights = weights.nan_to_num(0.0)")]},
    "softmax by hand": {"model": [("scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)\n        weights = torch.softmax(scores, dim=-1)\n        weights = weights.masked_fill(~allowed, 0.0)\n", SOFTMAX_BY_HAND)]},
    "one fused q, k, v product": {"model": [("        q = self.q_attn(x).view(B, S, self.n_head, self.head_size).transpose(1, 2)\n", "        " + FUSED_QKV), ("        k = self.k_attn(x).view(B, S, self.n_head, self.head_size).transpose(1, 2)\n", ""), ("        v = self.v_attn(x).view(B, S, self.n_head, self.head_size).transpose(1, 2)\n", "")]},
    "the causal mask as a buffer": {"model": [('self.register_buffer("scale', 'self.register_buffer("causal", torch.ones(512, 512, dtype=torch.bool).tril(), persistent=False)\n        self.register_buffer("scale'), ("torch.tril(torch.ones(S, S, dtype=torch.bool, device=q.device))", "self.causal[:S, :S]")]},
    "two dropouts in the attention": {"model": [('        self.register_buffer("scale', '        self.weight_dropout = nn.Dropout(p_dropout)\n        self.register_buffer("scale'), ("self.dropout(weights)", "self.weight_dropout(weights)")]},
    "initialisation by parameter name": {"model": [("    def _init_weights(self):\n", INIT_BY_NAME + "\n    def _init_weights_as_before(self):\n")]},
    "position embeddings indexed, not called": {"model": [("self.position_embeddings(position_ids)", "self.position_embeddings.weight[position_ids]")]},
    "zero_grad last": {"train": [("        optimizer.zero_grad()\n", ""), ("        optimizer.step()\n", "        optimizer.step()\n        optimizer.zero_grad()\n")]},
    "zero_grad to zeros, loss divided before": {"train": [("optimizer.zero_grad()", "optimizer.zero_grad(set_to_none=False)"), ("(loss / grad_accumulation_steps).backward()", "loss = loss / grad_accumulation_steps\n            loss.backward()"), ("total += loss.item()", "total += loss.item() * grad_accumulation_steps")]},
    "numpy sampling": {"train": [("torch.randint(0, n_starts, (batch_size,)).tolist()", "numpy.random.randint(0, n_starts, size=batch_size)"), ("import torch\n", "import numpy\nimport torch\n")]},
    "tokens by unfold": {"train": [("    n_starts = len(tokens) - seq_len + 1\n", "    rows = torch.as_tensor(tokens).unfold(0, seq_len, 1)\n"), ("torch.randint(0, n_starts, (batch_size,)).tolist()", "torch.randint(len(rows), (batch_size,))"), ("        rows = [torch.as_tensor(tokens[start : start + seq_len]).long() for start in starts]\n        yield torch.stack(rows).to(device)", "        yield rows[starts].to(device).long()")]},
    "sequential batches by view": {"train": [(", *, drop_last: bool = True)", ")"), ("    if rows and not drop_last:\n        yield torch.stack(rows).to(device)\n", ""), ("    rows = []\n    for start in range(0, len(tokens) - seq_len + 1, seq_len):", "    n = len(tokens) // (batch_size * seq_len)\n    yield from torch.as_tensor(tokens[: n * batch_size * seq_len]).long().view(n, batch_size, seq_len).to(device)\n    return\n    for start in []:")]},
    "no keyword-only extras": {"train": [(",\n    *,\n    start_step: int = 0,\n    on_step=None,\n)", ")"), ("range(start_step, num_training_steps)", "range(num_training_steps)"), ("        if on_step is not None:\n            on_step(StepResult(step, step_losses[-1], train_loss, lr))\n", ""), (", *, drop_last: bool = True)", ")"), ("    if rows and not drop_last:\n        yield torch.stack(rows).to(device)\n", "")]},
    "log-softmax and gather": {"train": [("F.cross_entropy(predictions, labels)", "-predictions.log_softmax(-1).gather(1, labels[:, None]).mean()")]},
    "cross entropy with V second": {"train": [("F.cross_entropy(predictions, labels)", "F.cross_entropy(logits.transpose(1, 2)[:, :, :-1], input_ids[:, 1:])")]},
    "learning rates through a LambdaLR-like list": {"train": [("        lr = lr_schedule(step)\n        set_lr(optimizer, lr)\n", "        lr = lr_schedule(step)\n        optimizer.param_groups[:] = [group | {'lr': lr} for group in optimizer.param_groups]\n")]},
    "generation with a key-value cache": {"generate": CACHED},
    "generation of one prefix at a time": {"generate": [("def generate(", ONE_BY_ONE + "\n\ndef generate_as_before(")]},
    "sampling with numpy": {"generate": [("torch.multinomial(probs, 1)", "torch.tensor([[numpy.random.choice(len(p), p=p / p.sum())] for p in probs.double().numpy()])"), ("import torch\n", "import numpy\nimport torch\n")]},
    "texts scored by length, the order restored": {"classify": [("with torch.no_grad():\n        for start", SORTED_SCORES), ("torch.cat(logits)", "torch.cat(logits)[torch.tensor(order).argsort()]")]},
    "texts scored without padding": {"classify": [("            logits.append(model(ids, mask)[:, -1])\n", "            logits += [model(torch.tensor([row], device=device))[:, -1] for row in rows]\n")]},
    "sigmoid of the logits' difference, the boundary by sorting": {"classify": [("torch.softmax(logits[:, tokens_of_interest], dim=-1)[:, 1]", "torch.sigmoid(logits[:, tokens_of_interest[1]] - logits[:, tokens_of_interest[0]])"), ("torch.median(p)", "p.sort().values[(len(p) - 1) // 2]")]},
}
# fmt: on


def source_of(module: str, edits: list[tuple[str, str]] = (), file: str | None = None) -> str:
    """The text of a plain module with the edits made; each `old` must stand in it exactly once."""
    text = (TESTS / "plain" / f"{file or module}.py").read_text(encoding="utf-8")
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"tests/plain/{file or module}.py: {text.count(old)} times instead of once: {old!r}")
        text = text.replace(old, new)
    return text


class Watch:
    """A pytest plugin that runs the tests of one part only, and keeps the first failure and the points."""

    def __init__(self, part: str | None):
        self.part = part
        self.failure = None
        self.n_tests = 0
        self.rows = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        if self.part is not None:
            items[:] = [item for item in items if self._belongs(item)]
        self.n_tests = len(items)

    def _belongs(self, item) -> bool:
        marker = item.get_closest_marker("question")
        part = marker.args[1] if marker else "evaluate" if "TestEvaluate" in item.nodeid else None
        return part == self.part

    def pytest_collectreport(self, report):
        self._keep(report, str(report.longrepr).strip().splitlines()[-1:])

    def pytest_runtest_logreport(self, report):
        crash = getattr(report.longrepr, "reprcrash", None)
        self._keep(report, (crash.message if crash else str(report.longrepr)).splitlines())

    def _keep(self, report, lines):
        if report.failed and self.failure is None:
            self.failure = report.nodeid.split("::", 1)[-1], lines[0] if lines else ""

    def pytest_unconfigure(self, config):
        self.rows = config.pluginmanager.get_plugin("points-tally").rows()


def run_tests(sources: dict[str, str], part: str | None) -> Watch:
    """Run the tests against these modules, in a process of its own: what is imported stays so."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    for name, text in sources.items():
        module = sys.modules[name] = types.ModuleType(name)
        exec(compile(text, f"<{name}.py>", "exec"), module.__dict__)
    watch = Watch(part)
    files = [MODULE_OF[part]] if part else MODULES
    arguments = [str(TESTS / f"test_{name}.py") for name in files]
    if part:
        arguments.append("-x")
    pytest.main([*arguments, "-p", "no:cacheprovider", f"--rootdir={TESTS.parent}"], plugins=[watch])
    return watch


def run_mutant(job: tuple[str, Mutant]) -> tuple[str, str, str | None, str]:
    """Family, mistake, the test that caught it (None: it survived), and the first line of the failure."""
    family, mutant = job
    module = MODULE_OF[mutant.part]
    sources = {name: source_of(name) for name in MODULES}
    sources[module] = source_of(module, mutant.edits, mutant.file)
    watch = run_tests(sources, mutant.part)
    caught_by, message = watch.failure or (None, f"all {watch.n_tests} tests of {mutant.part} pass")
    return family, mutant.what, caught_by, message


def run_right(what: str) -> tuple[str, int, str]:
    """Description, points got, and the first failure if there is one."""
    sources = {}
    if (changes := RIGHT[what]) is not None:
        for name in MODULES:
            change = changes.get(name, [])
            sources[name] = source_of(name, file=change) if isinstance(change, str) else source_of(name, change)
    watch = run_tests(sources, part=None)
    return what, sum(row["points"] or 0 for row in watch.rows), ": ".join(watch.failure or ())


def results_of(function, jobs):
    """function(job) for each job, each in a process of its own, as many at once as there are processors."""
    # Where processes can be forked, all share one import of torch.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with multiprocessing.get_context(method).Pool(maxtasksperchild=1) as pool:
        results = pool.imap(function, jobs, chunksize=1)
        for job in jobs:
            try:
                yield results.next(timeout=PATIENCE_SECONDS)
            except multiprocessing.TimeoutError:
                raise SystemExit(f"{job}: no answer in {PATIENCE_SECONDS} s: the tests must not hang") from None


def main(argv: list[str] | None = None) -> None:
    """Run the mutants, or the right solutions, and print what became of each."""
    parser = argparse.ArgumentParser(description="Do the tests tell wrong solutions from right ones?")
    parser.add_argument("--quick", action="store_true", help="one wrong solution of each family")
    parser.add_argument("--right", action="store_true", help="right solutions, which must get all points")
    args = parser.parse_args(argv)
    bad = 0
    if args.right:
        full = sum(points for points, _ in points.GROUPS.values())
        for what, got, failure in results_of(run_right, list(RIGHT)):
            print(f"{got:>2} / {full}  {what}" + (f"\n         {failure}" if failure else ""), flush=True)
            bad += got != full  # a test without points may fail: it holds the interface's extras
        print(f"\n{len(RIGHT) - bad} of {len(RIGHT)} right solutions get all points")
    else:
        mutants = [
            (family, m) for family, all_of in FAMILIES.items() for m in (all_of[:1] if args.quick else all_of)
        ]
        line = "{:<15} {:<52} {:<60} {}".format
        print(line("family", "mistake", "caught by", "the first line that a student reads"))
        for family, what, caught_by, message in results_of(run_mutant, mutants):
            print(line(family, what, caught_by or "SURVIVED", message), flush=True)
            bad += caught_by is None
        print(f"\n{len(mutants) - bad} of {len(mutants)} wrong solutions in {len(FAMILIES)} families are caught")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
