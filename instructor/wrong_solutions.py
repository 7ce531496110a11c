"""Wrong solutions for mutants.py: edits of the graded files, each of which writes one common mistake into them.

Of each edit the old text occurs exactly once in its file.
"""

from typing import NamedTuple

import points

FF, ATTENTION = "FeedForward and DecoderBlock", "self_attention"
LOSS, RANDOM, SEQUENTIAL = "compute_language_modeling_loss", "random_batch_sampler", "sequential_batch_sampler"
SOFTMAX, SENTIMENT = "softmax_with_temperature", "classify_binary_sentiment"

# The module of each part. `evaluate` and advice give no points, but they have tests.
MODULE_OF = {
    part: file.removeprefix("test_").removesuffix(".py") for (_, part), (_, file) in points.GROUPS.items()
}
MODULE_OF |= {f"advice of {module}": module for module in set(MODULE_OF.values())} | {"evaluate": "train"}


class Mutant(NamedTuple):
    """A mistake: in the module of `part`, each old text becomes the new one."""

    what: str
    part: str  # its tests must fail
    edits: tuple[tuple[str, str], ...]


def mistake(what: str, part: str, *texts: str) -> Mutant:
    """texts: old, new, old, new …"""
    return Mutant(what, part, tuple(zip(texts[::2], texts[1::2], strict=True)))


# Texts of model.py
SCORES = "(q * self.scale_factor) @ kT"
ATTEND = "F.softmax(scores, dim=-1)"
CAUSAL = ".tril(S_k - S_q)"
FILL = "torch.finfo(scores.dtype).min"
NO_ROW_OF_ZEROS = ("if attention_mask is not None:  # softmax", "if False:  # softmax")
WITH_PADDING = "visible & attention_mask[:, None, None, :].bool()"
FEED_FORWARD = "self.dropout(self.linear_out(F.gelu(self.linear_in(x))))"
EMBEDDINGS = "self.token_embeddings(input_ids) + self.position_embeddings(position_ids)"
BLOCKS = "for block in self.blocks:"
ADD_ATTENTION = "x = x + self.mha(self.ln_1(x), attention_mask)"
ADD_FEED_FORWARD = "return x + self.ff(self.ln_2(x))"
LOGITS = "F.linear(x, self.token_embeddings.weight)"
INIT = "        self._init_weights()\n"
PROJECTED = "self.projection(self.self_attention(q, kT, v, attention_mask))"

# Texts of train.py
N_STARTS = "len(tokens) - seq_len + 1"
RANDOM_STARTS = f"torch.randint({N_STARTS}, (batch_size, 1)).numpy()"
ROWS = "tokens[starts + np.arange(seq_len)]"
SEQUENTIAL_ROWS = "rows = tokens[: n_rows * seq_len].reshape(n_rows, seq_len)"
CROSS_ENTROPY = "F.cross_entropy(predictions, labels)"
LABELS = "input_ids[:, 1:].flatten()"
IN_AUTOCAST = "            with autocast:\n                if loss_fn is None:\n                    loss = compute_language_modeling_loss(input_ids, model(input_ids))\n                else:\n                    loss = loss_fn(input_ids)\n            #"
BACKWARD = "            (loss / grad_accumulation_steps).backward()\n"
SET_LR = "        set_lr(optimizer, learning_rate)\n"
STEP = "        optimizer.step()\n"
RECENT = "deque(previous_losses, maxlen=RUNNING_MEAN_STEPS)"
COSINE = "min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2"
PROGRESS = "(t - num_warmup_steps) / (num_training_steps - num_warmup_steps)  #"

# Texts of generate.py
SOFTMAX_OF_LOGITS = "F.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)"
IF_GREEDY = "if temperature <= torch.finfo(logits.dtype).tiny:"
GREEDY = "tokens = logits.argmax(dim=-1, keepdim=True)  # (B, 1)"
DRAW = "torch.multinomial(probs, 1)"
RIGHT_PADDING = (
    *("[pad_token] * (S - len(row)) + row", "row + [pad_token] * (S - len(row))"),
    *("[0.0] * (S - len(row)) + [1.0] * len(row)", "[1.0] * len(row) + [0.0] * (S - len(row))"),
)
NEXT_LOGITS = "next_token_logits(input_ids[:, -P:], mask[:, -P:])  # (B, V)"
MODEL = "model(input_ids, mask)[:, -1])"
DECODE = "texts.append(tokenizer.decode(row[: row.index(eot_token)] if eot_token in row else row))"
ROW = "row[: row.index(eot_token)] if eot_token in row else row"

# Texts of classify.py
P_POSITIVE = "F.softmax(logits[:, tokens_of_interest], dim=-1)[:, 1]"
HIDDEN = "model.token_logits(model.hidden_states(input_ids, mask)[:, -1])"
PAD = "input_ids, mask = left_pad(prompts, tokenizer.eot_token, device)"
PAD_RIGHT = "input_ids, mask = (ids.flip(1) for ids in left_pad([row[::-1] for row in prompts], tokenizer.eot_token, device))"

# fmt: off
# ruff: noqa: E501 (one mistake, one line)
WRONG = [
    mistake("ReLU in place of GELU", FF, "F.gelu(", "F.relu("),
    mistake("the tanh approximation of GELU", FF, "F.gelu(self.linear_in(x))", 'F.gelu(self.linear_in(x), approximate="tanh")'),
    mistake("SiLU in place of GELU", FF, "F.gelu(", "F.silu("),
    mistake("the sigmoid approximation of GELU", FF, "F.gelu(self.linear_in(x))", "(h := self.linear_in(x)) * torch.sigmoid(1.702 * h)"),
    mistake("no activation", FF, "F.gelu(self.linear_in(x))", "self.linear_in(x)"),
    mistake("no dropout", FF, FEED_FORWARD, "self.linear_out(F.gelu(self.linear_in(x)))"),
    mistake("dropout on the hidden units", FF, FEED_FORWARD, "self.linear_out(self.dropout(F.gelu(self.linear_in(x))))"),
    mistake("width 2 D", FF, "nn.Linear(n_embd, 4 * n_embd)", "nn.Linear(n_embd, 2 * n_embd)", "nn.Linear(4 * n_embd, n_embd)", "nn.Linear(2 * n_embd, n_embd)"),
    mistake("GELU before linear_in", FF, "F.gelu(self.linear_in(x))", "self.linear_in(F.gelu(x))"),
    mistake("in training mode", "evaluate", "    model.eval()\n", ""),
    mistake("the mode found is not restored", "evaluate", "    model.train(was_training)\n", ""),
    mistake("mean of the means of unequal batches", "evaluate", "loss.item() * B * (S - 1)", "loss.item()", "n_predictions += B * (S - 1)", "n_predictions += 1"),
    mistake("weighted by tokens, not by predictions", "evaluate", "loss.item() * B * (S - 1)", "loss.item() * B * S", "n_predictions += B * (S - 1)", "n_predictions += B * S"),
    mistake("perplexity in base 2", "evaluate", ".exp().item()", ".exp2().item()"),
    mistake("perplexity averaged over batches", "evaluate", "loss.item() * B", "math.exp(loss.item()) * B", "val_loss = total_loss / n_predictions", "val_loss = math.log(total_loss / n_predictions)"),
    mistake("no causal mask", ATTENTION, CAUSAL, ""),
    mistake("transposed causal mask", ATTENTION, CAUSAL, ".triu(S_k - S_q)"),
    mistake("strict causal mask", ATTENTION, CAUSAL, ".tril(S_k - S_q - 1)"),
    mistake("no causal mask where a padding mask is given", ATTENTION, WITH_PADDING, "attention_mask[:, None, None, :].bool()"),
    mistake("no scale", ATTENTION, SCORES, "q @ kT"),
    mistake("scaled twice", ATTENTION, SCORES, "(q * self.scale_factor**2) @ kT"),
    mistake("scaled by 1/sqrt(D)", ATTENTION, "math.sqrt(n_embd // n_head)", "math.sqrt(n_embd)"),
    mistake("softmax over the queries", ATTENTION, ATTEND, "F.softmax(scores, dim=-2)"),
    mistake("softmax over the heads", ATTENTION, ATTEND, "F.softmax(scores, dim=1)"),
    mistake("mask after softmax, rows not summing to 1", ATTENTION, f"        scores.masked_fill_(~visible, {FILL})\n", "", ATTEND, f"{ATTEND}.masked_fill(~visible, 0.0)"),
    mistake("masked scores 0, not lowest", ATTENTION, FILL, "0.0", *NO_ROW_OF_ZEROS),
    mistake("padding mask on the queries", ATTENTION, "attention_mask[:, None, None, :]", "attention_mask[:, None, :, None]"),
    mistake("padding mask ignored", ATTENTION, WITH_PADDING, "visible"),
    mistake("padding mask inverted", ATTENTION, WITH_PADDING, "visible & ~attention_mask[:, None, None, :].bool()"),
    mistake("row 0's padding mask for the whole batch", ATTENTION, WITH_PADDING, "visible & attention_mask[0].bool()"),
    mistake("padding mask not passed on by forward", ATTENTION, "self.self_attention(q, kT, v, attention_mask)", "self.self_attention(q, kT, v)"),
    mistake("a row without keys averages all values", "advice of model", *NO_ROW_OF_ZEROS),
    mistake("queries taken for the first tokens", "advice of model", CAUSAL, ".tril()"),
    mistake("heads merged in the wrong order", ATTENTION, "attn.transpose(1, 2).flatten(start_dim=2)", "attn.reshape(len(attn), S_q, -1)"),
    mistake("heads interleaved when merged", ATTENTION, "attn.transpose(1, 2)", "attn.permute(0, 2, 3, 1)"),
    mistake("no dropout on the weights", ATTENTION, f"self.dropout({ATTEND})", ATTEND),
    mistake("dropout on the result, not on the weights", ATTENTION, f"self.dropout({ATTEND})", ATTEND, "weights @ v", "self.dropout(weights @ v)"),
    mistake("dropout before softmax", ATTENTION, SCORES, f"self.dropout({SCORES})", f"self.dropout({ATTEND})", ATTEND),
    mistake("dropout active at evaluation", ATTENTION, f"self.dropout({ATTEND})", f"F.dropout({ATTEND}, self.dropout.p)"),
    mistake("NaN for padding that reaches the real tokens", ATTENTION, FILL, "-torch.inf", *NO_ROW_OF_ZEROS),
    mistake("no dropout after the projection", ATTENTION, "self.dropout(self.proj(attn))", "self.proj(attn)"),
    mistake("forward goes round projection and its dropout", ATTENTION, PROJECTED, "self.proj(self.self_attention(q, kT, v, attention_mask))"),
    mistake("dropout twice after the projection", ATTENTION, PROJECTED, f"self.dropout({PROJECTED})"),
    mistake("forward returns a tuple", ATTENTION, f"return {PROJECTED}", f"return {PROJECTED}, None"),
    mistake("a bare assert that fails", ATTENTION, "        S_q, S_k = ", "        assert q.shape[-1] == 1\n        S_q, S_k = "),
    mistake("no output projection", ATTENTION, "self.dropout(self.proj(attn))", "self.dropout(attn)"),
    mistake("split by a view that mixes tokens and heads", "q_kT_v", "self.q_attn(x).view(heads).transpose(1, 2)", "self.q_attn(x).view(B, self.n_head, S, D // self.n_head)"),
    mistake("heads interleaved when split", "q_kT_v", "self.v_attn(x).view(heads).transpose(1, 2)", "self.v_attn(x).view(B, S, D // self.n_head, self.n_head).permute(0, 3, 1, 2)"),
    mistake("kT by a view", "q_kT_v", "self.k_attn(x).view(heads).permute(0, 2, 3, 1)", "self.k_attn(x).view(heads).transpose(1, 2).reshape(B, self.n_head, -1, S)"),
    mistake("k's weights for v", "q_kT_v", "self.v_attn(x)", "self.k_attn(x)"),
    mistake("q's weights for k", "q_kT_v", "self.k_attn(x)", "self.q_attn(x)"),
    mistake("q scaled in q_kT_v already", "q_kT_v", "return q, kT, v", "return q * self.scale_factor, kT, v"),
    mistake("positions ignore the mask", "embed", "if attention_mask is None:", "if True:"),
    mistake("positions with a mask off by one", "embed", "attention_mask.long().cumsum(dim=1) - 1", "attention_mask.long().cumsum(dim=1)"),
    mistake("positions without a mask start at 1", "embed", "torch.arange(S, device", "torch.arange(1, S + 1, device"),
    mistake("positions shifted by the padding on the left only", "embed", "attention_mask.long().cumsum(dim=1) - 1", "torch.arange(S) - attention_mask.long().argmax(dim=1, keepdim=True)"),
    mistake("no positions", "embed", " + self.position_embeddings(position_ids)", ""),
    mistake("tokens scaled by sqrt(D)", "embed", "self.token_embeddings(input_ids) +", "self.token_embeddings(input_ids) * self.n_embd**0.5 +"),
    mistake("no dropout", "embed", f"self.dropout({EMBEDDINGS})", EMBEDDINGS),
    mistake("dropout on the tokens only", "embed", f"self.dropout({EMBEDDINGS})", EMBEDDINGS.replace("self.token_embeddings(input_ids)", "self.dropout(self.token_embeddings(input_ids))")),
    mistake("dropout active at evaluation", "embed", f"self.dropout({EMBEDDINGS})", f"F.dropout({EMBEDDINGS}, self.dropout.p)"),
    mistake("positions beyond the last one clamped", "embed", "if self.n_positions < S:", "if False:", "self.position_embeddings(position_ids)", "self.position_embeddings(position_ids.clamp(max=self.n_positions - 1))"),
    mistake("ln_1 for both", FF, "self.ln_2(x)", "self.ln_1(x)"),
    mistake("the norms swapped", FF, "self.ln_1(x)", "self.ln_2(x)", "self.ff(self.ln_2(x))", "self.ff(self.ln_1(x))"),
    mistake("no norm before the attention", FF, "self.mha(self.ln_1(x), attention_mask)", "self.mha(x, attention_mask)"),
    mistake("no norm before the feed-forward", FF, "self.ff(self.ln_2(x))", "self.ff(x)"),
    mistake("norm on the residual stream", FF, ADD_ATTENTION, "x = self.ln_1(x)\n        x = x + self.mha(x, attention_mask)"),
    mistake("no residual around the attention", FF, "x = x + self.mha", "x = self.mha"),
    mistake("no residual around the feed-forward", FF, "return x + self.ff", "return self.ff"),
    mistake("no feed-forward", FF, ADD_FEED_FORWARD, "return x"),
    mistake("dropout of the block on both branches", FF, "FeedForward(n_embd, p_dropout)", "FeedForward(n_embd, p_dropout)\n        self.dropout = nn.Dropout(p_dropout)", ADD_ATTENTION, "x = x + self.dropout(self.mha(self.ln_1(x), attention_mask))", ADD_FEED_FORWARD, "return x + self.dropout(self.ff(self.ln_2(x)))"),
    mistake("attention and feed-forward side by side", FF, ADD_ATTENTION, "a = self.mha(self.ln_1(x), attention_mask)", ADD_FEED_FORWARD, "return x + a + self.ff(self.ln_2(x))"),
    mistake("padding mask not passed to the attention", FF, "self.mha(self.ln_1(x), attention_mask)", "self.mha(self.ln_1(x))"),
    mistake("no final norm", "DecoderLM", "return self.ln(x)", "return x"),
    mistake("the final norm before the blocks", "DecoderLM", "x = self.embed(input_ids, attention_mask)", "x = self.ln(self.embed(input_ids, attention_mask))", "return self.ln(x)", "return x"),
    mistake("an output matrix of its own", "DecoderLM", INIT, INIT + "        self.head = nn.Linear(n_embd, n_vocab, bias=False)\n", LOGITS, "self.head(x)"),
    mistake("a copy of the embeddings as output matrix", "DecoderLM", INIT, INIT + "        self.head = [self.token_embeddings.weight.detach().clone()]\n", LOGITS, "F.linear(x, self.head[0])"),
    mistake("the output matrix detached", "DecoderLM", LOGITS, "F.linear(x, self.token_embeddings.weight.detach())"),
    mistake("a bias on the logits", "DecoderLM", INIT, INIT + "        self.bias = nn.Parameter(torch.zeros(n_vocab))\n", LOGITS, "F.linear(x, self.token_embeddings.weight, self.bias)"),
    mistake("torch's default initialisation", "DecoderLM", INIT, ""),
    mistake("residual projections not smaller", "advice of model", "residual_std if writes_residual else 0.02", "0.02"),
    mistake("residual projections by sqrt(n_layer)", "advice of model", "math.sqrt(2 * self.n_layer)", "math.sqrt(self.n_layer)"),
    mistake("biases not 0", "DecoderLM", "nn.init.zeros_(module.bias)", "pass"),
    mistake("the blocks are skipped", "DecoderLM", BLOCKS, "for block in []:"),
    mistake("only the first block", "DecoderLM", BLOCKS, "for block in self.blocks[:1]:"),
    mistake("one block for all layers", "DecoderLM", "nn.ModuleList(DecoderBlock(n_embd, n_head, p_dropout) for _ in range(n_layer))", "nn.ModuleList([DecoderBlock(n_embd, n_head, p_dropout)] * n_layer)"),
    mistake("the blocks backwards", "DecoderLM", BLOCKS, "for block in reversed(self.blocks):"),
    mistake("each block applied twice", "DecoderLM", "x = block(x, attention_mask)", "x = block(block(x, attention_mask), attention_mask)"),
    mistake("dropout after the final norm", "DecoderLM", "return self.ln(x)", "return self.dropout(self.ln(x))"),
    mistake("forward returns a tuple", "DecoderLM", "return self.token_logits(self.hidden_states(input_ids, attention_mask))", "return self.token_logits(self.hidden_states(input_ids, attention_mask)), None"),
    mistake("padding mask not passed to the blocks", "DecoderLM", "x = block(x, attention_mask)", "x = block(x, None)"),
    mistake("padding mask not passed to embed", "DecoderLM", "x = self.embed(input_ids, attention_mask)", "x = self.embed(input_ids)"),
    mistake("token 0 taken for padding", "DecoderLM", "x = self.embed(input_ids, attention_mask)", "attention_mask = (input_ids != 0).float()\n        x = self.embed(input_ids, attention_mask)"),
    mistake("p_dropout does not reach the blocks", "advice of model", "DecoderBlock(n_embd, n_head, p_dropout)", "DecoderBlock(n_embd, n_head)"),
    mistake("p_dropout does not reach the feed-forward", "advice of model", "FeedForward(n_embd, p_dropout)", "FeedForward(n_embd)"),
    mistake("not shifted", LOSS, LABELS, "input_ids.flatten()", "logits[:, :-1]", "logits"),
    mistake("shifted the wrong way", LOSS, LABELS, "input_ids[:, :-1].flatten()", "logits[:, :-1]", "logits[:, 1:]"),
    mistake("summed", LOSS, CROSS_ENTROPY, 'F.cross_entropy(predictions, labels, reduction="sum")'),
    mistake("summed over tokens, averaged over rows", LOSS, CROSS_ENTROPY, 'F.cross_entropy(predictions, labels, reduction="sum") / len(input_ids)'),
    mistake("divided by B S", LOSS, CROSS_ENTROPY, 'F.cross_entropy(predictions, labels, reduction="sum") / input_ids.numel()'),
    mistake("labels padded with token 0", LOSS, LABELS, "F.pad(input_ids[:, 1:], (0, 1)).flatten()", "logits[:, :-1]", "logits"),
    mistake("shifted after flattening: a row's end predicts the next row's start", LOSS, LABELS, "input_ids.flatten()[1:]", "logits[:, :-1].flatten(end_dim=1)", "logits.flatten(end_dim=1)[:-1]"),
    mistake("first position lost", LOSS, LABELS, "input_ids[:, 2:].flatten()", "logits[:, :-1]", "logits[:, 1:-1]"),
    mistake("last position lost", LOSS, LABELS, "input_ids[:, 1:-1].flatten()", "logits[:, :-1]", "logits[:, :-2]"),
    mistake("softmax before the cross entropy", LOSS, "F.cross_entropy(predictions,", "F.cross_entropy(predictions.softmax(-1),"),
    mistake("log of a softmax", LOSS, "F.cross_entropy(predictions,", "F.nll_loss(predictions.softmax(-1).log(),"),
    mistake("in bits", LOSS, CROSS_ENTROPY, f"{CROSS_ENTROPY} / math.log(2)"),
    mistake("cut off from the graph", LOSS, CROSS_ENTROPY, f"{CROSS_ENTROPY}.detach()"),
    mistake("no zero_grad", "train", "        optimizer.zero_grad()\n", ""),
    mistake("zero_grad inside the accumulation", "train", "        optimizer.zero_grad()\n", "", BACKWARD, "            optimizer.zero_grad()\n" + BACKWARD),
    mistake("loss not divided", "train", "(loss / grad_accumulation_steps).backward()", "loss.backward()"),
    mistake("loss divided twice", "train", "(loss / grad_accumulation_steps).backward()", "(loss / grad_accumulation_steps**2).backward()"),
    mistake("learning rate never set", "train", SET_LR, ""),
    mistake("learning rate set once", "train", SET_LR, "        if step == 0:\n    " + SET_LR),
    mistake("learning rate one step late", "train", SET_LR, "", STEP, STEP + SET_LR),
    mistake("steps counted from 1", "train", "learning_rate = lr_schedule(step)", "learning_rate = lr_schedule(step + 1)"),
    mistake("learning rate of the first parameter group only", "train", "in optimizer.param_groups:", "in optimizer.param_groups[:1]:"),
    mistake("step inside the accumulation", "train", STEP, "", BACKWARD, BACKWARD + "    " + STEP),
    mistake("no optimizer step", "train", STEP, ""),
    mistake("one batch for all micro-batches", "train", "        losses = []\n", "        losses = []\n        input_ids = next(batches)\n", "            input_ids = next(batches)\n", ""),
    mistake("one step too few", "train", "range(start_step, num_training_steps)", "range(start_step + 1, num_training_steps)"),
    mistake("divided loss logged", "train", "torch.stack(losses).mean()", "torch.stack(losses).mean() / grad_accumulation_steps"),
    mistake("last micro-batch logged", "train", "torch.stack(losses).mean()", "losses[-1]"),
    mistake("mean over all steps logged", "train", RECENT, "deque(previous_losses)"),
    mistake("loss of the step alone logged", "train", RECENT, "deque(previous_losses, maxlen=1)"),
    mistake("logged every tenth step", "train", "if wandb.run is not None:", "if wandb.run is not None and step % 10 == 0:"),
    mistake("logged without asking for a run", "advice of train", "        if wandb.run is not None:\n", "        if True:\n"),
    mistake("left in evaluation mode", "advice of train", "    model.train()\n", ""),
    mistake("put into evaluation mode", "advice of train", "    model.train()\n    for", "    model.eval()\n    for"),
    mistake("autocast not used", "advice of train", IN_AUTOCAST, IN_AUTOCAST.replace("autocast", "nullcontext()", 1)),
    mistake("grad_clip ignored", "advice of train", "if grad_clip is not None:", "if False:"),
    mistake("warm-up one step early", "cosine_lr_schedule", "max_lr * t / num", "max_lr * (t + 1) / num"),
    mistake("warm-up from min_lr", "cosine_lr_schedule", "return max_lr * t / num_warmup_steps", "return min_lr + (max_lr - min_lr) * t / num_warmup_steps"),
    mistake("minimum one step early", "cosine_lr_schedule", PROGRESS, "(t - num_warmup_steps) / (num_training_steps - 1 - num_warmup_steps)  #"),
    mistake("cosine from step 0", "cosine_lr_schedule", PROGRESS, "t / num_training_steps  #"),
    mistake("cosine b steps long", "cosine_lr_schedule", PROGRESS, "(t - num_warmup_steps) / num_training_steps  #"),
    mistake("a whole cosine", "cosine_lr_schedule", "math.pi * progress", "2 * math.pi * progress"),
    mistake("linear decay", "cosine_lr_schedule", COSINE, "max_lr + (min_lr - max_lr) * progress"),
    mistake("decay to 0", "cosine_lr_schedule", COSINE, "max_lr * (1 + math.cos(math.pi * progress)) / 2"),
    mistake("min_lr not added", "cosine_lr_schedule", COSINE, "(max_lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2"),
    mistake("amplitude max_lr", "cosine_lr_schedule", COSINE, "min_lr + max_lr * (1 + math.cos(math.pi * progress)) / 2"),
    mistake("the cosine goes on after the end", "cosine_lr_schedule", "if t >= num_training_steps:", "if False:"),
    mistake("division by zero without warm-up", "advice of train", "if t < num_warmup_steps:", "if t <= num_warmup_steps:"),
    mistake("division by zero where warm-up is all", "advice of train", "if t >= num_training_steps:", "if t > num_training_steps:"),
    mistake("last start missing", RANDOM, "len(tokens) - seq_len + 1", "len(tokens) - seq_len"),
    mistake("first start missing", RANDOM, RANDOM_STARTS, f"torch.randint(1, {N_STARTS}, (batch_size, 1)).numpy()"),
    mistake("rows of scattered tokens", RANDOM, ROWS, "tokens[np.random.randint(len(tokens), size=(batch_size, seq_len))]"),
    mistake("rows next to one another", RANDOM, RANDOM_STARTS, f"(int(torch.randint({N_STARTS}, ())) + np.arange(batch_size)[:, None]) % ({N_STARTS})"),
    mistake("one start for all rows", RANDOM, RANDOM_STARTS, f"torch.randint({N_STARTS}, (1, 1)).numpy().repeat(batch_size, axis=0)"),
    mistake("the same batch again", RANDOM, f"    while True:\n        starts = {RANDOM_STARTS}", f"    starts = {RANDOM_STARTS}\n    while True:"),
    mistake("starts at multiples of seq_len only", RANDOM, RANDOM_STARTS, "torch.randint((len(tokens) - seq_len) // seq_len + 1, (batch_size, 1)).numpy() * seq_len"),
    mistake("ids read as int16", "advice of train", ROWS, f"{ROWS}.astype(np.int16)"),
    mistake("one batch only", RANDOM, "while True:", "for _ in range(1):"),
    mistake("rows overlap by a token", SEQUENTIAL, SEQUENTIAL_ROWS, "rows = np.stack([tokens[i * (seq_len - 1) :][:seq_len] for i in range(n_rows)])"),
    mistake("rows one token apart", SEQUENTIAL, SEQUENTIAL_ROWS, "rows = np.stack([tokens[i : i + seq_len] for i in range(n_rows)])"),
    mistake("incomplete last batch kept", "advice of train", "if drop_last:", "if False:"),
    mistake("last full batch dropped", SEQUENTIAL, "n_rows = len(tokens) // seq_len", "n_rows = (len(tokens) - 1) // seq_len"),
    mistake("rows of shuffled order", SEQUENTIAL, "rows[start : start + batch_size]", "rows[start : start + batch_size][::-1]"),
    mistake("rows run through the batches", SEQUENTIAL, "rows[start : start + batch_size]", "rows[start // batch_size :: n_rows // batch_size]"),
    mistake("without end", SEQUENTIAL, "for start in range(0, n_rows, batch_size):", "for start in list(range(0, n_rows, batch_size)) * 30:"),
    mistake("temperature ignored", SOFTMAX, SOFTMAX_OF_LOGITS, "F.softmax(logits, dim=-1)"),
    mistake("temperature applied after softmax", SOFTMAX, SOFTMAX_OF_LOGITS, "F.softmax(logits, dim=-1) / temperature"),
    mistake("multiplied by temperature", SOFTMAX, "/ temperature, dim=-1)", "* temperature, dim=-1)"),
    mistake("softmax over the batch", SOFTMAX, SOFTMAX_OF_LOGITS, "F.softmax(logits / temperature, dim=0)"),
    mistake("NaN at temperature 0", SOFTMAX, IF_GREEDY, "if False:"),
    mistake("plain softmax at temperature 0", SOFTMAX, IF_GREEDY, "if temperature == 0:\n        return F.softmax(logits, dim=-1)\n    if False:"),
    mistake("log-softmax", SOFTMAX, SOFTMAX_OF_LOGITS, "F.log_softmax(logits / temperature, dim=-1)"),
    mistake("exp overflows", SOFTMAX, f"return {SOFTMAX_OF_LOGITS}", "e = torch.exp(logits / temperature)\n    return e / e.sum(dim=-1, keepdim=True)"),
    mistake("logits changed in place", "advice of generate", SOFTMAX_OF_LOGITS, "F.softmax(logits.div_(temperature), dim=-1)"),
    mistake("arg max at every temperature", "generate", DRAW, "probs.argmax(dim=-1, keepdim=True)"),
    mistake("sampled at temperature 0", "generate", GREEDY, "tokens = torch.multinomial(F.softmax(logits, dim=-1), 1)"),
    mistake("temperature not passed on", "generate", "softmax_with_temperature(logits, temperature), top_k", "softmax_with_temperature(logits, 1.0), top_k"),
    mistake("one draw for all rows", "generate", DRAW, "torch.multinomial(probs[:1], 1).expand(len(probs), 1)"),
    mistake("seeded inside", "generate", "    texts = []\n", "    texts = []\n    torch.manual_seed(0)\n"),
    mistake("prompt returned", "generate", "input_ids[:, n_prompt:].tolist()", "input_ids.tolist()"),
    mistake("the prompt's last token returned", "generate", "input_ids[:, n_prompt:].tolist()", "input_ids[:, n_prompt - 1 :].tolist()"),
    mistake("last token alone given to the model", "generate", MODEL, "model(input_ids[:, -1:], mask[:, -1:])[:, -1])"),
    mistake("new tokens not given to the model", "generate", NEXT_LOGITS, "next_token_logits(input_ids[:, :n_prompt], mask[:, :n_prompt])"),
    mistake("logits of the first position", "generate", MODEL, "model(input_ids, mask)[:, 0])"),
    mistake("right padding", "generate", *RIGHT_PADDING),
    mistake("mask ignored", "generate", MODEL, "model(input_ids)[:, -1])"),
    mistake("mask not extended", "generate", "torch.ones_like(mask[:, :1])", "torch.zeros_like(mask[:, :1])"),
    mistake("order lost", "generate", "for text in prefixes[start", "for text in sorted(prefixes, key=len)[start"),
    mistake("partial batch lost", "generate", "range(0, len(prefixes), batch_size)", "range(0, len(prefixes) - batch_size + 1, batch_size)"),
    mistake("batch_size ignored", "generate", "    texts = []\n", "    texts = []\n    batch_size = len(prefixes)\n"),
    mistake("characters taken for tokens", "generate", "encode_prompt(tokenizer, text, P)", "encode_prompt(tokenizer, text[-P:], P)"),
    mistake("decoded token by token", "generate", DECODE, f'texts.append("".join(tokenizer.decode([token]) for token in ({ROW})))'),
    mistake("text stripped", "generate", DECODE, DECODE[:-1] + ".strip())"),
    mistake("one token too many", "generate", "range(max_new_tokens)", "range(max_new_tokens + 1)"),
    mistake("every <|endoftext|> masked as padding", "advice of generate", "            n_prompt = input_ids", "            mask = (input_ids != eot_token).float()\n            n_prompt = input_ids"),
    mistake("window does not slide", "advice of generate", NEXT_LOGITS, "next_token_logits(input_ids[:, :P], mask[:, :P])"),
    mistake("generation ends where the window is full", "advice of generate", f"                logits = {NEXT_LOGITS}", f"                if input_ids.shape[1] > P:\n                    break\n                logits = {NEXT_LOGITS}"),
    mistake("window one token short", "advice of generate", NEXT_LOGITS, "next_token_logits(input_ids[:, 1 - P :], mask[:, 1 - P :])"),
    mistake("long prompts keep their first tokens", "advice of generate", "encode_ordinary(text)[-n_positions:]", "encode_ordinary(text)[:n_positions]"),
    mistake("long prompts keep P - max_new_tokens tokens", "advice of generate", "encode_prompt(tokenizer, text, P)", "encode_prompt(tokenizer, text, max(1, P - max_new_tokens))"),
    mistake("an empty prefix crashes", "advice of generate", " or [tokenizer.eot_token]", ""),
    mistake("<|endoftext|> returned as text", "advice of generate", "row.index(eot_token)]", "row.index(eot_token) + 1]"),
    mistake("<|endoftext|> does not end a row", "advice of generate", ROW, "[token for token in row if token != eot_token]"),
    mistake("one row's end ends all", "advice of generate", "if ended.all():", "if ended.any():"),
    mistake("a literal <|endoftext|> ends the text", "advice of generate", "tokenizer.encode_ordinary(text)", 'tokenizer.encode(text, allowed_special="all")'),
    mistake("dropout active", "advice of generate", "    model.eval()\n", ""),
    mistake("the mode found is not restored", "advice of generate", "    model.train(was_training)\n", ""),
    mistake("classes swapped", SENTIMENT, "dim=-1)[:, 1]", "dim=-1)[:, 0]"),
    mistake("probabilities over the whole vocabulary", SENTIMENT, P_POSITIVE, "F.softmax(logits, dim=-1)[:, tokens_of_interest[1]]"),
    mistake("calibration ignored", SENTIMENT, "p.median().item() if calibrate else 0.5", "0.5"),
    mistake("always calibrated", SENTIMENT, "p.median().item() if calibrate else 0.5", "p.median().item()"),
    mistake("the labels' known share of positives used", "advice of classify", "p.median()", "p.quantile(0.469)"),
    mistake("mean for median", SENTIMENT, "p.median()", "p.mean()"),
    mistake("middle of the range for median", SENTIMENT, "p.median().item()", "(p.min() + p.max()).item() / 2"),
    mistake("upper middle value", "advice of classify", "p.median()", "p.sort().values[len(p) // 2]"),
    mistake("ties are positive", "advice of classify", "(p > decision_boundary", "(p >= decision_boundary"),
    mistake("ties broken by order", "advice of classify", "    return (p >", "    if calibrate:\n        rank = p.argsort(stable=True).argsort()\n        return [int(r > (len(p) - 1) // 2) for r in rank]\n    return (p >"),
    mistake("calibrated upwards only", SENTIMENT, "p.median().item()", "max(0.5, p.median().item())"),
    mistake("exp overflows", SENTIMENT, f"return {P_POSITIVE}", "e = torch.exp(logits[:, tokens_of_interest])\n    return e[:, 1] / e.sum(dim=1)"),
    mistake("right padding", "score", PAD, PAD_RIGHT),
    mistake("mask ignored", "score", HIDDEN, "model(input_ids)[:, -1]"),
    mistake("order lost", "score", "for text in texts[start", "for text in sorted(texts, key=len)[start"),
    mistake("partial batch lost", "score", "range(0, len(texts), batch_size)", "range(0, len(texts) - batch_size + 1, batch_size)"),
    mistake("batch_size ignored", "score", "    model.eval()\n", "    model.eval()\n    batch_size = len(texts)\n"),
    mistake("characters taken for tokens", "score", "encode_prompt(tokenizer, text, P)", "encode_prompt(tokenizer, text[-P:], P)"),
    mistake("logits of the first position", "score", HIDDEN, "model(input_ids, mask)[:, 0]"),
    mistake("log-probabilities", "score", HIDDEN, f"{HIDDEN}.log_softmax(-1)"),
    mistake("long texts keep their first tokens", "advice of classify", "encode_prompt(tokenizer, text, P)", "tokenizer.encode_ordinary(text)[:P]"),
    mistake("an empty text has no token", "advice of classify", "encode_prompt(tokenizer, text, P)", "tokenizer.encode_ordinary(text)[-P:]"),
    mistake("dropout active", "advice of classify", "    model.eval()\n", ""),
    mistake("the mode found is not restored", "advice of classify", "    model.train(was_training)\n", ""),
]
# fmt: on
