"""The update rules with a name, a file each: one step of a block of elements, and its adjoint.

`fastmeta/update_rules/<rule>.py` says what each computes, `kernels/update_rule.py` launches them. A
rule is the same two functions as in `csrc/shared/update_rules`:

    step(theta, g, alpha, a, b, c, row, FORM) -> (theta', a', b', c')
    back(theta, g, alpha, a, b, c, lam, to_a, to_b, to_c, row, parts, mask, FORM)
        -> (lam, v, by_rate, to_a, to_b, to_c)

a, b and c are the parts of the state, as many as the rule has; g is clipped. `lam` is dJ/dtheta',
and of what comes back dJ/dtheta but for what passes through g; `to_a` is dJ/da', and of what comes
back dJ/da; v is dJ/dg; `by_rate` is dJ/dalpha of each element. `row` holds the numbers of the step,
`parts` takes dJ/dnumber: see `numbers.py`.
"""
