"""Update rules of the inner loop, a file each: docs/update-rules.md."""

from fastmeta.update_rules.adagrad import Adagrad
from fastmeta.update_rules.adam import Adam, AdamW
from fastmeta.update_rules.custom import CustomRule
from fastmeta.update_rules.lion import Lion
from fastmeta.update_rules.rmsprop import RMSProp
from fastmeta.update_rules.rule import UpdateRule
from fastmeta.update_rules.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "CustomRule", "Lion", "RMSProp", "UpdateRule"]
