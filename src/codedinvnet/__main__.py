"""`python -m codedinvnet` is the command `codedinvnet`."""

import sys

from codedinvnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
