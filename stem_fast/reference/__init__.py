"""The mathematics of STEM-Net in plain PyTorch, one loop for one sum; imports no other room.

Every faster version of an op is tested against the function of the same name here, so these stay
simple enough to be checked by eye against the paper (Su et al., AAAI 2024, section 4) and the
official code (``models/STEM.py``). Their autograd *defines* the gradients.
Symbols: B batch, F categorical fields, G embedding spaces, D embedding dimension, E experts, K
gates, I and O the widths of a layer's input and output, H the width of an expert's output.
"""

# The functions lookup and mixture take the names of their modules.
from stem_fast.reference.adagrad import adagrad_rows
from stem_fast.reference.adam import adam_rows, adam_schedule, new_rows
from stem_fast.reference.buffers import empty_kept, huge_pages
from stem_fast.reference.check_ids import (
    check_bounds,
    check_ids,
    checked,
    outside,
    outside_error,
    outside_named,
)
from stem_fast.reference.linear import (
    bias_relu,
    grouped_linear,
    grouped_linear_backward,
    relu_backward,
)
from stem_fast.reference.lookup import lookup, lookup_backward, space_sums
from stem_fast.reference.loss import task_losses, task_losses_backward
from stem_fast.reference.mixture import (
    expert_mixture_inference,
    gate_weights,
    mask_matrix,
    mixture,
    mixture_backward,
    mixture_expert_backward,
    softmax_backward,
)
from stem_fast.reference.row_plan import row_gradients, row_plan
from stem_fast.reference.sgd import sgd_rows

__all__ = [
    "adagrad_rows",
    "adam_rows",
    "adam_schedule",
    "bias_relu",
    "check_bounds",
    "check_ids",
    "checked",
    "empty_kept",
    "expert_mixture_inference",
    "gate_weights",
    "grouped_linear",
    "grouped_linear_backward",
    "huge_pages",
    "lookup",
    "lookup_backward",
    "mask_matrix",
    "mixture",
    "mixture_backward",
    "mixture_expert_backward",
    "new_rows",
    "outside",
    "outside_error",
    "outside_named",
    "relu_backward",
    "row_gradients",
    "row_plan",
    "sgd_rows",
    "softmax_backward",
    "space_sums",
    "task_losses",
    "task_losses_backward",
]
