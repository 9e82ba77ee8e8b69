/* Operations on whole rows: norms, gates, and weighted sums. */
#pragma once

#include "linear.h"

#define FEW_NUMBERS 16384 /* so few are not worth a second thread */

INLINE int threads_for(int64_t rows, int64_t width, int32_t threads) { return rows * width <= FEW_NUMBERS ? 1 : threads; }

INLINE vec load_row(const struct rows *r, int64_t at) {
    if (!r->sums)
        return vec_load_bf16(r->x + at);
    bf16 rounded[LANES];
    vec_store_bf16(rounded, vec_load(r->sums + at));
    return vec_load_bf16(rounded);
}

INLINE float row_number(const struct rows *r, int64_t at) {
    return r->sums ? from_bf16(to_bf16(r->sums[at])) : from_bf16(r->x[at]);
}

/* What a row is multiplied with before the weight of its norm. */
INLINE float scale_of(const struct rows *r, int64_t begin) {
    vec squares = vec_set(0.0f);
    int64_t i = 0;
    for (; i + LANES <= r->width; i += LANES) {
        vec some = load_row(r, begin + i);
        squares = vec_fma(some, some, squares);
    }
    float sum = vec_sum(squares);
    for (; i < r->width; i++)
        sum += row_number(r, begin + i) * row_number(r, begin + i);
    return 1.0f / sqrtf(sum / (float)r->width + r->norm.epsilon);
}

INLINE void norm_row(const struct rows *r, int64_t row, int adds) {
    int64_t begin = row * r->width, i = 0;
    float scale = r->norm.weight ? scale_of(r, begin) : 1.0f;
    for (; i + LANES <= r->width; i += LANES) {
        vec y = load_row(r, begin + i);
        bf16 rounded[LANES];
        if (r->norm.weight)
            y = vec_mul(vec_mul(y, vec_set(scale)), vec_add(vec_load_bf16(r->norm.weight + i), vec_set(r->norm.offset)));
        vec_store_bf16(rounded, y);
        if (adds)
            vec_store_bf16(rounded, vec_add(vec_load_bf16(r->out + begin + i), vec_load_bf16(rounded)));
        if (r->scale != 0)
            vec_store_bf16(rounded, vec_mul(vec_load_bf16(rounded), vec_set(r->scale)));
        memcpy(r->out + begin + i, rounded, sizeof rounded);
    }
    for (; i < r->width; i++) {
        float y = row_number(r, begin + i);
        if (r->norm.weight)
            y = y * scale * (from_bf16(r->norm.weight[i]) + r->norm.offset);
        bf16 rounded = to_bf16(y);
        if (adds)
            rounded = to_bf16(from_bf16(r->out[begin + i]) + from_bf16(rounded));
        r->out[begin + i] = r->scale != 0 ? to_bf16(from_bf16(rounded) * r->scale) : rounded;
    }
}

static void norm_some(void *argument, int thread, int threads) {
    const struct rows *r = argument;
    for (int64_t row = r->rows * thread / threads; row < r->rows * (thread + 1) / threads; row++)
        norm_row(r, row, 0);
}

static void add_some(void *argument, int thread, int threads) {
    const struct rows *r = argument;
    for (int64_t row = r->rows * thread / threads; row < r->rows * (thread + 1) / threads; row++)
        norm_row(r, row, 1);
}

static void norm(const struct rows *r) {
    quartet_run(norm_some, (void *)r, threads_for(r->rows, r->width, r->threads));
}

static void add_normed(const struct rows *r) {
    quartet_run(add_some, (void *)r, threads_for(r->rows, r->width, r->threads));
}

INLINE vec activated(int activation, vec x) { return activation == ACTIVATION_SILU ? vec_silu(x) : vec_gelu_tanh(x); }

static void gate_some(void *argument, int thread, int threads) {
    const struct gating *g = argument;
    int64_t i = g->rows * thread / threads * g->width, end = g->rows * (thread + 1) / threads * g->width;
    bf16 rounded[LANES];
    for (; i + LANES <= end; i += LANES) {
        vec_store_bf16(rounded, activated(g->activation, vec_load_bf16(g->gate + i)));
        vec_store_bf16(g->out + i, vec_mul(vec_load_bf16(rounded), vec_load_bf16(g->factor + i)));
    }
    for (; i < end; i++) {
        vec_store_bf16(rounded, activated(g->activation, vec_set(from_bf16(g->gate[i]))));
        g->out[i] = to_bf16(from_bf16(rounded[0]) * from_bf16(g->factor[i]));
    }
}

static void gate_rows(const struct gating *g) {
    quartet_run(gate_some, (void *)g, threads_for(g->rows, g->width, g->threads));
}

static void weigh_some(void *argument, int thread, int threads) {
    const struct weighted *w = argument;
    for (int64_t row = w->rows * thread / threads; row < w->rows * (thread + 1) / threads; row++) {
        const bf16 *x = w->x + row * w->width;
        float *sums = w->sums + (w->places ? w->places[row] : row) * w->width, weight = w->weights[row];
        int64_t i = 0;
        for (; i + LANES <= w->width; i += LANES)
            vec_store(sums + i, vec_fma(vec_load_bf16(x + i), vec_set(weight), vec_load(sums + i)));
        for (; i < w->width; i++)
            sums[i] = __builtin_fmaf(from_bf16(x[i]), weight, sums[i]);
    }
}

static void add_weighted(const struct weighted *w) {
    quartet_run(weigh_some, (void *)w, threads_for(w->rows, w->width, w->threads));
}
