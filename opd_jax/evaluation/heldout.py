"""The student's distance to its teacher on held-out prompts, and how the teacher itself answers them."""

import time

import jax
import numpy as np

from opd_jax import data
from opd_jax.distill import repeats
from opd_jax.evaluation.estimates import bootstrap_ratio
from opd_jax.parallel import sharding
from opd_jax.progress import Progress, own


def evaluate(job, params: dict, teacher_params: dict, progress: Progress | None = None) -> dict:
    """Samples a response to every held-out prompt and measures it against the teacher.

    Every evaluation of a run uses the same prompts and the same uniform draws, so that two of them
    differ by the student alone.

    Args:
      progress: shows what goes on, as a piece of work "evaluation"; the evaluation has its own if not given.

    Returns:
      kl, kl_low, kl_high: KL(student || teacher) over the whole vocabulary, nats a response token, on the
      student's own responses, with a 95% bootstrap interval over prompts; teacher_logp, the teacher's
      log-probability of those responses, nats a token; response_length, tokens; finished_share;
      repeated_share, of the responses that end in a loop (`repeats.repeated_tail`); prompts, tokens; seconds;
      seconds_sample and seconds_compare, of one batch, the most of all but the first, which may compile; and
      rows, one dict a prompt: prompt (its number), text, response, kl, tokens, finished.
    """
    started = time.perf_counter()
    out, seconds = [], []
    count = len(job.prompts.heldout)
    batching = job.batching.fitting(job.mesh, count)
    label, parts = f"evaluating on {count} held-out prompts, batch", -(-count // batching.batch)
    with own(progress) as shown, shown.work("evaluation", label, parts):
        for number, local in enumerate(data.heldout_batches(job.prompts.heldout, batching)):
            shown.at(number + 1)
            clock = [time.perf_counter()]
            batch, rollouts = jax.block_until_ready(job.evaluation_draw(params, local, number, shown))
            clock.append(time.perf_counter())
            with shown.compiling("the divergence", job.divergence):
                sums = jax.device_get(job.divergence(params, teacher_params, rollouts))
            clock.append(time.perf_counter())
            seconds.append(np.diff(clock))
            read = batch.index_B, batch.valid_B, rollouts.tokens_BL, rollouts.mask_BT
            index_B, valid_B, tokens_BL, mask_BT = sharding.gather(job.mesh, read)
            response_BT = tokens_BL[:, -mask_BT.shape[1] :]
            responses = [
                job.tokenizer.decode(row_T[on_T]) for row_T, on_T in zip(response_BT, mask_BT, strict=True)
            ]
            columns = {"index_B": index_B, "valid_B": valid_B, "response_B": np.array(responses, object)}
            out.append(sums | columns)
    columns = {name: np.concatenate([o[name] for o in out]) for name in out[0]}
    columns = {name: x[columns["valid_B"]] for name, x in columns.items()}
    kl_B, tokens_B = columns["kl_B"].astype(np.float64), columns["tokens_B"]
    low, high = bootstrap_ratio(kl_B, tokens_B)
    sample_seconds, compare_seconds = np.max(seconds[1:] or seconds, axis=0).tolist()
    return {
        "kl": float(kl_B.sum() / tokens_B.sum()),
        "kl_low": low,
        "kl_high": high,
        "teacher_logp": float(columns["teacher_logp_B"].astype(np.float64).sum() / tokens_B.sum()),
        "response_length": float(tokens_B.mean()),
        "finished_share": float(columns["finished_B"].mean()),
        "repeated_share": float(columns["repeated_B"].mean()),
        "prompts": len(tokens_B),
        "tokens": int(tokens_B.sum()),
        "seconds": time.perf_counter() - started,
        "seconds_sample": sample_seconds,
        "seconds_compare": compare_seconds,
        "rows": [
            {
                "prompt": int(index),
                "text": job.prompts.heldout[index].text,
                "response": response,
                "kl": float(kl / tokens),
                "tokens": int(tokens),
                "finished": bool(finished),
            }
            for index, response, kl, tokens, finished in zip(
                columns["index_B"],
                columns["response_B"],
                kl_B,
                tokens_B,
                columns["finished_B"],
                strict=True,
            )
        ],
    }


def evaluate_teacher(job, teacher_params: dict, progress: Progress | None = None) -> dict:
    """Has the teacher answer the held-out prompts in the student's place: same limit, same uniform draws.

    This is the goal for the student: it need not end more responses than its teacher does.

    Returns:
      response_length, finished_share, repeated_share, prompts, tokens and seconds, as `evaluate`'s.
    """
    started = time.perf_counter()
    out = []
    count = len(job.prompts.heldout)
    batching = job.batching.fitting(job.mesh, count)
    label, parts = f"the teacher answers {count} held-out prompts, batch", -(-count // batching.batch)
    with own(progress) as shown, shown.phase(label, parts=parts):
        for number, local in enumerate(data.heldout_batches(job.prompts.heldout, batching)):
            shown.at(number + 1)
            batch, rollouts = job.teacher_evaluation_draw(teacher_params, local, number, shown)
            read = batch.valid_B, rollouts.tokens_BL, rollouts.mask_BT, rollouts.finished_B
            valid_B, tokens_BL, mask_BT, finished_B = sharding.gather(job.mesh, read)
            repeated_B = repeats.repeated_tail(tokens_BL[:, -mask_BT.shape[1] :], mask_BT, finished_B)
            columns = mask_BT.sum(axis=1), finished_B, np.asarray(repeated_B)
            out.append([column[valid_B] for column in columns])
    tokens_B, finished_B, repeated_B = (np.concatenate(column) for column in zip(*out, strict=True))
    return {
        "response_length": float(tokens_B.mean()),
        "finished_share": float(finished_B.mean()),
        "repeated_share": float(repeated_B.mean()),
        "prompts": len(tokens_B),
        "tokens": int(tokens_B.sum()),
        "seconds": time.perf_counter() - started,
    }
