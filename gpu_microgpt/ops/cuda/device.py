"""What a launcher must know of the GPU it launches on."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Operations a multiprocessor does a clock: bfloat16 by tensor cores, float32 by the ordinary units
RATES = {
    (7, 5): (0, 128),
    (8, 0): (2048, 128),
    (8, 6): (1024, 256),
    (8, 9): (1024, 256),
    (9, 0): (4096, 256),
    (10, 0): (8192, 256),
    (12, 0): (1024, 256),
}
HALVED = ((8, 6), (8, 9), (12, 0))  # GeForce sums in float32 at half the rate of the same chips


@dataclass(frozen=True)
class Device:
    """Properties of one GPU; sizes in bytes."""

    name: str
    capability: tuple[int, int]  # (9, 0) is sm_90
    multiprocessors: int
    shared_per_block: int  # dynamic shared memory a block may ask for
    shared_per_multiprocessor: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int
    l2_bytes: int
    registers_per_multiprocessor: int = 65536
    reserved_shared: int = 1024  # the system's own, a block
    clock_hz: int = 0  # the fastest of the multiprocessors

    @property
    def arch(self) -> str:
        """The compiler's name for its machine code: sm_90."""
        major, minor = self.capability
        return f"sm_{major}{minor}"

    @property
    def tensor_cores(self) -> bool:
        """Whether it multiplies bfloat16 matrices and copies to shared memory by itself."""
        return self.capability >= (8, 0)

    def peak_flops(self, mode: str) -> float | None:
        """Floating-point operations a second that its multiprocessors can do at their fastest
        clock, a multiply-add counting as two; None where that is not published or not possible.

        mode: bf16 or tf32, by tensor cores with float32 sums and no sparsity, or fp32. Computed
        from published rates, not measured: a GPU under load seldom holds its fastest clock.
        """
        tensor, plain = RATES.get(self.capability, (0, 0))
        if "GeForce" in self.name and self.capability in HALVED:
            tensor //= 2
        rate = {"bf16": tensor, "tf32": tensor // 2, "fp32": plain}[mode]
        return float(rate * self.multiprocessors * self.clock_hz) or None

    def occupancy(self, threads: int, registers: int, shared: int) -> int:
        """Blocks a multiprocessor holds at once, by CUDA's allocation rules.

        threads a block (whole warps), registers a thread, shared: static and dynamic bytes a block.
        """
        warps = -(-threads // 32)
        per_warp = -(-registers * 32 // 256) * 256  # allocated a warp, in units of 256
        by_registers = self.registers_per_multiprocessor // per_warp // 4 * 4 // warps
        reserved = self.reserved_shared if self.tensor_cores else 0
        taken = -(-(shared + reserved) // 128) * 128
        by_shared = self.shared_per_multiprocessor // taken if taken else by_registers
        by_threads = self.threads_per_multiprocessor // (warps * 32)
        return min(by_registers, by_shared, by_threads, self.blocks_per_multiprocessor)


KIB = 1024

# One GPU for each architecture kernels are compiled for: what launchers are tested and tabulated
# with where there is no GPU. Clocks: published.
KNOWN = {
    d.arch: replace(d, clock_hz=mhz * 1_000_000)
    for d, mhz in (
        (Device("Tesla T4", (7, 5), 40, 64 * KIB, 64 * KIB, 1024, 16, 4 << 20), 1590),
        (Device("A100", (8, 0), 108, 163 * KIB, 164 * KIB, 2048, 32, 40 << 20), 1410),
        (Device("GeForce RTX 3090", (8, 6), 82, 99 * KIB, 100 * KIB, 1536, 16, 6 << 20), 1695),
        (Device("GeForce RTX 4090", (8, 9), 128, 99 * KIB, 100 * KIB, 1536, 24, 72 << 20), 2520),
        (Device("H200", (9, 0), 132, 227 * KIB, 228 * KIB, 2048, 32, 60 << 20), 1980),
        (Device("B200", (10, 0), 148, 227 * KIB, 228 * KIB, 2048, 32, 126 << 20), 1965),
        (Device("GeForce RTX 5090", (12, 0), 170, 99 * KIB, 100 * KIB, 1536, 24, 96 << 20), 2407),
    )
}
