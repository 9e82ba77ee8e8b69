/* Sixteen float lanes on the instruction set that the including file was compiled for.
 *
 * AVX2 holds them in two registers, AVX-512 in one. A "pair line" is 64 bytes of bfloat16: for 16 columns, two numbers
 * that are neighbours in k. Its even numbers are the lower halves of 32-bit words.
 */
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline, unused))
#define OUTLINE static __attribute__((noinline, unused)) /* compiled once, where several places call it */
#define LANES 16

/* VDPBF16PS multiplies, on AMD's CPUs: where there are tiles these do, and others of Intel's are faster in float. */
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define PAIRS
#endif

/* The cache into which a weight is prefetched that is read once. With PAIRS it is the second: so many lines under way to the
 * first one would wait for each other, and quantized weights come a third faster. */
#ifdef PAIRS
#define ASKED_TO _MM_HINT_T1
#else
#define ASKED_TO _MM_HINT_T0
#endif

typedef uint16_t bf16;

INLINE float from_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

#ifdef __AVX512F__

typedef __m512 vec;

INLINE vec vec_set(float x) { return _mm512_set1_ps(x); }
INLINE vec vec_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vec_store(float *p, vec x) { _mm512_storeu_ps(p, x); }
INLINE vec vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec vec_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec vec_div(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec vec_max(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec vec_min(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE float vec_sum(vec x) { return _mm512_reduce_add_ps(x); }
INLINE float vec_largest(vec x) { return _mm512_reduce_max_ps(x); }
INLINE vec vec_round(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec vec_scale_exponent(vec x, vec whole) { return _mm512_scalef_ps(x, whole); }

/* 0 in place of what is below `least`, or is no number. */
INLINE vec vec_from(vec x, float least) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, vec_set(least), _CMP_GE_OQ), x);
}

INLINE vec vec_load_bf16(const bf16 *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* To bfloat16 in the lower halves: nearest even; a NaN stays one. */
INLINE __m512i rounded_bf16(vec x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_srli_epi32(rounded, 16);
}

INLINE void vec_store_bf16(bf16 *p, vec x) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(rounded_bf16(x)));
#endif
}

INLINE void vec_store_pairs(bf16 *p, vec even, vec odd) {
    __m512i upper = _mm512_slli_epi32(rounded_bf16(odd), 16);
    _mm512_storeu_si512(p, _mm512_or_si512(rounded_bf16(even), upper));
}

INLINE vec vec_load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

INLINE void vec_load_pairs(const bf16 *p, vec *even, vec *odd) {
    __m512i words = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xFFFF0000)));
}

#else /* AVX2 and FMA */

typedef struct {
    __m256 low, high;
} vec;

INLINE vec vec_set(float x) { return (vec){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE vec vec_load(const float *p) { return (vec){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void vec_store(float *p, vec x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
#define BINARY(name, op) \
    INLINE vec name(vec a, vec b) { return (vec){op(a.low, b.low), op(a.high, b.high)}; }
BINARY(vec_add, _mm256_add_ps)
BINARY(vec_sub, _mm256_sub_ps)
BINARY(vec_mul, _mm256_mul_ps)
BINARY(vec_div, _mm256_div_ps)
BINARY(vec_max, _mm256_max_ps)
BINARY(vec_min, _mm256_min_ps)
#undef BINARY
INLINE vec vec_fma(vec a, vec b, vec c) {
    return (vec){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE float vec_sum(vec x) {
    __m256 eight = _mm256_add_ps(x.low, x.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
INLINE float vec_largest(vec x) {
    __m256 eight = _mm256_max_ps(x.low, x.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
#define ROUND(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
INLINE vec vec_round(vec x) { return (vec){ROUND(x.low), ROUND(x.high)}; }
#undef ROUND
INLINE __m256 from8(__m256 x, __m256 least) { return _mm256_and_ps(x, _mm256_cmp_ps(x, least, _CMP_GE_OQ)); }
INLINE vec vec_from(vec x, float least) {
    return (vec){from8(x.low, _mm256_set1_ps(least)), from8(x.high, _mm256_set1_ps(least))};
}
/* x * 2^whole for whole numbers in [-126, 127]. */
INLINE __m256 scale_exponent(__m256 x, __m256 whole) {
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
}
INLINE vec vec_scale_exponent(vec x, vec whole) {
    return (vec){scale_exponent(x.low, whole.low), scale_exponent(x.high, whole.high)};
}
INLINE __m256 load8_bf16(const bf16 *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE vec vec_load_bf16(const bf16 *p) { return (vec){load8_bf16(p), load8_bf16(p + 8)}; }
INLINE __m256i rounded_bf16(__m256 x) { /* in the lower halves */
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
INLINE void vec_store_bf16(bf16 *p, vec x) {
    __m256i packed = _mm256_packus_epi32(rounded_bf16(x.low), rounded_bf16(x.high));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xD8));
}
INLINE void vec_store_pairs(bf16 *p, vec even, vec odd) {
    __m256i *out = (__m256i *)p;
    _mm256_storeu_si256(out, _mm256_or_si256(rounded_bf16(even.low), _mm256_slli_epi32(rounded_bf16(odd.low), 16)));
    _mm256_storeu_si256(out + 1,
                        _mm256_or_si256(rounded_bf16(even.high), _mm256_slli_epi32(rounded_bf16(odd.high), 16)));
}

INLINE vec vec_load_half(const uint16_t *p) {
    const __m128i *halves = (const __m128i *)p;
    return (vec){_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}

INLINE void vec_load_pairs(const bf16 *p, vec *even, vec *odd) {
    __m256i low = _mm256_loadu_si256((const __m256i *)p), high = _mm256_loadu_si256((const __m256i *)p + 1);
    __m256i upper = _mm256_set1_epi32((int)0xFFFF0000);
    even->low = _mm256_castsi256_ps(_mm256_slli_epi32(low, 16));
    even->high = _mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
    odd->low = _mm256_castsi256_ps(_mm256_and_si256(low, upper));
    odd->high = _mm256_castsi256_ps(_mm256_and_si256(high, upper));
}

#endif

INLINE bf16 to_bf16(float x) {
    bf16 out[LANES];
    vec_store_bf16(out, vec_set(x));
    return out[0];
}

/* e^x, within 2 units in the last place; 0 below -87, at most e^88. Coefficients: Cephes' expf. */
INLINE vec vec_exp(vec x) {
    x = vec_min(vec_set(88.0f), vec_max(vec_set(-87.3f), x)); /* in this order a NaN passes */
    vec whole = vec_round(vec_mul(x, vec_set(1.44269504088896341f)));
    vec part = vec_fma(whole, vec_set(-0.693359375f), x);
    part = vec_fma(whole, vec_set(2.12194440e-4f), part);
    vec y = vec_set(1.9875691500e-4f);
    y = vec_fma(y, part, vec_set(1.3981999507e-3f));
    y = vec_fma(y, part, vec_set(8.3334519073e-3f));
    y = vec_fma(y, part, vec_set(4.1665795894e-2f));
    y = vec_fma(y, part, vec_set(1.6666665459e-1f));
    y = vec_fma(y, part, vec_set(5.0000001201e-1f));
    y = vec_fma(y, vec_mul(part, part), vec_add(part, vec_set(1.0f)));
    return vec_scale_exponent(y, whole);
}

INLINE vec vec_sigmoid(vec x) {
    return vec_div(vec_set(1.0f), vec_add(vec_set(1.0f), vec_exp(vec_sub(vec_set(0.0f), x))));
}

INLINE vec vec_silu(vec x) { return vec_mul(x, vec_sigmoid(x)); }

/* The tanh form of gelu: 0.5 x (1 + tanh(y)) = x sigmoid(2 y). */
INLINE vec vec_gelu_tanh(vec x) {
    vec cubed = vec_mul(vec_mul(x, x), x);
    vec inner = vec_mul(vec_set(1.5957691216057308f), vec_fma(cubed, vec_set(0.044715f), x));
    return vec_mul(x, vec_sigmoid(inner));
}
