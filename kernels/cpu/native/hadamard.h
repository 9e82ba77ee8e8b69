/* Rotations of rows before they are quantized: 128 numbers become as many sums and differences of them.
 *
 * The rotation is the Walsh-Hadamard transform over its length's square root: it is orthonormal, so a product of a rotated
 * row with a rotated weight is the product of both, and it is its own inverse. What is large in one number spreads over
 * all 128. So rows and weights may share a scale over many more numbers than without (QuaRot, Ashkboos et al., 2024).
 */
#pragma once

#include "quantized.h"
#include "vector.h"

#define ROTATED_VECS (ROTATED / LANES)

#if defined(__AVX512F__)

INLINE vec negated(vec x, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_mask_xor_epi32(_mm512_castps_si512(x), lanes, _mm512_castps_si512(x),
                                                     _mm512_set1_epi32((int)0x80000000)));
}

/* Sums and differences of the lanes of one register. */
INLINE vec rotate_lanes(vec x) {
    x = _mm512_add_ps(_mm512_permute_ps(x, 0xB1), negated(x, 0xAAAA));
    x = _mm512_add_ps(_mm512_permute_ps(x, 0x4E), negated(x, 0xCCCC));
    x = _mm512_add_ps(_mm512_shuffle_f32x4(x, x, 0xB1), negated(x, 0xF0F0));
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, x, 0x4E), negated(x, 0xFF00));
}

#else

INLINE __m256 rotate_eight(__m256 x) {
    const __m256 ones = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
    const __m256 twos = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    const __m256 fours = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    x = _mm256_add_ps(_mm256_permute_ps(x, 0xB1), _mm256_xor_ps(x, ones));
    x = _mm256_add_ps(_mm256_permute_ps(x, 0x4E), _mm256_xor_ps(x, twos));
    return _mm256_add_ps(_mm256_permute2f128_ps(x, x, 1), _mm256_xor_ps(x, fours));
}

INLINE vec rotate_lanes(vec x) {
    __m256 low = rotate_eight(x.low), high = rotate_eight(x.high);
    return (vec){_mm256_add_ps(low, high), _mm256_sub_ps(low, high)};
}

#endif

/* ROTATED numbers. Every instruction set adds in the same order, so the bits are the same. */
INLINE void rotate_numbers(vec *x) {
#pragma GCC unroll 8
    for (int i = 0; i < ROTATED_VECS; i++)
        x[i] = rotate_lanes(x[i]);
#pragma GCC unroll 3
    for (int step = 1; step < ROTATED_VECS; step *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < ROTATED_VECS; i++)
            if (!(i & step)) {
                vec first = x[i], second = x[i + step];
                x[i] = vec_add(first, second);
                x[i + step] = vec_sub(first, second);
            }
#pragma GCC unroll 8
    for (int i = 0; i < ROTATED_VECS; i++)
        x[i] = vec_mul(x[i], vec_set(0.08838834764831845f)); /* 1 / sqrt(128) */
}
