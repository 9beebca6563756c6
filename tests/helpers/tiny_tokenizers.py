"""Small tokenizers, trained on the spot and always the same."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "The film was slow at first, but the ending is wonderful and I loved every minute of it.",
    "A terrible kettle: it leaks, it rattles, and the handle broke in a week. Do not buy it!",
    "###Human: What is the best way to cook rice? ###Assistant: Rinse it, then simmer gently.",
    "You are a helpful assistant. Write a short review of the new camera in two sentences.",
    "It costs 12345 euros, or 3.14 pounds; who knows?\nNot bad at all.\n\nGood value for money.",
)

# The shape of Llama 3's: headers between special tokens, messages stripped, a closing token.
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)
# The shape of Qwen's: no BOS, messages as they are, a line break behind the closing token.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
# The shape of Gemma's: no system message, 'model' for the assistant.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
)
# The shape of Mistral's: the response between a closing bracket and EOS.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHAT_TEMPLATES = {
    "llama3": LLAMA3_TEMPLATE,
    "chatml": CHATML_TEMPLATE,
    "gemma": GEMMA_TEMPLATE,
    "mistral": MISTRAL_TEMPLATE,
}
SPECIAL = (
    "<s>",
    "</s>",
    "<pad>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
)


@cache
def _trained(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    serialized: str = tokenizer.to_str()
    return serialized


def bpe_tokenizer(
    vocab_size: int = 400,
    *,
    chat: str | None = None,
    adds_bos: bool = True,
    pad: str | None = "<pad>",
) -> Any:
    """A byte-level BPE tokenizer with the special tokens of several families.

    Tokenizers of different `vocab_size` cut text differently. `chat` names one of CHAT_TEMPLATES.
    """
    backend = Tokenizer.from_str(_trained(vocab_size))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad,
        chat_template=CHAT_TEMPLATES[chat] if chat else None,
        clean_up_tokenization_spaces=False,
    )


@cache
def _encoder_words(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=["[PAD]", "[CLS]", "[SEP]", "[UNK]"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    serialized: str = tokenizer.to_str()
    return serialized


def encoder_tokenizer(vocab_size: int = 300, model_max_length: int = 128) -> Any:
    """A BERT-like tokenizer: word pieces, [CLS] text [SEP], or [CLS] text [SEP] text [SEP]."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_encoder_words(vocab_size)),
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
