"""Right solutions for mutants.py: what each changes in the graded files, all of which must get all points.

A change is a list of edits (old text, new text), or the name of a file in solutions/ where the approach differs.
"""

EINSUM_SCORES = 'torch.einsum("bhqd,bhdk->bhqk", q, kT) * self.scale_factor'
EINSUM_ATTENTION = 'torch.einsum("bhqk,bhkd->bhqd", weights, v)'
EINSUM_LOGITS = 'torch.einsum("bsd,vd->bsv", x, self.token_embeddings.weight)'

ATTEND = "        weights = self.dropout(F.softmax(scores, dim=-1))\n"
ATTEND_BY_HAND = """        weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values) * visible
        weights = self.dropout(weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30))
"""
LIBRARY_ATTENTION = """        p = self.dropout.p if self.training else 0.0
        attn = F.scaled_dot_product_attention(q, kT.transpose(2, 3), v, attn_mask=visible, dropout_p=p)
"""
FUSED_QKV = """        weight = torch.cat([self.q_attn.weight, self.k_attn.weight, self.v_attn.weight])
        bias = torch.cat([self.q_attn.bias, self.k_attn.bias, self.v_attn.bias])
        q, k, v = F.linear(x, weight, bias).view(B, S, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        kT = k.transpose(2, 3)
"""
SEPARATE_QKV = """        q = self.q_attn(x).view(heads).transpose(1, 2)  # (B, H, S, HD)
        kT = self.k_attn(x).view(heads).permute(0, 2, 3, 1)  # (B, H, HD, S)
        v = self.v_attn(x).view(heads).transpose(1, 2)  # (B, H, S, HD)
"""
CAUSAL_MASK = "torch.ones(S_q, S_k, dtype=torch.bool, device=q.device).tril(S_k - S_q)"
BUFFER = '        self.register_buffer("scale_factor"'
CAUSAL_BUFFER = '        self.register_buffer("causal", torch.ones(512, 512).bool().tril(), persistent=False)\n'
INIT_BY_NAME = """        for name, p in self.named_parameters():
            if "ln" in name:
                continue
            std = 0.02 * (2 * self.n_layer) ** -0.5 if "proj" in name or "linear_out" in name else 0.02
            torch.nn.init.normal_(p, 0, std) if p.dim() == 2 else torch.nn.init.zeros_(p)
        return
        residual_std = 0.02"""

RANDOM_STARTS = "torch.randint(n_starts, (batch_size, 1)).numpy()"
DRAW_ROWS = """        starts = torch.randint(n_starts, (batch_size, 1)).numpy()
        yield torch.from_numpy(tokens[starts + offsets].astype(np.int64)).to(device)
"""
UNFOLD_ROWS = """        rows = torch.as_tensor(tokens).unfold(0, seq_len, 1)
        yield rows[torch.randint(len(rows), (batch_size,))].to(device).long()
"""
SEQUENTIAL_LOOP = "    for start in range(0, n_rows, batch_size):\n"
SEQUENTIAL_VIEW = """    n = n_rows // batch_size
    yield from torch.as_tensor(rows[: n * batch_size]).long().view(n, batch_size, seq_len).to(device)
    for start in []:
"""
DROP_LAST = [(", *, drop_last=True\n", "\n"), ("    if drop_last:\n        n_rows", "    n_rows")]
NO_EXTRAS = [
    ("    grad_accumulation_steps: int = 1,\n    *,\n", "    grad_accumulation_steps: int = 1,\n"),
    (
        """    loss_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    grad_clip: float | None = None,
    start_step: int = 0,
    previous_losses: Iterable[float] = (),
    on_step: Callable[[StepResult], None] | None = None,
) -> None:
""",
        ") -> None:\n    loss_fn, grad_clip, start_step, previous_losses, on_step = None, None, 0, (), None\n",
    ),
]
SET_RATE = "        set_lr(optimizer, learning_rate)\n"
SET_RATE_IN_NEW_GROUPS = (
    "        optimizer.param_groups[:] = [group | {'lr': learning_rate} for group in optimizer.param_groups]\n"
)
ZERO_GRAD, STEP = "        optimizer.zero_grad()\n", "        optimizer.step()\n"
DIVIDED_BACKWARD = (
    "            (loss / grad_accumulation_steps).backward()\n            losses.append(loss.detach())\n"
)
DIVIDED_BEFORE = """            loss = loss / grad_accumulation_steps
            loss.backward()
            losses.append(loss.detach() * grad_accumulation_steps)
"""
CROSS_ENTROPY = "F.cross_entropy(predictions, labels)"

ONE_BY_ONE = """def generate(model, device, tokenizer, prefixes, batch_size, max_new_tokens=32, temperature=0.0):
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


def generate_in_batches("""
NUMPY_SAMPLING = "torch.tensor([np.random.choice(len(p), p=p / p.sum()) for p in probs.double().numpy()])"
SCORE_BATCH = """            input_ids, mask = left_pad([prompts[i] for i in indices], tokenizer.eot_token, device)
            next_logits = last_token_logits(model, model.hidden_states(input_ids, mask))
            logits[indices] = next_logits.to(logits.dtype)
"""
SCORE_ONE_BY_ONE = """            for i in indices:
                logits[i] = model(torch.tensor([prompts[i]], device=device))[0, -1]
"""
SIGMOID = "torch.sigmoid(logits[:, tokens_of_interest[1]] - logits[:, tokens_of_interest[0]])"

RIGHT = {
    "the package's own": {},
    "einsum for matmul": {
        "model": [
            ("(q * self.scale_factor) @ kT", EINSUM_SCORES),
            ("weights @ v", EINSUM_ATTENTION),
            ("F.linear(x, self.token_embeddings.weight)", EINSUM_LOGITS),
        ]
    },
    "-inf, and NaN made 0": {
        "model": [
            ("torch.finfo(scores.dtype).min", "-torch.inf"),
            ("F.softmax(scores, dim=-1)", "F.softmax(scores, dim=-1).nan_to_num(0.0)"),
        ]
    },
    "softmax by hand": {"model": [(ATTEND, ATTEND_BY_HAND)]},
    "the library's attention": {"model": [("        attn = weights @ v  # (B, H, S_q, HD)\n", LIBRARY_ATTENTION)]},
    "one fused q, k, v product": {"model": [(SEPARATE_QKV, FUSED_QKV)]},
    "the causal mask as a buffer, for as many queries as keys": {
        "model": [(BUFFER, CAUSAL_BUFFER + BUFFER), (CAUSAL_MASK, "self.causal[:S_q, :S_k]")],
        "generate": "generate_without_cache.py",
        "classify": "classify_in_order.py",
    },
    "two dropouts in the attention": {
        "model": [
            (BUFFER, "        self.weight_dropout = nn.Dropout(p_dropout)\n" + BUFFER),
            ("self.dropout(F.softmax(scores, dim=-1))", "self.weight_dropout(F.softmax(scores, dim=-1))"),
        ]
    },
    "initialisation by parameter name": {"model": [("        residual_std = 0.02", INIT_BY_NAME)]},
    "position embeddings indexed, not called": {
        "model": [("self.position_embeddings(position_ids)", "self.position_embeddings.weight[position_ids]")]
    },
    "zero_grad last": {"train": [(ZERO_GRAD, ""), (STEP, STEP + ZERO_GRAD)]},
    "zero_grad to zeros, loss divided before": {
        "train": [
            ("optimizer.zero_grad()", "optimizer.zero_grad(set_to_none=False)"),
            (DIVIDED_BACKWARD, DIVIDED_BEFORE),
        ]
    },
    "numpy sampling": {
        "train": [
            (
                "torch.randint(n_starts, (batch_size, 1)).numpy()",
                "np.random.randint(n_starts, size=(batch_size, 1))",
            )
        ]
    },
    "tokens by unfold": {"train": [(DRAW_ROWS, UNFOLD_ROWS)]},
    "sequential batches by view": {"train": [*DROP_LAST, (SEQUENTIAL_LOOP, SEQUENTIAL_VIEW)]},
    "no keyword-only extras": {"train": [*DROP_LAST, *NO_EXTRAS]},
    "log-softmax and gather": {
        "train": [(CROSS_ENTROPY, "-predictions.log_softmax(-1).gather(1, labels[:, None]).mean()")]
    },
    "cross entropy with V second": {
        "train": [(CROSS_ENTROPY, "F.cross_entropy(logits.transpose(1, 2)[:, :, :-1], input_ids[:, 1:])")]
    },
    "learning rates in new parameter groups": {"train": [(SET_RATE, SET_RATE_IN_NEW_GROUPS)]},
    "generation without a cache, texts scored in order": {
        "generate": "generate_without_cache.py",
        "classify": "classify_in_order.py",
    },
    "generation with a cache of its own": {
        "generate": "generate_own_cache.py",
        "classify": "classify_in_order.py",
    },
    "generation of one prefix at a time": {"generate": [("def generate(", ONE_BY_ONE)]},
    "sampling with numpy": {
        "generate": [
            ("torch.multinomial(probs, 1).squeeze(-1)", NUMPY_SAMPLING),
            ("import torch\n", "import numpy as np\nimport torch\n"),
        ]
    },
    "texts scored without padding": {"classify": [(SCORE_BATCH, SCORE_ONE_BY_ONE)]},
    "sigmoid of the logits' difference, the boundary by sorting": {
        "classify": [
            ("F.softmax(logits[:, tokens_of_interest], dim=-1)[:, 1]", SIGMOID),
            ("p.median().item()", "p.sort().values[(len(p) - 1) // 2]"),
        ]
    },
}
