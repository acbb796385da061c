"""Finds sentences on device as NLTK's Punkt does: token ids in, the first token of each sentence out.

It uses only gathers, shifts, and scans over positions: no text, and nothing on the host. `tokens.py`
describes the row of a token; `docs/segments.md` explains how the parts work together.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from opd_jax.release.segments import punkt, scans, tokens, words


@flax.struct.dataclass
class SentenceTable:
    """Data about a vocabulary for Punkt's decisions; built once on the host, then kept on device.

    Attributes:
      token_VC: uint32 [V, 8], a row for each token id: tokens.token_rows.
      word_HW: uint32 hash table of word types: words.bucket_table.
      number_first: uint32, the collocation mask of a number before a full stop.
    """

    token_VC: jax.Array
    word_HW: jax.Array
    number_first: jax.Array

    @classmethod
    def build(cls, token_bytes: list[bytes], parameters: punkt.Parameters) -> "SentenceTable":
        """Builds the table of a vocabulary from the bytes of each token id (b"" for a special token)."""
        types, number_first = words.word_types(parameters)
        base = words.hash_base(types)
        return cls(
            token_VC=jnp.asarray(tokens.token_rows(token_bytes, base)),
            word_HW=jnp.asarray(words.bucket_table(types, base)),
            number_first=jnp.uint32(number_first),
        )


def first_tokens(table: SentenceTable, tokens_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """bool [B, T]: the first token of each sentence but the first.

    Args:
      tokens_BT: int32 token ids. Ids past the table's end are read as its last token.
      mask_BT: bool, response tokens; others are read as white space.
    """
    row_BTC = jnp.take(table.token_VC, tokens_BT, axis=0, mode="clip")
    row_BTC = _join_spaces(jnp.where(mask_BT[:, :, None], row_BTC, _WHITE_SPACE_11C))
    text = _Text(row_BTC)
    return _first_tokens(text, *_sentence_breaks(table, row_BTC, text))


_ENDS_WORD = tokens.FIRST_NON_WORD | tokens.DASHES | tokens.DOTS  # at the start of the next token
_WHITE_SPACE_11C = np.array([[tokens.NO_TEXT]], np.uint32)
_WIDE_SPACE_11C = np.array([[tokens.WIDE_SPACE]], np.uint32)
_WIDE_SPACES_11N = np.array([[[int.from_bytes(space, "big") for space in tokens.WIDE_SPACES]]], np.uint32)


def _join_spaces(row_BTC):
    """Replaces the rows of two or three tokens that together spell one white space by rows of white space."""
    traits_BT = row_BTC[:, :, tokens.TRAITS]
    first = traits_BT >> tokens.PIECE_SHIFT, traits_BT >> tokens.PIECE_BYTES_SHIFT & 3
    second = tuple(scans.following(x_BT, 0) for x_BT in first)
    third = tuple(scans.following(x_BT, 0) for x_BT in second)

    def joined(*pieces):
        """Which are white space; a lead byte starts a character, whatever comes before it."""
        value_BT, complete_BT = jnp.uint32(0), True
        for piece_BT, bytes_BT in pieces:
            value_BT = value_BT << 8 * bytes_BT | piece_BT
            complete_BT &= bytes_BT > 0
        return complete_BT & jnp.any(value_BT[..., None] == _WIDE_SPACES_11N, axis=-1)

    pair_BT, triple_BT = joined(first, second), joined(first, second, third)
    space_BT = pair_BT | triple_BT
    space_BT |= scans.preceding(space_BT, False)
    space_BT |= scans.preceding(scans.preceding(triple_BT, False), False)
    hard_BT = traits_BT & tokens.PIECE_HARD != 0
    white_BTC = jnp.where(hard_BT[:, :, None], _WHITE_SPACE_11C, _WIDE_SPACE_11C)
    row_BTC = row_BTC.at[:, :, tokens.TRAITS].set(traits_BT & tokens.TRAITS_MASK)
    return jnp.where(space_BT[:, :, None], white_BTC, row_BTC)


class _Text:
    """How tokens join into chunks (between white space) and words; arrays are [B, T]."""

    def __init__(self, row_BTC):
        self.flags_BT = flags_BT = row_BTC[:, :, tokens.FLAGS]
        before_BT, after_BT = scans.preceding(flags_BT, 0), scans.following(flags_BT, 0)
        self.core_BT = self.has(tokens.CORE)
        joins_BT = self.core_BT & (before_BT & tokens.CORE != 0)
        joins_BT &= ~self.has(tokens.LEAD) & (before_BT & tokens.TRAIL == 0)
        self.joins_next_BT = scans.following(joins_BT, False)
        self.chunk_start_BT = self.core_BT & ~joins_BT
        self.next_flags_BT = jnp.where(self.joins_next_BT, after_BT, 0)
        self.dot_before_BT = joins_BT & (before_BT & tokens.LAST_DOT != 0)

        # A comma inside 1,000 is part of the word; a comma before a closing quote or the chunk's end is not.
        comma_BT = self.has(tokens.LONE_COMMA)
        self.ends_before_next_BT = ~self.joins_next_BT | (self.next_flags_BT & _ENDS_WORD != 0)
        comma_BT &= self.ends_before_next_BT
        self.comma_next_BT = self.joins_next_BT & scans.following(comma_BT, False)
        starts_BT = self.chunk_start_BT | self.has(tokens.SPLIT_BEFORE) | comma_BT
        starts_BT |= before_BT & tokens.CLOSED_END != 0
        lone_BT = self.has(tokens.LONE_SOFT) & starts_BT
        self.word_start_BT = starts_BT | (joins_BT & scans.preceding(lone_BT, False))

        # Hard white space since the last core, by the parity of the last event.
        hard_BT = jnp.where(self.core_BT, self.has(tokens.HARD_AFTER), self.has(tokens.HARD_BEFORE))
        event_BT = 2 * lax.broadcasted_iota(jnp.int32, flags_BT.shape, 1) + hard_BT
        event_BT = scans.maximum(jnp.where(self.core_BT | hard_BT, event_BT, -1))
        hard_before_BT = self.has(tokens.HARD_BEFORE) | (scans.preceding(event_BT, -1) & 1 != 0)
        self.hard_start_BT = self.chunk_start_BT & hard_before_BT

        self.chunk_at_BT = scans.last_until(self.chunk_start_BT)
        self.next_chunk_BT = scans.following(scans.first_from(self.chunk_start_BT), flags_BT.shape[1])

    def has(self, flag):
        return self.flags_BT & flag != 0


def _join_traits(before, after):
    """Traits of a word of two parts: their union, and SECOND if both have a character."""
    both = before & after & tokens.FIRST != 0
    return before | after | jnp.where(both, tokens.SECOND, np.uint32(0))


def _join_tails(left, right):
    """Joins (hash, power, hash restarts, traits, word restarts) of what ends at a position."""
    hash_a, power_a, hyphen_a, traits_a, restart_a = left
    hash_b, power_b, hyphen_b, traits_b, restart_b = right
    return (
        jnp.where(hyphen_b, hash_b, hash_a + power_a * hash_b),
        jnp.where(hyphen_b, power_b, power_a * power_b),
        hyphen_a | hyphen_b,
        jnp.where(restart_b, traits_b, _join_traits(traits_a, traits_b)),
        restart_a | restart_b,
    )


def _join_heads(left, right):
    """Joins (hash, power, closed) of what starts at a position."""
    hash_a, power_a, closed_a = left
    hash_b, power_b, closed_b = right
    return (
        jnp.where(closed_a, hash_a, hash_a + power_a * hash_b),
        jnp.where(closed_a, power_a, power_a * power_b),
        closed_a | closed_b,
    )


def _look_up(table: SentenceTable, hash_BT):
    """Looks up the flags of the word types with these hashes, such as words.ABBREVIATION."""
    bits = table.word_HW.shape[0].bit_length() - 1
    width = table.word_HW.shape[1] // 2
    bucket_BT = (hash_BT * np.uint32(words.BUCKET_MULTIPLIER)) >> np.uint32(32 - bits)
    row_BTW = jnp.take(table.word_HW, bucket_BT.astype(jnp.int32), axis=0, mode="clip")
    found_BTW = row_BTW[:, :, :width] == hash_BT[:, :, None]
    known_BT = jnp.sum(jnp.where(found_BTW, row_BTW[:, :, width:], 0), axis=2, dtype=jnp.uint32)
    return jnp.where(jnp.any(found_BTW, axis=2), known_BT, words.UNKNOWN_WORD)


def _word_before(row_BTC, text: _Text):
    """Hash and traits of the word that ends before a token's mark."""
    restart_BT = text.word_start_BT | text.has(tokens.MANY_WORDS) | ~text.core_BT
    tails = (
        row_BTC[:, :, tokens.TAIL],
        row_BTC[:, :, tokens.TAIL_POWER],
        restart_BT | text.has(tokens.TAIL_HYPHEN),
        row_BTC[:, :, tokens.TRAITS] & ((1 << tokens.STEM_SHIFT) - 1),
        restart_BT,
    )
    empty = (0, 1, True, 0, True)
    so_far = scans.scan(_join_tails, tails, (0, 1, False, 0, False))
    so_far = [scans.preceding(x_BT, fill) for x_BT, fill in zip(so_far, empty, strict=True)]
    split_BT = text.word_start_BT | text.has(tokens.MARK_SPLIT)
    stem = (
        row_BTC[:, :, tokens.STEM],
        row_BTC[:, :, tokens.STEM_POWER],
        split_BT | text.has(tokens.MARK_HYPHEN),
        row_BTC[:, :, tokens.TRAITS] >> tokens.STEM_SHIFT,
        split_BT,
    )
    hash_BT, _, _, traits_BT, _ = _join_tails(so_far, stem)
    return hash_BT, traits_BT


def _word_at_start(table, row_BTC, text: _Text):
    """Flags of the first word of a chunk, at the chunk's first token."""
    closed_BT = text.has(tokens.MANY_WORDS) | ~text.joins_next_BT | scans.following(text.word_start_BT, True)
    heads = (row_BTC[:, :, tokens.HEAD], row_BTC[:, :, tokens.HEAD_POWER], closed_BT)
    hash_BT, _, _ = scans.scan(_join_heads, heads, (0, 1, False), reverse=True)
    return _look_up(table, hash_BT)


def _ends_sentence(word, traits_BT, ellipsis_BT, number_first, following):
    """Whether a full stop ends a sentence by Punkt's rules, from the word before it and what follows.

    Args:
      word: flags of the word before, without its full stop.
      traits_BT: traits of that word.
      ellipsis_BT: the word before is a run of full stops instead.
      number_first: SentenceTable.number_first.
      following: (flags, starts with upper case, starts with lower case) of the word after.

    Source: PunktSentenceTokenizer._first_pass_annotation and ._second_pass_annotation of NLTK.
    """
    known_BT, upper_BT, lower_BT = following
    is_word_BT = (traits_BT & tokens.FIRST != 0) & ~ellipsis_BT
    numeric = traits_BT & (tokens.NOT_NUMERIC | tokens.DIGIT) == tokens.DIGIT
    number_BT = is_word_BT & numeric
    initial_BT = is_word_BT & (traits_BT & (tokens.SECOND | tokens.NOT_LETTER) == 0)
    abbreviation_BT = is_word_BT & (word & words.ABBREVIATION != 0)

    collocation_BT = jnp.where(number_BT, number_first, word) >> words.FIRST_SHIFT
    collocation_BT &= known_BT >> words.SECOND_SHIFT
    collocation_BT &= (1 << words.COLLOCATION_BITS) - 1
    punctuation_BT = known_BT & words.IS_PUNCTUATION != 0
    starter_BT = upper_BT & (known_BT & words.STARTER != 0)
    no_starter_BT = punctuation_BT | (lower_BT & (known_BT & words.NO_STARTER != 0))
    often_first_BT = upper_BT & (known_BT & words.OFTEN_FIRST != 0)
    always_upper_BT = upper_BT & (known_BT & words.SEEN_LOWER == 0)

    soft_BT = (abbreviation_BT | ellipsis_BT) & ~initial_BT
    goes_on_BT = (initial_BT | number_BT) & no_starter_BT
    goes_on_BT |= initial_BT & ~starter_BT & always_upper_BT
    goes_on_BT |= abbreviation_BT | ellipsis_BT
    ends_BT = (soft_BT & (starter_BT | often_first_BT)) | ~goes_on_BT
    return ends_BT & ~(is_word_BT & (collocation_BT != 0))


def _sentence_breaks(table: SentenceTable, row_BTC, text: _Text):
    """Tokens in which a sentence ends; whether white space follows their mark; whether more of the core does.

    Of the marks between two hard white spaces Punkt considers the last one. It ends a sentence if this mark,
    or an earlier one there, does. A mark is followed by a NON_WORD character, or by white space and another
    chunk.
    """
    end = text.flags_BT.shape[1]
    mark_BT, inside_BT = text.has(tokens.MARK), text.has(tokens.MARK_INSIDE)
    before_non_word_BT = inside_BT | (text.next_flags_BT & tokens.FIRST_NON_WORD != 0)
    before_non_word_BT &= mark_BT
    before_space_BT = mark_BT & ~text.joins_next_BT & ~inside_BT & (text.next_chunk_BT < end)
    # In "!!" before a letter or the end of the text, the first mark counts.
    earlier_BT = text.has(tokens.MARK_EARLIER) & ~before_non_word_BT & ~before_space_BT
    inside_BT |= earlier_BT
    before_non_word_BT |= earlier_BT

    hash_BT, traits_BT = _word_before(row_BTC, text)
    word_BT = _look_up(table, hash_BT)
    dot_first_BT = (row_BTC[:, :, tokens.TRAITS] >> tokens.STEM_SHIFT == 0) & ~text.has(tokens.MARK_SPLIT)
    ellipsis_BT = text.has(tokens.MARK_ELLIPSIS) | (text.dot_before_BT & dot_first_BT)
    always_BT = ~text.has(tokens.MARK_IN_DOUBT) | earlier_BT

    passing_BT = text.has(tokens.PASSING)
    punctuation_BT = jnp.where(
        inside_BT | passing_BT,
        text.has(tokens.MARK_PUNCTUATION),
        text.next_flags_BT & tokens.FIRST_PUNCTUATION != 0,
    )
    no_case_BT = jnp.zeros_like(mark_BT)
    sign = (jnp.where(punctuation_BT, words.IS_PUNCTUATION, np.uint32(0)), no_case_BT, no_case_BT)
    ends_BT = _ends_sentence(word_BT, traits_BT, ellipsis_BT, table.number_first, sign)
    # A word that ends before a run or a comma is not a match, but may end a sentence.
    passing_BT &= ~text.has(tokens.MARK_PUNCTUATION) | text.ends_before_next_BT
    run_next_BT = text.next_flags_BT & jnp.where(always_BT, tokens.DASHES | tokens.DOTS, tokens.DASHES) != 0
    passing_BT |= mark_BT & ~inside_BT & (run_next_BT | text.comma_next_BT)
    ends_inner_BT = (before_non_word_BT | passing_BT) & (always_BT | ends_BT)
    ends_inner_BT |= text.has(tokens.MARK_EARLIER)

    # A mark before white space needs data of the next chunk, which is packed at the chunk's start and
    # gathered.
    known_BT = _word_at_start(table, row_BTC, text)
    chunk_ends_BT = scans.first_from(ends_inner_BT) < text.next_chunk_BT
    upper_bit, lower_bit, ends_bit = (np.uint32(1 << i) for i in (29, 30, 31))
    packed_BT = known_BT & ((1 << words.FIRST_SHIFT) - 1)
    packed_BT |= jnp.where(text.has(tokens.FIRST_UPPER), upper_bit, np.uint32(0))
    packed_BT |= jnp.where(text.has(tokens.FIRST_LOWER), lower_bit, np.uint32(0))
    packed_BT |= jnp.where(chunk_ends_BT, ends_bit, np.uint32(0))
    packed_BT = jnp.take_along_axis(packed_BT, jnp.minimum(text.next_chunk_BT, end - 1), axis=1)
    following = (packed_BT, packed_BT & upper_bit != 0, packed_BT & lower_bit != 0)
    ends_BT = _ends_sentence(word_BT, traits_BT, ellipsis_BT, table.number_first, following)
    # Punkt reads the next chunk together with the mark, so a sentence end inside that chunk counts.
    ends_BT |= packed_BT & ends_bit != 0
    ends_outer_BT = before_space_BT & (always_BT | ends_BT)

    match_BT = before_non_word_BT | before_space_BT
    next_match_BT = scans.following(scans.first_from(match_BT), end)
    next_hard_BT = scans.following(scans.first_from(text.hard_start_BT), end)
    any_BT = scans.last_until(ends_inner_BT | ends_outer_BT) >= scans.last_until(text.hard_start_BT)
    break_BT = match_BT & (next_match_BT >= next_hard_BT) & any_BT
    # A mark directly after hard white space counts in addition to the last one.
    break_BT |= text.hard_start_BT & text.has(tokens.FIRST_MARK) & match_BT
    return break_BT, before_space_BT, inside_BT


def _first_tokens(text: _Text, break_BT, before_space_BT, inside_BT):
    """The first token of each sentence but the first.

    A sentence starts after a mark, or after the white space that follows the mark. One run of closing quotes
    and brackets there, up to white space (or --), stays with the sentence before.
    """
    closers_BT = text.has(tokens.ALL_CLOSERS)
    next_other_BT = scans.first_from(text.core_BT & ~closers_BT)
    last_closers_BT = text.has(tokens.CLOSERS_DASHES)
    next_dashes_BT = scans.first_from(text.has(tokens.DASHES) | last_closers_BT)
    closing_BT = closers_BT & ((next_other_BT >= text.next_chunk_BT) | (next_other_BT == next_dashes_BT))
    closing_BT |= last_closers_BT
    run_goes_on_BT = text.joins_next_BT & scans.following(closing_BT, False)
    run_ends_BT = ~text.joins_next_BT | (text.next_flags_BT & tokens.DASHES != 0)
    rest_closes_BT = break_BT & inside_BT & text.has(tokens.REST_CLOSERS)
    # The run is the rest of the mark's own token: the next token with text is the first.
    closed_BT = rest_closes_BT & run_ends_BT
    # The next sentence starts after the mark in the same token, so its first token is the one after.
    within_BT = break_BT & inside_BT & ~(rest_closes_BT & (run_goes_on_BT | run_ends_BT))
    within_BT |= text.hard_start_BT & text.has(tokens.FIRST_MARK_OF_MORE)
    behind_BT = break_BT & ~before_space_BT & ~inside_BT
    behind_BT |= rest_closes_BT & run_goes_on_BT

    space_break_BT = scans.preceding(scans.last_until(break_BT & before_space_BT), -1)
    chunk_before_BT = scans.preceding(text.chunk_at_BT, -1)
    start_BT = text.chunk_start_BT & (space_break_BT >= jnp.maximum(chunk_before_BT, 0))
    start_BT |= scans.preceding(behind_BT, False)
    start_at_BT = scans.last_until(start_BT)
    drawn_BT = closing_BT & (text.chunk_at_BT <= start_at_BT)
    drawn_BT &= scans.last_until(text.core_BT & ~closing_BT) < start_at_BT
    # Dashes in the token of the last closers start the sentence, so its first token is the one after.
    last_closers_BT &= drawn_BT
    drawn_BT &= ~last_closers_BT
    written_BT = text.core_BT & ~drawn_BT
    first_BT = written_BT & (scans.preceding(scans.last_until(written_BT), -1) < start_at_BT)
    first_BT = (first_BT & ~last_closers_BT) | scans.preceding(last_closers_BT, False)

    core_before_BT = scans.preceding(scans.last_until(text.core_BT), -1)
    closed_before_BT = scans.preceding(scans.last_until(closed_BT), -1)
    first_BT |= text.core_BT & (closed_before_BT >= jnp.maximum(core_before_BT, 0))
    return first_BT | scans.preceding(within_BT, False)
