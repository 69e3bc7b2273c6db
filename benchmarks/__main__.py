"""`python -m benchmarks`, run in the repository's root."""

import sys

from benchmarks.command_line import main

if __name__ == "__main__":
    sys.exit(main())
