"""Norms of rows: stretches of S elements of each example are normalised as one, with a weight and a
bias for every element. CENTRED: their mean is taken away first.

x and y are [T, groups, S], the weight and bias of a task [S]. One program a stretch, but for the
gradients of the parameters: one a task and BLOCK elements. Formulas: docs/norms.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton.language as tl

from fastmeta.kernels.elementwise import End, finish, forward_end, tangent_end
from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.launch import blocks, power
from fastmeta.kernels.passes import Buffer, Node, Operand, Pass, Sinks, Target, target
from fastmeta.kernels.tile import deliver


@jit
def _load(at, e, S, missing: tl.constexpr):
    """Elements e of a stretch."""
    return tl.load(at + e, mask=e < S, other=missing)


@jit
@varies("groups")
def _forward(
    x,  # [T, groups, S]
    w: Operand,  # of a task [S]; or None
    b: Operand,
    mean,  # [T, groups], written
    rstd,
    end: End,  # each [T, groups, S]
    groups,
    S,
    EPS: tl.constexpr,
    CENTRED: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """end = finish(w x^ + b)."""
    g = tl.program_id(0).to(tl.int64)
    task = g // groups
    total = tl.zeros([BLOCK], x.dtype.element_ty)
    if CENTRED:
        for s in range(0, S, BLOCK):
            total += _load(x + g * S, s + tl.arange(0, BLOCK), S, 0.0)
    mu = tl.sum(total, axis=0) / S
    total = tl.zeros([BLOCK], x.dtype.element_ty)
    for s in range(0, S, BLOCK):
        e = s + tl.arange(0, BLOCK)
        d = tl.where(e < S, _load(x + g * S, e, S, 0.0) - mu, 0.0)
        total += d * d
    r = 1.0 / tl.sqrt(tl.sum(total, axis=0) / S + EPS)
    tl.store(mean + g, mu)
    tl.store(rstd + g, r)
    for s in range(0, S, BLOCK):
        e = s + tl.arange(0, BLOCK)
        y = (_load(x + g * S, e, S, 0.0) - mu) * r
        if w is not None:
            y *= _load(w.at + task * w.stride, e, S, 0.0)
        if b is not None:
            y += _load(b.at + task * b.stride, e, S, 0.0)
        finish(y, g * S + e, e < S, end, FINISH)


@jit
@varies("groups")
def _tangent(
    x,  # [T, groups, S]
    rx,  # likewise; or None
    w: Operand,  # of a task [S]; or None
    vw: Operand,
    vb: Operand,
    mean,  # [T, groups]
    rstd,
    mean_rx,  # [T, groups], written if x moves
    mean_rx_x,
    end: End,  # each [T, groups, S]
    groups,
    S,
    CENTRED: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """end = finish(w rx^ + rw x^ + rb)."""
    g = tl.program_id(0).to(tl.int64)
    task = g // groups
    mu = tl.load(mean + g)
    r = tl.load(rstd + g)
    t = mu * 0.0
    t_x = mu * 0.0
    if rx is not None:
        total = tl.zeros([BLOCK], x.dtype.element_ty)
        total_x = tl.zeros([BLOCK], x.dtype.element_ty)
        for s in range(0, S, BLOCK):
            e = s + tl.arange(0, BLOCK)
            d = _load(rx + g * S, e, S, 0.0)
            total += d
            total_x += d * (_load(x + g * S, e, S, 0.0) - mu) * r
        if CENTRED:
            t = tl.sum(total, axis=0) / S
        t_x = tl.sum(total_x, axis=0) / S
        tl.store(mean_rx + g, t)
        tl.store(mean_rx_x + g, t_x)
    for s in range(0, S, BLOCK):
        e = s + tl.arange(0, BLOCK)
        hat = (_load(x + g * S, e, S, 0.0) - mu) * r
        y = tl.zeros([BLOCK], x.dtype.element_ty)
        if rx is not None:
            y = r * (_load(rx + g * S, e, S, 0.0) - t - hat * t_x)
            if w is not None:
                y *= _load(w.at + task * w.stride, e, S, 0.0)
        if vw is not None:
            y += hat * _load(vw.at + task * vw.stride, e, S, 0.0)
        if vb is not None:
            y += _load(vb.at + task * vb.stride, e, S, 0.0)
        finish(y, g * S + e, e < S, end, FINISH)


@jit
def _gradient(x, dy, w: Operand, g, task, e, S, mu, r):
    """(x^, w dy) of a block."""
    hat = (_load(x + g * S, e, S, 0.0) - mu) * r
    d = _load(dy + g * S, e, S, 0.0)
    if w is not None:
        d *= _load(w.at + task * w.stride, e, S, 0.0)
    return hat, d


@jit
def _tangent_gradient(rx, rdy, dy, w: Operand, vw: Operand, hat, g, task, e, S, r, t, t_x):
    """(rx^, w rdy + rw dy) of a block."""
    rhat = hat * 0.0
    if rx is not None:
        rhat = r * (_load(rx + g * S, e, S, 0.0) - t - hat * t_x)
    rg = _load(rdy + g * S, e, S, 0.0)
    if w is not None:
        rg *= _load(w.at + task * w.stride, e, S, 0.0)
    if vw is not None:
        rg += _load(vw.at + task * vw.stride, e, S, 0.0) * _load(dy + g * S, e, S, 0.0)
    return rhat, rg


@jit
@varies("groups")
def _input_gradient(
    x,  # [T, groups, S]
    dy,
    rx,  # likewise; or None
    rdy,  # likewise; or None: the gradient itself; else its tangent
    w: Operand,  # of a task [S]; or None
    vw: Operand,
    mean,  # [T, groups]
    rstd,
    mean_rx,
    mean_rx_x,
    out,  # [T, groups, S]
    groups,
    S,
    CENTRED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = [out +] dx, or its tangent."""
    g = tl.program_id(0).to(tl.int64)
    task = g // groups
    mu = tl.load(mean + g)
    r = tl.load(rstd + g)
    t = mu * 0.0
    t_x = mu * 0.0
    if rx is not None:
        t = tl.load(mean_rx + g)
        t_x = tl.load(mean_rx_x + g)
    sum_g = tl.zeros([BLOCK], x.dtype.element_ty)
    sum_gx = tl.zeros([BLOCK], x.dtype.element_ty)
    sum_u = tl.zeros([BLOCK], x.dtype.element_ty)
    sum_ux = tl.zeros([BLOCK], x.dtype.element_ty)
    for s in range(0, S, BLOCK):
        e = s + tl.arange(0, BLOCK)
        hat, d = _gradient(x, dy, w, g, task, e, S, mu, r)
        if CENTRED:
            sum_g += d
        sum_gx += d * hat
        if rdy is not None:
            rhat, rg = _tangent_gradient(rx, rdy, dy, w, vw, hat, g, task, e, S, r, t, t_x)
            if CENTRED:
                sum_u += rg
            sum_ux += rg * hat + d * rhat
    m_g = tl.sum(sum_g, axis=0) / S
    m_gx = tl.sum(sum_gx, axis=0) / S
    m_u = tl.sum(sum_u, axis=0) / S
    m_ux = tl.sum(sum_ux, axis=0) / S
    for s in range(0, S, BLOCK):
        e = s + tl.arange(0, BLOCK)
        hat, d = _gradient(x, dy, w, g, task, e, S, mu, r)
        dx = r * (d - m_g - hat * m_gx)
        if rdy is not None:
            rhat, rg = _tangent_gradient(rx, rdy, dy, w, vw, hat, g, task, e, S, r, t, t_x)
            dx = -r * t_x * dx + r * (rg - m_u - rhat * m_gx - hat * m_ux)
        if ADD:
            dx += _load(out + g * S, e, S, 0.0)
        tl.store(out + g * S + e, dx, mask=e < S)


@jit
@varies("groups")
def _parameter_gradient(
    x,  # [T, groups, S]
    dy,
    rx,  # likewise; or None
    rdy,
    mean,  # [T, groups]
    rstd,
    mean_rx,
    mean_rx_x,
    groups,
    S,
    weight: Target,  # [S]
    bias: Target,
    BLOCK: tl.constexpr,
):
    """dw and db, or with `rdy` their tangents."""
    tiles = tl.cdiv(S, BLOCK)
    task = (tl.program_id(0) // tiles).to(tl.int64)
    e = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros([BLOCK], x.dtype.element_ty)
    db = tl.zeros([BLOCK], x.dtype.element_ty)
    for i in range(groups):
        g = task * groups + i
        r = tl.load(rstd + g)
        hat = (_load(x + g * S, e, S, 0.0) - tl.load(mean + g)) * r
        d = _load(dy + g * S, e, S, 0.0)
        if rdy is None:
            dw += d * hat
            db += d
        else:
            rd = _load(rdy + g * S, e, S, 0.0)
            dw += rd * hat
            db += rd
            if rx is not None:
                moved = _load(rx + g * S, e, S, 0.0)
                dw += d * r * (moved - tl.load(mean_rx + g) - hat * tl.load(mean_rx_x + g))
    if weight.to is not None:
        deliver(dw, e, e < S, task, weight)
    if bias.to is not None:
        deliver(db, e, e < S, task, bias)


@dataclass(frozen=True, slots=True)
class RowNorm:
    """The four functions of a norm of rows; its constants are (elements of a stretch, epsilon)."""

    run: Pass
    node: Node
    centred: bool

    @property
    def _stretches(self) -> int:
        return self.run.tasks * self.run.elements(self.node.output) // int(self.node.constants[0])

    def _sizes(self) -> dict[str, Any]:
        size = int(self.node.constants[0])
        groups = self.run.elements(self.node.output) // size
        return {"groups": groups, "S": size, "BLOCK": power(size, 16, 1024)}

    def _state(self, *names: str) -> dict[str, Any]:
        """[T, groups] each, kept."""
        return {name: self.run.keep(self.node, name, self._stretches) for name in names}

    def forward(self) -> None:
        """y = w x^ + b."""
        run, node = self.run, self.node
        run.emit(
            _forward,
            self._stretches,
            x=run.x[node.inputs[0]],
            w=run.operand(run.theta, node, 0),
            b=run.operand(run.theta, node, 1),
            EPS=node.constants[1],
            CENTRED=self.centred,
            **self._state("mean", "rstd"),
            **forward_end(run, node)._asdict(),
            **self._sizes(),
        )

    def tangent(self) -> None:
        """ry = w rx^ + rw x^ + rb."""
        run, node = self.run, self.node
        in_ = node.inputs[0]
        run.emit(
            _tangent,
            self._stretches,
            x=run.x[in_],
            rx=run.rx[in_] if run.has_tangent(in_) else None,
            w=run.operand(run.theta, node, 0),
            vw=run.operand(run.v, node, 0),
            vb=run.operand(run.v, node, 1),
            CENTRED=self.centred,
            **self._state("mean", "rstd", "mean_rx", "mean_rx_x"),
            **tangent_end(run, node)._asdict(),
            **self._sizes(),
        )

    def backward(self, sinks: Sinks | None) -> None:
        """dx = r (g - <g> - x^ <g x^>); dw = sum dy x^, db = sum dy."""
        self._gradients(sinks, None, None, self.run.d[self.node.inputs[0]])

    def tangent_backward(self, sinks: Sinks) -> None:
        """The tangents of all three: docs/norms.md."""
        run, in_ = self.run, self.node.inputs[0]
        rx = run.rx[in_] if run.has_tangent(in_) else None
        self._gradients(sinks, rx, run.rd[self.node.output], run.rd[in_])

    def _gradients(self, sinks: Sinks | None, rx: Buffer, rdy: Buffer, out: Buffer) -> None:
        """The gradients of parameters and input, or with `rdy` their tangents."""
        run, node = self.run, self.node
        common: dict[str, Any] = {
            "x": run.x[node.inputs[0]],
            "dy": run.d[node.output],
            "rx": rx,
            "rdy": rdy,
            **self._state("mean", "rstd", "mean_rx", "mean_rx_x"),
            **self._sizes(),
        }
        params = (*node.params, None)[:2]
        weight, bias = (None if p is None or sinks is None else sinks[p] for p in params)
        if weight is not None or bias is not None:
            run.emit(
                _parameter_gradient,
                run.tasks * blocks(common["S"], common["BLOCK"]),
                weight=target(weight),
                bias=target(bias),
                **common,
            )
        if run.wants_delta(node.inputs[0]):
            run.emit(
                _input_gradient,
                self._stretches,
                w=run.operand(run.theta, node, 0),
                vw=None if rdy is None else run.operand(run.v, node, 0),
                out=out,
                CENTRED=self.centred,
                ADD=node.adds[0],
                **common,
            )
