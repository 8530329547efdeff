"""OpenAssistant's trees: {"message_tree_id": ..., "prompt": {"text", "role", "replies": [...]}}, or their flat rows.

All paths, or (`tree_paths: best`) the one that takes the best-ranked reply at each step. Deleted messages are left
out with all that answers them.
"""

from typing import Any

from pipelines.formats.message_rows import is_message_row, is_rows_of_a_tree, lone_row, nested
from pipelines.formats.tree import Node, all_paths, count_leaves, one_path
from pipelines.formats.turns import Reading, read_text
from schemas.conversation import Drop, Message, Role
from schemas.source_config import SourceConfig

_ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}
_NO_RANK = 1 << 30


def matches(record: dict[str, Any]) -> bool:
    """Whether a prompt carries its replies, or rows are messages that answer each other."""
    prompt = record.get("prompt")
    is_tree = isinstance(prompt, dict) and "text" in prompt and isinstance(prompt.get("replies"), list)
    return is_tree or is_rows_of_a_tree(record) or is_message_row(record)


def read(record: dict[str, Any], source: SourceConfig) -> Reading:
    """The chats of the tree."""
    if is_rows_of_a_tree(record):
        tree = nested(record)
        return tree if isinstance(tree, Drop) else read(tree, source)
    if is_message_row(record):
        return lone_row()
    root, num_deleted, num_behind = _tree(record["prompt"])
    if root is None:
        detail = "the tree's first message is deleted"
        return Drop("no_messages", f"{detail}, and with it {num_behind} behind it" if num_behind else detail)
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
    if num_behind:
        chats.meta["repairs"]["behind_deleted_messages"] = num_behind
    return chats


def _tree(prompt: dict[str, Any]) -> tuple[Node | None, int, int]:
    """The root, children in the order of their ranks, how many were deleted, and how many are lost behind those."""
    if prompt.get("deleted"):
        return None, 1, _num_behind(prompt)
    root, num_deleted, num_behind = _node(prompt, None), 0, 0
    stack = [(root, prompt)]
    while stack:
        parent, message = stack.pop()
        replies = message.get("replies")
        for reply in sorted(replies if isinstance(replies, list) else [], key=_rank):
            if isinstance(reply, dict) and reply.get("deleted"):
                num_deleted += 1
                num_behind += _num_behind(reply)
                continue
            node = _node(reply, parent)
            parent.children.append(node)
            if isinstance(reply, dict):
                stack.append((node, reply))
    return root, num_deleted, num_behind


def _num_behind(message: dict[str, Any]) -> int:
    """How many messages answer one, directly or not."""
    count, stack = 0, [message]
    while stack:
        replies = stack.pop().get("replies")
        found = replies if isinstance(replies, list) else []
        count += len(found)
        stack += [reply for reply in found if isinstance(reply, dict)]
    return count


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
