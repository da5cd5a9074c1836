"""Download and check texts ahead of training: python scripts/prepare.py SOURCE ...."""

import sys

from gpu_microgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
