"""Every kernel in the forms launchers ask for: what is compiled, tabulated and looked through where
there is no GPU. Of constants with many values (HEAD_DIM of attention_general), some stand in."""

from __future__ import annotations

from dataclasses import dataclass, field

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Launch:
    """A typical launch, for the occupancy: threads a block and dynamic shared bytes a block."""

    threads: int
    shared: int = 0


@dataclass(frozen=True)
class Variant:
    """A kernel file with some -D constants, and the kernels in it."""

    stem: str
    kernels: dict[str, Launch]
    constants: dict[str, int] = field(default_factory=dict)  # beside REAL_BF16
    dtypes: tuple[str, ...] = DTYPES
    tensor_cores: bool = False  # nothing is in it before sm_80


RMSNORM = {
    name: Launch(128)
    for name in (
        "rmsnorm",
        "embedding_rmsnorm",
        "add_rmsnorm",
        "rmsnorm_backward",
        "rmsnorm_backward_add",
    )
}
RMSNORM_BLOCK = dict.fromkeys(RMSNORM, Launch(256))

CATALOG = [
    Variant(
        "embedding",
        {
            "embedding": Launch(256),
            "embedding_sort": Launch(1024),
            "embedding_sum": Launch(256, 2048),
            "embedding_combine": Launch(256),
        },
    ),
    *[  # channels up to 256, 512, 768, 1024; any width up to 1024
        Variant("rmsnorm", RMSNORM, {"TEAM": 32, "HELD": held, "PACKED": packed})
        for held, packed in ((8, 1), (16, 1), (24, 1), (32, 1), (32, 0))
    ],
    *[  # channels up to 2048, 8192; any width up to 8192
        Variant("rmsnorm", RMSNORM_BLOCK, {"TEAM": 256, "HELD": held, "PACKED": packed})
        for held, packed in ((8, 1), (32, 1), (32, 0))
    ],
    Variant("relu", {"relu": Launch(256), "relu_backward": Launch(256)}),
    *[  # sequences of 256; of 128 where not every GPU has the shared memory
        Variant(
            "attention_short",
            {
                "attention_short": Launch(threads, forward),
                "attention_short_backward": Launch(threads, backward),
            },
            {"HEAD_DIM": head_dim},
            ("bfloat16",),
            tensor_cores=True,
        )
        for head_dim, threads, forward, backward in (
            (16, 128, 18432, 22528),
            (32, 128, 34816, 43008),
            (64, 128, 67584, 83968),
            (128, 128, 67584, 83968),
        )
    ],
    *[
        Variant(
            "attention_tiled",
            {
                "attention_tiled": Launch(128, forward),
                "attention_tiled_delta": Launch(256),
                "attention_tiled_backward": Launch(threads, backward),
            },
            {"HEAD_DIM": head_dim},
            ("bfloat16",),
            tensor_cores=True,
        )
        for head_dim, threads, forward, backward in (
            (16, 128, 12288, 8192),
            (32, 128, 24576, 16384),
            (64, 128, 49152, 32768),
            (128, 256, 98304, 65536),
        )
    ],
    *[
        Variant(
            "attention_general",
            {
                "attention_general": Launch(threads, forward),
                "attention_general_backward": Launch(threads, backward),
            },
            {"HEAD_DIM": head_dim, "ROWS": rows},
        )
        for head_dim, rows, threads, forward, backward in (
            (4, 1, 32, 1024, 1280),
            (12, 4, 128, 6144, 6656),
            (20, 2, 128, 12288, 12800),
            (32, 2, 128, 16384, 16896),
            (64, 2, 128, 32768, 33280),
            (64, 4, 128, 32768, 33280),
            (100, 4, 128, 32768, 33024),
            (128, 4, 128, 32768, 33024),
        )
    ],
    *[
        Variant(
            "attention_decode",
            {
                "cache_kv": Launch(128),
                "attention_decode": Launch(128),
                "attention_decode_merge": Launch(128),
            },
            {"HEAD_DIM": head_dim},
        )
        for head_dim in (4, 32, 64, 128)
    ],
    Variant(
        "softmax",
        {
            "softmax_warp": Launch(256),
            "softmax_block": Launch(512),
            "softmax_backward_warp": Launch(256),
            "softmax_backward_block": Launch(512),
        },
    ),
    Variant(
        "cross_entropy",
        {
            "cross_entropy_warp": Launch(256),
            "cross_entropy_block": Launch(512),
            "cross_entropy_backward_warp": Launch(256),
            "cross_entropy_backward_block": Launch(512),
            "cross_entropy_backward_shared": Launch(512, 32768),  # 16,384 tokens in bfloat16
            "add_losses": Launch(1024),
        },
    ),
    Variant(
        "adamw",
        {
            "sum_squares": Launch(256),
            "root_of_sum": Launch(1024),
            "clip_scale": Launch(32),
            "adamw": Launch(256),
        },
    ),
    Variant("batch", {"batch_order": Launch(512, 512), "batch_gather": Launch(256)}),
    Variant("sample", {"sample": Launch(1024), "sample_philox": Launch(1024)}),
    Variant("step", {"advance": Launch(32), "update_scalars": Launch(32)}),
    Variant("decode", {"forbid": Launch(128), "emit": Launch(128)}),
]
