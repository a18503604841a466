"""A reward model of transformers with random weights, and what it is asked to score."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

PROMPTS = ["What is love?", "Hi", "Why is the sky blue, and what would it take to make it green?", "Hi", "Tell me more"]
ANSWERS = ["Baby, don't hurt me.", "Hello! " * 30, "", "Hello", "The sky. " * 3]


def save_deberta(path: Path) -> None:
    """A DeBERTa v2 with random weights and a tokenizer of words, saved by transformers."""
    cut = pre_tokenizers.Whitespace().pre_tokenize_str
    words = sorted({word for text in [*PROMPTS, *ANSWERS] for word, _ in cut(text)})
    vocab = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words])}
    backend = Backend(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=64,
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=1,
        max_position_embeddings=64, relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False,
        initializer_range=0.5,
    )  # fmt: skip
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(path)
