"""What Punkt's decisions need of each token, as an array built once on the host.

NLTK splits at all white space, with one exception: of the sentence-final characters between two ASCII white
spaces ("hard" ones here), only the last one counts.

The words before and after a sentence-final character may span tokens. So a token has the parts that can join
with parts of other tokens: its head, up to its first word boundary; its tail, after the last one; and the
stem of a word that ends at its sentence-final character. Each part is a polynomial hash (`words.py`). A token
also has some flags.
"""

import re
import string

import numpy as np

from opd_jax.release.segments import punkt
from opd_jax.release.segments.words import word_hash

_ALONE_AT_START = frozenset(punkt.NOT_AT_START) - frozenset(punkt.NON_WORD)

_PASSING = re.compile(r"[?!](?=,$|--|\.\.)|(?<!\.)\.(?=,$|--)")
_CLOSERS_DASHES = re.compile(f"[{re.escape(punkt.CLOSERS)}]+--")
_CRY_BEFORE_RUN = re.compile(rf"[?!]{punkt.RUN}")

# Flags of a token. "Core": its characters without the white space around them.
(
    CORE,  # has one
    LEAD,  # white space before the core
    TRAIL,  # white space after it
    SPLIT_BEFORE,  # its first character starts a word even after a letter
    CLOSED_END,  # a character that follows it starts a word
    MANY_WORDS,  # a word boundary inside the core
    LONE_SOFT,  # one character that is a word at a word's start, and a part of the word elsewhere
    LONE_COMMA,  # the comma, one of these; it is also a word before NON_WORD and at a chunk's end
    FIRST_NON_WORD,
    FIRST_PUNCTUATION,
    FIRST_UPPER,
    FIRST_LOWER,
    LAST_DOT,
    ALL_CLOSERS,
    DASHES,  # starts with --
    DOTS,  # starts with ..
    MARK,  # ends with a sentence-final character, or has one before a NON_WORD character
    MARK_INSIDE,  # ... has one before a NON_WORD character
    MARK_EARLIER,  # a mark at the core's end has another one before it
    MARK_IN_DOUBT,  # it is a full stop, and no ! or ? before it decides
    MARK_ELLIPSIS,  # ... after another full stop
    MARK_SPLIT,  # the word of the full stop starts inside the token
    MARK_HYPHEN,  # ... and has a hyphen inside the token
    MARK_PUNCTUATION,  # the NON_WORD character is one of PUNCTUATION
    REST_CLOSERS,  # only closers after a mark inside
    TAIL_HYPHEN,  # the tail has a hyphen
    HARD_BEFORE,  # ASCII white space before the core, or in a token without one
    HARD_AFTER,  # ASCII white space after the core
    FIRST_MARK,  # the core starts with its only mark, or is one
    FIRST_MARK_OF_MORE,  # the core starts with a mark before NON_WORD and has another
    PASSING,  # no mark, but a sentence-final character that ends a word: before a run, or a comma at the end
    CLOSERS_DASHES,  # starts with closers and --
) = (np.uint32(1 << i) for i in range(32))

# Traits of a part of a word. The traits of a joined word are their union, except for SECOND.
(NOT_NUMERIC, DIGIT, FIRST, SECOND, NOT_LETTER) = (np.uint32(1 << i) for i in range(5))

# Columns of a token's row.
FLAGS, TRAITS, TAIL, TAIL_POWER, HEAD, HEAD_POWER, STEM, STEM_POWER = range(8)
NO_TEXT = [int(HARD_BEFORE), 0, 0, 1, 0, 1, 0, 1]  # a row of empty parts, whose power is 1
WIDE_SPACE = [0, *NO_TEXT[1:]]
STEM_SHIFT = 8  # in TRAITS, the stem's traits lie above the tail's
TRAITS_MASK = (1 << 13) - 1  # above both are the bytes of a multi-byte white space that a token has:
PIECE_HARD, PIECE_BYTES_SHIFT, PIECE_SHIFT = np.uint32(1 << 13), 14, 16  # how many bytes, and which

# Byte-level vocabularies may split a character of several bytes into several tokens.
WIDE_SPACES = sorted(chr(code).encode() for code in range(0x80, 0x3001) if chr(code).isspace())


def token_rows(token_bytes: list[bytes], base: int) -> np.ndarray:
    """uint32 [V, 8]: the columns FLAGS to STEM_POWER of each token, hashed with `base`.

    A token without text stands for white space. A token with white space between characters stands for its
    last chunk; the byte-level vocabularies of Qwen and SmolLM2 have none. Incomplete characters are neither
    letters nor punctuation.
    """
    return np.array([_token_row(entry, base) for entry in token_bytes], np.uint32)


def _token_row(entry: bytes, base: int) -> list[int]:
    text = entry.decode("utf-8", "surrogateescape")
    chunks = punkt.split_chunks(text)
    if not chunks:
        return NO_TEXT if not text or _has_hard(text) else WIDE_SPACE
    core = chunks[-1]
    space_before, _, space_after = text.rpartition(core)
    # A letter is put before it, to see whether a word boundary is before the first character.
    words = punkt.split_words("a" + core)
    split_before = words[0] == "a"
    words = words[1:] if split_before else [words[0][1:], *words[1:]]
    tail = words[-1]
    soft = core in _ALONE_AT_START
    flags = {
        CORE: True,
        LEAD: punkt.is_space(text[0]) or len(chunks) > 1,
        TRAIL: punkt.is_space(text[-1]),
        SPLIT_BEFORE: split_before and core != ",",
        CLOSED_END: not soft and (tail in punkt.ALWAYS_ALONE or tail == "," or _is_run(tail)),
        MANY_WORDS: len(words) > 1,
        LONE_SOFT: soft,
        LONE_COMMA: core == ",",
        FIRST_NON_WORD: core[0] in punkt.NON_WORD,
        FIRST_PUNCTUATION: core[0] in punkt.PUNCTUATION,
        FIRST_UPPER: core[0].isupper(),
        FIRST_LOWER: core[0].islower(),
        LAST_DOT: core[-1] == ".",
        ALL_CLOSERS: all(character in punkt.CLOSERS for character in core),
        DASHES: core.startswith("--"),
        DOTS: core.startswith(".."),
        TAIL_HYPHEN: "-" in tail,
        HARD_BEFORE: _has_hard(space_before),
        HARD_AFTER: _has_hard(space_after),
        CLOSERS_DASHES: bool(_CLOSERS_DASHES.match(core)),
    }
    stem, stem_traits = "", 0
    mark = _last_mark(core)
    passing = None if mark is not None else _last_passing(core)
    stop = passing if mark is None else mark
    if stop is not None:
        after = core[stop + 1 :]
        *before, last = punkt.split_words("a" + core[: stop + 1])
        stem = last[:-1] if before else last[1:-1]
        flags |= {
            MARK: mark is not None,
            PASSING: mark is None,
            MARK_INSIDE: mark is not None and bool(after),
            MARK_IN_DOUBT: core[stop] == "." and not _CRY_BEFORE_RUN.search(core[: stop + 1]),
            MARK_ELLIPSIS: core[:stop].endswith("."),
            MARK_SPLIT: bool(before),
            MARK_HYPHEN: "-" in stem,
            MARK_PUNCTUATION: after[:1] in tuple(punkt.PUNCTUATION),
            REST_CLOSERS: bool(after) and all(character in punkt.CLOSERS for character in after),
            FIRST_MARK: mark == 0,
            FIRST_MARK_OF_MORE: bool(mark) and _last_mark(core, 1) == 0,
            MARK_EARLIER: not after and _last_mark(core, mark) is not None,
        }
        stem_traits = _traits(stem)
    return [
        sum(int(flag) for flag, is_set in flags.items() if is_set),
        _traits(tail) | stem_traits << STEM_SHIFT | _space_piece(entry),
        *_part(tail.rpartition("-")[2], base),
        *_part(words[0], base),
        *_part(stem.rpartition("-")[2], base),
    ]


def _space_piece(entry: bytes) -> int:
    """Bits of a token that is one or two bytes of a white space; ASCII white space may be outside of them."""
    piece = entry.strip()
    if not 0 < len(piece) < 3:
        return 0
    starts, ends = entry.startswith(piece), entry.endswith(piece)

    def is_piece_of(space):
        if len(piece) == len(space):
            return False
        outer = (starts and space.endswith(piece)) or (ends and space.startswith(piece))
        return outer or (entry == piece and piece in space)

    if not any(map(is_piece_of, WIDE_SPACES)):
        return 0
    bits = int.from_bytes(piece, "big") << PIECE_SHIFT | len(piece) << PIECE_BYTES_SHIFT
    return bits | int(PIECE_HARD) * (piece != entry)


def _has_hard(text: str) -> bool:
    return any(character in string.whitespace for character in text)


def _is_run(word: str) -> bool:
    return len(word) > 1 and (not word.strip("-") or not word.strip("."))


def _last_mark(core: str, before: int | None = None) -> int | None:
    """Index of the last sentence-final character at the core's end or before NON_WORD."""
    for i in reversed(range(len(core))[:before]):
        if core[i] in punkt.SENTENCE_END and (i + 1 == len(core) or core[i + 1] in punkt.NON_WORD):
            return i
    return None


def _last_passing(core: str) -> int | None:
    """Index of the last sentence-final character that ends a word but is not a mark."""
    return max((match.start() for match in _PASSING.finditer(core)), default=None)


def _part(text: str, base: int) -> tuple[int, int]:
    return word_hash(text.lower(), base), pow(base, len(text.lower()), 1 << 32)


def _traits(text: str) -> int:
    """Traits of a part of a word; the bytes inside a character do not count as characters."""
    count = sum(not "\udc80" <= character <= "\udcbf" for character in text)
    return int(
        NOT_NUMERIC * any(not (c.isdecimal() or c in ",.-") for c in text)
        | DIGIT * any(c.isdecimal() for c in text)
        | FIRST * (count > 0)
        | SECOND * (count > 1)
        | NOT_LETTER * any(not (c.isalpha() or c == "_") for c in text)
    )
