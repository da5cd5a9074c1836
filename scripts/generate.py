"""Write text with a trained model: python scripts/generate.py runs/NAME [options]."""

import sys

from gpu_microgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
