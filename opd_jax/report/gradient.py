"""The section of a report on signal and noise of the gradient (metrics.gradient_noise_every)."""

from collections.abc import Sequence

import numpy as np

from opd_jax.report import html
from opd_jax.run import Run, column

TITLE = "Signal and noise of the gradient"
PARTS = ("kept", "all", "released")  # as in distill/gradient_noise.py, whose import would need JAX
LABELS = ("trained on", "all tokens", "released alone")


def section(runs: Sequence[Run]) -> str:
    """The section; if no run has measured it, one line that says how."""
    found = [[column(run.train, f"gradient_snr_{part}")[1] for part in PARTS] for run in runs]
    if not any(values for run in found for values in run):
        why = "Not measured: set metrics.gradient_noise_every, the steps between measurements."
        return html.section(TITLE, f'<p class="empty">{why}</p>')
    lines = [
        "median signal-to-noise "
        + ", ".join(
            f"{np.median(values):.2f} ({label})" if values else f"– ({label})"
            for label, values in zip(LABELS, run, strict=True)
        )
        + f", over {max(map(len, run))} measurements."
        for run in found
    ]
    return html.section(
        TITLE,
        html.words(runs, lines),
        html.panels(
            runs,
            html.panel(
                "Gradient norm, with and without what is released",
                html.curve(
                    runs,
                    "Gradient norm by tokens",
                    "gradient norm, nats/token per unit of weight",
                    *(f"gradient_norm_{part}" for part in PARTS),
                    labels=LABELS,
                ),
                "Of the batch's gradient, unclipped: of the tokens and weights trained on, of all tokens, and"
                " of the released ones alone.",
                "No norm was measured.",
            ),
            html.panel(
                "Signal-to-noise ratio",
                html.curve(
                    runs,
                    "Signal-to-noise ratio of the gradient by tokens",
                    "signal power / noise power, ratio",
                    *(f"gradient_snr_{part}" for part in PARTS),
                    labels=LABELS,
                ),
                "|expected gradient|² over the variance of the batch's gradient, estimated from groups of its"
                " prompts. 1: as much signal as noise. Around 0, or below by chance: noise alone.",
                "No ratio was measured.",
            ),
        ),
    )
