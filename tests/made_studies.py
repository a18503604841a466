"""Studies of one's own, written by hand, for the tests of what is said of them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from frozen_study import Writer, learning, preferring

OFFSETS = (0.4, -0.4, 0.1, -0.1, 0.0, 0.2, -0.2, 0.3, -0.3)  # of the batches of an estimate from their mean


def keep_batches(run: Path, losses: Mapping[int, float], seed: int = 0, spread: float = 0.01) -> None:
    """losses/ of a run: its validation losses as means over batches of 100 tokens that are hard and easy, with some noise."""
    (run / "losses").mkdir()
    for step, loss in losses.items():
        rng = random.Random(f"{seed} {step}")
        noise = [rng.gauss(0, spread) for _ in OFFSETS]
        batches = [[100 * (loss + offset + x - fmean(noise)), 100] for offset, x in zip(OFFSETS, noise, strict=True)]
        (run / "losses" / f"step-{step:08d}.json").write_text(json.dumps(batches))


def own_study(root: Path, last: Mapping[str, Sequence[float]], *, batches: bool = True, **settings: Any) -> Path:
    """One experiment, `trial`: label -> the last validation loss of each seed. Every run falls from 4 in ten steps."""
    w = Writer(root, seeds=max(map(len, last.values())), steps=10)
    for label, losses in last.items():
        for seed, loss in enumerate(losses, 1):
            lines = learning(10, seed=seed, noise=0.0)
            for line in lines:
                if line["event"] == "eval":
                    line["validation_loss"] = round(4 + (loss - 4) * line["step"] / 10, 4)
            name = f"{label.replace(' ', '-')}-s{seed}"
            path = w.run(name, {"data.seed": seed, "data.split_seed": 1, **settings.get(label, {})}, lines)
            if batches:
                held = {line["step"]: line["validation_loss"] for line in lines if line["event"] == "eval"}
                keep_batches(path, held, seed=sum(map(ord, name)))
            w.show("trial", "A trial", name, label, seed)
    return w.finish()


def preference_study(
    root: Path, command: str = "dpo", *, seeds: int = 2, settings: Mapping[str, Mapping[str, Any]] | None = None
) -> Path:
    """One experiment of preference runs with the labels `weak` and `strong`; settings: those of a label."""
    w = Writer(root, seeds=seeds, steps=10)
    for label in ("weak", "strong"):
        for seed in range(1, seeds + 1):
            own = {"dpo.beta": 0.1} if command == "dpo" else {}
            w.run(
                f"{label}-s{seed}",
                own | dict((settings or {}).get(label, {})),
                preferring(10, seed=seed),
                command=command,
            )
            w.show("trial", "A trial", f"{label}-s{seed}", label, seed)
    return w.finish()
