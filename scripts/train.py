"""Train a model: python scripts/train.py CONFIG [section.key=value ...]."""

from gpu_microgpt.cli import entry

if __name__ == "__main__":
    entry("train")
