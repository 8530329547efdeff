"""Answers that no model should learn: kept, cut off with all that follows them, or their chat dropped.

What follows such an answer may speak of it, so a cut ends the chat before the question to it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from pipelines.rules import broken_answers, refusals
from pipelines.rules.turns import rounds_of, with_repair
from schemas.conversation import Conversation, Drop, Message
from schemas.pipeline_config import FilterConfig

Judge = Callable[[str, str], str]
"""(question, answer) -> what is wrong with the answer, for people; "" if nothing is."""


@dataclass(frozen=True, slots=True)
class AnswerRule:
    """`setting` names the policy in FilterConfig: keep, cut or drop."""

    setting: str
    judge: Judge


ANSWER_RULES: dict[str, AnswerRule] = {
    "error_reply": AnswerRule("error_replies", broken_answers.error_reply),
    "placeholder": AnswerRule("placeholders", broken_answers.placeholder),
    "echo": AnswerRule("echoes", broken_answers.echo),
    "unfinished_answer": AnswerRule("unfinished_answers", broken_answers.unfinished_answer),
    "refusal": AnswerRule("refusals", refusals.refusal),
    "ai_disclaimer": AnswerRule("ai_disclaimers", refusals.ai_disclaimer),
}
"""Reason of the drop -> rule."""


def without_bad_answers(conversation: Conversation, settings: FilterConfig) -> Conversation | Drop:
    """The chat up to the first bad answer whose policy is cut; a Drop with the rule's name where that leaves nothing."""
    prefix, rounds = rounds_of(conversation.messages)
    for number, messages in enumerate(rounds):
        for reason, rule in ANSWER_RULES.items():
            policy = getattr(settings, rule.setting)
            if policy == "keep" or not (detail := _fault(messages, rule.judge)):
                continue
            if policy == "drop" or number == 0:
                return Drop(reason, f"round {number}: {detail}")
            kept = [*prefix, *(message for part in rounds[:number] for message in part)]
            shorter = replace(conversation, messages=kept)
            return with_repair(shorter, f"{reason}_rounds_cut", len(rounds) - number)
    return conversation


def _fault(messages: list[Message], judge: Judge) -> str:
    """What is wrong with the answers of a round."""
    question = messages[0].content
    found = (judge(question, message.content) for message in messages if message.role == "assistant")
    return next((detail for detail in found if detail), "")
