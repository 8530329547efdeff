"""A toy run: some 200 chats of several shapes, a tiny model with a real tokenizer, a config. Seconds to run."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NOUNS = "river bridge garden window candle market forest silver engine letter harbour mountain".split()
VERBS = "paints repairs carries follows measures forgets answers colours sharpens borrows".split()


def sentence(draw: random.Random) -> str:
    words = [
        draw.choice(NOUNS),
        draw.choice(VERBS),
        "the",
        draw.choice(NOUNS),
        "near the",
        draw.choice(NOUNS),
    ]
    return "The " + " ".join(words) + "."


def answer_html(draw: random.Random) -> str:
    code = f"x = {draw.randint(0, 999)}\nprint(x < 7)\n"
    shown = code.replace("<", "&lt;")
    return (
        f'<div class="markdown prose w-full"><p>{sentence(draw)} <strong>{draw.choice(NOUNS)}</strong></p>'
        '<pre><div class="bg-black"><div class="flex"><span>python</span><button>Copy code</button></div>'
        f'<div class="p-4"><code class="hljs language-python">{shown}</code></div></div></pre></div>'
    )


def sharegpt_chats(number: int, *, seed: int = 0, most_rounds: int = 4) -> list[dict[str, Any]]:
    """ShareGPT records, answers as page HTML; some repeated, some extended, some broken."""
    draw = random.Random(seed)
    chats: list[dict[str, Any]] = []
    for index in range(number):
        turns = []
        for _ in range(draw.randint(1, most_rounds)):
            turns.append({"from": "human", "value": f"{sentence(draw)} Is List<String> right?"})
            turns.append({"from": "gpt", "value": answer_html(draw)})
        chats.append({"id": f"chat-{index}", "conversations": turns})
        if index % 9 == 5:
            chats.append({"id": f"copy-{index}", "conversations": turns})
        if index % 11 == 3 and len(turns) > 2:
            chats.append({"id": f"branch-{index}", "conversations": turns[:2]})
        if index % 17 == 4:
            chats.append({"id": f"empty-{index}", "conversations": [{"from": "human", "value": "hello?"}]})
    return chats


def alpaca_records(number: int, *, seed: int = 1) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [
        {"instruction": f"Repeat word {i}: {sentence(draw)}", "input": "", "output": sentence(draw)}
        for i in range(number)
    ]


def write_dumps(folder: Path, *, num_chats: int = 120, num_records: int = 80) -> None:
    """sharegpt.json (with one broken record) and alpaca.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    chats = [json.dumps(chat) for chat in sharegpt_chats(num_chats)]
    chats.insert(3, '{"id": "broken", "conversations": 7}')
    (folder / "sharegpt.json").write_text("[" + ",\n".join(chats) + "]")
    records = [json.dumps(record) for record in alpaca_records(num_records)]
    records.insert(5, "{not json")
    (folder / "alpaca.jsonl").write_text("\n".join(records) + "\n")


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, texts: Iterable[str] = ()) -> int:
    """Byte-level BPE with chatml, trained here; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    draw = random.Random(2)
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *(sentence(draw) for _ in range(200))], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(folder)
    return len(fast)


def write_model(folder: Path, texts: Iterable[str] = (), **sizes: int) -> None:
    """A two-layer Llama beside its tokenizer, which knows the words of `texts` too."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab_size = write_tokenizer(folder, texts)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    config = LlamaConfig(vocab_size=vocab_size, eos_token_id=1, pad_token_id=2, **shape | sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


CONFIG = """
run_root: {run_root}
sources:
  - {{name: chats, path: dumps/sharegpt.json}}
  - {{name: alpaca, path: dumps/alpaca.jsonl}}
merge: {{part_bytes: 20000}}
holdout: {{validation: 0.08, test: 0.12}}
split: {{max_tokens: 256}}
model: {{path: model, dtype: float32}}
train: {{max_steps: 12, bins_per_step: 4, bins_per_micro_step: 4, learning_rate: 2e-3, checkpoint_every_steps: 4}}
evaluate: {{questions: ["Which word?"], max_new_tokens: 8}}
promote: {{bootstrap_samples: 200}}
engine: {{workers: 1, min_free_gib: 0.1}}
"""


def write_config(folder: Path, *, run_root: str = "run") -> Path:
    path = folder / f"{run_root}.yaml"
    path.write_text(CONFIG.format(run_root=run_root))
    return path


def folder_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file, times left out."""
    import hashlib

    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("timing.json", "run.lock")
    }
