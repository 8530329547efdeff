"""What a training was made from, source by source, out of the manifests of its run root."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipelines.downloads import is_url
from pipelines.storage import file_sha256, read_manifest
from schemas.pipeline_config import PipelineConfig, SourceConfig
from schemas.run import MANIFEST_NAME, STAGE_FOLDERS
from schemas.training_result import TrainingResult
from trainer.shard_reader import ShardReader

CARD_NAME = "README.md"
MIN_LANGUAGE_SHARE = 0.01
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """One source, from its records to what was trained of them."""

    name: str
    num_read: int
    num_kept: int
    num_examples: int
    num_trained_tokens: int
    license: str | None


@dataclass(frozen=True, slots=True)
class DataSummary:
    """`languages` are those of the training examples, the most frequent first."""

    sources: tuple[SourceSummary, ...]
    languages: tuple[str, ...]


def summarise(config: PipelineConfig, training: TrainingResult) -> DataSummary | None:
    """None where the run root's data is not, or no longer, what this training read."""
    folder = config.run_root / STAGE_FOLDERS["split"]
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file() or file_sha256(manifest) != training.inputs.get(folder.name):
        return None
    reader = ShardReader(folder, "train")
    read, kept = (_rows_by_source(config, stage) for stage in ("merge", "holdout"))
    examples = Counter(reader.sources.tolist())
    sources = []
    for source in config.sources:
        mine = reader.sources == source.name
        sources.append(
            SourceSummary(
                name=source.name,
                num_read=read[source.name][0],
                num_kept=kept[source.name][1],
                num_examples=examples[source.name],
                num_trained_tokens=int(np.asarray(reader.num_trained_tokens)[mine].sum()),
                license=source_license(source),
            )
        )
    return DataSummary(tuple(sources), _languages(reader))


def _rows_by_source(config: PipelineConfig, stage: str) -> dict[str, Any]:
    """Rows in and rows out of a stage."""
    found = {source.name: (0, 0) for source in config.sources}
    manifest = read_manifest(config.run_root / STAGE_FOLDERS[stage])
    for part in manifest.parts if manifest is not None else ():
        name = part.label.partition("/")[0]
        before = found.get(name, (0, 0))
        found[name] = (before[0] + part.num_rows_in, before[1] + part.num_rows_out)
    return found


def _languages(reader: ShardReader) -> tuple[str, ...]:
    counted = Counter(reader.languages.tolist())
    return tuple(
        name
        for name, count in counted.most_common()
        if name not in ("", "und") and count >= MIN_LANGUAGE_SHARE * reader.num_rows
    )


def source_license(source: SourceConfig) -> str | None:
    """What a card beside the source's files says; of a URL nothing is known here."""
    if not source.path or is_url(source.path):
        return None
    path = Path(source.path)
    folder = path if path.is_dir() else path.parent
    found = card_front_matter(folder).get("license")
    return found if isinstance(found, str) else None


def card_front_matter(folder: Path) -> dict[str, Any]:
    """The YAML at the head of a folder's README.md; {} where there is none that can be read."""
    try:
        match = _FRONT_MATTER.match((folder / CARD_NAME).read_text(encoding="utf-8"))
        found = YAML(typ="safe", pure=True).load(match[1]) if match else None
    except (OSError, ValueError, YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
