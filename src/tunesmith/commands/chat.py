"""`tunesmith chat MODEL`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

from tunesmith.commands.chat_terminal import converse
from tunesmith.data.chosen_template import chat_template
from tunesmith.device import keep_freed_memory
from tunesmith.files.bases import base_at
from tunesmith.files.names import load
from tunesmith.generation.chat import ChatSession
from tunesmith.generation.engine import prepare
from tunesmith.generation.replies import model_source
from tunesmith.generation.sampling import Sampling
from tunesmith.options.commands import ChatCommand
from tunesmith.terminal import latin1_where_undecodable


def chat(model_name: str, options: ChatCommand) -> None:
    """Answer messages until /quit or the end of the input. A long conversation loses its beginning, with a word about it."""
    keep_freed_memory()
    with base_at(options.model.base), chat_template(options.chat.template):
        model, tokenizer = load(model_name, device=options.device)
    count = model.parameter_count()  # before `prepare`, which frees the plain weights on a CPU
    g = options.generate
    sampling = Sampling(g.temperature, g.top_p, g.top_k, g.seed)
    sampling.check()
    source = model_source(prepare(model), tokenizer, sampling, g.max_new_tokens)
    session = ChatSession(source, latin1_where_undecodable(options.system or ""))
    converse(session, f"{model_name}, {count:,} parameters.")
