/* The integers, scale and offset that come nearest to a group of numbers. For any machine with AVX2. */
#pragma once

#include "quantized.h"

#define TRIALS 16          /* scales that are tried for a group with an offset */
#define SYMMETRIC_TRIALS 12 /* without one, with fewer than 8 bits */
#define SCALE_POWERS 16 /* of two, that a row's scales span */
#define SMALLEST_POWER -24 /* that they stay below at least: errors of values times LEAST_SCALE do not vanish */
#define LEAST_SCALE 0x1p-40f
#define SCALE_ROOM 1.07f /* scales that are larger by so much are tried too */
#define BYTES_BELOW 2    /* scales that are tried, around the one for which the numbers just suffice */
#define BYTES_ABOVE 3
#define ZERO_TRIALS 3

INLINE float as_half(float x) { return _cvtsh_ss(_cvtss_sh(x, 0)); }

/* A group of numbers, 16 or 32 of them; with 16 the second vector is left out. */
struct group {
    vec x[2];
    int vecs;
};

INLINE void store_numbers(uint8_t *out, vec numbers) {
    float some[LANES];
    vec_store(some, numbers);
    for (int i = 0; i < LANES; i++)
        out[i] = (uint8_t)(int)some[i];
}

INLINE vec clamp(vec x, float least, float most) { return vec_min(vec_max(x, vec_set(least)), vec_set(most)); }

/* scale * (number - zero), for numbers from 1 to 2 * zero - 1: the largest value gets the largest number. */
INLINE void quantize_symmetric(const struct group *g, int zero, uint8_t *out, float *scale) {
    vec largest = vec_set(0.0f);
    for (int i = 0; i < g->vecs; i++)
        largest = vec_max(largest, vec_max(g->x[i], vec_sub(vec_set(0.0f), g->x[i])));
    float most = (float)(zero - 1);
    *scale = as_half(vec_largest(largest) / most);
    float inverse = *scale > 0 ? 1.0f / *scale : 0.0f;
    for (int i = 0; i < g->vecs; i++) {
        vec number = clamp(vec_round(vec_mul(g->x[i], vec_set(inverse))), -most, most);
        store_numbers(out + i * LANES, vec_add(number, vec_set((float)zero)));
    }
}

/* The same with fewer bits, where rounding costs more: numbers from 0 to 2 * zero - 1. The scale has the sign with which the
 * value farthest from 0 gets a number near 0: there is one more on that side. Of several scales, each improved by least
 * squares, the one whose error is the least, where the error of a large number counts for more (make_qx_quants of ggml). */
INLINE void fit_symmetric(const struct group *g, int zero, uint8_t *out, float *best_scale) {
    float most = (float)zero, best_error = INFINITY;
    vec none = vec_set(0.0f), least = none, largest = none, squares = none, best[2] = {none, none}, weights[2], numbers[2];
    for (int i = 0; i < g->vecs; i++) {
        weights[i] = vec_max(g->x[i], vec_sub(none, g->x[i]));
        largest = vec_max(largest, g->x[i]);
        least = vec_max(least, vec_sub(none, g->x[i]));
        squares = vec_fma(g->x[i], g->x[i], squares);
    }
    float above = vec_largest(largest), below = vec_largest(least), span = above > below ? -above : below;
    float usual = sqrtf(vec_sum(squares) / (float)(g->vecs * LANES));
    for (int i = 0; i < g->vecs; i++)
        weights[i] = vec_add(weights[i], vec_set(usual));
    *best_scale = as_half(span / most); /* stays where the values are too large for float16 */
    for (int trial = 0; trial < SYMMETRIC_TRIALS && span != 0; trial++) {
        float scale = span / (most + ((float)trial - SYMMETRIC_TRIALS / 2) * 0.25f);
        vec sum_nn = none, sum_nx = none, errors = none;
        for (int again = 0; again < 2; again++) {
            vec inverse = vec_set(scale != 0 ? 1.0f / scale : 0.0f);
            for (int i = 0; i < g->vecs; i++) {
                numbers[i] = clamp(vec_round(vec_mul(g->x[i], inverse)), -most, most - 1.0f);
                if (again) {
                    vec difference = vec_sub(vec_mul(numbers[i], vec_set(scale)), g->x[i]);
                    errors = vec_fma(vec_mul(weights[i], difference), difference, errors);
                } else {
                    vec wn = vec_mul(weights[i], numbers[i]);
                    sum_nn = vec_fma(wn, numbers[i], sum_nn);
                    sum_nx = vec_fma(wn, g->x[i], sum_nx);
                }
            }
            if (!again)
                scale = as_half(vec_sum(sum_nx) / vec_sum(sum_nn));
        }
        float error = vec_sum(errors);
        if (error < best_error) {
            best_error = error;
            *best_scale = scale;
            memcpy(best, numbers, sizeof best);
        }
    }
    for (int i = 0; i < g->vecs; i++)
        store_numbers(out + i * LANES, vec_add(best[i], vec_set((float)zero)));
}

INLINE void numbers_of(const struct group *g, float scale, float offset, float most, vec *numbers) {
    vec inverse = vec_set(scale > 0 ? 1.0f / scale : 0.0f);
    for (int i = 0; i < g->vecs; i++)
        numbers[i] = clamp(vec_round(vec_mul(vec_sub(g->x[i], vec_set(offset)), inverse)), 0.0f, most);
}

/* scale * number + offset: of several scales, each improved by least squares, the one whose error is the least, where
 * the error of a large number counts for more. */
INLINE void quantize_offset(const struct group *g, float most, uint8_t *out, float *best_scale, float *best_offset) {
    vec zero = vec_set(0.0f), squares = zero, least = g->x[0], largest = g->x[0], numbers[2], weights[2], best[2];
    for (int i = 0; i < g->vecs; i++) {
        least = vec_min(least, g->x[i]);
        largest = vec_max(largest, g->x[i]);
        squares = vec_fma(g->x[i], g->x[i], squares);
    }
    float low = -vec_largest(vec_sub(zero, least)), span = vec_largest(largest) - low;
    float usual = sqrtf(vec_sum(squares) / (float)(g->vecs * LANES)), best_error = INFINITY;
    vec all = zero, all_x = zero;
    for (int i = 0; i < g->vecs; i++) {
        weights[i] = vec_add(vec_set(usual), vec_max(g->x[i], vec_sub(zero, g->x[i])));
        all = vec_add(all, weights[i]);
        all_x = vec_fma(weights[i], g->x[i], all_x);
        best[i] = zero;
    }
    float w = vec_sum(all), wx = vec_sum(all_x);
    *best_scale = *best_offset = INFINITY; /* where the values are too large for float16 */
    for (int trial = 0; trial < TRIALS; trial++) {
        float scale = span / (most - 1.0f + (float)trial * 2.0f / (TRIALS - 1)), offset = low;
        numbers_of(g, scale, offset, most, numbers);
        vec sum_n = zero, sum_nn = zero, sum_nx = zero, errors = zero;
        for (int i = 0; i < g->vecs; i++) {
            vec wn = vec_mul(weights[i], numbers[i]);
            sum_n = vec_add(sum_n, wn);
            sum_nn = vec_fma(wn, numbers[i], sum_nn);
            sum_nx = vec_fma(wn, g->x[i], sum_nx);
        }
        float wn = vec_sum(sum_n), wnn = vec_sum(sum_nn), wnx = vec_sum(sum_nx), determinant = w * wnn - wn * wn;
        if (determinant > 0) {
            scale = (w * wnx - wn * wx) / determinant;
            offset = (wnn * wx - wn * wnx) / determinant;
        }
        scale = as_half(scale), offset = as_half(offset);
        if (!(scale > 0)) {
            scale = 0;
            offset = as_half(w > 0 ? wx / w : 0.0f);
        }
        numbers_of(g, scale, offset, most, numbers);
        for (int i = 0; i < g->vecs; i++) {
            vec difference = vec_sub(vec_fma(numbers[i], vec_set(scale), vec_set(offset)), g->x[i]);
            errors = vec_fma(vec_mul(weights[i], difference), difference, errors);
        }
        float error = vec_sum(errors);
        if (error < best_error) {
            best_error = error;
            *best_scale = scale;
            *best_offset = offset;
            memcpy(best, numbers, sizeof best);
        }
    }
    for (int i = 0; i < g->vecs; i++)
        store_numbers(out + i * LANES, best[i]);
}

/* ---- with scales that are bytes ---- */

INLINE float byte_scale(float least, int byte) {
    uint32_t bits;
    memcpy(&bits, &least, 4);
    bits += (uint32_t)byte << SCALE_SHIFT;
    memcpy(&least, &bits, 4);
    return least;
}

/* The byte of the next smaller scale, 0 to 255. */
INLINE int scale_byte(float scale, float least) {
    uint32_t own, from;
    memcpy(&own, &scale, 4);
    memcpy(&from, &least, 4);
    int byte = scale > least ? (int)((own - from) >> SCALE_SHIFT) : 0;
    return byte < 255 ? byte : 255;
}

struct span {
    float low, high, size;
};

/* From the least to the largest value and 0; or, without offsets, the largest absolute value. */
INLINE struct span span_of(const struct group *g, int offsets) {
    vec none = vec_set(0.0f), above = none, below = none;
    for (int i = 0; i < g->vecs; i++) {
        above = vec_max(above, g->x[i]);
        below = vec_max(below, vec_sub(none, g->x[i]));
    }
    float low = -vec_largest(below), high = vec_largest(above);
    return (struct span){low, high, offsets ? high - low : fmaxf(high, -low)};
}

INLINE void weigh(const struct group *g, vec *weights) {
    vec none = vec_set(0.0f), squares = none;
    for (int i = 0; i < g->vecs; i++)
        squares = vec_fma(g->x[i], g->x[i], squares);
    vec usual = vec_set(sqrtf(vec_sum(squares) / (float)(g->vecs * LANES)));
    for (int i = 0; i < g->vecs; i++)
        weights[i] = vec_add(usual, vec_max(g->x[i], vec_sub(none, g->x[i])));
}

/* scale * (number - zero): of several scales the one whose error is the least, where that of a large number counts for more. */
INLINE void fit_bytes(const struct group *g, float zero, float least, uint8_t *out, float *best_scale) {
    float best_error = INFINITY;
    *best_scale = INFINITY; /* where the values are too large */
    vec weights[2], numbers[2], best[2] = {vec_set(0.0f), vec_set(0.0f)};
    int middle = scale_byte(span_of(g, 0).size / zero, least);
    weigh(g, weights);
    for (int byte = middle - BYTES_BELOW; byte <= middle + BYTES_ABOVE; byte++) {
        if (byte < 0 || byte > 255)
            continue;
        float scale = byte_scale(least, byte);
        vec errors = vec_set(0.0f);
        for (int i = 0; i < g->vecs; i++) {
            numbers[i] = clamp(vec_round(vec_mul(g->x[i], vec_set(1.0f / scale))), -zero, zero - 1.0f);
            vec difference = vec_sub(vec_mul(numbers[i], vec_set(scale)), g->x[i]);
            errors = vec_fma(vec_mul(weights[i], difference), difference, errors);
        }
        float error = vec_sum(errors);
        if (error < best_error) {
            best_error = error;
            *best_scale = scale;
            memcpy(best, numbers, sizeof best);
        }
    }
    for (int i = 0; i < g->vecs; i++)
        store_numbers(out + i * LANES, vec_add(best[i], vec_set(zero)));
}

/* The offset that is nearest, of those that a scale has. */
INLINE float byte_offset(float offset, float scale) {
    float zero = fminf(fmaxf(rintf(-offset / scale * ZERO_STEPS), 0.0f), 255.0f);
    return -scale * zero / ZERO_STEPS;
}

/* scale * number + offset: of several scales, and offsets each improved once, those whose error is the least. */
INLINE void fit_bytes_offset(const struct group *g, float most, float least, uint8_t *out, float *best_scale,
                             float *best_offset) {
    float best_error = INFINITY;
    vec none = vec_set(0.0f), weights[2], numbers[2], best[2] = {none, none}, all = none, all_x = none;
    struct span span = span_of(g, 1);
    int middle = scale_byte(span.size / most, least);
    weigh(g, weights);
    for (int i = 0; i < g->vecs; i++) {
        all = vec_add(all, weights[i]);
        all_x = vec_fma(weights[i], g->x[i], all_x);
    }
    float total = vec_sum(all), total_x = vec_sum(all_x);
    *best_scale = *best_offset = INFINITY; /* where the values are too large */
    for (int byte = middle - BYTES_BELOW; byte <= middle + BYTES_ABOVE; byte++)
        for (int trial = 0; trial < ZERO_TRIALS && byte >= 0 && byte < 256; trial++) {
            float scale = byte_scale(least, byte), share = (float)trial / (ZERO_TRIALS - 1);
            float offset = byte_offset(span.low * (1.0f - share) + (span.high - most * scale) * share, scale);
            vec total_n = none, errors = none;
            numbers_of(g, scale, offset, most, numbers);
            for (int i = 0; i < g->vecs; i++)
                total_n = vec_fma(weights[i], numbers[i], total_n);
            if (total > 0)
                offset = byte_offset((total_x - scale * vec_sum(total_n)) / total, scale);
            numbers_of(g, scale, offset, most, numbers);
            for (int i = 0; i < g->vecs; i++) {
                vec difference = vec_sub(vec_fma(numbers[i], vec_set(scale), vec_set(offset)), g->x[i]);
                errors = vec_fma(vec_mul(weights[i], difference), difference, errors);
            }
            float error = vec_sum(errors);
            if (error < best_error) {
                best_error = error;
                *best_scale = scale;
                *best_offset = offset;
                memcpy(best, numbers, sizeof best);
            }
        }
    for (int i = 0; i < g->vecs; i++)
        store_numbers(out + i * LANES, best[i]);
}

/* Comparisons lose a NaN: where a value is one, or infinite, the scale says so. */
INLINE int is_finite(const struct group *g) {
    vec none = vec_set(0.0f), sum = none;
    for (int i = 0; i < g->vecs; i++)
        sum = vec_fma(g->x[i], none, sum);
    return vec_sum(sum) == 0;
}
