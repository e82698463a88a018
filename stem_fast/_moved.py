"""Modules that have moved into rooms, still found under their old names, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "batched": ("nn.batched",),
    "cache": ("data.cache",),
    "checkpoint": ("training.checkpoint",),
    "checks": ("training.checks",),
    "config": ("training.options", "training.config_file"),
    "experts": ("nn.experts",),
    "fuxictr": ("models.official",),
    "inference": ("serving.inference",),
    "layers": ("nn.arena", "nn.grouped", "nn.modules"),
    "model": ("models.network", "models.wiring", "models.family"),
    "parallel": ("nn.parallel",),
    "precision": ("nn.precision",),
    "report": ("cli.report",),
    "schema": ("data.schema", "common"),
    "select": ("data.select",),
    "step": ("training.step",),
    "synth": ("data.synth",),
    "tables": ("data.tables", "data.joins", "data.blocks", "data.texts"),
    "train": ("training.fit",),
}


class _Moved(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == "stem_fast" and old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        homes = [f"stem_fast.{home}" for home in MOVED[module.__name__.partition(".")[2]]]
        # Frames of the import system are left out of the count.
        warnings.warn(
            f"{module.__name__} has moved to {', '.join(homes)}", DeprecationWarning, stacklevel=2
        )
        for home in homes:
            for name, value in vars(importlib.import_module(home)).items():
                if not name.startswith("_"):
                    vars(module)[name] = value


sys.meta_path.append(_Moved())
