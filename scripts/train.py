"""Train a model: python scripts/train.py CONFIG [section.key=value ...]."""

import sys

from gpu_microgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
