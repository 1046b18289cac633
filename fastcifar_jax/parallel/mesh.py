"""The programs of a run as one program for several seeds and devices.

What is mapped are the functions of `train.py`. XLA simplifies such a program in another order than one for a single
seed and device, so rounding differs, and nothing else.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt32

from fastcifar_jax.ops.backend import Driver, compiler_options
from fastcifar_jax.ops.batch_norm import whole_groups
from fastcifar_jax.parallel.hosts import place
from fastcifar_jax.recipe import Recipe, resolve_dtype
from fastcifar_jax.train import CompiledRun, make_functions, shapes_of, with_values
from fastcifar_jax.tunable import tunable
from fastcifar_jax.types import Dataset, TrainState

Strategy = Literal["loop", "map", "vmap"]


def make_mesh(seed: int | None = None, batch: int = 1) -> Mesh:
    """A mesh with the axes `seed` and `batch` over the devices of all processes.

    Args:
      seed: seeds that run at once; as many as the devices allow when None.
      batch: devices that share the batches of one seed. They are neighbours, on one host where it has that many.

    Raises:
      ValueError: more devices than there are, or with several hosts fewer.
    """
    count = jax.device_count()
    seed = count // batch if seed is None and batch > 0 else seed
    if batch < 1 or not seed or seed < 1 or seed * batch > count:
        raise ValueError(f"a mesh of seed {seed} x batch {batch} does not fit {count} devices; seed * batch <= {count}")
    if jax.process_count() > 1 and seed * batch != count:
        raise ValueError(
            f"a mesh of seed {seed} x batch {batch} leaves some of the {count} devices of {jax.process_count()} "
            f"processes idle; choose seed * batch = {count}"
        )
    # Not jax.make_mesh, which refuses devices of several slices, as GPUs of several hosts are to it.
    return Mesh(np.array(jax.devices()[: seed * batch]).reshape(seed, batch), ("seed", "batch"))


def spread_over(mesh: Mesh, *axes: str) -> NamedSharding:
    """How an array lies whose leading axes are split over `axes` of a mesh; without any, a copy on every device."""
    return NamedSharding(mesh, P(*axes))


def raw_keys(seeds: Sequence[int], mesh: Mesh) -> UInt32[Array, "seeds words"]:
    """The data of the keys that `make_train` would be given, spread over the `seed` axis of a mesh."""
    keys = np.stack([np.asarray(jax.random.key_data(jax.random.key(seed))) for seed in seeds])
    return place(keys, spread_over(mesh, "seed"))


def compile_for_mesh(
    recipe: Recipe, num_classes: int, dataset: Dataset, driver: Driver, strategy: Strategy, mesh: Mesh, each: int
) -> CompiledRun:
    """The programs of `train.compile_programs` for states with a leading axis of seeds, spread over a mesh.

    `init` and `plan` take the raw key data of the seeds instead of a key.

    The functions are mapped by `jax.shard_map` and not left to the compiler's partitioner, which could not split the
    call into oneDNN. Its check of what varies over the mesh is off: with it, gradients would be summed over devices by
    themselves and the hand-written ones in `conv.py` and `norm.py` would be refused.
    """
    devices = mesh.shape["batch"]
    axis_name = "batch" if devices > 1 else None
    functions = make_functions(recipe, num_classes, len(dataset.train_labels), axis_name)
    values, function = tunable(recipe), with_values(recipe, num_classes, len(dataset.train_labels), axis_name)
    key, index, *shapes = shapes_of(functions, recipe, dataset)
    seeds = mesh.shape["seed"] * each
    state, totals, plan = jax.tree.map(lambda x: jax.ShapeDtypeStruct((seeds, *x.shape), x.dtype), tuple(shapes))
    raw = jax.eval_shape(lambda: jax.random.key_data(jax.random.split(jax.random.key(0), seeds)))
    num_groups = recipe.model(num_classes, resolve_dtype(recipe).compute_dtype).num_groups

    one, shared = P("seed"), P()
    spread = P("seed", "batch") if axis_name and whole_groups(num_groups, devices) else one
    average = {name: spread if name == "batch_stats" else one for name in state.average} if state.average else one
    training = TrainState._make((one, one, one, spread, one, average))  # how a state lies between programs
    lift = functools.partial(_over_seeds, strategy=strategy)
    # Some kinds of keys give other bits under vmap.
    draw = functools.partial(_over_seeds, strategy="loop" if strategy == "loop" else "map")
    lies = functools.partial(jax.tree.map, lambda spec: NamedSharding(mesh, spec), is_leaf=lambda x: isinstance(x, P))

    def compiled(f, args, in_specs, out_specs, donate=(), lie_in=None, lie_out=None, options=None):
        """`lie_in` and `lie_out`: how arguments and results lie outside, where `f` has them otherwise."""
        mapped = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        shardings = {"in_shardings": lies(lie_in or in_specs), "out_shardings": lies(lie_out or out_specs)}
        return jax.jit(mapped, donate_argnums=donate, **shardings).lower(*args).compile(options)

    def init(raw, dataset, values):
        key = lambda raw: jax.random.split(jax.random.wrap_key_data(raw))[0]
        return draw(lambda raw: function("init")(values, key(raw), dataset))(raw)

    def plan_epoch(raw, epoch, dataset):
        key = lambda raw: jax.random.split(jax.random.wrap_key_data(raw))[1]
        return draw(lambda raw: functions.plan(key(raw), epoch, dataset))(raw)

    def train_whole_epoch(state, plan, dataset, num_steps, values):
        train = lambda state, plan: function("train_epoch")(values, state, dataset, plan, num_steps)
        return lift(train)(state, plan)

    def train_one_batch(state, totals, plan, dataset, index, values):
        step = lambda state, totals, plan: function("train_batch")(values, state, totals, dataset, plan, index)
        return lift(step)(state, totals, plan)

    def evaluate(state, dataset, values):
        def on(pixels, labels):
            part = dataset._replace(test_images=pixels, test_labels=labels)
            return lift(lambda state: function("evaluate")(values, state, part))(state)

        test = dataset.test_images, dataset.test_labels
        if axis_name is None:
            return on(*test)
        size = len(test[1]) // devices
        sums = []
        if size:
            here = lax.axis_index(axis_name) * size
            sums.append(lax.psum(on(*(lax.dynamic_slice_in_dim(x, here, size) for x in test)), axis_name))
        if len(test[1]) % devices:  # by every device for itself
            sums.append(on(*(x[size * devices :] for x in test)))
        return jax.tree.map(lambda *x: sum(x), *sums)

    specs: dict[str, Any]
    if driver == "scan":
        specs = {"in_specs": (training, one, shared, shared, shared), "out_specs": (training, one)}
        args = (state, plan, dataset, index, values)
        program = compiled(train_whole_epoch, args, **specs, donate=0, options=compiler_options())

        def train_epoch(values, state, dataset, plan, epoch, num_steps, on_step):
            del epoch, on_step
            return program(state, plan, dataset, np.int32(num_steps), values)

    else:
        specs = {"in_specs": (training, one, one, shared, shared, shared), "out_specs": (training, one)}
        batch_args = (state, totals, plan, dataset, index, values)
        program = compiled(train_one_batch, batch_args, **specs, donate=(0, 1), options=compiler_options())

        def train_epoch(values, state, dataset, plan, epoch, num_steps, on_step):
            del epoch, on_step
            sums = place(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), totals), lies(one))
            for i in range(num_steps):
                state, sums = program(state, sums, plan, dataset, np.int32(i), values)
            return state, sums

    def entering(epoch):
        enter = jax.vmap(lambda state: functions.finalize_batch_stats(state, epoch))
        return jax.jit(enter, in_shardings=(lies(training),), out_shardings=lies(training)).lower(state).compile()

    specs = {"in_specs": (one, shared, shared), "out_specs": one}
    program_to_init = compiled(init, (raw, dataset, values), **specs, lie_out=training)
    program_to_evaluate = compiled(evaluate, (state, dataset, values), **specs, lie_in=(training, shared, shared))
    first, later = entering(1), entering(2)  # all that the epoch's number matters for
    return CompiledRun(
        init=lambda values, raw, dataset: program_to_init(raw, dataset, values),
        plan=compiled(plan_epoch, (raw, index, dataset), (one, shared, shared), one),
        train_epoch=train_epoch,
        finalize_batch_stats=lambda state, epoch: (first if epoch == 1 else later)(state),
        evaluate=lambda values, state, dataset: program_to_evaluate(state, dataset, values),
        steps_per_epoch=len(dataset.train_labels) // recipe.batch_size,
    )


def _over_seeds(f: Callable, strategy: Strategy) -> Callable:
    """`f` of one seed's arguments as a function of several seeds' arguments, stacked; of exactly one under "loop"."""
    if strategy == "vmap":
        return jax.vmap(f)
    if strategy == "map":
        return lambda *many: lax.map(lambda one: f(*one), many)
    first = functools.partial(jax.tree.map, lambda x: x.squeeze(0))
    return lambda *many: jax.tree.map(lambda x: x[None], f(*first(many)))
