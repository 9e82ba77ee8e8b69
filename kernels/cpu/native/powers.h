/* Powers and activations for what is rounded to bfloat16 afterwards, in a third of the time of exact ones: within 2e-5 of
 * their value, a hundredth of what rounding takes. SiLU and gelu below 1e-34 or so may be further away from it.
 */
#pragma once

#include "vector.h"

#define LOG2_E 1.44269504088896341f

/* 2^part for parts in [0, 1). */
INLINE vec fraction_power(vec part) {
    vec y = vec_fma(vec_set(1.3426684774e-2f), part, vec_set(5.2242472768e-2f));
    y = vec_fma(y, part, vec_set(2.4128019810e-1f));
    y = vec_fma(y, part, vec_set(6.9304484129e-1f));
    return vec_fma(y, part, vec_set(1.0f));
}

/* 2^x for x up to 127, within 3e-6 of it, a thousandth of what rounding to bfloat16 takes; 0 far below. */
#ifdef __AVX512F__
INLINE vec power_of_two(vec x) {
    vec part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); /* x - floor(x) */
    return _mm512_scalef_ps(fraction_power(part), x);                          /* y * 2^floor(x) */
}
#else
#define LEAST_POWER (-126.0f)
INLINE __m256 without_small(__m256 y, __m256 x) { /* a NaN stays */
    return _mm256_and_ps(y, _mm256_cmp_ps(x, _mm256_set1_ps(LEAST_POWER), _CMP_NLT_UQ));
}

INLINE vec power_of_two(vec x) {
    vec some = vec_max(vec_set(LEAST_POWER), x); /* in this order a NaN passes */
    vec whole = {_mm256_floor_ps(some.low), _mm256_floor_ps(some.high)};
    vec y = vec_scale_exponent(fraction_power(vec_sub(some, whole)), whole);
    return (vec){without_small(y.low, x.low), without_small(y.high, x.high)};
}
#endif

/* 1 / x of a normal number: an estimate and one step of Newton's method. */
INLINE vec short_inverse(vec x) {
#ifdef __AVX512F__
    vec estimate = _mm512_rcp14_ps(x);
#else
    vec estimate = {_mm256_rcp_ps(x.low), _mm256_rcp_ps(x.high)};
#endif
    return vec_mul(estimate, vec_sub(vec_set(2.0f), vec_mul(x, estimate)));
}

#define MOST_POWER 125.0f /* 1 over it is a normal number */

INLINE vec short_sigmoid(vec x) {
    vec power = vec_min(vec_set(MOST_POWER), vec_mul(x, vec_set(-LOG2_E))); /* in this order a NaN passes */
    return short_inverse(vec_add(vec_set(1.0f), power_of_two(power)));
}

INLINE vec short_silu(vec x) { return vec_mul(x, short_sigmoid(x)); }

/* As vec_gelu_tanh. */
INLINE vec short_gelu_tanh(vec x) {
    vec inner = vec_fma(vec_mul(x, x), vec_set(0.0713548162726f), vec_set(1.5957691216057308f));
    return vec_mul(x, short_sigmoid(vec_mul(x, inner)));
}
