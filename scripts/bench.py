"""Measure."""

import sys

from gpu_microgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
