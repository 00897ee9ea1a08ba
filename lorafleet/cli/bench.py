"""``lorafleet bench …``: measurements of this machine, beside peers and floors."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lorafleet.cli import bench_fairness, bench_federation, bench_service
from lorafleet.cli.bench_options import check_parent, numbers, say, words
from lorafleet.cli.output import JsonFlag, print_json, print_table
from lorafleet.stopping import interruptible

app = typer.Typer(help="Measure speed on this machine, against peers and the floor.", no_args_is_help=True)
for command in (bench_federation.federation, bench_federation.schedulers, bench_federation.dropout):
    app.command()(command)
app.command()(bench_fairness.fairness)
app.command()(bench_service.service)


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class AggregateShape(StrEnum):
    tiny = "tiny"
    one = "1B"
    eight = "8B"


class Modules(StrEnum):
    attention = "attention"
    all = "all"


class Where(StrEnum):
    here = "here"
    ray = "ray"


class Dtype(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


@app.command()
def engine(
    shape: Annotated[str, typer.Option(metavar="S|M|8B|tiny", help="The base's size, with random weights.")],
    rows: Annotated[
        str | None, typer.Option(metavar="ROW,ROW", help="Only these rows of the table. (default: all)")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each row is run; figures are medians.")] = 3,
    device: Annotated[Device, typer.Option(help="Where all rows run.")] = Device.cpu,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each row. (default: every core)")] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The Python of an environment with vLLM, for its rows.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the random weights here. (default: a temporary folder)")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the record is appended.")] = Path(
        "benchmarks/results"
    ),
    json: JsonFlag = False,
) -> None:
    """Time the engine's generation beside transformers', peft's and vLLM's, each row in a process of its own.

    A row whose correctness check is red is refused, and the command exits with 1. Prints a table and appends a record.
    """
    from contextlib import ExitStack
    from datetime import UTC, datetime
    from tempfile import TemporaryDirectory

    from lorafleet.bench.engine import bench_engine
    from lorafleet.bench.machine import cores
    from lorafleet.bench.rows import select
    from lorafleet.bench.run import Settings
    from lorafleet.bench.shapes import get_shape
    from lorafleet.bench.table import COLUMNS, lines, notes

    if vllm_python is not None and not vllm_python.is_file():
        raise typer.BadParameter(f"--vllm-python: found no file at {vllm_python}, expected a Python that has vLLM")
    asked = None if rows is None else list(words(rows))
    found, selection = get_shape(shape), select(asked, vllm=vllm_python is not None, cuda=device is Device.cuda)
    with interruptible(), ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(TemporaryDirectory(prefix="lorafleet-bench-weights-")))
        benchmark = bench_engine(
            Settings(
                shape=found,
                selection=selection,
                repeats=repeats,
                device=device.value,
                threads=threads or cores(),
                work=work.absolute(),
            ),
            asked=asked,
            # Not resolved: the link in an environment is what makes Python find that environment.
            vllm_python=vllm_python.absolute() if vllm_python is not None else None,
            out=out,
            when=datetime.now(UTC),
            say=say,
        )
    if json:
        print_json(benchmark.record)
    else:
        print_table(COLUMNS, lines(benchmark.record))
        for note in notes(benchmark.record):
            typer.echo(note)
        typer.echo(f"record: {benchmark.file}")
    if not benchmark.complete:
        raise typer.Exit(1)


@app.command()
def kernels(
    device: Annotated[Device, typer.Option(help="Where the kernels run.")] = Device.cpu,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. (default: every core)")] = None,
    fit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Fit a cost model to the measurements, and write it here.")
    ] = None,
    floor: Annotated[
        str | None,
        typer.Option(
            metavar="S|M|8B|tiny",
            help="Instead: decoding at batch 64 with two adapters a request, at the shapes of this base, against the "
            "bytes that it has to move.",
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Time every kernel path on workloads of many kinds, and say how far each is from the fastest.

    A path whose result is not the reference's is not timed: the command ends with an error.
    """
    from datetime import UTC, datetime

    import torch

    from lorafleet.bench.kernels import all_workloads, bench_kernels, summarise
    from lorafleet.bench.machine import cores, this_cpu
    from lorafleet.kernels.cost_model import fit as fit_model
    from lorafleet.kernels.dispatch import DEFAULT_MODEL

    check_parent("--fit", fit)
    torch.set_num_threads(threads or cores())
    if floor is not None:
        if fit is not None:
            raise typer.BadParameter("--floor: found --fit as well, expected one of them; they are two measurements")
        _floor(floor, device, json=json)
        return
    measurements = list(bench_kernels(all_workloads(), device=device.value))
    model = DEFAULT_MODEL if device is Device.cpu else None
    if fit is not None:
        about = {
            "processor": torch.cuda.get_device_name() if device is Device.cuda else this_cpu(),
            "threads": str(torch.get_num_threads()),
            "torch": torch.__version__,
            "date": datetime.now(UTC).date().isoformat(),
        }
        model = fit_model(measurements, device=device.value, about=about)
        model.save(fit)
    found = summarise(measurements, model=model)
    if json:
        print_json({"paths": [p._asdict() for p in found], "measurements": [m._asdict() for m in measurements]})
    else:
        print_table(
            ["dtype", "path", "fastest in", ": fastest", "at worst"],
            [(p.dtype, p.path, f"{p.fastest} of {p.workloads}", p.mean_ratio, p.worst_ratio) for p in found],
        )


@app.command()
def client(
    shape: Annotated[
        str | None, typer.Option(metavar="S|M|8B|tiny", help="Random weights of this size. (default: the shipped base)")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters that are trained.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens a sequence.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Steps a training; the first three are not timed.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="How often each row is run; figures are medians.")] = 3,
    dtype: Annotated[Dtype, typer.Option(help="auto: bfloat16 where the device multiplies it.")] = Dtype.auto,
    device: Annotated[Device, typer.Option(help="Where all rows run.")] = Device.cpu,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each row. (default: every core)")] = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the random weights here. (default: a temporary folder)")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the record is appended.")] = Path(
        "benchmarks/results"
    ),
    json: JsonFlag = False,
) -> None:
    """Time a member's training beside a plain peft + transformers Trainer loop, each in a process of its own.

    Where they do not end at the same loss, no times are printed, and the command exits with 1.
    """
    from contextlib import ExitStack
    from datetime import UTC, datetime
    from tempfile import TemporaryDirectory
    from typing import cast

    import torch

    from lorafleet.assets import base_path
    from lorafleet.bench.client import ClientSettings, bench_client
    from lorafleet.bench.client_jobs import Dtype as RowDtype
    from lorafleet.bench.client_jobs import TrainChildren
    from lorafleet.bench.machine import cores
    from lorafleet.bench.shapes import get_shape
    from lorafleet.clients.machine import as_dtype

    name = str(as_dtype(dtype.value, torch.device(device.value))).removeprefix("torch.")
    with interruptible(), ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="lorafleet-bench-")))
        weights = (work or folder / "weights").absolute()
        benchmark = bench_client(
            ClientSettings(
                base=base_path("tiny") if shape is None else weights / f"client-{get_shape(shape).key}",
                shape=shape,
                device=device.value,
                dtype=cast(RowDtype, name),
                threads=threads or cores(),
                rank=rank,
                batch_size=batch_size,
                sequence_length=sequence_length,
                steps=steps,
                repeats=repeats,
            ),
            run=TrainChildren(folder),
            out=out,
            when=datetime.now(UTC),
            say=say,
        )
    outcome = benchmark.outcome
    if json:
        print_json(benchmark.record)
    elif outcome.problem:
        typer.echo(f"refused: {outcome.problem}")
    else:
        print_table(
            ["row", "tokens/s", "peak MB beyond the base", "final loss", "s in all"],
            [
                (row, f"{f.tokens_per_s:.0f}", f"{f.peak_bytes / 1e6:.0f}", f.final_loss, f"{f.total_s:.1f}")
                for row, f in outcome.figures.items()
            ],
        )
        for ratio in outcome.ratios:
            said = "met" if ratio.met else "missed"
            typer.echo(
                f"ours : {ratio.to}: {ratio.tokens_per_s:.2f} of the tokens/s, {ratio.peak_bytes:.2f} of the memory "
                f"(at least as fast, no more memory: {said})"
            )
        typer.echo(f"record: {benchmark.file}")
    if outcome.problem:
        raise typer.Exit(1)


@app.command()
def aggregate(
    shape: Annotated[AggregateShape, typer.Option(help="Of the base that is adapted.")] = AggregateShape.tiny,
    clients: Annotated[
        str, typer.Option(metavar="N,N", help="Numbers of clients: the points of the growth curve.")
    ] = "8,100,1000",
    ranks: Annotated[str, typer.Option(metavar="R,R", help="Ranks, dealt to the clients in turn.")] = "4,8,16,32,64",
    modules: Annotated[Modules, typer.Option(help="attention: q, k, v and o.")] = Modules.all,
    where: Annotated[Where, typer.Option(help="here: in one process; ray: on a cluster of this machine.")] = Where.ray,
    memory: Annotated[int, typer.Option(min=1, metavar="MB", help="What the reduction may hold.")] = 400,
    target: Annotated[int, typer.Option(min=1, help="Rank of the aggregate.")] = 32,
    svd: Annotated[bool, typer.Option(help="Compare with the SVD of the matrix as well.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="How often all is run; figures are medians.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Workers, or CPU threads. (default: every core)")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the growth curve as an image; needs matplotlib.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the record is appended.")] = Path(
        "benchmarks/results"
    ),
    json: JsonFlag = False,
) -> None:
    """Time streamed sums of simulated updates, with their memory; and exact beside the SVD of the matrix."""
    from contextlib import ExitStack
    from datetime import UTC, datetime
    from tempfile import TemporaryDirectory

    from lorafleet.bench import aggregate as benchmark
    from lorafleet.bench.aggregate_jobs import AggregateChildren
    from lorafleet.bench.machine import cores

    check_parent("--plot", plot)
    settings = benchmark.AggregateSettings(
        shape=shape.value,
        clients=tuple(sorted(set(numbers("--clients", clients)))),
        ranks=numbers("--ranks", ranks),
        attention_only=modules is Modules.attention,
        where=where.value,
        memory_bytes=memory * 10**6,
        target=target,
        repeats=repeats,
        threads=threads or cores(),
        svd=svd,
    )
    with interruptible(), ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="lorafleet-bench-")))
        done = benchmark.bench_aggregate(
            settings, run=AggregateChildren(folder), out=out, when=datetime.now(UTC), say=say
        )
    if plot is not None:
        benchmark.plot(done, plot)
    if json:
        print_json(done.record)
        return
    print_table(
        ["clients", "seconds", "of them reading", "GB/s", ": copy", "peak MB", "above baseline", "passes", "growth"],
        [
            (
                n, f"{s.seconds:.2f}", f"{s.read_s:.2f}", f"{s.bytes_per_s / 1e9:.2f}",
                f"{s.bytes_per_s / s.copy_bytes_per_s:.3f}", f"{s.peak_bytes / 1e6:.0f}",
                f"{s.above_bytes / 1e6:.0f}", s.windows, "" if exponent is None else f"{exponent:.2f}",
            )
            for (n, s), exponent in zip(done.sums, benchmark.growth(done.sums), strict=True)
        ],
    )  # fmt: skip
    for r in done.ratios:
        typer.echo(
            f"exact, {r.clients} clients: {r.exact_s:.3f} s, error {r.error_ratio:.4f} × the optimum; wanted "
            f"{benchmark.WANTED_SPEED[r.clients]:.0f} ×"
        )
        for dtype, seconds, speed in (
            ("float64", r.svd_float64_s, r.speed_float64),
            ("float32", r.svd_float32_s, r.speed_float32),
        ):
            typer.echo(f"  SVD in {dtype}: {seconds:.2f} s, {speed:.1f} × ({'met' if r.met(speed) else 'missed'})")
    typer.echo(f"record: {done.file}")


def _floor(shape: str, device: Device, *, json: bool) -> None:
    from lorafleet.bench.byte_floor import bench_floor, cases
    from lorafleet.bench.shapes import get_shape
    from lorafleet.kernels import paths_on

    paths = ["dense", *(name for name in paths_on(device.value) if name == "triton")]
    found = list(bench_floor(list(cases(get_shape(shape))), paths=paths, device=device.value))
    if json:
        print_json([{**result._asdict(), "ratio": result.ratio} for result in found])
    else:
        print_table(
            ["adapters", "group", "path", "µs", "floor µs", ": floor", "launches"],
            [(r.adapters, r.group, r.path, r.us, r.floor_us, r.ratio, r.launches or "-") for r in found],
        )
