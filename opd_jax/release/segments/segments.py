"""Segments of responses, on device: token ids in, segment numbers out.

The default segment is the sentence that NLTK's Punkt finds in the decoded response (`sentences.py`). A token
belongs to the sentence, or line, of its first character that is not white space. White space between two
sentences belongs to the first one. See `docs/segments.md`.
"""

import itertools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.errors import UserError, nearest
from opd_jax.models import tokenizers
from opd_jax.release.segments import punkt, scans, sentences

KINDS = ("punkt", "punkt_untrained", "newline", "fixed:N", "token", "nltk")

_CORE, _LINE_END_BEFORE, _LINE_END_AFTER = (np.uint8(1 << i) for i in range(3))


@flax.struct.dataclass
class SegmentTable:
    """How responses are cut into segments; built once on the host, then kept on device.

    Attributes:
      kind: one of KINDS, `fixed:N` with a number in place of N; static.
      lookup: data about the vocabulary. punkt, punkt_untrained: a sentences.SentenceTable. newline: uint8 [V]
        flags. fixed:N, token: None. nltk: int32 [B, T], the segment numbers of one batch
        (`nltk_segments.SentenceSplitter`).
    """

    lookup: Any
    kind: str = flax.struct.field(pytree_node=False, default="punkt")

    @classmethod
    def from_tokenizer(cls, tokenizer, kind: str = "punkt", parameters: str = "") -> "SegmentTable":
        """Builds the table of a byte-level BPE tokenizer of transformers; a second or two for 150k tokens.

        Special tokens have no text; they end a word.

        Args:
          tokenizer: not used by the kinds that need no text.
          kind: `segments.kind`, any but nltk.
          parameters: `segments.punkt`, a folder of NLTK's punkt_tab; "" for the packaged ones.

        Raises:
          UserError: unknown kind, unreadable parameters, or a tokenizer that is not byte-level BPE.
        """
        check_kind(kind, parameters)
        needs_text = kind in ("punkt", "punkt_untrained", "newline")
        return cls.from_token_bytes(tokenizers.token_bytes(tokenizer) if needs_text else [], kind, parameters)

    @classmethod
    def from_token_bytes(
        cls, token_bytes: list[bytes], kind: str = "punkt", parameters: str = ""
    ) -> "SegmentTable":
        """Builds the table from the bytes of each token id; b"" for a special token."""
        if kind == "punkt":
            lookup = sentences.SentenceTable.build(token_bytes, punkt.load_parameters(parameters))
        elif kind == "punkt_untrained":
            lookup = sentences.SentenceTable.build(token_bytes, punkt.Parameters())
        elif kind == "newline":
            lookup = jnp.asarray(np.array([_line_flags(entry) for entry in token_bytes], np.uint8))
        else:
            lookup = None
        return cls(lookup=lookup, kind=kind)


def check_kind(kind: str, parameters: str = ""):
    """Refuses an unknown `segments.kind`, and a `segments.punkt` that would not be used.

    Raises:
      UserError: names the key and its allowed values.
    """
    name, colon, size = kind.partition(":")
    if name == "fixed" and colon:
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise UserError(f"segments.kind={kind}: N of fixed:N is a number of tokens, 1 or more")
    elif kind not in KINDS or kind == "fixed:N":
        near = nearest(kind, KINDS)
        raise UserError(f"segments.kind={kind!r} is unknown{near}: use one of {', '.join(KINDS)}")
    if parameters and kind not in ("punkt", "nltk"):
        raise UserError(f"segments.punkt={parameters} is not read by segments.kind={kind}; leave it empty")


def segment(table: SegmentTable, tokens_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Numbers the segments of each response.

    Args:
      table: of the ids' tokenizer. Ids past its end are read as its last token.
      tokens_BT: int32 token ids.
      mask_BT: response tokens; others are read as white space.

    Returns:
      int32 [B, T]: 0, 1, 2, ... along the response, -1 outside it. Each number has at least one token if
      mask_BT is a prefix of the row.
    """
    with jax.named_scope("segment"):
        mask_BT = mask_BT.astype(bool)
        if table.kind == "nltk":
            number_BT = table.lookup
        elif table.kind in ("punkt", "punkt_untrained"):
            number_BT = scans.count(sentences.first_tokens(table.lookup, tokens_BT, mask_BT))
        elif table.kind == "newline":
            number_BT = scans.count(_first_of_lines(table.lookup, tokens_BT, mask_BT))
        else:
            size = 1 if table.kind == "token" else int(table.kind.removeprefix("fixed:"))
            number_BT = (scans.count(mask_BT) - 1) // size
        return jnp.where(mask_BT, number_BT, -1)


def _first_of_lines(flags_V, tokens_BT, mask_BT):
    """bool [B, T]: the first token of each line but the first. Lines without text have no token."""
    flags_BT = jnp.where(mask_BT, jnp.take(flags_V, tokens_BT, mode="clip"), 0)
    core_BT = flags_BT & _CORE != 0
    # A line end after a token's text, or in white space, counts for the next token with text.
    end_BT = flags_BT & _LINE_END_AFTER != 0
    core_before_BT = scans.preceding(scans.last_until(core_BT), -1)
    end_before_BT = scans.preceding(scans.last_until(end_BT), -1)
    new_line_BT = (flags_BT & _LINE_END_BEFORE != 0) | (end_before_BT >= core_before_BT)
    return core_BT & (core_before_BT >= 0) & new_line_BT


def _line_flags(entry: bytes) -> int:
    text = entry.decode("utf-8", "surrogateescape")
    before = "".join(itertools.takewhile(punkt.is_space, text))
    core = text[len(before) :]
    flags = _CORE if core else 0
    flags |= _LINE_END_BEFORE if core and "\n" in before else 0
    return int(flags | (_LINE_END_AFTER if "\n" in (core or text) else 0))
