"""What the engine is to reach on an H200, and whether it did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SHAKESPEARE_MS, BABY_MS, TOKENS_124M, HOST_US = 0.40, 3.0, 600_000, 20.0
CASES = ("names", "shakespeare", "baby-gpt", "124m")


def targets(found: dict[str, Any]) -> Iterator[tuple[str, str | None, bool | None]]:
    """What is wanted, what was measured (None: nothing), whether that is reached."""

    def ours(case: str) -> dict[str, Any]:
        return found.get(f"steps:{case}", {}).get("ours", {})

    for case, limit in (("shakespeare", SHAKESPEARE_MS), ("baby-gpt", BABY_MS)):
        ms = ours(case).get("ms")
        yield f"{case}: at most {limit:.2f} ms/step", ms and f"{ms:.4g} ms", ms and ms <= limit
    speed = ours("124m").get("tokens_per_second")
    yield (
        f"124m: at least {TOKENS_124M:,} tokens/s", speed and f"{speed:,.0f}",
        speed and speed >= TOKENS_124M,
    )  # fmt: skip
    for case in CASES:
        peers = found.get(f"steps:{case}", {}).get("peers")
        if peers:
            name, fastest = min(peers.items(), key=lambda item: item[1]["ms"])
            yield (
                f"{case}: faster than the fastest PyTorch",
                f"{name} takes {fastest['ratio']:.2f} times as long", fastest["ratio"] > 1,
            )  # fmt: skip
        else:
            yield f"{case}: faster than the fastest PyTorch", None, None
    host = {case: ours(case)["host_us"] for case in CASES if ours(case)}
    yield (
        f"host time a step: at most {HOST_US:g} us",
        ", ".join(f"{case} {us:.1f} us" for case, us in host.items()) or None,
        all(us <= HOST_US for us in host.values()) if host else None,
    )
    made = {case: ours(case)["allocations"] for case in CASES if ours(case)}
    yield (
        "no allocation after the first step",
        ", ".join(f"{case} {count}" for case, count in made.items()) or None,
        not any(made.values()) if made else None,
    )
