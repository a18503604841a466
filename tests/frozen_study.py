"""Study directories written by a formula: what the runner leaves behind, without a training. Known truths are in the numbers.

`python -m frozen_study DIR` (in tests/) writes one to look at.
"""

from __future__ import annotations

import json
import math
import random
import struct
import sys
from pathlib import Path
from typing import Any

import yaml

PROMPTS = [
    ("science and technology", "How does blockchain technology work, in simple terms?"),
    ("science and technology", "Why do cats almost always land on their feet?"),
    ("history and culture", "Why did the Roman roads last so long?"),
    ("history and culture", "What is the story behind the lantern festival?"),
    ("economics and politics", "Why do prices rise when a harvest fails?"),
    ("economics and politics", "What does a central bank do all day?"),
    ("psychology and social issues", "How can I make friends in a new city?"),
    ("psychology and social issues", "Why is it hard to keep a new habit?"),
]
SCORER = "reward model trained on the sample pairs"
HELD_OUT = 400  # pairs
OPTIMIZERS = {  # label: how fast it learns, memory, seconds a step
    "AdamW": (1.0, 13.5), "Adam": (1.0, 13.5), "SGD-Nesterov": (0.55, 11.2), "SGD-momentum": (0.5, 11.2), "SGD": (0.2, 8.4),
}  # fmt: skip


class Writer:
    """Writes runs and collects the plan. seeds: how many of each run."""

    def __init__(self, root: Path, seeds: int = 3, steps: int = 40, scale: str = "smoke") -> None:
        self.root, self.seeds, self.steps = root, seeds, steps
        self.plan: dict[str, Any] = {
            "name": "paper", "title": "GPT-2 as a dialogue model: the 2023 study again", "scale": scale,
            "experiments": {}, "runs": {}, "figures": [], "tables": [],
        }  # fmt: skip
        self.progress: dict[str, Any] = {"runs": {}}

    def show(self, experiment: str, title: str, run: str, label: str, seed: int) -> None:
        """Put a run into an experiment."""
        e = self.plan["experiments"].setdefault(experiment, {"title": title, "runs": []})
        e["runs"].append({"run": run, "label": label, "seed": seed})

    def run(self, name: str, settings: dict[str, Any], lines: list[dict[str, Any]], *, state: str = "finished",
            reason: str = "", command: str = "sft", memory: dict[str, float] | None = None, needs: tuple[str, ...] = (),
            choice: dict[str, Any] | None = None, answers: dict[int, list[dict[str, Any]]] | None = None) -> Path:  # fmt: skip
        """A run directory, its entry in the plan and in the progress."""
        entry = {
            "directory": f"runs/{name}",
            "hash": "0" * 16,
            "command": command,
            "settings": settings,
            "needs": list(needs),
        }
        self.plan["runs"][name] = entry | ({"memory": memory} if memory else {})
        self.progress["runs"][name] = {"state": state, "reason": reason, "started": 0.0, "seconds": 1.0}
        path = self.root / "runs" / name
        if state == "waiting":
            return path
        path.mkdir(parents=True)
        config: dict[str, Any] = {
            "model": {"name": "sample"}, "data": {"name": "sample", "block_size": 256, "batching": "windows", "seed": 1},
            "train": {"steps": self.steps, "precision": "fp32", "device": "cuda"}, "eval": {"iters": 8}, "lora": {"rank": 0},
        }  # fmt: skip
        for key, value in settings.items():
            group, _, option = key.partition(".")
            config.setdefault(group, {})[option] = value
        (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        (path / "inputs.json").write_text(json.dumps({"command": command, "draws": 2}))
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        losses = {
            r["step"]: r["validation_loss"] for r in lines if r["event"] == "eval" and r["validation_loss"] is not None
        }
        status = {
            "state": state,
            "step": lines[-1]["step"],
            "reason": reason,
            "best_step": min(losses, key=losses.get, default=None),
        }
        (path / "status.json").write_text(json.dumps(status | ({"choice": choice} if choice else {})))
        (path / "environment.json").write_text(
            json.dumps({"tunesmith": "0.1.0", "python": "3.11.9", "device": "made up"})
        )
        for step, records in (answers or {}).items():
            (path / "answers").mkdir(exist_ok=True)
            (path / "answers" / f"step-{step:08d}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return path

    def finish(self) -> Path:
        """Write plan and progress; returns the study's directory."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "plan.json").write_text(json.dumps(self.plan, indent=1))
        (self.root / "progress.json").write_text(json.dumps(self.progress))
        (self.root / "study.yaml").write_text("name: paper\n")
        return self.root


def learning(steps: int, *, speed: float = 1.0, start: float = 4.0, fall: float = 2.0, turn: float | None = None, gap: float = 0.1,
             noise: float = 0.004, seed: int = 0, first: int = 0, until: int | None = None, memory: float = 8.0,
             seconds: float = 1.0) -> list[dict[str, Any]]:  # fmt: skip
    """metrics.jsonl of a training: an exponential fall; from `turn` (a share of the training) the validation loss rises."""
    rng, lines = random.Random(seed), []
    every = max(1, steps // 20)
    for step in range(first, (until or first + steps) + 1):
        share = (step - first) / steps if first == 0 else step / (first + steps)
        train = start - fall * (1 - math.exp(-5 * speed * share))
        if step > first:
            lines.append({"event": "train", "step": step, "time": 100.0 + step * seconds, "loss": round(train + rng.gauss(0, 0.05), 4),
                          "lr": 1e-4, "grad_norm": 1.0, "tokens": 256 * step, "tokens_per_s": round(256 / seconds, 1),
                          "peak_memory_gb": round(memory * (1 - 0.1 / step), 3)})  # fmt: skip
        if (step - first) % every == 0 and (step > first or first == 0):
            held = train + gap * share + (max(0.0, share - turn) * fall if turn is not None else 0.0)
            lines.append({"event": "eval", "step": step, "time": 0.0, "train_loss": round(train + rng.gauss(0, noise), 4),
                          "validation_loss": round(held + rng.gauss(0, noise), 4), "validation_perplexity": 9.0})  # fmt: skip
    return lines


def scored(
    lines: list[dict[str, Any]], level: Any, *, seed: int, scorer: str = SCORER
) -> tuple[list[Any], dict[int, list[Any]]]:
    """The lines with a reward after every second estimate, and the answers it is the mean of. level: share -> mean reward."""
    rng = random.Random(seed)
    hard = [random.Random(n).gauss(0, 0.6) for n in range(len(PROMPTS))]
    last = lines[-1]["step"]
    out, answers = [], {}
    for number, line in enumerate(lines):
        out.append(line)
        if line["event"] == "eval" and sum(r["event"] == "eval" for r in lines[: number + 1]) % 2 == 1:
            step, share = line["step"], line["step"] / last
            rewards = [round(level(share) + h + rng.gauss(0, 0.08), 4) for h in hard]
            mean = sum(rewards) / len(rewards)
            out.append({"event": "reward", "step": step, "time": line["time"], "mean": round(mean, 4), "low": round(mean - 0.3, 4),
                        "high": round(mean + 0.3, 4), "n": len(rewards), "scorer": scorer, "groups": {}, "length": 30.0,
                        "self_stopped": share})  # fmt: skip
            answers[step] = [
                {"prompt": p, "group": g, "answer": f"{'It is so.' if share else 'the <b>the</b> the'} ({p.split()[0]}, step {step})",
                 "finish_reason": "stop" if share else "length", "tokens": 9, "reward": r}
                for (g, p), r in zip(PROMPTS, rewards, strict=True)
            ]  # fmt: skip
    return out, answers


def preferring(steps: int, *, seed: int) -> list[dict[str, Any]]:
    """metrics.jsonl of a DPO run: from chance to four pairs of five."""
    rng = random.Random(seed)
    lines: list[dict[str, Any]] = [
        {
            "event": "pairs",
            "step": 0,
            "time": 0.0,
            "train_pairs": 900,
            "validation_pairs": HELD_OUT,
            "validation_longer_chosen": 0.44,
        }
    ]
    for step in range(steps + 1):
        grown = 1 - math.exp(-3 * step / steps)
        seen = {"accuracy": round(0.8 * grown + (0.1 if step else 0), 4), "margin": round(grown, 4), "chosen_reward": round(0.2 * grown, 4),
                "rejected_reward": round(-0.8 * grown, 4)}  # fmt: skip
        if step:
            lines.append({"event": "train", "step": step, "time": 100.0 + step, "loss": round(0.6931 - 0.3 * grown + rng.gauss(0, 0.02), 4),
                          **seen, "lr": 1e-6, "grad_norm": 1.0, "tokens": 500 * step, "pairs": 4 * step, "tokens_per_s": 250.0,
                          "peak_memory_gb": 9.5})  # fmt: skip
        if step % (steps // 10) == 0:
            held = {f"validation_{k}": v for k, v in seen.items()}
            lines.append({"event": "eval", "step": step, "time": 0.0, "train_loss": round(0.6931 - 0.3 * grown, 4),
                          "validation_loss": round(0.6931 - 0.25 * grown, 4), **held, "validation_drift_chosen": round(2 * grown, 4),
                          "validation_drift_rejected": round(-8 * grown, 4), "validation_sft_loss": 2.0})  # fmt: skip
    return lines


def memory_of(total: float) -> dict[str, float]:
    return {
        "parameters": 1.42,
        "gradients": 1.42,
        "optimizer_state": round(total - 5.0, 2),
        "activations": 1.7,
        "logits": 0.4,
    }


def write_adapter(path: Path, rank: int) -> None:
    """A checkpoint of an adapter, as far as its header: 1000 numbers a rank."""
    header = json.dumps({"A": {"dtype": "F32", "shape": [rank, 600], "data_offsets": [0, 0]},
                         "B": {"dtype": "F32", "shape": [400, rank], "data_offsets": [0, 0]}}).encode()  # fmt: skip
    folder = path / "checkpoints" / "step-00000040"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def write_study(root: Path, *, seeds: int = 3, steps: int = 40, only: tuple[str, ...] = ()) -> Path:
    """A whole study like `paper`, with one run diverged, one failed and one still to come. only: some of its experiments."""
    w = Writer(root, seeds, steps)
    wanted = lambda key: not only or key in only  # noqa: E731
    for number in range(1, seeds + 1):
        seed = 1000 + number
        if wanted("e1"):
            _e1(w, number, seed)
        if wanted("e1b"):
            for rate in (1e-2, 1e-3):
                lines = learning(
                    steps, speed=-0.25 if rate == 1e-2 else 0.0, seed=seed, until=steps // 2 if rate == 1e-2 else None
                )
                name = f"e1b-{rate:g}-s{number}"
                ended = (
                    {"state": "diverged", "reason": "mean loss of the last 50 steps lies above that of step 0"}
                    if rate == 1e-2
                    else {}
                )
                w.run(name, {"optimizer.lr": rate}, lines, **ended)
                w.show("e1b", "Learning rates", name, f"lr {rate:g}", seed)
        if wanted("e4"):
            for label, (speed, gb) in OPTIMIZERS.items():
                name = f"e4-{label.lower()}-s{number}"
                lines = learning(
                    steps, speed=speed, seed=seed, noise=0.002, memory=gb, seconds=1 + gb / 20 + number / 100
                )
                ended = (
                    {"state": "failed", "reason": "OSError: no space left on device"}
                    if (label, number) == ("SGD-momentum", 2)
                    else {}
                )
                w.run(name, {"optimizer.name": label.lower()}, lines, memory=memory_of(gb), **ended)
                w.show("e4", "Optimizers", name, label, seed)
        if wanted("e5"):
            _e5(w, number, seed)
        if wanted("e6"):
            lines, answers = scored(learning(steps, turn=0.25, seed=seed), lambda x: -1 + x, seed=seed)
            w.run(f"e6-s{number}", {"data.name": "hh-helpful-half"}, lines, answers=answers)
            w.show("e6", "Helpful only", f"e6-s{number}", "helpful only", seed)
        if wanted("e7"):
            for label, drift in (("batch 1", 0.0), ("batch 4", 0.001), ("batch 4 = 4 x 1", 0.001)):
                name = f"e7-{label.replace(' ', '').replace('=', '-')}-s{number}"
                lines = learning(steps, seed=seed, noise=0.001)
                for line in lines:
                    for key in ("loss", "train_loss", "validation_loss"):
                        if key in line:
                            line[key] += drift + (1e-6 if "x" in label else 0)
                w.run(name, {"train.batch_size": 1 if "x" in label or "1" in label else 4}, lines)
                w.show("e7", "Batch size", name, label, seed)
        if wanted("e8"):
            waits = number == 3
            _, answers = scored(learning(steps, seed=seed), lambda x: -0.5 + 1.2 * x, seed=seed)
            w.run(f"e8-s{number}", {"dpo.beta": 0.1}, preferring(steps, seed=seed), command="dpo", needs=(f"e1-s{number}",),
                  memory=memory_of(9.4), answers=answers, state="waiting" if waits else "finished")  # fmt: skip
            w.show("e8", "DPO", f"e8-s{number}", "DPO", seed)
    return w.finish()


def _e1(w: Writer, number: int, seed: int) -> None:
    half = w.steps
    shape: dict[str, Any] = {"speed": 1.5, "turn": 0.75, "noise": 0.002}
    whole = learning(2 * half, seed=seed, **shape)
    first = [line for line in whole if line["step"] <= half]
    second = [line for line in whole if line["step"] > half]
    rise_and_fall = lambda x: -1 + 2.4 * x if x < 0.5 else 0.2 - 0.9 * (x - 0.5)  # noqa: E731
    lines, answers = scored(whole, rise_and_fall, seed=seed)
    first = [line for line in lines if line["step"] <= half]
    second = [line for line in lines if line["step"] > half]
    choice = {
        "best_step": half,
        "by": "reward",
        "not_distinguishable": [half - 8, half + 8],
        "overfitting_since": int(1.5 * half),
    }
    w.run(
        f"e1-s{number}",
        {"optimizer.lr": 1e-4},
        first,
        answers={s: a for s, a in answers.items() if s <= half},
        choice=choice,
    )
    w.run(f"e1-on-s{number}", {"optimizer.lr": 1e-4}, lines, answers=answers, needs=(f"e1-s{number}",), choice=choice)
    assert second
    for label, name in (("first half", f"e1-s{number}"), ("continued", f"e1-on-s{number}")):
        w.show("e1", "Fine-tuning of all weights", name, label, seed)
    w.show("e2", "Reward by checkpoint", f"e1-on-s{number}", "fine-tuning", seed)


def _e5(w: Writer, number: int, seed: int) -> None:
    for rank in (1, 2, 8, 16):
        name = f"e5-r{rank}-s{number}"
        lines = learning(w.steps, fall=1.6 + 0.01 * rank, seed=seed, noise=0.002, memory=8 + rank / 100)
        lines, answers = scored(lines, lambda x: -0.6 + 0.9 * x, seed=seed + rank)
        path = w.run(name, {"lora.rank": rank}, lines, answers=answers, memory=memory_of(8.0))
        write_adapter(path, rank)
        w.show("e5", "LoRA ranks", name, f"rank {rank}", seed)
    lines, answers = scored(learning(w.steps, seed=seed, noise=0.002, memory=11.8), lambda x: -0.6 + 0.3 * x, seed=seed)
    w.run(f"e5-full-s{number}", {}, lines, answers=answers, memory=memory_of(11.7))
    w.show("e5", "LoRA ranks", f"e5-full-s{number}", "full", seed)


if __name__ == "__main__":
    print(write_study(Path(sys.argv[1]), seeds=int(sys.argv[2]) if len(sys.argv) > 2 else 3))
