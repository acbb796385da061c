"""What Punkt knows of each word, as a hash table built once on the host.

A word is looked up by a polynomial hash of its text. Two hashes join by one multiplication and one addition
(mod 2^32), so the hash of a word that spans tokens comes from the hashes of its parts (`tokens.py`).
"""

import numpy as np

from opd_jax.errors import UserError
from opd_jax.release.segments import punkt

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


def word_types(parameters: punkt.Parameters) -> tuple[dict[str, int], int]:
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
    for character in punkt.PUNCTUATION:
        types[character] = int(IS_PUNCTUATION)
    types = {word: flags for word, flags in types.items() if flags != UNKNOWN_WORD}
    return types, first_bit.get(NUMBER, 0) << FIRST_SHIFT


def _check_room(parameters: punkt.Parameters, firsts):
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
