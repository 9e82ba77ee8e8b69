/* Matrices of 16 x 16 words, each a pair of bfloat16 numbers, transposed. */
#pragma once

#include "vector.h"

#ifdef __AVX512F__

/* A 16 x 16 matrix of words transposed. */
INLINE void transpose_words(__m512i rows[16], bf16 *out) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(out + (i + 0) * TILE_DEPTH, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(out + (i + 4) * TILE_DEPTH, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
        _mm512_storeu_si512(out + (i + 8) * TILE_DEPTH, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD));
        _mm512_storeu_si512(out + (i + 12) * TILE_DEPTH, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD));
    }
}

/* 16 rows, `stride` numbers apart, of which 32 numbers each count: those numbered d of all rows to out + d * 16. */
INLINE void spread_rows(const bf16 *in, int64_t stride, factor *out) {
    __m512i rows[LANES];
    for (int row = 0; row < LANES; row++)
        rows[row] = _mm512_loadu_si512(in + row * stride);
#ifdef PAIRS
    transpose_words(rows, (bf16 *)out); /* pairs of neighbours in d stay together */
#else
    bf16 lines[LANES][2 * LANES];
    transpose_words(rows, lines[0]);
    for (int line = 0; line < LANES; line++) {
        vec even, odd;
        vec_load_pairs(lines[line], &even, &odd);
        vec_store(out + 2 * line * LANES, even);
        vec_store(out + (2 * line + 1) * LANES, odd);
    }
#endif
}

#else

/* An 8 x 8 matrix of words transposed. */
INLINE void transpose_eight(__m256i rows[8]) {
    __m256i t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
    }
}

/* 16 rows, `stride` numbers apart, of which 32 numbers each count: those numbered d of all rows to out + d * 16. */
INLINE void spread_rows(const bf16 *in, int64_t stride, float *out) {
    const __m256i upper = _mm256_set1_epi32((int)0xFFFF0000);
    for (int half = 0; half < LANES; half += 8)
        for (int d = 0; d < 2 * LANES; d += LANES) {
            __m256i rows[8];
            for (int row = 0; row < 8; row++)
                rows[row] = _mm256_loadu_si256((const __m256i *)(in + (half + row) * stride + d));
            transpose_eight(rows);
            for (int line = 0; line < 8; line++) {
                float *to = out + (d + 2 * line) * LANES + half;
                _mm256_storeu_ps(to, _mm256_castsi256_ps(_mm256_slli_epi32(rows[line], 16)));
                _mm256_storeu_ps(to + LANES, _mm256_castsi256_ps(_mm256_and_si256(rows[line], upper)));
            }
        }
}

#endif
