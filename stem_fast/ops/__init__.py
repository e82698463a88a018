"""The custom ops, one page an op: schema, shape function, gradient and public call.

``lookup``, ``row_plan`` and ``check_ids`` read the embedding table, ``mixture`` and ``linear`` are
the networks, ``loss`` the tasks, ``adam``, ``sgd`` and ``adagrad`` the table's steps, ``buffers``
its memory; ``registry`` registers an op, ``backends`` chooses who runs it. Imports ``reference``.
"""

# The functions lookup, mixture and row_plan take the names of their modules.
from stem_fast.ops import adagrad, adam, linear, sgd
from stem_fast.ops.backends import BackendError, backends, capturable
from stem_fast.ops.buffers import new_table
from stem_fast.ops.check_ids import check_ids
from stem_fast.ops.lookup import lookup, sparse_gradient
from stem_fast.ops.loss import task_losses
from stem_fast.ops.mixture import MAX_EXPERTS, MAX_GATES, mixture, signed
from stem_fast.ops.registry import SCHEMAS, step_by_step, transformed
from stem_fast.ops.row_plan import RowPlan, merge_rows, row_plan

__all__ = [
    "MAX_EXPERTS",
    "MAX_GATES",
    "SCHEMAS",
    "BackendError",
    "RowPlan",
    "adagrad",
    "adam",
    "backends",
    "capturable",
    "check_ids",
    "linear",
    "lookup",
    "merge_rows",
    "mixture",
    "new_table",
    "row_plan",
    "sgd",
    "signed",
    "sparse_gradient",
    "step_by_step",
    "task_losses",
    "transformed",
]
