/* Sums of a few rows and a few blocks of columns: the inner loops of products (linear.h). */
#pragma once

#include "api.h"
#include "vector.h"

#define PREFETCH 4096 /* bytes */
#define AHEAD_DEPTH (PREFETCH / (2 * LANES)) /* of k, in a block of 16 columns */

#if defined(__AMX_BF16__)
#define GRID_ROWS 32
#define GRID_BLOCKS 2
#elif defined(__AVX512BF16__)
#define GRID_ROWS 6
#define GRID_BLOCKS 4
#elif defined(__AVX512F__)
#define GRID_ROWS 8
#define GRID_BLOCKS 2
#else
#define GRID_ROWS 4
#define GRID_BLOCKS 1
#endif
#define FEW_BLOCKS 4 /* blocks of 16 columns that are summed side by side for few rows */
#if defined(__AMX_BF16__)
#define FEW_ROWS 2
#elif defined(__AVX512F__)
#define FEW_ROWS 4
#else
#define FEW_ROWS 1
#endif

/* Rows as the inner loops read them: bfloat16 where these multiply pairs, else float. */
#ifdef PAIRS
typedef bf16 factor;
#else
typedef float factor;
#endif

/* What is asked for with number k of a block is at ahead[block] + k * LANES. That is AHEAD_DEPTH further in the block, and
 * behind its end the beginning of the block of the panel that comes next, if the caller names it. */
INLINE void ask_ahead(int blocks, const bf16 *const *weight, const bf16 **ahead) {
#pragma GCC unroll 4
    for (int block = 0; block < blocks; block++)
        ahead[block] = weight[block] + AHEAD_DEPTH * LANES;
}

INLINE void ask_next(int blocks, const bf16 *const *next, int64_t k, const bf16 **ahead) {
    if (!next)
        return;
#pragma GCC unroll 4
    for (int block = 0; block < blocks; block++)
        ahead[block] = next[block] - k * LANES;
}

#if defined(__AMX_BF16__)

/* As TDPBF16PS adds up (16 pairs, even and odd numbers apart, then all): a row has the same bits by both ways. */
INLINE void multiply_few(int rows, int blocks, const factor *x, int64_t stride, const bf16 *const *weight,
                         const bf16 *const *next, int64_t depth, float *sums, int64_t sums_stride) {
    vec sum[FEW_ROWS][FEW_BLOCKS];
    const bf16 *ahead[FEW_BLOCKS];
    ask_ahead(blocks, weight, ahead);
#pragma GCC unroll 2
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int block = 0; block < blocks; block++)
            sum[row][block] = vec_load(sums + row * sums_stride + block * LANES);
    for (int64_t from = 0; from < depth; from += TILE_DEPTH) {
        if (from == depth - AHEAD_DEPTH)
            ask_next(blocks, next, from, ahead);
        vec even[FEW_ROWS][FEW_BLOCKS], odd[FEW_ROWS][FEW_BLOCKS];
#pragma GCC unroll 2
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
            for (int block = 0; block < blocks; block++)
                even[row][block] = odd[row][block] = vec_set(0.0f);
        for (int64_t k = from; k < from + TILE_DEPTH; k += 2)
#pragma GCC unroll 4
            for (int block = 0; block < blocks; block++) {
                const bf16 *line = weight[block] + k * LANES;
                _mm_prefetch((const char *)(ahead[block] + k * LANES), _MM_HINT_T0);
                vec evens, odds;
                vec_load_pairs(line, &evens, &odds);
#pragma GCC unroll 2
                for (int row = 0; row < rows; row++) {
                    even[row][block] = vec_fma(vec_set(x[row * stride + k]), evens, even[row][block]);
                    odd[row][block] = vec_fma(vec_set(x[row * stride + k + 1]), odds, odd[row][block]);
                }
            }
#pragma GCC unroll 2
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
            for (int block = 0; block < blocks; block++)
                sum[row][block] = vec_add(sum[row][block], vec_add(even[row][block], odd[row][block]));
    }
#pragma GCC unroll 2
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int block = 0; block < blocks; block++)
            vec_store(sums + row * sums_stride + block * LANES, sum[row][block]);
}

#else

#if defined(__AVX512BF16__)
INLINE void add_pair(vec *sum, const bf16 *line, const factor *row) {
    int32_t pair;
    memcpy(&pair, row, 4);
    *sum = _mm512_dpbf16_ps(*sum, (__m512bh)_mm512_loadu_si512(line), (__m512bh)_mm512_set1_epi32(pair));
}
#endif

#ifdef PAIRS
/* The same for many rows, which pass a part of the weight that stays in the first cache: a pair of x is loaded once for all
 * blocks. Sums (rows, GRID_BLOCKS * 16) lie side by side. `asks`: so many blocks of `next`, the part that follows, are prefetched to
 * the second cache. */
INLINE void multiply_many(int rows, int asks, const factor *x, int64_t stride, const bf16 *const *weight,
                          const bf16 *const *next, int64_t depth, float *sums) {
    vec sum[GRID_ROWS][GRID_BLOCKS];
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int block = 0; block < GRID_BLOCKS; block++)
            sum[row][block] = vec_load(sums + (row * GRID_BLOCKS + block) * LANES);
    for (int64_t k = 0; k < depth; k += 2) {
        __m512bh line[GRID_BLOCKS];
#pragma GCC unroll 4
        for (int block = 0; block < GRID_BLOCKS; block++) {
            line[block] = (__m512bh)_mm512_loadu_si512(weight[block] + k * LANES);
            if (block < asks)
                _mm_prefetch((const char *)(next[block] + k * LANES), ASKED_TO);
        }
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            int32_t pair;
            memcpy(&pair, x + row * stride + k, 4);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int block = 0; block < GRID_BLOCKS; block++)
                sum[row][block] = _mm512_dpbf16_ps(sum[row][block], line[block], both);
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int block = 0; block < GRID_BLOCKS; block++)
            vec_store(sums + (row * GRID_BLOCKS + block) * LANES, sum[row][block]);
}

/* Each on its own: within the loops around them the compiler would run out of registers for addresses. */
#define MULTIPLY_MANY(rows, asks)                                                                                        \
    OUTLINE void multiply_many_##rows##_##asks(const factor *x, int64_t stride, const bf16 *const *weight,               \
                                               const bf16 *const *next, int64_t depth, float *sums) {                     \
        multiply_many(rows, asks, x, stride, weight, next, depth, sums);                                                 \
    }
MULTIPLY_MANY(1, 0)
MULTIPLY_MANY(2, 0)
MULTIPLY_MANY(3, 0)
MULTIPLY_MANY(4, 0)
MULTIPLY_MANY(5, 0)
MULTIPLY_MANY(6, 0)
MULTIPLY_MANY(6, 1)
MULTIPLY_MANY(5, 4)
MULTIPLY_MANY(6, 4)
#undef MULTIPLY_MANY
#endif

/* sums (rows, blocks * 16) += x (rows, depth) @ blocks; `rows` and `blocks` are constants of the caller. */
INLINE void multiply_few(int rows, int blocks, const factor *x, int64_t stride, const bf16 *const *weight,
                         const bf16 *const *next, int64_t depth, float *sums, int64_t sums_stride) {
    vec sum[8][FEW_BLOCKS];
    const bf16 *ahead[FEW_BLOCKS];
    ask_ahead(blocks, weight, ahead);
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int block = 0; block < blocks; block++)
            sum[row][block] = vec_load(sums + row * sums_stride + block * LANES);
    for (int64_t k = 0; k < depth; k += 2) {
        if (k == depth - AHEAD_DEPTH)
            ask_next(blocks, next, k, ahead);
#pragma GCC unroll 4
        for (int block = 0; block < blocks; block++) {
            const bf16 *line = weight[block] + k * LANES;
            _mm_prefetch((const char *)(ahead[block] + k * LANES), ASKED_TO);
#if defined(__AVX512BF16__)
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++)
                add_pair(&sum[row][block], line, x + row * stride + k);
#else
            vec even, odd;
            vec_load_pairs(line, &even, &odd);
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++) {
                sum[row][block] = vec_fma(vec_set(x[row * stride + k]), even, sum[row][block]);
                sum[row][block] = vec_fma(vec_set(x[row * stride + k + 1]), odd, sum[row][block]);
            }
#endif
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int block = 0; block < blocks; block++)
            vec_store(sums + row * sums_stride + block * LANES, sum[row][block]);
}

#endif

#if defined(__AMX_BF16__)

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

/* Tiles 0 to 5 have `rows` rows, 16 at most. */
INLINE void tiles_begin(int64_t rows) {
    struct tile_config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        config.bytes[tile] = 64;
        config.rows[tile] = tile < 6 && rows < 16 ? (uint8_t)rows : 16;
    }
    _tile_loadconfig(&config);
}

INLINE void tiles_end(void) { _tile_release(); }

/* x is packed in tiles (row block, depth / 32, 16, 32), row blocks `tile_stride` apart. Tiles 0 to 3 are sums.
 *
 * What is asked for on the way, if anything: with `next`, the weight itself, as for few rows; with `lines`, so many cache
 * lines of `share` in each step, which the next panel will read.
 */
INLINE void multiply_tiles(int row_tiles, const bf16 *x, int64_t tile_stride, const bf16 *const *weight,
                           const bf16 *const *next, int64_t depth, int fresh, float *sums, int64_t sums_stride,
                           const bf16 *share, int lines) {
    const bf16 *first = weight[0], *second = weight[1], *ahead[2];
    ask_ahead(2, weight, ahead);
    int64_t bytes = sums_stride * 4;
    float *lower = sums + 16 * sums_stride;
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, bytes);
        _tile_loadd(1, sums + LANES, bytes);
        if (row_tiles > 1) {
            _tile_loadd(2, lower, bytes);
            _tile_loadd(3, lower + LANES, bytes);
        }
    }
    for (int64_t k = 0; k < depth; k += TILE_DEPTH) {
        if (next) {
            if (k == depth - AHEAD_DEPTH)
                ask_next(2, next, k, ahead);
            for (int line = 0; line < 16; line++) {
                _mm_prefetch((const char *)(ahead[0] + k * LANES + line * 32), _MM_HINT_T0);
                _mm_prefetch((const char *)(ahead[1] + k * LANES + line * 32), _MM_HINT_T0);
            }
        }
        for (int line = 0; line < lines; line++, share += 32)
            _mm_prefetch((const char *)share, _MM_HINT_T1);
        _tile_loadd(6, first + k * LANES, 64);
        _tile_loadd(4, x + k * 16, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, second + k * LANES, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (row_tiles > 1) {
            _tile_loadd(5, x + tile_stride + k * 16, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + LANES, bytes);
    if (row_tiles > 1) {
        _tile_stored(2, lower, bytes);
        _tile_stored(3, lower + LANES, bytes);
    }
}

#else
INLINE void tiles_begin(int64_t rows) { (void)rows; }
INLINE void tiles_end(void) {}
#endif
