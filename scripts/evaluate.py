"""Held-out loss of a checkpoint: python scripts/evaluate.py runs/NAME [--data FILE]."""

import sys

from gpu_microgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
