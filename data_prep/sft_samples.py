"""One chat sample of supervised fine-tuning: strictly checked, and what is refused comes with the reason that it is counted under.

A sample is a JSON object (or a Parquet row of the same keys):

    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": TEXT, ...}, ...],
     "tools": [{"type": "function", "function": {"name", "description", "parameters"}}, ...],      optional
     "documents": [{"text": TEXT, ...}, ...]}                                                      optional

TEXT is a string or a list of {"type": "text", "text": string}. An assistant's message may have `tool_calls`, each {"function": {"name",
"arguments"}} or {"name", "arguments"}, with arguments as an object or as the JSON text of one. A typing error in a key would silently
drop tools or documents from what is learned, so that unknown keys are refused; CARRIED keys of the sample are read past.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from data_prep.text_files import Reason

CARRIED = ("id", "source", "category", "language", "license", "metadata", "judge")
"""Keys of a sample that say where it is from; they do not enter the text."""
SAMPLE_KEYS = ("messages", "tools", "documents")
ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = {
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls"},
    "tool": {"role", "content", "name", "tool_call_id"},
}
FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""Role -> the roles that may speak next; None: the start."""


class Refused(ValueError):
    """Raised inside `check`; becomes a Reason."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.reason = Reason(kind, detail)


def check(
    record: Any, control_tokens: re.Pattern[str] | None, allowed: Collection[str] = (), ignored: Collection[str] = ()
) -> dict[str, Any] | Reason:
    """The sample in the form that the chat template takes (keys of SAMPLE_KEYS; null values left out), or why it is none.

    `control_tokens` matches every token that no text may spell, because the tokenizer would take it for the token: text must not end a
    turn or open a role. Those in `allowed` may stand in an assistant's text (`<think>` of a reasoning model, say). Keys in `ignored` are read
    past, as those in CARRIED.
    """
    try:
        return _checked(record, control_tokens, frozenset(allowed), {*SAMPLE_KEYS, *CARRIED, *ignored})
    except Refused as refused:
        return refused.reason


def _checked(record: Any, control_tokens: re.Pattern[str] | None, allowed: frozenset[str], keys: set[str]) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise Refused("no object", f"a JSON {type(record).__name__}, not an object")
    unknown = sorted(set(record) - keys)
    if unknown:
        raise Refused(
            "unknown key", f"{', '.join(map(str, unknown[:5]))}; known: {', '.join(sorted(keys))} (ignored_keys adds some)"
        )
    sample = {"messages": _messages(record.get("messages"))}
    names: set[str] | None = None
    if record.get("tools"):
        sample["tools"] = _tools(record["tools"])
        names = {tool.get("function", tool)["name"] for tool in sample["tools"]}
    if record.get("documents"):
        sample["documents"] = _documents(record["documents"])
    for number, message in enumerate(sample["messages"]):
        for call in message.get("tool_calls", ()):
            name = call.get("function", call)["name"]
            if names is None or name not in names:
                known = ", ".join(sorted(names)) if names else "none"
                raise Refused("undeclared tool", f"messages[{number}] calls '{name}'; tools of the sample: {known}")
    for where, text in _strings(sample):
        assistant = bool(re.match(r"messages\[\d+\]\.content", where)) and _speaker(sample, where) == "assistant"
        _check_text(where, text, control_tokens, allowed if assistant else frozenset())
    return sample


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise Refused("no messages", f"'messages' is {_shown(value)}, not a list of messages")
    messages: list[dict[str, Any]] = []
    for number, raw in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(raw, dict):
            raise Refused("bad message", f"{where} is a {type(raw).__name__}, not an object")
        message = _present(raw)
        role = message.get("role")
        if role not in ROLES:
            raise Refused("bad role", f"{where}.role is {_shown(role)}; one of {', '.join(ROLES)}")
        unknown = sorted(set(message) - MESSAGE_KEYS[role])
        if unknown:
            raise Refused(
                "unknown key", f"{where} ({role}) has {', '.join(unknown[:5])}; known: {', '.join(sorted(MESSAGE_KEYS[role]))}"
            )
        before = messages[-1] if messages else None
        allowed = FOLLOWS[before["role"] if before else None]
        if role not in allowed:
            after = f"after {before['role']}" if before else "first"
            raise Refused("order of roles", f"{where} is {role} {after}; there may be {' or '.join(allowed)}")
        if role == "tool" and before is not None and before["role"] == "assistant" and not before.get("tool_calls"):
            raise Refused(
                "order of roles", f"{where} is a tool's answer, and {where.replace(str(number), str(number - 1))} calls none"
            )
        content = message.get("content")
        if content is None and not (role == "assistant" and message.get("tool_calls")):
            raise Refused("no content", f"{where}.content is missing")
        if content is not None:
            _check_content(where, content)
        if role == "assistant":
            if not message.get("tool_calls"):
                message.pop("tool_calls", None)
                if not content or not _joined(content).strip():
                    raise Refused("empty answer", f"{where} says nothing and calls nothing")
            else:
                message["tool_calls"] = _calls(where, message["tool_calls"])
        messages.append(message)
    return messages


def _check_content(where: str, content: Any) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise Refused("bad content", f"{where}.content is {_shown(content)}, neither a string nor a list of text parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str) or len(part) != 2:
            raise Refused(
                "bad content", f"{where}.content has a part {_shown(part)}; only {{'type': 'text', 'text': ...}} is text"
            )


def _joined(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _calls(where: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise Refused("bad tool call", f"{where}.tool_calls is {_shown(value)}, not a list")
    calls = []
    for number, raw in enumerate(value):
        place = f"{where}.tool_calls[{number}]"
        if not isinstance(raw, dict):
            raise Refused("bad tool call", f"{place} is {_shown(raw)}, not an object")
        call = _present(raw)
        function = call.get("function", call)
        known = {"id", "type", "function"} if "function" in call else {"id", "type", "name", "arguments"}
        if set(call) - known or call.get("type", "function") != "function" or not isinstance(function, dict):
            raise Refused("bad tool call", f"{place} is {_shown(raw)}; it needs a function with name and arguments")
        name, arguments = function.get("name"), function.get("arguments", {})
        if not isinstance(name, str) or not name or ("function" in call and set(function) - {"name", "arguments"}):
            raise Refused("bad tool call", f"{place} is {_shown(raw)}; it needs a function with name and arguments")
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except ValueError as error:
                raise Refused("bad arguments", f"{place}: arguments are no JSON ({error})") from None
        else:
            parsed = arguments
        if not isinstance(parsed, dict):
            raise Refused("bad arguments", f"{place}: arguments are {_shown(parsed)}, not an object")
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def _tools(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise Refused("bad tools", f"'tools' is {_shown(value)}, not a list")
    tools = []
    for number, raw in enumerate(value):
        tool = _present(raw) if isinstance(raw, dict) else {}
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Refused("bad tools", f"tools[{number}] is {_shown(raw)}; it needs a function with a name")
        function = _present(function)
        if not isinstance(function.get("parameters", {}), dict):
            raise Refused("bad tools", f"tools[{number}].parameters is {_shown(function['parameters'])}, not a JSON schema")
        tools.append({**tool, "function": function} if "function" in tool else function)
    return tools


def _present(values: dict[str, Any]) -> dict[str, Any]:
    """Without null values, which Arrow gives to every key that a row lacks."""
    return {key: value for key, value in values.items() if value is not None}


def _documents(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise Refused("bad documents", f"'documents' is {_shown(value)}, not a list")
    for number, document in enumerate(value):
        if not isinstance(document, dict) or not isinstance(document.get("text"), str):
            raise Refused("bad documents", f"documents[{number}] is {_shown(document)}; it needs a text")
    return value


def _strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(place, text) of every string of a JSON value, keys included."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise Refused("bad key", f"{where} has the key {_shown(key)}")
            yield f"{where}.{key} (key)", key
            yield from _strings(inner, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _strings(inner, f"{where}[{number}]")


def _speaker(sample: dict[str, Any], where: str) -> str:
    number = int(where[len("messages[") : where.index("]")])
    return sample["messages"][number]["role"]


def _check_text(where: str, text: str, control_tokens: re.Pattern[str] | None, allowed: frozenset[str]) -> None:
    if "\0" in text:
        raise Refused("NUL character", f"{where} holds a NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refused("lone surrogate", f"{where} has a lone surrogate at character {error.start}") from None
    if control_tokens is not None:
        for found in control_tokens.finditer(text):
            if found[0] not in allowed:
                raise Refused("control token", f"{where} spells {found[0]}, which the tokenizer takes for the token")


def control_tokens(special: Collection[str]) -> re.Pattern[str] | None:
    """What `check` looks for: any of these tokens, the longest first; None without any."""
    names = sorted(special, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, names))) if names else None


def from_parquet(row: dict[str, Any]) -> dict[str, Any]:
    """A Parquet row as a record: absent columns are no keys, and messages, tools or documents may be JSON text."""
    record = {key: value for key, value in row.items() if value is not None}
    for key in SAMPLE_KEYS:
        if isinstance(record.get(key), str):
            record[key] = _or_as_it_is(json.loads, record[key])
    return record


def _or_as_it_is(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError:
        return text  # `check` refuses it with its reason


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
