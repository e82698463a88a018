"""Compile every Triton kernel, no GPU needed: each one's first variant for sm_80, sm_90 and sm_100,
the others for one of them in turn.

Prints as JSON what each uses: {"kernel arch": {"registers", "local_bytes"}}; registers spill to
local memory. Run by test_kernels.py as a process of its own: the interpreter, once on, stays on.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from stem_fast.kernels import adagrad, adam, check_ids, linear, lookup, loss, mixture, row_plan, sgd
from stem_fast.kernels.rows import row_constants
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


def sources() -> dict[str, tuple[ASTSource, int]]:
    """Each kernel and its warps, in the paper's setting; at wide rows and many gates too."""
    found = {}
    for dtype, name in NAMES.items():
        tables = dict.fromkeys(("weight", "weights", "x", "z", "grad_x", "grad_z", "out"), name)
        whole = dict.fromkeys(("offsets", "bounds", "sizes", "bad"), "*i64")
        plan = {"segments": "*i32", "sources": "*i32", "scales": "*fp64", "partials": "*fp32"}
        ids = "*i64" if dtype == torch.float32 else "*i32"
        pointers = tables | whole | plan | {"ids": ids, "bag_rows": ids, "first_rows": "*i32"}
        for spaces, dim, sums in ((3, 16, 2), (9, 64, 8), (1, 576, 1)):
            sizes = lookup._sizes(dtype, spaces, dim, range(1, sums + 1))
            block = lookup._block(sizes)
            chunk = sizes | row_plan._chunk(sizes) | {"SCALED": True}
            for kernel, constants in (
                (lookup._lookup, sizes | block),
                (lookup._pool, sizes | {"BLOCK": min(block["BLOCK"], 16), "WEIGHTED": True}),
                (row_plan._chunk_sums, chunk),
                (row_plan._join_chunks, chunk),
            ):
                title = f"{kernel.fn.__name__} {name} {ids} G={spaces} D={dim}"
                warps = constants.get("num_warps", 4)
                found[title] = source(kernel, pointers, constants), warps
                if dim == 16 and dtype == torch.float32:
                    # Triton makes a constant of a size that is 1 (one sample, one field).
                    sizes_1 = set(kernel.arg_names) - set(pointers)
                    sizes_1 -= set(kernel.do_not_specialize or ())
                    ones = dict.fromkeys(sizes_1, 1) | constants
                    found[f"{title} sizes 1"] = source(kernel, pointers, ones), warps
        check = source(check_ids._check_ids, pointers | {"out": ids}, {"BLOCK": 256})
        found[f"_check_ids {ids}"] = check, 4
        tensors = dict.fromkeys(("order", "slots", "rows"), "*i64")
        tensors |= dict.fromkeys(("offsets", "keys"), ids)
        tensors |= dict.fromkeys(("counts", "segments", "sources"), "*i32") | {"ids": ids}
        for kernel, bags in (
            (row_plan._row_keys, False),
            (row_plan._count_rows, False),
            (row_plan._write_plan, False),
            (row_plan._write_plan, True),
        ):
            padding = 2**63 - 1 if ids == "*i64" else 2**31 - 1
            constants = {"PADDING": padding, "BLOCK": row_plan.BLOCK, "BAGS": bags}
            title = f"{kernel.fn.__name__} {ids} bags={bags}"
            found[title] = source(kernel, tensors, constants), 4
            ones = constants | {"count": 1, "fields": 1}
            found[f"{title} sizes 1"] = source(kernel, tensors, ones), 4
        for width, grads, l2 in (
            (48, False, True),
            (48, False, False),
            (48, True, False),
            (48, True, True),
            (4, True, False),
            (576, True, True),
        ):
            tensors = dict.fromkeys(("weight", "grad"), name)
            tensors |= dict.fromkeys(("exp_avg", "exp_avg_sq"), "*fp32")
            tensors |= {"last": "*i32", "rows": "*i64", "clock": "*i64"}
            tensors["steps"] = "*fp64"
            table = torch.empty(9, width, dtype=dtype, device="meta")
            constants = adam._constants(table, 0.9, 0.999, 1e-8, False, l2, grads)
            warps = constants.pop("num_warps")
            constants |= {"NAMED": not l2, "GRAD": grads}
            title = f"_adam_rows {name} W={width} grads={grads} l2={l2}"
            found[title] = source(adam._adam_rows, tensors, constants), warps
        for beta1, decoupled, l2 in (
            (0.9, False, True),
            (0.9, True, False),
            (0.99, False, False),
        ):
            tensors = {"steps": "*fp64", "clock": "*i64", "lr_decay": "*fp64"}
            constants = adam._schedule_constants(beta1, 0.999, 1e-8, decoupled, l2)
            warps = constants.pop("num_warps")
            code = source(adam._adam_schedule, tensors, constants)
            found[f"_adam_schedule beta1={beta1} decoupled={decoupled} l2={l2}"] = code, warps
        for width, grads, flag in ((48, False, True), (48, True, False), (576, True, True)):
            tensors = dict.fromkeys(("weight", "grad"), name)
            tensors |= dict.fromkeys(("momentum_buffer", "sums"), "*fp32")
            tensors |= {"last": "*i32", "rows": "*i64", "clock": "*i64"}
            tensors |= dict.fromkeys(("steps", "lr_decay"), "*fp64")
            table = torch.empty(9, width, dtype=dtype, device="meta")
            for kernel, constants in (
                (sgd._sgd_rows, {"GRAD": grads, "MOMENTUM": flag} | row_constants(table)),
                (
                    adagrad._adagrad_rows,
                    {"EPS": 1e-8, "ROW_WISE": flag} | row_constants(table),
                ),
            ):
                warps = constants.pop("num_warps")
                code = source(kernel, tensors, constants | {"NAMED": grads})
                title = f"{kernel.fn.__name__} {name} W={width} grads={grads} {flag}"
                found[title] = code, warps
        for tasks, there in ((2, False), (15, True)):
            tensors = dict.fromkeys(("logits", "labels", "weights", "means", "grad", "out"), name)
            tensors |= dict.fromkeys(("counts", "divisors", "found"), "*i64")
            tensors |= {"mask": "*i1", "totals": "*fp32"}
            rows = torch.empty(4096, tasks, dtype=dtype, device="meta")
            constants = loss._arguments(rows, rows, rows if there else None, None)[2]
            warps = constants.pop("num_warps")
            constants |= {"WEIGHTED": there, "COUNTED": there, "PROGRAMS": loss.PROGRAMS}
            constants["REGRESSION"] = (0, 1) * (tasks // 2) + (0,) * (tasks % 2)
            for kernel in (loss._sums, loss._means, loss._task_losses_backward):
                title = f"{kernel.fn.__name__} {name} T={tasks}"
                found[title] = source(kernel, tensors, constants), warps
                strides = "logit_row", "out_row", "label_task", "mask_task", "programs"
                ones = constants | dict.fromkeys(("batch", *strides), 1)
                found[f"{title} sizes 1"] = source(kernel, tensors, ones), warps
        for experts, gates, width in ((10, 2, 512), (24, 4, 256), (64, 16, 512)):
            y = torch.empty(experts, 4096, width, dtype=dtype, device="meta")
            logits, masks = torch.empty(gates, 4096, experts, device="meta"), [1] * gates
            sizes = mixture._sizes(y, logits, masks, masks)
            constants = {key: value for key, value in sizes.items() if key.isupper()}
            constants |= dict.fromkeys(("SEE", "LEARN"), tuple(-1 - k for k in range(gates)))
            tensors = dict.fromkeys(("y", "logits", "out", "grad", "dy", "dlogits"), name)
            for kernel, relu in (
                (mixture._mixture, False),
                (mixture._mixture_backward, False),
                (mixture._mixture_backward, True),
            ):
                title = f"{kernel.fn.__name__} {name} E={experts} K={gates} H={width} relu={relu}"
                code = source(kernel, tensors, constants | {"RELU": relu})
                found[title] = code, sizes["num_warps"]
        for width in (1, 64, 512):
            y = torch.empty(10, 4096, width, dtype=dtype, device="meta")
            tensors = dict.fromkeys(("y", "bias", "grad"), name) | {"partials": "*fp32"}
            for kernel in (linear._bias_relu, linear._relu_backward):
                constants = linear._tile(y) | {"RELU": True, "TILES": linear.TILES}
                if width == 1:
                    constants |= {"width": 1, "batch": 1, "blocks": 1}
                code = source(kernel, tensors, constants, aligned=width == 512)
                found[f"{kernel.fn.__name__} {name} O={width}"] = code, 4
        for inputs, outputs in ((512, 512), (77, 10)):
            x = torch.empty(10, 4096, inputs, dtype=dtype, device="meta")
            reads = {"READS": tuple(e % 3 for e in range(10))}
            constants = linear._product_tile(x, outputs) | {"RELU": True, "BAND": 8} | reads
            warps = constants["num_warps"]
            tensors = dict.fromkeys(("x", "weight", "bias", "y"), name)
            code = source(linear._grouped_linear, tensors, constants, aligned=inputs % 16 == 0)
            found[f"_grouped_linear {name} I={inputs} O={outputs}"] = code, warps
            for gates in (2, linear.GATES):
                constants = linear._mixture_tile(x, outputs, gates)
                tensors |= {"out": name, "p": "*fp32", "reads": "*i32"}
                code = source(
                    linear._expert_mixture_inference, tensors, constants, aligned=inputs % 16 == 0
                )
                title = f"_expert_mixture_inference {name} I={inputs} O={outputs} K={gates}"
                found[title] = code, warps
        # Triton makes a constant of a size that is 1: one sample, a tower's output, one expert.
        ones = dict.fromkeys(("batch", "outputs", "experts"), 1)
        constants |= ones | {"RELU": True, "BAND": 8} | reads
        for kernel in (linear._grouped_linear, linear._expert_mixture_inference):
            code = source(kernel, tensors, constants)
            found[f"{kernel.fn.__name__} {name} sizes 1"] = code, constants["num_warps"]
        for inputs, outputs in (
            ((512, 512), (500, 512), (77, 10), (64, 1)) if name == "*bf16" else ()
        ):
            grad = torch.empty(10, 4096, outputs, dtype=dtype, device="meta")
            constants = linear._backward_tile(grad, inputs) | {"BAND": 8}
            warps = constants["num_warps"]
            tensors = dict.fromkeys(("grad", "weight", "y", "d"), name) | {"partials": "*fp32"}
            constants |= {"outputs": 1, "batch": 1} if outputs == 1 else {}
            whole = inputs % 16 == 0
            code = source(linear._grouped_linear_backward, tensors, constants, aligned=whole)
            found[f"_grouped_linear_backward {name} I={inputs} O={outputs}"] = code, warps
        for gates, experts in ((2, 10), (4, 64)):
            constants = linear._share_sizes(torch.empty(gates, 4096, experts, device="meta"))
            constants |= {"SEE": tuple(range(1, gates + 1)), "READS": tuple(range(experts))}
            tensors = {"logits": name, "p": "*fp32", "reads": "*i32"}
            found[f"_shares {name} K={gates} E={experts}"] = (
                source(linear._shares, tensors, constants),
                4,
            )
    return found


def source(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], *, aligned: bool = False
) -> ASTSource:
    """``aligned``: to multiples of 16, as Triton finds out for itself at a call: loads get wider,
    and copies to shared memory run ahead."""
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    places = [i for i, name in enumerate(kernel.arg_names) if name not in constants]
    attributes = {(i,): [["tt.divisibility", 16]] for i in places} if aligned else None
    return ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=attributes)


def resources(code: ASTSource, warps: int, arch: int) -> dict[str, int]:
    target = GPUTarget("cuda", arch, 32)
    # The launcher is Python made of the names: some are taken.
    create_function_from_signature(code.fn.signature, code.fn.params, make_backend(target))
    compiled = triton.compile(code, target=target, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [tool, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {
        name: int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL")
    }
    return {"registers": usage["REG"], "local_bytes": usage["STACK"] + usage["LOCAL"]}


if __name__ == "__main__":
    table: dict[str, dict[str, int]] = {}
    kernels: set[str] = set()
    for number, (title, (code, warps)) in enumerate(sources().items()):
        every = (80, 90, 100)
        kernel = title.split()[0]
        for arch in every if kernel not in kernels else every[number % 3 :][:1]:
            table[f"{title} sm_{arch}"] = resources(code, warps, arch)
        kernels.add(kernel)
    print(json.dumps(table))
