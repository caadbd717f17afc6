"""Numbers that others, or a plain reproduction, have reported for the same experiments."""

from __future__ import annotations

from typing import NamedTuple

PAPER = "Finn, Abbeel, Levine 2017"


class Setting(NamedTuple):
    """What tells one sinusoid experiment from another."""

    shots: int
    inner_lr: float
    inner_steps: int
    first_order: bool
    inner_rule: str = "sgd"


#: Mean query MSE over 2,000 test tasks after 0, 1, 5 and 10 inner steps, with the standard
#: deviation over seeds where there were several. The paper (section 5.1) plots curves only; these
#: come from reproducing it in JAX: 1-40-40-1 ReLU, 25 tasks, Adam 1e-3, 70,000 iterations, code of
#: cbfinn/maml.
SINUSOID: dict[Setting, tuple[str, str, str, str]] = {
    Setting(10, 0.01, 1, False): ("2.98", "0.382 ± 0.006", "0.181 ± 0.041", "0.133 ± 0.021"),
    Setting(10, 0.001, 1, False): ("3.02", "0.412", "0.147", "0.122"),
    Setting(5, 0.001, 1, False): ("2.93", "0.707 ± 0.027", "0.411 ± 0.018", "0.377 ± 0.017"),
    Setting(20, 0.01, 1, False): ("2.97", "0.211", "0.052", "0.035"),
    Setting(10, 0.01, 5, False): ("2.99", "0.542 ± 0.011", "0.066 ± 0.002", "0.041 ± 0.001"),
    Setting(10, 0.01, 1, True): ("4.39", "0.545", "0.195", "0.152"),
}
SINUSOID_STEPS = (0, 1, 5, 10)
SINUSOID_SOURCE = f"JAX reproduction of {PAPER}"

#: 5-way 1-shot accuracies on Omniglot to show next to an MLP's: (what, accuracy, source).
OMNIGLOT_5_WAY_1_SHOT = (
    ("MLP with batch norm, full Omniglot, 60,000 iterations", "89.7 %", PAPER),
    ("Conv4 with batch norm, these small sets, 1,000 iterations", "90.4 ± 2.0 %", "per-task autograd loop"),
)
