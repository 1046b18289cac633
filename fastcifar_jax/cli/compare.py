"""The commands that compare recipes."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fastcifar_jax.analysis import compare as comparison
from fastcifar_jax.analysis import match_epochs as matching
from fastcifar_jax.analysis import stats
from fastcifar_jax.analysis.compare import ACCURACIES, METRICS, Arm, CompareOptions
from fastcifar_jax.cli import console as report
from fastcifar_jax.cli.options import (
    CliContext,
    RunOptions,
    json_option,
    make_jobs,
    run_options,
    seeds_option,
    usage_errors,
    variants,
)
from fastcifar_jax.recipe import change
from fastcifar_jax.runs import experiments as discover
from fastcifar_jax.runs import files, records
from fastcifar_jax.runs import runner as runs
from fastcifar_jax.runs.records import Record

FIRST_LOOK = 4  # seeds of each arm before the first look of --until-half-width
BLOCK = 2  # seeds of each arm between two looks


@click.command()
@click.argument("names", metavar="ARM ARM...", nargs=-1, required=True)
@seeds_option(None)
@run_options
@click.option("--metric", type=click.Choice(METRICS), default="tta_accuracy", show_default=True)
@click.option("--threshold", type=float, help="Show the share of runs at or above it, in percent.")
@click.option(
    "--equivalence-margin", type=click.FloatRange(0, min_open=True), help="Margin of no consequence, in points."
)
@click.option("--min-effect", type=click.FloatRange(0, min_open=True), help="A difference to plan for, in points.")
@click.option("--against-previous", is_flag=True, help="Each arm against the one before it instead of the first.")
@click.option(
    "--until-half-width",
    type=click.FloatRange(0, min_open=True),
    help="Run seeds until intervals are +- so many points.",
)
@click.option(
    "--max-seeds", type=click.IntRange(FIRST_LOOK), default=100, show_default=True, help="Of --until-half-width."
)
@click.option("--allow-different-data", is_flag=True, help="Compare runs on different images nevertheless.")
@json_option
@click.pass_obj
def compare(
    invocation: CliContext,
    names: tuple[str, ...],
    seeds: range | None,
    options: RunOptions,
    until_half_width: float | None,
    max_seeds: int,
    allow_different_data: bool,
    json_path: Path | None,
    **question: Any,
) -> None:
    """Compares arms: means, differences with intervals, and what it would take to know more.

    ARM is an experiment (a `*` in it matches several), torch:EXPERIMENT, or EXPERIMENT@HASH where several recipes of
    that name are on record. Without --seeds or --until-half-width the records under --out are compared; with
    them, what is missing is run first, the arms in turn.
    """
    console = report.make_console()
    asked = CompareOptions(**question)
    if seeds is None and until_half_width is None:
        with usage_errors():
            arms = _arms_on_file(invocation, names, options)
            answer = _answer(arms, asked, allow_different_data, console)
    else:
        jobs, driver = make_jobs(invocation, names, options, console)
        if len(jobs) < 2:
            raise click.UsageError(f"{', '.join(names)} is one arm; a comparison needs two")
        with usage_errors():
            runs.make_folders(jobs.values(), options.out)
            ended: list[Record] = []
            make = functools.partial(
                runs.make_runner,
                ended=ended,
                console=console,
                out=options.out,
                driver=driver,
                arguments=invocation.arguments,
                rerun=options.rerun,
                checkpoints=options.checkpoint,
                compiled={},
            )
            runners = {name: make(job) for name, job in jobs.items()}
            if until_half_width is None:
                answer = _answer(_run(runners, seeds), asked, allow_different_data, console)
            else:
                answer = _compare_until(runners, until_half_width, max_seeds, asked, allow_different_data, console)
    comparison.show(answer, console)
    if json_path:
        files.write_text(json_path, records.dumps(answer))


def _run(runners, seeds) -> list[Arm]:
    return [Arm(name, tuple(ended)) for name, ended in runs.run_in_turn(runners, seeds).items()]


def _answer(
    arms: Sequence[Arm], question: CompareOptions, allow_different_data: bool, console: Console
) -> dict[str, Any]:
    """Raises ValueError for arms that cannot be compared."""
    try:
        comparison.check_comparable(arms)
    except ValueError as error:
        if not allow_different_data:
            raise
        console.print(f"warning: {error}", soft_wrap=True)
    return comparison.compare(arms, question)


def _compare_until(runners, half_width, max_seeds, question, allow_different_data, console) -> dict[str, Any]:
    """Looks after every block, each time at the confidence that leaves the looks together the one asked for."""
    ended: dict[str, tuple[Record, ...]] = {name: () for name in runners}
    count = look = 0
    while True:
        look += 1
        seeds = range(count, min(FIRST_LOOK + BLOCK * (look - 1), max_seeds))
        count = seeds.stop
        for name, more in runs.run_in_turn(runners, seeds).items():
            ended[name] += tuple(more)
        arms = [Arm(name, of_arm) for name, of_arm in ended.items()]
        level = stats.confidence_at_look(look, question.confidence)
        answer = _answer(arms, question._replace(confidence=level), allow_different_data, console)
        widest = max((d["high"] - d["low"]) / 2 for d in answer["differences"])
        console.print(f"look {look}, {count} seeds an arm: +- {widest:.2f} at {100 * level:.2f} %", soft_wrap=True)
        if widest <= half_width or count == max_seeds:
            if widest > half_width:
                console.print(f"stopped at --max-seeds {max_seeds}, short of +- {half_width:g}")
            return {**answer, "looks": look, "overall_confidence": question.confidence}


def _arms_on_file(invocation: CliContext, names: Sequence[str], options: RunOptions) -> list[Arm]:
    """Raises ValueError for arms without records or with those of several recipes."""
    changes = any((options.assignments, options.sweeps, options.epochs, options.width, options.dtype))
    data = {"source": options.data, "train": options.limit_train}
    arms = []
    for text in names:
        framework, name, prefix = comparison.parse_arm(text)
        if not changes and "*" not in name:
            arms.append(comparison.load_arm(options.out, text, **data))
            continue
        experiments = discover.resolve((name,), invocation.folder)
        for experiment, variant in itertools.product(experiments, variants(options.sweeps)):
            recipe, assignments = experiment.recipe, (*options.assignments, *variant)
            if changes:
                recipe = change(recipe, assignments, options.epochs, options.width, options.dtype)
                prefix = recipe.hash
            spelling = f"{framework}:{recipe.name}"
            found = comparison.load_arm(options.out, f"{spelling}@{prefix}" if prefix else spelling, **data)
            arms.append(found._replace(name=comparison.arm_name(framework, recipe.name, variant)))
    arms = list({arm.name: arm for arm in arms}.values())
    if len(arms) < 2:
        raise ValueError(f"{', '.join(names)} is one arm; a comparison needs two")
    return arms


@click.command("match-epochs")
@click.argument("base")
@click.argument("other")
@seeds_option("4")
@run_options
@click.option("--step", type=click.IntRange(1), default=1, show_default=True, help="Epochs to drop at a time.")
@click.option("--metric", type=click.Choice(ACCURACIES), default="tta_accuracy", show_default=True)
@json_option
@click.pass_obj
def match_epochs(
    invocation: CliContext,
    base: str,
    other: str,
    seeds: range,
    options: RunOptions,
    step: int,
    metric: str,
    json_path: Path | None,
) -> None:
    """Spends the gain: drops epochs of OTHER until it is no better than BASE, which keeps its own.

    --epochs is the number of epochs of BASE and the first of OTHER.
    """
    console = report.make_console()
    jobs, driver = make_jobs(invocation, (base, other), options, console)
    if len(jobs) != 2:
        raise click.UsageError(f"{base} and {other} stand for {len(jobs)} recipes; give two")
    runs.make_folders(jobs.values(), options.out)
    ended: list[Record] = []

    def arm_of(name, job):
        job = job._replace(arm=name)
        make = functools.partial(runs.make_runner, rerun=options.rerun, checkpoints=options.checkpoint)
        runner = make(job, ended, console, options.out, driver, invocation.arguments)
        return Arm(name, tuple(map(runner, seeds)))

    (base_name, base_job), (name, job) = jobs.items()

    def falling() -> Iterator[tuple[int | float, Arm]]:
        for most in range(math.ceil(job.recipe.num_epochs), 0, -step):
            try:
                recipe = dataclasses.replace(job.recipe, num_epochs=min(most, job.recipe.num_epochs))  # 9.9, then 9
            except ValueError as error:
                console.print(f"no run of {most} epochs: {error}", soft_wrap=True)
                return
            yield (
                recipe.num_epochs,
                arm_of(f"{name}, {recipe.num_epochs} epochs", job._replace(recipe=recipe, matches_published=False)),
            )

    with usage_errors():
        question = CompareOptions(metric=metric)
        on_row = lambda row: console.print(comparison.verdict(row["difference"], "points", False), soft_wrap=True)
        found = matching.match_epochs(arm_of(base_name, base_job), falling(), question, on_row)
    matching.show(found, console)
    if json_path:
        files.write_text(json_path, records.dumps(found))
