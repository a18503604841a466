"""The model that a run trains: loaded, with adapters and score layer where asked for, and its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from tunesmith.data.cutting import resolve_block_size
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.device import resolve_device, return_freed_memory
from tunesmith.errors import UserError
from tunesmith.files.adapters import load_adapter, read_adapter, save_adapter
from tunesmith.files.bases import OWN_BASE
from tunesmith.files.names import is_adapted, lasting_name, lasting_path, load_for_training
from tunesmith.files.reward_models import load_reward_weights, save_reward_model, set_score
from tunesmith.files.weights import from_hf_state_dict, save_model, stored_weights, weights_fingerprint
from tunesmith.models.lora import apply_lora
from tunesmith.models.model import Model
from tunesmith.models.reward_head import SCORE, RewardModel
from tunesmith.options.configs import AnyConfig, TuningConfig
from tunesmith.outofmemory import is_out_of_memory
from tunesmith.train.optim import OneByOne, build_optimizer


@dataclass(frozen=True)
class Trainee:
    """The model that a run trains.

    model: the language model, or the reward model around it; trunk: what has the blocks, in both cases.
    base: a lasting name of what it started from; fingerprint: of the weights then, "" where nobody needs it: a resumed run
    of all weights without a reference has its own.
    """

    model: nn.Module
    trunk: Model
    tokenizer: Tokenizer
    base: str
    fingerprint: str
    lora: bool

    def write(self, directory: Path) -> None:
        """The checkpoint of the model: Hugging Face layout, or with LoRA PEFT's."""
        score = {SCORE: self.model.score.weight} if isinstance(self.model, RewardModel) else {}
        if self.lora:
            save_adapter(self.trunk, directory, base=self.base, fingerprint=self.fingerprint, extra=score)
            self.tokenizer.save(directory, self.trunk.longest, self.trunk.config.vocab_size)
        elif isinstance(self.model, RewardModel):
            save_reward_model(self.model, self.tokenizer, directory)
        else:
            save_model(self.trunk, self.tokenizer, directory)

    def read(self, directory: Path) -> None:
        """Put a checkpoint's weights back. Raises: UserError naming what is broken."""
        if self.lora:
            files = read_adapter(directory)
            load_adapter(self.trunk, files, fingerprint=self.fingerprint)
            if isinstance(self.model, RewardModel):
                set_score(self.model, files.extra.get(SCORE), directory)
        elif isinstance(self.model, RewardModel):
            load_reward_weights(self.model, directory)
        else:
            from_hf_state_dict(self.trunk, stored_weights(directory), str(directory))


def load_trainee(config: TuningConfig, path: Path, *, scored: bool = False, fingerprint: bool = False) -> Trainee:
    """Load the model, with fresh adapters and score layer where asked for.

    path: the run's directory, where weights that an adapter stands on and no other directory holds are kept too.
    fingerprint: whether somebody needs it; an adapter always does.
    Raises: UserError if the model cannot be had, or the block size or rank does not suit it.
    """
    m, lora = config.model, config.lora
    trunk, tokenizer = load_for_training(m.name, init=m.init, dropout=m.dropout, seed=config.train.seed)
    resolve_block_size(config.data.block_size, trunk.longest, m.name)  # before anything is written
    base = base_for_adapters(config, trunk, tokenizer, path) if lora.rank else m.name
    mark = weights_fingerprint(trunk) if fingerprint or lora.rank else ""
    model = equip(trunk, config, scored=scored)
    return Trainee(model, trunk, tokenizer, base, mark, bool(lora.rank))


def equip(trunk: Model, config: AnyConfig, *, scored: bool) -> nn.Module:
    """What a run trains: `trunk` with fresh adapters and a score layer where asked for, its matrices stored as the options say."""
    model: nn.Module = trunk
    seed, lora = config.train.seed, config.lora
    if scored:
        model = RewardModel(trunk)
        model.init_score(seed)
    if lora.rank:
        apply_lora(trunk, lora.targets, rank=lora.rank, alpha=lora.alpha_or_default, dropout=lora.dropout, seed=seed)
    if config.train.weights == "bf16":
        store_in_bf16(model)
    return model


def base_for_adapters(config: TuningConfig, trunk: Model, tokenizer: Tokenizer, path: Path) -> str:
    """Where a run's adapters find their base, a name for `adapter_config.json`; `trunk` as loaded.

    Random weights, and those of an adapter merged into its own base, exist nowhere else: they are written once, into the
    run, where they move with it. Costs the size of the model in float32.
    """
    own = path / OWN_BASE
    if config.model.init != "random" and not is_adapted(config.model.name):
        return lasting_name(config.model.name)
    if not config.resume:  # a resumed run has it, and one that will be refused must not be given one
        save_model(trunk, tokenizer, own)
    return lasting_path(own)


def store_in_bf16(model: nn.Module) -> None:
    """Keep the matrices of a model in bfloat16. Norms and biases, adapters and a score layer, all small, stay as they are."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and not name.endswith(("lora_A", "lora_B")) and name != SCORE:
            parameter.data = parameter.data.to(torch.bfloat16)
    return_freed_memory()  # where the float32 weights were


def prepare_model(model: nn.Module, trunk: Model, config: AnyConfig) -> torch.device:
    """Put the model on its device and into training mode, compiled where that is resolved so. trunk: in `model`, or itself."""
    device = resolve_device(config.train.device)
    model.to(device).train()
    mode = config.train.activation_checkpointing
    trunk.activation_checkpointing = False if mode == "auto" else mode
    if config.train.compile is True:
        trunk.compile_blocks()
    return device


def check_trainable(model: nn.Module, *, lora: bool, name: str) -> None:
    """Raises: UserError if what was asked for would not be trained: every weight, or with LoRA every adapter.

    An optimizer without parameters fails by itself; one that holds the score head alone would train on without a word.
    """
    asked = {n: p for n, p in model.named_parameters() if not lora or n.endswith(("lora_A", "lora_B"))}
    frozen = [n for n, p in asked.items() if not p.requires_grad]
    if frozen or not asked:
        what = "adapters" if lora else "weights"
        raise UserError(
            f"{name}: {len(frozen)} of the {len(asked)} {what} that this run should train are frozen"
            f"{' (' + ', '.join(frozen[:3]) + ', ...)' if frozen else ''}; call model.requires_grad_(True) before training"
            f"{'' if lora else ', or train adapters with --lora.rank 8'}"
        )


def make_optimizer(model: nn.Module, config: AnyConfig) -> Optimizer | OneByOne:
    """The optimizer of a resolved configuration, its state made.

    Raises: UserError if that does not fit into memory, or if a weight that is to be trained is frozen.
    """
    o, t = config.optimizer, config.train
    check_trainable(model, lora=config.lora.rank > 0, name=config.model.name)
    assert o.lr is not None
    plain = build_optimizer(model, o.name, lr=o.lr, weight_decay=o.weight_decay, momentum=o.momentum)
    one_by_one = OneByOne(plain, in_backward=t.optimizer_in_backward)
    try:
        one_by_one.allocate_state()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory allocating the state of {o.name} for {config.model.name}: use an optimizer with less "
            f"state (adamw8bit: a quarter of adamw's; sgd: none), or train fewer weights (--lora.rank 8); "
            f"`tunesmith plan --fit` finds what fits"
        ) from None
    in_bf16 = any(p.dtype is torch.bfloat16 and p.requires_grad for p in model.parameters())
    return one_by_one if t.optimizer_in_backward or in_bf16 else plain
