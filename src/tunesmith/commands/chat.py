"""`tunesmith chat MODEL`: a conversation in the terminal, streamed."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tunesmith.data.dialogue import Message
from tunesmith.data.prompts import encode_prompt
from tunesmith.device import keep_freed_memory
from tunesmith.files.names import load
from tunesmith.generation.engine import prepare, stream
from tunesmith.generation.sampling import Sampling
from tunesmith.options.commands import ChatCommand

HELP = """/reset       begin anew
/system TEXT set the scene (and begin anew)
/retry       another answer to the last question
/save FILE   write the conversation as JSON
/quit        leave (or Ctrl-D)"""


def chat(model_name: str, options: ChatCommand) -> None:
    """Read lines from standard input until /quit or the end; a long conversation loses its beginning, and it is said."""
    keep_freed_memory()
    model, tokenizer = load(model_name, device=options.device)
    g = options.generate
    sampling = Sampling(g.temperature, g.top_p, g.top_k, g.seed)
    sampling.check()
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    console.print(
        f"[bold]{escape(model_name)}[/bold], {model.parameter_count():,} parameters. /help lists the commands."
    )
    prepare(model)
    scene = [Message("system", options.system)] if options.system else []
    messages = list(scene)
    draw = 0
    while True:
        try:
            line = console.input("[bold cyan]you[/bold cyan] ").strip() if sys.stdin.isatty() else input().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        command, _, rest = line.partition(" ")
        if not line:
            continue
        if command == "/quit":
            return
        if command == "/reset":
            messages = list(scene)
            console.print("[dim]begun anew[/dim]")
            continue
        if command == "/system":
            scene = [Message("system", rest)] if rest else []
            messages = list(scene)
            console.print("[dim]begun anew[/dim]")
            continue
        if command == "/save":
            _save(messages, rest, console)
            continue
        if command == "/retry":
            if not messages or messages[-1].role != "assistant":
                console.print("[dim]there is no answer to try again[/dim]")
                continue
            messages.pop()
            draw += 1
        elif command.startswith("/"):
            console.print(HELP, markup=False)
            continue
        else:
            messages.append(Message("user", line))
            draw = 0
        if len(encode_prompt(tokenizer, messages)) >= model.config.block_size:
            console.print("[dim]the conversation is longer than the model can read: its beginning is left out[/dim]")
        console.print("[bold green]model[/bold green] ", end="")
        answer = ""
        try:
            for piece in stream(
                model, tokenizer, messages, dataclasses.replace(sampling, sample=draw), g.max_new_tokens, cut_front=True
            ):
                answer += piece
                console.print(piece, end="", markup=False)
        except KeyboardInterrupt:  # stops the answer, not the conversation
            console.print("[dim] (interrupted)[/dim]", end="")
        console.print()
        messages.append(Message("assistant", answer))


def _save(messages: list[Message], name: str, console: Console) -> None:
    path = Path(name or "conversation.json")
    try:
        path.write_text(
            json.dumps(
                {"messages": [{"role": m.role, "content": m.content} for m in messages]}, indent=2, ensure_ascii=False
            )
            + "\n",
            encoding="utf-8",
        )
        console.print(f"[dim]saved to {escape(str(path))}[/dim]")
    except OSError as error:
        console.print(f"[red]not saved: {escape(str(path))}: {error.strerror}[/red]")
