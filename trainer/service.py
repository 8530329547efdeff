"""Which trained models a run root has, and which one is in service: training.json, promoted.json, evaluation.json.

Light: no torch. A trained model counts only while every file of it is the one that training wrote.
"""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipelines.storage import check_file, json_digest, read_json, write_json
from schemas.errors import InputError, IntegrityError
from schemas.evaluation import Evaluation, Promotions, TrainedModel
from schemas.run import CHECKPOINTS_FOLDER, EVALUATION_NAME, FORMAT_VERSION, PROMOTED_NAME
from schemas.training_result import CURRENT_TRAINING_NAME, TRAINING_RESULT_NAME, TrainingResult

Record = TypeVar("Record", bound=BaseModel)


def find_candidate(run_root: Path) -> TrainedModel:
    """The newest finished training. Raises InputError when there is none."""
    pointer = run_root / CHECKPOINTS_FOLDER / CURRENT_TRAINING_NAME
    if not pointer.is_file():
        raise InputError(f"no training is finished in {run_root}: run `sft-pipeline train` first")
    return _trained_model(run_root, run_root / CHECKPOINTS_FOLDER / pointer.read_text("utf-8").strip())


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
    for entry in _read_training(folder.parent).files:
        check_file(folder.parent, entry)
    return folder


def _trained_model(run_root: Path, training_folder: Path) -> TrainedModel:
    result = _read_training(training_folder)
    return TrainedModel(
        kind=result.output,
        path=(training_folder / result.output).relative_to(run_root).as_posix(),
        digest=json_digest(sorted((entry.path, entry.sha256) for entry in result.files)),
        base_digest=result.inputs["model"],
        training_key=result.key,
    )


# Records on disk --------------------------------------------------------------------------------------------


def read_evaluation(run_root: Path) -> Evaluation:
    """evaluation.json. Raises InputError when it is missing, IntegrityError when it can't be understood."""
    path = run_root / EVALUATION_NAME
    if not path.exists():
        raise InputError(f"{path} is missing: run `sft-pipeline evaluate` first")
    return _read_record(path, Evaluation)


def read_promotions(run_root: Path) -> Promotions | None:
    """promoted.json; None where nothing was promoted yet. Raises IntegrityError."""
    path = run_root / PROMOTED_NAME
    return _read_record(path, Promotions) if path.exists() else None


def write_promotions(run_root: Path, promotions: Promotions) -> None:
    """Durably replace promoted.json: from now on its current model is in service."""
    write_json(run_root / PROMOTED_NAME, promotions.model_dump(mode="json"))


def _read_training(folder: Path) -> TrainingResult:
    return _read_record(folder / TRAINING_RESULT_NAME, TrainingResult)


def _read_record(path: Path, kind: type[Record]) -> Record:
    record = read_json(path)
    found = record.get("format_version") if isinstance(record, dict) else None
    if found != FORMAT_VERSION:
        raise IntegrityError(f"{path} has format_version {found!r}, this version reads {FORMAT_VERSION}")
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        raise IntegrityError(
            f"{path} has {error.error_count()} wrong fields: it is not what we wrote"
        ) from error
