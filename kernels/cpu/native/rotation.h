/* Norms of heads, rotary embedding of queries and keys, and the writing of keys and values. */
#pragma once

#include "linear.h"

#define FEW_TOKENS 4 /* so few are not worth a second thread */

/* Numbers of a head, from `i` on; `scale` and `norm` (or null) are those of its norm. */
INLINE vec normed_part(const struct rotation *r, const bf16 *x, const bf16 *norm, vec scale, int64_t i) {
    vec y = vec_mul(vec_load_bf16(x + i), scale);
    return norm ? vec_mul(y, vec_add(vec_load_bf16(norm + i), vec_set(r->norm_offset))) : y;
}

/* One head of one token, by way of float32; rounded once. */
INLINE void rotate_head(const struct rotation *r, const bf16 *x, const bf16 *norm, const bf16 *cos, const bf16 *sin,
                        bf16 *out) {
    float head[MOST_DIM];
    int64_t dim = r->dim, rotary = r->rotary_dim, half = rotary / 2;
    vec scale = vec_set(norm ? row_scale(x, dim, r->epsilon) : 1.0f);
    for (int64_t i = 0; i < dim; i += LANES)
        vec_store(head + i, normed_part(r, x, norm, scale, i));
    for (int64_t i = 0; i < rotary; i += LANES) {
        vec swapped = vec_load(head + (i < half ? i + half : i - half));
        vec turned = vec_mul(swapped, vec_load_bf16(sin + i));
        vec_store_bf16(out + i, vec_fma(vec_load(head + i), vec_load_bf16(cos + i), turned));
    }
    for (int64_t i = rotary; i < dim; i += LANES)
        vec_store_bf16(out + i, vec_load(head + i));
}

/* The values of one head and one token, on their way to the pool. */
INLINE void write_values(const struct rotation *r, const bf16 *x, bf16 *out) {
    if (!r->value_norm) {
        memcpy(out, x, (size_t)r->dim * 2);
        return;
    }
    vec scale = vec_set(row_scale(x, r->dim, r->epsilon));
    for (int64_t i = 0; i < r->dim; i += LANES)
        vec_store_bf16(out + i, normed_part(r, x, r->value_norm, scale, i));
}

INLINE void rotate_token(const struct rotation *r, int64_t token) {
    const bf16 *x = r->qkv + token * r->qkv_stride, *keys = x + r->heads * r->dim;
    const bf16 *values = r->values_from_keys ? keys : keys + r->kv_heads * r->dim;
    const bf16 *cos = r->cos + token * r->rotary_dim, *sin = r->sin + token * r->rotary_dim;
    bf16 *q = r->q + token * r->heads * r->dim;
    int64_t place = r->slots[token] * r->dim;
    for (int64_t head = 0; head < r->heads; head++, x += r->dim)
        rotate_head(r, x, r->query_norm, cos, sin, q + head * r->dim);
    for (int64_t head = 0; head < r->kv_heads; head++) {
        int64_t to = head * r->head_stride + place;
        rotate_head(r, keys + head * r->dim, r->key_norm, cos, sin, r->keys + to);
        write_values(r, values + head * r->dim, r->values + to);
    }
}

static void rotate_some(void *argument, int thread, int threads) {
    const struct rotation *r = argument;
    for (int64_t token = r->tokens * thread / threads; token < r->tokens * (thread + 1) / threads; token++)
        rotate_token(r, token);
}

static void rotate(const struct rotation *r) {
    quartet_run(rotate_some, (void *)r, r->tokens <= FEW_TOKENS ? 1 : r->threads);
}
