"""Register budgets of the kernels, by target; each number with its reason. Used by test_compile.py.

A pattern's first match counts. Raising a number needs a reason that the hardware accepts: it is the
limit of a step of occupancy, so crossing it costs resident blocks.
"""

# AMD: (vector registers, waves per SIMD). 512 registers per SIMD lane on CDNA: 128 leave 4 waves,
# 168 leave 3, 256 leave 2.
_CDNA = {
    r"mpad_route_\w+": (128, 4),  # one block of 16 waves is 4 per SIMD
    r"mpad_down_stream1_\w+": (256, 2),  # one block of 8 waves per compute unit
    r"mpad_\w+_stream\d?_\w+": (128, 4),  # two
    r"mpad_\w+_bytes_tile16_\w+": (168, 3),  # stages and fragments of 128 columns, both ways
    r"mpad_\w+_tile(16|32)_\w+": (128, 2),  # LDS allows two to three blocks of 4 waves
    r"mpad_\w+_tile64_\w+": (256, 2),  # two blocks of 4 waves share 64 KiB LDS once each
    r"mpad_\w+_tile128_\w+": (256, 1),  # its stages take all of the LDS: one block
    r"mpad_\w+_coded16_\w+": (128, 2),  # as tiles of so many rows
    r"mpad_\w+_coded(32|64)_\w+": (256, 2),
    r"mpad_codes_\w+": (128, 4),  # copy-bound
    r"mpad_combine_\w+": (128, 4),  # copy-bound
}
# RDNA: 1536 registers per SIMD lane on wave32: 192 leave 8 waves.
_RDNA = {
    r"mpad_route_\w+": (96, 8),  # 1024 threads are 8 waves per SIMD
    r"mpad_\w+_stream\d?_\w+": (256, 4),  # 8 waves per block, two blocks
    r"mpad_combine_\w+": (96, 8),  # copy-bound
}
AMD = {"gfx90a": _CDNA, "gfx942": _CDNA, "gfx950": _CDNA, "gfx1100": _RDNA, "gfx1201": _RDNA}

# Scalar spills go to lanes of a vector register: a few cycles, outside the main loops. Pointers,
# strides and sizes of the arguments and the buffer resources compete for about 100 registers.
SGPR_SPILLS = {
    # Quantised: the formats' constants, the scales' strides and pointers too.
    r"mpad_gate_up_stream_\w+_w\d\w*": 128,
    r"mpad_down_stream\d?_\w+_w\d\w*": 64,
    r"mpad_gate_up_stream_\w+": 40,
    r"mpad_\w+": 16,
}

# NVIDIA: registers. 64 Ki registers per multiprocessor over threads * blocks.
_SM = {
    r"mpad_route_\w+": 64,  # 1024 threads
    r"mpad_(gate_up|down)_stream\w*_u": 255,  # odd strides: one block
    r"mpad_gate_up_stream_\w+": 128,  # 256 threads, two blocks
    r"mpad_down_stream1_\w+": 255,  # 256 threads, one block
    r"mpad_down_stream2_\w+": 128,  # two
    r"mpad_down_stream3_\w+": 80,  # three
    r"mpad_\w+_decoded\d+_\w+": 128,  # 256 threads, two
    r"mpad_\w+_wg128_\w+_w\d": 255,  # 256 threads, one: sums, those of a block of scales, weights
    r"mpad_\w+_wg64_\w+_w\d": 255,  # 128 threads, two
    r"mpad_\w+_wg128_\w+": 128,  # 256 threads, two
    r"mpad_\w+_wg64_\w+": 168,  # 128 threads, three
    r"mpad_\w+_tile16_\w+_w\d": 128,  # 128 threads, four
    r"mpad_\w+_tile(16|32)_\w+": 168,  # three
    r"mpad_\w+_tile(64|128)_\w+": 255,  # 128 threads, two
    r"mpad_\w+_bytes64_\w+": 168,  # 128 threads, three
    r"mpad_\w+_coded16_\w+": 168,  # 128 threads, three
    r"mpad_\w+_coded(32|64)_\w+": 255,  # 128 threads, two
    r"mpad_codes_\w+": 64,  # copy-bound
    r"mpad_combine_\w+": 64,  # copy-bound
}
NVIDIA = {"sm_80": _SM, "sm_90": _SM, "sm_90a": _SM}

# The share of its time in which one wave alone keeps the matrix unit busy in a tile's main loop, by
# llvm-mca, which knows no memory: at least this. Where two blocks share a unit, one fills the
# other's gaps. Faster matrix instructions leave less time to the rest: offsets and masks of the
# loads, the fragments' LDS reads.
_TILES = {
    r"mpad_(gate_up|down)_tile64_bf16": {"gfx90a": 0.92, "gfx942": 0.76, "gfx950": 0.52},
    r"mpad_(gate_up|down)_tile128_bf16": {"gfx90a": 0.92, "gfx942": 0.81, "gfx950": 0.63},
    # With the scaling of the sums that calls with scales by column do, others at the end.
    r"mpad_(gate_up|down)_bytes_tile64_bf16": {"gfx90a": 0.81, "gfx942": 0.44, "gfx950": 0.24},
}
MFMA_USE = {
    arch: {pattern: least[arch] for pattern, least in _TILES.items()}
    for arch in ("gfx90a", "gfx942", "gfx950")
}
