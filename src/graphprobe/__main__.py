"""``python -m graphprobe`` is the command ``graphprobe``."""

import sys

from graphprobe.cli import main

if __name__ == "__main__":
    sys.exit(main())
