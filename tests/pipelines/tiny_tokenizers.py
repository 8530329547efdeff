"""Tiny tokenizers of the kinds that real models use, trained in this process in a few milliseconds.

One per family of `FAMILIES`; each has every control token that the chat templates of the tests write.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

BOS, EOS, UNK = "<s>", "</s>", "<unk>"

CONTROL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|end_of_turn|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|end_of_text|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "[INST]",
    "[/INST]",
)
"""Special tokens beside BOS, EOS and UNK."""

PLAIN_ADDED_TOKENS = ("<tool_call>", "<think>")
"""Added tokens that are not special, as several models have."""

_CORPUS = (
    "Hello world, how are you today? I am fine, thank you.",
    "The capital of France is Paris. The answer is 42, and the question is not known.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "user assistant system USER: ASSISTANT: ### Instruction: ### Response: Human: Assistant:",
    "Größe, naïve café, élève; 你好，世界。今天天气很好。 こんにちは мир привет",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "0 1 2 3 4 5 6 7 8 9 . , : ; ! ? ( ) [ ] { } < > | / \\ \" ' - _ + = * & % $ # @ ~ ^ `",
)


def _corpus() -> Iterator[str]:
    for _ in range(3):
        yield from _CORPUS


def _add_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_ADDED_TOKENS])
    return tokenizer


def byte_level_bpe() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen: bytes, no unknown token. Its post-processor trims offsets, as GPT-2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[BOS, EOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return _add_tokens(tokenizer)


def metaspace_bpe(prepend_scheme: str = "first") -> Tokenizer:
    """As Mistral and Llama 2: pieces with a mark for spaces, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[UNK, BOS, EOS, *byte_pieces], show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return _add_tokens(_without_added(tokenizer, byte_pieces))


def legacy_metaspace_bpe() -> Tokenizer:
    """As Llama 2 was converted first: a normalizer writes a space before the text after each control token."""
    tokenizer = metaspace_bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    return tokenizer


def unigram() -> Tokenizer:
    """As T5 and many Asian models: NFKC, unigram pieces. `</s>` is a piece that plain text could reach."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=[UNK, BOS, EOS], unk_token=UNK, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return _add_tokens(tokenizer)


def word_piece() -> Tokenizer:
    """As BERT: words in lower case, white space is no part of any token, unknown words are one token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=[UNK, BOS, EOS], show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    return _add_tokens(tokenizer)


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte_level_bpe": byte_level_bpe,
    "metaspace_bpe": metaspace_bpe,
    "legacy_metaspace_bpe": legacy_metaspace_bpe,
    "unigram": unigram,
    "word_piece": word_piece,
}


def _without_added(tokenizer: Tokenizer, pieces: list[str]) -> Tokenizer:
    # The trainer makes special tokens of what it is told to keep; byte pieces are ordinary vocabulary.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in pieces]
    return Tokenizer.from_str(json.dumps(state))


@cache
def _trained(family: str) -> str:
    return FAMILIES[family]().to_str()


def tiny_tokenizer(family: str, chat_template: str | None = None) -> Any:
    """A fresh `PreTrainedTokenizerFast` of one of the families."""
    return wrapped(Tokenizer.from_str(_trained(family)), chat_template)


def wrapped(tokenizer: Tokenizer, chat_template: str | None = None) -> Any:
    """As transformers sees a tokenizer that has BOS, EOS and UNK."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        chat_template=chat_template,
    )


TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama_3": (
        "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    ),
    "vicuna": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ message['content'] + ' ' }}{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
        "{% elif message['content'] %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
        "{% else %}{{ 'ASSISTANT:' }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
        "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}"
        "\n{% elif message['role'] == 'assistant' %}\n{% generation %}{{ '<|assistant|>\n'  + message['content'] + "
        "eos_token }}{% endgeneration %}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
        "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
}
"""Templates in the ways that real ones are written: spaces, trimming, conditions, loops, Jinja blocks on lines."""
