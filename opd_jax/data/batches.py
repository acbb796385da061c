"""Prompts: read, render with the chat template, hold some out, and batch in a reproducible order.

Sources (`data.source`): "demo" (built in), "jsonl" and "parquet" (files), "deepmath", "gsm8k" and "dapo"
(files whose columns are known), "tfds" (any prepared or registered dataset), "rg:TASK" (a generator of
reasoning-gym), and "mixture" of these. Batches come from
grain; an iterator's whole state is one step number, so a resumed run sees exactly the prompts that it would
have seen.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from opd_jax.data.prompts import sources
from opd_jax.errors import UserError, nearest
from opd_jax.models import tokenizers
from opd_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      ids: token ids of the rendered conversation, ending where the response begins.
      text: what the user asks, without the template's markup.
      answer: the reference answer, or None.
      question: the user's last message alone.
    """

    ids: tuple[int, ...]
    text: str
    answer: str | None
    question: str = ""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a run; no text is in both lists. `dropped` counts the over-long ones, `repeated` the
    exact copies that were left out.

    `parts` are (prompts, weight) of a mixture's sources, in the order of `train`; one part has all of them.
    """

    train: list[Prompt]
    heldout: list[Prompt]
    dropped: int
    parts: tuple[tuple[int, float], ...] = ()
    repeated: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """How many there are, were left out and have no answer, by name."""
        return {
            "train": len(self.train),
            "heldout": len(self.heldout),
            "over_long": self.dropped,
            "repeated": self.repeated,
            "unanswered": sum(prompt.answer is None for prompt in self.train),
        }

    def __str__(self) -> str:
        n = self.counts
        said = f"{n['train']:,} training prompts, {n['heldout']:,} held out"
        said += f"; left out: {n['over_long']:,} too long, {n['repeated']:,} repeated"
        return said + (f"; {n['unanswered']:,} training prompts have no answer" if n["unanswered"] else "")


class PromptBatch(NamedTuple):
    """Host arrays of one batch, or of this process's share of it.

    Attributes:
      tokens_BP: int32, left-padded.
      mask_BP: bool, True on the prompt's own tokens.
      index_B: int32, the prompt's number in the list that the batch was made from.
      valid_B: bool, False on the rows that only fill up the last held-out batch.
    """

    tokens_BP: np.ndarray
    mask_BP: np.ndarray
    index_B: np.ndarray
    valid_B: np.ndarray


def load(config: Any, tokenizer: Any) -> Prompts:
    """Reads, renders and splits the prompts that `config.data` describes.

    Args:
      config: the `data` section of a config.
      tokenizer: a transformers tokenizer that has a chat template.

    Raises:
      UserError: any of these cannot be used as it is; the message names the key and the remedy.
    """
    if config.over_long not in ("error", "drop"):
        raise UserError(f"data.over_long={config.over_long!r}: must be 'error' or 'drop'")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the student's tokenizer has no chat template; name an instruct model in student.path"
        )
    repeated = 0
    if config.source == "demo":
        train, heldout = sources.read_demo(config.get("cache"))
        prompts_train, dropped_train = render(train, tokenizer, config)
        prompts_heldout, dropped_heldout = render(heldout, tokenizer, config)
        if config.heldout > len(prompts_heldout):
            raise UserError(
                f"data.heldout={config.heldout}: the demo has {len(prompts_heldout)} held-out"
                f" prompts of at most {config.prompt_tokens} tokens; ask for no more"
            )
        prompts_heldout = prompts_heldout[: config.heldout]
        dropped = dropped_train + dropped_heldout
        parts = ((len(prompts_train), 1.0),)
    else:
        rendered = []
        for part in _parts(config):
            read = sources.read(part, config)
            distinct = without_copies(read) if config.repeats == "drop" else read
            repeated += len(read) - len(distinct)
            rendered.append((part, *render(distinct, tokenizer, config)))
        dropped = sum(over_long for _, _, over_long in rendered)
        everything = [prompt for _, prompts, _ in rendered for prompt in prompts]
        prompts_train, prompts_heldout = hold_out(everything, config.heldout)
        held = {prompt.text for prompt in prompts_heldout}
        parts = tuple(
            (sum(prompt.text not in held for prompt in prompts), part.weight) for part, prompts, _ in rendered
        )
        empty = [part for part, (count, _) in zip((r[0] for r in rendered), parts) if not count]
        if empty and prompts_train:
            raise UserError(
                f"data.mixture: no training prompt of {empty[0].kind}:{empty[0].path} is left; remove it, or"
                " lower data.heldout or raise data.prompt_tokens"
            )
    if not prompts_train:
        raise UserError(
            f"data.source={config.source}: no training prompt is left ({dropped} were longer than"
            f" data.prompt_tokens={config.prompt_tokens}, {len(prompts_heldout)} are held out)"
        )
    return Prompts(prompts_train, prompts_heldout, dropped, parts, repeated)


def _parts(config: Any) -> list[sources.Part]:
    """The sources that `data.source` names."""
    if config.source == "mixture":
        return sources.parse_mixture(config.mixture)
    columns = sources.Columns(**config.columns)
    if config.source.startswith("rg:"):
        return [sources.Part("rg", config.source.removeprefix("rg:"), columns, 1.0)]
    if config.source not in sources.KINDS:
        known = ("demo", *(kind for kind in sources.KINDS if kind != "rg"), "rg:TASK", "mixture")
        raise UserError(
            f"data.source={config.source!r} is not known{nearest(config.source, known)}; use one of"
            f" {', '.join(known)}"
        )
    if config.source in sources.datasets() and any(columns):
        raise UserError(
            f"data.columns is not read by data.source={config.source}, whose columns are known; leave it"
            " empty, or use data.source=jsonl"
        )
    return [sources.Part(config.source, config.path, columns, 1.0)]


def without_copies(conversations: Sequence[sources.Conversation]) -> list[sources.Conversation]:
    """The conversations without exact copies, of which the first stays."""
    first = {}
    for conversation in conversations:
        same = json.dumps((conversation.messages, conversation.tools), sort_keys=True, default=str)
        first.setdefault(same, conversation)
    return list(first.values())


def duplicates(train: Sequence[str], evaluation: Sequence[str]) -> list[tuple[int, int]]:
    """(number in train, number in evaluation) of texts with the same letters and digits, but for case."""

    def normal(text: str) -> str:
        return "".join(c for c in text.casefold() if c.isalnum())

    found = {}
    for number, text in enumerate(evaluation):
        found.setdefault(normal(text), []).append(number)
    return [(i, j) for i, text in enumerate(train) for j in found.get(normal(text), ())]


def hold_out(prompts: Sequence[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
    """Splits off the `count` distinct texts with the smallest SHA-256; returns (train, heldout).

    The choice depends on the texts alone, not on their order; every copy of a held-out text leaves
    the training prompts, and one stays in the held-out ones.
    """

    def digest(text: str) -> bytes:
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    first = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    if not 0 <= count < max(len(first), 1):
        raise UserError(
            f"data.heldout={count}: must be at least 0 and below the number of distinct prompts, {len(first)}"
        )
    held = sorted(first, key=digest)[:count]
    held_set = set(held)
    return [p for p in prompts if p.text not in held_set], [first[text] for text in held]


@dataclasses.dataclass(frozen=True)
class Batching:
    """How prompts are put into arrays.

    Attributes:
      batch: rows of a batch, over all processes.
      prompt_tokens: P, the width of a batch.
      pad_id: what fills a row up, on the left.
      rows: the numbers of this process's rows of a batch, from `sharding.local_rows`; None is all of them.
      buckets: further widths that a training batch may have. It takes the smallest that holds the longest
        prompt of all its rows, including those of other processes, so every process takes the same.
      least: a smaller batch is a multiple of this.
    """

    batch: int
    prompt_tokens: int
    pad_id: int
    rows: np.ndarray | None = None
    buckets: Sequence[int] = ()
    least: int = 1

    def fitting(self, mesh, count: int) -> "Batching":
        """For `count` prompts: a smaller batch if they fill at most half of this one, else this one.

        A batch of another size is another program to compile, once.
        """
        batch = -(-count // self.least) * self.least
        if 2 * batch > self.batch:
            return self
        return dataclasses.replace(self, batch=batch, rows=sharding.local_rows(mesh, batch))

    def own_rows(self) -> np.ndarray:
        """The numbers of this process's rows."""
        return np.arange(self.batch) if self.rows is None else self.rows


class TrainingBatches:
    """An endless iterator of training batches, reshuffled every epoch.

    The order of prompts does not depend on the number of processes. Epochs join without a gap: a batch may
    hold the end of one epoch and the beginning of the next. Each `next` is a pure function of (prompts,
    batch, seed, step).

    Args:
      start: a `TrainingBatches.state()` to continue from.
      parts: (prompts, weight) of consecutive runs of `prompts`; each takes its weight's share of the rows.

    Raises:
      UserError: `start` belongs to other data.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        batching: Batching,
        seed: int,
        start: Mapping[str, Any] | None = None,
        parts: Sequence[tuple[int, float]] = (),
    ):
        import grain  # slow to import, and only training needs it

        rows, pad_id = batching.own_rows(), batching.pad_id
        widths = sorted({*batching.buckets, batching.prompt_tokens})

        def collate(index_B):
            longest = max(len(prompts[index].ids) for index in index_B)
            width = next(width for width in widths if width >= longest)
            return _collate(prompts, index_B[rows], width, pad_id)

        self._origin = {
            "prompts": len(prompts),
            "digest": digest(prompts),
            "batch": batching.batch,
            "seed": seed,
        }
        if len(parts) > 1:
            self._origin["weights"] = [weight for _, weight in parts]
        self._step = 0
        if start is not None:
            changed = [key for key, value in self._origin.items() if start.get(key) != value]
            if changed:
                raise UserError(
                    f"the checkpoint's prompts differ from the config's in {', '.join(changed)}: "
                    "restore the data.* settings of that run, or start in another --workdir"
                )
            self._step = start["step"]
        order = _order(grain.MapDataset, parts or ((len(prompts), 1.0),), seed)
        self._batches = order.batch(batching.batch).map(collate)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PromptBatch:
        result = self._batches[self._step]
        self._step += 1
        return result

    def state(self) -> dict[str, Any]:
        """What `start` needs to continue after the last batch taken; JSON-able."""
        return {"step": self._step, **self._origin}


def _order(dataset: Any, parts: Sequence[tuple[int, float]], seed: int) -> Any:
    """An endless dataset of prompt numbers: every part shuffled anew each epoch of its own, then mixed."""
    orders, first = [], 0
    for count, _ in parts:
        orders.append(dataset.range(first, first + count).shuffle(seed=seed).repeat())
        first += count
    return orders[0] if len(orders) == 1 else dataset.mix(orders, [weight for _, weight in parts])


def heldout_batches(prompts: Sequence[Prompt], batching: Batching) -> Iterator[PromptBatch]:
    """The prompts once, in order, at full width; prompt 0 fills up the last batch, with `valid_B` False."""
    for first in range(0, len(prompts), batching.batch):
        row_B = first + batching.own_rows()
        valid_B = row_B < len(prompts)
        index_B = np.where(valid_B, row_B, 0)
        filled = _collate(prompts, index_B, batching.prompt_tokens, batching.pad_id)
        yield filled._replace(valid_B=valid_B)


def digest(prompts: Sequence[Prompt]) -> str:
    """16 hexadecimal digits of the prompts' ids, in their order."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(np.asarray(prompt.ids, np.int32).tobytes() + b"/")
    return found.hexdigest()[:16]


def _collate(prompts: Sequence[Prompt], index_B: np.ndarray, prompt_tokens: int, pad_id: int) -> PromptBatch:
    tokens_BP = np.full((len(index_B), prompt_tokens), pad_id, np.int32)
    mask_BP = np.zeros(tokens_BP.shape, bool)
    for row, index in enumerate(index_B):
        ids = prompts[index].ids
        tokens_BP[row, prompt_tokens - len(ids) :] = ids
        mask_BP[row, prompt_tokens - len(ids) :] = True
    return PromptBatch(tokens_BP, mask_BP, index_B.astype(np.int32), np.ones(len(index_B), bool))


def render(
    conversations: Sequence[sources.Conversation], tokenizer: Any, config: Any, where: str = ""
) -> tuple[list[Prompt], int]:
    """Renders and tokenises with the data section of a config.

    Returns:
      The prompts that fit, and how many did not.

    Raises:
      UserError: a prompt is too long and data.over_long is error; the message begins with `where`.
    """
    system = config.system_prompt
    options = tokenizers.template_options(config.template, tokenizer)
    turns = sources.read_turns(config.few_shot) if config.few_shot else []
    rendered = []
    for number, (messages, _, tools) in enumerate(conversations, 1):
        if config.instruction:
            last = messages[-1]
            asked = {**last, "content": f"{last['content']}\n\n{config.instruction}"}
            messages = [*messages[:-1], asked]
        own = messages[0]["role"] == "system"
        messages = [*messages[:own], *turns, *messages[own:]]
        # A conversation that brings a system message of its own keeps it.
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        named = f"{where}record {number}"
        rendered.append(tokenizers.render(tokenizer, messages, named, tools=tools, options=options))
    # The template has already written every special token.
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"] if rendered else []
    empty = next((number for number, row in enumerate(ids, 1) if not row), None)
    if empty is not None:
        raise UserError(
            f"{where}record {empty} has no token: the chat template writes nothing for it; fix the record, or"
            " data.template"
        )
    limit = config.prompt_tokens
    over_long = [len(row) for row in ids if len(row) > limit]
    if over_long and config.over_long == "error":
        raise UserError(
            f"{where}data.prompt_tokens={limit}: {len(over_long)} of {len(ids)} prompts are longer, the"
            f" longest has {max(over_long)} tokens; set data.prompt_tokens={max(over_long)} or"
            " data.over_long=drop"
        )
    prompts = [
        Prompt(tuple(row), found.text, found.answer, found.messages[-1]["content"])
        for row, found in zip(ids, conversations, strict=True)
        if len(row) <= limit
    ]
    return prompts, len(over_long)
