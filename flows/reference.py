"""`sft-pipeline schema`: the JSON schema of a config for editors, and docs/configuration.md, both from the models."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from schemas.pipeline_config import PipelineConfig

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
Node = Mapping[str, Any]

HEAD = """\
# Configuration

Every key of a config file, with its type, its default and what it does. A config is YAML 1.2; a key that is left
out has its default, an unknown key is refused with the nearest known one. `--set section.key=value` overrides a key
for one command, and the resolved config lies in `<run root>/config.json`. Relative paths are taken from the config
file's folder.

A small one:

```yaml
run_root: runs/first
sources:
  - {name: chats, path: dumps/chats.json}
model: {path: models/my-model}
```

Editors that know JSON Schema complete and check keys with this as the config's first line, after
`sft-pipeline schema > sft-pipeline.schema.json`:

```yaml
# yaml-language-server: $schema=sft-pipeline.schema.json
run_root: runs/first
sources: [{name: chats, path: dumps/chats.json}]
```

This page is written by `sft-pipeline schema --markdown`.
"""


def schema_text() -> str:
    """The JSON schema; it knows types, limits and choices, not what two keys forbid each other."""
    schema = {"$schema": SCHEMA_DIALECT, "title": "sft-pipeline", **_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def reference_page() -> str:
    """docs/configuration.md."""
    return "\n".join([HEAD, *_page_lines()])


def _schema() -> dict[str, Any]:
    # Without the title that the class would give.
    schema = PipelineConfig.model_json_schema()
    return {name: value for name, value in schema.items() if name != "title"}


def _page_lines() -> Iterator[str]:
    schema = _schema()
    plain = {name: node for name, node in schema["properties"].items() if _section(schema, node) is None}
    yield from _table("Top level", "", schema, plain, required=schema["required"])
    for name, node in schema["properties"].items():
        section = _section(schema, node)
        if section is None:
            continue
        is_list = node.get("type") == "array"
        title = f"{name} (a list)" if is_list else name
        prefix = f"{name}[]." if is_list else f"{name}."
        yield from _table(title, prefix, schema, section["properties"], required=section.get("required", []))


def _table(
    title: str, prefix: str, schema: Node, properties: Mapping[str, Node], *, required: list[str]
) -> Iterator[str]:
    yield f"## {title}\n"
    yield "| Key | Type | Default | What it does |"
    yield "|---|---|---|---|"
    for name, node in properties.items():
        yield from _rows(f"{prefix}{name}", schema, node, is_required=name in required)
    yield ""


def _rows(key: str, schema: Node, node: Node, *, is_required: bool) -> Iterator[str]:
    section = _section(schema, node)
    if section is not None and node.get("type") != "array":
        for name, inner in section["properties"].items():
            yield from _rows(f"{key}.{name}", schema, inner, is_required=False)
        return
    default = "required" if is_required else f"`{_yaml(node.get('default', _empty(node)))}`"
    about = " ".join(str(node.get("description", "")).split())
    yield f"| `{key}` | {_cell(_type(schema, node))} | {default} | {_cell(about)} |"


def _section(schema: Node, node: Node) -> Node | None:
    """The model behind a key: its own, that of a list's items, or that of an optional section."""
    for found in (node, node.get("items", {}), *node.get("anyOf", ())):
        if "$ref" in found:
            target: Node = schema["$defs"][found["$ref"].rpartition("/")[2]]
            return target if "properties" in target else None
    return None


_TYPES = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
    "null": "null",
}
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _type(schema: Node, node: Node) -> str:
    if "$ref" in node:
        return _type(schema, schema["$defs"][node["$ref"].rpartition("/")[2]])
    if "anyOf" in node:
        return " or ".join(_type(schema, choice) for choice in node["anyOf"])
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        inner = node.get("items", {})
        return "list of sources" if "$ref" in inner else f"list of {_type(schema, inner)}"
    if node.get("type") == "object":
        values = [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]
        inner = next(value for value in values if isinstance(value, Mapping))
        return f"name: {_type(schema, inner)}"
    limits = " and ".join(f"{sign} {node[name]:g}" for name, sign in _LIMITS.items() if name in node)
    return f"{_TYPES[node['type']]} {limits}".strip() if "type" in node else "text"


def _empty(node: Node) -> Any:
    return {"array": [], "object": {}}.get(str(node.get("type")))


def _yaml(value: Any) -> str:
    return (value or '""') if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
