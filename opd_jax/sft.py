"""Supervised fine-tuning on written responses, to teach a model to answer at all before distillation.

    python -m opd_jax.sft --config=configs/study/sorting_teacher.py --workdir=runs/sorting/teacher

Reads data.path, a JSONL file of {"messages": [...]} whose last message is the assistant's; of the data
section also template, prompt_tokens, over_long and heldout. Of the config's other sections it uses student,
rollout.batch, rollout.max_tokens (the longest response), scoring.chunk, optimizer, train, eval, checkpoint,
mesh and metrics; there is no teacher. Started again with the same --workdir, it continues from the newest
checkpoint.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from opd_jax import data
from opd_jax.config import run, validate
from opd_jax.distill import (
    Loss,
    LossInputs,
    Rollouts,
    TrainState,
    learning_rate,
    make_optimizer,
    train_step,
    trainable,
)
from opd_jax.errors import UserError
from opd_jax.models import ModelConfig, tokenizers, transformer
from opd_jax.parallel import compile_cache, distributed, sharding
from opd_jax.progress import Progress, own
from opd_jax.run import Session, StepReader, batching_of, due, job, metrics, programs, resolve, sizes


class Exchange(NamedTuple):
    """A rendered prompt and the ids of the response to it, its end token included."""

    prompt: data.Prompt
    response: tuple[int, ...]


def read(config, tokenizer, ends) -> tuple[list[Exchange], list[Exchange], int]:
    """Reads data.path; returns (train, heldout, how many were too long).

    Args:
      config: the whole config.
      tokenizer: a transformers tokenizer with a chat template.
      ends: ids that end a response.

    Raises:
      UserError: a file, line or data.template that cannot be used, or a line too long under
        data.over_long=error.
    """
    path = config.data.path
    options = tokenizers.template_options(config.data.template, tokenizer)
    conversations = data.read_file(path, replies=True)
    prompts, responses = [], []
    for number, (messages, _, tools) in enumerate(conversations, 1):
        ask, reply = messages[:-1], messages[-1]
        where = f"data.path={path}: record {number}"
        how = {"tools": tools, "options": options}
        prompt = tokenizers.render(tokenizer, ask, where, **how)
        whole = tokenizers.render(tokenizer, messages, where, answered=True, **how)
        if not whole.startswith(prompt):
            raise UserError(
                f"{where}: the chat template changes the prompt once a reply follows it; set data.template,"
                " or take another template"
            )
        prompts.append((prompt, "\n".join(message["content"] for message in ask)))
        responses.append(whole[len(prompt) :])
        if reply["content"].strip() not in responses[-1]:
            raise UserError(
                f"{where}: the chat template leaves out a part of the reply, so something else would be"
                " learnt; set data.template, or change the reply"
            )
    # The template has already written every special token.
    prompt_ids = tokenizer([p for p, _ in prompts], add_special_tokens=False)["input_ids"]
    response_ids = tokenizer(responses, add_special_tokens=False)["input_ids"]
    exchanges = [
        Exchange(data.Prompt(tuple(ids), text, None), _until_end(response, ends))
        for ids, (_, text), response in zip(prompt_ids, prompts, response_ids, strict=True)
    ]
    for number, (exchange, ids) in enumerate(zip(exchanges, response_ids, strict=True), 1):
        if tokenizer.decode(ids[len(exchange.response) :], skip_special_tokens=True).strip():
            raise UserError(
                f"data.path={path}: record {number}: an end token stands inside the reply, and what follows"
                " it would not be learnt; remove it from the text"
            )
    if not any(exchange.response[-1:] and exchange.response[-1] in ends for exchange in exchanges):
        raise UserError(
            f"data.path={path}: the chat template ends no reply with an end token of student.path"
            f" ({', '.join(map(str, sorted(ends))) or 'it has none'}), so the student would not learn to"
            " stop; name the token that the template writes in rollout.end_ids"
        )
    limits = config.data.prompt_tokens, config.rollout.max_tokens
    fitting = [e for e in exchanges if len(e.prompt.ids) <= limits[0] and len(e.response) <= limits[1]]
    dropped = len(exchanges) - len(fitting)
    if dropped and config.data.over_long == "error":
        longest = max(len(e.prompt.ids) for e in exchanges), max(len(e.response) for e in exchanges)
        raise UserError(
            f"data.path={path}: {dropped} lines are longer than data.prompt_tokens={limits[0]} or "
            f"rollout.max_tokens={limits[1]}; set them to {longest[0]} and {longest[1]}, or "
            "data.over_long=drop"
        )
    kept, held = data.hold_out([e.prompt for e in fitting], config.data.heldout)
    response_of = {id(e.prompt): e.response for e in fitting}
    train, heldout = ([Exchange(p, response_of[id(p)]) for p in part] for part in (kept, held))
    copies = len(fitting) - len(train) - len(heldout)
    if copies:
        logging.warning("%d conversations with a prompt that is held out are not trained on", copies)
    return train, heldout, dropped


def _until_end(ids, ends) -> tuple[int, ...]:
    """ids up to the first end token; templates may put white space after it."""
    last = next((n for n, token in enumerate(ids) if token in ends), len(ids) - 1)
    return tuple(ids[: last + 1])


def collate(exchanges: list[Exchange], batch: data.PromptBatch, max_tokens: int, pad_id: int) -> Rollouts:
    """Host Rollouts of the exchanges in a batch; what a sampler would have measured is 0."""
    b = len(batch.index_B)
    token_BT, mask_BT = np.full((b, max_tokens), pad_id, np.int32), np.zeros((b, max_tokens), bool)
    for row, index in enumerate(batch.index_B):
        ids = exchanges[index].response
        token_BT[row, : len(ids)], mask_BT[row, : len(ids)] = ids, True
    mask_BT &= batch.valid_B[:, None]
    zero_BT, none_BTK = np.zeros((b, max_tokens), np.float32), np.zeros((b, max_tokens, 0))
    return Rollouts(
        tokens_BL=np.concatenate([batch.tokens_BP, token_BT], axis=1),
        prompt_mask_BP=batch.mask_BP,
        mask_BT=mask_BT,
        logp_BT=zero_BT,
        behaviour_logp_BT=zero_BT,
        topk_BTK=none_BTK.astype(np.int32),
        topk_logp_BTK=none_BTK.astype(np.float32),
        stop_BT=zero_BT,
        finished_B=mask_BT.any(axis=1),
    )


def make_sft_step(model: ModelConfig, config, optimizer):
    """Builds (step, heldout): step(state, rollouts) -> (state, metrics), heldout(params, rollouts) -> sums.

    The loss is the mean negative log-likelihood of the response tokens of the whole batch, in nats.
    """
    micro_batches = config.rollout.batch // config.train.micro_batch
    schedule = learning_rate(config)
    loss = Loss.of(model, None, config, "sft")
    plain_loss = dataclasses.replace(loss, remat="none")
    update = train_step.make_update(loss, optimizer, micro_batches, pack=config.train.pack)

    def inputs(rollouts: Rollouts) -> LossInputs:
        weight_BT = rollouts.mask_BT.astype(jnp.float32)
        return LossInputs(rollouts, advantage_BT=jnp.zeros_like(weight_BT), weight_BT=weight_BT)

    def step(state: TrainState, rollouts: Rollouts):
        tokens = train_step.response_tokens(rollouts)
        trained, frozen = trainable.split(state.params, config.train.frozen)
        (trained, opt_state), (mean_loss, norm, skipped, load, computed) = update(
            (trained, state.opt_state), inputs(rollouts), frozen, None, tokens
        )
        measured = {
            "loss": mean_loss,
            "grad_norm": norm,
            "skipped_updates": jnp.float32(skipped),
            "learning_rate": jnp.float32(schedule(state.step)),
            "response_tokens": tokens,
            "computed_in_gradient": computed,
        } | train_step.router_metrics("student", load)
        return TrainState(state.step + 1, trainable.join(trained, frozen), opt_state), measured

    def heldout(params, rollouts: Rollouts):
        total, _ = train_step.sum_of_parts(
            lambda part: plain_loss(params, part, {}, None, 1.0)[0],
            inputs(rollouts),
            micro_batches,
            pack=config.train.pack,
        )
        return total, rollouts.mask_BT.sum()

    return step, heldout


def train(config, workdir, progress: Progress | None = None) -> TrainState:
    """Trains to train.steps, from the start or from the newest checkpoint in workdir.

    Args:
      progress: shows what goes on; the run has its own if not given.

    Raises:
      UserError: the first thing that is wrong, before anything is compiled or written.
      distributed.Preempted: told to stop before the last step; the state is saved.
    """
    with own(progress) as shown:
        return _train(config, workdir, shown)


def _train(config, workdir, shown: Progress) -> TrainState:
    c = validate(config, teacher=False)
    if c.train.updates_per_rollout != 1:
        raise UserError(
            f"train.updates_per_rollout={c.train.updates_per_rollout}: fine-tuning makes one update a step;"
            " set it to 1"
        )
    job.check_workdir(workdir, c)
    compile_cache.enable(c.compile.cache)
    mesh = sharding.make_mesh(c.mesh)
    probe = resolve.settle_products(c, mesh, workdir)
    sizes.fill_micro_batch(c, mesh)
    tokenizer = tokenizers.load(c.student.path, "student.path")
    model = resolve.student_model(c, mesh)
    sizes.check_length(c, "student.path", model)
    model = model.replace(eos_ids=tokenizers.end_ids(tokenizer, model, c.rollout.end_ids))
    with shown.phase("reading the written responses"):
        exchanges, heldout, dropped = read(c, tokenizer, set(model.eos_ids))
    optimizer = make_optimizer(c)
    trainable.check(transformer.abstract(model), c.train.frozen)
    shardings = programs.state_shardings(c, mesh, model, optimizer)
    rows, whole = sharding.batch(mesh), sharding.replicated(mesh)
    step_fn, heldout_fn = make_sft_step(model, c, optimizer)
    step_fn = jax.jit(
        sharding.on(mesh, step_fn),
        in_shardings=(shardings, rows),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
    heldout_fn = jax.jit(
        sharding.on(mesh, heldout_fn), in_shardings=(shardings.params, rows), out_shardings=whole
    )
    batching = batching_of(c, mesh, model)

    def placed(part, batch):
        return sharding.put_batch(mesh, collate(part, batch, c.rollout.max_tokens, model.pad_id))

    def evaluate(state) -> dict:
        label, parts = f"evaluating on {len(heldout)} responses, batch", -(-len(heldout) // batching.batch)
        sums = []
        with shown.work("evaluation", label, parts):
            for number, batch in enumerate(data.heldout_batches([e.prompt for e in heldout], batching)):
                shown.at(number + 1)
                with shown.compiling("the evaluation", heldout_fn):
                    sum_and_tokens = heldout_fn(state.params, placed(heldout, batch))
                sums.append(jax.device_get(sum_and_tokens))
        loss, tokens = np.sum(sums, axis=0)
        return {"loss": float(loss / tokens), "prompts": len(heldout), "tokens": int(tokens)}

    with Session(c, workdir, shown) as session:
        metrics.write_run_files(workdir, c, measured=probe and probe.record())
        state, position = session.state(
            lambda: job.start_state(c, mesh, optimizer, shardings),
            lambda: programs.placed(programs.abstract_state(model, optimizer), shardings),
        )
        prompts = data.TrainingBatches([e.prompt for e in exchanges], batching, c.seed, position)
        writer = session.record(plain_every=100)
        if dropped:
            writer.say(f"data.over_long=drop: {dropped} lines are left out")
        shown.expect("step", c.train.steps - session.first)
        ahead = range(session.first + 1, c.train.steps + 1)
        shown.expect("evaluation", sum(due(c, c.eval.every, step) for step in ahead))
        # The evaluation that was due after the step at which the run was stopped.
        left_out = session.done is not None and due(c, c.eval.every, session.done)
        if left_out and not session.recorded([("eval", None)]):
            writer.write({"kind": "eval", "step": session.done} | evaluate(state))
        reader = StepReader(writer, c, session.skipped)

        def finish():
            if reader.step is not None:
                with shown.phase(f"step {reader.step}/{c.train.steps}"):
                    reader.finish()

        for step in ahead:
            with shown.compiling("the training step", step_fn):
                state, measured = step_fn(state, placed(exchanges, next(prompts)))
            finish()  # the step before, while the device works on this one
            reader.begin(step, measured)
            stopping = session.stopping()
            evaluating, saving = due(c, c.eval.every, step) and not stopping, session.saves(step, stopping)
            if evaluating or saving or stopping or step == c.train.steps:
                finish()
            if evaluating:
                writer.write({"kind": "eval", "step": step} | evaluate(state))
                reader.restart()
            if saving:
                session.save(step, state, prompts.state())
            if stopping:
                session.stop(step)
        session.sync()
    return state


def main(_):
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is not set; give a folder for the run, such as runs/sft")
    if flags.FLAGS.config is None:
        raise UserError("--config is not set; give a file such as configs/study/sorting_teacher.py")
    distributed.initialize()
    train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    run(main)
