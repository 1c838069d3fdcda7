"""`python -m mujax.cli`."""

import sys

from mujax.cli import main

if __name__ == "__main__":
    sys.exit(main())
