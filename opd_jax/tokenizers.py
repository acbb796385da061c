"""Tokenizers of model folders and GGUF files, and the checks that a student and a teacher agree."""

import functools
import itertools

from opd_jax.errors import UserError
from opd_jax.models import gguf, source

# Words, digits, white space, code, accents and an emoji: enough to tell any two merge tables apart.
_PROBE = (
    "The answer is 12,345.67 (about 1e4), isn't it?\n\n  def f(x):\n\treturn x**2  # \\frac"
    "{1}{2}\r\nGröße, naïve, 数学, задача, \U0001f600 e.g. U.S. WORDSwithCase   end"
)
_PROBE_CHATS = (
    [{"role": "user", "content": "What is 2 + 3?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}],
)


def load(path, key: str = "student.path"):
    """The transformers tokenizer of what `models.source.resolve` accepts, from disk alone.

    Raises:
      UserError: no tokenizer, one that cannot be read, or one without a chat template.
    """
    found = source.resolve(path, key)
    if found.kind == "gguf":
        tokenizer = gguf.tokenizer_from_gguf(found.path, key)
    else:
        tokenizer = _from_folder(found.path, key)
    if not tokenizer.chat_template:
        raise UserError(
            f"{key}: the tokenizer in {found.path} has no chat template; take the files of"
            " the instruction-tuned model"
        )
    return tokenizer


def check_pair(student, teacher):
    """Refuses a teacher that would read the student's token ids as other text.

    Raises:
      UserError: a difference in vocabulary, special tokens, merges, end token or chat format.
    """

    def refuse(what, ours, theirs, remedy="give two models of one family"):
        raise UserError(
            f"student.path and teacher.path do not share a tokenizer: {what} {ours!r} for the"
            f" student, {theirs!r} for the teacher; {remedy}"
        )

    for what, table in (("is", _texts), ("is the special token", _special)):
        ours, theirs = table(student), table(teacher)
        for i in sorted(ours.keys() | theirs.keys()):
            if ours.get(i) != theirs.get(i):
                refuse(f"id {i} {what}", ours.get(i), theirs.get(i))
    ours, theirs = _encode(student, _PROBE), _encode(teacher, _PROBE)
    for n, (our, their) in enumerate(itertools.zip_longest(ours, theirs)):
        if our != their:
            refuse(f"token {n} of a probe text is", our, their)
    if student.eos_token != teacher.eos_token:
        remedy = "put the teacher's tokenizer files into the student's folder"
        refuse("a response ends with", student.eos_token, teacher.eos_token, remedy)
    for chat in _PROBE_CHATS:
        ours, theirs = _render(student, chat, True), _render(teacher, chat, True)
        if ours != theirs:
            refuse("the chat template renders", ours, theirs, "use one chat template in both")


def end_ids(tokenizer, config) -> tuple[int, ...]:
    """Ids that end a response: the model's, the tokenizer's, and what ends the template's turns.

    Raises:
      UserError: there is none, so no response could end by itself.
    """
    ends = set(config.eos_ids)
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    answer = "response"
    turn = _render(tokenizer, [*_PROBE_CHATS[0], {"role": "assistant", "content": answer}], False)
    after = _encode(tokenizer, turn.rpartition(answer)[2])
    if after and after[0] in _special(tokenizer):
        ends.add(after[0])
    if not ends:
        raise UserError(
            "student.path: neither the model nor its tokenizer names an end-of-sequence token"
        )
    return tuple(sorted(ends))


def token_bytes(tokenizer) -> list[bytes]:
    """The bytes of each token id, in id order; b"" for special tokens and ids that do not exist.

    Raises:
      UserError: the tokenizer is not byte-level BPE.
    """
    vocab = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    table = [b""] * (max(vocab.values()) + 1)
    for text, i in vocab.items():
        if i in added:
            table[i] = b"" if added[i].special else text.encode()
        elif set(text) <= _byte_of().keys():
            table[i] = bytes(_byte_of()[character] for character in text)
        else:
            raise UserError(
                f"student.path: the tokenizer is not byte-level BPE (token {i} is {text!r})"
            )
    return table


def _from_folder(folder, key: str):
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # transformers raises many kinds for a missing or damaged tokenizer; the cause is kept.
    except Exception as error:
        raise UserError(
            f"{key}: no tokenizer can be read from {folder} ({str(error).splitlines()[0]})"
        ) from error


def _texts(tokenizer) -> dict[int, str]:
    return {i: text for text, i in tokenizer.get_vocab().items()}


def _special(tokenizer) -> dict[int, str]:
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _render(tokenizer, chat, add_generation_prompt: bool) -> str:
    return tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=add_generation_prompt
    )


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level BPE vocabulary stands for (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }
