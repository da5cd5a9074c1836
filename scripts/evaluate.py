"""Held-out loss of a checkpoint: python scripts/evaluate.py runs/NAME [--data FILE]."""

from gpu_microgpt.cli import entry

if __name__ == "__main__":
    entry("evaluate")
