"""The ``stem-fast`` command, also as ``python -m stem_fast``."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script. What goes wrong while torch and the ops are imported is
    one line, as later errors are."""
    try:
        from stem_fast.cli import app
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
