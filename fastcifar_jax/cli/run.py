"""The command that trains recipes."""

import itertools

import click

from fastcifar_jax.cli import console as view
from fastcifar_jax.cli.options import CliContext, RunOptions, make_specs, run_options, seeds_option, usage_errors
from fastcifar_jax.ops import backend
from fastcifar_jax.parallel import hosts
from fastcifar_jax.parallel.mesh import make_mesh
from fastcifar_jax.runs import logging, saved_model
from fastcifar_jax.runs.runner import Event, Programs, existing_record, make_folders, record_of, run_all
from fastcifar_jax.runs.together import MeshError, run_together
from fastcifar_jax.types import EpochInfo


def parse_mesh(text: str) -> tuple[int, int]:
    """ "4" is (4, 1) and "4x2" is (4, 2)."""
    sizes = text.split("x")
    if len(sizes) > 2 or not all(size.isdecimal() for size in sizes):
        raise ValueError(f"{text!r} is not a mesh; give devices for seeds, as in 8, or 4x2")
    return int(sizes[0]), int(sizes[1]) if len(sizes) > 1 else 1


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@seeds_option("1")
@click.option("--mesh", type=parse_mesh, metavar="SEEDS[xBATCH]", help="Devices: 8 for 8 seeds at a time; 4x2.")
@click.option("--distributed", is_flag=True, help="This is one of several processes; see docs/scaling.md.")
@click.option("--log", type=click.Choice(("tensorboard",)), help="Also write epochs to OUT/tensorboard as they end.")
@run_options
@click.pass_obj
def run(
    context: CliContext,
    names: tuple[str, ...],
    seeds: range,
    mesh: tuple[int, int] | None,
    distributed: bool,
    log: str | None,
    options: RunOptions,
) -> int:
    """Trains recipes: NAME is one that `list` shows, or the path of a Python file with a RECIPE or RECIPES.

    Every seed leaves a record under --out; those that have one are skipped. torch:NAME trains in PyTorch.
    Seeds run one after another on one device unless --mesh or --distributed is given.
    """
    console = view.make_console()
    together = bool(mesh or distributed)
    for option, given in (("--checkpoint", options.checkpoint), ("--save", options.save), ("--log", log)):
        if together and given:
            raise click.UsageError(f"{option} cannot be combined with --mesh or --distributed; leave one of them out")
    if distributed:
        with usage_errors():
            backend.keep_freed_memory()  # before JAX starts its threads
            hosts.initialize()
        console.quiet = not hosts.writes_records()
    specs = make_specs(context, names, options, console)
    if (together or options.save) and any(spec.twin for spec in specs):
        raise click.UsageError("torch: arms have no --save, --mesh and --distributed; run them without")
    settings = options.settings(context)
    with usage_errors():
        for spec in specs if options.save else ():
            saved_model.check_saveable(spec.recipe, spec.data.info, spec.data.dataset)
        devices = make_mesh(*(mesh or (None, 1))) if together else None
        if hosts.writes_records():
            make_folders(specs, settings)
            for spec, seed in itertools.product(specs, seeds):
                existing_record(spec, settings, seed)  # a damaged record is found before anything is trained
        write_log = logging.tensorboard(options.out / "tensorboard") if log else None
    return _train(specs, seeds, settings, devices, write_log, console)


def _train(specs, seeds, settings, devices, write_log, console) -> int:
    """Trains everything and shows it; the exit status."""
    shown, interrupted = view.RunView(console), ""
    programs: Programs = {}
    ended: list[Event] = []
    try:
        for spec in specs:
            if devices is None:
                events = run_all([spec], seeds, settings, programs, shown.on_steps)
            else:
                events = run_together(spec, seeds, settings, devices)
            for event in shown.show(events, seeds=devices is not None):
                if record_of(event):
                    ended.append(event)
                elif write_log and isinstance(event.news, EpochInfo):
                    write_log(f"{event.spec.arm}, seed {event.seed}", event.news)
            for line in view.arm_lines(spec, ended):
                console.print(line)
    except MeshError as error:
        raise click.UsageError(str(error)) from error
    except KeyboardInterrupt:
        interrupted = "interrupted: "
    finally:
        counts = view.counts_line(ended, len(specs) * len(seeds))
        console.print(f"{interrupted}{counts}; records in {settings.out}")
    diverged = any(record.status == "diverged" for event in ended if (record := record_of(event)))
    return 130 if interrupted else int(diverged)
