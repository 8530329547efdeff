"""Identity data: the name and the maker in every answer, no other's, each pair once, in each language."""

from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipelines.identity import identity_rounds
from pipelines.identity_texts import IDENTITY_TEXTS, OTHERS
from pipelines.merge import plan_source, read_part
from schemas.pipeline_config import PipelineConfig
from schemas.source_config import IdentityConfig, SourceConfig

LANGUAGES = sorted(IDENTITY_TEXTS)


def identity(*languages: str, **more: object) -> IdentityConfig:
    return IdentityConfig(name="Ada {1}", maker="Lovelace & Co", languages=list(languages), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_answer_names_the_model_and_nobody_else_as_itself(language: str) -> None:
    rounds = list(identity_rounds(identity(language)))
    assert len(rounds) == len(set(rounds)) >= 50
    assert all("Ada {1}" in answer for _, answer in rounds)
    assert all(
        "{name}" not in text and "{maker}" not in text and "{other}" not in text
        for pair in rounds
        for text in pair
    )
    denials = [
        (question, answer) for question, answer in rounds if any(other in question for other in OTHERS)
    ]
    assert {other for other in OTHERS for question, _ in denials if other in question} == set(OTHERS)
    assert all(other not in answer for _, answer in rounds if (_, answer) not in denials for other in OTHERS)
    assert sum("Lovelace & Co" in answer for _, answer in rounds) == len(rounds)


def test_the_schema_offers_the_languages_that_there_are_texts_for() -> None:
    assert list(identity_rounds(identity(*LANGUAGES)))
    with pytest.raises(ValidationError):
        identity("xx")


def test_the_models_own_name_is_no_other() -> None:
    ours = IdentityConfig(name="Claude", maker="gemini")
    questions = [question for question, _ in identity_rounds(ours)]
    assert not [question for question in questions if "Claude" in question or "Gemini" in question]
    assert not [
        q
        for q, _ in identity_rounds(IdentityConfig(name="A", maker="B", others=[]))
        if q.startswith("Are you C")
    ]


def test_a_question_has_more_than_one_answer_and_an_answer_more_than_one_question() -> None:
    rounds = list(identity_rounds(identity("en")))
    assert min(Counter(question for question, _ in rounds).values()) > 1
    assert max(Counter(answer for _, answer in rounds).values()) > 1


def test_rows_of_an_identity_are_for_training_only_and_exempt(tmp_path: Path) -> None:
    source = SourceConfig(name="me", identity=identity("en", "zh"))
    config = PipelineConfig(run_root=Path("run"), sources=[source])
    plan = plan_source(source, config=config, spool_folder=tmp_path)
    rows = [row for part in plan.parts for row in read_part(part, config)]
    assert all(drop is None for _, drop in rows)
    assert {row.source for row, _ in rows} == {"me/identity.jsonl"}
    assert {(row.meta["set"], row.meta["near_exempt"]) for row, _ in rows} == {("train", True)}
    again = plan_source(source, config=config, spool_folder=tmp_path / "other")
    assert [part.digest for part in again.parts] == [part.digest for part in plan.parts]


@pytest.mark.parametrize(
    "source",
    [
        {},
        {"path": "a.json", "identity": {"name": "A", "maker": "B"}},
        {"identity": {"name": "", "maker": "B"}},
    ],
)
def test_a_source_reads_or_makes_never_both(source: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SourceConfig(name="s", **source)  # type: ignore[arg-type]
