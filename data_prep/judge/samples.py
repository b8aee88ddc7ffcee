"""Samples as they come: JSON lines of chat messages, read strictly, repaired where a repair is certain, and typed.

A sample has `messages` (system, user, assistant, tool; tool calls as in OpenAI's interface), and optionally `tools` and `documents`;
its other keys are carried along untouched.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.files import Strict
from data_prep.plain_files import digest_of
from data_prep.text_files import DamagedFile, Reason, chunks, lines

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
"""All control characters but tab and line feed, and byte order marks; carriage returns are gone before."""
SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class Line:
    """One line of the input that is not blank: a sample, or something that should have been one."""

    number: int
    """From 1 over all files, blank lines not counted."""
    file: str
    line: int
    """From 1 in its file; for a file that breaks off, the line where it does."""
    value: dict[str, Any] | None
    bad: str | None
    """Why it holds no JSON object."""
    raw: bytes
    """The line as it lay there; empty where it was too long to be read."""

    @property
    def id(self) -> str:
        """The sample's `id` where it has one, else file and line."""
        given = self.value.get("id") if self.value is not None else None
        return str(given) if isinstance(given, str | int) and not isinstance(given, bool) else f"{self.file}:{self.line}"


def read_lines(paths: Sequence[Path]) -> Iterator[Line]:
    """All lines of JSON-lines files (plain, .gz, .zst), in order. Bad content never raises: it comes as a Line with `bad`."""
    number = 0
    for path in paths:
        at = 0
        try:
            for at, raw in enumerate(lines(chunks(path)), 1):
                if isinstance(raw, Reason):
                    number += 1
                    yield Line(number, str(path), at, None, str(raw), b"")
                elif raw.strip():
                    number += 1
                    value, bad = parse(raw)
                    yield Line(number, str(path), at, value, bad, raw)
        except DamagedFile as error:
            number += 1
            yield Line(number, str(path), at + 1, None, str(error), b"")


def parse(raw: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """(JSON object, None) or (None, why not). The json module and no faster one: numbers of any size must come through unchanged."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        return None, f"invalid UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    if not isinstance(value, dict):
        return None, f"a JSON {type(value).__name__}, not an object"
    return value, None


def _finite(text: str) -> float:
    """1e999 would become an infinity, which no JSON can say again."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


# --- types -----------------------------------------------------------------------------------------------------------------------


class FunctionCall(Strict):
    name: str
    arguments: dict[str, Any]


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    """Of the tool that answers."""


class Function(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments; None: a call has none."""
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"] = "function"
    function: Function


class Document(BaseModel):
    """A retrieved text with whatever else is known of it (title, doc_id ...)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    text: str


class Sample(Strict):
    messages: list[Message]
    tools: list[Tool] = Field(default_factory=list)
    documents: list[Document] = Field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As JSON, without what is not there."""
        out: dict[str, Any] = {"messages": [m.model_dump(exclude_none=True) for m in self.messages]}
        if self.tools:
            out["tools"] = [t.model_dump(exclude_none=True) for t in self.tools]
        if self.documents:
            out["documents"] = [d.model_dump() for d in self.documents]
        return out

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content in its one spelling; carried keys (id, source ...) do not count."""
        return digest_of(self.plain())

    def texts(self) -> list[str]:
        """What is said in the messages, and the text of each call's arguments."""
        calls = (call for m in self.messages for call in m.tool_calls or [])
        return [
            *(m.content for m in self.messages if m.content),
            *(json.dumps(call.function.arguments, ensure_ascii=False) for call in calls),
        ]

    def characters(self) -> int:
        """Of messages, calls, tools and documents together."""
        tools = sum(len(json.dumps(t.model_dump(exclude_none=True), ensure_ascii=False)) for t in self.tools)
        return sum(map(len, self.texts())) + sum(len(d.text) for d in self.documents) + tools


def typed(value: dict[str, Any]) -> Sample | str:
    """The sample of a (normalised) JSON object, or what is wrong with it, the first problems by key."""
    if "id" in value and (isinstance(value["id"], bool) or not isinstance(value["id"], str | int)):
        return f"id: is a {type(value['id']).__name__}; it must be a string or a whole number"
    try:
        sample = Sample.model_validate(
            {key: value[key] for key in ("messages", "tools", "documents") if value.get(key) is not None}
        )
        assert sample.sha256  # a lone surrogate is no Unicode text and has no digest
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False, include_input=False)]
        more = f" and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        return "; ".join(problems[:SHOWN_PROBLEMS]) + more
    except UnicodeEncodeError:
        return "messages: a lone surrogate, which is no Unicode text"
    except (ValueError, RecursionError) as error:
        return f"messages: {error}"
    return sample


# --- normalisation ---------------------------------------------------------------------------------------------------------------


def normalise(value: dict[str, Any], unicode_form: Literal["NFC", "NFKC"] | None) -> tuple[dict[str, Any], list[str]]:
    """(the object with every certain repair made, names of the repairs, sorted); what has another shape is left for the schema to refuse.

    parts: content given as a list of text parts is joined. wrapped: tools and calls given without their {"type": "function"}.
    arguments: arguments given as JSON text become the object. line_ends, control_characters, unicode_form, blank_ends: as they say, in
    the text of messages and documents.
    """
    repairs: set[str] = set()
    out = dict(value)
    if isinstance(value.get("messages"), list):
        out["messages"] = [_message(m, unicode_form, repairs) if isinstance(m, dict) else m for m in value["messages"]]
    if isinstance(value.get("tools"), list):
        out["tools"] = [_wrapped(t, repairs) for t in value["tools"]]
    if isinstance(value.get("documents"), list):
        out["documents"] = [_document(d, unicode_form, repairs) for d in value["documents"]]
    return out, sorted(repairs)


def _message(message: dict[str, Any], form: Any, repairs: set[str]) -> dict[str, Any]:
    out = dict(message)
    content = out.get("content")
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        out["content"] = content = "".join(part["text"] for part in content)
        repairs.add("parts")
    if isinstance(content, str):
        out["content"] = _text(content, form, repairs)
    calls = out.get("tool_calls")
    if calls == []:
        del out["tool_calls"]
        repairs.add("empty_calls")
    elif isinstance(calls, list):
        out["tool_calls"] = [_call(call, repairs) for call in calls]
    return out


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and set(part) == {"type", "text"} and part["type"] == "text" and isinstance(part["text"], str)


def _wrapped(tool: Any, repairs: set[str]) -> Any:
    if isinstance(tool, dict) and "name" in tool and "function" not in tool:
        repairs.add("wrapped")
        return {"type": "function", "function": {key: v for key, v in tool.items() if key != "type"}}
    return tool


def _call(call: Any, repairs: set[str]) -> Any:
    if isinstance(call, dict) and "name" in call and "function" not in call:
        inner = {key: call[key] for key in ("name", "arguments") if key in call}
        call = {**{key: v for key, v in call.items() if key not in inner}, "function": inner}
        repairs.add("wrapped")
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        arguments, bad = parse(function["arguments"].encode("utf-8", "surrogatepass") or b"{}")
        if bad is None:
            repairs.add("arguments")
            return {**call, "function": {**function, "arguments": arguments}}
    return call


def _document(document: Any, form: Any, repairs: set[str]) -> Any:
    if isinstance(document, str):
        repairs.add("wrapped")
        document = {"text": document}
    if isinstance(document, dict) and isinstance(document.get("text"), str):
        return {**document, "text": _text(document["text"], form, repairs)}
    return document


def _text(text: str, form: Literal["NFC", "NFKC"] | None, repairs: set[str]) -> str:
    steps = [
        ("line_ends", lambda t: t.replace("\r\n", "\n").replace("\r", "\n")),
        ("control_characters", lambda t: _CONTROL.sub("", t)),
        ("unicode_form", lambda t: unicodedata.normalize(form, t) if form and not t.isascii() else t),
        # Not blanks at the start: they may be the indent of a line of code.
        ("blank_ends", lambda t: t.rstrip().lstrip("\n")),
    ]
    for name, step in steps:
        repaired = step(text)
        if repaired != text:
            repairs.add(name)
            text = repaired
    return text
