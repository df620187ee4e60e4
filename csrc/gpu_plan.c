/* Level 2: see gpu_plan.h. The rules and the numbers in them are explained where they stand. */
#include "gpu_plan.h"

#include <string.h>

/* One row per symbol of variants.def. A family of the second product follows that of the first. */
enum family {
    FAMILY_ROUTE,
    FAMILY_GATE_UP_STREAM,
    FAMILY_DOWN_STREAM,
    FAMILY_GATE_UP_TILE,
    FAMILY_DOWN_TILE,
    FAMILY_GATE_UP_WARPGROUP,
    FAMILY_DOWN_WARPGROUP,
    FAMILY_GATE_UP_DECODED,
    FAMILY_DOWN_DECODED,
    FAMILY_COMBINE,
    FAMILY_CODES,
    FAMILY_GATE_UP_CODED,
    FAMILY_DOWN_CODED,
    FAMILY_GATE_UP_BYTES_TILE,
    FAMILY_DOWN_BYTES_TILE,
    FAMILY_GATE_UP_BYTES,
    FAMILY_DOWN_BYTES
};
enum { ROUTE_ONE, ROUTE_COUNT, ROUTE_SORT }; /* codes of FAMILY_ROUTE, in is_vector */
enum { CODES_X, CODES_H };                   /* of FAMILY_CODES */
enum element { Bf16 = MPAD_DTYPE_BF16, F16 = MPAD_DTYPE_F16 };
enum weights { Plain = 16, Bytes = 8, Nibbles = 4 }; /* bits of an element: BITS of hip/types.h */

typedef struct variant {
    const char *symbol;
    enum family family;
    int dtype;
    int bits;
    int is_vector;
    int blocks; /* per multiprocessor */
    int rows;   /* of a tile's job */
    int waves, stages, groups;
} variant;

static const variant VARIANTS[] = {
#define MPAD_ROUTE(NAME, STAGE, CODE) {.symbol = #NAME, .family = FAMILY_ROUTE, .is_vector = CODE},
#define MPAD_GATE_UP_STREAM(NAME, TYPE, WEIGHTS, VECTOR, DEPTH, BLOCKS)                            \
    {#NAME, FAMILY_GATE_UP_STREAM, TYPE, WEIGHTS, VECTOR, BLOCKS, 0, 0, 0, 0},
#define MPAD_DOWN_STREAM(NAME, TYPE, WEIGHTS, VECTOR, DEPTH, BLOCKS)                               \
    {#NAME, FAMILY_DOWN_STREAM, TYPE, WEIGHTS, VECTOR, BLOCKS, 0, 0, 0, 0},
#define MPAD_GATE_UP_TILE(NAME, TYPE, WEIGHTS, VECTOR, BM, WM, WN, STAGES, BLOCKS)                 \
    {#NAME, FAMILY_GATE_UP_TILE, TYPE, WEIGHTS, VECTOR, BLOCKS, BM, (WM) * (WN), STAGES, 0},
#define MPAD_DOWN_TILE(NAME, TYPE, WEIGHTS, VECTOR, BM, WM, WN, STAGES, BLOCKS)                    \
    {#NAME, FAMILY_DOWN_TILE, TYPE, WEIGHTS, VECTOR, BLOCKS, BM, (WM) * (WN), STAGES, 0},
#define MPAD_GATE_UP_WARPGROUP(NAME, TYPE, WEIGHTS, BM, STAGES, BLOCKS)                            \
    {#NAME, FAMILY_GATE_UP_WARPGROUP, TYPE, WEIGHTS, true, BLOCKS, BM, (BM) / 16, STAGES, 0},
#define MPAD_DOWN_WARPGROUP(NAME, TYPE, WEIGHTS, BM, STAGES, BLOCKS)                               \
    {#NAME, FAMILY_DOWN_WARPGROUP, TYPE, WEIGHTS, true, BLOCKS, BM, (BM) / 16, STAGES, 0},
#define MPAD_GATE_UP_DECODED(NAME, TYPE, WEIGHTS, ROWS, GROUPS, STAGES, BLOCKS)                    \
    {#NAME, FAMILY_GATE_UP_DECODED, TYPE, WEIGHTS, true, BLOCKS, ROWS, 8, STAGES, GROUPS},
#define MPAD_DOWN_DECODED(NAME, TYPE, WEIGHTS, ROWS, GROUPS, STAGES, BLOCKS)                       \
    {#NAME, FAMILY_DOWN_DECODED, TYPE, WEIGHTS, true, BLOCKS, ROWS, 8, STAGES, GROUPS},
#define MPAD_COMBINE(NAME, TYPE)                                                                   \
    {.symbol = #NAME, .family = FAMILY_COMBINE, .dtype = TYPE, .is_vector = true},
#define MPAD_CODES(NAME, TYPE, STAGE, CODE)                                                        \
    {.symbol = #NAME, .family = FAMILY_CODES, .dtype = TYPE, .is_vector = CODE},
#define MPAD_GATE_UP_CODED(NAME, TYPE, WEIGHTS, VECTOR, BM, WM, WN, BLOCKS)                        \
    {#NAME, FAMILY_GATE_UP_CODED, TYPE, WEIGHTS, VECTOR, BLOCKS, BM, (WM) * (WN), 2, 0},
#define MPAD_DOWN_CODED(NAME, TYPE, WEIGHTS, VECTOR, BM, WM, WN, BLOCKS)                           \
    {#NAME, FAMILY_DOWN_CODED, TYPE, WEIGHTS, VECTOR, BLOCKS, BM, (WM) * (WN), 2, 0},
#define MPAD_GATE_UP_BYTES_TILE(NAME, TYPE, BM, WM, WN, BLOCKS)                                    \
    {#NAME, FAMILY_GATE_UP_BYTES_TILE, TYPE, Bytes, true, BLOCKS, BM, (WM) * (WN), 2, 0},
#define MPAD_DOWN_BYTES_TILE(NAME, TYPE, BM, WM, WN, BLOCKS)                                       \
    {#NAME, FAMILY_DOWN_BYTES_TILE, TYPE, Bytes, true, BLOCKS, BM, (WM) * (WN), 2, 0},
#define MPAD_GATE_UP_BYTES(NAME, TYPE, BM, STAGES, BLOCKS)                                         \
    {#NAME, FAMILY_GATE_UP_BYTES, TYPE, Bytes, true, BLOCKS, BM, (BM) / 16, STAGES, 0},
#define MPAD_DOWN_BYTES(NAME, TYPE, BM, STAGES, BLOCKS)                                            \
    {#NAME, FAMILY_DOWN_BYTES, TYPE, Bytes, true, BLOCKS, BM, (BM) / 16, STAGES, 0},
#include "variants.def"
#undef MPAD_ROUTE
#undef MPAD_GATE_UP_STREAM
#undef MPAD_DOWN_STREAM
#undef MPAD_GATE_UP_TILE
#undef MPAD_DOWN_TILE
#undef MPAD_GATE_UP_WARPGROUP
#undef MPAD_DOWN_WARPGROUP
#undef MPAD_GATE_UP_DECODED
#undef MPAD_DOWN_DECODED
#undef MPAD_COMBINE
#undef MPAD_CODES
#undef MPAD_GATE_UP_CODED
#undef MPAD_DOWN_CODED
#undef MPAD_GATE_UP_BYTES_TILE
#undef MPAD_DOWN_BYTES_TILE
#undef MPAD_GATE_UP_BYTES
#undef MPAD_DOWN_BYTES
};
enum { N_VARIANT = sizeof(VARIANTS) / sizeof(VARIANTS[0]) };

const char *mpad_gpu_symbol(int variant)
{
    return variant >= 0 && variant < N_VARIANT ? VARIANTS[variant].symbol : NULL;
}

static const struct {
    const char *name;
    int dtype, bits;
    bool is_prefill; /* has the kernels of that regime only; 16-bit weights have all in one part */
    bool is_coded;   /* x and h are rounded to codes */
} PARTS[] = {
    [MPAD_PART_BF16] = {"bf16", Bf16, Plain, false, false},
    [MPAD_PART_F16] = {"f16", F16, Plain, false, false},
    [MPAD_PART_BF16_W8] = {"bf16_w8", Bf16, Bytes, false, false},
    [MPAD_PART_F16_W8] = {"f16_w8", F16, Bytes, false, false},
    [MPAD_PART_BF16_W4] = {"bf16_w4", Bf16, Nibbles, false, false},
    [MPAD_PART_F16_W4] = {"f16_w4", F16, Nibbles, false, false},
    [MPAD_PART_BF16_W8_PREFILL] = {"bf16_w8_prefill", Bf16, Bytes, true, false},
    [MPAD_PART_F16_W8_PREFILL] = {"f16_w8_prefill", F16, Bytes, true, false},
    [MPAD_PART_BF16_W4_PREFILL] = {"bf16_w4_prefill", Bf16, Nibbles, true, false},
    [MPAD_PART_F16_W4_PREFILL] = {"f16_w4_prefill", F16, Nibbles, true, false},
    [MPAD_PART_BF16_W8X8] = {"bf16_w8x8", Bf16, Bytes, true, true},
    [MPAD_PART_F16_W8X8] = {"f16_w8x8", F16, Bytes, true, true},
    [MPAD_PART_BF16_W4X8] = {"bf16_w4x8", Bf16, Nibbles, true, true},
    [MPAD_PART_F16_W4X8] = {"f16_w4x8", F16, Nibbles, true, true},
};
_Static_assert(sizeof(PARTS) / sizeof(PARTS[0]) == MPAD_PART_COUNT, "a row per part");

const char *mpad_gpu_part_name(int part)
{
    return part >= 0 && part < MPAD_PART_COUNT ? PARTS[part].name : NULL;
}

static int part_find(int dtype, int bits, bool is_prefill, bool is_coded)
{
    int part = 0;
    while (PARTS[part].dtype != dtype || PARTS[part].bits != bits ||
           PARTS[part].is_prefill != (is_prefill && bits < Plain) ||
           PARTS[part].is_coded != is_coded)
        part++;
    return part;
}

static bool is_decoded(const variant *v)
{
    return v->family == FAMILY_GATE_UP_DECODED || v->family == FAMILY_DOWN_DECODED;
}

static bool is_warpgroup(const variant *v)
{
    return v->family == FAMILY_GATE_UP_WARPGROUP || v->family == FAMILY_DOWN_WARPGROUP ||
           v->family >= FAMILY_GATE_UP_BYTES || is_decoded(v);
}

static bool is_byte_tile(const variant *v)
{
    return v->family == FAMILY_GATE_UP_BYTES_TILE || v->family == FAMILY_DOWN_BYTES_TILE;
}

/* What serves several parts has no type or no bits. */
bool mpad_gpu_have_symbol(const mpad_gpu_target *target, int part, int variant)
{
    const struct variant *v = &VARIANTS[variant];
    bool is_coded = v->family >= FAMILY_CODES;
    bool is_tile = v->family == FAMILY_GATE_UP_TILE || v->family == FAMILY_DOWN_TILE || is_coded;
    bool is_stream = v->family == FAMILY_GATE_UP_STREAM || v->family == FAMILY_DOWN_STREAM;
    bool is_in_part = v->bits == PARTS[part].bits && is_coded == PARTS[part].is_coded &&
                      (v->bits == Plain || is_stream != PARTS[part].is_prefill);
    bool is_of_regime = v->family == FAMILY_COMBINE
                            ? PARTS[part].is_prefill || PARTS[part].bits == Plain
                            : !is_coded || PARTS[part].is_coded;
    return (!v->dtype || v->dtype == PARTS[part].dtype) && (!v->bits || is_in_part) &&
           is_of_regime && (target->have_wgmma || !is_warpgroup(v)) &&
           (target->have_tile || !is_tile) && (target->is_amd || !is_byte_tile(v));
}

/* Bits of a weight as it is stored. */
static int weight_bits(const mpad_moe *moe)
{
    return moe->quant == MPAD_QUANT_NONE        ? Plain
           : moe->weight_dtype == MPAD_DTYPE_U8 ? Nibbles
                                                : Bytes;
}

static bool is_of(const variant *v, enum family family, int dtype, int bits, int is_vector)
{
    return v->family == family && v->dtype == dtype && v->bits == bits && v->is_vector == is_vector;
}

static int variant_find(enum family family, int dtype, int bits, int is_vector)
{
    for (int i = 0; i < N_VARIANT; i++)
        if (is_of(&VARIANTS[i], family, dtype, bits, is_vector))
            return i;
    return -1;
}

/* Formats of weights that the matrix unit multiplies as bytes: int8, float8 fnuz, the other float8.
 */
enum { BYTES_INT8 = 1, BYTES_FNUZ = 2, BYTES_FN = 4 };

mpad_code mpad_gpu_target_make(const char *arch, int n_multiprocessor, mpad_gpu_target *target,
                               mpad_status *status)
{
    enum { KIB = 1024, INT8 = BYTES_INT8, FNUZ = BYTES_FNUZ, FN = BYTES_FN };
    static const mpad_gpu_target known[] = {
        /* name, amd, wgmma, tile, dependent, wave, units, LDS of a block, of a unit, tokens, pitch,
         * bytes */
        {"gfx90a", true, false, true, false, 64, 0, 64 * KIB, 64 * KIB, 16, 16, INT8},
        {"gfx942", true, false, true, false, 64, 0, 64 * KIB, 64 * KIB, 16, 16, INT8 | FNUZ},
        {"gfx950", true, false, true, false, 64, 0, 64 * KIB, 160 * KIB, 16, 16, INT8 | FN},
        {"gfx1100", true, false, false, false, 32, 0, 64 * KIB, 128 * KIB, 16, 16, 0},
        {"gfx1201", true, false, false, false, 32, 0, 64 * KIB, 128 * KIB, 16, 16, 0},
        {"sm_80", false, false, true, false, 32, 0, 163 * KIB, 164 * KIB, 8, 64, 0},
        {"sm_90", false, false, true, true, 32, 0, 227 * KIB, 228 * KIB, 8, 64, 0},
        {"sm_90a", false, true, true, true, 32, 0, 227 * KIB, 228 * KIB, 8, 64, INT8 | FN},
    };
    size_t n = strcspn(arch, ":");
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (strlen(known[i].name) == n && memcmp(known[i].name, arch, n) == 0) {
            *target = known[i];
            target->n_multiprocessor = n_multiprocessor > 0 ? n_multiprocessor : 1;
            return MPAD_OK;
        }
    }
    return mpad_fail(status, MPAD_UNSUPPORTED,
                     "arch: no kernels for %s; known: gfx90a, gfx942, gfx950, gfx1100, gfx1201, "
                     "sm_80, sm_90, sm_90a",
                     arch);
}

enum { ALL_COLUMNS = 30 }; /* log2 of more columns than there are */

static int log2_of(int n)
{
    int log2 = 0;
    while (n >> log2 > 1)
        log2++;
    return log2;
}

static int64_t round_up(int64_t n, int64_t to)
{
    return (n + to - 1) / to * to;
}

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static bool is_16_byte(const void *pointer, int64_t ld)
{
    return (uintptr_t)pointer % 16 == 0 && ld % 8 == 0;
}

static int64_t up_offset(const mpad_moe *moe)
{
    return moe->is_gated ? moe->w13_up_offset : 0;
}

/* Rows start on n_byte bytes, which are n_element stored elements, as strides count them. */
static bool is_w13_aligned(const mpad_moe *moe, int n_byte, int n_element)
{
    return (uintptr_t)moe->w13 % (unsigned)n_byte == 0 && moe->w13_ld_expert % n_element == 0 &&
           moe->w13_ld_row % n_element == 0 && up_offset(moe) % n_element == 0;
}

static bool is_w2_aligned(const mpad_moe *moe, int n_byte, int n_element)
{
    return (uintptr_t)moe->w2 % (unsigned)n_byte == 0 && moe->w2_ld_expert % n_element == 0 &&
           moe->w2_ld_row % n_element == 0;
}

/* Rows start on the bytes of a chunk, 8 elements. */
static bool is_vector_gate_up(const mpad_moe *moe)
{
    int bits = weight_bits(moe);
    return is_16_byte(moe->hidden, moe->ld_hidden) && is_w13_aligned(moe, bits, bits < 8 ? 4 : 8);
}

static bool is_vector_down(const mpad_moe *moe)
{
    int bits = weight_bits(moe);
    return is_w2_aligned(moe, bits, bits < 8 ? 4 : 8) && moe->n_inter % 8 == 0;
}

/* Rows of quantised weights start on 16 bytes and end with some. */
static bool is_w13_wide(const mpad_moe *moe)
{
    int bits = weight_bits(moe);
    return bits < Plain && is_w13_aligned(moe, 16, 16) && moe->n_hidden * bits % 128 == 0;
}

static bool is_w2_wide(const mpad_moe *moe)
{
    int bits = weight_bits(moe);
    return bits < Plain && is_w2_aligned(moe, 16, 16) && moe->n_inter * bits % 128 == 0;
}

/* Bytes of one expert's weights, up to the last logical element. */
static int64_t expert_bytes(int bits, int64_t last_row, int64_t n_column)
{
    return bits == Plain ? (last_row + n_column) * 2 : last_row + (n_column * bits + 7) / 8;
}

static int64_t w13_bytes(const mpad_moe *moe)
{
    return expert_bytes(weight_bits(moe), (moe->n_inter - 1) * moe->w13_ld_row + up_offset(moe),
                        moe->n_hidden);
}

static int64_t w2_bytes(const mpad_moe *moe)
{
    return expert_bytes(weight_bits(moe), (moe->n_hidden - 1) * moe->w2_ld_row, moe->n_inter);
}

/* How each float8 becomes bf16 and f16; see mpad_gpu_stored_float. A row's numbers
 * follow from the formats: the shift from their bits of mantissa, the factor from their biases. */
static const struct {
    mpad_dtype stored, dtype;
    unsigned shift, factor, special_xor, special_add, special_keep, special;
} FLOATS[] = {
    /* stored, T, shift, factor, xor, add, keep, special */
    {MPAD_DTYPE_F8_E4M3FN, MPAD_DTYPE_BF16, 4, 0x7b80, 0, 0x01, 0x80, 0x7fc0},
    {MPAD_DTYPE_F8_E4M3FN, MPAD_DTYPE_F16, 1, 0x5c00, 0, 0x01, 0x80, 0x7e00},
    {MPAD_DTYPE_F8_E4M3FNUZ, MPAD_DTYPE_BF16, 4, 0x7b00, 0x7f, 0x01, 0, 0x7fc0},
    {MPAD_DTYPE_F8_E4M3FNUZ, MPAD_DTYPE_F16, 1, 0x5800, 0x7f, 0x01, 0, 0x7e00},
    {MPAD_DTYPE_F8_E5M2, MPAD_DTYPE_BF16, 3, 0x7780, 0, 0x04, 0x80, 0x7f80},
    {MPAD_DTYPE_F8_E5M2, MPAD_DTYPE_F16, 0, 0x3c00, 0, 0, 0x80, 0}, /* the high byte of an f16 */
};

static mpad_gpu_stored_float stored_float(const mpad_moe *moe)
{
    for (size_t i = 0; i < sizeof FLOATS / sizeof FLOATS[0]; i++)
        if (FLOATS[i].stored == moe->weight_dtype && FLOATS[i].dtype == moe->dtype)
            return (mpad_gpu_stored_float){
                .shift = FLOATS[i].shift,
                .factor = FLOATS[i].factor * 0x10001u,
                .special_xor = FLOATS[i].special_xor * 0x01010101u,
                .special_add = FLOATS[i].special_add * 0x01010101u,
                .special_keep = FLOATS[i].special_keep * 0x01010101u,
                .special = FLOATS[i].special,
            };
    return (mpad_gpu_stored_float){0};
}

static int weight_values(const mpad_moe *moe)
{
    if (moe->quant == MPAD_QUANT_INT8_CHANNEL || moe->quant == MPAD_QUANT_INT4_GROUP)
        return MPAD_GPU_VALUES_INTEGER;
    return moe->weight_dtype == MPAD_DTYPE_F8_E4M3FN     ? MPAD_GPU_VALUES_E4M3FN
           : moe->weight_dtype == MPAD_DTYPE_F8_E4M3FNUZ ? MPAD_GPU_VALUES_E4M3FNUZ
           : moe->weight_dtype == MPAD_DTYPE_F8_E5M2     ? MPAD_GPU_VALUES_E5M2
           : moe->weight_dtype == MPAD_DTYPE_U8          ? MPAD_GPU_VALUES_E2M1
                                                         : MPAD_GPU_VALUES_OTHER;
}

static bool is_power_of_two(int64_t n)
{
    return n > 0 && (n & (n - 1)) == 0;
}

/* A slab's 32 columns have one scale per row. */
static mpad_code check_scale(const mpad_scale *scale, const char *name, mpad_status *status)
{
    MPAD_REQUIRE(
        is_power_of_two(scale->block_row) || scale->ld_row == 0, status, MPAD_UNSUPPORTED,
        "block: on a GPU rows of a power of two, got %lld (%s); run on the CPU, or load with "
        "scales of other blocks",
        (long long)scale->block_row, name);
    MPAD_REQUIRE((is_power_of_two(scale->block_column) && scale->block_column >= 32) ||
                     scale->ld_column == 0,
                 status, MPAD_UNSUPPORTED,
                 "block: on a GPU columns of a power of two from 32 on, got %lld (%s); run on the "
                 "CPU, or load with scales of other blocks",
                 (long long)scale->block_column, name);
    MPAD_REQUIRE(scale->column_phase % 32 == 0 || scale->ld_column == 0, status, MPAD_UNSUPPORTED,
                 "scale_phase: on a GPU a multiple of 32, got %lld; run on the CPU, or split by 32 "
                 "columns",
                 (long long)scale->column_phase);
    return MPAD_OK;
}

static mpad_code check_quant(const mpad_gpu_target *target, const mpad_moe *moe,
                             mpad_status *status)
{
    if (moe->quant == MPAD_QUANT_NONE)
        return MPAD_OK;
    MPAD_REQUIRE(moe->input == MPAD_INPUT_NONE || target->have_tile, status, MPAD_UNSUPPORTED,
                 "quant_activations: on %s \"none\", it has no kernel that quantises activations; "
                 "leave it out, or run on the CPU",
                 target->name);
    bool is_flushed = strcmp(target->name, "gfx90a") == 0 &&
                      moe->weight_dtype == MPAD_DTYPE_F8_E5M2 && moe->dtype == MPAD_DTYPE_F16;
    MPAD_REQUIRE(!is_flushed, status, MPAD_UNSUPPORTED,
                 "hidden_states: with f8_e5m2 weights on %s bf16, got f16: its matrix instructions "
                 "take subnormal f16 as zero, and float8 matrix instructions it has none; convert, "
                 "or run on the CPU",
                 target->name);
    MPAD_TRY(check_scale(&moe->w13_scale, "w13_scale", status));
    return check_scale(&moe->w2_scale, "w2_scale", status);
}

static mpad_code check(const mpad_gpu_target *target, const mpad_moe *moe, mpad_status *status)
{
    const int64_t limit = INT64_C(1) << 31;
    MPAD_REQUIRE(moe->dtype == MPAD_DTYPE_BF16 || moe->dtype == MPAD_DTYPE_F16, status,
                 MPAD_UNSUPPORTED,
                 "hidden_states: on a GPU bf16 or f16; convert, or run on the CPU");
    MPAD_REQUIRE(moe->n_hidden % 8 == 0, status, MPAD_UNSUPPORTED,
                 "n_hidden: on a GPU a multiple of 8, got %lld; pad the model width with zeros",
                 (long long)moe->n_hidden);
    MPAD_REQUIRE(moe->n_topk <= 32, status, MPAD_UNSUPPORTED,
                 "topk_ids: on a GPU at most 32 slots per token, got %lld", (long long)moe->n_topk);
    MPAD_REQUIRE(moe->n_expert <= 1024, status, MPAD_UNSUPPORTED,
                 "w13: on a GPU at most 1024 experts, got %lld", (long long)moe->n_expert);
    MPAD_REQUIRE(moe->n_token_pad * moe->n_topk < limit / 64, status, MPAD_UNSUPPORTED,
                 "topk_ids: too many slots for one call on a GPU: %lld x %lld",
                 (long long)moe->n_token_pad, (long long)moe->n_topk);
    MPAD_REQUIRE(w13_bytes(moe) < limit && w2_bytes(moe) < limit, status, MPAD_UNSUPPORTED,
                 "w13, w2: one expert's weights must stay below 2 GiB on a GPU");
    return check_quant(target, moe, status);
}

static void launch_add(const mpad_gpu_target *target, mpad_gpu_plan *plan, int variant,
                       int64_t grid, int block, int lds_bytes)
{
    plan->launch[plan->n_launch++] = (mpad_gpu_launch){
        .symbol = VARIANTS[variant].symbol,
        .variant = variant,
        .grid = (unsigned)grid,
        .block = (unsigned)block,
        .lds_bytes = (unsigned)lds_bytes,
        .is_dependent = target->have_dependent_launch,
    };
}

/* Takes the next part of the workspace and returns its offset. */
static int64_t workspace_take(mpad_gpu_plan *plan, int64_t n_bytes)
{
    int64_t offset = plan->workspace_bytes;
    plan->workspace_bytes += round_up(n_bytes, 256);
    return offset;
}

/* The sorted order in the workspace, by one block or, beyond a few thousand pairs, by several. */
static void plan_route(const mpad_gpu_target *target, const mpad_moe *moe, mpad_gpu_plan *plan)
{
    enum { PAIRS_PER_BLOCK = 1024, MAX_BLOCK = 128 };
    int64_t n_pair = moe->n_token * moe->n_topk;
    plan->is_sorted = 1;
    int lds_one = mpad_lds_sort((int)n_pair, (int)moe->n_expert);
    bool is_one = n_pair <= MPAD_ROUTE_ONE_MAX && lds_one <= target->lds_bytes;
    plan->n_sort_block =
        is_one ? 1 : (int)smaller((n_pair + PAIRS_PER_BLOCK - 1) / PAIRS_PER_BLOCK, MAX_BLOCK);
    plan->perm = workspace_take(plan, n_pair * 4);
    plan->slot = workspace_take(plan, n_pair * 4);
    plan->pair_weight = workspace_take(plan, n_pair * 4);
    /* Rows of a job depend on pointers, the workspace must not: room for jobs of one row. */
    plan->job = workspace_take(plan, n_pair * (int64_t)sizeof(mpad_gpu_job));
    plan->n_job = workspace_take(plan, 4);
    if (is_one) {
        launch_add(target, plan, variant_find(FAMILY_ROUTE, 0, 0, ROUTE_ONE), 1, MPAD_ROUTE_THREADS,
                   lds_one);
        return;
    }
    /* A wave's counts of 1024 experts take 4 KiB of LDS. */
    int n_wave = moe->n_expert > 256 ? 8 : MPAD_ROUTE_THREADS / target->wave;
    int lds = mpad_lds_route(n_wave, (int)moe->n_expert);
    plan->count = workspace_take(plan, plan->n_sort_block * moe->n_expert * 4);
    launch_add(target, plan, variant_find(FAMILY_ROUTE, 0, 0, ROUTE_COUNT), plan->n_sort_block,
               n_wave * target->wave, lds);
    launch_add(target, plan, variant_find(FAMILY_ROUTE, 0, 0, ROUTE_SORT), plan->n_sort_block,
               n_wave * target->wave, lds);
}

/* Few rows per expert: the weights stream through registers, once. */
static mpad_code plan_stream(const mpad_gpu_target *target, const mpad_moe *moe, bool is_inline,
                             mpad_gpu_plan *plan, mpad_status *status)
{
    int n_pair = (int)(moe->n_token * moe->n_topk), n_inline = is_inline ? n_pair : 0;
    int block = MPAD_STREAM_WAVES * target->wave;
    int dtype = (int)moe->dtype, bits = weight_bits(moe);
    int gate_up = variant_find(FAMILY_GATE_UP_STREAM, dtype, bits, is_vector_gate_up(moe));
    /* A block of the second product owns columns; all blocks should run at once, evenly spread:
     * the fewer they are, the deeper each one's queue of loads and the fewer share a
     * multiprocessor. */
    int64_t n_down = (moe->n_hidden + MPAD_STREAM_COLUMNS - 1) / MPAD_STREAM_COLUMNS;
    bool is_vector = is_vector_down(moe);
    int down = variant_find(FAMILY_DOWN_STREAM, dtype, bits, is_vector);
    for (int v = down; is_vector && v < N_VARIANT; v++) {
        if (!is_of(&VARIANTS[v], FAMILY_DOWN_STREAM, dtype, bits, is_vector))
            break;
        down = v; /* rows of the table are by blocks, ascending */
        if (n_down <= (int64_t)VARIANTS[v].blocks * target->n_multiprocessor)
            break;
    }

    /* Rows of a job: a token chooses an expert once as a rule, so n_token bounds them. Rows beyond
     * a job's cost a second pass over the weights; a smaller LDS buffer lets more blocks share a
     * multiprocessor. Twice the mean and two keeps second passes rare. */
    int64_t mean = n_pair / (moe->n_expert > 0 ? moe->n_expert : 1);
    int64_t want = smaller(smaller(moe->n_token, 2 * mean + 2), target->token_tile);
    int n_row = 1, lds = 0;
    while (n_row < want)
        n_row *= 2;
    for (;; n_row /= 2) {
        lds = mpad_lds_gate_up(n_inline, (int)moe->n_expert, (int)moe->n_hidden, n_row, bits,
                               target->lds_pitch, target->token_tile);
        if (lds * 2 + 2048 <= target->lds_multiprocessor || n_row == 1)
            break;
    }
    MPAD_REQUIRE(
        lds <= target->lds_bytes, status, MPAD_UNSUPPORTED,
        "n_hidden: %lld is too wide for %s: a row of hidden_states must fit LDS (%d bytes)",
        (long long)moe->n_hidden, target->name, target->lds_bytes);
    plan->n_row_job = n_row;
    plan->n_column_tile_gate_up =
        (int)((moe->n_inter + (moe->is_gated ? 7 : 15)) / (moe->is_gated ? 8 : 16));
    plan->n_column_tile_down =
        (int)((moe->n_hidden + MPAD_STREAM_COLUMNS - 1) / MPAD_STREAM_COLUMNS);
    if (!is_inline)
        plan_route(target, moe, plan);

    /* Blocks take equal runs of tiles; a grid of whole rounds over what fits at once would leave
     * some with one tile more than others where there are few. */
    int fits = target->lds_multiprocessor / (lds + 1024);
    fits = fits > VARIANTS[gate_up].blocks ? VARIANTS[gate_up].blocks : fits > 0 ? fits : 1;
    int64_t n_slot = (int64_t)target->n_multiprocessor * fits;
    int64_t n_job = smaller(n_pair, moe->n_expert + n_pair / n_row);
    int64_t n_tile = n_job * plan->n_column_tile_gate_up;
    int64_t n_round = (n_tile + n_slot - 1) / n_slot;
    int64_t grid = n_round > 0 ? (n_tile + n_round - 1) / n_round : 0;
    if (grid > 0)
        launch_add(target, plan, gate_up, grid, block, lds);
    launch_add(target, plan, down, plan->n_column_tile_down, block,
               mpad_lds_down(n_pair, n_inline, (int)moe->n_expert));
    return MPAD_OK;
}

/* The variant of a tile family whose jobs hold `want` rows, or the most there are. */
static int tile_find(enum family family, int dtype, int bits, int is_vector, int64_t want)
{
    int best = -1;
    for (int i = 0; i < N_VARIANT; i++) {
        const variant *v = &VARIANTS[i];
        if (!is_of(v, family, dtype, bits, is_vector))
            continue;
        bool is_enough = best >= 0 && VARIANTS[best].rows >= want;
        if (best < 0 || (is_enough ? v->rows >= want && v->rows < VARIANTS[best].rows
                                   : v->rows > VARIANTS[best].rows))
            best = i;
    }
    return best;
}

/* Columns of a stage of the warpgroup kernels, and their LDS. */
static int stage_columns(const variant *v)
{
    if (is_decoded(v))
        return v->groups * 512 / v->bits;
    return v->family >= FAMILY_GATE_UP_BYTES ? 128 : 64;
}

static int lds_warpgroup(const variant *v, int n_token_stage)
{
    if (is_decoded(v))
        return mpad_lds_decoded(v->rows, v->bits, v->groups, v->stages, n_token_stage);
    int n_byte = stage_columns(v) * v->bits / 8;
    return mpad_lds_warpgroup(v->rows, n_byte, v->stages, n_token_stage);
}

/* Where k is so short that beginning and end of a block take as long as its products, a block of
 * the warpgroup kernels takes as many tiles as make up for them, as long as there are blocks to
 * fill the device a few times; and keeps all k of its rows of tokens where that lets as many blocks
 * share a multiprocessor. */
static mpad_gpu_tile_run run_of(const mpad_gpu_target *target, const variant *v, int64_t n_job,
                                int n_tile, int64_t n_k, int64_t n_stage)
{
    enum { ENOUGH_BYTES = 4096, ROUNDS = 4, RESERVED = 1024 };
    int64_t n_byte = n_k * v->bits / 8;
    int64_t n_slot = (int64_t)target->n_multiprocessor * v->blocks;
    int64_t n = smaller(ENOUGH_BYTES / (n_byte + 1), n_job * n_tile / (n_slot * ROUNDS));
    n = n < 1 ? 1 : smaller(n, n_tile);
    bool fits = n_stage <= 64 &&
                lds_warpgroup(v, (int)n_stage) + RESERVED <= target->lds_multiprocessor / v->blocks;
    return (mpad_gpu_tile_run){.n_tile = (int)n, .is_token_shared = n > 1 && fits};
}

/* Adds a product of `n_job` jobs and `n_tile` column tiles over `n_k` columns, of which the first
 * stage begins `skip` before the first. */
static mpad_gpu_tile_run tile_add(const mpad_gpu_target *target, mpad_gpu_plan *plan, int variant,
                                  int64_t n_job, int n_tile, int64_t n_k, int64_t skip)
{
    const struct variant *v = &VARIANTS[variant];
    int n_stage = target->is_amd && v->stages > 2 ? 2 : v->stages; /* TILE_MAX_STAGES */
    mpad_gpu_tile_run run = {.n_tile = 1};
    int lds = v->bits == Plain ? mpad_lds_tile(v->rows, n_stage)
                               : mpad_lds_tile_stored(v->rows, v->family >= FAMILY_CODES);
    if (is_warpgroup(v)) {
        int64_t n_k_stage = (n_k + skip + stage_columns(v) - 1) / stage_columns(v);
        run = run_of(target, v, n_job, n_tile, n_k + skip, n_k_stage);
        lds = lds_warpgroup(v, run.is_token_shared ? (int)n_k_stage : n_stage);
    }
    int64_t grid = n_job * ((n_tile + run.n_tile - 1) / run.n_tile);
    if (grid > 0)
        launch_add(target, plan, variant, grid, v->waves * target->wave, lds);
    return run;
}

/* The rows of x or h as codes, their place in the workspace, the launch that makes them. Rows of
 * the bytes of T, whichever codes a call takes: the workspace depends on sizes alone. */
static void plan_codes(const mpad_gpu_target *target, const mpad_moe *moe, int stage, int64_t n_row,
                       mpad_gpu_plan *plan)
{
    const mpad_scale *weights = stage == CODES_X ? &moe->w13_scale : &moe->w2_scale;
    const float *fixed = stage == CODES_X ? moe->x_scale : moe->h_scale;
    int64_t n_k = stage == CODES_X ? moe->n_hidden : moe->n_inter;
    mpad_gpu_plan_codes *codes = stage == CODES_X ? &plan->x : &plan->h;
    bool is_grouped = weights->ld_column != 0 && !fixed;
    codes->ld = round_up(n_k, 32);
    codes->group_log2 = is_grouped ? log2_of((int)weights->block_column) : ALL_COLUMNS;
    codes->phase = is_grouped ? (int)weights->column_phase : 0;
    codes->n_group = (int)((codes->phase + n_k - 1) >> codes->group_log2) + 1;
    /* A thread has 8 columns, of long runs more. A wave's tasks end together, or a task has waves.
     */
    int64_t n_run = is_grouped ? smaller(weights->block_column, n_k) : n_k;
    codes->n_lane = 1;
    while (codes->n_lane < MPAD_CODES_THREADS && codes->n_lane * 8 < n_run)
        codes->n_lane *= 2;
    codes->code = workspace_take(plan, n_row * codes->ld * 2);
    codes->scale = workspace_take(plan, n_row * (n_k / 32 + 2) * 4); /* runs of 32 at least */
    int64_t n_task = n_row * codes->n_group, per_block = MPAD_CODES_THREADS / codes->n_lane;
    if (n_k > 0)
        launch_add(target, plan, variant_find(FAMILY_CODES, (int)moe->dtype, 0, stage),
                   (n_task + per_block - 1) / per_block, MPAD_CODES_THREADS,
                   mpad_lds_codes(target->wave));
}

/* Scales by column have blocks of whole stages of 128 columns, from which a half tile's 64 rows of
 * the warpgroup kernels take one. */
static bool is_bytes_scale(const mpad_gpu_target *target, const mpad_scale *scale)
{
    bool is_half_one = scale->block_row % 64 == 0 && scale->row_phase % 64 == 0;
    return scale->dtype == MPAD_DTYPE_F32 &&
           (scale->ld_column == 0 ||
            (scale->block_column % 128 == 0 && scale->column_phase % 16 == 0 &&
             (is_half_one || !target->have_wgmma)));
}

/* Whether the matrix unit takes codes and weights as the bytes they are. */
static bool is_bytes(const mpad_gpu_target *target, const mpad_moe *moe)
{
    unsigned format = moe->weight_dtype == MPAD_DTYPE_I8            ? BYTES_INT8
                      : moe->weight_dtype == MPAD_DTYPE_F8_E4M3FNUZ ? BYTES_FNUZ
                                                                    : BYTES_FN;
    return moe->input != MPAD_INPUT_NONE && (target->bytes & format) && moe->n_hidden > 0 &&
           moe->n_inter > 0 && is_w13_wide(moe) && is_w2_wide(moe) &&
           is_bytes_scale(target, &moe->w13_scale) && is_bytes_scale(target, &moe->w2_scale);
}

/* Whether weights with such scales are decoded where wgmma multiplies them as T: scales are one a
 * row; e8m0, which are factors of the weights; or one for whole groups of columns of decoded tiles,
 * and, where `is_by_half`, for 64 rows and whole stages of the warpgroup tiles. */
static bool is_decoded_scale(const mpad_moe *moe, const mpad_scale *scale, bool is_by_half)
{
    int bits = weight_bits(moe), group = is_by_half ? 64 : 512 / bits;
    if (scale->ld_column == 0)
        return bits == Bytes;
    if (scale->dtype == MPAD_DTYPE_F8_E8M0)
        return moe->dtype == MPAD_DTYPE_BF16 && scale->block_column == 32;
    return (bits == Nibbles ? !is_by_half : scale->dtype == MPAD_DTYPE_F32) &&
           scale->block_column % group == 0 && scale->column_phase % group == 0 &&
           (!is_by_half || (scale->block_row % 64 == 0 && scale->row_phase % 64 == 0));
}

static bool is_decoded_weights(const mpad_moe *moe, bool is_by_half)
{
    int values = weight_values(moe);
    bool is_known = values == MPAD_GPU_VALUES_INTEGER || values == MPAD_GPU_VALUES_E4M3FN ||
                    values == MPAD_GPU_VALUES_E2M1;
    return weight_bits(moe) < Plain && moe->input == MPAD_INPUT_NONE && is_known &&
           is_w13_wide(moe) && is_w2_wide(moe) &&
           is_decoded_scale(moe, &moe->w13_scale, is_by_half) &&
           is_decoded_scale(moe, &moe->w2_scale, is_by_half);
}

/* Many rows per expert: two grouped products through LDS and a sum over the slots. */
static mpad_code plan_tile(const mpad_gpu_target *target, const mpad_moe *moe, mpad_gpu_plan *plan,
                           mpad_status *status)
{
    const int64_t limit = INT64_C(1) << (target->is_amd ? 31 : 32);
    bool is_coded = moe->input != MPAD_INPUT_NONE;
    int64_t ld = is_coded ? round_up(moe->n_hidden, 32) : moe->ld_hidden;
    MPAD_REQUIRE(((moe->n_token - 1) * ld + moe->n_hidden) * 2 < limit, status, MPAD_UNSUPPORTED,
                 "hidden_states: its rows must lie within %lld bytes on %s; split the call",
                 (long long)limit, target->name);
    int64_t n_pair = moe->n_token * moe->n_topk;
    /* Half again the mean covers most experts with one job; a second one reads the weights again.
     */
    int64_t mean = n_pair / (moe->n_expert > 0 ? moe->n_expert : 1), want = mean + (mean + 1) / 2;
    int dtype = (int)moe->dtype, bits = weight_bits(moe);
    bool is_vector = is_vector_gate_up(moe) && is_vector_down(moe); /* they share the job list */
    bool is_many = want > (bits < 8 ? 16 : 32); /* for the registers of decoded tiles */
    bool is_wgmma = target->have_wgmma && is_vector && is_many &&
                    (bits == Plain || is_decoded_weights(moe, true));
    bool is_few = target->have_wgmma && is_vector && want <= 32 && !is_wgmma &&
                  is_decoded_weights(moe, false);
    plan->is_code_byte = is_bytes(target, moe);
    is_vector = is_vector || plan->is_code_byte;
    enum family family = plan->is_code_byte && target->have_wgmma ? FAMILY_GATE_UP_BYTES
                         : plan->is_code_byte                     ? FAMILY_GATE_UP_BYTES_TILE
                         : is_coded                               ? FAMILY_GATE_UP_CODED
                         : is_wgmma                               ? FAMILY_GATE_UP_WARPGROUP
                         : is_few                                 ? FAMILY_GATE_UP_DECODED
                                                                  : FAMILY_GATE_UP_TILE;
    int gate_up = tile_find(family, dtype, bits, is_vector, want);
    plan->n_row_job = VARIANTS[gate_up].rows;
    plan_route(target, moe, plan);
    if (is_coded)
        plan_codes(target, moe, CODES_X, moe->n_token, plan);
    plan->ld_route = moe->n_hidden;
    plan->route = workspace_take(plan, n_pair * plan->ld_route * 2);
    int width = moe->is_gated ? 64 : 128; /* TILE_HALF, TILE_B */
    plan->n_column_tile_gate_up = (int)((moe->n_inter + width - 1) / width);
    plan->n_column_tile_down = (int)((moe->n_hidden + 127) / 128);
    int64_t n_job = smaller(n_pair, moe->n_expert + n_pair / plan->n_row_job);
    plan->run_gate_up =
        tile_add(target, plan, gate_up, n_job, plan->n_column_tile_gate_up, moe->n_hidden, 0);
    if (is_coded)
        plan_codes(target, moe, CODES_H, n_pair, plan);
    int down = tile_find(family + 1, dtype, bits, is_vector, plan->n_row_job);
    plan->run_down = tile_add(target, plan, down, n_job, plan->n_column_tile_down, moe->n_inter,
                              plan->is_code_byte ? moe->w2_scale.column_phase % 128 : 0);
    int64_t columns = 8 * MPAD_COMBINE_THREADS;
    launch_add(target, plan, variant_find(FAMILY_COMBINE, (int)moe->dtype, 0, true),
               moe->n_token_pad * ((moe->n_hidden_pad + columns - 1) / columns),
               MPAD_COMBINE_THREADS, 0);
    return MPAD_OK;
}

mpad_code mpad_gpu_plan_make(const mpad_gpu_target *target, const mpad_moe *moe,
                             mpad_gpu_plan *plan, mpad_status *status)
{
    MPAD_TRY(check(target, moe, status));
    *plan = (mpad_gpu_plan){.route = -1, .perm = -1, .slot = -1, .pair_weight = -1};
    plan->x.code = plan->x.scale = plan->h.code = plan->h.scale = -1;
    plan->job = plan->n_job = plan->count = -1;
    bool is_coded = moe->input != MPAD_INPUT_NONE;
    int64_t n_pair = moe->n_token * moe->n_topk;
    /* Up to 16 tokens of 8 slots the two stream kernels win, beyond the tiles' four launches; on
     * Hopper up to 32. 896: of 64 bytes of LDS in 64 KiB. */
    int64_t n_stream = !target->have_tile ? 896 : target->have_dependent_launch ? 256 : 128;
    bool is_prefill = n_pair > n_stream || is_coded;
    plan->part = part_find((int)moe->dtype, weight_bits(moe), is_prefill, is_coded);
    if (moe->n_token_pad == 0 || moe->n_hidden_pad == 0)
        return MPAD_OK;
    plan->ld_inter = round_up(moe->n_inter, 32);
    plan->inter = workspace_take(plan, n_pair * plan->ld_inter * (is_coded ? 4 : 2));
    if (!is_prefill) {
        bool is_inline = n_pair <= MPAD_SORT_INLINE_MAX;
        plan->regime = is_inline ? "decode" : "middle";
        return plan_stream(target, moe, is_inline, plan, status);
    }
    MPAD_REQUIRE(
        target->have_tile, status, MPAD_UNSUPPORTED,
        "hidden_states: at most %lld slots (tokens * top-k) per call on %s, got %lld; split "
        "the call",
        (long long)n_stream, target->name, (long long)n_pair);
    plan->regime = "prefill";
    return plan_tile(target, moe, plan, status);
}

static int element_code(mpad_dtype dtype)
{
    switch (dtype) {
    case MPAD_DTYPE_BF16:
        return MPAD_GPU_BF16;
    case MPAD_DTYPE_F16:
        return MPAD_GPU_F16;
    case MPAD_DTYPE_I32:
        return MPAD_GPU_I32;
    case MPAD_DTYPE_I64:
        return MPAD_GPU_I64;
    case MPAD_DTYPE_F8_E8M0:
        return MPAD_GPU_E8M0;
    default:
        return MPAD_GPU_F32;
    }
}

static void *workspace_at(void *workspace, int64_t offset)
{
    return offset < 0 ? NULL : (char *)workspace + offset;
}

static mpad_gpu_codes codes_make(const mpad_gpu_plan_codes *codes, const float *fixed,
                                 void *workspace)
{
    if (codes->n_lane == 0)
        return (mpad_gpu_codes){0};
    return (mpad_gpu_codes){
        .code = workspace_at(workspace, codes->code),
        .scale = workspace_at(workspace, codes->scale),
        .fixed = fixed,
        .ld = codes->ld,
        .n_group = codes->n_group,
        .group_log2 = codes->group_log2,
        .phase = codes->phase,
        .n_lane = codes->n_lane,
        .lane_log2 = log2_of(codes->n_lane),
    };
}

static mpad_gpu_scale scale_make(const mpad_scale *scale)
{
    bool by_column = scale->ld_column != 0;
    return (mpad_gpu_scale){
        .data = scale->data,
        .ld_expert = scale->ld_expert,
        .ld_row = (int)scale->ld_row,
        .ld_column = (int)scale->ld_column,
        .up_offset = (int)scale->up_offset,
        .row_log2 = scale->ld_row != 0 ? log2_of((int)scale->block_row) : 0,
        .column_log2 = by_column ? log2_of((int)scale->block_column) : ALL_COLUMNS,
        .row_phase = (int)scale->row_phase,
        .column_phase = by_column ? (int)scale->column_phase : 0,
        .type = element_code(scale->dtype),
    };
}

void mpad_gpu_args_make(const mpad_gpu_plan *plan, const mpad_moe *moe, const void *n_token_d,
                        mpad_dtype n_token_type, void *workspace, mpad_gpu_args *args)
{
    mpad_input_format code = input_format_of(moe);
    *args = (mpad_gpu_args){
        .hidden = moe->hidden,
        .out = moe->out,
        .w13 = moe->w13,
        .w2 = moe->w2,
        .w13_bias = moe->w13_bias,
        .w2_bias = moe->w2_bias,
        .topk_weights = moe->topk_weights,
        .topk_ids = moe->topk_ids,
        .expert_map = moe->expert_map,
        .n_token_d = n_token_d,
        .inter = workspace_at(workspace, plan->inter),
        .route = workspace_at(workspace, plan->route),
        .perm = workspace_at(workspace, plan->perm),
        .slot = workspace_at(workspace, plan->slot),
        .pair_weight = workspace_at(workspace, plan->pair_weight),
        .job = workspace_at(workspace, plan->job),
        .n_job = workspace_at(workspace, plan->n_job),
        .count = workspace_at(workspace, plan->count),
        .ld_hidden = moe->ld_hidden,
        .ld_out = moe->ld_out,
        .w13_ld_expert = moe->w13_ld_expert,
        .w2_ld_expert = moe->w2_ld_expert,
        .w13_bias_ld_expert = moe->w13_bias_ld_expert,
        .w2_bias_ld_expert = moe->w2_bias_ld_expert,
        .w13_bias_ld_row = moe->w13_bias_ld_row,
        .w13_bias_up_offset = moe->w13_bias_up_offset,
        .ld_topk_weights = moe->ld_topk_weights,
        .ld_topk_ids = moe->ld_topk_ids,
        .ld_inter = plan->ld_inter,
        .ld_route = plan->ld_route,
        .w13_ld_row = (int)moe->w13_ld_row,
        .w13_up_offset = (int)up_offset(moe),
        .w2_ld_row = (int)moe->w2_ld_row,
        .w13_bytes = moe->n_inter > 0 ? (int)w13_bytes(moe) : 0,
        .w2_bytes = moe->n_inter > 0 ? (int)w2_bytes(moe) : 0,
        .n_token = (int)moe->n_token,
        .n_token_pad = (int)moe->n_token_pad,
        .n_topk = (int)moe->n_topk,
        .n_pair = (int)(moe->n_token * moe->n_topk),
        .n_expert = (int)moe->n_expert,
        .n_expert_global = (int)moe->n_expert_global,
        .n_hidden = (int)moe->n_hidden,
        .n_hidden_pad = (int)moe->n_hidden_pad,
        .n_inter = (int)moe->n_inter,
        .act = (int)moe->act,
        .is_gated = moe->is_gated,
        .is_weight_on_input = moe->is_weight_on_input,
        .routed_scaling = moe->routed_scaling,
        .swiglu_alpha = moe->swiglu_alpha,
        .swiglu_limit = moe->swiglu_limit,
        .w13_bias_type = element_code(moe->w13_bias_dtype),
        .w2_bias_type = element_code(moe->w2_bias_dtype),
        .topk_weights_type = element_code(moe->topk_weights_dtype),
        .topk_ids_type = element_code(moe->topk_ids_dtype),
        .expert_map_type = element_code(moe->expert_map_dtype),
        .n_token_type = element_code(n_token_type),
        .w13_scale = scale_make(&moe->w13_scale),
        .w2_scale = scale_make(&moe->w2_scale),
        .stored_float = stored_float(moe),
        .weight_values = weight_values(moe),
        .is_w13_wide = is_w13_wide(moe),
        .is_w2_wide = is_w2_wide(moe),
        .is_code_byte = plan->is_code_byte,
        .x = codes_make(&plan->x, moe->x_scale, workspace),
        .h = codes_make(&plan->h, moe->h_scale, workspace),
        .code_largest = code.largest,
        .code_least_exponent = code.smallest_exponent,
        .code_mantissa = code.n_mantissa,
        .is_code_mx = input_is_mx(moe->input),
        .is_hidden_vector = is_16_byte(moe->hidden, moe->ld_hidden),
        .n_row_job = plan->n_row_job,
        .row_job_log2 = log2_of(plan->n_row_job),
        .topk_reciprocal =
            moe->n_topk > 1 ? (unsigned)(((INT64_C(1) << 32) + moe->n_topk - 1) / moe->n_topk) : 0,
        .is_sorted = plan->is_sorted,
        .n_sort_block = plan->n_sort_block,
        .n_column_tile_gate_up = plan->n_column_tile_gate_up,
        .n_column_tile_down = plan->n_column_tile_down,
        .run_gate_up = plan->run_gate_up,
        .run_down = plan->run_down,
    };
}
