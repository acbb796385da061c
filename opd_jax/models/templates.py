"""Renders chat templates, which nobody has checked, with limits of size and time.

transformers renders a template in Jinja's sandbox. That keeps it from Python's attributes and from files, but
not from `{{ 10 ** (10 ** 10) }}`, which no signal interrupts. The sandbox here refuses a step that would make
too much before it begins, and looks at the clock at every step, in any thread.
"""

import contextlib
import contextvars
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jinja2
from jinja2 import compiler, nodes, sandbox

LONGEST = 10_000_000  # characters or items of one value; the longest prompts have a tenth
ALTOGETHER = 300_000_000  # of all values of one rendering
WIDEST = 1_000_000  # a width, such as that of "x".center(width)
ITEM = 10  # an item of a list counts as so many characters
BITS = 10_000  # of an integer: three thousand digits; Python itself prints at most 4300
# Filters and methods whose result may be as long as a product of their inputs.
MULTIPLYING = ("replace", "join", "translate", "expandtabs", "indent", "wordwrap")
READING = ("length", "count", "first", "last", "default", "d", "attr", "random", "map", "select", "reject")
READING += ("selectattr", "rejectattr")  # filters that make nothing, or item by item
REORDERING = ("list", "reverse", "items", "batch", "slice")  # filters that make a list of the same items
NO_WIDTH = ("int", "float")  # filters that may be given any number
STARRED = {"%": r"%[^a-zA-Z%]*\*", "{": r"\{[^{}]*\{"}  # a place whose width is one of the values


class Stopped(Exception):
    """A template went past a limit; no filter of Jinja's catches it."""


@dataclasses.dataclass
class _Limits:
    seconds: float
    deadline: float
    left: int = ALTOGETHER


_limits: contextvars.ContextVar[_Limits | None] = contextvars.ContextVar("limits", default=None)


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Templates that transformers renders in this block, in this thread, are stopped at the limits.

    Raises:
      Stopped: in the block.
    """
    _install()
    token = _limits.set(_Limits(seconds, time.monotonic() + seconds))
    try:
        yield
    finally:
        _limits.reset(token)


def _install() -> None:
    """Makes transformers use this sandbox in the whole process; time is limited only inside `limited`."""
    from transformers.utils import chat_template_utils

    name = "ImmutableSandboxedEnvironment"
    if getattr(chat_template_utils, name) is not _Sandbox:
        setattr(chat_template_utils, name, _Sandbox)
        chat_template_utils._compile_jinja_template.cache_clear()


def _spend(size: int) -> None:
    """Counts one step that makes a value of `size` characters or items."""
    if size > LONGEST:
        raise Stopped(f"a step makes more than {LONGEST:,} characters or items")
    limits = _limits.get()
    if limits is None:
        return
    limits.left -= size
    if limits.left < 0:
        raise Stopped(f"its steps make more than {ALTOGETHER:,} characters or items")
    if time.monotonic() > limits.deadline:
        raise Stopped(f"it did not end within {limits.seconds:g} s")


def _size(value: Any, indent: int = 0) -> int:
    """About how long a value is when it is written out, counted a little past `LONGEST` at most.

    Args:
      indent: what a line of JSON is moved to the right at each level.
    """
    if isinstance(value, str | bytes):
        return len(value)
    total, left = 0, [(value, 1)]
    while left and total <= LONGEST:
        value, level = left.pop()
        total += level * indent + ITEM
        if isinstance(value, str | bytes):
            total += len(value)
        elif isinstance(value, int):
            total += value.bit_length() // 3
        elif isinstance(value, Mapping):
            left += [(item, level + 1) for item in (*value.keys(), *value.values())]
        elif isinstance(value, jinja2.utils.Namespace):
            left.append((object.__getattribute__(value, "__dict__"), level))
        elif isinstance(value, Collection):
            left += [(item, level + 1) for item in value]
    return total


def _numbers(value: Any) -> list[int]:
    """The integers anywhere in a value whose `_size` is within the limit."""
    found, left = [], [value]
    while left:
        value = left.pop()
        if isinstance(value, int):
            found.append(abs(value))
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, Collection) and not isinstance(value, str | bytes):
            left += value
    return found


def _grown(name: str, value: Any, others: Sequence[Any], *, named: bool = False) -> int:
    """At most so many characters or items does a filter or a text's method add to its inputs.

    Args:
      value: what a filter is applied to, or the text of a method; for `join`, the items.
      others: the arguments.
      named: some have names, so that their order says nothing.

    Raises:
      Stopped: one of them is a number that no width is.
    """
    if name in ("format", "format_map"):
        return _formatted(value, "{", others)
    numbers = [abs(other) for other in others if isinstance(other, int)]
    widest = max(numbers, default=0)
    if name in NO_WIDTH:
        return 0
    if widest > WIDEST:
        raise Stopped(f"{name} is given a number above {WIDEST:,}")
    if name == "tojson":
        return _size(value, widest)
    if name == "sum":  # of lists: each addition copies what is there
        return len(value) * sum(len(item) for item in value if isinstance(item, list | tuple))
    if name == "replace" and len(others) > 1 and not named:
        text, old = str(value), str(others[0])
        return text.count(old) * _size(others[1])
    if name in MULTIPLYING:
        length = len(value if hasattr(value, "__len__") else str(value))
        return (1 + length) * max(_size(others), widest if name in ("indent", "expandtabs") else 0)
    return widest


def _formatted(text: Any, mark: str, values: Sequence[Any]) -> int:
    """At most so long is a text with `values` put in where `mark`, which is % or {, stands."""
    text, size = str(text), _size(values)
    if size > LONGEST:
        return size
    widths = [int(digits[:9]) for digits in re.findall(r"\d+", text)]
    if re.search(STARRED[mark], text):
        widths += _numbers(values)
    return len(text) + text.count(mark) * max([size, *widths])


def _checked(name: str, call: Callable) -> Callable:
    """A filter that looks at the limits first."""
    first = int(hasattr(call, "jinja_pass_arg"))  # Jinja puts a context before the value

    @functools.wraps(call)
    def checked(*args, **kwargs):
        value, others = args[first], [*args[first + 1 :], *kwargs.values()]
        if name in READING:
            _spend(1)
        elif name in REORDERING:
            _spend(_grown(name, value, others) + (len(value) if hasattr(value, "__len__") else 1))
        else:
            if name in ("join", "sum"):  # of a generator
                value = list(value)
            _spend(_size(value) + _size(others))
            if name == "format":  # of the filter, value % others
                _spend(_formatted(value, "%", others))
            else:
                _spend(_grown(name, value, others, named=bool(kwargs)))
        return call(*args[:first], value, *args[first + 1 :], **kwargs)

    return checked


def _compared(call: Callable) -> Callable:
    """A test that compares, such as `is eq`, and looks at the limits first."""

    @functools.wraps(call)
    def compared(value, other):
        _weigh(value)
        return call(value, other)

    return compared


def _weigh(value: Any) -> None:
    """Refuses to compare lists that hold each other again and again."""
    if not isinstance(value, str | bytes) and _size(value) > LONGEST:
        raise Stopped(f"a comparison reads more than {LONGEST:,} characters or items")
    _spend(1)


class _Each:
    """The items of a loop, which counts them as steps."""

    def __init__(self, items: Any):
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _spend(1)
            yield item


def _asked(name: str, node: nodes.Node) -> Any:
    """The expression, passed through a method of the sandbox."""
    return nodes.Call(nodes.EnvironmentAttribute(name), [node], [], None, None).set_lineno(node.lineno)


class _Compiler(compiler.CodeGenerator):
    """Passes what no hook of the sandbox sees through it: loops, slices, comparisons, and a ~ b."""

    def visit_For(self, node: nodes.For, frame: compiler.Frame) -> None:
        node.iter = _asked("each", node.iter)
        super().visit_For(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: compiler.Frame) -> None:
        node.expr = _asked("compared", node.expr)
        super().visit_Compare(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: compiler.Frame) -> None:
        sliced = isinstance(node.arg, nodes.Slice)
        self.write("environment.written(" if sliced else "")
        super().visit_Getitem(node, frame)
        self.write(")" if sliced else "")

    def visit_Concat(self, node: nodes.Concat, frame: compiler.Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with limits."""

    code_generator_class = _Compiler
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.finalize = self.written  # what {{ }} writes out
        self.globals.pop("lipsum", None)  # makes text of any length

    def from_string(self, *args, **kwargs) -> jinja2.Template:
        self.filters = {name: _checked(name, call) for name, call in self.filters.items()}
        for name, call in self.tests.items():
            if name == "in" or getattr(call, "__module__", "") == "_operator":
                self.tests[name] = _compared(call)
        return super().from_string(*args, **kwargs)

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if numbers and operator in ("*", "**"):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > BITS:
                raise Stopped(f"{operator} makes a number of more than {BITS // 10 * 3:,} digits")
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            _spend(len(left) + len(right))
        elif operator == "*" and not numbers and (isinstance(left, int) or isinstance(right, int)):
            times, items = (left, right) if isinstance(left, int) else (right, left)
            _spend(max(times, 0) * len(items) if isinstance(items, Sized) else 1)
        elif operator == "%" and isinstance(left, str | bytes):
            _spend(_formatted(left, "%", [right]))
        else:
            _spend(1)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context, __obj, *args, **kwargs) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # what the sandbox puts before str.format
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str | bytes | int):
            named = [value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")]
            if name == "join" and args:
                args = (list(args[0]), *args[1:])
            _spend(_size(text) + _size([*args, *named]))
            if name == "join" and args:
                _spend(_grown("join", args[0], [text]))
            else:
                _spend(_grown(name, text, [*args, *named], named=bool(named)))
        else:
            _spend(1)
        return super().call(__context, __obj, *args, **kwargs)

    def each(self, items: Any) -> _Each:
        return _Each(items)

    def compared(self, value: Any) -> Any:
        _weigh(value)
        return value

    def written(self, value: Any) -> Any:
        _spend(_size(value))
        return value

    def joined(self, parts: Sequence[Any]) -> str:
        _spend(sum(map(_size, parts)))
        return "".join(map(str, parts))

    def concat(self, parts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        kept, total = [], 0
        for part in parts:
            total += len(part)
            _spend(total if total > LONGEST else len(part))
            kept.append(part)
        return "".join(kept)
