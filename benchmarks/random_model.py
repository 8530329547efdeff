"""A model folder with random weights of a known shape: speed and memory can be measured without a download.

    python benchmarks/random_model.py llama-3.1-8b --tokenizer TOKENIZER_FOLDER --out /tmp/llama-3.1-8b

Weights are drawn on the GPU where there is one, in bf16. The tokenizer must not have more ids than the shape.
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # also as a script, the packages of this checkout

import torch

from trainer.bench.random_model import write_model
from trainer.bench.shapes import SHAPES

TOY_WITH_WORDS = {**SHAPES["toy"].settings, "vocab_size": SHAPES["8b"].vocabulary_size}
NAMES = {
    "llama-3.1-8b": SHAPES["8b"],
    "llama-2-7b": SHAPES["7b"],
    "qwen2.5-32b": SHAPES["32b"],
    "tiny": dataclasses.replace(SHAPES["toy"], settings=TOY_WITH_WORDS),
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", choices=sorted(NAMES))
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_model(NAMES[options.shape], options.out, device=device)
    for name in TOKENIZER_FILES:
        if (options.tokenizer / name).is_file():
            shutil.copy(options.tokenizer / name, options.out / name)
    print(options.out)


if __name__ == "__main__":
    main()
