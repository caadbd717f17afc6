"""A place for everything that a specialisation of the CUDA kernels keeps: parameters, values,
scratch.

Sizes and offsets count elements. A cluster of blocks is a block of several ranks to the kernels:
whatever consists of parts, parameters or values, has each of them in the memory of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastmeta.backends.cuda.tables import SCRATCH, Area, Layer, Plan
from fastmeta.layers.functions import FUNCTIONS
from fastmeta.layers.registry import KINDS

#: Layers from so many inputs to so many outputs are multiplied on tensor cores.
WIDE = 64
#: Numbers that a norm keeps of each group: csrc/cuda/families/norm.h.
STATISTICS = 4


def odd(length: int, vector: int) -> int:
    """An odd number of vectors from row to row: neighbouring rows begin in different banks."""
    return length + vector if length // vector % 2 == 0 else length


def pad(n: int, to: int) -> int:
    """The least multiple of `to` that is not below n."""
    return -(-n // to) * to


def lay_out_params(plan: Plan) -> None:
    """A rank and a place for every parameter, columns of the sums.

    Frozen parameters come first, so that sets of later steps hold the adapted ones alone.
    """
    vector = 16 // plan.itemsize
    start = 0
    for adapted in (False, True):
        ends = [start] * plan.ranks
        # the largest first, each to where there is most room
        for param in sorted((p for p in plan.params if p.adapted == adapted), key=lambda p: -p.rows * p.ld):
            param.rank = ends.index(min(ends))
            param.at = ends[param.rank]
            ends[param.rank] += pad(param.rows * param.ld, vector)
        start = max(ends)
        if not adapted:
            plan.frozen = start
    plan.set = start - plan.frozen
    columns = slots = 0
    gradient = [0] * plan.ranks
    for param in plan.params:
        if plan.flags["wants_params"] and not param.per_task and not param.buffer:
            param.column = columns
            columns += param.numel
        if param.tied:
            param.gradient = gradient[param.rank]
            gradient[param.rank] += pad(param.rows * param.ld, vector)
    for param in plan.params:
        if plan.flags["wants_rates"] and param.adapted:
            if not param.rate_per_task:
                param.rate_column = columns
                columns += (plan.steps if param.rate_per_step else 1) * (
                    param.numel if param.rate_element else 1
                )
            if not param.rate_element:
                param.rate_slot = slots
                slots += 1
    plan.rule.column = columns
    columns += plan.steps * plan.rule.wanted.bit_count()
    plan.rate_slots, plan.columns, plan.tied = slots, columns + 1, max(gradient)


def place(plan: Plan, shared_bytes: int) -> None:
    """Give every area its place: in shared memory as far as it goes, the smallest groups first."""
    _choose_threads(plan)
    room = shared_bytes // plan.itemsize
    if not _place(plan, room, user_input=False):
        _place(plan, room, user_input=True)


def _place(plan: Plan, room: int, user_input: bool) -> bool:
    """`place`, with the input in shared memory or where the user has it; False: there is no room
    for it."""
    vector = 16 // plan.itemsize
    plan.areas = _areas(plan, _lay_out_values(plan, user_input))
    groups: dict[str, list[Area]] = {}
    for area in plan.areas.values():
        area.size = pad(area.size, vector)
        groups.setdefault(area.group, []).append(area)
    sizes = {group: sum(area.size for area in areas) for group, areas in groups.items()}
    pairs = [[plan.areas[name] for name in names] for names in (SCRATCH[:2], SCRATCH[2:])]
    sizes["scratch"] = max(sum(area.size for area in pair) for pair in pairs)
    ends = {space: [0] * plan.ranks for space in ("shared", "global", "user")}
    for group in sorted(groups, key=lambda group: (group != "sums", sizes[group])):
        # all else is spread over all ranks, and takes the same place in each
        ranks = (plan.values[0].rank,) if group == "input" else range(plan.ranks)
        fits = max(ends["shared"][rank] for rank in ranks) + sizes[group] <= room
        if group == "input" and not user_input and not fits:
            return False
        space = "shared" if fits and group != "checkpoints" else "global"
        space = "user" if group == "input" and user_input else space
        start = max(ends[space][rank] for rank in ranks)
        for run in pairs if group == "scratch" else [groups[group]]:
            at = start
            for area in run:
                area.space, area.at = space, at
                at += area.size
        for rank in ranks:
            ends[space][rank] = start + sizes[group]
    plan.shared_bytes, plan.slab = max(ends["shared"]) * plan.itemsize, max(ends["global"])
    plan.workspace = plan.slab * plan.ranks
    return True


def _choose_threads(plan: Plan) -> None:
    """As many as there are tiles of a few numbers in the largest product."""
    largest = 0
    for layer in plan.layers:
        if layer.kind == "linear":
            out = plan.values[layer.output]
            weight = plan.params[layer.weight]
            largest = max(largest, weight.numel, max(plan.support, plan.query) * out.rows * out.cols)
    plan.threads = 128 if largest <= 2048 else 256


@dataclass(frozen=True, slots=True)
class _Block:
    """What one of the four blocks of values takes of a rank."""

    each: int  # for an example
    fixed: int = 0  # whatever their number

    def size(self, examples: int) -> int:
        return examples * self.each + self.fixed


def _lay_out_values(plan: Plan, user_input: bool) -> dict[str, _Block]:
    """Row lengths and offsets of all values, and of what norms keep; the sizes of the four
    blocks."""
    flags = plan.flags
    vector = 16 // plan.itemsize
    tensor = any(layer.multiply != "fma" for layer in plan.layers)
    norms = [layer for layer in plan.layers if _is_norm(layer) and _by_channel(layer)]
    normed = {v for layer in norms for v in (*layer.inputs, layer.output, layer.pre)}
    for number, v in enumerate(plan.values):
        v.vector = vector if v.cols >= vector else 1
        v.ld = pad(v.cols, v.vector)
        # neighbouring lanes read neighbouring rows
        if v.vector > 1 and (number in normed or (tensor and v.cols >= WIDE)):
            v.ld = odd(v.ld, vector)
    if user_input:
        first = plan.values[0]
        first.ld, first.vector = first.cols, vector if first.cols % vector == 0 else 1
    shared = {v for layer in plan.layers for v, adds in zip(layer.inputs, layer.adds, strict=True) if adds}
    taken = {layer.pre: layer for layer in plan.layers if layer.pre >= 0}
    behind = {layer.output: layer for layer in plan.layers if layer.pre >= 0}
    backward, tangents = plan.steps > 0 or flags["gradient"], flags["second_order"]
    used = {0} | {v for layer in plan.layers for v in (*layer.inputs, layer.output, layer.pre) if v >= 0}
    sizes = {block: [0] * plan.ranks for block in ("x", "d", "rx", "rd")}
    # vectors first: rows of a few numbers need no alignment; of those the largest, each to where
    # there is most room
    for number in sorted(
        used, key=lambda i: (plan.values[i].vector == 1, -plan.values[i].rows * plan.values[i].ld)
    ):
        v = plan.values[number]
        taken_up = [sum(size[rank] for size in sizes.values()) for rank in range(plan.ranks)]
        v.rank = taken_up.index(min(taken_up))
        v.x = v.d = v.rx = v.rd = -1
        keeps = dict.fromkeys(sizes, True)
        keeps["x"] = number > 0
        keeps["d"] = backward and (v.from_params or flags["wants_query_x"])
        keeps["rx"] = tangents and v.from_params
        keeps["rd"] = tangents and (v.from_params or flags["wants_support_x"])
        if number in taken:
            layer = taken[number]
            function = FUNCTIONS[layer.function]
            told = function.told_by_output(layer.function_constants)
            keeps["x"] = function.reads_argument or not told
            keeps["rx"] = keeps["rx"] and not function.piecewise_linear
        elif number in behind:
            smooth = not FUNCTIONS[behind[number].function].piecewise_linear
            keeps["d"] = keeps["d"] and (number in shared or (tangents and smooth))
            keeps["rd"] = keeps["rd"] and number in shared
        for block, kept in keeps.items():
            if kept:
                setattr(v, block, sizes[block][v.rank])
                sizes[block][v.rank] += v.rows * v.ld
    return _lay_out_statistics(plan, sizes)


def _lay_out_statistics(plan: Plan, sizes: dict[str, list[int]]) -> dict[str, _Block]:
    """What norms keep of their groups, behind the values and, if there are any, behind their
    tangents."""
    kept = {"x": STATISTICS, "d": 0, "rx": STATISTICS if plan.flags["second_order"] else 0, "rd": 0}
    norms = [layer for layer in plan.layers if _is_norm(layer)]
    for layer in norms:
        rank = plan.values[layer.output].rank
        layer.statistics, layer.tangent_statistics = (sizes["x"][rank], 0), (sizes["rx"][rank], 0)
        for block, size in kept.items():
            sizes[block][rank] += size * _groups_each(plan, layer)
    each = {block: max(size) for block, size in sizes.items()}
    fixed = 0
    for layer in norms:
        if _by_channel(layer):  # as many groups in any number of examples
            layer.statistics, layer.tangent_statistics = (each["x"], fixed), (each["rx"], fixed)
            fixed += STATISTICS * plan.values[layer.output].cols
    return {block: _Block(size, fixed if kept[block] else 0) for block, size in each.items()}


def _is_norm(layer: Layer) -> bool:
    return KINDS[layer.kind].family == "norm"


def _by_channel(layer: Layer) -> bool:
    """Whether a norm's groups are the channels, of the whole batch."""
    return KINDS[layer.kind].groups is None


def _groups_each(plan: Plan, layer: Layer) -> int:
    """Groups that a norm makes of each example."""
    groups, out = KINDS[layer.kind].groups, plan.values[layer.output]
    return 0 if groups is None else groups(layer.constants, out.rows * out.cols)


def _areas(plan: Plan, blocks: dict[str, _Block]) -> dict[str, Area]:
    """Everything that needs memory."""
    flags, steps, params = plan.flags, plan.steps, plan.params
    vector = 16 // plan.itemsize
    gradient = flags["gradient"]
    rule = plan.rule
    plain = not flags["momentum"] and not flags["weight_decay"] and not rule.general
    from_gradient = flags["wants_rates"] and not flags["momentum"] and not rule.general
    values_needed = gradient and (flags["second_order"] or from_gradient)
    theta_needed = gradient and steps > 0 and (values_needed or flags["step_weights"] or rule.general)
    if not theta_needed:
        plan.keep_all = False
    kept = min(steps, 1) if not (values_needed and plan.store) else steps
    first = plan.values[0].rows * plan.values[0].ld
    values, deltas = (pad(blocks[block].size(plan.support), vector) for block in ("x", "d"))
    plan.value_stride, plan.delta_stride = (values, deltas) if kept > 1 else (0, 0)
    writes = not plain or any(p.tied or (p.adapted and p.rate_element) for p in params)
    direction = flags["momentum"] or (gradient and writes and (flags["second_order"] or not plain))
    plan.restores = theta_needed and not plan.keep_all
    checkpoints = max(steps - 1, 0) * plan.set if plan.restores else 0
    most = max(plan.support, plan.query)
    positions = 2 * most * plan.values[plan.output].rows + 32 if flags["positions"] else 0  # csrc/cuda/loss.h
    return {
        "theta": Area(plan.frozen + plan.set * (steps + 1 if plan.keep_all else 1), "theta"),
        "checkpoints": Area(checkpoints, "checkpoints"),
        "input": Area(plan.support * first, "input"),
        "query_input": Area(plan.query * first, "input"),
        "values": Area(values * kept, "values"),
        "deltas": Area(deltas * kept, "values"),
        "query_values": Area(blocks["x"].size(plan.query), "scratch"),
        "query_deltas": Area(blocks["d"].size(plan.query) if gradient else 0, "scratch"),
        "tangents": Area(blocks["rx"].size(plan.support), "scratch"),
        "tangent_deltas": Area(blocks["rd"].size(plan.support), "scratch"),
        "lambda": Area(plan.frozen + plan.set if gradient else 0, "adjoint"),
        "direction": Area(plan.set if direction else 0, "adjoint"),
        "gradient": Area(plan.tied if steps > 0 or gradient else 0, "adjoint"),
        "updates": Area(
            steps * plan.set if gradient and flags["wants_rates"] and flags["momentum"] else 0, "updates"
        ),
        **_rule_areas(plan),
        "sums": Area((plan.rate_slots + rule.slots) * plan.threads * 8 // plan.itemsize, "sums"),  # doubles
        "terms": Area(most + 32 + positions, "sums"),
    }


def _rule_areas(plan: Plan) -> dict[str, Area]:
    """What a general update rule keeps: with a sweep back the gradient and state of every step, but
    for the state after the last; else those of one step."""
    rule, back = plan.rule, plan.flags["gradient"]
    kept = plan.steps if back else min(plan.steps, 1)
    sets = {
        "gradients": kept if rule.general else 0,
        "states": rule.states * (max(kept - 1, 0) if back else kept),
        "mbar": rule.states if back else 0,
    }
    areas = {name: Area(count * plan.set, "gradients and states") for name, count in sets.items()}
    return {**areas, "norms": Area(kept if rule.by_norm and back else 0, "gradients and states")}
