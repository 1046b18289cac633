"""The layers of any `Model` as a graph, read off its trace: what a drawing of the network shows.

A layer is what a reader would name: a convolution with its bias, a norm, an activation, a pool. `model.apply` is traced
to a jaxpr; its equations on images are gathered into layers, and Linen's name scopes say where these belong.
"""

import dataclasses
import graphlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params

from fastcifar_jax.models.base import Model
from fastcifar_jax.types import flatten_by_path

KINDS = ("images", "convolution", "norm", "activation", "pool", "linear", "join", "other")

# Primitives of JAX by what they make of an array; whatever is in none of these sets becomes a layer of its own.
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "checkpoint"}
CUSTOM = {"custom_vjp_call", "custom_jvp_call", "cond"}
PLAIN = set(
    "add add_any broadcast_in_dim concatenate convert_element_type copy div dynamic_slice expand_dims iota mul neg "
    "optimization_barrier pad reduce_precision reshape rev sharding_constraint slice squeeze sub transpose".split()
)
NONLINEAR = set(
    "abs and ceil clamp cos erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt "
    "max min ne eq not or pow round select_n sign sin square tan tanh".split()
)
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"}
WINDOWS = {"reduce_window_max", "reduce_window_sum", "reduce_window_min", "reduce_window"}
ROOTS = {"sqrt", "rsqrt"}
JOINS = {"add_any": "add", "sub": "subtract", "mul": "multiply", "div": "divide"}

_IMAGES = 97  # in each ghost group: a prime, so that a size is a multiple of the batch only where it holds the batch
_TIMES = "\N{MULTIPLICATION SIGN}"


class Layer(NamedTuple):
    """One node of the graph."""

    kind: str  # one of KINDS
    label: str  # "conv 3x3", "celu"
    scope: tuple[str, ...]  # the modules that it is in, outermost first, without the network itself
    shape: tuple[int, ...]  # of its output, for one image
    trained: int  # parameters; an array that several layers use counts at the first
    frozen: int
    inputs: tuple[int, ...]  # positions of layers in the graph, all before its own


class Graph(NamedTuple):
    """A network: its layers in the order of computation, images first."""

    layers: tuple[Layer, ...]
    trained: int  # parameters of the network, whether or not a layer uses them
    frozen: int


def graph_of(model: Model, height: int = 32, width: int = 32, channels: int = 3) -> Graph:
    """The layers of a network in training mode.

    Args:
      model: any pair of functions. With Linen's name scopes, or `jax.named_scope`, its layers know where they belong;
        without any, they belong where their parameters do: in "layer1", if these are "layer1/kernel".
      height: of an image, in pixels.
      width: of an image, in pixels.
      channels: of an image.
    """
    images = jax.ShapeDtypeStruct((_IMAGES * model.num_groups, height, width, channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), images)
    trace = jax.make_jaxpr(lambda variables, images: model.apply(variables, images, True)[0])(variables, images)
    arrays = flatten_by_path(variables)
    reader = _Reader(images.shape)
    known = {
        var: _Value(statistics=True) if path.startswith("batch_stats/") else _Value(arrays=frozenset((path,)))
        for path, var in zip(arrays, trace.jaxpr.invars, strict=False)
    }
    known[trace.jaxpr.invars[-1]] = _Value(layer=0)
    outputs = reader.follow(trace.jaxpr, known, (), "")
    layers = reader.layers_before([value.layer for value in outputs if value.layer is not None])
    size = lambda collection: sum(leaf.size for path, leaf in arrays.items() if path.startswith(f"{collection}/"))
    return Graph(_closed(layers, arrays), size("params"), size("constants"))


class _Value(NamedTuple):
    """What is known of an array in the trace."""

    layer: int | None = None  # that it comes out of; None where it does not hold a batch
    arrays: frozenset[str] = frozenset()  # paths of the parameters that it is made of, where it holds no batch
    statistics: bool = False  # made of running statistics, or of the batch's


@dataclasses.dataclass
class _Open:
    """A layer that may still grow."""

    scope: tuple[str, ...]
    inputs: list[int]
    flags: set[str]  # kinds, and "nonlinear", "reduction"
    label: str
    shape: tuple[int, ...]
    arrays: set[str] = dataclasses.field(default_factory=set)

    @property
    def grows(self) -> bool:
        """Whether it is elementwise or a reduction, and has not been told to be anything else."""
        return self.flags <= {"norm", "nonlinear", "reduction"}


class _Reader:
    """Gathers the equations of a trace into layers; layer 0 is the images."""

    def __init__(self, images: tuple[int, ...]):
        self.batch = images[0]
        self.layers = [_Open((), [], {"images"}, "images", images[1:])]
        self.merged: dict[int, int] = {}  # layer -> the one that it has become a part of

    def follow(self, jaxpr: Jaxpr, known: dict[Any, _Value], scope: tuple[str, ...], name: str) -> list[_Value]:
        """The values of a jaxpr's outputs.

        Args:
          jaxpr: whose equations are read.
          known: the values of its inputs; gets those of its other variables.
          scope: of the equation that calls it.
          name: of the function that it is the body of, "silu"; "" for none.
        """
        look = lambda atom: _Value() if isinstance(atom, Literal) else known.get(atom, _Value())
        for eqn in jaxpr.eqns:
            inputs = [look(atom) for atom in eqn.invars]
            here = (*scope, *filter(None, str(eqn.source_info.name_stack).split("/")))
            if eqn.primitive.name in CALLS:
                body = next(iter(jaxprs_in_params(eqn.params)))
                of_body = dict(zip(body.invars, inputs, strict=True))
                outputs = self.follow(body, of_body, here, name or eqn.params.get("name", ""))
            else:
                outputs = self._equation(eqn, inputs, here, name)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [look(atom) for atom in jaxpr.outvars]

    def layers_before(self, ends: Iterable[int]) -> list[_Open]:
        """The layers that the layers `ends` are computed from, with these; `inputs` are positions in the list."""
        self._gather_norms()
        before: dict[int, list[int]] = {0: []}
        todo = [self._find(end) for end in ends]
        while todo:
            layer = todo.pop()
            if layer not in before:
                before[layer] = self._inputs(layer)
                todo += before[layer]
        # Not simply by number: what went into a later layer may be used by an earlier one.
        place = {layer: i for i, layer in enumerate(graphlib.TopologicalSorter(before).static_order())}
        return [
            dataclasses.replace(self.layers[layer], inputs=sorted(place[other] for other in before[layer]))
            for layer in place
        ]

    def _equation(self, eqn: JaxprEqn, inputs: list[_Value], scope: tuple[str, ...], name: str) -> list[_Value]:
        sides = [value for value in inputs if value.layer is None]
        arrays = frozenset().union(*(value.arrays for value in sides))
        statistics = any(value.statistics for value in sides)
        made_of = list(dict.fromkeys(self._find(value.layer) for value in inputs if value.layer is not None))
        shapes = [_shape(var) for var in eqn.outvars]
        holds_batch = [bool(made_of) and math.prod(shape) % self.batch == 0 for shape in shapes]
        if not any(holds_batch):
            return [_Value(None, arrays, statistics or bool(made_of))] * len(shapes)
        flags, label = _sort(eqn)
        flags |= {"norm"} if statistics else set()
        if len(made_of) == 1 and not flags and not arrays:
            layer = made_of[0]  # a change of shape or dtype, or scaling by a number
        else:
            layer = self._place(flags, label, made_of, scope, name)
            opened = self.layers[layer]
            opened.flags |= flags
            opened.arrays |= arrays
            if {opened.label, label} <= NONLINEAR and opened.label != label:
                opened.label = "activation"
            shape = shapes[holds_batch.index(True)]
            opened.shape = shape[1:] if shape[:1] == (self.batch,) else shape
        return [_Value(layer) if holds else _Value(statistics=True) for holds in holds_batch]

    def _place(self, flags, label, made_of, scope, name) -> int:
        """The layer that an equation goes into: one of those that it is made of, or a new one."""
        first = self.layers[made_of[0]]
        same, grows = first.scope == scope, first.grows and first.scope == scope
        if len(made_of) > 1:
            elementwise = flags <= {"norm", "nonlinear", "reduction"}
            found = self._one_function(made_of, scope) if elementwise else None
            if found is not None:
                return found
            flags |= set() if flags & set(KINDS) else {"join"}
            label = JOINS.get(label, label)
        elif not flags:  # a scale or a bias
            if same and (first.flags & {"convolution", "linear", "norm"} or (grows and first.arrays)):
                return made_of[0]
        elif flags == {"norm"}:
            if grows and "nonlinear" not in first.flags:
                return made_of[0]
        elif flags == {"nonlinear"}:
            if grows and first.flags == {"nonlinear"} and not first.arrays and first.label == (name or first.label):
                return made_of[0]
            label = name or label
        self.layers.append(_Open(scope, made_of, set(), label, ()))
        return len(self.layers) - 1

    def _one_function(self, made_of: list[int], scope: tuple[str, ...]) -> int | None:
        """Where all is one function of one input, as in x * sigmoid(x), its layer; None where branches meet."""
        fits = lambda layer: self.layers[layer].grows and self.layers[layer].scope == scope
        for layer in filter(fits, made_of):
            inputs = self._inputs(layer)
            others = [other for other in made_of if other != layer and other not in inputs]
            if all(fits(other) and set(self._inputs(other)) == set(inputs) for other in others):
                for other in others:
                    self._merge(other, layer)
                return layer
        return None

    def _gather_norms(self):
        """A norm that is a module of its own is one layer, however many equations and branches it is made of."""
        layers = [layer for layer in range(1, len(self.layers)) if self._find(layer) == layer]
        for scope, group in itertools.groupby(layers, lambda layer: self.layers[layer].scope):
            layers = list(group)
            flags = set().union(*(self.layers[layer].flags for layer in layers))
            if scope and "norm" in flags and flags <= {"norm", "nonlinear", "reduction", "join"}:
                for layer in layers[:-1]:
                    self._merge(layer, layers[-1])
                self.layers[layers[-1]].flags = {"norm"}

    def _merge(self, layer: int, into: int) -> None:
        old, new = self.layers[layer], self.layers[into]
        new.flags |= old.flags
        new.arrays |= old.arrays
        new.inputs = [*old.inputs, *new.inputs]
        self.merged[layer] = into

    def _find(self, layer: int) -> int:
        while layer in self.merged:
            layer = self.merged[layer]
        return layer

    def _inputs(self, layer: int) -> list[int]:
        inputs = dict.fromkeys(map(self._find, self.layers[layer].inputs))
        return [other for other in inputs if other != layer]


def _sort(eqn: JaxprEqn) -> tuple[set[str], str]:
    """What an equation does, as a set of flags, and a name for it."""
    name = eqn.primitive.name
    if name in PLAIN:
        return set(), name
    if name in NONLINEAR:
        return {"nonlinear"}, name
    if name in REDUCTIONS:
        return {"reduction"}, "max" if name == "reduce_max" else "mean"
    if name in ROOTS:
        return {"norm"}, name
    inside = [eqn, *_equations(jaxprs_in_params(eqn.params))]
    names = {inner.primitive.name for inner in inside}
    for inner in inside:
        if inner.primitive.name == "conv_general_dilated":
            kernel = inner.params["dimension_numbers"].rhs_spec
            sizes = [_shape(inner.invars[1])[axis] for axis in kernel[2:]]
            return {"convolution"}, f"conv {_TIMES.join(map(str, sizes))}"
    if "dot_general" in names:
        return {"linear"}, "linear"
    if names & WINDOWS:
        return {"pool"}, "max" if "reduce_window_max" in names else "mean"
    if name not in CUSTOM:
        return {"other"}, name
    if names & ROOTS:
        return {"norm"}, "norm"
    largest = lambda atoms: max(math.prod(_shape(atom)) for atom in atoms)
    if largest(eqn.outvars) < largest(eqn.invars):
        return {"pool"}, "max" if names & {"max", "reduce_max"} else "mean"
    functions = [jaxpr.debug_info.func_name for jaxpr in jaxprs_in_params(eqn.params)]
    return {"nonlinear"}, functions[0].strip("_<>")


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _equations(jaxprs: Iterable[Jaxpr]) -> Iterator[JaxprEqn]:
    for jaxpr in jaxprs:
        for eqn in jaxpr.eqns:
            yield eqn
            yield from _equations(jaxprs_in_params(eqn.params))


def _closed(layers: list[_Open], arrays: dict[str, Any]) -> tuple[Layer, ...]:
    """The finished layers; those that have no name of a kind are left out, and their inputs stand for them."""
    scopes = _scopes(layers)
    counted: set[str] = set()
    place: list[tuple[int, ...]] = []  # what stands for each of `layers`
    closed: list[Layer] = []
    for opened, scope in zip(layers, scopes, strict=True):
        inputs = tuple(dict.fromkeys(i for other in opened.inputs for i in place[other]))
        named = _name(opened, [closed[i].shape for i in inputs])
        if named is None:
            place.append(inputs)
            continue
        new = opened.arrays - counted
        counted |= new
        size = lambda collection, new=new: sum(arrays[path].size for path in new if path.startswith(collection))
        closed.append(Layer(*named, scope, opened.shape, size("params/"), size("constants/"), inputs))
        place.append((len(closed) - 1,))
    return tuple(closed)


def _name(opened: _Open, shapes: list[tuple[int, ...]]) -> tuple[str, str] | None:
    """Kind and label of a layer whose inputs have these shapes; None for one that only moves numbers about."""
    flags, label, shape = opened.flags, opened.label, opened.shape
    for kind in ("images", "convolution", "linear", "join", "other"):
        if kind in flags:
            return kind, label
    pool, whole = "", False
    if shapes and math.prod(shape) < math.prod(shapes[0]):
        before = shapes[0][:2]
        whole = len(shape) < 3 or shape[:2] == (1, 1)
        size = _TIMES.join(str(a // b) for a, b in zip(before, shape, strict=False))
        pool = "pool" if whole else f"pool {size}"
    if "norm" in flags:
        return "norm", f"norm, {pool}" if pool else "norm"
    if pool or "pool" in flags:
        words = ("global" if whole else "", label if label in ("max", "mean") else "", pool or "pool")
        return "pool", " ".join(filter(None, words))
    if flags & {"nonlinear", "reduction"}:
        return "activation", label
    return ("other", "scale and bias") if opened.arrays else None


def _scopes(layers: list[_Open]) -> list[tuple[str, ...]]:
    """Where each layer belongs, without the name of the network that all are in."""
    scopes = [opened.scope for opened in layers]
    if any(scopes):
        whole = os.path.commonprefix(scopes[1:])[:1]
        return [scope[len(whole) :] for scope in scopes]
    known: dict[int, tuple[str, ...]] = {}  # where the parameters are
    for i, opened in enumerate(layers):
        if opened.arrays:
            known[i] = tuple(min(opened.arrays).split("/")[1:-1])
    after = {other: i for i, opened in reversed(list(enumerate(layers))) for other in opened.inputs}
    for i, opened in enumerate(layers):
        if i not in known:  # in what the layers before and after it are in together
            around = [known.get(j, ()) for j in (*opened.inputs[:1], after.get(i, i))]
            known[i] = tuple(os.path.commonprefix(around)) if len(around) > 1 else ()
    return [known[i] for i in range(len(layers))]
