"""Download and check texts ahead of training: python scripts/prepare.py SOURCE ...."""

from gpu_microgpt.cli import entry

if __name__ == "__main__":
    entry("prepare")
