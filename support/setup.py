"""The inputs of a training run: configuration, device, tokenizer, corpus and processes."""

import math
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import tiktoken
import torch
from tqdm import tqdm

from support.config import TrainingConfig, load_config
from support.data import Corpus, load_corpus
from support.distribution import World, join_world
from support.errors import exit_on_user_error, out_of_memory_means
from support.hardware import Hardware, batches_on, choose_hardware
from support.screen import count, heading
from support.tokenizer import get_tokenizer


@dataclass(frozen=True)
class Setup:
    """The inputs of one training run, loaded and checked."""

    config: TrainingConfig
    hardware: Hardware
    tokenizer: tiktoken.Encoding
    corpus: Corpus
    world: World

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.hardware.device

    @property
    def autocast(self) -> AbstractContextManager:
        """The context in which losses are computed."""
        return self.hardware.autocast()

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all processes train on in one step."""
        c = self.config
        return c.batch_size * c.seq_len * c.grad_accumulation_steps * self.world.size

    def on_device(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The batches of the CPU, moved to the device."""
        return batches_on(self.device, batches)

    def with_bar(self, batches: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
        """The validation batches, with a progress bar on a terminal."""
        total = math.ceil(len(self.corpus.val) // self.config.seq_len / self.config.batch_size)
        disable = None if self.world.is_main_process else True  # None disables it where there is no terminal
        return tqdm(batches, "evaluating", total, leave=False, unit="batch", dynamic_ncols=True, disable=disable)


@contextmanager
def open_setup(args: Namespace) -> Iterator[Setup]:
    """Join the processes that torchrun started and load everything that train.py's command line names.

    A UserError in the block, or for something wrong with these inputs, ends the program in one sentence.
    """
    with exit_on_user_error(), join_world() as world:
        config = load_config(args.config, args.set, data=args.data, init=args.init)
        heading("evaluate" if args.evaluate else f"train {config.output_dir}")  # before what takes seconds
        hardware = choose_hardware(world.device_of_rank(config.device))
        tokenizer = get_tokenizer(config.tokenizer_encoding)
        with world.main_process_first():  # it downloads or tokenises; the others find the result
            corpus = load_corpus(config.data, tokenizer.n_vocab)
        corpus.require_rows(config.seq_len, ("val",) if args.evaluate else ("train", "val"))
        n_parameters = config.model_config.n_parameters(tokenizer.n_vocab)
        size = f"{count(n_parameters, 'parameters')} take {n_parameters * 4 / 1e9:.3g} GB"
        with out_of_memory_means(f"the model is too large: {size}; make model_config smaller"):
            yield Setup(config, hardware, tokenizer, corpus, world)
