"""Many seeds of one recipe over several devices and processes, put on record as they end."""

from collections.abc import Iterator, Sequence

from jax.sharding import Mesh

from fastcifar_jax.parallel import hosts
from fastcifar_jax.parallel.seeds import train_seeds
from fastcifar_jax.runs import records
from fastcifar_jax.runs.runner import (
    Event,
    Existing,
    RunSettings,
    RunSpec,
    existing_record,
    failed,
    finished,
    new_record,
)
from fastcifar_jax.train import Diverged
from fastcifar_jax.types import EpochInfo


class MeshError(ValueError):
    """Nothing was trained: a recipe that does not fit the mesh, or processes that were given different things."""


def run_together(spec: RunSpec, seeds: Sequence[int], settings: RunSettings, mesh: Mesh) -> Iterator[Event]:
    """Runs the seeds that are not on record, a seed per row of devices at a time.

    With several processes all call this with the same arguments. Process 0 alone decides which seeds are on record, and
    writes; the events of the others are not to be shown.

    Args:
      spec: what to run, in JAX.
      seeds: of the runs.
      settings: how; `checkpoint` and `save` do not apply.
      mesh: from `make_mesh`.

    Raises:
      RecordError: a record cannot be written.
      MeshError: nothing was trained.
      Exception: whatever a run raised that crashed, after records of the seeds in training are written.
    """
    shape, writes = "x".join(map(str, mesh.shape.values())), hosts.writes_records()
    existing = [existing_record(spec, settings, seed) if writes else None for seed in seeds]
    for seed, record in zip(seeds, existing, strict=True):
        if record:
            differs = record.provenance.diff(new_record(spec, seed, settings.command, shape).provenance)
            yield Event(spec, seed, Existing(record, tuple(differs)))
    missing = hosts.from_process_0([int(record is None) for record in existing])
    seeds = [seed for seed, flag in zip(seeds, missing, strict=True) if flag]
    if not seeds:
        return
    rows: dict[int, list[EpochInfo]] = {seed: [] for seed in seeds}
    new = {seed: new_record(spec, seed, settings.command, shape) for seed in seeds}

    def write(record):
        if writes:
            records.write(record, settings.out, tta=spec.recipe.published.tta)

    try:
        yield Event(spec, seeds[0], "compiling")
        data, options = spec.data, {"tta_every_epoch": settings.tta_every_epoch}
        for seed, news in train_seeds(spec.recipe, len(data.info.classes), seeds, data.dataset, mesh, **options):
            if isinstance(news, EpochInfo):
                rows[seed].append(news)
                yield Event(spec, seed, news)
                continue
            del rows[seed]
            if isinstance(news, Diverged):
                record = failed(new[seed], news, ())
            else:
                record = finished(new[seed], news, data.transfer_seconds)
            write(record)
            yield Event(spec, seed, record)
    except records.RecordError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and not any(rows.values()):
            raise MeshError(f"{spec.arm}: {error}") from error
        # A seed that has not finished an epoch may not have started.
        for seed in [seed for seed in rows if rows[seed]] or list(rows)[:1]:
            record = failed(new[seed], error, rows[seed])
            write(record)
            yield Event(spec, seed, record)
        raise
