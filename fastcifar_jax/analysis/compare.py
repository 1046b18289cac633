"""Recipes compared by their records: one honest answer to whether a trick helps, by how much, and how sure that is."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from fastcifar_jax.analysis import stats
from fastcifar_jax.cli import console as report
from fastcifar_jax.runs import records
from fastcifar_jax.runs.provenance import data_key
from fastcifar_jax.runs.records import Record

ACCURACIES = ("test_accuracy", "tta_accuracy")
METRICS = (*ACCURACIES, "train_seconds", "images_per_second")
_ARM = re.compile(r"(?:(?P<framework>jax|torch):)?(?P<experiment>[^@]+)(?:@(?P<prefix>[0-9a-f]+))?")


class Arm(NamedTuple):
    """The records of one side of a comparison, one a seed, in the order of the seeds."""

    name: str
    records: tuple[Record, ...]


class CompareOptions(NamedTuple):
    """What is asked of the arms; accuracies are meant in percentage points.

    Attributes:
      metric: one of METRICS.
      threshold: the share of runs at or above it is shown; None for none.
      equivalence_margin: margin inside which a difference does not matter; None to ask for no verdict.
      min_effect: a difference that one would like to see, for the number of runs; None for none.
      against_previous: whether an arm is compared with the one before it, and not with the first.
      confidence: of the intervals.
    """

    metric: str = "tta_accuracy"
    threshold: float | None = None
    equivalence_margin: float | None = None
    min_effect: float | None = None
    against_previous: bool = False
    confidence: float = 0.95


def arm_name(framework: str, name: str, assignments: Sequence[str] = ()) -> str:
    """ "final", "torch:final", "final optim.peak_lr=0.8"."""
    return " ".join((name if framework == "jax" else f"{framework}:{name}", *assignments))


def parse_arm(text: str) -> tuple[str, str, str]:
    """Framework, experiment and the beginning of the recipe's hash.

    Raises:
      ValueError: another form.

    Example:
      >>> parse_arm("final"), parse_arm("torch:final@1a2b")
      (('jax', 'final', ''), ('torch', 'final', '1a2b'))
    """
    match = _ARM.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no arm; write an experiment's name, as in final, torch:final or final@1a2b3c")
    return match["framework"] or "jax", match["experiment"], match["prefix"] or ""


def load_arm(out: Path, name: str, **data: Any) -> Arm:
    """The records of an arm in a folder.

    Args:
      out: folder of all records.
      name: as `parse_arm` takes it.
      **data: what the records must say of their data, as in `train=20000`; None for anything.

    Raises:
      ValueError: there are none, or they are of several recipes.
      RecordError: a file in the folder is no record.
    """
    framework, experiment, prefix = parse_arm(name)
    found = [
        record
        for record in records.find(out, experiment=experiment, framework=framework).values()
        if record.recipe_hash.startswith(prefix)
        and all(value is None or record.provenance.data[key] == value for key, value in data.items())
    ]
    if not found:
        raise ValueError(f"no record of {name} in {out}; --seeds 5 makes them")
    by_recipe = {record.recipe_hash: record for record in found}
    if len(by_recipe) > 1:
        raise ValueError(
            f"{out} holds {len(by_recipe)} recipes called {name}: {_describe_difference(by_recipe)}; write one of "
            f"{', '.join(f'{experiment}@{key[:8]}' for key in by_recipe)}"
        )
    return Arm(name, tuple(sorted(found, key=lambda record: record.seed)))


def check_comparable(arms: Sequence[Arm]) -> None:
    """Whether the arms answer the same question.

    Raises:
      ValueError: they were trained or tested on different images; the message says what differs.
    """
    kinds: dict[tuple, tuple[str, Record]] = {}
    for arm in arms:
        for record in arm.records:
            kinds.setdefault(data_key(record.provenance), (arm.name, record))
    if len(kinds) > 1:
        shown = "; ".join(
            f"{name}, seed {record.seed}: {data['source']}, {data['train']:,} training and "
            f"{data['test']:,} test images, hash {data['hash'][:8]}"
            for name, record in kinds.values()
            for data in [record.provenance.data]
        )
        raise ValueError(f"these runs saw different images: {shown}; --allow-different-data compares them nevertheless")
    for arm in arms:
        if len({record.seed for record in arm.records}) < len(arm.records):
            raise ValueError(f"{arm.name} has more than one record of a seed; name its recipe by its hash")


def compare(arms: Sequence[Arm], question: CompareOptions) -> dict[str, Any]:
    """The answer as a JSON object, in percentage points, seconds or images per second.

    A diverged run has no accuracy: it is counted, and the means are of the others.

    Args:
      arms: at least two.
      question: what is asked.

    Returns:
      `{"metric", "confidence", "arms": [...], "differences": [...]}`; the fields are those of the functions of `stats`.

    Raises:
      ValueError: an arm with fewer than two finished runs.
    """
    values = {arm.name: values_of(arm, question.metric) for arm in arms}
    for name, finished in values.items():
        if len(finished) < 2:
            raise ValueError(
                f"{name} has {len(finished)} finished run; a comparison needs at least 2, better 5 or more"
            )
    bases = arms[:-1] if question.against_previous else [arms[0]] * (len(arms) - 1)
    differences = [
        _difference(base, arm, values[base.name], values[arm.name], question)
        for base, arm in zip(bases, arms[1:], strict=True)
    ]
    adjusted = stats.holm([difference["p_value"] for difference in differences])
    for difference, p_value in zip(differences, adjusted, strict=True):
        difference["p_holm"] = p_value
    return {
        "metric": question.metric,
        "confidence": question.confidence,
        "threshold": question.threshold,
        "arms": [_summary(arm, list(values[arm.name].values()), question) for arm in arms],
        "differences": differences,
    }


def values_of(arm: Arm, metric: str) -> dict[int, float]:
    """Seed -> value, for the finished runs."""
    scale = 100 if metric in ACCURACIES else 1
    return {record.seed: scale * record.result[metric] for record in arm.records if record.result}


def _summary(arm, values, question):
    count = lambda status: sum(record.status == status for record in arm.records)
    first = arm.records[0]
    seconds = [record.result["train_seconds"] for record in arm.records if record.status == "finished"]
    threshold = question.threshold
    summary = stats.summarize(values, None, question.confidence)._asdict()
    # A run that diverged did not reach the threshold.
    summary["share"] = None if threshold is None else sum(v >= threshold for v in values) / len(arm.records)
    return {
        "name": arm.name,
        "recipe_hash": first.recipe_hash,
        "num_epochs": first.recipe.get("num_epochs"),
        "data": first.provenance.data,
        "device": report.device_text(first.provenance.device),
        "versions": first.provenance.versions,
        "seeds": [record.seed for record in arm.records],
        "diverged": count("diverged"),
        "crashed": count("crashed"),
        "mean_train_seconds": sum(seconds) / len(seconds),
        **summary,
    }


def _difference(base, arm, base_values, arm_values, question):
    a, b = list(base_values.values()), list(arm_values.values())
    welch = stats.welch(a, b, question.confidence)
    common = sorted(base_values.keys() & arm_values.keys())
    paired = None
    if len(common) >= 3:
        pairs = [[values[seed] for seed in common] for values in (base_values, arm_values)]
        pairs = stats.paired(*pairs, question.confidence)
        paired = {**pairs._asdict(), "helps": stats.pairing_helps(welch, pairs)}
    sds = [stats.summarize(values).sd for values in (a, b)]
    needed = lambda difference: stats.runs_needed(*sds, difference) if difference and max(sds) > 0 else None
    return {
        "of": arm.name,
        "against": base.name,
        **welch._asdict(),
        "paired": paired,
        "equivalence": question.equivalence_margin
        and stats.tost(a, b, question.equivalence_margin, question.confidence)._asdict(),
        "runs_for_observed": needed(abs(welch.estimate)),
        "runs_for_min_effect": needed(question.min_effect),
    }


def show(answer: dict[str, Any], console: Console) -> None:
    """The answer as two tables and a sentence a difference."""
    unit = "points" if answer["metric"] in ACCURACIES else ""
    level = f"{100 * answer['confidence']:.4g} %"
    console.print(f"{answer['metric'].replace('_', ' ')}: mean and {level} interval (t) of each arm", soft_wrap=True)
    share = () if answer["threshold"] is None else ((f">= {answer['threshold']:g}", "right"),)
    columns = ["epochs", "n", "diverged", "mean", "sd", "interval", "s a run"]
    table = report.make_table("arm", *((name, "right") for name in columns), *share)
    for arm in answer["arms"]:
        table.add_row(
            arm["name"], str(arm["num_epochs"]), str(arm["n"]), str(arm["diverged"] + arm["crashed"]),
            f"{arm['mean']:.2f}", f"{arm['sd']:.2f}", f"{arm['low']:.2f} to {arm['high']:.2f}",
            f"{arm['mean_train_seconds']:.1f}", *([f"{arm['share']:.0%}"] if share else []),
        )  # fmt: skip
    console.print(table)

    holm = len(answer["differences"]) > 1
    columns = ["difference", f"{level} interval (Welch)", "p", *(["p (Holm)"] if holm else []), "g", "r of pairs",
               "paired interval", "runs for it"]  # fmt: skip
    table = report.make_table("of", "against", *((name, "right") for name in columns))
    for d in answer["differences"]:
        paired = d["paired"]
        table.add_row(
            d["of"], d["against"], f"{d['estimate']:+.2f}", f"{d['low']:+.2f} to {d['high']:+.2f}",
            f"{d['p_value']:.3g}", *([f"{d['p_holm']:.3g}"] if holm else []), f"{d['hedges_g']:+.2f}",
            _correlation(paired), _interval(paired), f"{d['runs_for_observed'] or ''}",
        )  # fmt: skip
    console.print(table)
    for d in answer["differences"]:
        console.print(verdict(d, unit, holm), soft_wrap=True)
    unfinished = sum(arm["diverged"] + arm["crashed"] for arm in answer["arms"])
    if unfinished:
        console.print(f"{unfinished} runs have no result; the means are of the others and flatter their arms")


def verdict(difference: dict[str, Any], unit: str, holm: bool) -> str:
    """One sentence for one difference."""
    d = difference
    names = f"{d['of']} against {d['against']}"
    size = f"{d['estimate']:+.2f}{' ' * bool(unit)}{unit} ({d['low']:+.2f} to {d['high']:+.2f})"
    if d["p_holm" if holm else "p_value"] < 0.05:
        text = f"{names}: {'higher' if d['estimate'] > 0 else 'lower'}, by {size}"
    else:
        text = f"{names}: no difference shown; {size} leaves room for both signs"
        if holm and not d["low"] <= 0 <= d["high"]:
            text = f"{names}: not shown once {size} is corrected for the number of comparisons"
        if d["runs_for_observed"]:
            text += f"; were it as large as seen, {d['runs_for_observed']:,} runs an arm would show it (80 % power)"
    if d["equivalence"]:
        equal = "equivalent" if d["equivalence"]["equivalent"] else "not shown to be equivalent"
        text += f"; {equal} within {d['equivalence']['margin']:g} (p {d['equivalence']['p_value']:.3g})"
    if d["runs_for_min_effect"]:
        text += f"; {d['runs_for_min_effect']:,} runs an arm to see the difference of --min-effect"
    return text


def _correlation(paired):
    """Empty where there is none: too few pairs, or an arm whose runs are all alike."""
    return f"{paired['correlation']:+.2f}" if paired and not math.isnan(paired["correlation"]) else ""


def _interval(paired):
    """The interval over pairs, where pairing by seed narrows it."""
    return f"{paired['low']:+.2f} to {paired['high']:+.2f}" if paired and paired["helps"] else ""


def _describe_difference(by_recipe):
    """What differs between recipes of one name."""
    keys = {key for record in by_recipe.values() for key in record.recipe}
    different = [key for key in sorted(keys) if len({str(r.recipe.get(key)) for r in by_recipe.values()}) > 1]
    return "; ".join(
        f"@{key[:8]} has " + ", ".join(f"{name} {record.recipe.get(name)}" for name in different[:4])
        for key, record in by_recipe.items()
    )
