"""``stem-fast cache``."""

from __future__ import annotations

import typer

from stem_fast.cli import report
from stem_fast.cli.arguments import CacheFolder
from stem_fast.data import cache as caching

cache_app = typer.Typer(help="What encoded data the cache holds.", invoke_without_command=True)


@cache_app.callback()
def list_cache(context: typer.Context, cache: CacheFolder = None) -> None:
    """List the data sets in the cache: sizes, and when each was last used. `clear` removes them."""
    context.obj = root = caching.cache_root(cache)
    if context.invoked_subcommand is None:
        found = caching.entries(root)
        report.print_cache(str(root), found)


@cache_app.command("clear")
def clear_cache(context: typer.Context, cache: CacheFolder = None) -> None:
    """Remove all cached data that no process uses."""
    root = context.obj if cache is None else caching.cache_root(cache)
    removed = caching.evict(root, -1)
    left = len(caching.entries(root))
    rest = f"; {left} in use left" if left else ""
    report.console().print(f"{report.data_sets(removed)}, removed from {root}{rest}")
