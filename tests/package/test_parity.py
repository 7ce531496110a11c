"""The same weights in transformers' GPT-2 must give the same numbers: logits, loss and one step of AdamW."""

import pytest
import torch
from checks import check_close

import train
from model import DecoderLM

V, D, H, P, N_LAYER = 11, 21, 3, 13, 2
IDS = torch.tensor([[4, 10, 7, 0, 6, 2], [9, 1, 3, 3, 2, 8]])


def as_gpt2(weights):
    """Our state_dict under GPT-2's names: q, k and v joined, and linear weights stored transposed."""
    embeddings = weights["token_embeddings.weight"]
    theirs = {"lm_head.weight": embeddings, "transformer.wte.weight": embeddings}
    theirs["transformer.wpe.weight"] = weights["position_embeddings.weight"]
    linear = {"attn.c_proj": "mha.proj", "mlp.c_fc": "ff.linear_in", "mlp.c_proj": "ff.linear_out"}
    for p in ("weight", "bias"):
        theirs[f"transformer.ln_f.{p}"] = weights[f"ln.{p}"]
        for i in range(N_LAYER):
            block, theirs_at = f"blocks.{i}", f"transformer.h.{i}"
            for norm in ("ln_1", "ln_2"):
                theirs[f"{theirs_at}.{norm}.{p}"] = weights[f"{block}.{norm}.{p}"]
            for their_name, name in linear.items():
                theirs[f"{theirs_at}.{their_name}.{p}"] = weights[f"{block}.{name}.{p}"].t()
            qkv = [weights[f"{block}.mha.{name}_attn.{p}"] for name in "qkv"]
            theirs[f"{theirs_at}.attn.c_attn.{p}"] = torch.cat(qkv).t()
    return theirs


def test_logits_also_of_padded_rows_loss_and_one_step_of_adamw(randomise):
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install transformers")
    ours = randomise(DecoderLM(V, D, H, P, N_LAYER, p_dropout=0.0))
    sizes = {"vocab_size": V, "n_positions": P, "n_embd": D, "n_layer": N_LAYER, "n_head": H}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    # GPT-2's own default is the tanh approximation of GELU.
    options = {
        "activation_function": "gelu",
        "layer_norm_epsilon": ours.ln.eps,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, **options))
    theirs.load_state_dict(as_gpt2(ours.state_dict()), strict=True)

    check_close(ours(IDS), theirs(IDS).logits, "logits against GPT-2", atol=1e-4)
    mask = torch.tensor([[0.0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    position_ids = torch.tensor([[0, 0, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    right = theirs(IDS, attention_mask=mask, position_ids=position_ids).logits
    check_close(ours(IDS, mask)[mask.bool()], right[mask.bool()], "logits of real tokens against GPT-2", atol=1e-4)

    # eps far above rounding: the bias of k has no effect, and its gradient is rounding alone.
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-3}
    loss = theirs(IDS, labels=IDS).loss
    check_close(train.compute_language_modeling_loss(IDS, ours(IDS)), loss, "the loss against GPT-2")
    loss.backward()
    torch.optim.AdamW(theirs.parameters(), **options).step()
    optimizer = torch.optim.AdamW(ours.parameters(), **options)
    train.train(ours, iter([IDS]), optimizer, lambda step: options["lr"], num_training_steps=1)
    theirs_after = theirs.state_dict()
    for name, right in as_gpt2(ours.state_dict()).items():
        check_close(theirs_after[name], right, f"{name} after one step of AdamW", atol=1e-4)
