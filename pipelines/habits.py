"""What probe chats teach about a chat template: how its answers begin and end, and what beside texts it writes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from pipelines.chat_fields import GivenChat, GivenTurn, Kind
from pipelines.render import render
from pipelines.skeleton import MARKER, Skeleton, marked_text, skeleton_of
from pipelines.templates import TEMPLATE_ERRORS, CallForm, ChatTemplate, compile_bare, render_text
from schemas.conversation import REASONING_EXTRAS, Drop, Message

PLAIN_CHAT = (
    Message("user", "What is the capital?"),
    Message("assistant", "Paris is the capital."),
    Message("user", "And of Peru?"),
    Message("assistant", "Lima."),
)
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "qz_weather",
        "description": "Says how the weather is in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city."}},
            "required": ["city"],
        },
    },
}
_ENDS_OF_CALLS = {"<|eom_id|>", "<|call|>"}
"""Tokens that end a turn behind a call alone: Llama 3.1's and gpt-oss's. Others close the call and not the turn."""
_CALL_ID = "abcde1234"
"""Nine letters and digits: what Mistral's templates ask for."""


def compile_template(
    source: str, *, special_tokens: Mapping[str, Any], control_tokens: Sequence[str]
) -> ChatTemplate:
    """Compile, and learn from probe chats. Raises RefusedError for a broken template.

    `special_tokens` is the tokenizer's `special_tokens_map`; `control_tokens` are the strings that the tokenizer
    turns into one control id each.
    """
    template = compile_bare(source, special_tokens=special_tokens, control_tokens=control_tokens)
    closings = tuple(dict.fromkeys(_closings(template)))
    ends = {found.group() for text in closings if (found := template.control_pattern.search(text))}
    eos = {str(special_tokens["eos_token"])} if "eos_token" in special_tokens else set()
    template = replace(template, end_tokens=frozenset(eos | ends), closings=closings)
    template = replace(template, prompt=_generation_prompt(template), lead=_lead(template))
    template = replace(
        template, writes_tools=_writes_tools(template), reads_input=_reads_input(source, template)
    )
    template = _with_reasoning(source, template)
    return _with_calls(source, template)


def _skeleton(template: ChatTemplate, *turns: GivenTurn, tools: Any = None) -> Skeleton | None:
    try:
        return skeleton_of(template, GivenChat(list(turns), tools))
    except TEMPLATE_ERRORS:
        return None


def _said(role: str, *kinds: Kind) -> GivenTurn:
    return GivenTurn(role, dict.fromkeys(("content", *kinds), "x"))


# Begin and end of an answer ---------------------------------------------------------------------------------


def _closings(template: ChatTemplate) -> Iterator[str]:
    """What stands behind an answer that ends the chat, up to its first control token: no later turn opened with it."""
    for roles in (("user", "assistant"), ("system", "user", "assistant")):
        if (skeleton := _skeleton(template, *map(_said, roles))) is None:
            continue
        tail = skeleton.segments[-1]
        if skeleton.slots and (token := template.control_pattern.search(tail)):
            yield tail[: token.end()]
    yield from _closing_between_turns(template)


def _closing_between_turns(template: ChatTemplate) -> Iterator[str]:
    """Some end the chat with another token: the one that stands behind every text, also where none follows."""
    skeleton = _skeleton(template, *map(_said, ("user", "assistant", "user", "assistant")))
    if skeleton is None or [slot.message for slot in skeleton.slots] != [0, 1, 2, 3]:
        return
    found = [template.control_pattern.match(text) for text in skeleton.segments[1:4]]
    tokens = {match.group() if match else "" for match in found}
    token = tokens.pop()
    asked = _skeleton(template, _said("user"))
    if token and not tokens and asked is not None and asked.segments[-1].startswith(token):
        yield token


def _generation_prompt(template: ChatTemplate) -> str:
    """What add_generation_prompt adds, "" for a template that does not look at it."""
    try:
        chat = GivenChat([_said("user")])
        plain, asked = marked_text(template, chat), marked_text(template, chat, add_generation_prompt=True)
    except TEMPLATE_ERRORS:
        return ""
    return asked[len(plain) :] if asked.startswith(plain) else ""


def _lead(template: ChatTemplate) -> str:
    """White space between the generation prompt and the content, where it is the same in all turns."""
    leads = set()
    for turn in (1, 3):
        rendered = render(template, PLAIN_CHAT[: turn + 1])
        if isinstance(rendered, Drop) or (place := rendered.message_spans[turn]) is None:
            return ""
        try:
            prompt = render_text(template, PLAIN_CHAT[:turn], add_generation_prompt=True)
        except TEMPLATE_ERRORS:
            return ""
        between = rendered.text[len(prompt) : place[0]]
        leads.add(between if rendered.text.startswith(prompt) and between.isspace() else "")
    return leads.pop() if len(leads) == 1 else ""


def _other_lead(template: ChatTemplate, *turns: GivenTurn, tools: Any = None) -> dict[str, str]:
    """What stands between the generation prompt and the first text or call of the last turn, by what comes first."""
    as_it_is = frozenset([len(turns) - 1] if turns[-1].calls else [])
    try:
        prompt = marked_text(template, GivenChat(list(turns[:-1]), tools), add_generation_prompt=True)
        whole = marked_text(template, GivenChat(list(turns), tools), as_it_is)
    except TEMPLATE_ERRORS:
        return {}
    if not whole.startswith(prompt) or (marker := MARKER.search(whole, len(prompt))) is None:
        return {}
    return {marker["kind"]: whole[len(prompt) : marker.start()]}


# Beside texts -----------------------------------------------------------------------------------------------


def _writes_tools(template: ChatTemplate) -> bool:
    for roles in (("user",), ("system", "user")):
        try:
            text = marked_text(template, GivenChat([_said(role) for role in roles], [PROBE_TOOL]))
        except TEMPLATE_ERRORS:
            continue
        if all(word in text for word in ("qz_weather", "Says how the weather is", "The city.")):
            return True
    return False


def _reads_input(source: str, template: ChatTemplate) -> bool:
    if "input" not in source:
        return False
    skeleton = _skeleton(template, _said("user", "input"))
    return skeleton is not None and any(slot.kind == "input" for slot in skeleton.slots)


def _with_reasoning(source: str, template: ChatTemplate) -> ChatTemplate:
    turns = _said("user"), _said("assistant", "reasoning")
    for key in REASONING_EXTRAS:
        tried = replace(template, reasoning_key=key)
        skeleton = _skeleton(tried, *turns) if key in source else None
        if skeleton is not None and sum(slot.kind == "reasoning" for slot in skeleton.slots) == 1:
            return replace(tried, other_leads=_other_lead(tried, *turns))
    return template


def _with_calls(source: str, template: ChatTemplate) -> ChatTemplate:
    """Learn in which form it takes calls. One that writes no end token behind a call can't be trained on calls."""
    if "tool_calls" not in source:
        return template
    tools = [PROBE_TOOL] if template.writes_tools else None
    for as_text, without_content in product((False, True), (False, True)):
        tried = replace(template, call_form=CallForm(as_text, without_content))
        turns = _said("user"), _calling(as_text)
        skeleton = _skeleton_with_call(tried, *turns, tools=tools)
        if skeleton is None or not any(slot.kind == "call" for slot in skeleton.slots):
            continue
        tail = skeleton.segments[-1]
        if not ("qz_city" in tail and "qz_lima" in tail):
            continue
        found = list(template.control_pattern.finditer(tail))
        ends = template.end_tokens
        ends |= {match.group() for match in found} & _ENDS_OF_CALLS
        if not any(match.group() in ends for match in found):
            return template
        leads = {**template.other_leads, **_other_lead(tried, *turns, tools=tools)}
        return replace(tried, end_tokens=ends, other_leads=leads)
    return template


def _calling(as_text: bool) -> GivenTurn:
    arguments: Any = '{"qz_city": "qz_lima"}' if as_text else {"qz_city": "qz_lima"}
    call = {"id": _CALL_ID, "type": "function", "function": {"name": "qz_weather", "arguments": arguments}}
    return GivenTurn("assistant", {"content": ""}, [call])


def _skeleton_with_call(template: ChatTemplate, *turns: GivenTurn, tools: Any) -> Skeleton | None:
    """The content of a turn that only calls is empty, and given so."""
    try:
        return skeleton_of(template, GivenChat(list(turns), tools), frozenset([len(turns) - 1]))
    except TEMPLATE_ERRORS:
        return None
