"""Write docs/benchmarks/kernel_table.*: what every kernel takes on every GPU architecture."""

from pathlib import Path

from gpu_microgpt.ops.cuda.cache import KernelCache
from gpu_microgpt.ops.cuda.table import write

if __name__ == "__main__":
    for path in write(Path(__file__).parents[1] / "docs" / "benchmarks", KernelCache()):
        print(path)
