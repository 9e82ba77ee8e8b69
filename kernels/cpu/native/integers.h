/* Products of few rows with quantized weights: rows become int8 too, so sums of 16 or 32 products are exact integers.
 *
 * Each 32 numbers of a row share a scale, as in the Q8_0 of ggml. So the sums do not depend on the instruction set:
 * VPDPBUSD adds four products to each of 16 sums; without it VPMADDUBSW and VPMADDWD do the same, where a sum of two
 * products fits 16 bits, and VPMADDWD alone for numbers of 8 bits.
 *
 * Where a weight says so (`row_bits`), rows become int16: VPDPWSSD takes twice as many multiplications as VPDPBUSD, VPMADDWD
 * as many as before. Of four neighbours the even ones come first, since that is how bytes of the weight become 16 bits.
 */
#pragma once

#include "quantized.h"

#if defined(__AMX_BF16__)
#define MOST_INTEGER_ROWS 8 /* for more it is faster to expand the weight */
#define MOST_ROTATED_ROWS 4 /* for more it is faster to multiply whole groups */
#elif defined(__AVX512VNNI__)
#define MOST_INTEGER_ROWS 512
#define MOST_ROTATED_ROWS 0 /* always in whole groups */
#else
#define MOST_INTEGER_ROWS 16
#endif

#ifndef MOST_ROTATED_ROWS
#define MOST_ROTATED_ROWS MOST_INTEGER_ROWS
#endif

#ifdef PAIRS
#define AHEAD 4096 /* bytes */
#else
#define AHEAD 2048
#endif
#if defined(__AVX512BF16__)
#define MOST_LONG_ROWS 32 /* of int16: for more it is faster to expand the weight for VDPBF16PS */
#else
#define MOST_LONG_ROWS MOST_INTEGER_ROWS
#endif
#define LEAST_LARGEST 1e-36f    /* less is taken for zeros: 127 over much less is not finite */
#define LEAST_LARGEST_16 1e-33f /* the same of 32767 */
#if defined(__AVX512F__)
#define CROSSES_BLOCKS 1
#else
#define CROSSES_BLOCKS 0 /* there are too few registers for the addresses */
#endif

/* ---- sixteen sums ---- */

#if defined(__AVX512F__)

typedef int32_t integers __attribute__((vector_size(64))); /* arrays of __m512i would be written to memory again and again */

INLINE integers integers_set(int32_t x) { return (integers)_mm512_set1_epi32(x); }
INLINE vec integers_to_vec(integers x) { return _mm512_cvtepi32_ps((__m512i)x); }

#if defined(__AVX512VNNI__)
INLINE integers add_dots(integers sums, line w, int32_t four, int bits) {
    (void)bits;
    return (integers)_mm512_dpbusd_epi32((__m512i)sums, w, _mm512_set1_epi32(four));
}
#else
INLINE integers add_dots(integers sums, line w, int32_t four, int bits) {
    __m512i x = _mm512_set1_epi32(four), dots;
    if (bits < 8) {
        dots = _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1));
    } else { /* even and odd numbers apart */
        __m512i even = _mm512_and_si512(w, _mm512_set1_epi16(255)), odd = _mm512_srli_epi16(w, 8);
        __m512i x_even = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), x_odd = _mm512_srai_epi16(x, 8);
        dots = _mm512_add_epi32(_mm512_madd_epi16(even, x_even), _mm512_madd_epi16(odd, x_odd));
    }
    return (integers)_mm512_add_epi32((__m512i)sums, dots);
}
#endif

/* The same of signed bytes and int16, `pairs`: of four numbers the even ones, and the odd ones. */
INLINE integers add_long_dots(integers sums, line w, const int32_t *pairs) {
    __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), odd = _mm512_srai_epi16(w, 8);
    __m512i x_even = _mm512_set1_epi32(pairs[0]), x_odd = _mm512_set1_epi32(pairs[1]);
#if defined(__AVX512VNNI__)
    return (integers)_mm512_dpwssd_epi32(_mm512_dpwssd_epi32((__m512i)sums, even, x_even), odd, x_odd);
#else
    __m512i dots = _mm512_add_epi32(_mm512_madd_epi16(even, x_even), _mm512_madd_epi16(odd, x_odd));
    return (integers)_mm512_add_epi32((__m512i)sums, dots);
#endif
}

INLINE line signed_line(const uint8_t *unit, int number) { return _mm512_loadu_si512(unit + number * 64); }

#else

typedef line integers;

INLINE integers integers_set(int32_t x) { return (integers){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE vec integers_to_vec(integers x) { return (vec){_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }

INLINE __m256i dots_of(__m256i w, __m256i x, int bits) {
    if (bits < 8)
        return _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
    __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
    __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
    return _mm256_add_epi32(_mm256_madd_epi16(even, x_even), _mm256_madd_epi16(odd, x_odd));
}

INLINE integers add_dots(integers sums, line w, int32_t four, int bits) {
    __m256i x = _mm256_set1_epi32(four);
    return (integers){_mm256_add_epi32(sums.low, dots_of(w.low, x, bits)),
                      _mm256_add_epi32(sums.high, dots_of(w.high, x, bits))};
}

INLINE __m256i long_dots_of(__m256i w, const int32_t *pairs) {
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), odd = _mm256_srai_epi16(w, 8);
    return _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_set1_epi32(pairs[0])),
                            _mm256_madd_epi16(odd, _mm256_set1_epi32(pairs[1])));
}

INLINE integers add_long_dots(integers sums, line w, const int32_t *pairs) {
    return (integers){_mm256_add_epi32(sums.low, long_dots_of(w.low, pairs)),
                      _mm256_add_epi32(sums.high, long_dots_of(w.high, pairs))};
}

INLINE line signed_line(const uint8_t *unit, int number) {
    const __m256i *from = (const __m256i *)(unit + number * 64);
    return (line){_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}

#endif

/* ---- rows ---- */

/* Rows as int8: (rows, depth), and for each row and unit a scale and the sums of both halves: 1.4 bytes a number. Or as int16
 * without sums: 2.1 bytes a number. */
struct integer_rows {
    void *numbers;
    float *scales;
    int32_t *sums; /* (rows, units, 2), of int8 */
    int64_t depth, units;
    int bits;
};

INLINE struct integer_rows integer_rows_at(void *memory, int64_t rows, int64_t depth, int bits) {
    struct integer_rows x = {.depth = depth, .units = depth / TILE_DEPTH, .bits = bits};
    x.numbers = memory;
    x.scales = (float *)((int8_t *)memory + rows * depth * (bits / 8));
    x.sums = (int32_t *)(x.scales + rows * x.units);
    return x;
}

INLINE int8_t *bytes_at(const struct integer_rows *x, int64_t row, int64_t number) {
    return (int8_t *)x->numbers + row * x->depth + number;
}

INLINE int16_t *words_at(const struct integer_rows *x, int64_t row, int64_t number) {
    return (int16_t *)x->numbers + row * x->depth + number;
}

/* 16 numbers times `inverse`, rounded; returns their sum. */
INLINE int32_t store_rounded(vec numbers, float inverse, int8_t *out) {
#ifdef __AVX512F__
    __m512i rounded = _mm512_cvtps_epi32(vec_mul(numbers, vec_set(inverse)));
    _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8(rounded));
    return _mm512_reduce_add_epi32(rounded);
#else
    float some[LANES];
    int32_t sum = 0;
    vec_store(some, vec_round(vec_mul(numbers, vec_set(inverse))));
    for (int i = 0; i < LANES; i++) {
        int32_t number = (int32_t)some[i];
        out[i] = (int8_t)number;
        sum += number;
    }
    return sum;
#endif
}

/* The same as int16, of four numbers the even ones first. */
INLINE void store_rounded_long(vec numbers, float inverse, int16_t *out) {
#ifdef __AVX512F__
    __m256i rounded = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(vec_mul(numbers, vec_set(inverse))));
    rounded = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(rounded, 0xD8), 0xD8);
    _mm256_storeu_si256((__m256i *)out, rounded);
#else
    float some[LANES];
    vec_store(some, vec_round(vec_mul(numbers, vec_set(inverse))));
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 4; j++)
            out[i + j] = (int16_t)some[i + j / 2 + j % 2 * 2];
#endif
}

/* Unit `unit` of row `row` from two times 16 numbers. */
INLINE void store_integers(const struct integer_rows *x, int64_t row, int64_t unit, vec first, vec second) {
    vec zero = vec_set(0.0f);
    vec most = vec_max(vec_max(first, vec_sub(zero, first)), vec_max(second, vec_sub(zero, second)));
    float largest = vec_largest(most), check = vec_sum(vec_mul(vec_add(first, second), zero));
    float number = x->bits == 8 ? 127.0f : 32767.0f, least = x->bits == 8 ? LEAST_LARGEST : LEAST_LARGEST_16;
    float scale = largest / number, inverse = largest > least ? number / largest : 0.0f;
    if (check != 0 || !(largest <= 3.4e38f)) { /* no number, or too large: then the sums are no numbers */
        scale = NAN;
        first = second = zero;
        inverse = 0.0f;
    }
    x->scales[row * x->units + unit] = scale;
    if (x->bits == 16) {
        int16_t *out = words_at(x, row, unit * TILE_DEPTH);
        store_rounded_long(first, inverse, out);
        store_rounded_long(second, inverse, out + LANES);
        return;
    }
    int8_t *out = bytes_at(x, row, unit * TILE_DEPTH);
    x->sums[(row * x->units + unit) * 2] = store_rounded(first, inverse, out);
    x->sums[(row * x->units + unit) * 2 + 1] = store_rounded(second, inverse, out + LANES);
}

/* A kind of weight and of rows; constants of the caller where it knows them. */
struct kind {
    int bits, row_bits, halves, offsets, scale_bits;
};

/* sums (rows, blocks * 16) = x @ blocks; `rows` and `blocks` are constants of the caller, and of `kind` the bits. Numbers are asked for AHEAD bytes before they are needed, behind the end of a block those
 * of the block `after` it. */
INLINE void multiply_units(const struct quantized *w, struct kind kind, int rows, int blocks, const struct integer_rows *x,
                           int64_t row, const int64_t *columns, const int64_t *after, float *sums, int64_t stride) {
    const int bits = kind.bits, row_bits = kind.row_bits, halves = kind.halves, offsets = kind.offsets;
    const int scale_bits = kind.scale_bits, lines = UNIT_LINES / halves;
    vec sum[4][4];
    line least[4];
    const uint8_t *numbers[4], *soon[4];
    int64_t turn = x->units - AHEAD / (64 * bits); /* the unit from which on the next block is asked for */
    const uint8_t *scales[4], *soon_scales[4]; /* of the blocks after: too few to be fetched by the time they are met */
    struct scale_lines by_block = scale_lines(w, x->depth);
#pragma GCC unroll 4
    for (int block = 0; block < blocks; block++) {
        numbers[block] = quantized_numbers(w, x->depth, columns[block], 0);
        scales[block] = w->scales + columns[block] * by_block.block + by_block.head;
        soon_scales[block] = w->scales + after[block] * by_block.block + by_block.head;
        least[block] = load_least(scale_bits, scales[block] - by_block.head);
        soon[block] = numbers[block] + AHEAD / (64 * bits) * (64 * bits);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            sum[r][block] = vec_set(0.0f);
    }
    for (int64_t unit = 0; unit < x->units; unit++) {
        int64_t place = (unit >> by_block.shift) * by_block.size;
        if (CROSSES_BLOCKS && unit == turn)
            for (int block = 0; block < blocks; block++)
                soon[block] = quantized_numbers(w, x->depth, after[block], 0);
        for (int block = 0; CROSSES_BLOCKS && block < blocks; block++)
            _mm_prefetch((const char *)(soon_scales[block] + place), ASKED_TO);
        for (int half = 0; half < halves; half++) {
            integers dot[4][4];
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                integers begin = integers_set(0);
                if (row_bits == 8) {
                    const int32_t *own = x->sums + ((row + r) * x->units + unit) * 2;
                    begin = integers_set(-w->zero * (halves == 2 ? own[half] : own[0] + own[1]));
                }
#pragma GCC unroll 4
                for (int block = 0; block < blocks; block++)
                    dot[r][block] = begin;
            }
#pragma GCC unroll 4
            for (int number = half * lines; number < half * lines + lines; number += 2) {
#pragma GCC unroll 2
                for (int next = 0; next < 2; next++) {
#pragma GCC unroll 4
                    for (int block = 0; block < blocks; block++) {
                        int line_number = number + next;
                        line w_line = row_bits == 8 ? number_line(numbers[block], bits, line_number)
                                                    : signed_line(numbers[block], line_number);
                        const uint8_t *ahead = CROSSES_BLOCKS ? soon[block] : numbers[block] + AHEAD;
                        if (next == 0 || bits > 4) /* two lines of 4 bits share a cache line */
                            _mm_prefetch((const char *)ahead + line_number * 8 * bits, ASKED_TO);
#pragma GCC unroll 4
                        for (int r = 0; r < rows; r++) {
                            int64_t number_place = unit * TILE_DEPTH + line_number * 4;
                            int32_t four[2];
                            if (row_bits == 8) {
                                memcpy(four, bytes_at(x, row + r, number_place), 4);
                                dot[r][block] = add_dots(dot[r][block], w_line, four[0], bits);
                            } else {
                                memcpy(four, words_at(x, row + r, number_place), 8);
                                dot[r][block] = add_long_dots(dot[r][block], w_line, four);
                            }
                        }
                    }
                }
            }
#pragma GCC unroll 4
            for (int block = 0; block < blocks; block++) {
                const uint8_t *from = scales[block] + place + half * (by_block.size / 2);
                vec scale = load_scales(scale_bits, from, least[block]);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    float own = x->scales[(row + r) * x->units + unit];
                    vec some = integers_to_vec(dot[r][block]);
                    float total = 0;
                    if (offsets) {
                        const int32_t *both = x->sums + ((row + r) * x->units + unit) * 2;
                        total = (float)(halves == 2 ? both[half] : both[0] + both[1]);
                    }
                    if (offsets && scale_bits == 8) /* exact, as the sums are */
                        some = vec_fma(load_zeros(from + LANES), vec_set(total * (-1.0f / ZERO_STEPS)), some);
                    sum[r][block] = vec_fma(some, vec_mul(scale, vec_set(own)), sum[r][block]);
                    if (offsets && scale_bits == 16) {
                        vec offset = vec_load_half((const uint16_t *)from + LANES);
                        sum[r][block] = vec_fma(offset, vec_set(total * own), sum[r][block]);
                    }
                }
            }
        }
#pragma GCC unroll 4
        for (int block = 0; block < blocks; block++) {
            numbers[block] += 64 * bits;
            soon[block] += 64 * bits;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int block = 0; block < blocks; block++)
            vec_store(sums + r * stride + block * LANES, sum[r][block]);
}

INLINE void multiply_integers(const struct quantized *w, int bits, int rows, int blocks, const struct integer_rows *x,
                              int64_t row, const int64_t *columns, const int64_t *after, float *sums, int64_t stride) {
    const struct kind kind = {bits, 8, w->halves, w->offsets, w->scale_bits}, long_rows = {bits, 16, 1, 0, 16};
    const struct kind plain = {bits, 8, 1, 0, 16}, halves = {bits, 8, 2, 0, 16}, offsets = {bits, 8, 1, 1, 16};
    const struct kind bytes = {bits, 8, 1, 0, 8}, bytes_offsets = {bits, 8, 1, 1, 8};
    int wide = w->scale_bits == 16;
    if (bits == 8 && x->bits == 16)
        multiply_units(w, long_rows, rows, blocks, x, row, columns, after, sums, stride);
    else if (bits == 4 && !wide && w->offsets)
        multiply_units(w, bytes_offsets, rows, blocks, x, row, columns, after, sums, stride);
    else if (bits == 6 && !wide && !w->offsets)
        multiply_units(w, bytes, rows, blocks, x, row, columns, after, sums, stride);
    else if (wide && w->halves == 1 && !w->offsets)
        multiply_units(w, plain, rows, blocks, x, row, columns, after, sums, stride);
    else if (wide && w->halves == 2 && !w->offsets && bits == 6)
        multiply_units(w, halves, rows, blocks, x, row, columns, after, sums, stride);
    else if (wide && w->halves == 1 && bits == 4)
        multiply_units(w, offsets, rows, blocks, x, row, columns, after, sums, stride);
    else
        multiply_units(w, kind, rows, blocks, x, row, columns, after, sums, stride);
}

/* Up to four rows through a panel of four blocks. AVX2 has registers for half as many sums. */
INLINE void integer_grid(const struct quantized *w, int bits, const struct integer_rows *x, int64_t row, int64_t rows,
                         const int64_t *columns, const int64_t *after, float *sums, int64_t stride) {
#if defined(__AVX512F__)
    if (rows == 1) {
        multiply_integers(w, bits, 1, 4, x, row, columns, after, sums, stride);
    } else if (rows == 2) {
        multiply_integers(w, bits, 2, 4, x, row, columns, after, sums, stride);
    } else {
        multiply_integers(w, bits, 4, 2, x, row, columns, after, sums, stride);
        multiply_integers(w, bits, 4, 2, x, row, columns + 2, after + 2, sums + 2 * LANES, stride);
    }
#else
    for (int block = 0; block < 4; block += rows == 1 ? 2 : 1) {
        if (rows == 1)
            multiply_integers(w, bits, 1, 2, x, row, columns + block, after + block, sums + block * LANES, stride);
        else if (rows == 2)
            multiply_integers(w, bits, 2, 1, x, row, columns + block, after + block, sums + block * LANES, stride);
        else
            multiply_integers(w, bits, 4, 1, x, row, columns + block, after + block, sums + block * LANES, stride);
    }
#endif
}
