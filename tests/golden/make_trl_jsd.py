"""Makes trl_jsd.npz in this folder: the loss of trl's GKD trainer and its gradient.

    pip install torch trl  # the CPU build of torch is enough
    python tests/golden/make_trl_jsd.py

Writes
    student, teacher    [B, T, V] float32: logits
    mask                [B, T] bool: positions that count; one row has none
    beta                [N] float64
    loss                [N] float32: generalized_jsd_loss at temperature 1, a mean over the mask
    gradient            [N, B, T, V] float32: its gradient in the student's logits
    trl                 the version
"""

from pathlib import Path

import numpy as np
import torch
import trl
from trl.experimental.gkd import GKDTrainer

BETAS = (0.0, 0.1, 0.3, 0.5, 0.9, 1.0)
SHAPE = (3, 4, 17)


def main():
    rng = np.random.default_rng(20260513)
    student = rng.normal(size=SHAPE).astype(np.float32) * 2
    teacher = (student + 2 * rng.normal(size=SHAPE)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    labels = torch.where(torch.from_numpy(mask), 1, -100)
    losses, gradients = [], []
    for beta in BETAS:
        logits = torch.tensor(student, requires_grad=True)
        loss = GKDTrainer.generalized_jsd_loss(
            logits, torch.from_numpy(teacher), labels, beta, temperature=1.0
        )
        loss.backward()
        losses.append(loss.item())
        gradients.append(logits.grad.numpy())
    np.savez_compressed(
        Path(__file__).with_name("trl_jsd.npz"),
        student=student,
        teacher=teacher,
        mask=mask,
        beta=np.array(BETAS),
        loss=np.array(losses, np.float32),
        gradient=np.array(gradients),
        trl=trl.__version__,
    )


if __name__ == "__main__":
    main()
