"""The commands that compare recipes, and what they print."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from fastcifar_jax.analysis import compare as comparison
from fastcifar_jax.analysis import stats
from fastcifar_jax.analysis.compare import ACCURACIES, METRICS, Arm, CompareOptions
from fastcifar_jax.analysis.match_epochs import Crossing, equal_epochs
from fastcifar_jax.analysis.match_epochs import match_epochs as match
from fastcifar_jax.cli import console as view
from fastcifar_jax.cli.options import (
    CliContext,
    RunOptions,
    json_option,
    make_specs,
    run_options,
    seeds_option,
    usage_errors,
    variants,
    write_json,
)
from fastcifar_jax.runs import experiments
from fastcifar_jax.runs.records import Record
from fastcifar_jax.runs.runner import make_folders, record_of, run_all

FIRST_LOOK = 4  # seeds per arm before the first look of --until-half-width
BLOCK = 2  # seeds per arm between two looks
UNITS = {"train_seconds": " s", "images_per_second": " images/s"}  # percentage points for the other metrics

Answer = dict[str, Any]  # of `comparison.compare`
_above_0 = click.FloatRange(0, min_open=True)


@click.command()
@click.argument("names", metavar="ARM ARM...", nargs=-1, required=True)
@seeds_option(None)
@run_options
@click.option("--metric", type=click.Choice(METRICS), default="tta_accuracy", show_default=True)
@click.option("--threshold", type=float, help="Show the share of runs at or above it, in percent.")
@click.option("--equivalence-margin", type=_above_0, metavar="PP", help="Test whether differences are within +- PP.")
@click.option("--min-effect", type=_above_0, metavar="PP", help="Show the runs that a difference of this size needs.")
@click.option("--against-previous", is_flag=True, help="Compare each arm with the one before it, not with the first.")
@click.option("--until-half-width", type=_above_0, metavar="PP", help="Run seeds until the intervals are +- PP.")
@click.option("--max-seeds", type=click.IntRange(FIRST_LOOK), default=100, show_default=True, help="Upper limit.")
@click.option("--allow-different-data", is_flag=True, help="Compare runs on different images nevertheless.")
@json_option
@click.pass_obj
def compare(
    context: CliContext, names: tuple[str, ...], seeds: range | None, options: RunOptions, **asked: Any
) -> None:
    """Compares arms: means, differences with intervals, and the number of runs that would show a difference.

    ARM is an experiment (a `*` in it matches several), torch:EXPERIMENT, or EXPERIMENT@HASH where there are records of
    several recipes of that name. Without --seeds or --until-half-width, the records under --out are compared; with
    them, missing runs are made first, the arms in alternating order. PP: percentage points.
    """
    console = view.make_console()
    half_width, max_seeds = asked["until_half_width"], asked["max_seeds"]
    to_compare = CompareOptions(**{name: asked[name] for name in CompareOptions._fields if name in asked})
    answer_of = functools.partial(_answer, mixed=asked["allow_different_data"], console=console)
    with usage_errors():
        if seeds is None and half_width is None:
            answer = answer_of(_load_arms(context, names, options), to_compare)
        else:
            specs, settings = make_specs(context, names, options, console), options.settings(context)
            run = functools.partial(_run, settings=settings, programs={}, view=view.RunView(console))
            if len(specs) < 2:
                raise ValueError(f"{', '.join(names)} is one arm; a comparison needs two")
            if half_width is None:
                answer = answer_of(run(specs, seeds), to_compare)
            else:
                run_specs = functools.partial(run, specs)
                answer = _compare_until(half_width, max_seeds, run_specs, answer_of, to_compare, console)
    _finish(answer, render_comparison(answer), asked["json_path"], console)


@click.command("match-epochs")
@click.argument("base")
@click.argument("other")
@seeds_option("4")
@run_options
@click.option("--step", type=click.IntRange(1), default=1, show_default=True, help="Epochs to drop at a time.")
@click.option("--metric", type=click.Choice(ACCURACIES), default="tta_accuracy", show_default=True)
@json_option
@click.pass_obj
def match_epochs(context: CliContext, base: str, other: str, seeds: range, options: RunOptions, **asked: Any) -> None:
    """Expresses a gain in epochs: drops epochs of OTHER until it is no better than BASE, which keeps its own.

    --epochs is the number of epochs of BASE and the first of OTHER.
    """
    console = view.make_console()
    specs, settings = make_specs(context, (base, other), options, console), options.settings(context)
    run = functools.partial(_run, settings=settings, programs={}, view=view.RunView(console))
    if len(specs) != 2:
        raise click.UsageError(f"{base} and {other} stand for {len(specs)} recipes; give two")
    base_spec, spec = specs

    def shorter() -> Iterator[Arm]:
        for most in range(math.ceil(spec.recipe.num_epochs), 0, -asked["step"]):
            try:
                recipe = dataclasses.replace(spec.recipe, num_epochs=min(most, spec.recipe.num_epochs))  # 9.9, then 9
            except ValueError as error:
                console.print(f"no run of {most} epochs: {error}")
                return
            arm = f"{spec.arm}, {recipe.num_epochs} epochs"
            yield from run([spec._replace(arm=arm, recipe=recipe, matches_published=False)], seeds)

    with usage_errors():
        [base_arm] = run([base_spec], seeds)
        for answer in match(base_arm, shorter(), CompareOptions(metric=asked["metric"])):
            last = answer["differences"][-1]
            console.print(f"{last['of']} against {base_spec.arm}: {_size(last, answer)}")
    equal = equal_epochs(answer)
    parts = (*render_comparison(answer), equal_text(answer, equal, spec.arm))
    _finish({**answer, "equal": equal and equal._asdict()}, parts, asked["json_path"], console)


def _run(specs, seeds, settings, programs, view) -> list[Arm]:
    """The runs of some recipes, seed by seed in alternating order; those on record are not repeated."""
    make_folders(specs, settings)
    found: dict[str, list[Record]] = {spec.arm: [] for spec in specs}
    for event in view.show(run_all(specs, seeds, settings, programs, view.on_steps)):
        if record := record_of(event):
            found[event.spec.arm].append(record)
    return [Arm(name, tuple(of_arm)) for name, of_arm in found.items()]


def _answer(arms: Sequence[Arm], options: CompareOptions, mixed: bool, console: Console) -> Answer:
    """Raises ValueError for arms that cannot be compared, and for those on different data unless `mixed`."""
    try:
        comparison.check_comparable(arms)
    except ValueError as error:
        if not mixed:
            raise
        console.print(f"warning: {error}")
    return comparison.compare(arms, options)


def _compare_until(half_width, max_seeds, run, answer_of, options, console) -> Answer:
    """Compares after each block of seeds, so that the intervals of all looks hold together at `options.confidence`."""
    found: dict[str, tuple] = {}
    count = 0
    for look in itertools.count(1):
        seeds = range(count, min(FIRST_LOOK + BLOCK * (look - 1), max_seeds))
        found = {arm.name: found.get(arm.name, ()) + arm.records for arm in run(seeds)}
        count, level = seeds.stop, stats.confidence_at_look(look, options.confidence)
        answer = answer_of([Arm(*item) for item in found.items()], options._replace(confidence=level))
        widest = max((d["high"] - d["low"]) / 2 for d in answer["differences"])
        console.print(f"look {look}, {count} seeds per arm: +- {widest:.2f} at {100 * level:.2f} %")
        if widest <= half_width or count == max_seeds:
            break
    if widest > half_width:
        console.print(f"stopped at --max-seeds {max_seeds}, before the intervals were +- {half_width:g}")
    return {**answer, "looks": look, "overall_confidence": options.confidence}


def _load_arms(context: CliContext, names: Sequence[str], options: RunOptions) -> list[Arm]:
    """The arms on record. Raises ValueError for arms without records or with those of several recipes."""
    changes = any((options.assignments, options.sweeps, options.epochs, options.width, options.dtype))
    load = functools.partial(comparison.load_arm, options.out, source=options.data, train=options.limit_train)
    arms: dict[str, Arm] = {}
    for text in names:
        framework, name, prefix = comparison.parse_arm(text)
        if not changes and "*" not in name:
            arms[text] = load(text)
            continue
        declared = experiments.resolve((name,), context.folder)
        for experiment, variant in itertools.product(declared, variants(options.sweeps)):
            name = experiment.recipe.name
            prefix = options.changed(experiment.recipe, variant).hash if changes else prefix
            arm = comparison.arm_name(framework, name, variant)
            arms[arm] = load(f"{framework}:{name}" + f"@{prefix}" * bool(prefix))._replace(name=arm)
    if len(arms) < 2:
        raise ValueError(f"{', '.join(names)} is one arm; a comparison needs two")
    return list(arms.values())


def _finish(found: Answer, parts: Iterable[str | Table], json_path: Path | None, console: Console) -> None:
    for part in parts:
        console.print(part)
    write_json(json_path, found)


def render_comparison(answer: Answer) -> Iterator[str | Table]:
    """The arms and the differences as tables, where the runs were made, and a sentence per difference."""
    level, unit = _level(answer), _unit(answer).strip()
    yield f"{answer['metric'].replace('_', ' ')}: mean and {level} interval (t) of each arm"
    share = () if answer["threshold"] is None else (f">= {answer['threshold']:g}",)
    table = view.make_table(("arm",), ("epochs", "n", "unfinished", "mean", "sd", "interval", "s per run", *share))
    for arm in answer["arms"]:
        table.add_row(
            arm["name"], str(arm["num_epochs"]), str(arm["n"]), str(arm["diverged"] + arm["crashed"]),
            f"{arm['mean']:.2f}", f"{arm['sd']:.2f}", _interval(arm, ".2f"),
            f"{arm['mean_train_seconds']:.1f}", *([f"{arm['share']:.0%}"] if share else []),
        )  # fmt: skip
    yield table
    yield from dict.fromkeys(_made_on(arm) for arm in answer["arms"])

    holm = ("p (Holm)",) if len(answer["differences"]) > 1 else ()
    columns = (f"difference ({unit})", f"{level} interval (Welch)", "p", *holm, "g", "r of pairs", "paired interval")
    table = view.make_table(("of", "against"), (*columns, "runs per arm to show it"))
    for d in answer["differences"]:
        pairs = d["paired"]
        # Empty where there is none: too few pairs, or an arm of equal runs.
        correlation = f"{pairs['correlation']:+.2f}" if pairs and not math.isnan(pairs["correlation"]) else ""
        table.add_row(
            d["of"], d["against"], f"{d['estimate']:+.2f}", _interval(d),
            f"{d['p_value']:.3g}", *([f"{d['p_holm']:.3g}"] if holm else []), f"{d['hedges_g']:+.2f}",
            correlation, _interval(pairs) if pairs and pairs["helps"] else "",
            f"{d['runs_for_observed']:,}" if d["runs_for_observed"] else "",
        )  # fmt: skip
    yield table
    for d in answer["differences"]:
        yield verdict_text(d, answer)
    if unfinished := sum(arm["diverged"] + arm["crashed"] for arm in answer["arms"]):
        yield f"{unfinished} runs did not finish; the means leave them out, which favours their arms"


def equal_text(answer: Answer, equal: Crossing | None, name: str) -> str:
    """The number of epochs at which the recipe `name`, shortened, equals the first arm."""
    base, *others = answer["arms"]
    epochs = [arm["num_epochs"] for arm in others]
    if equal is None:
        better = "better" if answer["differences"][0]["estimate"] > 0 else "not better"
        return f"{name} at {epochs[0]} epochs is {better} than {base['name']}; no other number of epochs was tried"

    def text(value):
        if math.isinf(value):  # outside what was tried
            return f"more than {max(epochs)}" if value > 0 else f"at most {min(epochs)}"
        return f"{value:.1f}"

    bounds = f"{_level(answer)} bootstrap interval {text(equal.low)} to {text(equal.high)}"
    return f"{name} equals {base['name']} at {text(equal.value)} epochs ({bounds})"


def verdict_text(d: dict[str, Any], answer: Answer) -> str:
    """One sentence for one difference of an answer."""
    unit, size, runs_text = _unit(answer), _size(d, answer), "{:,} runs per arm (80 % power)".format
    text = f"{d['of']} against {d['against']}: "
    if d["verdict"] == "none shown":
        several = f" after correction for {len(answer['differences'])} comparisons"
        excludes_0 = not d["low"] <= 0 <= d["high"]
        text += f"no difference shown{several if excludes_0 else ''}: {size}"
        if d["runs_for_observed"]:
            text += f"; to show a difference of this size would take {runs_text(d['runs_for_observed'])}"
    else:
        text += f"{d['verdict']}, by {size}"
    if d["equivalence"]:
        equal = "equivalent" if d["equivalence"]["equivalent"] else "not shown to be equivalent"
        text += f"; {equal} within +- {answer['equivalence_margin']:g}{unit} (p {d['equivalence']['p_value']:.3g})"
    if d["runs_for_min_effect"]:
        text += f"; to show {answer['min_effect']:g}{unit} would take {runs_text(d['runs_for_min_effect'])}"
    return text


def _size(d: dict[str, Any], answer: Answer) -> str:
    return f"{d['estimate']:+.2f}{_unit(answer)} ({_level(answer)} interval {_interval(d)})"


def _interval(found: dict[str, Any], form: str = "+.2f") -> str:
    return f"{found['low']:{form}} to {found['high']:{form}}"


def _level(answer: Answer) -> str:
    return f"{100 * answer['confidence']:.4g} %"


def _unit(answer: Answer) -> str:
    return UNITS.get(answer["metric"], " pp")


def _made_on(arm: dict[str, Any]) -> str:
    """ "digits, 1,437 training and 360 test images; 2-core CPU; python 3.11, jax 0.10.2"."""
    versions = ", ".join(f"{name} {version}" for name, version in arm["versions"].items())
    return f"{comparison.data_text(arm['data'])}; {view.device_text(arm['device'])}; {versions}"
