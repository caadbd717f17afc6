"""A place for everything that a specialisation of the CUDA kernels keeps: parameters, values, scratch.

Sizes and offsets count elements.
"""

from __future__ import annotations

from fastmeta.backends._cuda_tables import SCRATCH, Area, Plan

#: Layers from so many inputs to so many outputs are multiplied on tensor cores.
WIDE = 64
#: Activations whose derivatives the value behind them tells; of the others the value before is kept.
_TOLD_BY_OUTPUT = frozenset({"relu", "leaky_relu", "tanh", "sigmoid", "affine"})
#: Activations whose second derivative is zero.
_LINEAR_PIECES = frozenset({"relu", "leaky_relu", "affine"})


def odd(length: int, vector: int) -> int:
    """An odd number of vectors from row to row: neighbouring rows begin in different banks."""
    return length + vector if length // vector % 2 == 0 else length


def pad(n: int, to: int) -> int:
    return -(-n // to) * to


def lay_out_params(plan: Plan) -> None:
    """Frozen parameters first, so that sets of later steps hold the adapted ones alone; columns of the sums."""
    vector = 16 // plan.itemsize
    end = 0
    for adapted in (False, True):
        for param in plan.params:
            if param.adapted == adapted:
                param.at = end
                end += pad(param.rows * param.ld, vector)
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
            gradient += pad(param.rows * param.ld, vector)
    for param in plan.params:
        if plan.flags["wants_rates"] and param.adapted:
            if not param.rate_per_task:
                param.rate_column = columns
                columns += (plan.steps if param.rate_per_step else 1) * (param.numel if param.rate_element else 1)
            if not param.rate_element:
                param.rate_slot = slots
                slots += 1
    plan.rate_slots, plan.columns = slots, columns + 1


def place(plan: Plan, shared_bytes: int) -> None:
    """Give every area its place: in shared memory as far as it goes, the smallest groups first."""
    _choose_threads(plan)
    sizes = _lay_out_values(plan, user_input=False)
    plan.areas = _areas(plan, sizes)
    room = shared_bytes // plan.itemsize
    vector = 16 // plan.itemsize
    groups: dict[str, int] = {}
    for area in plan.areas.values():
        area.size = pad(area.size, vector)
        if area.group != "checkpoints":
            groups[area.group] = groups.get(area.group, 0) + area.size
    scratch = {name: plan.areas[name].size for name in SCRATCH}
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
            plan.areas[name].size = pad(area.size, vector)
    ends = {"shared": 0, "global": 0, "user": 0}
    for area in plan.areas.values():
        area.space = spaces[area.group]
        if area.group != "scratch":
            area.at = ends[area.space]
            ends[area.space] += area.size
    space = spaces["scratch"]
    for pair in (SCRATCH[:2], SCRATCH[2:]):
        end = ends[space]
        for name in pair:
            plan.areas[name].at = end
            end += plan.areas[name].size
    ends[space] += groups["scratch"]
    plan.shared_bytes, plan.workspace = ends["shared"] * plan.itemsize, ends["global"]


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
    tensor = any(layer.multiply != "fma" for layer in plan.layers)
    for v in plan.values:
        v.vector = vector if v.cols >= vector else 1
        v.ld = pad(v.cols, v.vector)
        if tensor and v.cols >= WIDE:
            v.ld = odd(v.ld, vector)
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
    values, deltas = (pad(plan.support * sizes[block], vector) for block in ("x", "d"))
    plan.value_stride, plan.delta_stride = (values, deltas) if kept > 1 else (0, 0)
    writes = not plain or any(p.tied or (p.adapted and p.rate_element) for p in params)
    direction = flags["momentum"] or (gradient and writes and (flags["second_order"] or not plain))
    tied = sum(pad(p.rows * p.ld, vector) for p in params if p.tied)
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
