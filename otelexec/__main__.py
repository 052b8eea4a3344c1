"""`python -m otelexec`: the command line."""

import sys

from otelexec.cli import main

if __name__ == "__main__":
    sys.exit(main())
