/* Products of few rows with quantized weights: rows become int8 too, so sums of 16 or 32 products are exact integers.
 *
 * Each 32 numbers of a row share a scale, as in the Q8_0 of ggml. So the sums do not depend on the instruction set.
 */
#pragma once

#include "quantized.h"

#if defined(__AVX512VNNI__)

#define HAS_INTEGERS 1
#if defined(__AMX_BF16__)
#define MOST_INTEGER_ROWS 8 /* for more it is faster to expand the weight for AMX */
#else
#define MOST_INTEGER_ROWS 512
#endif

/* Rows as int8: (rows, depth), and for each row and unit a scale and the sums of both halves. 1.4 bytes a number. */
struct integer_rows {
    int8_t *numbers;
    float *scales;
    int32_t *sums; /* (rows, units, 2) */
    int64_t depth, units;
};

INLINE struct integer_rows integer_rows_at(void *memory, int64_t rows, int64_t depth) {
    struct integer_rows x = {.depth = depth, .units = depth / TILE_DEPTH};
    x.numbers = memory;
    x.scales = (float *)(x.numbers + rows * depth);
    x.sums = (int32_t *)(x.scales + rows * x.units);
    return x;
}

/* Unit `unit` of row `row` from two times 16 numbers. */
INLINE void store_integers(const struct integer_rows *x, int64_t row, int64_t unit, vec first, vec second) {
    float largest = vec_largest(vec_max(_mm512_abs_ps(first), _mm512_abs_ps(second)));
    float scale = largest / 127.0f, inverse = largest > 0 ? 127.0f / largest : 0.0f;
    if (_mm512_cmp_ps_mask(first, second, _CMP_UNORD_Q) || !(largest <= 3.4e38f)) { /* the sums are not a number */
        scale = NAN;
        first = second = vec_set(0.0f);
    }
    __m512i low = _mm512_cvtps_epi32(vec_mul(first, vec_set(inverse)));
    __m512i high = _mm512_cvtps_epi32(vec_mul(second, vec_set(inverse)));
    int8_t *out = x->numbers + row * x->depth + unit * TILE_DEPTH;
    _mm_storeu_si128((__m128i *)out, _mm512_cvtsepi32_epi8(low));
    _mm_storeu_si128((__m128i *)(out + LANES), _mm512_cvtsepi32_epi8(high));
    x->scales[row * x->units + unit] = scale;
    x->sums[(row * x->units + unit) * 2] = _mm512_reduce_add_epi32(low);
    x->sums[(row * x->units + unit) * 2 + 1] = _mm512_reduce_add_epi32(high);
}

/* sums (rows, blocks * 16) = x @ blocks; `bits`, `rows` and `blocks` are constants of the caller. */
INLINE void multiply_integers(const struct quantized *w, int bits, int rows, int blocks, const struct integer_rows *x,
                              int64_t row, const int64_t *columns, float *sums, int64_t stride) {
    vec sum[4][4];
    const uint8_t *numbers[4];
    const uint16_t *scales[4];
    int64_t half_numbers = (1 + w->offsets) * LANES;
    int lines = UNIT_LINES / w->halves;
#pragma GCC unroll 4
    for (int block = 0; block < blocks; block++) {
        numbers[block] = quantized_numbers(w, x->depth, columns[block], 0);
        scales[block] = quantized_scales(w, x->depth, columns[block], 0);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            sum[r][block] = vec_set(0.0f);
    }
    for (int64_t unit = 0; unit < x->units; unit++) {
        for (int half = 0; half < w->halves; half++) {
            __m512i dot[4][4];
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const int32_t *own = x->sums + ((row + r) * x->units + unit) * 2;
                int32_t total = w->halves == 2 ? own[half] : own[0] + own[1];
                __m512i begin = _mm512_set1_epi32(-w->zero * total);
#pragma GCC unroll 4
                for (int block = 0; block < blocks; block++)
                    dot[r][block] = begin;
            }
            for (int number = half * lines; number < half * lines + lines; number += 2) {
#pragma GCC unroll 2
                for (int next = 0; next < 2; next++) {
#pragma GCC unroll 4
                    for (int block = 0; block < blocks; block++) {
                        line w_line = number_line(numbers[block], bits, number + next);
                        if (next == 0)
                            _mm_prefetch((const char *)numbers[block] + 2048 + number * 8 * bits, _MM_HINT_T0);
#pragma GCC unroll 4
                        for (int r = 0; r < rows; r++) {
                            int32_t four;
                            memcpy(&four, x->numbers + (row + r) * x->depth + unit * TILE_DEPTH + (number + next) * 4, 4);
                            dot[r][block] = _mm512_dpbusd_epi32(dot[r][block], w_line, _mm512_set1_epi32(four));
                        }
                    }
                }
            }
#pragma GCC unroll 4
            for (int block = 0; block < blocks; block++) {
                vec scale = vec_load_half(scales[block]);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    float own = x->scales[(row + r) * x->units + unit];
                    vec some = _mm512_cvtepi32_ps(dot[r][block]);
                    sum[r][block] = vec_fma(some, vec_mul(scale, vec_set(own)), sum[r][block]);
                    if (w->offsets) {
                        const int32_t *both = x->sums + ((row + r) * x->units + unit) * 2;
                        float total = (float)(w->halves == 2 ? both[half] : both[0] + both[1]) * own;
                        vec offset = vec_load_half(scales[block] + LANES);
                        sum[r][block] = vec_fma(offset, vec_set(total), sum[r][block]);
                    }
                }
                scales[block] += half_numbers;
            }
        }
#pragma GCC unroll 4
        for (int block = 0; block < blocks; block++)
            numbers[block] += 64 * bits;
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int block = 0; block < blocks; block++)
            vec_store(sums + r * stride + block * LANES, sum[r][block]);
}

/* Up to four rows through a panel of four blocks. */
INLINE void integer_grid(const struct quantized *w, int bits, const struct integer_rows *x, int64_t row, int64_t rows,
                         const int64_t *columns, float *sums, int64_t stride) {
    if (rows == 1) {
        multiply_integers(w, bits, 1, 4, x, row, columns, sums, stride);
    } else if (rows == 2) {
        multiply_integers(w, bits, 2, 4, x, row, columns, sums, stride);
    } else {
        multiply_integers(w, bits, 4, 2, x, row, columns, sums, stride);
        multiply_integers(w, bits, 4, 2, x, row, columns + 2, sums + 2 * LANES, stride);
    }
}

#else
#define HAS_INTEGERS 0
#endif
