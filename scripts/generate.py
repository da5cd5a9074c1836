"""Write text with a trained model: python scripts/generate.py runs/NAME [options]."""

from gpu_microgpt.cli import entry

if __name__ == "__main__":
    entry("generate")
