"""The rival of gpu.py: TRL's SFTTrainer, with PEFT where adapters are trained, on the same dialogues."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any


def synchronise(device: str) -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def trainer_of(at: Any, rank: int, batch_size: int, steps: int) -> Any:
    """TRL's trainer on the embedded dialogues, each token with or without loss as in ours. at: a `gpu.Setting`."""
    import datasets
    import trl as library
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.data.datasets import open_dataset
    from tunesmith.data.tokenizer import Tokenizer
    from tunesmith.data.tokenstore import tokenise
    from tunesmith.options.training import DataOptions

    tokenizer = Tokenizer.load(at.work / "model")
    store = tokenise(open_dataset(DataOptions(name="sample")), "train", tokenizer)
    rows = []
    for i in range(len(store)):
        ids, targets = store.row(i, "assistant")
        if len(ids) <= at.block_size:
            mask = [0, *(int(t >= 0) for t in targets[:-1])]
            rows.append({"input_ids": ids.tolist(), "completion_mask": mask})
    on_cpu = at.device == "cpu"
    arguments = library.SFTConfig(
        output_dir=str(at.work / "trl"), max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=1e-4,
        lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], seed=0,
        bf16=not at.tiny, gradient_checkpointing=False, optim="adamw_torch_fused", packing=True, max_length=at.block_size,
        use_cpu=on_cpu, disable_tqdm=True, dataloader_pin_memory=not on_cpu,
    )  # fmt: skip
    more: dict[str, Any] = {}
    if rank:
        import peft

        targets = ["c_attn", "c_proj", "c_fc"]
        more["peft_config"] = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, fan_in_fan_out=True)
    model = AutoModelForCausalLM.from_pretrained(at.work / "model", activation_function="gelu_pytorch_tanh")
    return library.SFTTrainer(
        model.train(), arguments, train_dataset=datasets.Dataset.from_list(rows * (1 if at.tiny else 8)),
        processing_class=AutoTokenizer.from_pretrained(at.work / "model"), **more,
    )  # fmt: skip


def trl(at: Any, rank: int, batch_size: int) -> dict[str, Any]:
    """TRL's SFTTrainer on the same dialogues: bf16, packed, fused AdamW, no checkpointing; with PEFT where a rank is given."""
    missing = [
        name for name in ("transformers", "trl", "datasets", *(["peft"] * bool(rank))) if find_spec(name) is None
    ]
    if missing:
        return {"note": f"not run: {', '.join(missing)} not installed (benchmarks/rivals.txt)"}
    import torch
    import transformers

    steps = 4 if at.tiny else 40
    trainer = trainer_of(at, rank, batch_size, steps)
    marks, tokens = [], []

    class Marks(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, _arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            synchronise(at.device)
            marks.append(time.perf_counter())

    collate = trainer.data_collator

    def counting(examples: Any) -> Any:
        batch = collate(examples)
        read = batch.get("attention_mask")  # none where rows are joined without padding
        tokens.append(batch["input_ids"].numel() if read is None else int(read.sum()))
        return batch

    trainer.data_collator = counting
    trainer.add_callback(Marks())
    trainer.train()
    if (half := len(marks) // 2) == 0:
        return {"note": f"failed: {len(marks)} steps were seen, of {steps}"}
    seconds = marks[-1] - marks[half - 1]
    found = {"tokens_per_s": round(sum(tokens[half : len(marks)]) / seconds, 1), "steps": len(marks) - half}
    if at.device != "cpu":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return found
