"""Sentences by NLTK itself, on the host: what the device version is held to, and a slower option.

Every batch of responses is fetched from the devices, decoded, cut by NLTK and sent back, and until
then the devices have nothing to do. Each process cuts its own rows.
"""

import bisect
import collections
from typing import Any

import jax
import numpy as np

from opd_jax.errors import UserError
from opd_jax.release.segments import punkt
from opd_jax.release.segments.segments import SegmentTable


class SentenceSplitter:
    """NLTK's Punkt over the token ids of one vocabulary."""

    def __init__(self, token_bytes: list[bytes], parameters: punkt.Parameters):
        """
        Args:
          token_bytes: the bytes of each token id; b"" for a special token, which reads as white space.

        Raises:
          UserError: NLTK is not installed.
        """
        try:
            from nltk.tokenize import punkt as nltk_punkt
        except ImportError as error:
            raise UserError("segments.kind=nltk needs NLTK: pip install nltk") from error
        known: Any = nltk_punkt.PunktParameters()  # NLTK declares its fields as empty sets
        known.abbrev_types = parameters.abbrev_types
        known.collocations = parameters.collocations
        known.sent_starters = parameters.sent_starters
        known.ortho_context = collections.defaultdict(int, parameters.ortho_context)
        self._punkt = nltk_punkt.PunktSentenceTokenizer(known)
        self._text_of = [entry or b" " for entry in token_bytes]

    def numbers(self, ids) -> list[int]:
        """The sentence number of each token of a response: 0, 1, 2, ... without gaps.

        A token belongs to the sentence of its first character that is not white space; white space
        to the sentence before it; a byte to the character that it is part of. Ids past the vocabulary
        read as its last token.
        """
        return token_numbers([self.text(i) for i in ids], self._punkt.span_tokenize)

    def text(self, i: int) -> bytes:
        """The bytes that a token id reads as."""
        return self._text_of[min(max(i, 0), len(self._text_of) - 1)]

    def cut(self, tokens_BL: jax.Array, mask_BT: jax.Array) -> SegmentTable:
        """A table that holds the segments of one batch, cut over the devices as mask_BT is.

        Waits for the arrays. Only explicit transfers, so it runs under transfer_guard("disallow").

        Args:
          tokens_BL: token ids, of which the last T of a row are the response.
          mask_BT: bool, response tokens, cut over the devices as the rows of tokens_BL are.
        """
        tokens = {shard.device: shard.data for shard in tokens_BL.addressable_shards}
        found, pieces = {}, []
        for shard in mask_BT.addressable_shards:
            rows = str(shard.index)
            if rows not in found:  # devices along mesh.tensor hold the same rows
                tokens_bL, mask_bT = jax.device_get((tokens[shard.device], shard.data))
                found[rows] = self._rows(tokens_bL[:, -mask_bT.shape[1] :], mask_bT)
            pieces.append(jax.device_put(found[rows], shard.device))
        number_BT = jax.make_array_from_single_device_arrays(mask_BT.shape, mask_BT.sharding, pieces)
        return SegmentTable(lookup=number_BT, kind="nltk")

    def _rows(self, tokens_bT, mask_bT):
        number_bT = np.full(tokens_bT.shape, -1, np.int32)
        for row, (tokens_T, mask_T) in enumerate(zip(tokens_bT, mask_bT, strict=True)):
            number_bT[row, mask_T] = self.numbers(tokens_T[mask_T])
        return number_bT


def token_numbers(pieces: list[bytes], span_tokenize) -> list[int]:
    """Maps the spans that a NLTK tokenizer finds in the joined pieces to numbers of the pieces.

    Args:
      pieces: the bytes of each token, none empty.
      span_tokenize: text -> (start, end) of each span, in characters.
    """
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    owner = [c for c, char in enumerate(text) for _ in char.encode("utf-8", "surrogateescape")]
    starts = [start for start, _ in span_tokenize(text)]
    numbers, offset = [], 0
    for piece in pieces:
        inside = owner[offset : offset + len(piece)]
        offset += len(piece)
        first = next((c for c in inside if not punkt.is_space(text[c])), inside[-1])
        numbers.append(max(bisect.bisect_right(starts, first) - 1, 0))
    order = {number: i for i, number in enumerate(sorted(set(numbers)))}
    return [order[number] for number in numbers]
