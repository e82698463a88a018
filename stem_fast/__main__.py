"""The ``stem-fast`` command, also as ``python -m stem_fast``."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        from stem_fast.cli import app
    except KeyboardInterrupt:
        sys.exit(130)
    except ImportError as error:
        if type(error).__name__ != "BackendError":  # its class may be what was not imported
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
