"""The grammar of a run root, and the manifest that every stage folder ends with.

<run root>/
  run.lock                 flock of the one run at a time; never unlinked
  config.json              the resolved config of the newest run
  holdout.parquet          which side each first user turn is on; grows, never changes a side
  01_merged/ ... 05_held_out/   part-*.parquet, dropped-*.parquet, manifest.json, timing.json
  06_shards/               DatasetDict folder, dropped-*.parquet, manifest.json
  07_plan/                 <split>-epoch-<nnnn>.arrow, manifest.json
  checkpoints/<training>/  step-<n>/, latest, metrics.jsonl, adapter/
  evaluation.json, promoted.json
  .tmp-*, .spool/          being written, anywhere below; never read again, removed by the next run
"""

from pydantic import BaseModel, ConfigDict, Field

FORMAT_VERSION = 1

STAGE_FOLDERS = {
    "merge": "01_merged",
    "clean": "02_cleaned",
    "filter": "03_filtered",
    "dedup": "04_deduplicated",
    "holdout": "05_held_out",
    "split": "06_shards",
    "pack": "07_plan",
}
STAGES = tuple(STAGE_FOLDERS)
MANIFEST_NAME = "manifest.json"
TIMING_NAME = "timing.json"
HOLDOUT_LEDGER_NAME = "holdout.parquet"
LOCK_NAME = "run.lock"
RESOLVED_CONFIG_NAME = "config.json"
EVALUATION_NAME = "evaluation.json"
PROMOTED_NAME = "promoted.json"
CHECKPOINTS_FOLDER = "checkpoints"
TEMPORARY_PREFIX = ".tmp-"
SPOOL_FOLDER = ".spool"
DOWNLOADS_FOLDER = ".downloads"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Record):
    """One file of a folder: enough to know that it is the file we wrote. Path is relative to the folder."""

    path: str
    num_bytes: int
    sha256: str
    num_rows: int = 0


class PartEntry(_Record):
    """One part of a stage: what it was made from, and what came out.

    `key` is the digest of everything that shapes the bytes of `kept` and `dropped`: an equal key is equal work.
    """

    key: str
    label: str = Field(description="source, file and number of the part's first record: chats/a.json:204")
    kept: tuple[FileEntry, ...]
    dropped: FileEntry | None
    num_rows_in: int
    num_rows_out: int
    num_pieces_cut: int = Field(default=0, description="extra rows made by cutting long chats")
    drops: dict[str, int] = Field(description="reason -> rows")
    counts: dict[str, int] = Field(default_factory=dict, description="anything else worth counting, by name")


def first_record(label: str) -> int:
    """How many records of its file lie before a part, by its label: `record` of its rows counts from there."""
    return int(label.rpartition(":")[2])


class Manifest(_Record):
    """Written last. A folder without a valid one does not exist. Byte-equal for equal work."""

    format_version: int = FORMAT_VERSION
    stage: str
    stage_version: int
    key: str = Field(description="digest of inputs, config, versions: equal key, equal folder")
    inputs: dict[str, str] = Field(description="what was read, by name -> digest")
    config: dict[str, object] = Field(description="the config sections that this stage reads")
    versions: dict[str, str] = Field(description="what else shapes the bytes: converter, language model, ...")
    parts: tuple[PartEntry, ...]
    files: tuple[FileEntry, ...] = Field(default=(), description="files beside the parts")
    num_rows_in: int
    num_rows_out: int
    num_pieces_cut: int
    drops: dict[str, int]
    counts: dict[str, int] = Field(default_factory=dict)
