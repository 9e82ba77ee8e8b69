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

/* By step: 1, or -1 for the second of two lanes that lie `1 << step` apart, which gets their difference. */
static const float LANE_SIGNS[4][LANES] __attribute__((aligned(64), unused)) = {
    {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
    {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
    {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
    {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
};

#if defined(__AVX512F__)

/* Sums and differences of the lanes of one register. */
INLINE vec rotate_lanes(vec x) {
    x = vec_fma(x, vec_load(LANE_SIGNS[0]), _mm512_permute_ps(x, 0xB1));
    x = vec_fma(x, vec_load(LANE_SIGNS[1]), _mm512_permute_ps(x, 0x4E));
    x = vec_fma(x, vec_load(LANE_SIGNS[2]), _mm512_shuffle_f32x4(x, x, 0xB1));
    return vec_fma(x, vec_load(LANE_SIGNS[3]), _mm512_shuffle_f32x4(x, x, 0x4E));
}

#else

INLINE __m256 rotate_eight(__m256 x) {
    x = _mm256_fmadd_ps(x, _mm256_load_ps(LANE_SIGNS[0]), _mm256_permute_ps(x, 0xB1));
    x = _mm256_fmadd_ps(x, _mm256_load_ps(LANE_SIGNS[1]), _mm256_permute_ps(x, 0x4E));
    return _mm256_fmadd_ps(x, _mm256_load_ps(LANE_SIGNS[2]), _mm256_permute2f128_ps(x, x, 1));
}

INLINE vec rotate_lanes(vec x) {
    __m256 low = rotate_eight(x.low), high = rotate_eight(x.high);
    return (vec){_mm256_add_ps(low, high), _mm256_sub_ps(low, high)};
}

#endif

#define ROTATION_SCALE 0.08838834764831845f /* 1 / sqrt(ROTATED) */

/* ROTATED numbers rotated, times sqrt(ROTATED). Every instruction set adds in the same order, so the bits are the same. */
INLINE void rotate_unscaled(vec *x) {
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
}

INLINE void rotate_numbers(vec *x) {
    rotate_unscaled(x);
#pragma GCC unroll 8
    for (int i = 0; i < ROTATED_VECS; i++)
        x[i] = vec_mul(x[i], vec_set(ROTATION_SCALE));
}
