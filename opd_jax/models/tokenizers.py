"""Tokenizers of model folders and GGUF files, and the checks that a student and a teacher agree."""

import contextlib
import functools
import itertools
import json
import re
import signal
import threading
from collections.abc import Iterable
from pathlib import Path

from opd_jax.errors import UserError, reason
from opd_jax.models.config import ModelConfig
from opd_jax.models.files import gguf, source

# Words, runs of digits, white space, code, accents and an emoji: enough to distinguish any two merge tables.
_PROBE = (
    "The answer is 12,345.67 (about 1e4), isn't it?\n\n  def f(x):\n\treturn x**2  # \\frac"
    "{1}{2}\r\nGröße, naïve, 数学, задача, \U0001f600 e.g. U.S. WORDSwithCase   end.\n\nThen 12345 don't"
)
RENDER_SECONDS = 5.0  # of a chat template, which takes a thousandth of that unless it loops without end
_PROBE_CHATS = (
    [{"role": "user", "content": "What is 2 + 3?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}],
)


def load(path, key: str = "student.path"):
    """The transformers tokenizer of a path that `source.resolve` accepts, read from disk only.

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


def template_options(text: str, tokenizer) -> dict:
    """The chat template's extra arguments that `data.template` names.

    Args:
      text: a JSON object, such as {"enable_thinking": false}, or "" for no arguments.

    Raises:
      UserError: not a JSON object, or a name that the tokenizer's template never reads.
    """
    try:
        options = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise UserError(f'data.template={text} is not a JSON object, such as {{"enable_thinking": false}}')
    template = str(tokenizer.chat_template)
    for name in options:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(f"data.template: student.path's chat template never reads {name!r}; remove it")
    return options


def swapped_end_ids(student, teacher, end_id: int) -> tuple[int, int] | None:
    """(the student's end token, the teacher's) if they differ and `teacher.end_id` allows it, else None.

    A teacher that ends its answers with another token gives almost no probability to the student's, so the
    student would unlearn to stop. With the pair swapped in the teacher's output, the student's end token gets
    the probability of the teacher's own.

    Args:
      end_id: teacher.end_id; -1 if it is not set.

    Raises:
      UserError: the end tokens differ and no id is given, or the id is not the teacher's end token.
    """
    ours, theirs = student.eos_token_id, teacher.eos_token_id
    if end_id == -1:
        if ours != theirs:
            raise UserError(
                f"a response ends with {student.eos_token!r} ({ours}) in student.path, with"
                f" {teacher.eos_token!r} ({theirs}) in teacher.path; set teacher.end_id={theirs} to let one"
                " stand for the other, or put the teacher's tokenizer files into the student's folder"
            )
        return None
    if end_id != theirs or ours is None:
        raise UserError(
            f"teacher.end_id={end_id}: teacher.path ends a response with {teacher.eos_token!r} ({theirs}),"
            f" student.path with {student.eos_token!r} ({ours}); give the teacher's id, or -1"
        )
    return None if ours == theirs else (ours, theirs)


def render(
    tokenizer, messages: list, where: str, *, tools=None, answered: bool = False, options: dict | None = None
) -> str:
    """A conversation as the chat template writes it, up to where the reply begins.

    Args:
      where: names the record in the message.
      tools: functions that the assistant may call.
      answered: the reply is the last message; nothing is asked for after it.
      options: what `template_options` returned.

    Raises:
      UserError: the template refuses the conversation, fails, or goes past a limit of `templates`.
    """
    import jinja2

    from opd_jax.models import templates

    failures = (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
    try:
        with templates.limited(RENDER_SECONDS), _within(RENDER_SECONDS):
            return tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=not answered,
                **(options or {}),
            )
    except (templates.Stopped, MemoryError, TimeoutError) as error:
        raise UserError(
            f"{where}: the chat template of {tokenizer.name_or_path or 'the model'} was stopped:"
            f" {reason(error)}; take the model's own files, or correct the template"
        ) from error
    except (*failures, RecursionError) as error:
        roles = ", ".join(message["role"] for message in messages[:6])
        raise UserError(
            f"{where}: the chat template refuses a conversation of the roles {roles} ({reason(error)});"
            " change it, data.system_prompt, or the model's chat template"
        ) from error


@contextlib.contextmanager
def _within(seconds: float):
    """Raises TimeoutError in a block that takes longer.

    Only the main thread can be interrupted. In others, `templates` looks at the clock.
    """

    def ring(*_):
        raise TimeoutError(f"it did not end within {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_pair(student, teacher, options: dict | None = None):
    """Refuses a teacher to whom the student's token ids mean other text.

    Args:
      options: what `template_options` returned; both templates are rendered with them.

    Raises:
      UserError: a difference in vocabulary, special tokens, merges or rendered prompts.
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
    for chat in _PROBE_CHATS:
        ours, theirs = (_rendered_or_refused(tokenizer, chat, options) for tokenizer in (student, teacher))
        if ours != theirs:
            refuse("the chat template renders", ours, theirs, "use one chat template in both")


def check_ends(ours: Iterable[int], theirs: Iterable[int], swapped_ids: tuple[int, int] | None):
    """Refuses a teacher whose responses end at other ids than the student's.

    Args:
      ours, theirs: `end_ids` of each.
      swapped_ids: what `swapped_end_ids` returned.

    Raises:
      UserError: names the ids.
    """
    answers = dict(zip(swapped_ids, swapped_ids[::-1])) if swapped_ids else {}
    theirs = {answers.get(i, i) for i in theirs}
    if theirs != set(ours):
        raise UserError(
            f"a response ends at ids {sorted(ours)} in student.path, at {sorted(theirs)} in teacher.path;"
            f" set rollout.end_ids to those that shall end one, such as {tuple(sorted(theirs | set(ours)))}"
        )


def end_ids(tokenizer, config: ModelConfig, chosen=(), key: str = "student.path") -> tuple[int, ...]:
    """Ids that end a response: the model's, the tokenizer's, and the token that ends a turn of the template.

    Args:
      chosen: rollout.end_ids, which replace them unless empty.
      key: the config key that named the model, for messages.

    Raises:
      UserError: there is none, so no response could end by itself, or `chosen` has a value that is no id.
    """
    if chosen:
        if not all(type(i) is int and 0 <= i < config.valid_vocab for i in chosen):
            raise UserError(f"rollout.end_ids={tuple(chosen)}: give ids from 0 to {config.valid_vocab - 1}")
        return tuple(sorted(set(chosen)))
    ends = set(config.eos_ids)
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    answer = "response"
    chat = [*_PROBE_CHATS[0], {"role": "assistant", "content": answer}]
    turn = render(tokenizer, chat, key, answered=True)
    after = _encode(tokenizer, turn.rpartition(answer)[2])
    if after and after[0] in _special(tokenizer):
        ends.add(after[0])
    if not ends:
        raise UserError(f"{key}: neither the model nor its tokenizer names an end-of-sequence token")
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
            raise UserError(f"student.path: the tokenizer is not byte-level BPE (token {i} is {text!r})")
    return table


def _from_folder(folder, key: str):
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # transformers raises many kinds of errors for a missing or damaged tokenizer.
    except Exception as error:
        raise UserError(f"{key}: no tokenizer can be read from {folder} ({reason(error)})") from error
    try:
        return _as_the_file(tokenizer, Path(folder) / "tokenizer.json", key)
    except UserError:
        raise
    except Exception as error:  # a field of tokenizer_config.json that is read when a text is
        raise UserError(f"{key}: the tokenizer of {folder} reads no text ({reason(error)})") from error


def _as_the_file(tokenizer, file: Path, key: str):
    """The tokenizer, made of its tokenizer.json alone where transformers' class reads that otherwise.

    A class such as Qwen2Tokenizer splits text in its own way, whatever the file says: a file of another
    family under its name gives other ids.

    Raises:
      UserError: the file cannot be read, or the two still differ.
    """
    import tokenizers
    import transformers

    if not file.is_file():
        return tokenizer
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{key}: {file} cannot be read ({reason(error)}); copy it again") from error
    backend.no_truncation()
    backend.no_padding()
    if not _difference(tokenizer, backend):
        return tokenizer
    roles = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: token for name, token in roles.items() if token is not None}
    )
    plain.chat_template = tokenizer.chat_template
    found = _difference(plain, backend)
    for i, token in tokenizer.added_tokens_decoder.items():  # some stand in tokenizer_config.json alone
        if plain.convert_tokens_to_ids(token.content) != i and token.content not in backend.get_vocab():
            found = found or f"{token.content!r} has id {i} in tokenizer_config.json and none in the file"
    if found:
        raise UserError(
            f"{key}: transformers reads {file} in another way: {found}; take the model's own files"
        )
    return plain


def _difference(tokenizer, backend) -> str:
    """How a transformers tokenizer differs from its file: in an added token or a probe text; "" if not."""
    for i, token in backend.get_added_tokens_decoder().items():
        if (found := tokenizer.convert_tokens_to_ids(token.content)) != i:
            return f"{token.content!r} is id {found} and in the file {i}"
    ours, files = _encode(tokenizer, _PROBE), backend.encode(_PROBE, add_special_tokens=False).ids
    return "" if ours == files else f"a probe text has {len(ours)} tokens and by the file {len(files)}"


def _texts(tokenizer) -> dict[int, str]:
    return {i: text for text, i in tokenizer.get_vocab().items()}


def _special(tokenizer) -> dict[int, str]:
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _rendered_or_refused(tokenizer, chat: list, options: dict | None) -> str | None:
    """A probe as the chat template renders it; None for one that it refuses, as Gemma's a system role."""
    try:
        return render(tokenizer, chat, "a probe", options=options)
    except UserError:
        if len(chat) == 1:  # no template may refuse a user's message
            raise
        return None


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level BPE vocabulary stands for (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
