"""Deterministic rules: each is a pure function of one sample that says why it is refused, or None. Duplicates are in duplicates.py.

The order is that of RULES; the first finding counts. `schema` comes before them all (samples.typed): a sample without a type cannot be
asked anything.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from data_prep.judge.config import Curation
from data_prep.judge.samples import Message, Sample, Tool
from data_prep.optional import need
from data_prep.special_tokens import TOOLS

CONTROL_TOKEN = re.compile(r"<[|｜][A-Za-z0-9_▁]{1,40}[|｜]>|" + "|".join(map(re.escape, TOOLS)))
"""Granite's control tokens, those of other chat templates that are spelled alike (they leak from scraped transcripts), and Granite's
tags around calls, which are tokens too."""
PATTERN_SECONDS = 1.0
"""For checking one call whose schema holds regular expressions: a hostile one can take for ever, an honest one takes microseconds."""


@dataclass(frozen=True)
class Finding:
    """Why a sample is refused: `reason` is what counts are kept by."""

    reason: str
    detail: str


Rule = Callable[[Sample, Curation], Finding | None]


def turn_order(sample: Sample, curation: Curation) -> Finding | None:
    """[system] (user (assistant with calls, their tools' answers)* assistant)+: the form that the chat template trains on.

    Every call that has an id is answered under this id, calls without one in their order; nobody else answers.
    """
    messages = sample.messages
    if not messages:
        return Finding("turn order", "no messages")
    turns = messages[1:] if messages[0].role == "system" else messages
    first = len(messages) - len(turns)
    open_calls: list[str | None] = []
    last = ""
    for number, message in enumerate(turns, first):
        role = message.role
        expected = "tool" if open_calls else {"": "user", "user": "assistant", "tool": "assistant", "assistant": "user"}[last]
        if role != expected:
            return Finding("turn order", f"messages.{number}: {role}, expected {expected}")
        if problem := _shape(message):
            return Finding("turn order", f"messages.{number}: {problem}")
        if role == "assistant" and message.tool_calls:
            open_calls = [call.id for call in message.tool_calls]
            if max(Counter(c for c in open_calls if c is not None).values(), default=0) > 1:
                return Finding("turn order", f"messages.{number}: two calls have the same id")
        elif role == "tool":
            if message.tool_call_id in open_calls:
                open_calls.remove(message.tool_call_id)
            elif message.tool_call_id is None or None in open_calls:
                open_calls.pop(0)
            else:
                return Finding("turn order", f"messages.{number}: answers call {message.tool_call_id!r}, which is not open")
        last = role
    if last != "assistant":
        return Finding("turn order", f"ends with {last or 'system'}, not with an answer")
    return None


def _shape(message: Message) -> str | None:
    if message.role != "assistant" and message.tool_calls:
        return f"a {message.role} message with tool calls"
    if message.role != "tool" and message.tool_call_id is not None:
        return f"a {message.role} message with tool_call_id"
    if message.content is None and not message.tool_calls:
        return "neither content nor tool calls"
    return None


def lengths(sample: Sample, curation: Curation) -> Finding | None:
    """Too many messages or characters, an answer too short or too long, an empty question."""
    if len(sample.messages) > curation.max_messages:
        return Finding("too many messages", f"{len(sample.messages)}, at most {curation.max_messages}")
    characters = sample.characters()
    if characters > curation.max_characters:
        return Finding("too long", f"{characters} characters, at most {curation.max_characters}")
    for number, message in enumerate(sample.messages):
        length = len((message.content or "").strip())
        if message.role == "user" and not length:
            return Finding("empty question", f"messages.{number}")
        if message.role == "assistant":
            if length < curation.min_answer_characters and not message.tool_calls:
                return Finding("answer too short", f"messages.{number}: {length}, at least {curation.min_answer_characters}")
            if length > curation.max_answer_characters:
                return Finding("answer too long", f"messages.{number}: {length}, at most {curation.max_answer_characters}")
    return None


def control_tokens(sample: Sample, curation: Curation) -> Finding | None:
    """Text that spells a control token, which the tokenizer of a chat takes for the token itself."""
    if not curation.control_tokens:
        return None
    # Names, titles and descriptions too: the chat template writes them all. JSON's escapes leave these spellings as they are.
    found = CONTROL_TOKEN.search(json.dumps(sample.plain(), ensure_ascii=False))
    return Finding("control token", found[0]) if found else None


def tool_calls(sample: Sample, curation: Curation) -> Finding | None:
    """Calls of tools that there are, with arguments that their JSON schema allows; tools with a valid schema and different names."""
    if not sample.tools and not any(m.tool_calls for m in sample.messages):
        return None
    names = Counter(tool.function.name for tool in sample.tools)
    if twice := [name for name, count in names.items() if count > 1]:
        return Finding("tool schema", f"two tools are called {twice[0]}")
    for tool in sample.tools:
        if problem := schema_problem(tool):
            return Finding("tool schema", f"{tool.function.name}: {problem}")
    tools = {tool.function.name: tool for tool in sample.tools}
    for number, message in enumerate(sample.messages):
        for call in message.tool_calls or []:
            name = call.function.name
            if name not in tools:
                return Finding("unknown tool", f"messages.{number}: {name}; there are {', '.join(tools) or 'none'}")
            if problem := arguments_problem(tools[name], call.function.arguments):
                return Finding("tool arguments", f"messages.{number}: {name}: {problem}")
    return None


def schema_problem(tool: Tool) -> str | None:
    """What is wrong with the JSON schema of a tool's parameters (JSON Schema 2020-12 where it names no other draft)."""
    jsonschema = need("jsonschema")
    schema = tool.function.parameters
    if schema is None:
        return None
    try:
        _validator_class(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        return f"no JSON schema: {_short(error)}"
    except Exception as error:  # whatever a hostile schema makes of the checker, the sample is refused with it
        return f"no JSON schema: {type(error).__name__}: {error}"
    if schema.get("type", "object") != "object":
        return f"its parameters are of type {schema['type']!r}, not object"
    return None


def arguments_problem(tool: Tool, arguments: dict[str, Any]) -> str | None:
    """Why the tool's schema does not allow these arguments. References to other files or the network are never followed."""
    schema = tool.function.parameters
    if schema is None:
        return f"takes no arguments, got {', '.join(arguments)}" if arguments else None
    try:
        with _time_limit(PATTERN_SECONDS):
            error = next(_validator_class(schema)(schema, registry=_no_references()).iter_errors(arguments), None)
    except TimeoutError:
        return f"its schema could not be checked within {PATTERN_SECONDS:.0f} s"
    except Exception as error:  # an unresolvable reference, endless recursion, a pattern that is no regular expression
        return f"its schema cannot be applied: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None if error is None else _short(error)


def _short(error: Any) -> str:
    where = ".".join(map(str, error.absolute_path))
    message = error.message if len(error.message) <= 200 else error.message[:199] + "…"
    return f"{where}: {message}" if where else message


def _validator_class(schema: dict[str, Any]) -> Any:
    jsonschema = need("jsonschema")
    return jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)


@cache
def _no_references() -> Any:
    from referencing import Registry

    return Registry()  # without one, jsonschema asks the network


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after `seconds`, in the main thread; elsewhere there is no limit. Python's re looks for signals while it searches."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


RULES: dict[str, Rule] = {
    "turn_order": turn_order,
    "lengths": lengths,
    "control_tokens": control_tokens,
    "tool_calls": tool_calls,
}
"""After `readable` and `schema`, before `leakage`, `exact_duplicates` and `near_duplicates`."""


def first_finding(sample: Sample, curation: Curation) -> tuple[str, Finding] | None:
    """(rule, finding) of the first rule that refuses the sample."""
    for name, rule in RULES.items():
        if finding := rule(sample, curation):
            return name, finding
    return None
