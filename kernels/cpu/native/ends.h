/* Rows on their way into a product, 16 numbers at a time, and its sums on their way out (linear.h). */
#pragma once

#include "api.h"
#include "powers.h"
#include "vector.h"

/* ---- rows on their way in ---- */

INLINE float row_scale(const bf16 *x, int64_t k, float epsilon) {
    vec squares = vec_set(0.0f);
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        vec some = vec_load_bf16(x + i);
        squares = vec_fma(some, some, squares);
    }
    float sum = vec_sum(squares);
    for (; i < k; i++) {
        float one = from_bf16(x[i]);
        sum += one * one;
    }
    return 1.0f / sqrtf(sum / (float)k + epsilon);
}

/* 16 numbers of a row, normed, rounded to bfloat16; zeros behind the end. */
INLINE void load_normed(const struct product *p, const bf16 *row, float scale, int64_t at, bf16 *out) {
    bf16 numbers[LANES] = {0}, weights[LANES] = {0};
    const bf16 *x = row + at, *weight = p->norm ? p->norm + at : 0;
    if (at + LANES > p->k) {
        int64_t left = at < p->k ? p->k - at : 0;
        memcpy(numbers, x, (size_t)left * 2);
        x = numbers;
        if (weight) {
            memcpy(weights, weight, (size_t)left * 2);
            weight = weights;
        }
    }
    if (!weight) {
        memcpy(out, x, LANES * 2);
        return;
    }
    vec scaled = vec_mul(vec_load_bf16(x), vec_set(scale));
    vec_store_bf16(out, vec_mul(scaled, vec_add(vec_load_bf16(weight), vec_set(p->norm_offset))));
}

/* ---- sums on their way out ---- */

/* 16 numbers of the bias from `column` on; zeros behind the end. */
INLINE vec bias_at(const struct product *p, int64_t column) {
    bf16 some[LANES] = {0};
    int64_t left = p->n - column;
    memcpy(some, p->bias + column, (size_t)(left < LANES ? left : LANES) * 2);
    return vec_load_bf16(some);
}

INLINE vec gate(int activation, vec x, vec factor) {
    return vec_mul(activation == ACTIVATION_SILU ? short_silu(x) : short_gelu_tanh(x), factor);
}

/* Of one row, `count` numbers, which are fewer than 16. */
INLINE void write_some(int output, void *to, int64_t count, vec y) {
    if (output == OUTPUT_FLOAT) {
        float numbers[LANES];
        vec_store(numbers, y);
        memcpy(to, numbers, (size_t)count * 4);
        return;
    }
    bf16 numbers[LANES] = {0};
    if (output == OUTPUT_ADD) {
        memcpy(numbers, to, (size_t)count * 2);
        y = vec_add(y, vec_load_bf16(numbers));
    }
    vec_store_bf16(numbers, y);
    memcpy(to, numbers, (size_t)count * 2);
}

/* 16 columns of some rows, or the `left` that there are, to `out`, whose rows are `out_stride` numbers apart; sums of what
 * the gate is multiplied with lie `up` behind. */
INLINE void write_columns(const struct product *p, int output, int biased, int64_t column, int64_t rows, int64_t left,
                          char *out, int64_t out_stride, const float *sums, int64_t stride, int64_t up) {
    int64_t size = output == OUTPUT_FLOAT ? 4 : 2;
    int activation = p->activation;
    vec bias = vec_set(0.0f), up_bias = bias;
    if (biased) {
        bias = bias_at(p, column);
        if (output == OUTPUT_GATED)
            up_bias = bias_at(p, p->n / 2 + column);
    }
    for (int64_t row = 0; row < rows; row++, sums += stride, out += out_stride * size) {
        vec y = vec_load(sums);
        if (biased)
            y = vec_add(y, bias);
        if (output == OUTPUT_GATED) {
            vec factor = vec_load(sums + up);
            y = gate(activation, y, biased ? vec_add(factor, up_bias) : factor);
        }
        if (left < LANES) {
            write_some(output, out, left, y);
        } else if (output == OUTPUT_FLOAT) {
            vec_store((float *)out, y);
        } else {
            if (output == OUTPUT_ADD)
                y = vec_add(y, vec_load_bf16((const bf16 *)out));
            vec_store_bf16((bf16 *)out, y);
        }
    }
}
