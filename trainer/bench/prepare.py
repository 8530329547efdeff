"""`prepare REQUEST.json`: tokenizer, chats, the seven stages over them, the tokens for the peers, and the weights."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGES
from schemas.training_config import ModelConfig
from trainer.bench.chats import draw_lengths, write_dump
from trainer.bench.peers.measuring import end_with_parent
from trainer.bench.shapes import SHAPES, Shape
from trainer.bench.words import write_tokenizer

Request = Mapping[str, Any]


def main(path: Path) -> None:
    """What is there already, and of the same numbers, is taken as it is."""
    request: Request = json.loads(path.read_bytes())
    end_with_parent(request["parent"])
    config = PipelineConfig.model_validate_json(Path(request["config"]).read_bytes())
    shape, model = SHAPES[request["shape"]], config.model
    assert model is not None, "the benchmark's own config names one"
    model_folder = Path(model.path)
    if not (model_folder / "tokenizer.json").is_file():
        write_tokenizer(model_folder, shape.vocabulary_size)
    documents = Path(request["documents"])
    _make(
        documents.with_suffix(".made.json"), _data_facts(request, config), lambda: make_data(request, config)
    )
    if request["weights"]:
        _make(model_folder / "weights.made.json", {"shape": shape.title}, lambda: make_weights(shape, model))
    Path(request["result"]).write_text("{}")


def make_data(request: Request, config: PipelineConfig) -> None:
    # Imported here: a machine that is given the data may lack what the stages need.
    from pipelines.run_lock import hold_run_root
    from pipelines.stage import run_stage
    from trainer.bench.documents import export_documents

    lengths = draw_lengths(**request["chats"])
    shape = SHAPES[request["shape"]]
    write_dump(Path(config.sources[0].path), lengths, vocabulary_size=shape.vocabulary_size)
    with hold_run_root(config.run_root, wait_seconds=config.engine.lock_wait_seconds):
        for stage in STAGES:
            run_stage(stage, config)
    export_documents(config, Path(request["documents"]))


def make_weights(shape: Shape, model: ModelConfig) -> None:
    from trainer.bench.random_model import write_model
    from trainer.model import resolve_device

    write_model(shape, Path(model.path), device=resolve_device(model))


def _data_facts(request: Request, config: PipelineConfig) -> dict[str, Any]:
    """All that shapes the data, and no path: they may be carried to another machine."""
    sections = {name: getattr(config, name).model_dump(mode="json") for name in STAGES}
    steps = {"bins_per_step": config.train.bins_per_step, "max_steps": config.train.max_steps}
    return {"shape": request["shape"], "chats": request["chats"], "sections": sections, "steps": steps}


def _make(note: Path, facts: Mapping[str, Any], make: Callable[[], None]) -> None:
    if note.is_file() and json.loads(note.read_bytes()) == facts:
        return
    make()
    note.write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
