"""Stage 3, filter: puts roles in order, cuts bad ends, then drops a chat for the first rule that it breaks.

Every kept chat carries its languages in meta["language"]. Rules are functions in `RULES`, run in this order; what
costs more comes later: languages, tokens, a quality score.
"""

from collections.abc import Callable
from importlib.metadata import version

from pipelines.formats.document import is_document
from pipelines.rules import answers, languages, length, models, quality, repetition, shares, turns, words
from pipelines.rules.language_policy import with_languages
from pipelines.rules.prose import proses_kept
from pipelines.tokenizer_files import load_tokenizer, tokenizer_versions
from schemas.conversation import Conversation, Drop
from schemas.pipeline_config import FilterConfig, PipelineConfig

STAGE_VERSION = 2

RULES: dict[str, Callable[[Conversation, FilterConfig], Drop | None]] = {
    "model": models.model_drop,
    "too_many_turns": length.too_many_turns,
    "too_few_turns": length.too_few_turns,
    "too_short": length.too_short,
    "too_long": length.too_long,
    "answer_length": length.answer_length,
    "digit_repetition": repetition.digit_repetition,
    "broken_numbering": repetition.broken_numbering,
    "character_repetition": repetition.character_repetition,
    "line_repetition": repetition.line_repetition,
    "ngram_repetition": repetition.ngram_repetition,
    "too_many_symbols": shares.too_many_symbols,
    "too_many_digits": shares.too_many_digits,
    "too_much_code": shares.too_much_code,
    "blocked_word": words.blocked_word,
}


def prepare(config: PipelineConfig) -> Callable[[Conversation], Conversation | Drop]:
    """The row step; loads the language model, and tokenizer and quality score where a rule needs them.

    Drops: empty, wrong_role_order, those of answers.ANSWER_RULES, of RULES, of language_policy.with_languages,
    of length.token_length, and low_quality.
    """
    settings = config.filter
    detector = languages.load_detector()
    num_tokens = _token_counter(config) if _counts_tokens(settings) else None
    score = quality.load_score(settings) if settings.quality else None

    def step(conversation: Conversation) -> Conversation | Drop:
        with proses_kept():
            return judge(conversation, settings, detector=detector, num_tokens=num_tokens, score=score)

    return step


def versions(config: PipelineConfig) -> dict[str, str]:
    """What else shapes the bytes: the language models, the tokenizer and the quality score where they are used."""
    found = {
        "lid.176.ftz": languages.model_sha256(),
        "fasttext-predict": version("fasttext-predict"),
        "langdetect": version("langdetect"),
    }
    if _counts_tokens(config.filter):
        found |= tokenizer_versions(config)
    if config.filter.quality:
        found["quality"] = quality.quality_version(config.filter)
    return found


def judge(
    conversation: Conversation,
    settings: FilterConfig,
    *,
    detector: languages.Detector,
    num_tokens: Callable[[str], int] | None = None,
    score: quality.Score | None = None,
) -> Conversation | Drop:
    """A copy of the chat in order and with its languages, or the one reason why it is dropped."""
    if (drop := turns.empty_drop(conversation, settings)) is not None:
        return drop
    # A document has no roles to be in order, and no questions to its answer.
    is_chat = not is_document(conversation)
    outcome = turns.in_order(conversation, settings) if is_chat else conversation
    if is_chat and isinstance(outcome, Conversation):
        outcome = answers.without_bad_answers(turns.first_round(outcome, settings), settings)
    if isinstance(outcome, Conversation):
        outcome = _first_drop(outcome, settings) or _in_languages(outcome, settings, detector=detector)
    if isinstance(outcome, Conversation) and num_tokens is not None:
        outcome = length.token_length(outcome, settings, num_tokens=num_tokens) or outcome
    if isinstance(outcome, Conversation) and score is not None:
        outcome = quality.with_quality(outcome, settings, score=score)
    return outcome


def _in_languages(
    conversation: Conversation, settings: FilterConfig, *, detector: languages.Detector
) -> Conversation | Drop:
    """with_languages; what it has cut a chat down to must keep the rules too."""
    outcome = with_languages(conversation, settings, detector=detector)
    if isinstance(outcome, Drop) or len(outcome.messages) == len(conversation.messages):
        return outcome
    return _first_drop(outcome, settings) or outcome


def _first_drop(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    for rule in RULES.values():
        if (drop := rule(conversation, settings)) is not None:
            return drop
    return None


def _counts_tokens(settings: FilterConfig) -> bool:
    return settings.min_tokens > 0 or settings.max_tokens > 0


def _token_counter(config: PipelineConfig) -> Callable[[str], int]:
    encoder = load_tokenizer(config).backend_tokenizer

    def num_tokens(text: str) -> int:
        return len(encoder.encode(text, add_special_tokens=False))

    return num_tokens
