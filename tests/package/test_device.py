"""The device of a run, and what can be known of a GPU without one.

The meta device stands in for the GPU: its tensors have shapes but no values, so whatever needs a value there
would have to wait for a GPU.
"""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import classify
import generate
import train
from model import DecoderLM
from support import hardware, state
from support.checkpoint import ROOT
from support.chunked_loss import ChunkedLanguageModelingLoss, LanguageModelingLoss
from support.errors import UserError
from support.hardware import Hardware, batches_on, choose_hardware

# --- the choice: the answers of CUDA and MPS are substituted here ------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """machine(n_gpus, capability, …) substitutes what PyTorch says of this machine."""

    def substitute(n_gpus=0, capability=(8, 6), usable=True, mps=False, built=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0 and usable)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_120"])
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return substitute


@pytest.mark.parametrize(
    ("there", "asked", "device", "dtype", "fused", "reason"),
    [
        ({"n_gpus": 2, "mps": True}, "auto", "cuda", torch.bfloat16, True, "8.6: bfloat16 products, TF32"),
        ({"n_gpus": 2}, "cuda:1", "cuda:1", torch.bfloat16, True, "A card"),
        ({"n_gpus": 1, "capability": (7, 5)}, "cuda", "cuda", torch.float32, True, "neither bfloat16 nor TF32"),
        ({"mps": True}, "auto", "mps", torch.float32, False, "Apple"),
        ({}, "auto", "cpu", torch.float32, True, "no GPU found"),
        ({"n_gpus": 1}, "cpu", "cpu", torch.float32, True, "as requested"),
        ({"n_gpus": 1, "usable": False}, "auto", "cpu", torch.float32, True, "its driver is probably too old"),
        ({"n_gpus": 1, "capability": (7, 0)}, "auto", "cpu", torch.float32, True, "is built for sm_75"),
    ],
)
def test_device(machine, there, asked, device, dtype, fused, reason):
    machine(**there)
    chosen = choose_hardware(asked)
    assert (chosen.device, chosen.dtype, chosen.fused) == (torch.device(device), dtype, fused)
    assert reason in str(chosen) and str(chosen).startswith(device) and "\n" not in str(chosen)
    if "cuda" in device:
        assert torch.get_float32_matmul_precision() == "high", "products that stay in float32 should use TF32"


@pytest.mark.parametrize(
    ("there", "asked", "words"),
    [
        *(({}, asked, "") for asked in ("cuda", "cuda:0", "mps", "gpu", "cpu:0", "cuda:x", "meta")),
        ({"n_gpus": 2}, "cuda:2", "finds 2 CUDA GPUs here, numbered from 0"),
        ({"n_gpus": 1, "usable": False}, "cuda", "update the driver or install a PyTorch built for an older CUDA"),
        ({"n_gpus": 1, "usable": False, "built": False}, "cuda", "is built without CUDA"),
        ({"n_gpus": 1, "capability": (7, 0)}, "cuda", "A card has compute capability 7.0, but PyTorch .* sm_75"),
    ],
)
def test_device_that_cannot_be_used(machine, there, asked, words):
    machine(**there)
    with pytest.raises(UserError, match=f"device = '{asked}'.*{words}.*; use auto"):
        choose_hardware(asked)


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((10, 3), ["sm_100"], True),
        ((9, 0), ["sm_90a"], True),
        ((6, 0), ["sm_75", "sm_120", "compute_120"], False),
        ((9, 4), ["gfx942"], True),
    ],
)
def test_machine_code_runs_within_a_major_version_and_ptx_on_newer_ones(capability, architectures, runs):
    assert hardware._has_kernels(capability, architectures) is runs


@pytest.mark.parametrize(("command", "flag"), [(generate, ["--checkpoint"]), (classify, [])])
def test_commands_take_the_devices_of_the_yaml_key(machine, command, flag, capsys):
    machine()
    for asked, words in (("gpu", "is unknown; use auto, cuda, mps or cpu"), ("cuda", "but no GPU found")):
        with pytest.raises(SystemExit) as stop:
            command.main([*flag, str(ROOT / "model.pt"), "--device", asked])
        assert stop.value.code == 2 and f"device = '{asked}'" in (error := capsys.readouterr().err)
        assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("capability", "coarse", "precision"),
    [("AVX512", False, "medium"), ("AVX512", True, "highest"), ("AVX2", False, "highest")],
    ids=["exact products", "products in bfloat16", "no AVX-512"],
)
def test_other_library_for_float32_only_where_its_products_are_exact(monkeypatch, capability, coarse, precision):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    if coarse:
        matmul = torch.Tensor.__matmul__
        monkeypatch.setattr(
            torch.Tensor,
            "__matmul__",
            lambda a, b: matmul(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else matmul(a, b),
        )
    state = torch.get_rng_state()
    choose_hardware("cpu")
    assert torch.get_float32_matmul_precision() == precision
    assert torch.equal(torch.get_rng_state(), state), (
        "the trial must not move the generator that training draws from"
    )


def test_products_chosen_for_this_machine_are_float32s():
    choose_hardware("cpu")
    a, b = torch.randn(2, 300, 300)
    torch.testing.assert_close(a @ b, (a.double() @ b.double()).float(), rtol=0, atol=2e-4)  # bfloat16: 0.2


def test_facts_of_a_gpu(machine, monkeypatch):
    machine(n_gpus=1)
    gpu = choose_hardware("cuda").device
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 20)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.ones(3))
    assert choose_hardware("cuda").name == "A card" and hardware.peak_memory_mib(gpu) == 3
    assert torch.equal(state.random_state(gpu)["cuda"], torch.ones(3))
    restored = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda values, device: restored.append(values))
    state._restore_random_state(state.random_state(gpu), gpu)
    state._restore_random_state(state.random_state(torch.device("cpu")), gpu)  # a run that began on a CPU
    assert len(restored) == 1


def test_speed_of_the_processor_is_measured():
    cpu = choose_hardware("cpu")
    assert hardware.matrix_product_rate(cpu, size=64) > 1e6 and re.search(r", (1 thread|\d+ threads)$", cpu.name)


# --- where tensors are, and how often a step waits ---------------------------------------------------------

V, P = 53, 16
META = torch.device("meta")


class GPU(TorchDispatchMode):
    """Counts what waits for the meta device, and fails where an operation mixes it with the CPU.

    What is read from it is 1, or False. A copy to it waits unless it is non-blocking.
    """

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, aten = kwargs or {}, torch.ops.aten
        with self:  # in inference mode, operations made of others arrive whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.is_meta}
        if func is aten._local_scalar_dense.default and "meta" in devices:
            self.waits.append("a number read")
            return False if args[0].dtype == torch.bool else 1
        if func is aten._to_copy.default and (target := kwargs.get("device")) and target != args[0].device:
            if "meta" in devices:
                self.waits.append("a copy to the CPU")
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if not kwargs.get("non_blocking"):
                self.waits.append("a blocking copy from the CPU")
        else:
            assert len(devices) <= 1, f"{func} of tensors on {devices}: which one was made on the CPU by mistake?"
        return func(*args, **kwargs)


class Characters:
    """A tokenizer: one token for each character."""

    eot_token = V - 1

    def encode_ordinary(self, text):
        return [ord(character) % (V - 1) for character in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


@pytest.fixture
def model():
    """On the meta device."""
    return DecoderLM(V, 12, 2, P, 2).to(META)


def random_batches(device=META):
    return train.random_batch_sampler(torch.arange(V), device, 3, P)


def test_mode_notices_a_tensor_on_the_cpu(model):
    """This test tests the two tests below."""
    with GPU(), pytest.raises(AssertionError, match="made on the CPU by mistake"):
        model.token_logits(model.ln(torch.ones(2, P, 12, device=META)) + torch.ones(P, 12))
    with GPU() as gpu:
        next(random_batches())
        model.ln.weight.sum().item()
        model.ln.weight.tolist()
    assert gpu.waits == ["a blocking copy from the CPU", "a number read", "a copy to the CPU"]


@pytest.mark.parametrize("loss_class", [None, LanguageModelingLoss])
def test_a_training_step_waits_for_the_device_once(model, loss_class):
    """For the loss that is logged, whatever the number of micro-batches. The meta device has no fused AdamW."""
    steps = []
    with GPU() as gpu:
        train.train(
            model,
            (batch.to(META, non_blocking=True) for batch in random_batches("cpu")),
            torch.optim.AdamW(model.parameters(), foreach=True),
            lambda step: 1e-3,
            num_training_steps=3,
            grad_accumulation_steps=2,
            grad_clip=1.0,
            loss_fn=loss_class and loss_class(model),
            on_step=lambda result: steps.append(list(gpu.waits)),
        )
    assert [len(waits) for waits in steps] == [1, 2, 3], steps[-1]


def test_evaluation_waits_once_a_batch(model):
    batches = [torch.zeros(n, P, dtype=torch.long, device=META) for n in (3, 3, 1)]
    with GPU() as gpu:
        train.evaluate(model, batches)
    assert gpu.waits == ["a number read"] * 3


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_decoding_step_waits_once(model, temperature):
    """To know whether all texts have ended; the token itself stays on the device."""
    for n_new in (4, P + 5):  # within the window, and sliding
        with GPU() as gpu:
            generate.generate(
                model, META, Characters(), ["ab", "abcde"], 2, n_new, temperature, top_k=5, top_p=0.9
            )
        assert gpu.waits == ["a number read"] * n_new + ["a copy to the CPU"], "the texts are fetched at the end"


def test_scoring_reads_nothing_back(model):
    with GPU() as gpu:
        logits = classify.score(model, META, Characters(), ["abc", "a", "abcd"], 2)
    assert logits.shape == (3, V) and logits.is_meta
    assert "a number read" not in gpu.waits and "a copy to the CPU" not in gpu.waits


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda:1", ["pinned", "to cuda:1 without waiting"]),
        ("cpu", ["to cpu"]),
        ("mps", ["to mps"]),
    ],
)
def test_batches_for_cuda_are_pinned_and_copied_without_waiting(device, expected):
    class Batch:
        done = []

        def pin_memory(self):
            self.done.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            self.done.append(f"to {device}" + non_blocking * " without waiting")
            return self

    batch = Batch()
    assert list(batches_on(torch.device(device), [batch])) == [batch]
    assert batch.done == expected


# --- bfloat16 ----------------------------------------------------------------------------------------------


def test_autocast_of_a_device():
    hardware = Hardware(torch.device("cpu"), torch.bfloat16, True, "")
    assert hardware.autocast().fast_dtype == torch.bfloat16 and hardware.autocast().device == "cpu"


@pytest.mark.parametrize("loss_class", [LanguageModelingLoss, ChunkedLanguageModelingLoss])
def test_bfloat16_products_change_little_and_leave_the_weights_in_float32(randomise, loss_class):
    model = randomise(DecoderLM(V, 24, 3, P, 2, p_dropout=0.0))
    input_ids, results = torch.randint(V, (4, P)), {}
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with Hardware(torch.device("cpu"), dtype, True, "").autocast():
            loss = loss_class(model)(input_ids)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        results[dtype] = loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])
    (exact, exact_grad), (rounded, rounded_grad) = results.values()
    assert exact != rounded, "autocast changed nothing"
    assert abs(rounded / exact - 1) < 0.01
    assert torch.cosine_similarity(rounded_grad, exact_grad, dim=0) > 0.99
