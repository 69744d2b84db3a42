"""`python -m pymeta`: the same as the command `pymeta`."""

import sys

from pymeta.cli import main

if __name__ == "__main__":
    sys.exit(main())
