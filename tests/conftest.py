"""Shared setup of all tests: the graded files on the path, no network, fixed seeds, one small tokenizer."""

import os
import random
import sys
from pathlib import Path

# Set before wandb or a Hugging Face package is imported: neither may ask for an account or use the network.
os.environ["WANDB_MODE"] = "disabled"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

pytest_plugins = ["points"]


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: a long test, run only with -m soak")
    config.addinivalue_line("markers", "gpu: a test that needs a CUDA GPU, skipped where there is none")


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="PyTorch finds no usable CUDA GPU here"))
    if "soak" in config.option.markexpr:
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak:
        items[:] = [item for item in items if item not in soak]
        config.hook.pytest_deselected(items=soak)


@pytest.fixture(autouse=True)
def fixed_seeds_and_torch_state(request):
    """Every test starts from the same seeds and leaves torch's global switches as it found them."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    if request.path.parent == TESTS:  # the student's tests: their tensors are too small for several threads
        torch.set_num_threads(1)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision("highest")  # a command in a fixture of the module may have changed it
    random.seed(667)
    np.random.seed(667)
    torch.manual_seed(667)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the call alone imports the compiler
        torch.use_deterministic_algorithms(deterministic)
    torch.set_grad_enabled(True)


# Whole words as tokens: a text has fewer tokens than characters.
WORDS = "Once| upon| a| time| there| was| the| good| bad| not|To| be| or| review| To".split("|")  # noqa: SIM905
# Tokens that no text is encoded to: one with spaces around it, and one that begins and ends in the middle of "é".
SPECIAL_CASES = [b" the ", b"\xa9 \xc3"]


@pytest.fixture(scope="session")
def tokenizer():
    """A real tiktoken.Encoding: the 256 bytes, WORDS, two special cases and <|endoftext|>."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is missing: pip install -r requirements.txt")
    tokens = [bytes([i]) for i in range(256)] + [word.encode() for word in WORDS] + SPECIAL_CASES
    return tiktoken.Encoding(
        "words",
        pat_str=r" ?[^\s]+|\s",
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={"<|endoftext|>": len(tokens)},
    )


@pytest.fixture
def make_lm(randomise, tokenizer):
    """make_lm(p_dropout=0.1): a model with n_positions = 16 for generate and score, in evaluation mode.

    Its likeliest tokens are neither <|endoftext|> nor parts of characters.
    """
    from stand_ins import language_model  # imports model.py: a file that does not load must not stop pytest

    def make_lm(p_dropout=0.1):
        lm = language_model(randomise, tokenizer.n_vocab, 21, 3, 16, n_layer=2, p_dropout=p_dropout)
        with torch.no_grad():
            lm.token_embeddings.weight[128:256] = 0.0  # bytes beyond ASCII
            lm.token_embeddings.weight[-3:] = 0.0
        return lm

    return make_lm


@pytest.fixture(scope="session")
def randomise():
    """randomise(model, seed=0): draw parameter values large enough for every parameter and token to matter.

    After GPT-2's initialisation the blocks add next to nothing, so most mistakes in them would not show.
    The values depend only on names and shapes, not on how the model was built.
    """

    @torch.no_grad()
    def randomise(model, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                noise = 0.2 * noise
            elif parameter.dim() == 1:  # LayerNorm weights
                noise = 1.0 + 0.3 * noise
            elif "embeddings" not in name:
                noise = 3.0 * noise / parameter.shape[-1] ** 0.5
            parameter.copy_(noise)
        return model

    return randomise
