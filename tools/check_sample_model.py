"""Does the embedded model, fine-tuned as in the demo, pass its bar? Prints three shares and exits with 1 if it does not.

    python tools/check_sample_model.py [--run DIR] [--model MODEL]

Of the answers to the embedded prompts (temperature 0.7, top-p 0.9, three seeds): how many end by themselves, by the
end-of-text token; how many hold a role's marker or run into one; how many repeat no run of four words three times.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections import Counter
from pathlib import Path

from tunesmith.commands.demo_recipes import EMBEDDED
from tunesmith.commands.training import sft
from tunesmith.data.prompts import encode_prompt, load_prompts
from tunesmith.files.names import load
from tunesmith.generation.engine import decode
from tunesmith.generation.sampling import Sampling
from tunesmith.judge.measures import words

SEEDS = (1, 2, 3)
MAX_NEW_TOKENS = 128
ROLE = re.compile(r"\b(Human|Assistant|System):")


@dataclasses.dataclass(frozen=True)
class Ended:
    """An answer as it came: its text with what followed it up to the stop, and whether the end-of-text token stopped it."""

    text: str
    by_itself: bool


def answers(model_name: str, seed: int) -> list[Ended]:
    """One answer to each of the embedded prompts, a role's marker that stopped it not cut off."""
    model, tokenizer = load(model_name, device="cpu")
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": p.text}]) for p in load_prompts()]
    tokens: list[list[int]] = [[] for _ in prompts]
    for row, token, _ in decode(model, tokenizer, prompts, Sampling(0.7, 0.9, 0, seed), MAX_NEW_TOKENS):
        tokens[row].append(token)
    return [Ended(tokenizer.decode(t), t[-1] == tokenizer.end_of_text) for t in tokens]


def repeats(text: str, n: int = 4, times: int = 3) -> bool:
    """Whether some run of `n` words (a punctuation mark is one), in whatever case, comes `times` times."""
    found = words(text)
    return max(Counter(zip(*(found[i:] for i in range(n)), strict=False)).values(), default=0) >= times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("build/sample/sft"), help="where to fine-tune, or what was")
    parser.add_argument("--model", default="sample", help="what to fine-tune")
    args = parser.parse_args()
    if not (args.run / "status.json").exists():
        sft(dataclasses.replace(EMBEDDED, base=args.model).sft(args.run))
    found = [answer for seed in SEEDS for answer in answers(str(args.run), seed)]
    bars = (
        ("end by themselves", sum(a.by_itself for a in found), 0.9),
        ("hold no role's marker", sum(not ROLE.search(a.text) for a in found), 1.0),
        ("repeat no four words three times", sum(not repeats(a.text) for a in found), 0.8),
    )
    for what, count, bar in bars:
        verdict = "passes" if count >= bar * len(found) else "FAILS"
        print(f"{count:3} of {len(found)} ({count / len(found):.1%}) {what}; the bar is {bar:.0%}: {verdict}")
    sys.exit(any(count < bar * len(found) for _, count, bar in bars))


if __name__ == "__main__":
    main()
