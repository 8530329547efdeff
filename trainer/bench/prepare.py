"""`prepare REQUEST.json`: weights, tokenizer, chats, the seven stages over them, and the tokens for the peers.

A process of its own, so that the GPU is free again before the first contestant starts.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pipelines.run_lock import hold_run_root
from pipelines.stage import run_stage
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGES
from trainer.bench.chats import draw_lengths, write_dump
from trainer.bench.documents import export_documents
from trainer.bench.peers.measuring import end_with_parent
from trainer.bench.random_model import write_model
from trainer.bench.shapes import SHAPES
from trainer.bench.words import write_tokenizer
from trainer.model import needed_model, resolve_device


def main(path: Path) -> None:
    """What is there already, and of the same numbers, is taken as it is."""
    end_with_parent()
    request: dict[str, Any] = json.loads(path.read_bytes())
    config = PipelineConfig.model_validate_json(Path(request["config"]).read_bytes())
    model = needed_model(config)
    shape = SHAPES[request["shape"]]
    folder = Path(model.path)
    if not _is_same(folder / "made.json", {"shape": request["shape"]}):
        write_tokenizer(folder, shape.vocabulary_size)
        write_model(shape, folder, device=resolve_device(model))
        _note(folder / "made.json", {"shape": request["shape"]})
    chats = {**request["chats"], "vocabulary_size": shape.vocabulary_size}
    dump = Path(config.sources[0].path)
    if not _is_same(dump.with_suffix(".made.json"), chats):
        write_dump(dump, draw_lengths(**request["chats"]), vocabulary_size=shape.vocabulary_size)
        _note(dump.with_suffix(".made.json"), chats)
    with hold_run_root(config.run_root, wait_seconds=config.engine.lock_wait_seconds):
        for stage in STAGES:
            run_stage(stage, config)
    export_documents(config, Path(request["documents"]))
    _note(Path(request["result"]), {})


def _is_same(path: Path, facts: dict[str, Any]) -> bool:
    return path.is_file() and json.loads(path.read_bytes()) == facts


def _note(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
