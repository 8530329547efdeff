"""What an evaluation found, what the gate decided, and which model is in service.

    <run root>/evaluation.json            Evaluation: byte-equal for equal work, no times in it
    <run root>/evaluation_examples.arrow  one row an example (EVALUATION_EXAMPLES), named by evaluation.json
    <run root>/promoted.json              Promotions: the model in service and those before it

**Bits per byte** = sum of nats over all trained tokens / ln 2 / UTF-8 bytes of the trained texts. Tokens are
those that training would have as targets, end tokens included, each counted once: span weights do not enter.
Bytes are those of the assistant texts alone (`num_trained_bytes` of the shards), without template and end
tokens. Both sides of a comparison have the same tokenizer, template and examples, so the choice cancels out.
"""

from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from schemas.run import FORMAT_VERSION, FileEntry
from schemas.training_config import BaseForm

EVALUATION_EXAMPLES_NAME = "evaluation_examples.arrow"

EVALUATION_EXAMPLES = pa.schema(
    [
        pa.field("example", pa.int32(), nullable=False),  # row number in the split
        pa.field("row_id", pa.string(), nullable=False),  # pieces of one chat share it
        pa.field("piece", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # name of the source, without the file
        pa.field("language", pa.string(), nullable=False),
        pa.field("num_trained_tokens", pa.int32(), nullable=False),
        pa.field("num_trained_bytes", pa.int32(), nullable=False),
        pa.field("nats_base", pa.float64(), nullable=False),
        pa.field("nats_incumbent", pa.float64(), nullable=True),  # null where nothing is in service yet
        pa.field("nats_candidate", pa.float64(), nullable=False),
    ]
)
"""Sum of the nats of an example's trained tokens under each model; rows in the order of the split."""

Label = Literal["base", "incumbent", "candidate"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TrainedModel(_Record):
    """A model that came out of training, as the evaluation and the gate name it."""

    kind: Literal["adapter", "model"]
    """adapter: LoRA beside its base model; model: a whole model folder (method full)."""
    path: str
    """Folder, relative to the run root."""
    digest: str
    """sha256 over the names and contents of the folder's files."""
    base_digest: str
    """Identity of the base model that it was trained from."""
    training_key: str


class HeldOutLoss(_Record):
    """Loss of one model on some held-out examples."""

    num_examples: int
    num_trained_tokens: int
    num_trained_bytes: int
    loss: float | None
    """Nats per trained token; None without trained tokens."""
    bits_per_byte: float | None
    """See the head of this file; None without trained bytes."""


class ModelReport(_Record):
    label: Label
    total: HeldOutLoss
    by_source: dict[str, HeldOutLoss]
    by_language: dict[str, HeldOutLoss]


class Answers(_Record):
    """Greedy answers to one question of evaluate.questions."""

    question: str
    base: str
    candidate: str


class Evaluation(_Record):
    """evaluation.json."""

    format_version: int = FORMAT_VERSION
    key: str
    """Digest of everything that shapes the numbers: an equal key is equal work, and is not done again."""
    split: str
    shards_digest: str
    """sha256 of the manifest of 06_shards."""
    plan_digest: str
    """sha256 of the manifest of 07_plan."""
    candidate: TrainedModel
    incumbent: TrainedModel | None
    """The model in service when the candidate came; None: the base model was."""
    settings: dict[str, object]
    """The evaluate section of the config."""
    base_form: BaseForm = "plain"
    """In what form the weights of all models were held: train.base of the config."""
    models: tuple[ModelReport, ...]
    """base, incumbent (where there is one), candidate."""
    answers: tuple[Answers, ...]
    examples: FileEntry
    """evaluation_examples.arrow."""


class SourceVerdict(_Record):
    """One source under both models. Judged from so many chats on that chance alone rarely passes."""

    source: str
    num_chats: int
    incumbent_bits_per_byte: float | None
    candidate_bits_per_byte: float | None
    change_share: float | None
    """(candidate - incumbent) / incumbent; above zero is worse."""
    judged: bool
    """False where the source has too few chats to say anything; then it can't stop a promotion."""
    too_much_worse: bool


class Decision(_Record):
    """Whether the candidate goes into service, and the numbers that say so. Bits per byte: lower is better."""

    promote: bool
    reason: Literal["better", "not_better", "source_worse", "too_few_chats", "not_finite"]
    explanation: str
    """One line for people."""
    num_chats: int
    incumbent_bits_per_byte: float | None
    candidate_bits_per_byte: float | None
    improvement: float | None
    """Incumbent minus candidate, in bits per byte; above zero the candidate is better."""
    improvement_lower_bound: float | None
    """One-sided lower bound of the improvement at `confidence`, by a paired bootstrap over chats."""
    confidence: float
    bootstrap_samples: int
    sources: tuple[SourceVerdict, ...]


class PromotedModel(_Record):
    """One model that was put into service: which, on which evidence, and what it took over from."""

    model: TrainedModel
    evaluation_key: str
    evaluation_sha256: str
    """sha256 of the evaluation.json that it was promoted on."""
    decision: Decision
    incumbent: TrainedModel | None
    """What was in service before; None: the base model."""


class Promotions(_Record):
    """promoted.json: the pointer that serving follows, and the way back."""

    format_version: int = FORMAT_VERSION
    current: PromotedModel
    history: tuple[PromotedModel, ...] = ()
    """Those before the current one, oldest first; `rollback` takes the last."""
    withdrawn: tuple[str, ...] = Field(default=())
    """Digests of models that were rolled back: they are not promoted again unless asked for by name."""


class Promotion(_Record):
    """What `promote` or `rollback` did."""

    outcome: Literal["promoted", "refused", "unchanged", "withdrawn", "rolled_back"]
    """unchanged: the candidate is in service already. withdrawn: refused, somebody rolled it back before."""
    model: TrainedModel
    """The candidate; after a rollback the model that is in service again."""
    decision: Decision | None
    explanation: str
