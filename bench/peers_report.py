"""What bench/peers.py found, as tables and as a plot."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import memory, run
from bench.contenders import OURS, REQUESTS
from stem_fast.training.checkpoint import replacing

WHAT = ("step", "inference", "memory", "epoch")
# On CUDA there is a column for each precision, where on the CPU there is one for each allocator.
PRECISIONS = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}  # and the names of their rates
MEMORY = {"gives back": memory.ALLOCATOR}  # memory alone is measured with it


def tables(report: Mapping[str, Any]) -> list[list[list[str]]]:
    """One table for each thing measured: a row a contender (and request), columns of allocators."""
    found = []
    for what in WHAT:
        results = [r for r in report["results"] if r["what"] == what]
        if results:
            found.append({"memory": memory_rows, "epoch": epoch_rows}.get(what, time_rows)(results))
    found.append(ceiling_rows(report["ceilings"]))
    return [table for table in found if len(table) > 1]


def column(result: Mapping[str, Any]) -> str:
    """An allocator, or on CUDA a precision."""
    return str(result["precision" if "precision" in result else "allocator"])


def grouped(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """(setting, contender) -> column -> result."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        key = result["setting"], result["contender"]
        found.setdefault(key, {})[column(result)] = result
    return found


def time_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Of steps, or of requests of each size."""
    allocators = list(dict.fromkeys(map(column, results)))
    inference = results[0]["what"] == "inference"
    head = ["setting", *(["rows of a request"] if inference else []), "contender"]
    for allocator in allocators:
        unit = "p50 / p99 ms" if inference else "ms of a step"
        head += [f"{unit}, {allocator}", "of the roofline", "ours is faster"]
    table = [head]
    by_contender = grouped(results)
    for rows in REQUESTS if inference else (None,):
        for (setting, name), found in by_contender.items():
            line = [setting, *([str(rows)] if inference else []), name]
            for allocator in allocators:
                result = times(found.get(allocator), rows)
                ours = times(by_contender.get((setting, OURS), {}).get(allocator), rows)
                line += time_cells(result, None if name == OURS else ours, inference)
            table.append(line)
    # All of a setting together.
    order = list(dict.fromkeys(r["setting"] for r in results))
    return [head, *sorted(table[1:], key=lambda line: order.index(line[0]))]


def times(result: Mapping[str, Any] | None, rows: int | None) -> Mapping[str, Any] | None:
    """The part of a result that is of requests of ``rows`` rows, None for a step."""
    if result is None or rows is None or "requests" not in result:
        return result
    return {"status": result["status"], **result["requests"][str(rows)]}


def time_cells(
    result: Mapping[str, Any] | None, ours: Mapping[str, Any] | None, percentiles: bool
) -> list[str]:
    if result is None or "seconds" not in result or result["status"] != "ok":
        return [status(result), "", ""]
    text = f"{result['seconds'] * 1000:.3g}"
    if percentiles:
        text += f" / {result['p99_seconds'] * 1000:.3g}"
    faster = ""
    if ours is not None and ours["status"] == "ok" and "seconds" in ours:
        faster = f"{result['seconds'] / ours['seconds']:.2f}x"
    return [text, f"{result['of_roofline']:.0%}", faster]


def status(result: Mapping[str, Any] | None) -> str:
    """Why there is no time."""
    if result is None or result["status"] == "ok":
        return ""
    if result["status"].startswith("not "):
        return f"{result['status']}: {result['note']}"
    return str(result["status"])


def memory_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    columns = list(dict.fromkeys(map(column, results)))
    table = [["setting", "contender"]]
    for each in columns:
        of = "" if each in MEMORY else f", {each}"
        table[0] += [f"peak MB of training{of}", "MB of parameters", "of ours"]
    by_contender = grouped(results)
    for (setting, name), found in by_contender.items():
        line = [setting, name]
        for each in columns:
            result = found.get(each)
            ours = by_contender.get((setting, OURS), {}).get(each, {})
            cells = [status(result), "", ""]
            if result is not None and "peak" in result:
                cells = [f"{result['peak'] / 1e6:.0f}", f"{result['parameters'] / 1e6:.0f}", ""]
                if name != OURS and "peak" in ours:
                    cells[2] = f"{result['peak'] / ours['peak']:.2f}x"
            line += cells
        table.append(line)
    return table


def epoch_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    allocators = list(dict.fromkeys(map(column, results)))
    head = ["setting", "contender"]
    for allocator in allocators:
        head += [f"samples/s of an epoch, {allocator}", "ours is faster"]
    # An allocator changes no metric; a precision does.
    told = [each for each in allocators if each in PRECISIONS] or allocators[-1:]
    for each in told:
        of = f", {each}" if each in PRECISIONS else ""
        head += [f"AUC{of}", f"gAUC{of}"]
    table = [head]
    by_contender = grouped(results)
    for (setting, name), found in by_contender.items():
        line = [setting, name]
        for allocator in allocators:
            result = found.get(allocator)
            ours = by_contender.get((setting, OURS), {}).get(allocator, {})
            if result is None or "samples_per_s" not in result:
                line += [status(result), ""]
                continue
            faster = ours.get("samples_per_s", 0.0) / result["samples_per_s"]
            shown = f"{faster:.2f}x" if faster and name != OURS else ""
            line += [f"{result['samples_per_s']:,.0f}", shown]
        for each in told:
            last = found.get(each, {})
            line += [f"{last[m]:.4f}" if m in last else "" for m in ("auc", "gauc")]
        table.append(line)
    return table


def ceiling_rows(ceilings: Mapping[str, Any]) -> list[list[str]]:
    known = {name for found in ceilings.values() for name in found}
    names = [name for name in PRECISIONS.values() if name in known]
    table = [["setting", *(f"GFLOP/s, {name}" for name in names), "GB/s of a copy"]]
    for setting, found in ceilings.items():
        if found:
            rates = [found[name] / 1e9 for name in (*names, "copy")]
            table.append([setting, *(f"{rate:.0f}" for rate in rates)])
    return table


def text(report: Mapping[str, Any]) -> str:
    """A report in Markdown."""
    title = run.title(report, report["others_cores"])
    return "\n\n".join([title, *map(run.markdown, tables(report)), ""])


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Bars of a step, and of a request of each size, for every contender that was timed, and STEM's
    roofline. Ends the program where there is nothing to draw or to draw with."""
    try:
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    panels = timed(report["results"])
    if not panels:
        sys.exit("--plot: the file has no steps and no requests")
    columns = list(
        dict.fromkeys(c for bars in panels.values() for each in bars.values() for c in each)
    )
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    tall = max(map(len, panels.values())) * len(columns) * 0.14 + 1
    # Text stays text, and the same report is the same file.
    fixed = {"svg.fonttype": "none", "svg.hashsalt": OURS, "font.size": 8}
    with pyplot.rc_context(fixed):
        figure, axes = pyplot.subplots(
            down, across, figsize=(5 * across, tall * down), squeeze=False, layout="constrained"
        )
        for axis, (title, bars) in zip(axes.flat, panels.items(), strict=False):
            axis.set_title(title, fontsize=9)
            draw(axis, bars, columns)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        of = "" if set(columns) <= set(PRECISIONS) else " in fp32"
        shades = f"From light to dark: {', '.join(columns)}. Dashed: STEM's roofline{of}."
        figure.suptitle(f"{run.title(report, report['others_cores'])}\n{shades}", fontsize=7)
        kind = path.suffix[1:]
        with replacing(path) as partial:
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(partial, dpi=130, format=kind, metadata=metadata)
        pyplot.close(figure)


Bars = dict[str, dict[str, Mapping[str, Any]]]  # contender -> column -> its times


def timed(results: Sequence[Mapping[str, Any]]) -> dict[str, Bars]:
    """The bars of each panel, by its title: steps, then requests from small to large."""
    panels: dict[str, Bars] = {}
    for what in ("step", "inference"):
        for result in (r for r in results if r["what"] == what):
            for rows in REQUESTS if what == "inference" else (None,):
                found = times(result, rows)
                if found is None or found["status"] != "ok" or "seconds" not in found:
                    continue
                of = "a training step"
                if rows is not None:
                    of = f"a request of {rows:,} row{'s' if rows > 1 else ''}, median"
                bars = panels.setdefault(f"{result['setting']}: ms of {of}", {})
                bars.setdefault(result["contender"], {})[column(result)] = found
    return panels


def draw(axis: Any, bars: Bars, columns: Sequence[str]) -> None:
    """One panel: the columns of a contender are shades of its colour."""
    height = 0.8 / len(columns)
    for place, (name, found) in enumerate(bars.items()):
        colour = "#c44e52" if name.startswith(OURS) else "#7f8fa6"
        for turn, each in enumerate(columns):
            if each in found:
                milliseconds = 1000 * found[each]["seconds"]
                at = place + height * (turn - (len(columns) - 1) / 2)
                shade = 0.5 + 0.5 * turn / max(len(columns) - 1, 1)
                axis.barh(at, milliseconds, height, color=colour, alpha=shade)
                digits = ",.0f" if milliseconds >= 100 else ".3g"
                axis.text(milliseconds, at, f" {milliseconds:{digits}}", va="center", fontsize=6)
    for stem in (bars.get(OURS, {}), bars.get("official", {})):
        for part in stem.values():
            axis.axvline(1000 * part["roofline_seconds"], color="black", ls="--", lw=1)
    axis.set_yticks(range(len(bars)), list(bars))
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlim(left=0)
