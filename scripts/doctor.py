"""Whether this machine's speed and loss are what they should be: python scripts/doctor.py."""

from gpu_microgpt.cli import entry

if __name__ == "__main__":
    entry("doctor")
