"""How long the responses of a batch are: all at the limit, drawn, or as in a run."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opd_jax.distill import packing, rollout
from opd_jax.errors import UserError
from opd_jax.models import ModelConfig, attention, cache
from opd_jax.preflight.costs import Stretch
from opd_jax.preflight.jaxprs import Trips

STOPS = (
    "SHARE:KEPT:WRITTEN, the share of responses that stop, and what they keep and write of their length,"
    " or the rollouts.jsonl of a run with stops"
)
FORMS = "full, lognormal:MEAN:SIGMA with MEAN a share of the limit, or a run's rollouts.jsonl"


def response_lengths(spec: str, rows: int, longest: int, seed: int = 0) -> np.ndarray:
    """[rows] lengths in tokens, from 1 to `longest`.

    Args:
      spec: one of FORMS. MEAN is that before lengths past the limit are cut to it; a file's are drawn with
        replacement.

    Raises:
      UserError: the form or the file is wrong.
    """
    if spec == "full":
        return np.full(rows, longest)
    rng = np.random.default_rng(seed)
    kind, *numbers = spec.split(":")
    if kind == "lognormal":
        try:
            mean, sigma = map(float, numbers)
        except ValueError:
            mean = sigma = float("nan")
        if not (mean > 0 and sigma >= 0):
            raise UserError(f"--lengths={spec}: give {FORMS}, such as lognormal:0.3:0.7")
        found = rng.lognormal(np.log(mean * longest) - sigma**2 / 2, sigma, rows)
    else:
        found = rng.choice([tokens for tokens, _ in _written(spec, "--lengths", FORMS)], rows)
    return np.clip(np.rint(found), 1, longest).astype(int)


def _written(path: str, flag: str, forms: str) -> list[tuple[int, int]]:
    """(tokens, tokens kept) of each response of a rollouts.jsonl."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        found = [(int(row["tokens"]), int(row.get("kept_tokens", row["tokens"]))) for row in rows]
    except FileNotFoundError:
        raise UserError(f"{flag}={path}: there is no such file; give {forms}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        found = []
    if not found:
        raise UserError(f"{flag}={path} has no records with tokens; give {forms}")
    return found


def decode(length_SR: np.ndarray, prompt: int, halvings: int, whole: int = 0) -> list[Stretch]:
    """The decode steps of responses with these lengths, as `rollout.sample` makes them.

    Args:
      length_SR: tokens of the rows of each of S devices.
      prompt: P, the slots that are filled when they begin.
      halvings: rollout.halvings.
      whole: slots of a cache that every step reads whole; 0 if a step reads what is written.

    Returns:
      halvings + 1 stretches, some without a step. The first token of a response costs no step.
    """
    ordered_SR = np.sort(length_SR, axis=1)[:, ::-1]
    rows, t, found = length_SR.shape[1], 1, []
    for halving in range(halvings + 1):
        final = halving == halvings or rows == 1
        fewer = 0 if final else -(-rows // 2)
        # The step at t runs while more than `fewer` rows of some device are longer than t.
        end = max(t, int(ordered_SR[:, fewer].max()))
        found.append(Stretch(rows, end - t, whole or prompt + (t + end - 1) / 2))
        rows, t = fewer, end
        if final:
            break
    return found + [Stretch(1, 0, 0.0)] * (halvings + 1 - len(found))


def rounds(decoded: list[Stretch], judged: int = 0) -> list[tuple[int, Trips]]:
    """The steps of each stretch's loop, and the blocks of the cache that each step may read one by one.

    Args:
      judged: tokens of a block, if the teacher reads along; then each stretch is a loop over blocks, with the
        steps and the blocks of the teacher's cache inside.
    """
    found: list[tuple[int, Trips]] = []
    for _, steps, slots in decoded:
        read = -(-int(slots) // attention.SLOTS)
        blocks = -(-steps // judged) if judged else 0
        inside = [(round(steps / max(blocks, 1)), read), (-(-int(slots) // cache.read_slots(int(slots))), 0)]
        found.append((blocks, inside) if judged else (steps, read))
    return found


def judged(config) -> int:
    """Tokens of a block that the teacher reads while the student writes; 0 where it does not."""
    return min(config.release.stop_block, config.rollout.max_tokens) if config.release.stop == "rule" else 0


class Written(NamedTuple):
    """How much of each response is written, and how much of it the gradient reads, in tokens."""

    written_B: np.ndarray
    kept_B: np.ndarray


def stopped(spec: str, length_B: np.ndarray, seed: int = 0) -> Written:
    """What is left of responses of these lengths if some of them stop.

    Args:
      spec: see STOPS; "" stops none. A file's rows are drawn with replacement, and are as long as there.

    Raises:
      UserError: the form is wrong.
    """
    if not spec:
        return Written(length_B, length_B)
    if spec.endswith(".jsonl"):
        rows = np.random.default_rng(seed).choice(_written(spec, "--stops", STOPS), len(length_B))
        return Written(*np.maximum(rows, 1).T)
    try:
        share, kept, written = map(float, spec.split(":"))
    except ValueError:
        share = kept = written = float("nan")
    if not (0 <= share <= 1 and 0 < kept <= written <= 1):
        raise UserError(f"--stops={spec}: give {STOPS}, such as 0.79:0.13:0.2")
    stops_B = np.arange(len(length_B)) < round(share * len(length_B))
    stops_B = np.random.default_rng(seed).permutation(stops_B)
    shares = (np.where(stops_B, part, 1.0) for part in (written, kept))
    return Written(*(np.maximum(np.rint(part_B * length_B), 1).astype(int) for part_B in shares))


def chunks(config) -> int:
    """Pieces of scoring.chunk positions into which a full response is cut."""
    return -(-config.rollout.max_tokens // config.scoring.chunk)


def micro_batches(config) -> int:
    """Micro-batches of a step."""
    return config.rollout.batch // config.train.micro_batch


def full(config) -> list[int]:
    """`packed` for responses of full length."""
    return [chunks(config)] * micro_batches(config)


def packed(config, devices: int, length_B: np.ndarray) -> list[int]:
    """Of each micro-batch that scoring computes when it has packed the rows, the chunks of its responses.

    Args:
      devices: parts into which the mesh cuts the batch.
      length_B: tokens of each response; its prompt has full length.
    """
    p, t, pieces = config.data.prompt_tokens, config.rollout.max_tokens, micro_batches(config)
    chunk = -(-t // chunks(config))
    response_SN = length_B.reshape(devices, -1).astype(np.int32)
    if pieces == 1:
        return [-(-int(response_SN.max()) // chunk)]
    if not config.train.pack:
        return full(config)
    laid = packing.lay(np.full_like(response_SN, p), response_SN, p + t, t)
    end_SN = np.asarray(laid.slot_SN) + response_SN
    piece_SN = np.asarray(laid.sequence_SN) // (response_SN.shape[1] // pieces)
    return [-(-int(end_SN[piece_SN == n].max()) // chunk) for n in range(int(packing.rounds(laid, pieces)))]


def training_rounds(
    config, packed: list[int], passes: int, recomputed: bool = False
) -> list[tuple[int, Trips]]:
    """Rounds of the loops of scoring and the gradient, and of those inside them; see `rounds`.

    Args:
      packed: as the function of this name returns it.
      passes: how many of the two the program has.
      recomputed: whether scoring reads the student's logits too.
    """
    if micro_batches(config) == 1:  # without a loop over micro-batches
        return [(packed[0], 0)] * (passes + recomputed)
    return [(len(packed), round(sum(packed) / len(packed)))] * passes


def of_config(
    config, writer: ModelConfig, devices: int, length_B: np.ndarray, samples: int = 1
) -> list[list[Stretch]]:
    """`decode` for each turn of rollout.slots, of a run's sampler.

    Args:
      writer: the model that writes, as the sampler takes it.
      devices: parts into which the mesh cuts the batch.
      length_B: tokens of each response.
      samples: responses to each prompt, which are written in one turn.
    """
    r, slots = config.rollout, config.data.prompt_tokens + config.rollout.max_tokens
    turns = rollout.parts(len(length_B) // samples, r.slots // samples, devices)
    length_SQNn = length_B.reshape(devices, -1, turns, samples)  # neighbouring prompts have different turns
    whole = slots if writer.cache_reads == "all" else 0
    of_turns = (length_SQNn[:, :, turn].reshape(devices, -1) for turn in range(turns))
    return [decode(length_SR, config.data.prompt_tokens, r.halvings, whole) for length_SR in of_turns]
