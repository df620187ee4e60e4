"""`python -m moepad`: the command line of moepad.cli."""

import sys

from moepad.cli import main

if __name__ == "__main__":
    sys.exit(main())
