"""A whole chat in one text, with labels before the turns: "Human: ... Assistant: ...".

Such texts are the answers of preference sets, the instructions of BELLE's multi-turn set, the rows of guanaco.
"""

import re

from schemas.conversation import Message, Role

_LABELS: dict[str, Role] = {"human": "user", "user": "user", "assistant": "assistant", "gpt": "assistant"}
# At the beginning of a line, or behind "###" anywhere: guanaco joins its turns on one line.
_LABEL = re.compile(r"(?:^[ \t]*|###[ \t]*)(Human|User|Assistant|GPT)[ \t]*[:：]", re.MULTILINE)


def read_transcript(text: str) -> list[Message] | None:
    """The turns, white space around them stripped; None where the text is no transcript.

    A transcript begins with a user's label and has an assistant's. An empty last turn, left for the answer to be
    written behind it, is left out.
    """
    found = list(_LABEL.finditer(text))
    if not found or text[: found[0].start()].strip():
        return None
    roles = [_LABELS[label[1].lower()] for label in found]
    if roles[0] != "user" or "assistant" not in roles:
        return None
    ends = [*(label.start() for label in found[1:]), len(text)]
    contents = [text[label.end() : end].strip() for label, end in zip(found, ends, strict=True)]
    if not contents[-1]:
        roles, contents = roles[:-1], contents[:-1]
    return [Message(role, content) for role, content in zip(roles, contents, strict=True)]
