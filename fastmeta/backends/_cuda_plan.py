"""What a specialisation of the CUDA kernels is: the network simplified, and a place for everything in memory.

Sizes and offsets count elements; csrc/cuda/spec.h says what the fields of the tables mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from fastmeta.backends._cpu_plan import used_params
from fastmeta.backends._layout import lay_out
from fastmeta.losses import Loss
from fastmeta.network.program import Program
from fastmeta.problem import Batch, Problem

#: Activations whose derivatives the value behind them tells; of the others the value before is kept.
_TOLD_BY_OUTPUT = frozenset({"relu", "leaky_relu", "tanh", "sigmoid", "affine"})
#: Activations whose second derivative is zero.
_LINEAR_PIECES = frozenset({"relu", "leaky_relu", "affine"})


@dataclass(slots=True)
class Value:
    """One value of the program; see csrc/cuda/spec.h."""

    rows: int
    cols: int
    ld: int = 0
    vector: int = 1
    x: int = -1
    d: int = -1
    rx: int = -1
    rd: int = -1
    from_params: bool = False


@dataclass(slots=True)
class Layer:
    """One layer; a linear one may have taken the activation behind it."""

    kind: str
    function: str
    constants: tuple[float, float]
    inputs: tuple[int, int]
    output: int
    weight: int = -1
    bias: int = -1
    pre: int = -1
    adds: tuple[bool, bool] = (False, False)
    last: tuple[bool, bool] = (False, False)


@dataclass(slots=True)
class Param:
    """One parameter that some layer reads."""

    name: str
    rows: int
    cols: int
    ld: int
    vector: int
    per_task: bool
    adapted: bool
    rate_element: bool = False
    rate_per_task: bool = False
    rate_per_step: bool = False
    tied: bool = False
    at: int = 0
    column: int = 0
    rate_column: int = 0
    rate_slot: int = 0
    gradient: int = 0

    @property
    def numel(self) -> int:
        """Elements in torch's layout."""
        return self.rows * self.cols


@dataclass(slots=True)
class Area:
    """A piece of memory: `at` is an offset in shared memory or in the block's workspace."""

    size: int
    group: str
    space: str = "shared"
    at: int = 0


@dataclass(slots=True)
class Plan:
    """Everything that is constant in one specialisation."""

    values: list[Value]
    layers: list[Layer]
    params: list[Param]
    output: int
    itemsize: int
    steps: int
    support: int
    query: int
    flags: dict[str, bool]
    losses: tuple[str, str]  # as C++
    store: bool = True
    keep_all: bool = True
    threads: int = 128
    areas: dict[str, Area] = field(default_factory=dict)
    value_stride: int = 0
    delta_stride: int = 0
    frozen: int = 0
    set: int = 0
    restores: bool = False
    rate_slots: int = 0
    columns: int = 1
    shared_bytes: int = 0
    workspace: int = 0

    @property
    def memory(self) -> str:
        """ "store" or "recompute"."""
        return "store" if self.store else "recompute"


def make_plan(problem: Problem, wrt: frozenset[str], shared_bytes: int) -> Plan:
    """The best plan for a block that has `shared_bytes` of shared memory.

    All in shared memory if anything fits: with every step's values or one's, all of theta_0 .. theta_K or one at a
    time. Of what is larger the largest pieces go to global memory.
    """
    stores = {"store": (True,), "recompute": (False,), "auto": (True, False)}[problem.memory]
    plans = [_draft(problem, wrt, store, keep) for keep in (True, False) for store in stores]
    for plan in plans:
        _place(plan, shared_bytes)
        if all(area.space == "shared" for name, area in plan.areas.items() if area.size and name != "checkpoints"):
            return plan
    # theta_k is copied to shared memory step by step if one set fits, else read where it lies
    one_set = [plan for plan in plans if not plan.keep_all and plan.areas["theta"].space == "shared"]
    return one_set[-1] if one_set else plans[len(stores) - 1]


def _draft(problem: Problem, wrt: frozenset[str], store: bool, keep_all: bool) -> Plan:
    """A plan without places."""
    program = problem.program
    if program is None:
        raise ValueError(f"a plan needs a captured network: {problem.refused}")
    support, query = problem.support, problem.query
    steps = problem.steps if support is not None else 0
    first = next(iter(problem.params.values()))
    names = used_params(program)
    values, layers, output = simplify(program, names)
    rule = problem.rule
    flags = {
        "second_order": problem.order == "second" and bool(wrt) and steps > 0,
        "gradient": bool(wrt),
        "support_per_step": support is not None and support.per_step,
        "wants_params": "params" in wrt,
        "wants_rates": "lr" in wrt and steps > 0,
        "wants_support_x": "support_x" in wrt and problem.order == "second" and steps > 0,
        "wants_query_x": "query_x" in wrt,
        "momentum": rule is not None and rule.momentum != 0 and steps > 0,
        "weight_decay": rule is not None and rule.weight_decay != 0 and steps > 0,
        "step_weights": problem.step_weights is not None and problem.query_loss is not None,
    }
    plan = Plan(
        values,
        layers,
        [],
        output,
        first.dtype.itemsize,
        steps,
        0 if support is None or steps == 0 else support.x.shape[2 if support.per_step else 1],
        0 if query is None else query.x.shape[1],
        flags,
        (_loss(problem.loss, support), _loss(problem.query_loss, query)),
        store,
        keep_all,
    )
    plan.params = [_param(problem, program, name, plan) for name in names]
    _lay_out_params(plan)
    return plan


# ---- the network -------------------------------------------------------------------------------------------


def simplify(program: Program, names: list[str]) -> tuple[list[Value], list[Layer], int]:
    """Values, layers and the output: reshapes that move nothing are gone, activations are in epilogues."""
    index = {name: i for i, name in enumerate(names)}
    engine = lay_out(program)
    values = [Value(rows, cols) for rows, cols, *_ in engine.values]
    layers, output = [], engine.output
    for layer, inputs, out in engine.layers:
        weight, bias = [index[name] if name is not None else -1 for name in (*layer.params, None, None)[:2]]
        c0, c1 = (*layer.constants, 0.0, 0.0)[:2]
        a, b = (*inputs, -1)[:2]
        layers.append(Layer(layer.kind, layer.function, (c0, c1), (a, b), out, weight, bias))
    layers, output = _without_reshapes(values, layers, output)
    layers = _with_activations(layers, output)
    for made in layers:
        moves = made.weight >= 0 or any(values[v].from_params for v in made.inputs if v >= 0)
        values[made.output].from_params = moves
        if made.pre >= 0:
            values[made.pre].from_params = moves
    _mark_last(layers, output)
    return values, layers, output


def _readers(layers: list[Layer], value: int) -> list[Layer]:
    return [layer for layer in layers for v in layer.inputs if v == value]


def _without_reshapes(values: list[Value], layers: list[Layer], output: int) -> tuple[list[Layer], int]:
    kept: list[Layer] = []
    for i, layer in enumerate(layers):
        a, out = layer.inputs[0], layer.output
        if layer.kind == "reshape":
            same = (values[a].rows, values[a].cols) == (values[out].rows, values[out].cols)
            # the user's input is dense: its only reader just says how to read it
            if not same and a == 0 and len(_readers(layers[i:] + kept, 0)) == 1:
                values[0].rows, values[0].cols, same = values[out].rows, values[out].cols, True
            if same:
                output = a if output == out else output
                for later in layers[i:]:
                    later.inputs = tuple(a if v == out else v for v in later.inputs)  # type: ignore[assignment]
                continue
        kept.append(layer)
    return kept, output


def _with_activations(layers: list[Layer], output: int) -> list[Layer]:
    """linear -> elementwise, where nobody else reads what lies between and the loss does not read what comes out."""
    gone: set[int] = set()
    for layer in layers:
        readers = _readers(layers, layer.output)
        if layer.kind != "linear" or len(readers) != 1 or readers[0].kind != "elementwise" or layer.output == output:
            continue
        activation = readers[0]
        if activation.output == output:
            continue
        layer.pre, layer.output = layer.output, activation.output
        layer.function, layer.constants = activation.function, activation.constants
        gone.add(id(activation))
    return [layer for layer in layers if id(layer) not in gone]


def _mark_last(layers: list[Layer], output: int) -> None:
    """In a backward pass: who adds to a value's gradient, and who is last. The loss is the first at the output."""
    written = {output}
    final: dict[int, tuple[Layer, int]] = {}
    for layer in reversed(layers):
        adds = []
        for j, v in enumerate(layer.inputs):
            adds.append(v in written)
            if v >= 0:
                written.add(v)
                final[v] = (layer, j)
        layer.adds = (adds[0], adds[1])
    for layer, j in final.values():
        layer.last = (j == 0 or layer.last[0], j == 1 or layer.last[1])


# ---- parameters --------------------------------------------------------------------------------------------


def _pad(n: int, to: int) -> int:
    return -(-n // to) * to


def _param(problem: Problem, program: Program, name: str, plan: Plan) -> Param:
    shape = dict(program.params)[name]
    matrix = any(layer.params and layer.params[0] == name for layer in program.layers)
    rows, cols = (shape[0], prod(shape[1:])) if matrix else (1, prod(shape))
    vector = 16 // plan.itemsize
    ld = cols
    if cols < vector:
        vector = 1
    else:
        # an odd number of vectors from row to row: neighbouring rows begin in different banks
        ld = _pad(cols, vector)
        ld += vector if rows > 1 and ld // vector % 2 == 0 else 0
    rate = problem.rates.get(name) if plan.steps > 0 else None
    param = Param(name, rows, cols, ld, vector, name in problem.per_task, rate is not None)
    if rate is not None:
        param.rate_element = rate.shape[2:].numel() > 1
        param.rate_per_task = rate.shape[1] > 1
        param.rate_per_step = rate.shape[0] > 1
    index = used_params(program).index(name)
    param.tied = sum((layer.weight == index) + (layer.bias == index) for layer in plan.layers) > 1
    return param


def _lay_out_params(plan: Plan) -> None:
    """Frozen parameters first, so that sets of later steps hold the adapted ones alone; columns of the sums."""
    vector = 16 // plan.itemsize
    end = 0
    for adapted in (False, True):
        for param in plan.params:
            if param.adapted == adapted:
                param.at = end
                end += _pad(param.rows * param.ld, vector)
        if not adapted:
            plan.frozen = end
    plan.set = end - plan.frozen
    columns = slots = gradient = 0
    for param in plan.params:
        if plan.flags["wants_params"] and not param.per_task:
            param.column = columns
            columns += param.numel
        if param.tied:
            param.gradient = gradient
            gradient += _pad(param.rows * param.ld, vector)
    for param in plan.params:
        if plan.flags["wants_rates"] and param.adapted:
            if not param.rate_per_task:
                param.rate_column = columns
                columns += (plan.steps if param.rate_per_step else 1) * (param.numel if param.rate_element else 1)
            if not param.rate_element:
                param.rate_slot = slots
                slots += 1
    plan.rate_slots, plan.columns = slots, columns + 1


# ---- memory ------------------------------------------------------------------------------------------------


def _place(plan: Plan, shared_bytes: int) -> None:
    """Give every area its place: in shared memory as far as it goes, the smallest groups first."""
    _choose_threads(plan)
    sizes = _lay_out_values(plan, user_input=False)
    plan.areas = _areas(plan, sizes)
    room = shared_bytes // plan.itemsize
    vector = 16 // plan.itemsize
    groups: dict[str, int] = {}
    for area in plan.areas.values():
        area.size = _pad(area.size, vector)
        if area.group != "checkpoints":
            groups[area.group] = groups.get(area.group, 0) + area.size
    # the query's memory and the tangents' are never used at once
    scratch = {name: plan.areas[name].size for name in _SCRATCH}
    groups["scratch"] = max(
        scratch["query_values"] + scratch["query_deltas"], scratch["tangents"] + scratch["tangent_deltas"]
    )
    spaces = {"checkpoints": "global"}
    for group, size in sorted(groups.items(), key=lambda item: (item[0] != "sums", item[1])):
        spaces[group] = "shared" if size <= room else "user" if group == "input" else "global"
        room -= size if size <= room else 0
    if spaces["input"] == "user":  # it is read as it stands there
        sizes = _lay_out_values(plan, user_input=True)
        for name, area in _areas(plan, sizes).items():
            plan.areas[name].size = _pad(area.size, vector)
    ends = {"shared": 0, "global": 0, "user": 0}
    for area in plan.areas.values():
        area.space = spaces[area.group]
        if area.group != "scratch":
            area.at = ends[area.space]
            ends[area.space] += area.size
    space = spaces["scratch"]
    for pair in (_SCRATCH[:2], _SCRATCH[2:]):
        end = ends[space]
        for name in pair:
            plan.areas[name].at = end
            end += plan.areas[name].size
    ends[space] += groups["scratch"]
    plan.shared_bytes, plan.workspace = ends["shared"] * plan.itemsize, ends["global"]


_SCRATCH = ("query_values", "query_deltas", "tangents", "tangent_deltas")


def _choose_threads(plan: Plan) -> None:
    """As many as there are tiles of a few numbers in the largest product."""
    largest = 0
    for layer in plan.layers:
        if layer.kind == "linear":
            out = plan.values[layer.output]
            weight = plan.params[layer.weight]
            largest = max(largest, weight.numel, max(plan.support, plan.query) * out.rows * out.cols)
    plan.threads = 128 if largest <= 2048 else 256


def _lay_out_values(plan: Plan, user_input: bool) -> dict[str, int]:
    """Row lengths and offsets of all values; how many elements an example takes in each of the four blocks."""
    flags = plan.flags
    vector = 16 // plan.itemsize
    for v in plan.values:
        v.vector = vector if v.cols >= vector else 1
        v.ld = _pad(v.cols, v.vector)
    if user_input:
        first = plan.values[0]
        first.ld, first.vector = first.cols, vector if first.cols % vector == 0 else 1
    shared = {v for layer in plan.layers for v, adds in zip(layer.inputs, layer.adds, strict=True) if adds}
    taken = {layer.pre: layer for layer in plan.layers if layer.pre >= 0}
    behind = {layer.output: layer for layer in plan.layers if layer.pre >= 0}
    backward, tangents = plan.steps > 0 or flags["gradient"], flags["second_order"]
    used = {0} | {v for layer in plan.layers for v in (*layer.inputs, layer.output, layer.pre) if v >= 0}
    sizes = {"x": 0, "d": 0, "rx": 0, "rd": 0}
    # vectors first: rows of a few numbers need no alignment
    for number in sorted(used, key=lambda i: plan.values[i].vector == 1):
        v = plan.values[number]
        v.x = v.d = v.rx = v.rd = -1
        keeps = dict.fromkeys(sizes, True)
        keeps["x"] = number > 0
        keeps["d"] = backward and (v.from_params or flags["wants_query_x"])
        keeps["rx"] = tangents and v.from_params
        keeps["rd"] = tangents and (v.from_params or flags["wants_support_x"])
        if number in taken:
            function = taken[number].function
            keeps["x"] = function not in _TOLD_BY_OUTPUT or (
                function == "leaky_relu" and taken[number].constants[0] < 0
            )
            keeps["rx"] = keeps["rx"] and function not in _LINEAR_PIECES
        elif number in behind:
            smooth = behind[number].function not in _LINEAR_PIECES
            keeps["d"] = keeps["d"] and (number in shared or (tangents and smooth))
            keeps["rd"] = keeps["rd"] and number in shared
        for block, kept in keeps.items():
            if kept:
                setattr(v, block, sizes[block])
                sizes[block] += v.rows * v.ld
    return sizes


def _areas(plan: Plan, sizes: dict[str, int]) -> dict[str, Area]:
    """Everything that needs memory."""
    flags, steps, params = plan.flags, plan.steps, plan.params
    vector = 16 // plan.itemsize
    gradient = flags["gradient"]
    plain = not flags["momentum"] and not flags["weight_decay"]
    from_gradient = flags["wants_rates"] and not flags["momentum"]
    values_needed = gradient and (flags["second_order"] or from_gradient)
    theta_needed = gradient and steps > 0 and (values_needed or flags["step_weights"])
    if not values_needed:
        plan.store = True
    if not theta_needed:
        plan.keep_all = False
    kept = min(steps, 1) if not (values_needed and plan.store) else steps
    first = plan.values[0].rows * plan.values[0].ld
    values, deltas = (_pad(plan.support * sizes[block], vector) for block in ("x", "d"))
    plan.value_stride, plan.delta_stride = (values, deltas) if kept > 1 else (0, 0)
    writes = not plain or any(p.tied or (p.adapted and p.rate_element) for p in params)
    direction = flags["momentum"] or (gradient and writes and (flags["second_order"] or not plain))
    tied = sum(_pad(p.rows * p.ld, vector) for p in params if p.tied)
    plan.restores = theta_needed and not plan.keep_all
    checkpoints = max(steps - 1, 0) * plan.set if plan.restores else 0
    return {
        "theta": Area(plan.frozen + plan.set * (steps + 1 if plan.keep_all else 1), "theta"),
        "checkpoints": Area(checkpoints, "checkpoints"),
        "input": Area(plan.support * first, "input"),
        "query_input": Area(plan.query * first, "input"),
        "values": Area(values * kept, "values"),
        "deltas": Area(deltas * kept, "values"),
        "query_values": Area(plan.query * sizes["x"], "scratch"),
        "query_deltas": Area(plan.query * sizes["d"] if gradient else 0, "scratch"),
        "tangents": Area(plan.support * sizes["rx"], "scratch"),
        "tangent_deltas": Area(plan.support * sizes["rd"], "scratch"),
        "lambda": Area(plan.frozen + plan.set if gradient else 0, "adjoint"),
        "direction": Area(plan.set if direction else 0, "adjoint"),
        "gradient": Area(tied if steps > 0 or gradient else 0, "adjoint"),
        "updates": Area(steps * plan.set if gradient and flags["wants_rates"] and flags["momentum"] else 0, "updates"),
        "sums": Area(plan.rate_slots * plan.threads * 8 // plan.itemsize, "sums"),  # doubles
        "terms": Area(max(plan.support, plan.query) + 32, "sums"),
    }


# ---- the generated source ----------------------------------------------------------------------------------


def _loss(loss: Loss | None, batch: Batch | None) -> str:
    if loss is None or batch is None or batch.y is None:
        return "{}"
    return _braces(
        f"LossKind::{loss.kind}",
        loss.reduction == "sum",
        loss.weight_norm == "sum",
        loss.needs_class_indices(batch.y),
        float(loss.beta),
        float(loss.label_smoothing),
        loss.ignore_index,
    )


def _braces(*items: object) -> str:
    return "{" + ", ".join(map(_literal, items)) + "}"


def _literal(item: object) -> str:
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, (tuple, list)):
        return _braces(*item)
    return repr(item) if isinstance(item, float) else str(item)


def source(plan: Plan) -> str:
    """The C++ source of a specialisation: tables of constants, then the kernels."""
    values = [(v.rows, v.cols, v.ld, v.vector, v.x, v.d, v.rx, v.rd, v.from_params) for v in plan.values]
    layers = [
        (
            f"Kind::{layer.kind}",
            f"Function::{layer.function if layer.function else 'affine'}",
            *map(float, layer.constants),
            layer.inputs,
            layer.output,
            layer.weight,
            layer.bias,
            layer.pre,
            layer.adds,
            layer.last,
        )
        for layer in plan.layers
    ]
    params = [
        (
            *(p.rows, p.cols, p.ld, p.vector, p.at, p.per_task, p.adapted, p.tied),
            *(p.rate_element, p.rate_per_task, p.rate_per_step),
            *(p.column, p.rate_column, p.rate_slot, p.gradient),
        )
        for p in plan.params
    ]
    flags = plan.flags
    options = (
        *(plan.steps, plan.support, plan.query, flags["second_order"], plan.store, flags["gradient"]),
        *(flags["support_per_step"], flags["wants_params"], flags["wants_rates"], flags["wants_support_x"]),
        *(flags["wants_query_x"], flags["momentum"], flags["weight_decay"], flags["step_weights"], *plan.losses),
    )
    area = {name: (f"Space::{a.space}", a.at) for name, a in plan.areas.items()}
    layout = (
        *(plan.threads, area["theta"], plan.keep_all, plan.frozen, plan.set, plan.restores),
        plan.areas["checkpoints"].at if plan.areas["checkpoints"].size else -1,
        *(area["input"], area["query_input"], area["values"], area["deltas"], plan.value_stride, plan.delta_stride),
        *(area[name] for name in _SCRATCH),
        *(area[name] for name in ("lambda", "direction", "gradient", "updates", "sums", "terms")),
        *(plan.columns, plan.workspace),
    )
    tables: dict[str, list[tuple[object, ...]]]
    tables = {"Value VALUES": [*values], "Layer LAYERS": [*layers], "Param PARAMS": [*params]}
    lines = [
        f"#define FM_SCALAR {'float' if plan.itemsize == 4 else 'double'}",
        '#include "spec.h"',
        "namespace fm::cuda {",
        *(f"constexpr {name}[] = {{{', '.join(_braces(*row) for row in rows)}}};" for name, rows in tables.items()),
        f"constexpr int LAYER_COUNT = {len(layers)}, PARAM_COUNT = {len(params)}, OUTPUT = {plan.output};",
        f"constexpr int RATE_SLOTS = {plan.rate_slots};",
        f"constexpr Options OPTIONS = {_braces(*options)};",
        f"constexpr Layout LAYOUT = {_braces(*layout)};",
        "}  // namespace fm::cuda",
        '#include "kernel.h"',
        "",
    ]
    return "\n".join(lines)
