"""Run directories written by hand."""

import json

import yaml

from made_studies import keep_batches
from tunesmith.files.run import Run

LONG = "wordwithoutend" * 5  # the 67 characters of the first page on which this went wrong, and a few more


def write_run(path, *, losses=(4.0, 3.1, 3.3), answers=None, status=None, config=None, batches=True, lines=()):
    """A run directory: an estimate every two steps, answers at the steps given."""
    path.mkdir(parents=True)
    log = list(lines)
    for number, loss in enumerate(losses):
        step = 2 * number
        if step:
            log.append({"event": "train", "step": step, "time": 60.0 * step, "loss": loss, "lr": 1e-4, "grad_norm": 1.0,
                        "tokens": 100 * step, "tokens_per_s": 10.0, "peak_memory_gb": 1.25})  # fmt: skip
        log.append({"event": "eval", "step": step, "time": 0.0, "train_loss": loss, "validation_loss": loss, "validation_perplexity": 9.0})  # fmt: skip  # noqa: E501
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    best = 2 * min(range(len(losses)), key=lambda i: losses[i])
    stored = {"state": "finished", "step": 2 * len(losses) - 2, "reason": "", "best_step": best} | (status or {})
    (path / "status.json").write_text(json.dumps(stored))
    (path / "config.yaml").write_text(yaml.safe_dump({"model": {"name": "sample"}, "data": {"name": "x", "seed": 1}} | (config or {})))  # fmt: skip  # noqa: E501
    (path / "inputs.json").write_text('{"draws": 2}')
    if batches:
        keep_batches(path, {2 * i: loss for i, loss in enumerate(losses)}, seed=sum(map(ord, path.name)))
    for step, texts in (answers or {}).items():
        (path / "answers").mkdir(exist_ok=True)
        rows = [{"prompt": f"Prompt {i} {LONG if i == 1 else ''}", "group": "g", "answer": t, "finish_reason": "stop", "tokens": 3}
                for i, t in enumerate(texts)]  # fmt: skip
        (path / "answers" / f"step-{step:08d}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Run(path)
