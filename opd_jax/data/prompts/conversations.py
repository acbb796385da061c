"""Records become conversations: messages of roles and contents, tools, and a reference answer.

Whatever a record holds is either read or refused by its number; nothing is left out in silence.
"""

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opd_jax.data.prompts import records

QUESTION_COLUMNS = ("prompt", "question", "problem")
PROMPT_COLUMNS = ("messages", *QUESTION_COLUMNS)
# What chat templates read of a message. Others, such as an id or a timestamp, are no part of a conversation.
MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")


class Conversation(NamedTuple):
    """A prompt, or for fine-tuning a prompt and its reply.

    Attributes:
      messages: each {"role", "content"}, with the other MESSAGE_FIELDS that it has.
      answer: the reference answer, None if there is none.
      tools: the functions that the assistant may call, for the chat template; None if there are none.
    """

    messages: list[dict[str, Any]]
    answer: str | None
    tools: list[Any] | None = None

    @property
    def text(self) -> str:
        """All contents, a line or more each, which tell this conversation from others."""
        return "\n".join(message["content"] for message in self.messages)


class Columns(NamedTuple):
    """Names of two columns; a dotted name reaches into nested records, and "" stands for the usual names.

    Attributes:
      prompt: column of the prompt.
      answer: column of the reference answer.
    """

    prompt: str = ""
    answer: str = ""


def conversation(record: Mapping[str, Any], columns: Columns, *, replies: bool = False) -> Conversation:
    """The conversation of a record.

    Args:
      columns: where the prompt and the answer are.
      replies: whether the last message is the assistant's, to be learnt, or another's, to be answered.

    Raises:
      ValueError, TypeError, KeyError, AttributeError: it holds none; the error says why.
    """
    names = (columns.prompt,) if columns.prompt else PROMPT_COLUMNS
    prompt = _parsed(records.first_field(record, names), Mapping)
    if prompt is None:
        raise KeyError(" or ".join(names))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif not isinstance(prompt, Sequence):
        raise TypeError(f"{prompt!r} is not a string")
    messages = [_message(message) for message in prompt]
    if not messages:
        raise ValueError("there is nothing to answer")
    if replies and (messages[-1]["role"] != "assistant" or len(messages) < 2):
        raise ValueError("the last message is not an assistant's reply")
    if not replies and messages[-1]["role"] == "assistant":
        raise ValueError("there is nothing to answer")
    answer = reference(records.field(record, columns.answer or "answer"))
    tools = _parsed(record.get("tools"), Mapping)
    if tools == "" or (isinstance(tools, float) and math.isnan(tools)):  # an empty cell
        tools = None
    if tools is not None and not isinstance(tools, list):
        raise TypeError(f"tools is {type(tools).__name__}, not a list")
    return Conversation(messages, answer, tools or None)


def reference(value: Any) -> str | None:
    """A reference answer as text; None for a missing one: null, NaN, or nothing but white space.

    Raises:
      TypeError: it is an object, or several answers.
    """
    if isinstance(value, str):
        listed = _parsed(value, str)
        if isinstance(listed, list) and len(listed) == 1:
            value = listed[0]  # ["7"], as some tools write a column of lists
    if isinstance(value, list) and len(value) <= 1:
        value = value[0] if value else None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (list, Mapping)):
        raise TypeError(f"the answer is {type(value).__name__} {value!r:.80}; give one string or number")
    return _whole(str(value)).strip() or None


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"{message!r:.80} is no message of a role and a content")
    role = message["role"]
    if not isinstance(role, str):
        raise TypeError(f"the role {role!r:.80} is not a string")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise KeyError("content")
    found = {name: message[name] for name in MESSAGE_FIELDS if message.get(name) is not None}
    return found | {"role": role, "content": _content(content)}


def _content(content: Any) -> str:
    """The text of a content: a string, or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return _whole(content)
    if not isinstance(content, list):
        raise TypeError(f"{content!r:.80} is not a string")
    texts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type", "text") != "text":
            raise TypeError(f"a content has a part of type {part['type']!r}, and only text can be read")
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise TypeError(f"{part!r:.80} is no part with a text")
        texts.append(_whole(text))
    return "".join(texts)


def _parsed(value: Any, kind: type) -> Any:
    """A list of `kind` that a cell holds as text, in JSON or as Python prints it; else the value."""
    if not isinstance(value, str) or not value.lstrip().startswith("[") or not value.rstrip().endswith("]"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and all(isinstance(item, kind) for item in found):
            return found
    if re.match(r"\s*\[\s*\{\s*['\"](?:role|content)['\"]", value):
        raise ValueError("it looks like a list of messages, and is neither JSON nor a Python literal")
    return value


def _whole(text: str) -> str:
    """The text itself.

    Raises:
      ValueError: it has half of a character, which no tokenizer can read.
    """
    half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
    if half is not None:
        raise ValueError(f"half of a character, {half!r} at position {text.index(half)}")
    return text
