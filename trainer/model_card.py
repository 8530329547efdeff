"""README.md of an export: a model card that the hub reads, written from what the run's own records say.

    card_text(facts)    YAML front matter, then the same for people: data, training, evaluation, versions

No times and no texts of chats: equal work gives equal bytes. What is not known is left out, never guessed.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML

from schemas.evaluation import Evaluation
from schemas.training_result import TrainingResult
from trainer.data_summary import DataSummary
from trainer.merge_check import Difference

TAG = "sft-pipeline"
TASK = "text-generation"
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}")


@dataclass(frozen=True, slots=True)
class HarnessScore:
    """One number of lm-evaluation-harness."""

    task: str
    metric: str
    value: float
    stderr: float | None
    num_examples: int | None


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card tells. `form` is adapter, merged or model; None is what nobody recorded."""

    name: str
    form: str
    method: str
    base: str
    base_id: str | None = None
    """Its name on the hub, where it has one."""
    license: Mapping[str, str] | None = None
    """The base model's, as its own card says it: license, license_name, license_link."""
    dtype: str | None = None
    training: TrainingResult | None = None
    evaluation: Evaluation | None = None
    data: DataSummary | None = None
    difference: Difference | None = None
    harness: Sequence[HarnessScore] = ()


def card_text(facts: CardFacts) -> str:
    """The whole file."""
    sections = [
        _about(facts),
        _use(facts),
        _data(facts),
        _training(facts),
        _evaluation(facts),
        _versions(facts),
    ]
    body = "\n".join("\n".join(lines) + "\n" for lines in map(list, sections) if lines)
    return f"---\n{_yaml(front_matter(facts))}---\n\n{body}"


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """What the hub reads."""
    found: dict[str, Any] = {"library_name": "peft" if facts.form == "adapter" else "transformers"}
    found |= {"pipeline_tag": TASK, "tags": sorted({TAG, facts.method.lower(), facts.form})}
    if facts.base_id is not None:
        relation = "adapter" if facts.form == "adapter" else "finetune"
        found |= {"base_model": facts.base_id, "base_model_relation": relation}
    found |= facts.license or {}
    if languages := [
        code for code in (facts.data.languages if facts.data else ()) if LANGUAGE_CODE.fullmatch(code)
    ]:
        found["language"] = languages
    if results := list(_results(facts)):
        found["model-index"] = [{"name": facts.name, "results": results}]
    return found


def _results(facts: CardFacts) -> Iterator[dict[str, Any]]:
    task = {"type": TASK, "name": "Text generation"}
    if (total := _total(facts.evaluation)) is not None and facts.evaluation is not None:
        named = {"bits_per_byte": total.bits_per_byte, "loss": total.loss}
        metrics = [
            {"type": name, "name": name.replace("_", " "), "value": value}
            for name, value in named.items()
            if value is not None
        ]
        data = {
            "type": "held-out",
            "name": "Held-out chats of the training's sources",
            "split": facts.evaluation.split,
        }
        yield {"task": task, "dataset": data, "metrics": metrics}
    for score in facts.harness:
        metric = {"type": score.metric, "name": score.metric, "value": score.value}
        yield {"task": task, "dataset": {"type": score.task, "name": score.task}, "metrics": [metric]}


def _total(evaluation: Evaluation | None) -> Any:
    models = evaluation.models if evaluation is not None else ()
    return next((model.total for model in models if model.label == "candidate"), None)


def _yaml(value: Any) -> str:
    writer, text = YAML(typ="safe", pure=True), io.StringIO()
    writer.default_flow_style = False
    writer.dump(value, text)
    return text.getvalue()


# For people -------------------------------------------------------------------------------------------------

_FORMS = {
    "adapter": "An adapter over its base model, in PEFT's format",
    "merged": "An adapter merged into its base model: a whole model, in transformers' format",
    "model": "A whole model, in transformers' format",
}
_CODE = {
    "adapter": """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
base = AutoModelForCausalLM.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "FOLDER")""",
    "model": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")""",
}


def _about(facts: CardFacts) -> Iterator[str]:
    yield f"# {_plain(facts.name)}"
    yield ""
    dtype = f", {facts.dtype}" if facts.dtype else ""
    yield f"{_FORMS[facts.form]}{dtype}. Base model: {_plain(facts.base)}. Method: {_plain(facts.method)}."
    if facts.difference is not None:
        yield ""
        yield f"Beside base and adapter as they were trained, {facts.difference.line()}."


def _use(facts: CardFacts) -> Iterator[str]:
    code = _CODE["adapter" if facts.form == "adapter" else "model"]
    base = json.dumps(facts.base_id or facts.base)[1:-1]
    yield from (
        "## Use",
        "",
        "```python",
        code.replace("FOLDER", facts.name).replace("BASE", base),
        "```",
        "",
    )
    yield "The tokenizer has the chat template of training; questions need its generation prompt."


def _data(facts: CardFacts) -> Iterator[str]:
    if facts.data is None:
        return
    yield from ("## Data", "")
    rows = [
        [
            source.name,
            source.num_read,
            source.num_kept,
            source.num_examples,
            source.num_trained_tokens,
            source.license,
        ]
        for source in facts.data.sources
    ]
    total = [sum(row[column] for row in rows) for column in range(1, 5)]  # type: ignore[misc]
    names = ["Source", "Records read", "Chats kept", "Training examples", "Trained tokens", "Licence"]
    yield from _table(names, [*rows, ["all", *total, ""]])
    yield ""
    yield "Kept are the chats of all sides, the held-out ones as well. A licence is what the source's own card names."


def _training(facts: CardFacts) -> Iterator[str]:
    result = facts.training
    if result is None:
        return
    yield from ("## Training", "")
    numbers = {
        "Steps": result.num_steps,
        "Tokens read": result.num_tokens,
        "Of these trained": result.num_trained_tokens,
        "Trained weights": result.num_trainable_weights,
        "Loss of the first step": result.first_loss,
        "Loss of the last step": result.last_loss,
        "Validation loss": result.validation_loss,
        "Validation bits per byte": result.validation_bits_per_byte,
        "Computed in": f"{result.dtype} on {result.device}, strategy {result.strategy}, {result.num_processes} processes",
    }
    yield from _table(["", ""], [[name, value] for name, value in numbers.items() if value is not None])
    yield from ("", "```json", json.dumps(result.settings, indent=1, sort_keys=True), "```")


def _evaluation(facts: CardFacts) -> Iterator[str]:
    evaluation = facts.evaluation
    if evaluation is None and not facts.harness:
        return
    yield from ("## Evaluation", "")
    if evaluation is not None:
        yield from _held_out(evaluation)
    if facts.harness:
        yield from ("", "lm-evaluation-harness:", "")
        rows = [[s.task, s.metric, s.value, s.stderr, s.num_examples] for s in facts.harness]
        yield from _table(["Task", "Metric", "Value", "Standard error", "Examples"], rows)


def _held_out(evaluation: Evaluation) -> Iterator[str]:
    """Lower is better; base, incumbent and candidate on the same examples."""
    labels = [model.label for model in evaluation.models]
    total = evaluation.models[-1].total
    yield (
        f"Bits per byte of the held-out answers (side {evaluation.split}, {total.num_examples} examples, "
        f"{total.num_trained_tokens:,} tokens); lower is better. The candidate is this model."
    )
    yield ""
    rows: list[list[Any]] = [["all", *(model.total.bits_per_byte for model in evaluation.models)]]
    for name in evaluation.models[0].by_source:
        rows.append([name, *(model.by_source[name].bits_per_byte for model in evaluation.models)])
    yield from _table(["Source", *labels], rows)


def _versions(facts: CardFacts) -> Iterator[str]:
    result = facts.training
    if result is None:
        return
    yield from ("## Versions", "")
    yield ", ".join(f"{name} {version}" for name, version in sorted(result.versions.items())) + "."
    yield ""
    yield f"Training {result.key}; inputs by digest: " + ", ".join(
        f"{name} {digest[:12]}" for name, digest in sorted(result.inputs.items())
    )


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in rows:
        yield "| " + " | ".join(map(_cell, row)) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else _plain(str(value))


def _plain(text: str) -> str:
    """Text of others that must not become a table, a link or HTML."""
    return re.sub(r"([|<>\[\]`*_\\])", r"\\\1", " ".join(text.split()))
