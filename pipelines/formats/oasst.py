"""OpenAssistant's trees: {"message_tree_id": ..., "prompt": {"text", "role", "replies": [...]}}.

All paths, or (`tree_paths: best`) the one that takes the best-ranked reply at each step. Deleted messages are left
out with all that answers them.
"""

from typing import Any

from pipelines.formats.tree import Node, all_paths, count_leaves, one_path
from pipelines.formats.turns import Reading, read_text
from schemas.conversation import Drop, Message, Role
from schemas.source_config import SourceConfig

_ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}
_NO_RANK = 1 << 30


def matches(record: dict[str, Any]) -> bool:
    """Whether a prompt carries its replies."""
    prompt = record.get("prompt")
    return isinstance(prompt, dict) and "text" in prompt and isinstance(prompt.get("replies"), list)


def read(record: dict[str, Any], source: SourceConfig) -> Reading:
    """The chats of the tree."""
    root, num_deleted = _tree(record["prompt"])
    if root is None:
        return Drop("no_messages", "the tree's first message is deleted")
    if source.tree_paths == "best":
        leaf = root
        while leaf.children:
            leaf = leaf.children[0]
        chats = one_path(leaf, count_leaves([root]))
    else:
        chats = all_paths([root])
    if isinstance(record.get("message_tree_id"), str):
        chats.meta["id"] = record["message_tree_id"]
    if num_deleted:
        chats.meta.setdefault("repairs", {})["deleted_messages"] = num_deleted
    return chats


def _tree(prompt: dict[str, Any]) -> tuple[Node | None, int]:
    """The root, children in the order of their ranks, and how many branches were deleted."""
    if prompt.get("deleted"):
        return None, 1
    root, num_deleted = _node(prompt, None), 0
    stack = [(root, prompt)]
    while stack:
        parent, message = stack.pop()
        replies = message.get("replies")
        for reply in sorted(replies if isinstance(replies, list) else [], key=_rank):
            if isinstance(reply, dict) and reply.get("deleted"):
                num_deleted += 1
                continue
            node = _node(reply, parent)
            parent.children.append(node)
            if isinstance(reply, dict):
                stack.append((node, reply))
    return root, num_deleted


def _rank(reply: Any) -> float:
    rank = reply.get("rank") if isinstance(reply, dict) else None
    return rank if isinstance(rank, (int, float)) and not isinstance(rank, bool) else _NO_RANK


def _node(message: Any, parent: Node | None) -> Node:
    if not isinstance(message, dict):
        return Node(None, parent, problem=Drop("bad_value", f"a reply is {type(message).__name__}"))
    role, text = _ROLES.get(str(message.get("role"))), read_text(message.get("text"))
    if role is None:
        return Node(None, parent, problem=Drop("unknown_role", f"role is {message.get('role')!r:.100}"))
    if isinstance(text, Drop):
        return Node(None, parent, problem=text)
    return Node(Message(role, text), parent)
