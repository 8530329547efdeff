"""The report on the newest training: held-out loss against the base and the model in service, and answers to read.

    evaluate(config) -> Evaluation    writes evaluation.json and evaluation_examples.arrow in the run root

The loss of each example is kept: the gate resamples them. What the numbers mean stands at the head of
schemas/evaluation.py. Equal work is not done again, and gives equal bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipelines.storage import (
    check_file,
    check_manifest,
    file_entry,
    file_sha256,
    json_bytes,
    json_digest,
    sync_folder,
    write_arrow,
    write_bytes,
    write_record,
)
from schemas.errors import IntegrityError
from schemas.evaluation import (
    EVALUATION_EXAMPLES,
    EVALUATION_EXAMPLES_NAME,
    Answers,
    Evaluation,
    HeldOutLoss,
    Label,
    ModelReport,
    TrainedModel,
)
from schemas.pipeline_config import PipelineConfig
from schemas.run import CHECKPOINTS_FOLDER, EVALUATION_NAME, MANIFEST_NAME, STAGE_FOLDERS
from trainer.answer import Sampling, answer
from trainer.attention import unwrapped, use_plain_attention
from trainer.held_out import (
    HeldOut,
    count_trained_tokens,
    held_out_loss,
    held_out_nats,
    progress,
    read_held_out,
)
from trainer.load_trained import check_base, load_with_adapter
from trainer.metrics import report
from trainer.model import load_adapter, load_tokenizer, needed_model
from trainer.prompts import printable
from trainer.service import check_trained_model, find_candidate, find_incumbent, read_evaluation
from trainer.start_adapter import take_off_adapter

ANSWERS_NAME = "answers.json"
"""In the folder of a training: evaluate.questions as the base answers them, and as the trained model does."""
EVALUATION_VERSION = 1
"""Raise it when the same models and examples would give other numbers."""


def evaluate(config: PipelineConfig) -> Evaluation:
    """Compare the newest training with the base model and the model in service, or find it done.

    The caller holds the run root. Raises InputError when no training is finished or it belongs to another base
    model, IntegrityError when files were changed, LimitError when nothing is held out, TrainingError when a
    model's loss is not finite.
    """
    work = plan_evaluation(config)
    found = _finished(config.run_root, work.key)
    if found is not None:
        report(f"evaluation {work.key[:12]} is there: nothing to do")
    else:
        held_out = read_held_out(config)
        found = _write(config, work, held_out, measure(config, work, held_out))
    _keep_answers(config.run_root, found)
    return found


@dataclass(frozen=True, slots=True)
class Work:
    """Which models are compared on what. An equal key is equal work."""

    candidate: TrainedModel
    incumbent: TrainedModel | None
    shards_digest: str
    plan_digest: str
    settings: dict[str, object]
    key: str


def plan_evaluation(config: PipelineConfig) -> Work:
    """What there is to do, with every file of the models checked. Loads nothing."""
    candidate = find_candidate(config.run_root)
    incumbent = find_incumbent(config.run_root, candidate)
    for trained in (candidate, incumbent):
        if trained is not None:
            check_trained_model(config.run_root, trained)
            check_base(config, trained)
    shards, plan = (_manifest_digest(config, stage) for stage in ("split", "pack"))
    settings = config.evaluate.model_dump(mode="json")
    compared = [model.model_dump(mode="json") if model else None for model in (candidate, incumbent)]
    model = needed_model(config)
    changed = model.model_dump(
        mode="json", include={"init", "rope_scaling", "new_tokens"}, exclude_defaults=True
    )
    form = [model.dtype, config.train.base, *([changed] if changed else [])]
    key = json_digest([EVALUATION_VERSION, compared, shards, plan, settings, *form])
    return Work(candidate, incumbent, shards, plan, settings, key)


def _manifest_digest(config: PipelineConfig, stage: str) -> str:
    folder = config.run_root / STAGE_FOLDERS[stage]
    check_manifest(folder, stage=stage)
    return file_sha256(folder / MANIFEST_NAME)


def _finished(run_root: Path, key: str) -> Evaluation | None:
    """The evaluation of that key; None as well when its files are not whole: then it is made again."""
    if not (run_root / EVALUATION_NAME).exists():
        return None
    try:
        found = read_evaluation(run_root)
        check_file(run_root, found.examples)
    except IntegrityError as error:
        report(f"evaluating again: {error}")
        return None
    return found if found.key == key else None


# Measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Sums of nats [examples] by model, trained tokens [examples], and the answers to the questions by model."""

    nats: Mapping[Label, NDArray[np.float64]]
    num_trained_tokens: NDArray[np.int64]
    answers: Mapping[Label, list[str]]


def measure(config: PipelineConfig, work: Work, held_out: HeldOut) -> Measured:
    """All models, one after the other; the base's weights are loaded once for itself and all adapters."""
    nats: dict[Label, NDArray[np.float64]] = {}
    answers: dict[Label, list[str]] = {}
    trained: dict[Label, TrainedModel | None] = {"incumbent": work.incumbent, "candidate": work.candidate}
    for label, model in chain(_base_and_adapters(config, trained), _whole_models(config, trained)):
        nats[label] = held_out_nats(model, held_out, label=label)
        if label != "incumbent":
            answers[label] = _answers(config, model, label=label)
        del model  # else the base would stay in memory while a whole model is loaded
    return Measured(nats, count_trained_tokens(held_out), answers)


def _base_and_adapters(
    config: PipelineConfig, trained: Mapping[Label, TrainedModel | None]
) -> Iterator[tuple[Label, torch.nn.Module]]:
    base = unwrapped(load_with_adapter(config, None)).eval()
    yield "base", base
    for label, model in trained.items():
        if model is not None and model.kind == "adapter":
            adapted = load_adapter(base, config.run_root / model.path)
            yield label, adapted.eval()
            take_off_adapter(adapted)


def _whole_models(
    config: PipelineConfig, trained: Mapping[Label, TrainedModel | None]
) -> Iterator[tuple[Label, torch.nn.Module]]:
    for label, model in trained.items():
        if model is not None and model.kind == "model":
            yield label, load_with_adapter(config, config.run_root / model.path).eval()


def _answers(config: PipelineConfig, model: torch.nn.Module, *, label: str) -> list[str]:
    if not config.evaluate.questions:
        return []
    use_plain_attention(model)
    tokenizer = load_tokenizer(config)
    sampling = Sampling(config.evaluate.max_new_tokens)
    show = progress(f"{label}: answers", len(config.evaluate.questions))
    texts = []
    for question in config.evaluate.questions:
        messages = [{"role": "user", "content": question}]
        texts.append(answer(model, tokenizer, messages, sampling))
        show(1)
    return texts


# The report -------------------------------------------------------------------------------------------------


def _write(config: PipelineConfig, work: Work, held_out: HeldOut, measured: Measured) -> Evaluation:
    examples = config.run_root / EVALUATION_EXAMPLES_NAME
    # The report before names the examples before: it goes first, then it never names others.
    (config.run_root / EVALUATION_NAME).unlink(missing_ok=True)
    sync_folder(config.run_root)
    num_rows = write_arrow(examples, _examples_table(held_out, measured), is_part=False)
    questions = config.evaluate.questions
    answers = [measured.answers.get(label, []) for label in ("base", "candidate")]
    evaluation = Evaluation(
        key=work.key,
        split=config.evaluate.split,
        shards_digest=work.shards_digest,
        plan_digest=work.plan_digest,
        candidate=work.candidate,
        incumbent=work.incumbent,
        settings=work.settings,
        base_form=config.train.base,
        models=tuple(_modelreport(label, held_out, measured) for label in _labels(measured)),
        answers=tuple(
            Answers(question=question, base=base, candidate=candidate)
            for question, base, candidate in zip(questions, *answers, strict=True)
        ),
        examples=file_entry(examples, folder=config.run_root, num_rows=num_rows),
    )
    write_record(config.run_root / EVALUATION_NAME, evaluation.model_dump(mode="json"))
    return evaluation


def _keep_answers(run_root: Path, evaluation: Evaluation) -> None:
    """The answers before and after, beside the training too: the report in the run root is the newest one's alone."""
    path = run_root / CHECKPOINTS_FOLDER / evaluation.candidate.training_key / ANSWERS_NAME
    answers = json_bytes([answer.model_dump(mode="json") for answer in evaluation.answers])
    if evaluation.answers and (not path.exists() or path.read_bytes() != answers):
        write_bytes(path, answers)


def _labels(measured: Measured) -> list[Label]:
    order: tuple[Label, ...] = ("base", "incumbent", "candidate")
    return [label for label in order if label in measured.nats]


def _examples_table(held_out: HeldOut, measured: Measured) -> pa.Table:
    num_rows = held_out.reader.num_rows
    columns = {
        "example": np.arange(num_rows),
        "row_id": held_out.row_ids,
        "piece": held_out.pieces,
        "source": held_out.sources.tolist(),
        "language": held_out.languages.tolist(),
        "num_trained_tokens": measured.num_trained_tokens,
        "num_trained_bytes": held_out.num_trained_bytes,
        "nats_base": measured.nats["base"],
        "nats_incumbent": measured.nats.get("incumbent", [None] * num_rows),
        "nats_candidate": measured.nats["candidate"],
    }
    arrays = [pa.array(columns[field.name], field.type) for field in EVALUATION_EXAMPLES]
    return pa.Table.from_arrays(arrays, schema=EVALUATION_EXAMPLES)


def _modelreport(label: Label, held_out: HeldOut, measured: Measured) -> ModelReport:
    def loss_of(chosen: NDArray[np.bool_]) -> HeldOutLoss:
        return held_out_loss(
            measured.nats[label][chosen],
            measured.num_trained_tokens[chosen],
            held_out.num_trained_bytes[chosen],
        )

    return ModelReport(
        label=label,
        total=loss_of(np.ones(held_out.reader.num_rows, np.bool_)),
        by_source={str(name): loss_of(held_out.sources == name) for name in np.unique(held_out.sources)},
        by_language={
            str(name): loss_of(held_out.languages == name) for name in np.unique(held_out.languages)
        },
    )


# The command ------------------------------------------------------------------------------------------------


def run_evaluate(config: PipelineConfig, *, show_answers: bool = True) -> None:
    """`sft-pipeline evaluate`: evaluates and prints the report for people; answers stay out of a flow's log."""
    evaluation = evaluate(config)
    for model in evaluation.models:
        total = model.total
        print(
            f"{model.label:9}  {_number(total.bits_per_byte)} bits per byte  {_number(total.loss)} nats per token  "
            f"({total.num_examples} examples, {total.num_trained_tokens:,} tokens of {evaluation.split})"
        )
    for line in (*_group_lines(evaluation, "source"), *_group_lines(evaluation, "language")):
        print(line)
    for answers in evaluation.answers if show_answers else ():
        print(f"\n{printable(answers.question)}")
        print(f"  base:      {printable(answers.base)}\n  candidate: {printable(answers.candidate)}")
    print(f"\n{config.run_root / EVALUATION_NAME}")


def _group_lines(evaluation: Evaluation, kind: Literal["source", "language"]) -> Iterator[str]:
    """Bits per byte of each source or language under all models; nothing where there is but one."""
    tables = {
        model.label: model.by_source if kind == "source" else model.by_language for model in evaluation.models
    }
    names = list(next(iter(tables.values())))
    for name in names if len(names) > 1 else ():
        parts = (f"{label} {_number(table[name].bits_per_byte)}" for label, table in tables.items())
        yield f"{kind} {printable(name)}: {', '.join(parts)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
