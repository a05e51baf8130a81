"""`python -m zinfer`: the command, where no script is on the path."""

import sys

from zinfer.cli import main

if __name__ == "__main__":
    sys.exit(main())
