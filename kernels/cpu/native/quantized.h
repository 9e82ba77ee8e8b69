/* Weights quantized to integers of 4, 5, 6 or 8 bits, unpacked in registers.
 *
 * A block holds 16 columns of a product, in units of 32 numbers in k. A unit has eight lines of 64 numbers: for each
 * column four that are neighbours in k, as VPDPBUSD reads them. With 8 bits the lines lie one after the other. With
 * fewer, two lines share 64 bytes, the first in the lower four bits; behind them lie planes of further bits, one bit
 * for each number: 8 bytes for a line, 64 for a plane. Numbers of 8 bits are kept less SIGN, as signed ones: two units are
 * then a tile of TDPBSSD as they are (integer_tiles.h).
 */
#pragma once

#include "api.h"
#include "vector.h"

#define UNIT_LINES 8
#define LINE_NUMBERS 64
#define SIGN 128 /* as a byte: its highest bit */
#define ROTATED 128    /* numbers of a row that are rotated together (hadamard.h): k of a rotated weight is a multiple */
#define MOST_GROUP 256 /* numbers of a rotated row that share a scale */

INLINE int64_t quantized_units(int64_t depth) { return depth / TILE_DEPTH; }

/* How many numbers of a rotated row share a scale, `most` at most; the last group may have fewer. */
INLINE int64_t rotated_group(int64_t depth, int64_t most) {
    int64_t blocks = depth / ROTATED, groups = (depth + most - 1) / most;
    return (blocks + groups - 1) / groups * ROTATED;
}

INLINE const uint8_t *quantized_numbers(const struct quantized *w, int64_t depth, int64_t block, int64_t from) {
    return w->numbers + (block * quantized_units(depth) + quantized_units(from)) * 64 * w->bits;
}

INLINE const uint16_t *quantized_scales(const struct quantized *w, int64_t depth, int64_t block, int64_t from) {
    return w->scales + (block * quantized_units(depth) + quantized_units(from)) * w->halves * (1 + w->offsets) * LANES;
}

/* Where numbers and scales begin. */
struct place {
    const uint8_t *numbers;
    const uint16_t *scales;
};

INLINE struct place place_of(const struct quantized *w, int64_t depth, int64_t block, int64_t from) {
    return (struct place){quantized_numbers(w, depth, block, from), quantized_scales(w, depth, block, from)};
}

#ifdef __AVX512F__

typedef __m512i line;

INLINE line number_line(const uint8_t *unit, int bits, int number) {
    if (bits == 8)
        return _mm512_xor_si512(_mm512_loadu_si512(unit + number * 64), _mm512_set1_epi8((char)SIGN));
    line both = _mm512_loadu_si512(unit + number / 2 * 64);
    line x = _mm512_and_si512(number % 2 ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
    for (int plane = 0; plane < bits - 4; plane++) {
        uint64_t ones;
        memcpy(&ones, unit + 256 + plane * 64 + number * 8, 8);
        x = _mm512_mask_add_epi8(x, ones, x, _mm512_set1_epi8((char)(16 << plane)));
    }
    return x;
}

/* Of each column, the number at `place` of four. */
INLINE vec line_place(line x, int place) {
    if (place < 3)
        x = _mm512_and_si512(_mm512_srli_epi32(x, (unsigned)place * 8), _mm512_set1_epi32(255));
    else
        x = _mm512_srli_epi32(x, 24);
    return _mm512_cvtepi32_ps(x);
}

#else

typedef struct {
    __m256i low, high;
} line;

/* A byte of ones for each of 32 bits that is set. */
INLINE __m256i bytes_of_bits(uint32_t bits) {
    __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits),
                                         _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                                            0x0303030303030303));
    __m256i own = _mm256_set1_epi64x((long long)0x8040201008040201);
    return _mm256_cmpeq_epi8(_mm256_and_si256(spread, own), own);
}

INLINE __m256i low_bits(__m256i both, int upper) {
    return _mm256_and_si256(upper ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
}

INLINE line number_line(const uint8_t *unit, int bits, int number) {
    const __m256i *from = (const __m256i *)(unit + (bits == 8 ? number : number / 2) * 64);
    line x = {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
    if (bits == 8) {
        const __m256i sign = _mm256_set1_epi8((char)SIGN);
        return (line){_mm256_xor_si256(x.low, sign), _mm256_xor_si256(x.high, sign)};
    }
    x = (line){low_bits(x.low, number % 2), low_bits(x.high, number % 2)};
    for (int plane = 0; plane < bits - 4; plane++) {
        uint32_t ones[2];
        memcpy(ones, unit + 256 + plane * 64 + number * 8, 8);
        __m256i value = _mm256_set1_epi8((char)(16 << plane));
        x.low = _mm256_or_si256(x.low, _mm256_and_si256(bytes_of_bits(ones[0]), value));
        x.high = _mm256_or_si256(x.high, _mm256_and_si256(bytes_of_bits(ones[1]), value));
    }
    return x;
}

INLINE __m256 half_place(__m256i x, int place) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x, place * 8), _mm256_set1_epi32(255)));
}

INLINE vec line_place(line x, int place) { return (vec){half_place(x.low, place), half_place(x.high, place)}; }

#endif

/* ---- to bfloat16 ---- */

#ifdef __AVX512VBMI__

/* Of a group: scales and offsets of 16 columns, each twice, since two numbers of a column lie side by side. */
struct scaling {
    vec scale[2], offset[2];
};

INLINE struct scaling scaling_at(const struct quantized *w, const uint16_t *scales) {
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    vec scale = vec_load_half(scales);
    vec offset = w->offsets ? vec_load_half(scales + LANES) : vec_mul(scale, vec_set((float)-w->zero));
    return (struct scaling){
        {_mm512_permutexvar_ps(low, scale), _mm512_permutexvar_ps(high, scale)},
        {_mm512_permutexvar_ps(low, offset), _mm512_permutexvar_ps(high, offset)},
    };
}

/* A line as bfloat16: of 16 columns the first two numbers, then the others. */
INLINE void expand_line(line x, struct scaling by, bf16 *out) {
    const __m512i bytes = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29);
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; pair++) {
        vec values[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512i from = _mm512_add_epi32(bytes, _mm512_set1_epi32(pair * 2 + half * 32));
            vec number = _mm512_cvtepi32_ps(_mm512_maskz_permutexvar_epi8(0x1111111111111111, from, x));
            values[half] = vec_fma(number, by.scale[half], by.offset[half]);
        }
        _mm512_storeu_si512(out + pair * 2 * LANES, (__m512i)_mm512_cvtne2ps_pbh(values[1], values[0]));
    }
}

#else

struct scaling {
    vec scale, offset;
};

INLINE void store_bf16_pairs(bf16 *out, vec even, vec odd) {
#ifdef __AVX512BF16__
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
#else
    vec_store_pairs(out, even, odd);
#endif
}

INLINE struct scaling scaling_at(const struct quantized *w, const uint16_t *scales) {
    vec scale = vec_load_half(scales);
    return (struct scaling){
        scale, w->offsets ? vec_load_half(scales + LANES) : vec_mul(scale, vec_set((float)-w->zero))};
}

INLINE void expand_line(line x, struct scaling by, bf16 *out) {
    for (int pair = 0; pair < 2; pair++) {
        vec even = vec_fma(line_place(x, 2 * pair), by.scale, by.offset);
        vec odd = vec_fma(line_place(x, 2 * pair + 1), by.scale, by.offset);
        store_bf16_pairs(out + pair * 2 * LANES, even, odd);
    }
}

#endif

#define EXPAND_AHEAD 2048 /* bytes */

/* Numbers are asked for EXPAND_AHEAD bytes before they are needed; behind the end those at `soon`, which come next, and
 * their scales. */
INLINE void expand_units(const struct quantized *w, int bits, const uint8_t *numbers, const uint16_t *scales,
                         int64_t units, struct place soon, bf16 *out) {
    int lines = UNIT_LINES / w->halves, scales_size = w->halves * (1 + w->offsets) * LANES;
    int64_t ahead_units = EXPAND_AHEAD / (64 * bits), turn = units > ahead_units ? units - ahead_units : 0;
    const uint8_t *ahead = numbers + ahead_units * 64 * bits;
    for (int64_t unit = 0; unit < units; unit++, numbers += 64 * bits, ahead += 64 * bits) {
        if (unit == turn)
            ahead = soon.numbers;
        _mm_prefetch((const char *)(soon.scales + unit * scales_size), _MM_HINT_T0);
        for (int half = 0; half < w->halves; half++, scales += (1 + w->offsets) * LANES) {
            struct scaling by = scaling_at(w, scales);
#pragma GCC unroll 2
            for (int number = half * lines; number < (half + 1) * lines; number += 2) {
#pragma GCC unroll 2
                for (int next = 0; next < 2; next++, out += LINE_NUMBERS)
                    expand_line(number_line(numbers, bits, number + next), by, out);
                _mm_prefetch((const char *)ahead + number * 8 * bits, _MM_HINT_T0);
                _mm_prefetch((const char *)ahead + (number + 1) * 8 * bits, _MM_HINT_T0);
            }
        }
    }
}

/* k from `from` to `from + size` of a block, as a weight in bfloat16 is packed (linear.h). `soon`: what comes next. */
static __attribute__((unused)) void expand_block(const struct quantized *w, int64_t depth, int64_t block, int64_t from,
                                                 int64_t size, struct place soon, bf16 *out) {
    const uint8_t *numbers = quantized_numbers(w, depth, block, from);
    const uint16_t *scales = quantized_scales(w, depth, block, from);
    switch (w->bits) {
    case 4: expand_units(w, 4, numbers, scales, quantized_units(size), soon, out); return;
    case 5: expand_units(w, 5, numbers, scales, quantized_units(size), soon, out); return;
    case 6: expand_units(w, 6, numbers, scales, quantized_units(size), soon, out); return;
    default: expand_units(w, 8, numbers, scales, quantized_units(size), soon, out); return;
    }
}
