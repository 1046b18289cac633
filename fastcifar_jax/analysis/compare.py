"""Records grouped into arms, and arms compared: whether a change helps, by how much, and with what uncertainty."""

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastcifar_jax.analysis import stats
from fastcifar_jax.recipe import flatten
from fastcifar_jax.runs import records
from fastcifar_jax.runs.provenance import data_key
from fastcifar_jax.runs.records import Record

ACCURACIES = ("test_accuracy", "tta_accuracy")
METRICS = (*ACCURACIES, "train_seconds", "images_per_second")
_ARM = re.compile(r"(?:(?P<framework>jax|torch):)?(?P<experiment>[^@]+)(?:@(?P<prefix>[0-9a-f]+))?")


class Arm(NamedTuple):
    """Runs of one recipe, in one framework, on one data set.

    Attributes:
      name: shown to the reader.
      records: one per seed, in the order of the seeds; at least one.
      repeats: further records of these seeds, which no number is computed from.
    """

    name: str
    records: tuple[Record, ...]
    repeats: tuple[Record, ...] = ()


class CompareOptions(NamedTuple):
    """What to compute; differences of accuracies are in percentage points.

    Attributes:
      metric: one of METRICS.
      threshold: the share of runs at or above it is computed; None to leave it out.
      equivalence_margin: the smallest difference that matters; None for no test of equivalence.
      min_effect: a difference to plan for; None for no number of runs.
      against_previous: whether each arm is compared with the one before it instead of the first.
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
    """Framework, experiment and the first digits of the recipe's hash.

    Raises:
      ValueError: text of another form.

    Example:
      >>> parse_arm("final"), parse_arm("torch:final@1a2b")
      (('jax', 'final', ''), ('torch', 'final', '1a2b'))
    """
    match = _ARM.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not an arm; give an experiment's name, as in final, torch:final or final@1a2b3c")
    return match["framework"] or "jax", match["experiment"], match["prefix"] or ""


def data_text(data: dict[str, Any]) -> str:
    """ "digits, 1,437 training and 360 test images, hash 0123abcd"."""
    return f"{data['source']}, {data['train']:,} training and {data['test']:,} test images, hash {data['hash'][:8]}"


def num_epochs(record: Record) -> float:
    """Length of a run in epochs; the recipe in a record's file may hold any value."""
    length = record.recipe.get("num_epochs")
    return length if isinstance(length, int | float) else len(record.epochs)


def group_arms(found: Iterable[Record], order: Sequence[str] = ()) -> list[Arm]:
    """Records grouped by framework, recipe and data.

    Recipes of one name are told apart by their epochs or, where these are equal too, by their hash ("final, 8 epochs",
    "final@1a2b3c4d"), and data sets by source and size. Of several records of a seed, a finished one counts before
    others and a newer one before older ones.

    Args:
      found: in any order.
      order: experiments in the order of their arms. Others follow in the order of `found`, arms of one name by epochs.
    """
    groups: dict[tuple, list[Record]] = {}
    for record in found:
        key = (arm_name(record.framework, record.experiment), record.recipe_hash, data_key(record.provenance))
        groups.setdefault(key, []).append(record)
    names = list(dict.fromkeys(name for name, *_ in groups))
    rank = {experiment: i for i, experiment in enumerate(order)}

    def position(item):
        (name, recipe_hash, data), (first, *_) = item
        return rank.get(first.experiment, len(rank)), names.index(name), num_epochs(first), recipe_hash, data

    arms = []
    for (name, recipe_hash, data), group in sorted(groups.items(), key=position):
        namesakes = {key: same[0] for key, same in groups.items() if key[0] == name}
        lengths = {key[1]: num_epochs(first) for key, first in namesakes.items()}  # by recipe
        if len(set(lengths.values())) < len(lengths):
            name += f"@{recipe_hash[:8]}"
        elif len(lengths) > 1:
            name += f", {lengths[recipe_hash]:g} epochs"
        if len({key[2] for key in namesakes}) > 1:
            name += " on {source}, {train:,} images".format_map(group[0].provenance.data)
        by_age = sorted(group, key=lambda record: (record.status == "finished", record.started))
        chosen = {record.seed: record for record in by_age}
        repeats = tuple(record for record in by_age if record is not chosen[record.seed])
        arms.append(Arm(name, tuple(chosen[seed] for seed in sorted(chosen)), repeats))
    return arms


def load_arm(out: Path, name: str, **data: Any) -> Arm:
    """The arm of that name in a folder of records.

    Args:
      out: folder of all records.
      name: as `parse_arm` takes it.
      **data: required values of the records' data, as in `train=20000`; None for any.

    Raises:
      ValueError: no records, or those of several recipes or data sets, or two of one run.
      RecordError: a JSON file in the folder is not a record.
    """
    framework, experiment, prefix = parse_arm(name)
    arms = group_arms(
        record
        for record in records.find(out, experiment=experiment, framework=framework).values()
        if record.recipe_hash.startswith(prefix)
        and all(value is None or record.provenance.data[key] == value for key, value in data.items())
    )
    if not arms:
        raise ValueError(f"no record of {name} in {out}; --seeds 5 makes them")
    by_recipe = {arm.records[0].recipe_hash: arm.records[0] for arm in arms}
    if len(by_recipe) > 1:
        raise ValueError(
            f"{out} holds {len(by_recipe)} recipes called {name}: {_describe_difference(by_recipe)}; give one of "
            f"{', '.join(f'{experiment}@{key[:8]}' for key in by_recipe)}"
        )
    if len(arms) > 1:
        shown = "; ".join(data_text(arm.records[0].provenance.data) for arm in arms)
        raise ValueError(f"{out} holds runs of {name} on different images: {shown}; choose with --data, --limit-train")
    if repeats := arms[0].repeats:
        raise ValueError(f"{out} holds more than one record of {name}, seed {repeats[0].seed}; move one away")
    return arms[0]._replace(name=name)


def values_of(arm: Arm, metric: str) -> dict[int, float]:
    """Seed -> value, for the finished runs; accuracies in percent."""
    scale = 100 if metric in ACCURACIES else 1
    return {record.seed: scale * record.result[metric] for record in arm.records if record.result}


def check_comparable(arms: Sequence[Arm]) -> None:
    """Checks that the arms were trained and tested on the same images.

    Raises:
      ValueError: they were not; the message names what differs.
    """
    kinds: dict[tuple, tuple[str, Record]] = {}
    for arm in arms:
        for record in arm.records:
            kinds.setdefault(data_key(record.provenance), (arm.name, record))
    if len(kinds) > 1:
        shown = "; ".join(
            f"{name}, seed {record.seed}: {data_text(record.provenance.data)}" for name, record in kinds.values()
        )
        raise ValueError(f"these runs saw different images: {shown}; --allow-different-data compares them nevertheless")


def compare(arms: Sequence[Arm], options: CompareOptions) -> dict[str, Any]:
    """The comparison as a JSON object; accuracies in percent, differences of them in percentage points.

    A run that diverged or crashed has no accuracy: it is counted, and the means are those of the others.

    Args:
      arms: at least two.
      options: what to compute.

    Returns:
      The options, `arms` and `differences`, with the fields of the tuples of `stats`. Each difference has a `p_value`;
      corrected for the number of differences, `p_holm`; and by that a `verdict`: "higher", "lower" or "none shown".

    Raises:
      ValueError: fewer than two finished runs of an arm.
    """
    values = [values_of(arm, options.metric) for arm in arms]
    for arm, finished in zip(arms, values, strict=True):
        if len(finished) < 2:
            text = "1 finished run" if finished else "no finished runs"
            raise ValueError(f"{arm.name} has {text}; a comparison needs at least 2, better 5 or more")
    bases = range(len(arms) - 1) if options.against_previous else [0] * (len(arms) - 1)
    differences = [
        {"of": arms[i].name, "against": arms[base].name, **_difference(values[base], values[i], options)}
        for i, base in enumerate(bases, start=1)
    ]
    for d, p_holm in zip(differences, stats.holm([d["p_value"] for d in differences]), strict=True):
        shown = p_holm < 1 - options.confidence
        d |= {"p_holm": p_holm, "verdict": ("higher" if d["estimate"] > 0 else "lower") if shown else "none shown"}
    summaries = [_summary(arm, list(found.values()), options) for arm, found in zip(arms, values, strict=True)]
    return {**options._asdict(), "arms": summaries, "differences": differences}


def _summary(arm, values, options):
    count = lambda status: sum(record.status == status for record in arm.records)
    first = arm.records[0]
    seconds = values_of(arm, "train_seconds").values()
    threshold = options.threshold
    return {
        "name": arm.name,
        "recipe_hash": first.recipe_hash,
        "num_epochs": first.recipe.get("num_epochs"),
        "data": first.provenance.data,
        "device": first.provenance.device,
        "versions": first.provenance.versions,
        "seeds": [record.seed for record in arm.records],
        "diverged": count("diverged"),
        "crashed": count("crashed"),
        "mean_train_seconds": sum(seconds) / len(seconds),
        "values": values,
        **stats.summarize(values, options.confidence)._asdict(),
        # A run that diverged did not reach the threshold.
        "share": None if threshold is None else sum(value >= threshold for value in values) / len(arm.records),
    }


def _difference(base, other, options):
    """`base` and `other` map seeds to values."""
    a, b, confidence = list(base.values()), list(other.values()), options.confidence
    welch, pairs = stats.welch(a, b, confidence), None
    common = sorted(base.keys() & other.keys())
    if len(common) >= 3:
        found = stats.paired([base[seed] for seed in common], [other[seed] for seed in common], confidence)
        # Of use for planning. To report the narrower interval of the two would be to choose after seeing the data.
        pairs = {**found._asdict(), "helps": found.high - found.low < welch.high - welch.low}
    sds = [stats.summarize(values).sd for values in (a, b)]
    runs_to_show = functools.partial(stats.runs_needed, *sds, confidence=confidence)
    needed = lambda difference: runs_to_show(difference) if difference and max(sds) > 0 else None
    margin = options.equivalence_margin
    return {
        **welch._asdict(),
        "paired": pairs,
        "equivalence": margin and stats.tost(a, b, margin, confidence)._asdict(),
        "runs_for_observed": needed(abs(welch.estimate)),
        "runs_for_min_effect": needed(options.min_effect),
    }


def _describe_difference(by_recipe):
    """The first four values in which recipes of one name differ."""
    flat = {key: flatten(record.recipe) for key, record in by_recipe.items()}
    names = sorted(set().union(*flat.values()))
    different = [name for name in names if len({str(values.get(name)) for values in flat.values()}) > 1][:4]
    shown = lambda values: ", ".join(f"{name} {values.get(name)}" for name in different)
    return "; ".join(f"@{key[:8]} has {shown(values)}" for key, values in flat.items())
