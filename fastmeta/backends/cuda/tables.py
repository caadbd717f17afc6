"""The tables of constants that a specialisation of the CUDA kernels is, and their C++ source.

Sizes and offsets count elements; csrc/cuda/spec.h says what the fields mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: The query's memory and the tangents', which are never used at once.
SCRATCH = ("query_values", "query_deltas", "tangents", "tangent_deltas")

#: What a general update rule keeps, in the order of csrc/cuda/spec.h.
RULE = ("gradients", "states", "mbar", "norms")


@dataclass(slots=True)
class Value:
    """One value of the program; see csrc/cuda/spec.h."""

    rows: int
    cols: int
    channels: bool = False  # an image, channels-last
    ld: int = 0
    vector: int = 1
    x: int = -1
    d: int = -1
    rx: int = -1
    rd: int = -1
    from_params: bool = False
    rank: int = 0


@dataclass(slots=True)
class Layer:
    """One layer; one with parameters may have taken the activation behind it."""

    kind: str
    inputs: tuple[int, int]
    output: int
    constants: tuple[float, ...] = ()
    #: elementwise: its own; others: of the activation in the epilogue, "" if there is none
    function: str = ""
    function_constants: tuple[float, ...] = ()
    weight: int = -1
    bias: int = -1
    mean: int = -1
    var: int = -1
    statistics: tuple[int, int] = (0, 0)
    tangent_statistics: tuple[int, int] = (0, 0)
    multiply: str = "fma"
    pre: int = -1
    adds: tuple[bool, bool] = (False, False)
    last: tuple[bool, bool] = (False, False)


@dataclass(slots=True)
class Param:
    """One parameter, or buffer, that some layer reads."""

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
    buffer: bool = False
    at: int = 0
    column: int = 0
    rate_column: int = 0
    rate_slot: int = 0
    gradient: int = 0
    rank: int = 0

    @property
    def numel(self) -> int:
        """Elements in torch's layout."""
        return self.rows * self.cols


@dataclass(slots=True)
class Rule:
    """The update rule, where it is not SGD with momentum and weight decay as plain numbers. Bit i
    of a set of numbers stands for the i-th of `NUMBERS`."""

    general: bool = False
    kind: str = "sgd"
    nesterov: bool = False
    centered: bool = False
    on: int = 0
    learned: int = 0
    wanted: int = 0
    states: int = 0
    column: int = 0
    by_norm: bool = False  # clips by it

    @property
    def slots(self) -> int:
        """Sums that each thread has one of: of the gradients of numbers, and of the norm."""
        return self.wanted.bit_count() + self.by_norm


@dataclass(slots=True)
class Area:
    """A piece of memory: `at` is an offset in a rank's shared memory or share of the workspace."""

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
    rule: Rule = field(default_factory=Rule)
    store: bool = True
    keep_all: bool = True
    ranks: int = 1  # blocks of a cluster
    threads: int = 128  # of a block
    areas: dict[str, Area] = field(default_factory=dict)
    value_stride: int = 0
    delta_stride: int = 0
    frozen: int = 0
    set: int = 0
    restores: bool = False
    rate_slots: int = 0
    tied: int = 0
    columns: int = 1
    shared_bytes: int = 0  # of a block
    slab: int = 0  # of global memory a rank
    workspace: int = 0  # of all ranks

    @property
    def memory(self) -> str:
        """ "store" or "recompute"."""
        return "store" if self.store else "recompute"


def braces(*items: object) -> str:
    """A C++ initialiser of these items; lists in it are initialisers too."""
    return "{" + ", ".join(map(_literal, items)) + "}"


def _literal(item: object) -> str:
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, (tuple, list)):
        return braces(*item)
    return repr(item) if isinstance(item, float) else str(item)


def source(plan: Plan) -> str:
    """The C++ source of a specialisation: tables of constants, then the kernels."""
    values = [
        (v.rows, v.cols, v.ld, v.vector, v.x, v.d, v.rx, v.rd, v.from_params, v.rank, v.channels)
        for v in plan.values
    ]
    layers = [
        (
            f"Kind::{layer.kind}",
            [float(c) for c in layer.constants],
            f"Function::{layer.function or 'none'}",
            *(float(c) for c in (*layer.function_constants, 0, 0)[:2]),
            layer.inputs,
            layer.output,
            *(layer.weight, layer.bias, layer.mean, layer.var),
            *(layer.statistics, layer.tangent_statistics),
            f"Multiply::{layer.multiply}",
            layer.pre,
            layer.adds,
            layer.last,
        )
        for layer in plan.layers
    ]
    params = [
        (
            *(p.rows, p.cols, p.ld, p.vector, p.at, p.per_task, p.adapted, p.tied, p.buffer),
            *(p.rate_element, p.rate_per_task, p.rate_per_step),
            *(p.column, p.rate_column, p.rate_slot, p.gradient, p.rank),
        )
        for p in plan.params
    ]
    flags, rule = plan.flags, plan.rule
    options = (
        *(plan.steps, plan.support, plan.query, flags["second_order"], plan.store, flags["gradient"]),
        *(flags["support_per_step"], flags["wants_params"], flags["wants_rates"], flags["wants_support_x"]),
        *(
            flags["wants_query_x"],
            flags["momentum"],
            flags["weight_decay"],
            flags["step_weights"],
            *plan.losses,
        ),
        (
            *(rule.general, f"RuleKind::{rule.kind}", rule.nesterov, rule.centered),
            *(rule.on, rule.learned, rule.wanted, rule.states, rule.column),
        ),
    )
    area = {name: (f"Space::{a.space}", a.at) for name, a in plan.areas.items()}
    layout = (
        *(plan.threads, area["theta"], plan.keep_all, plan.frozen, plan.set, plan.restores),
        plan.areas["checkpoints"].at if plan.areas["checkpoints"].size else -1,
        *(
            area["input"],
            area["query_input"],
            area["values"],
            area["deltas"],
            plan.value_stride,
            plan.delta_stride,
        ),
        *(area[name] for name in SCRATCH),
        *(area[name] for name in ("lambda", "direction", "gradient", "updates", *RULE, "sums", "terms")),
        *(plan.columns, plan.slab),
    )
    kinds = sorted({layer.kind for layer in plan.layers})
    tables: dict[str, list[tuple[object, ...]]]
    tables = {"Value VALUES": [*values], "Layer LAYERS": [*layers], "Param PARAMS": [*params]}
    lines = [
        f"#define FM_SCALAR {'float' if plan.itemsize == 4 else 'double'}",
        f"#define FM_RANKS {plan.ranks}",
        f"#define FM_LAYER_KINDS(X) {' '.join(f'X({kind})' for kind in kinds)}",
        '#include "spec.h"',
        "namespace fm::cuda {",
        *(
            f"constexpr {name}[] = {{{', '.join(braces(*row) for row in rows)}}};"
            for name, rows in tables.items()
        ),
        f"constexpr int LAYER_COUNT = {len(layers)}, PARAM_COUNT = {len(params)}, OUTPUT = {plan.output};",
        f"constexpr bool OUTPUT_CHANNELS = {_literal(plan.values[plan.output].channels)};",
        f"constexpr int RATE_SLOTS = {plan.rate_slots};",
        f"constexpr Options OPTIONS = {braces(*options)};",
        f"constexpr Layout LAYOUT = {braces(*layout)};",
        "}  // namespace fm::cuda",
        *(f'#include "layers/{kind}.h"' for kind in kinds),
        '#include "kernel.h"',
        "",
    ]
    return "\n".join(lines)
