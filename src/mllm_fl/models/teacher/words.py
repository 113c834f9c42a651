"""The word-level tokenizer that mini-CLIP and mini-LLaVA share, made from the vocabulary of their templates."""

from __future__ import annotations

from typing import Any

from mllm_fl.models.teacher.questions import vocabulary

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<image>")
"""In this order: the end token is 3, because CLIP's text model reads an end token of 2 as a sign of OpenAI's first files."""


def make_tokenizer(append: bool) -> Any:
    """A fast tokenizer, lower case, words and punctuation; ``append`` puts <bos> and <eos> around a text (CLIP)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate([*SPECIAL, *vocabulary()])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if append:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", words["<bos>"]), ("<eos>", words["<eos>"])]
        )
    else:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        additional_special_tokens=["<image>"], model_max_length=128, padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
