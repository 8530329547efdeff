"""datatrove on JSONL with `text` and `id`: languages, repetition, exact duplicates; run by peers.py with its own Python.

    python benchmarks/peer_datatrove.py INPUT_FOLDER NEW_FOLDER LANGUAGE_MODEL NUM_WORKERS

Its fastest settings: one label asked of fastText, words parted at blanks in place of a tokenizer's, one task a file.
The language model is given as a path; datatrove would download lid.176.bin.
"""

import sys
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import exact_dedup
from datatrove.pipeline.filters import GopherRepetitionFilter, LanguageFilter, gopher_repetition_filter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


def main() -> None:
    source, target, model, num_workers = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    config = exact_dedup.ExactDedupConfig(content_getter=text_of)
    filtered, signatures, duplicates, kept = (str(target / name) for name in ("1", "2", "3", "4"))
    first = [
        JsonlReader(source),
        languages(model),
        Repetition(),
        JsonlWriter(filtered, compression=None),
        exact_dedup.ExactDedupSignature(signatures, config),
    ]
    find = [exact_dedup.ExactFindDedups(signatures, duplicates, config)]
    last = [
        JsonlReader(filtered),
        exact_dedup.ExactDedupFilter(duplicates, config),
        JsonlWriter(kept, compression=None),
    ]
    num_files = len(list(Path(source).iterdir()))
    for number, (steps, tasks) in enumerate([(first, num_files), (find, 1), (last, num_files)]):
        logs = str(target / f"logs-{number}")
        LocalPipelineExecutor(steps, tasks=tasks, workers=num_workers, logging_dir=logs).run()


def text_of(document: Any) -> str:
    text: str = document.text
    return text


class Repetition(GopherRepetitionFilter):
    def filter(self, doc: Any) -> Any:
        gopher_repetition_filter.split_into_words = lambda text, language: text.split()
        return super().filter(doc)


def languages(model: str) -> LanguageFilter:
    step = LanguageFilter(label_only=True)
    step.model.k = 1
    step.model.MODEL_URL = model
    return step


if __name__ == "__main__":
    main()
