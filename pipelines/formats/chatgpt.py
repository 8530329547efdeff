"""ChatGPT's own export, conversations.json: {"mapping": {id: {"message", "parent", "children"}}, "current_node"}.

A tree: edited questions and regenerated answers are branches. All paths are chats, or (`tree_paths: best`) the one
that the page shows. What the page hides (system texts, custom instructions, thoughts) is no turn.
"""

from typing import Any

from pipelines.formats.tree import Node, all_paths, count_leaves, one_path
from pipelines.formats.turns import ROLE_NAMES, Chats, Reading
from pipelines.parse import iso_date
from schemas.conversation import Drop, Message
from schemas.source_config import SourceConfig

_NO_TURNS = (
    "user_editable_context",
    "model_editable_context",
    "thoughts",
    "reasoning_recap",
    "app_pairing_content",
)
"""Kinds of content that the page does not show as a message."""
_TEXT_KEYS = ("text", "result")


def matches(record: dict[str, Any]) -> bool:
    """Whether there is a mapping of nodes."""
    mapping = record.get("mapping")
    return isinstance(mapping, dict) and all(isinstance(node, dict) for node in mapping.values())


def read(record: dict[str, Any], source: SourceConfig) -> Reading:
    """The chats of one conversation."""
    nodes = {key: _node(value) for key, value in record["mapping"].items()}
    roots = _link(record["mapping"], nodes)
    if isinstance(roots, Drop):
        return roots
    if not any(node.message or node.problem for node in nodes.values()):
        return Drop("no_messages", f"{len(nodes)} nodes, none of them a turn")
    current = nodes.get(record.get("current_node") if isinstance(record.get("current_node"), str) else "")
    if source.tree_paths == "best":
        if current is None:
            return Drop("bad_value", f"current_node is {record.get('current_node')!r:.100}, no such node")
        chats = one_path(current, count_leaves(roots))
    else:
        chats = all_paths(roots)
    return Chats(chats.chats, chats.meta | _meta(record))


def _meta(record: dict[str, Any]) -> dict[str, Any]:
    meta: dict[str, Any] = {"answers": "text"}
    if date := iso_date(record.get("update_time")) or iso_date(record.get("create_time")):
        meta["date"] = date
    slugs = [_metadata(node.get("message")).get("model_slug") for node in record["mapping"].values()]
    if models := [slug for slug in slugs if isinstance(slug, str) and slug]:
        meta["model"] = models[-1]
    return meta


def _link(mapping: dict[str, Any], nodes: dict[str, Node]) -> list[Node] | Drop:
    """Parents and children by the nodes' `parent`, siblings in the order of the parent's `children`."""
    for key, value in mapping.items():
        parent = value.get("parent")
        if isinstance(parent, str) and parent in nodes:
            nodes[key].parent = nodes[parent]
    for key, value in mapping.items():
        children = value.get("children")
        listed = [child for child in children if isinstance(child, str)] if isinstance(children, list) else []
        order = {child: place for place, child in enumerate(dict.fromkeys(listed))}
        nodes[key].children = [
            nodes[child] for child in order if child in nodes and nodes[child].parent is nodes[key]
        ]
    _adopt(nodes)
    roots = [node for node in nodes.values() if node.parent is None]
    if _num_reached(roots) != len(nodes):
        return Drop(
            "bad_value",
            f"{len(nodes)} nodes, {_num_reached(roots)} of them below a root: parents in a circle",
        )
    return roots


def _adopt(nodes: dict[str, Node]) -> None:
    """Nodes whose parent does not list them go behind its children, in the order of the file."""
    listed = {id(child) for node in nodes.values() for child in node.children}
    for node in nodes.values():
        if node.parent is not None and id(node) not in listed:
            node.parent.children.append(node)


def _num_reached(roots: list[Node]) -> int:
    count, stack = 0, list(roots)
    while stack:
        count += 1
        stack.extend(stack.pop().children)
    return count


def _node(value: dict[str, Any]) -> Node:
    message = value.get("message")
    if not isinstance(message, dict) or _is_hidden(message):
        return Node(None)
    author = message.get("author")
    name = author.get("role") if isinstance(author, dict) else None
    role = ROLE_NAMES.get(name) if isinstance(name, str) else None
    if role is None:
        return Node(None, problem=Drop("unknown_role", f"author.role is {name!r:.100}"))
    text = _text(message.get("content"))
    if isinstance(text, Drop):
        return Node(None, problem=text)
    if role == "system" and not text.strip():
        return Node(None)
    return Node(Message(role, text, _extras(message, author)))


def _is_hidden(message: dict[str, Any]) -> bool:
    content = message.get("content")
    kind = content.get("content_type") if isinstance(content, dict) else None
    return bool(_metadata(message).get("is_visually_hidden_from_conversation")) or kind in _NO_TURNS


def _metadata(message: Any) -> dict[str, Any]:
    metadata = message.get("metadata") if isinstance(message, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def _text(content: Any) -> str | Drop:
    """The parts of a text joined, or the text of code, of a tool's output, of a page that was looked up."""
    if not isinstance(content, dict):
        return Drop("bad_value", f"content is {type(content).__name__}, expected an object")
    parts = content.get("parts")
    if isinstance(parts, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if all(isinstance(text, str) for text in texts):
            return "\n\n".join(text for text in texts if text)
        return Drop("unsupported_content", f"{content.get('content_type')!r:.100} holds more than text")
    text = next((content[key] for key in _TEXT_KEYS if isinstance(content.get(key), str)), None)
    if text is None:
        return Drop(
            "unsupported_content", f"content of type {content.get('content_type')!r:.100} without a text"
        )
    return text


def _extras(message: dict[str, Any], author: Any) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if isinstance(name := author.get("name"), str) and name:
        extras["name"] = name[:200]
    recipient = message.get("recipient")
    if isinstance(recipient, str) and recipient not in ("", "all"):
        extras |= {"recipient": recipient[:200], "kind": "function_call"}
    return extras
