"""Damages a sound input: bytes anywhere, values inside JSON, weights, templates, words of a command."""

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**40, 1e-320, 0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "-1", "7", "null", "../../etc/passwd", "/", "\x00", "\ud800"),
    *("x" * 300, "x" * 20_000, "é\u2028\n\x1b[31m", [], {}, [[]], [None], ["x"], [0, 1], {"x": 1}),
    *({"id": "x"}, [{"id": None}], {"x": {"x": []}}, [{"role": 1}], [1] * 5000),
)
SNIPPETS = (
    *("{{ messages.__class__ }}", "{{ ''.__class__.__mro__ }}", "{{ messages[9].x.y }}", "{% if %}", "{{"),
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    *("{{ 'x' * 9999999999999 }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ messages + 1 }}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "{{ x.append(1) }}", "\x00"),
    *("{{ messages.pop() }}", "{{ cycler.__init__.__globals__ }}", "{% set x = x.y %}", "{{ range(9e9) }}"),
    *(
        "{{ '%s' % (1, 2) }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ {}[[]] }}",
        "{{ 'x' | attr('__class__') }}",
    ),
    *(
        "{{ messages | tojson(indent='x') }}",
        "{{ namespace(1) }}",
        "{{ messages | sort }}",
        "{{ undefined() }}",
    ),
)
FIELDS = (
    *("train.steps", "train.micro_batch", "seed", "student.path", "student.drop_layers", "data.source"),
    *("data.heldout", "data.mixture", "data.template", "data.columns.prompt", "rollout.batch", "mesh.data"),
    *("rollout.temperature", "objective.name", "release.rule", "optimizer.learning_rate", "eval.benchmark"),
    *("rollout.end_ids", "plugins", "checkpoint.every", "train.frozen", "metrics.tensorboard", "train", "x"),
)
WORDS = (
    *("", "0", "-1", "1e400", "nan", "inf", "99999999999999999999999", "True", "None", "()", "(", "[1,", "'"),
    *(
        "{}",
        "[[1]]",
        "('a',)",
        "(1,2",
        "a b",
        "é",
        "\x01",
        "x" * 5000,
        "(" * 500,
        "-" * 9,
        "__import__('os')",
    ),
    *("1.5", "1,2", "{'a': 1}", "lambda: 0", "0x10", "1_000", "demo", "rg:", "jsonl", "preset:x", "pkg:x"),
    *("pkg:..", "random:random:x", "/", "~nobody/x", "a\nb", "%s", "$HOME", "1e-9", "*", "**"),
)


def mutate(kind: str, sound: bytes, draw: random.Random) -> bytes:
    """A damaged form of the file of one kind."""
    special: dict[str, Callable[[bytes, random.Random], bytes]] = {
        "safetensors": _safetensors,
        "chat template": _template,
        "JSONL": _jsonl,
        "override": _override,
        "GGUF": _gguf,
    }
    if kind == "override" or draw.random() < 0.7:
        if kind in special:
            return special[kind](sound, draw)
        if kind.endswith(("json", "JSON", "index")):
            return _json(sound, draw)
    return _bytes(sound, draw)


def _bytes(sound: bytes, draw: random.Random, limit: int | None = None) -> bytes:
    """Some bytes changed, removed, repeated or put in, below `limit`."""
    found = bytearray(sound)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        at = draw.randrange(min(limit or len(found), len(found)) or 1)
        length = draw.choice((1, 2, 4, 8, 100))
        what = draw.randrange(7)
        if what == 0:
            found[at : at + 1] = bytes([draw.randrange(256)])
        elif what == 1:
            del found[at : at + length]
        elif what == 2:
            found[at:at] = draw.randbytes(length)
        elif what == 3:
            found[at:at] = found[at : at + length]
        elif what == 4:
            found[at : at + length] = draw.choice((b"\x00", b"\xff", b'"', b"{", b"[", b",")) * length
        elif what == 5:
            found[at : at + 8] = struct.pack("<q", draw.choice((0, -1, 1, 2**31, 2**62, -(2**62), 255)))
        elif draw.random() < 0.3:
            del found[at:]
    return bytes(found)


def _nodes(value: Any, found: list | None = None) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON document; long lists by their first items."""
    found = [] if found is None else found
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys)[:60]:
        found.append((value, key))
        _nodes(value[key], found)
    return found


def _document(value: Any, draw: random.Random) -> str:
    """A JSON document with values replaced, removed or renamed."""
    if draw.random() < 0.04:
        return draw.choice(('[{"x":', "[", '{"x":')) * draw.choice((300, 100_000))
    if draw.random() < 0.04:
        return json.dumps(draw.choice(VALUES))
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        nodes = _nodes(value)
        if not nodes:
            break
        shallow = [node for node in nodes if node[0] is value]
        container, key = draw.choice(shallow if draw.random() < 0.5 else nodes)
        what = draw.randrange(6)
        if what == 0:
            del container[key]
        elif what == 1 and isinstance(container, dict):
            container[draw.choice(("x", "", "x" * 300, key.upper()))] = container.pop(key)
        elif what == 2:
            container[key] = copy.deepcopy(draw.choice(nodes)[0])
        else:
            container[key] = copy.deepcopy(draw.choice(VALUES))
    text = json.dumps(value)
    return text.replace('"x": 1', '"x": ' + "[" * 5000 + "]" * 5000) if draw.random() < 0.02 else text


def _json(sound: bytes, draw: random.Random) -> bytes:
    return _document(json.loads(sound), draw).encode("utf-8", "surrogatepass")


def _jsonl(sound: bytes, draw: random.Random) -> bytes:
    lines = sound.decode().splitlines()
    at = draw.randrange(len(lines))
    lines[at] = _document(json.loads(lines[at]), draw)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _safetensors(sound: bytes, draw: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", sound[:8])
    header, body = sound[8 : 8 + length], bytearray(sound[8 + length :])
    if draw.random() < 0.5:
        at = draw.randrange(len(body) // 4) * 4
        body[at : at + 4] = struct.pack("<f", draw.choice((float("nan"), float("inf"), -float("inf"))))
        return sound[: 8 + length] + bytes(body)
    changed = _document(json.loads(header), draw).encode("utf-8", "surrogatepass")
    size = draw.choice((len(changed),) * 9 + (0, 2**40, length))
    return struct.pack("<Q", size) + changed + bytes(body)


def _gguf(sound: bytes, draw: random.Random) -> bytes:
    """Mostly the header, where every byte has a meaning."""
    return _bytes(sound, draw, limit=4000 if draw.random() < 0.8 else None)


def _template(sound: bytes, draw: random.Random) -> bytes:
    text = sound.decode()
    at = draw.randrange(len(text) + 1)
    return (text[:at] + draw.choice(SNIPPETS) + text[at:]).encode()


def _override(sound: bytes, draw: random.Random) -> bytes:
    words = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        key, value = draw.choice(FIELDS), draw.choice(WORDS).replace("\n", " ")
        form = draw.randrange(12)
        key = key[:-1] if form == 0 else f"{key}[0]" if form == 1 else f"{key}.x" if form == 2 else key
        words.append(f"--config.{key}" + (f"={value}" if form != 3 else ""))
    return "\n".join(words).encode("utf-8", "surrogateescape")
