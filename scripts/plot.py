"""Draw loss curves: python scripts/plot.py runs/NAME ... [-o loss.png]."""

from gpu_microgpt.cli import entry

if __name__ == "__main__":
    entry("plot")
