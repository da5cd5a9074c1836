"""Measure."""

from gpu_microgpt.cli import entry

if __name__ == "__main__":
    entry("bench")
