"""The page at ``/docs``: the description of the API as plain HTML, without a script."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; --accent: #1a5fb4; }
@media (prefers-color-scheme: dark) { :root { --accent: #82b4f5; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1.5rem 1rem; }
a { color: var(--accent); }
h2 { margin-top: 2.5rem; }
h3 { margin: 2rem 0 .25rem; overflow-wrap: anywhere; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: .5rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; }
tr { border-bottom: 1px solid var(--line); }
td:first-child { white-space: nowrap; }
@media (max-width: 40rem) {
  thead { display: none; }
  tr, td { display: block; }
  td { padding: .1rem 0; }
}
:target { background: var(--soft); }
"""

_BOUNDS = {
    "minimum": "&ge; {:g}",
    "exclusiveMinimum": "&gt; {:g}",
    "maximum": "&le; {:g}",
    "exclusiveMaximum": "&lt; {:g}",
    "minLength": "length &ge; {}",
}


def reference(schema: Mapping[str, Any]) -> str:
    """Return the page.

    Parameters
    ----------
    schema
        An OpenAPI description, as FastAPI makes it.
    """
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]
    models = schema["components"]["schemas"].items()
    index = "".join(f"<li>{_link(name)}</li>" for name, _ in operations)
    body = "".join(_operation(name, operation) for name, operation in operations)
    objects = "".join(_model(name, model) for name, model in models)
    title = escape(f"{schema['info']['title']} {schema['info']['version']}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1><p>{_prose(schema['info'].get('description', ''))}</p>"
        '<p>For machines: <a href="openapi.json">openapi.json</a>. <a href="./">Try a prompt</a>.'
        f"</p><ul>{index}</ul>{body}<h2>Objects</h2>{objects}</body></html>"
    )


def _operation(name: str, operation: Mapping[str, Any]) -> str:
    parts = [_heading(name), f"<p>{_prose(operation.get('description', ''))}</p>"]
    if "security" in operation:
        parts.append("<p>Key: <code>Authorization: Bearer KEY</code>, if the server has one.</p>")
    for parameter in operation.get("parameters", ()):
        place = f"in the {parameter['in']}, {_type(parameter['schema'])}"
        parts.append(f"<p><code>{escape(parameter['name'])}</code>: {place}</p>")
    if "requestBody" in operation:
        parts.append(f"<p>Body: {_content(operation['requestBody'])}</p>")
    answers = (
        (escape(status), _content(answer), _prose(answer["description"]))
        for status, answer in operation["responses"].items()
    )
    return "".join(parts) + _table(("status", "body", ""), answers)


def _model(name: str, model: Mapping[str, Any]) -> str:
    needed = model.get("required", ())
    rows = (
        (
            f"<code>{escape(key)}</code>{'' if key in needed else ' ?'}",
            _type(value),
            _prose(value.get("description", "")),
        )
        for key, value in model.get("properties", {}).items()
    )
    about = f"<p>{_prose(model.get('description', ''))}</p>"
    return _heading(name) + about + _table(("field (?: may be left out)", "type", ""), rows)


def _content(holder: Mapping[str, Any]) -> str:
    found = []
    for media, content in holder.get("content", {}).items():
        schema = content.get("schema")
        if schema is None:  # of a stream
            schema = content["itemSchema"]["properties"]["data"]["anyOf"][0]["contentSchema"]
        found.append(f"<code>{escape(media)}</code>: {_type(schema)}")
    return "<br>".join(found)


def _type(schema: Mapping[str, Any]) -> str:
    """A schema in a few words, with links to the objects in it."""
    if "$ref" in schema:
        return _link(schema["$ref"].rpartition("/")[2])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            words = " or ".join(_type(member) for member in schema[union])
            break
    else:
        if "const" in schema or "enum" in schema:
            values = schema.get("enum", [schema.get("const")])
            words = " or ".join(f"<code>{escape(repr(value))}</code>" for value in values)
        elif schema.get("type") == "array":
            words = f"list of {_type(schema['items'])}" if schema.get("items") else "list"
        else:
            words = escape(str(schema.get("type", "anything")))
    bounds = [text.format(schema[key]) for key, text in _BOUNDS.items() if key in schema]
    return ", ".join([words, *bounds])


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>" if lines else ""


def _heading(name: str) -> str:
    return f'<h3 id="{_anchor(name)}">{escape(name)}</h3>'


def _link(name: str) -> str:
    return f'<a href="#{_anchor(name)}">{escape(name)}</a>'


def _anchor(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-")


def _prose(text: str) -> str:
    return re.sub(r"`+([^`]+)`+", r"<code>\1</code>", escape(text.strip()))
