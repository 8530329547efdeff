"""A tokenizer of made words, one token each, so that a chat of any number of tokens can be written."""

from pathlib import Path

import numpy as np

CONSONANTS, VOWELS = "bdfghklmnprstvz", "aeiou"
CONTROL_TOKENS = ("<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOKENS_BESIDE_WORDS = 2
"""Of a turn: who speaks, and its end."""


def made_words(count: int) -> np.ndarray:
    """Different words of three syllables: an array of str [count]."""
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    size = len(syllables)
    assert count <= size**3, f"there are {size**3} words of three syllables"
    return np.array(
        [syllables[n // size**2] + syllables[n // size % size] + syllables[n % size] for n in range(count)]
    )


def words_of(vocabulary_size: int) -> np.ndarray:
    """The words of a vocabulary of that size: all of it but the control tokens."""
    return made_words(vocabulary_size - len(CONTROL_TOKENS))


def write_tokenizer(folder: Path, vocabulary_size: int) -> None:
    """tokenizer.json with a chat template whose answers end in a trained token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = [*CONTROL_TOKENS, *words_of(vocabulary_size).tolist()]
    vocabulary = {word: number for number, word in enumerate(entries)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(folder)
