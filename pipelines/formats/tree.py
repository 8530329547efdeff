"""A tree of messages -> its chats: every path from the root to a leaf, or one path only.

An answer that several paths share is trained in the first of them: in the others it has `weight: 0`. A path all
of whose answers stand in other paths is a drop, so every leaf is a row or a drop.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.formats.turns import Chats
from schemas.conversation import Drop, Message, utf8

MAX_SHARED_CHARS = 64 << 20
"""A tree of a megabyte can have paths of many gigabytes: what lies beyond is one drop."""
_MESSAGE_CHARS = 100  # what an empty message costs


@dataclass(slots=True, eq=False)
class Node:
    """One message and those that answer it. `message` is None where it is no turn of the chat."""

    message: Message | None
    parent: "Node | None" = None
    children: list["Node"] = field(default_factory=list)
    problem: Drop | None = None
    """Why the turn can't be read: paths through it are dropped."""
    text_key: bytes = b""
    """Digest of roles and texts from the root to here."""


def all_paths(roots: Sequence[Node]) -> Chats:
    """The chats of a tree whose `parent` and `children` agree."""
    nodes = _nodes(roots)
    leaves = [node for node in nodes if not node.children]
    answered = _answered_again(nodes)
    trained: set[bytes] = set()
    chats: list[tuple[list[Message], Drop | None]] = []
    num_chars_left = MAX_SHARED_CHARS
    for number, leaf in enumerate(leaves):
        path = _path(leaf)
        num_chars_left -= sum(_MESSAGE_CHARS + len(node.message.content) for node in path if node.message)
        if num_chars_left < 0:
            detail = f"{len(leaves) - number} of {len(leaves)} paths lie beyond {MAX_SHARED_CHARS} characters"
            chats.append(([], Drop("tree_too_large", detail)))
            break
        chats.append(_chat(path, answered, trained))
    return Chats(chats)


def one_path(leaf: Node, num_leaves: int) -> Chats:
    """The chat that ends with a leaf; the other paths are counted."""
    chat = _chat(_path(leaf), set(), set())
    left_out = {"repairs": {"paths_left_out": num_leaves - 1}} if num_leaves > 1 else {}
    return Chats([chat], left_out)


def count_leaves(roots: Sequence[Node]) -> int:
    """How many paths there are."""
    return sum(not node.children for node in _nodes(roots))


def _nodes(roots: Sequence[Node]) -> list[Node]:
    """All nodes, each behind its parent, children in their order."""
    nodes, stack = [], list(reversed(roots))
    while stack:
        node = stack.pop()
        node.text_key = _text_key(node)
        nodes.append(node)
        stack.extend(reversed(node.children))
    return nodes


def _answered_again(nodes: Sequence[Node]) -> set[bytes]:
    """Answers behind which another one follows in some path that can be read."""
    leads_on: set[int] = set()
    found: set[bytes] = set()
    for node in reversed(nodes):
        if id(node) in leads_on and _is_answer(node):
            found.add(node.text_key)
        if node.parent is not None and node.problem is None and (_is_answer(node) or id(node) in leads_on):
            leads_on.add(id(node.parent))
    return found


def _text_key(node: Node) -> bytes:
    before = node.parent.text_key if node.parent is not None else b""
    if node.message is None:
        return before
    said = f"{node.message.role}\n{node.message.content}"
    return hashlib.blake2b(before + utf8(said), digest_size=16).digest()


def _path(leaf: Node) -> list[Node]:
    path = [leaf]
    while (parent := path[-1].parent) is not None:
        path.append(parent)
    return path[::-1]


def _is_answer(node: Node) -> bool:
    return node.message is not None and node.message.role == "assistant"


def _chat(path: list[Node], answered: set[bytes], trained: set[bytes]) -> tuple[list[Message], Drop | None]:
    """`answered`: answers behind which another one follows in some path. `trained` grows by those of this path."""
    messages: list[Message] = []
    problem = next((node.problem for node in path if node.problem is not None), None)
    answers = [node.text_key for node in path if _is_answer(node)]
    is_new = not answers or (answers[-1] not in trained and answers[-1] not in answered)
    if problem is not None or not is_new:
        messages = [node.message for node in path if node.message is not None]
        return messages, problem or Drop(
            "path_adds_no_answer", "all its answers stand in other paths of the tree"
        )
    follows_untrained = True
    # Backwards: an answer right before a trained one becomes one turn with it, so it is trained again.
    for node in reversed(path):
        if node.message is None:
            continue
        is_shared = _is_answer(node) and node.text_key in trained and follows_untrained
        follows_untrained = is_shared or not _is_answer(node)
        messages.append(_untrained(node.message) if is_shared else node.message)
    trained.update(answers)
    return messages[::-1], None


def _untrained(message: Message) -> Message:
    extras: dict[str, Any] = {**message.extras, "weight": 0}
    return dataclasses.replace(message, extras=extras)
