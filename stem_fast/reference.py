"""The mathematics of STEM-Net in plain PyTorch, one loop for one sum.

Every faster version of an op is tested against the function of the same name here, so these stay
simple enough to be checked by eye against the paper (Su et al., AAAI 2024, section 4) and the
official code (LiangcaiSu/STEM, ``models/STEM.py``). Autograd of these functions *is* the
definition of the gradients, the asymmetric backward included.

Symbols: B batch, F categorical fields, G embedding spaces, D embedding dimension, E experts,
K gates, I and O the widths of a layer's input and output, H the width of an expert's output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def lookup(weight: Tensor, ids: Tensor, offsets: Tensor, spaces: int) -> Tensor:
    """Embeddings of categorical fields, all spaces at once.

    Args:
        weight: [R, G*D], the arena. A row holds the G embeddings of one feature value; the rows of
            field f start at ``offsets[f]``.
        ids: int32 or int64 [B, F], 0 <= ids[b, f] < rows of field f. 0 is padding: it reads its
            row, which is kept at zero, and never trains it.
        offsets: int64 [F].
        spaces: G.

    Returns:
        [G, B, F*D], field-major.
    """
    rows = F.embedding(ids + offsets, weight)  # [B, F, G*D]
    rows = torch.where((ids == 0)[..., None], rows.detach(), rows)
    return rows.unflatten(2, (spaces, -1)).permute(2, 0, 1, 3).flatten(2)


def lookup_backward(grad: Tensor, ids: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Dense gradient of :func:`lookup` with respect to ``weight``.

    Args:
        grad: [G, B, F*D], gradient of the output.
        ids, offsets: as in :func:`lookup`.
        rows: R.

    Returns:
        [R, G*D]; zero for rows that no id names and for every field's padding row.
    """
    grad = grad.unflatten(2, (ids.shape[1], -1)).permute(1, 2, 0, 3).flatten(2)  # [B, F, G*D]
    # Row 0 is a padding row, so it can stand for every field's padding, which gets no gradient.
    index = torch.where(ids == 0, 0, ids + offsets)
    return torch.ops.aten.embedding_dense_backward(grad, index, rows, 0, False)


def bag(
    weight: Tensor, values: Tensor, offsets: Tensor, first_row: int, spaces: int, pooling: str
) -> Tensor:
    """Pooled embeddings of one sequence field (FuxiCTR's MaskedAveragePooling, MaskedSumPooling).

    Args:
        weight: [R, G*D], the arena.
        values: int32 or int64 [n], the ids of all sequences one after another; 0 is padding and
            counts for nothing.
        offsets: int64 [B+1]; sequence b is ``values[offsets[b]:offsets[b+1]]``.
        first_row: the arena row of the field's id 0.
        spaces: G.
        pooling: "mean" or "sum". An empty sequence pools to zeros.

    Returns:
        [G, B, D].
    """
    batch = len(offsets) - 1
    sequence = torch.repeat_interleave(
        torch.arange(batch, device=values.device), offsets.diff(), output_size=len(values)
    )
    real = values != 0
    values, sequence = values[real], sequence[real]
    rows = F.embedding(values + first_row, weight)
    pooled = rows.new_zeros(batch, weight.shape[1]).index_add(0, sequence, rows)
    if pooling == "mean":
        length = torch.bincount(sequence, minlength=batch).clamp(min=1)
        pooled = pooled / length[:, None].to(pooled.dtype)
    return pooled.unflatten(1, (spaces, -1)).transpose(0, 1)


def grouped_linear(x: Tensor, reads: Sequence[int], weight: Tensor, bias: Tensor) -> Tensor:
    """One linear layer of E networks that run side by side (experts, gates or towers).

    Args:
        x: [N, B, I], the inputs there are.
        reads: indices into them: network e reads ``x[reads[e]]``; with fewer than E of them, only
            the first networks run.
        weight: [E, O, I].
        bias: [E, O].

    Returns:
        [E, B, O].
    """
    # unbind and not indexing: the backward of x[n] fills a whole x with zeros each time.
    inputs = x.unbind()
    networks = zip(reads, weight.unbind(), bias.unbind(), strict=False)
    return torch.stack([F.linear(inputs[n], w, b) for n, w, b in networks])


def gate_inputs(x: Tensor, reads: Sequence[Sequence[int]]) -> Tensor:
    """What the gates read: the sum of the inputs that each names. [N, B, I] -> [K, B, I]."""
    inputs = x.unbind()
    return torch.stack([torch.stack([inputs[n] for n in names]).sum(0) for names in reads])


def gate_weights(logits: Tensor, see: Sequence[int]) -> Tensor:
    """Softmax over the experts that each gate sees.

    Args:
        logits: [K, B, E].
        see: K bit masks, none of them 0; bit e of ``see[k]`` says whether gate k sees expert e.

    Returns:
        [K, B, E]; exactly 0 where the bit is 0.
    """
    return logits.masked_fill(~mask_matrix(see, logits)[:, None, :], float("-inf")).softmax(-1)


def mixture(y: Tensor, logits: Tensor, see: Sequence[int], learn: Sequence[int]) -> Tensor:
    """All Forward, Task-specific Backward (AFTB): K gated sums of the same E experts.

    ``out[k] = sum_e p[k, e] * y[e]`` with ``p = gate_weights(logits, see)``. Expert e learns from
    output k only where bit e of ``learn[k]`` is set; the gates always learn.

    Args:
        y: [E, B, H], expert outputs.
        logits: [K, B, E].
        see, learn: K bit masks over the experts, learn within see.

    Returns:
        [K, B, H].
    """
    p = gate_weights(logits, see)
    outputs = []
    for k, mask in enumerate(learn):
        experts = [y[e] if mask >> e & 1 else y[e].detach() for e in range(len(y))]
        outputs.append(torch.stack([p[k, :, e, None] * experts[e] for e in range(len(y))]).sum(0))
    return torch.stack(outputs)


def mixture_backward(
    grad: Tensor, y: Tensor, logits: Tensor, see: Sequence[int], learn: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`mixture` written out, with nothing saved but its inputs.

    ``dy[e] = sum_k learn[k, e] * p[k, e] * grad[k]``; ``dp[k, e] = <grad[k], y[e]>`` for every e,
    then the backward of softmax.

    Args:
        grad: [K, B, H], gradient of the output. The rest as in :func:`mixture`.

    Returns:
        dy [E, B, H] and dlogits [K, B, E].
    """
    p = gate_weights(logits, see)
    dy = torch.einsum("kbe,kbh->ebh", p * mask_matrix(learn, p)[:, None, :], grad)
    dp = torch.einsum("kbh,ebh->kbe", grad, y)
    return dy, p * (dp - (p * dp).sum(-1, keepdim=True))


def mask_matrix(masks: Sequence[int], like: Tensor) -> Tensor:
    """Bit masks as a bool matrix [K, E], for logits or weights ``like`` [K, B, E]."""
    experts = range(like.shape[-1])
    return torch.tensor([[bool(m >> e & 1) for e in experts] for m in masks], device=like.device)
