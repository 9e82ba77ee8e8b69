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

/* How scales lie. A line of them belongs to 1 << `shift` units. */
struct scale_lines {
    int64_t size, block; /* bytes of a line, and of a block */
    int64_t head;        /* bytes before a block's first line: the least scales */
    int shift;
};

INLINE struct scale_lines scale_lines(const struct quantized *w, int64_t depth) {
    struct scale_lines lines = {.size = w->halves * (1 + w->offsets) * LANES * (w->scale_bits / 8)};
    lines.head = w->scale_bits == 8 ? LANES * (int64_t)sizeof(bf16) : 0;
    if (w->rotated)
        lines.shift = rotated_group(depth, w->rotated) == ROTATED ? 2 : 3;
    lines.block = lines.head + ((quantized_units(depth) + (1 << lines.shift) - 1) >> lines.shift) * lines.size;
    return lines;
}

/* The line of the unit at `from` in k. */
INLINE const uint8_t *quantized_scales(const struct quantized *w, int64_t depth, int64_t block, int64_t from) {
    struct scale_lines lines = scale_lines(w, depth);
    return w->scales + block * lines.block + lines.head + (quantized_units(from) >> lines.shift) * lines.size;
}

/* Where numbers and scales begin. */
struct place {
    const uint8_t *numbers, *scales;
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

/* Of 16 columns: bits of the least scales (0 where scales are float16), scales, and offsets as numbers of steps. */
INLINE line load_least(int scale_bits, const uint8_t *block) {
    if (scale_bits == 16)
        return _mm512_setzero_si512();
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)block)), 16);
}

INLINE line load_bytes(const uint8_t *from) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)); }

INLINE vec load_scales(int scale_bits, const uint8_t *from, line least) {
    if (scale_bits == 16)
        return vec_load_half((const uint16_t *)from);
    return _mm512_castsi512_ps(_mm512_add_epi32(least, _mm512_slli_epi32(load_bytes(from), SCALE_SHIFT)));
}

INLINE vec load_zeros(const uint8_t *from) { return _mm512_cvtepi32_ps(load_bytes(from)); }

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

INLINE line load_least(int scale_bits, const uint8_t *block) {
    const __m128i *from = (const __m128i *)block;
    if (scale_bits == 16)
        return (line){_mm256_setzero_si256(), _mm256_setzero_si256()};
    return (line){_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), 16),
                  _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from + 1)), 16)};
}

INLINE line load_bytes(const uint8_t *from) {
    return (line){_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)),
                  _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8)))};
}

INLINE vec load_scales(int scale_bits, const uint8_t *from, line least) {
    if (scale_bits == 16)
        return vec_load_half((const uint16_t *)from);
    line bytes = load_bytes(from);
    return (vec){_mm256_castsi256_ps(_mm256_add_epi32(least.low, _mm256_slli_epi32(bytes.low, SCALE_SHIFT))),
                 _mm256_castsi256_ps(_mm256_add_epi32(least.high, _mm256_slli_epi32(bytes.high, SCALE_SHIFT)))};
}

INLINE vec load_zeros(const uint8_t *from) {
    line bytes = load_bytes(from);
    return (vec){_mm256_cvtepi32_ps(bytes.low), _mm256_cvtepi32_ps(bytes.high)};
}

INLINE __m256 half_place(__m256i x, int place) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x, place * 8), _mm256_set1_epi32(255)));
}

INLINE vec line_place(line x, int place) { return (vec){half_place(x.low, place), half_place(x.high, place)}; }

#endif

/* Offsets of 16 columns: those of a line of scales, or by the zero point. */
INLINE vec load_offsets(const struct quantized *w, const uint8_t *scales, vec scale) {
    if (!w->offsets)
        return vec_mul(scale, vec_set((float)-w->zero));
    if (w->scale_bits == 16)
        return vec_load_half((const uint16_t *)scales + LANES);
    return vec_mul(vec_mul(scale, vec_set(-1.0f / ZERO_STEPS)), load_zeros(scales + LANES));
}

/* ---- to bfloat16 ---- */

#ifdef __AVX512VBMI__

/* Of a group: scales and offsets of 16 columns, each twice, since two numbers of a column lie side by side. */
struct scaling {
    vec scale[2], offset[2];
};

INLINE struct scaling scaling_at(const struct quantized *w, const uint8_t *scales, line least) {
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    vec scale = load_scales(w->scale_bits, scales, least), offset = load_offsets(w, scales, scale);
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

INLINE struct scaling scaling_at(const struct quantized *w, const uint8_t *scales, line least) {
    vec scale = load_scales(w->scale_bits, scales, least);
    return (struct scaling){scale, load_offsets(w, scales, scale)};
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
INLINE void expand_units(const struct quantized *w, int bits, int64_t depth, int64_t block, int64_t first, int64_t units,
                         struct place soon, bf16 *out) {
    struct scale_lines by_block = scale_lines(w, depth);
    const uint8_t *numbers = quantized_numbers(w, depth, block, first * TILE_DEPTH);
    const uint8_t *head = w->scales + block * by_block.block, *scales = head + by_block.head;
    line least = load_least(w->scale_bits, head);
    int lines = UNIT_LINES / w->halves;
    int64_t ahead_units = EXPAND_AHEAD / (64 * bits), turn = units > ahead_units ? units - ahead_units : 0;
    const uint8_t *ahead = numbers + ahead_units * 64 * bits;
    for (int64_t unit = 0; unit < units; unit++, numbers += 64 * bits, ahead += 64 * bits) {
        const uint8_t *own = scales + ((first + unit) >> by_block.shift) * by_block.size;
        if (unit == turn)
            ahead = soon.numbers;
        _mm_prefetch((const char *)(soon.scales + (unit >> by_block.shift) * by_block.size), _MM_HINT_T0);
        for (int half = 0; half < w->halves; half++) {
            struct scaling by = scaling_at(w, own + half * (by_block.size / 2), least);
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
    int64_t first = quantized_units(from), units = quantized_units(size);
    switch (w->bits) {
    case 4: expand_units(w, 4, depth, block, first, units, soon, out); return;
    case 5: expand_units(w, 5, depth, block, first, units, soon, out); return;
    case 6: expand_units(w, 6, depth, block, first, units, soon, out); return;
    default: expand_units(w, 8, depth, block, first, units, soon, out); return;
    }
}
