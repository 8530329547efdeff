"""Which trained models a run root has, and which one is in service: training.json, promoted.json, evaluation.json.

Light: no torch. A trained model counts only while every file of it is the one that training wrote.
"""

import re
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipelines.storage import check_file, json_digest, read_record, write_record
from schemas.errors import InputError, IntegrityError
from schemas.evaluation import Evaluation, Promotions, TrainedModel
from schemas.run import CHECKPOINTS_FOLDER, EVALUATION_NAME, FORMAT_VERSION, PROMOTED_NAME
from schemas.training_result import CURRENT_TRAINING_NAME, TRAINING_RESULT_NAME, TrainingResult

Record = TypeVar("Record", bound=BaseModel)


def find_candidate(run_root: Path) -> TrainedModel:
    """The newest finished training. Raises InputError when there is none."""
    key = current_training(run_root)
    if key is None:
        raise InputError(f"no training is finished in {run_root}: run `sft-pipeline train` first")
    return _trained_model(run_root, run_root / CHECKPOINTS_FOLDER / key)


def find_promoted(run_root: Path) -> TrainedModel | None:
    """The model in service; None while the base model is."""
    promotions = read_promotions(run_root)
    return promotions.current.model if promotions is not None else None


def find_incumbent(run_root: Path, candidate: TrainedModel) -> TrainedModel | None:
    """What the candidate has to beat; None: the base model.

    Once the candidate itself is in service this is still what it took over from, so that its evaluation stays
    what it was; the base, should those files be gone.
    """
    promotions = read_promotions(run_root)
    if promotions is None or promotions.current.model.digest != candidate.digest:
        return promotions.current.model if promotions is not None else None
    before = promotions.current.incumbent
    return before if before is not None and (run_root / before.path).is_dir() else None


def check_trained_model(run_root: Path, trained: TrainedModel) -> Path:
    """The folder of a trained model, once every file in it is the one that training wrote.

    Raises InputError when it is gone, IntegrityError when it was changed.
    """
    folder = run_root / trained.path
    if not (folder.parent / TRAINING_RESULT_NAME).is_file():
        raise InputError(f"{folder} is gone: the training {trained.training_key} was removed")
    found = _trained_model(run_root, folder.parent)
    if found.digest != trained.digest:
        raise IntegrityError(
            f"{folder} is not the model that was promoted (digest {found.digest[:12]}, expected "
            f"{trained.digest[:12]}): restore it, or roll back"
        )
    for entry in read_training(folder.parent).files:
        check_file(folder.parent, entry)
    return folder


def _trained_model(run_root: Path, training_folder: Path) -> TrainedModel:
    result = read_training(training_folder)
    return TrainedModel(
        kind=result.output,
        path=(training_folder / result.output).relative_to(run_root).as_posix(),
        digest=json_digest(sorted((entry.path, entry.sha256) for entry in result.files)),
        base_digest=result.inputs["model"],
        training_key=result.key,
    )


def current_training(run_root: Path) -> str | None:
    """Key of the newest finished training. Raises IntegrityError when the pointer is not as it was written."""
    pointer = run_root / CHECKPOINTS_FOLDER / CURRENT_TRAINING_NAME
    if not pointer.is_file():
        return None
    data = pointer.read_bytes()
    key = data[:-1].decode(errors="replace")
    if not re.fullmatch(rb"[\w-]+\n", data) or not (pointer.parent / key).is_dir():
        raise IntegrityError(
            f"{pointer} holds {data[:32]!r}, expected the name of a folder beside it: run `sft-pipeline train`, "
            "which writes it anew"
        )
    return key


# Records on disk --------------------------------------------------------------------------------------------


def read_evaluation(run_root: Path) -> Evaluation:
    """evaluation.json. Raises InputError when it is missing, IntegrityError when it can't be understood."""
    path = run_root / EVALUATION_NAME
    if not path.exists():
        raise InputError(f"{path} is missing: run `sft-pipeline evaluate` first")
    return _read_record(path, Evaluation, cure="run `sft-pipeline evaluate`, which writes it anew")


def read_promotions(run_root: Path) -> Promotions | None:
    """promoted.json; None where nothing was promoted yet. Raises IntegrityError."""
    path = run_root / PROMOTED_NAME
    return _read_record(path, Promotions, cure=_PROMOTED_CURE) if path.exists() else None


def write_promotions(run_root: Path, promotions: Promotions) -> None:
    """Durably replace promoted.json: from now on its current model is in service."""
    write_record(run_root / PROMOTED_NAME, promotions.model_dump(mode="json"))


def read_training(folder: Path) -> TrainingResult:
    """training.json. Raises InputError when it is missing, IntegrityError when it is not as it was written."""
    return _read_record(folder / TRAINING_RESULT_NAME, TrainingResult, cure=TRAINING_CURE)


TRAINING_CURE = "delete it and run `sft-pipeline train`: what its last checkpoint holds is not done again"
_PROMOTED_CURE = "bring a copy back, or delete it: then the base model is in service until the next promotion"


def _read_record(path: Path, kind: type[Record], *, cure: str) -> Record:
    record = read_record(path, cure=cure)
    found = record.get("format_version")
    if found != FORMAT_VERSION:
        raise IntegrityError(f"{path} has format_version {found!r}, this version reads {FORMAT_VERSION}")
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        raise IntegrityError(f"{path} has {error.error_count()} wrong fields; {cure}") from error
