/* Rotary embedding of queries and keys, and the writing of keys and values. */
#pragma once

#include "linear.h"

#define FEW_TOKENS 4 /* so few are not worth a second thread */

/* One head of one token, by way of float32; rounded once. cos and sin are null for values, which are copied. */
INLINE void rotate_head(const struct rotation *r, const bf16 *x, const bf16 *norm, const bf16 *cos, const bf16 *sin,
                        bf16 *out) {
    float head[MOST_DIM];
    int64_t dim = r->dim, rotary = r->rotary_dim, half = rotary / 2;
    vec scale = vec_set(norm ? row_scale(x, dim, r->epsilon) : 1.0f);
    for (int64_t i = 0; i < dim; i += LANES) {
        vec y = vec_mul(vec_load_bf16(x + i), scale);
        if (norm)
            y = vec_mul(y, vec_add(vec_load_bf16(norm + i), vec_set(r->norm_offset)));
        vec_store(head + i, y);
    }
    for (int64_t i = 0; i < rotary; i += LANES) {
        vec swapped = vec_load(head + (i < half ? i + half : i - half));
        vec turned = vec_mul(swapped, vec_load_bf16(sin + i));
        vec_store_bf16(out + i, vec_fma(vec_load(head + i), vec_load_bf16(cos + i), turned));
    }
    for (int64_t i = rotary; i < dim; i += LANES)
        vec_store_bf16(out + i, vec_load(head + i));
}

INLINE void rotate_token(const struct rotation *r, int64_t token) {
    const bf16 *x = r->qkv + token * r->qkv_stride;
    const bf16 *cos = r->cos + token * r->rotary_dim, *sin = r->sin + token * r->rotary_dim;
    bf16 *q = r->q + token * r->heads * r->dim;
    int64_t place = r->slots[token] * r->dim;
    for (int64_t head = 0; head < r->heads; head++, x += r->dim)
        rotate_head(r, x, r->query_norm, cos, sin, q + head * r->dim);
    for (int64_t head = 0; head < r->kv_heads; head++, x += r->dim)
        rotate_head(r, x, r->key_norm, cos, sin, r->keys + head * r->head_stride + place);
    for (int64_t head = 0; head < r->kv_heads; head++, x += r->dim)
        memcpy(r->values + head * r->head_stride + place, x, (size_t)r->dim * 2);
}

static void rotate_some(void *argument, int thread, int threads) {
    const struct rotation *r = argument;
    for (int64_t token = r->tokens * thread / threads; token < r->tokens * (thread + 1) / threads; token++)
        rotate_token(r, token);
}

static void rotate(const struct rotation *r) {
    quartet_run(rotate_some, (void *)r, r->tokens <= FEW_TOKENS ? 1 : r->threads);
}
