"""Preflight reports as text."""

from opd_jax.preflight import check, reports

GIB = 2**30


def step(report: reports.StepReport, where: str) -> str:
    """The whole report: a table of programs, and lines about the step."""
    columns = ("", *(program.name for program in report.programs))
    rows = [columns]

    def row(name, value):
        rows.append((name, *(value(program) for program in report.programs)))

    row("arguments, GiB", lambda r: f"{r.arguments / GIB:.2f}")
    row("temporaries, GiB", lambda r: f"{r.temporaries / GIB:.2f}")
    row("resident, GiB", lambda r: f"{r.resident / GIB:.2f}")
    row("peak of capacity, GiB", _peak)
    row("model TFLOPs", lambda r: f"{r.flops / 1e12:.4g}")
    row("program TFLOPs", lambda r: f"{r.program_flops / 1e12:.4g}")
    row("HBM traffic, GB", lambda r: f"{r.bytes / 1e9:.4g}")
    row("compute, s", lambda r: f"{r.compute_seconds:.3g}")
    row("HBM, s", lambda r: f"{r.memory_seconds:.3g}")
    row("links, s", lambda r: "?" if r.shortage else f"{r.link_seconds:.3g}")
    if any(program.network_seconds for program in report.programs):
        row("network, s", lambda r: "?" if r.shortage else f"{r.network_seconds:.3g}")
    if any(program.host for program in report.programs):
        row("in the host's memory, GiB", lambda r: f"{r.host / GIB:.2f}")
        row("copies of it, s", lambda r: "?" if r.shortage else f"{r.host_seconds:.3g}")
    row("bound by", lambda r: r.bound)
    for kind in sorted({kind for program in report.programs for kind in program.collectives}):
        row(f"{kind}, GB", lambda r, kind=kind: _collective(r.collectives.get(kind)))
    row("compile, s", lambda r: f"{r.compile_seconds:.0f}")
    held = ", ".join(f"{name} {size / GIB:.2f}" for name, size in report.held.items())
    lines = [where, *_aligned(rows), "", f"held all the time, GiB: {held}"]
    for program in report.programs:
        lines += [f"largest in {program.name}:"] if program.largest else []
        lines += [f"  {size / GIB:6.2f} GiB  {shape}  {op[-80:]}" for size, shape, op in program.largest]
    lines += [
        "",
        _release(report.programs[1]),
        *(f"assumed: {assumption}" for assumption in check.ASSUMED),
        f"predicted step: {report.seconds:.3g} s (sample + train_step, responses of full length), "
        f"{report.tokens_a_second:.4g} response tokens a second a device",
        _micro_batch(report),
        *_ragged(report.ragged),
    ]
    for program in report.programs:
        if program.shortage:
            lines.append(f"FAILS: {program.name} does not fit: {program.shortage}")
        elif not program.fits:
            lines.append(f"FAILS: {program.name} does not fit: {_peak(program)} GiB")
        lines += [f"FAILS: {program.name} {fault}" for fault in program.faults]
    return "\n".join([*lines, "passes" if report.ok else "does not pass"])


def search(found) -> str:
    """One line for each mesh and micro-batch, the best first; then the flags of the best."""
    rows = [("mesh", "micro-batch", "predicted s", "peak, GiB", "passes")]
    for mesh, micro_batch, report in found:
        sizes = " ".join(f"{axis}={n}" for axis, n in mesh.items())
        peaks = " / ".join(_peak(program) for program in report.programs)
        rows.append((sizes, str(micro_batch), f"{report.seconds:.3g}", peaks, "yes" if report.ok else "no"))
    mesh, micro_batch, best = found[0]
    sizes = "".join(f"--config.mesh.{axis}={n} " for axis, n in mesh.items())
    named = f"best: {sizes}--config.train.micro_batch={micro_batch}" if best.ok else "none passes"
    return "\n".join([*_aligned(rows), named])


def _peak(r: reports.ProgramReport) -> str:
    if r.shortage:
        return r.shortage
    return f"{(r.peak + r.resident) / GIB:.2f} of {r.capacity / GIB:.2f}"


def _release(train: reports.ProgramReport) -> str:
    operations, size = train.release
    shares = operations / train.program_flops, size / train.bytes
    return "segments and release rule: at most {:.2g}% of train_step's FLOPs, {:.2g}% of its bytes".format(
        *(100 * share for share in shares)
    )


def _collective(total) -> str:
    return "–" if total is None else f"{total[1] / 1e9:.3g} ({total[0]}×)"


def _micro_batch(report: reports.StepReport) -> str:
    best = report.largest_micro_batch
    if best is None:
        return f"micro-batch: {report.micro_batch}"
    return f"micro-batch: {report.micro_batch}; the largest that fits train_step: {best}"


def _ragged(ragged: reports.Ragged | None) -> list[str]:
    if ragged is None:
        return []
    rows = [("predicted, s", "sample", "train_step", "step")]
    named = {
        "at full length": ragged.full,
        f"at {ragged.mean_tokens:.0f} tokens, the mean": ragged.written,
        "the same, padded": ragged.padded,
    }
    rows += [(name, *(f"{s:.3g}" for s in (*seconds, sum(seconds)))) for name, seconds in named.items()]
    share = sum(ragged.written) / sum(ragged.padded)
    return ["", *_aligned(rows), f"these lengths take {share:.2f} of the padded time"]


def _aligned(rows) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
