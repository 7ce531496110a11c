"""Right solutions for mutants.py: what each changes in the graded files, all of which must get all points.

An edit is (old text, new text), or ("def name", the whole new function).
"""

# fmt: off
# ruff: noqa: E501 (one solution, one line)

# Texts of model.py
SEPARATE_QKV = """        q = self.q_attn(x).view(heads).transpose(1, 2)  # (B, H, S, HD)
        kT = self.k_attn(x).view(heads).permute(0, 2, 3, 1)  # (B, H, HD, S)
        v = self.v_attn(x).view(heads).transpose(1, 2)  # (B, H, S, HD)
"""
FUSED_QKV = """        weight = torch.cat([self.q_attn.weight, self.k_attn.weight, self.v_attn.weight])
        bias = torch.cat([self.q_attn.bias, self.k_attn.bias, self.v_attn.bias])
        q, k, v = F.linear(x, weight, bias).view(B, S, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        kT = k.transpose(2, 3)
"""
EINOPS_QKV = """        q = einops.rearrange(self.q_attn(x), "b s (h d) -> b h s d", h=self.n_head)
        kT = einops.rearrange(self.k_attn(x), "b s (h d) -> b h d s", h=self.n_head)
        v = einops.rearrange(self.v_attn(x), "b s (h d) -> b h s d", h=self.n_head)
"""
MERGE = "attn.transpose(1, 2).flatten(start_dim=2)"
SCORES, FILL = "(q * self.scale_factor) @ kT", "torch.finfo(scores.dtype).min"
ATTEND = "        weights = self.dropout(F.softmax(scores, dim=-1))\n"
ATTEND_BY_HAND = """        weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values) * visible
        weights = self.dropout(weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30))
"""
NO_ROW_OF_ZEROS = ("if attention_mask is not None:  # softmax", "if False:  # softmax")
PROJECTED = "return self.projection(self.self_attention(q, kT, v, attention_mask))"
ZEROED_QUERIES = """out = self.projection(self.self_attention(q, kT, v, attention_mask))
        return out if attention_mask is None else out * attention_mask[:, :, None]"""
CAUSAL_MASK = "torch.ones(S_q, S_k, dtype=torch.bool, device=q.device).tril(S_k - S_q)"
BUFFER = '        self.register_buffer("scale_factor"'
CAUSAL_BUFFER = '        self.register_buffer("causal", torch.ones(512, 512).bool().tril(), persistent=False)\n'
TWO_DROPOUTS = "        self.weight_dropout = nn.Dropout(p_dropout)\n"
INIT_BY_NAME = """        for name, p in self.named_parameters():
            if "ln" in name:
                continue
            std = 0.02 * (2 * self.n_layer) ** -0.5 if "proj" in name or "linear_out" in name else 0.02
            torch.nn.init.normal_(p, 0, std) if p.dim() == 2 else torch.nn.init.zeros_(p)
        return
        residual_std = 0.02"""
POST_LN = [
    ("x = x + self.mha(self.ln_1(x), attention_mask)", "x = self.ln_1(x + self.mha(x, attention_mask))"),
    ("return x + self.ff(self.ln_2(x))", "return self.ln_2(x + self.ff(x))"),
]
BLOCK_WITHOUT_P = [
    ("def __init__(self, n_embd: int, n_head: int, p_dropout: float = 0.1):\n        super().__init__()\n        self.ln_1",
     "def __init__(self, n_embd: int, n_head: int):\n        super().__init__()\n        self.ln_1"),
    ("MultiHeadAttention(n_embd, n_head, p_dropout)", "MultiHeadAttention(n_embd, n_head)"),
    ("FeedForward(n_embd, p_dropout)", "FeedForward(n_embd)"),
    ("DecoderBlock(n_embd, n_head, p_dropout)", "DecoderBlock(n_embd, n_head)"),
]

# Texts of train.py
DRAW_ROWS = """        starts = torch.randint(len(tokens) - seq_len + 1, (batch_size, 1)).numpy()
        yield torch.from_numpy(tokens[starts + np.arange(seq_len)].astype(np.int64)).to(device)
"""
UNFOLD_ROWS = """        rows = torch.as_tensor(tokens).unfold(0, seq_len, 1)
        yield rows[torch.randint(len(rows), (batch_size,))].to(device).long()
"""
RANDOM_IN_TORCH = """def random_batch_sampler(tokens, device, batch_size, seq_len):
    while True:
        starts = torch.randint(len(tokens) - seq_len + 1, (batch_size,))
        yield torch.stack([tokens[i : i + seq_len] for i in starts]).to(device)
"""
SEQUENTIAL_IN_TORCH = """def sequential_batch_sampler(tokens, device, batch_size, seq_len):
    n = len(tokens) // (batch_size * seq_len)
    for batch in tokens[: n * batch_size * seq_len].view(n, batch_size, seq_len):
        yield batch.to(device)
"""
TRAIN_OF_THE_HANDOUT = """def train(model, batch_sampler, optimizer, lr_schedule, autocast=nullcontext(), num_training_steps=0,
          grad_accumulation_steps=1):
    losses = []
    for step in range(num_training_steps):
        lr = lr_schedule(step)
        set_lr(optimizer, lr)
        step_loss = 0.0
        for _ in range(grad_accumulation_steps):
            input_ids = next(batch_sampler)
            with autocast:
                loss = compute_language_modeling_loss(input_ids, model(input_ids)) / grad_accumulation_steps
            loss.backward()
            step_loss += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(step_loss)
        wandb.log({"train-loss": np.mean(losses[-20:]), "learning-rate": lr}, step=step)
"""
SEQUENTIAL_LOOP = "    for start in range(0, n_rows, batch_size):\n"
SEQUENTIAL_VIEW = """    n = n_rows // batch_size
    yield from torch.as_tensor(rows[: n * batch_size]).long().view(n, batch_size, seq_len).to(device)
    for start in []:
"""
ZERO_GRAD, STEP = "        optimizer.zero_grad()\n", "        optimizer.step()\n"
BACKWARD = "            (loss / grad_accumulation_steps).backward()\n            losses.append(loss.detach())\n"
DIVIDED_BEFORE = """            loss = loss / grad_accumulation_steps
            loss.backward()
            losses.append(loss.detach() * grad_accumulation_steps)
"""
CROSS_ENTROPY = "F.cross_entropy(predictions, labels)"
SET_RATE = "        set_lr(optimizer, learning_rate)\n"
NEW_GROUPS = "        optimizer.param_groups[:] = [group | {'lr': learning_rate} for group in optimizer.param_groups]\n"

# Texts of generate.py and classify.py
GENERATE_OF_THE_HANDOUT = """def generate(model, device, tokenizer, prefixes, batch_size, max_new_tokens=32, temperature=0.1):
    generations = []
    for i in range(0, len(prefixes), batch_size):
        rows = tokenizer.encode_batch(prefixes[i : i + batch_size])
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[tokenizer.eot_token] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0.0] * (longest - len(row)) + [1.0] * len(row) for row in rows], device=device)
        with torch.no_grad():
            for _ in range(max_new_tokens):
                probs = softmax_with_temperature(model(ids, mask)[:, -1], temperature)
                ids = torch.cat([ids, torch.multinomial(probs, num_samples=1)], dim=1)
                mask = torch.cat([mask, torch.ones(len(rows), 1, device=device)], dim=1)
        generations += tokenizer.decode_batch(ids[:, longest:].tolist())
    return generations
"""
SCORE_OF_THE_HANDOUT = """def score(model, device, tokenizer, texts, batch_size):
    logits = []
    for i in range(0, len(texts), batch_size):
        rows = [tokenizer.encode(text) for text in texts[i : i + batch_size]]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0.0] * (longest - len(row)) + [1.0] * len(row) for row in rows], device=device)
        with torch.no_grad():
            logits.append(model(ids, mask)[:, -1])
    return torch.cat(logits)
"""
GENERATE_ONE_BY_ONE = """def generate(model, device, tokenizer, prefixes, batch_size, max_new_tokens=32, temperature=0.0):
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
DRAW = "torch.multinomial(probs, 1)"
NUMPY_DRAW = "torch.tensor([[np.random.choice(len(p), p=p / p.sum())] for p in probs.double().numpy()])"
NEXT_LOGITS = "logits.append(model.token_logits(model.hidden_states(input_ids, mask)[:, -1]))"
ONE_BY_ONE = "logits += [model(torch.tensor([row], device=device))[:, -1] for row in prompts]"
SIGMOID = "torch.sigmoid(logits[:, tokens_of_interest[1]] - logits[:, tokens_of_interest[0]])"

RIGHT = {
    "the package's own": {},
    "einops": {"model": [("import torch\n", "import einops\nimport torch\n"), (SEPARATE_QKV, EINOPS_QKV), (MERGE, 'einops.rearrange(attn, "b h s d -> b s (h d)")')]},
    "padded queries zeroed": {"model": [(PROJECTED, ZEROED_QUERIES)]},
    "fill with the lowest float: a query without a key averages": {"model": [NO_ROW_OF_ZEROS]},
    "post-LN": {"model": POST_LN},
    "plain initialisation": {"model": [("residual_std if writes_residual else 0.02", "0.02")]},
    "warm-up up to t <= num_warmup_steps": {"train": [("if t < num_warmup_steps:", "if t <= num_warmup_steps:")]},
    "samplers and train() as the handout has them": {"train": [("def random_batch_sampler", RANDOM_IN_TORCH), ("def sequential_batch_sampler", SEQUENTIAL_IN_TORCH), ("def train", TRAIN_OF_THE_HANDOUT)]},
    "generate and score with the handout's arguments only": {"generate": [("def generate", GENERATE_OF_THE_HANDOUT)], "classify": [("def score", SCORE_OF_THE_HANDOUT)]},
    "DecoderBlock without p_dropout": {"model": BLOCK_WITHOUT_P},
    "einsum for matmul": {"model": [(SCORES, 'torch.einsum("bhqd,bhdk->bhqk", q, kT) * self.scale_factor'), ("weights @ v", 'torch.einsum("bhqk,bhkd->bhqd", weights, v)')]},
    "-inf, and NaN made 0": {"model": [(FILL, "-torch.inf"), ("F.softmax(scores, dim=-1)", "F.softmax(scores, dim=-1).nan_to_num(0.0)")]},
    "softmax by hand": {"model": [(ATTEND, ATTEND_BY_HAND)]},
    "one fused q, k, v product": {"model": [(SEPARATE_QKV, FUSED_QKV)]},
    "the causal mask as a buffer, for as many queries as keys": {"model": [(BUFFER, CAUSAL_BUFFER + BUFFER), (CAUSAL_MASK, "self.causal[:S_q, :S_k]")]},
    "two dropouts in the attention": {"model": [(BUFFER, TWO_DROPOUTS + BUFFER), ("self.dropout(F.softmax", "self.weight_dropout(F.softmax")]},
    "initialisation by parameter name": {"model": [("        residual_std = 0.02", INIT_BY_NAME)]},
    "position embeddings indexed, not called": {"model": [("self.position_embeddings(position_ids)", "self.position_embeddings.weight[position_ids]")]},
    "zero_grad last": {"train": [(ZERO_GRAD, ""), (STEP, STEP + ZERO_GRAD)]},
    "zero_grad to zeros, loss divided before": {"train": [("optimizer.zero_grad()", "optimizer.zero_grad(set_to_none=False)"), (BACKWARD, DIVIDED_BEFORE)]},
    "numpy sampling": {"train": [("torch.randint(len(tokens) - seq_len + 1, (batch_size, 1)).numpy()", "np.random.randint(len(tokens) - seq_len + 1, size=(batch_size, 1))")]},
    "tokens by unfold": {"train": [(DRAW_ROWS, UNFOLD_ROWS)]},
    "sequential batches by view": {"train": [(SEQUENTIAL_LOOP, SEQUENTIAL_VIEW)]},
    "log-softmax and gather": {"train": [(CROSS_ENTROPY, "-predictions.log_softmax(-1).gather(1, labels[:, None]).mean()")]},
    "cross entropy with V second": {"train": [(CROSS_ENTROPY, "F.cross_entropy(logits.transpose(1, 2)[:, :, :-1], input_ids[:, 1:])")]},
    "learning rates in new parameter groups": {"train": [(SET_RATE, NEW_GROUPS)]},
    "generation of one prefix at a time": {"generate": [("def generate", GENERATE_ONE_BY_ONE)]},
    "sampling with numpy": {"generate": [(DRAW, NUMPY_DRAW), ("import torch\n", "import numpy as np\nimport torch\n")]},
    "texts scored without padding": {"classify": [(NEXT_LOGITS, ONE_BY_ONE)]},
    "sigmoid of the difference, the boundary by sorting": {"classify": [("F.softmax(logits[:, tokens_of_interest], dim=-1)[:, 1]", SIGMOID), ("p.median().item()", "p.sort().values[(len(p) - 1) // 2]")]},
}
