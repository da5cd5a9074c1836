"""Draw loss curves: python scripts/plot.py runs/NAME ... [-o loss.png]."""

import sys

from gpu_microgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["plot", *sys.argv[1:]]))
