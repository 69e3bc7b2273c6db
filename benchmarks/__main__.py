"""`python -m benchmarks`, run in the repository's root."""

import sys

from benchmarks import INSTALL

if __name__ == "__main__":
    try:
        from benchmarks.command_line import main
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing: {INSTALL}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main())
