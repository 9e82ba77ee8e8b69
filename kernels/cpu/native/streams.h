/* Several residual streams (AltUp), and gates of which only the largest count. Widths are multiples of LANES. */
#pragma once

#include "rows.h"

/* (count,): what the router says of a row. */
INLINE void said_of(const struct mixing *m, int64_t row, float *out) {
    float said[LANES] = {0};
    for (int64_t i = 0; i < m->count; i++)
        said[i] = 2.0f * m->said[row * m->count + i] / (float)m->width;
    /* tanh(x) = 2 sigmoid(2 x) - 1 */
    vec_store(out, vec_sub(vec_mul(vec_set(2.0f), vec_sigmoid(vec_load(said))), vec_set(1.0f)));
}

INLINE float share(const struct mixing *m, int64_t number, const float *said) {
    float sum = 0;
    for (int64_t i = 0; i < m->count; i++)
        sum += from_bf16(m->weights[number * m->count + i]) * said[i];
    return sum;
}

static void predict_some(void *argument, int thread, int threads) {
    const struct mixing *m = argument;
    int64_t count = m->count;
    for (int64_t row = m->rows * thread / threads; row < m->rows * (thread + 1) / threads; row++) {
        float said[LANES], shares[MOST_STREAMS * MOST_STREAMS];
        said_of(m, row, said);
        for (int64_t i = 0; i < count * count; i++)
            shares[i] = share(m, i, said);
        const bf16 *from = m->stack + row * count * m->width;
        bf16 *to = m->predicted + row * count * m->width;
        for (int64_t i = 0; i < m->width; i += LANES) {
            vec streams[MOST_STREAMS];
            for (int64_t one = 0; one < count; one++)
                streams[one] = vec_load_bf16(from + one * m->width + i);
            for (int64_t one = 0; one < count; one++) {
                vec sum = streams[one];
                for (int64_t other = 0; other < count; other++)
                    sum = vec_fma(vec_set(shares[one * count + other]), streams[other], sum);
                vec_store_bf16(to + one * m->width + i, sum);
            }
        }
        memcpy(m->own + row * m->width, to + m->active * m->width, (size_t)m->width * 2);
    }
}

static void correct_some(void *argument, int thread, int threads) {
    const struct mixing *m = argument;
    int64_t count = m->count;
    for (int64_t row = m->rows * thread / threads; row < m->rows * (thread + 1) / threads; row++) {
        float said[LANES], shares[MOST_STREAMS];
        said_of(m, row, said);
        for (int64_t i = 0; i < count; i++)
            shares[i] = share(m, i, said) + 1.0f;
        const bf16 *from = m->predicted + row * count * m->width;
        bf16 *to = m->stack + row * count * m->width, *own = m->own + row * m->width;
        for (int64_t i = 0; i < m->width; i += LANES) {
            vec missed = vec_sub(vec_load_bf16(own + i), vec_load_bf16(from + m->active * m->width + i));
            for (int64_t one = 0; one < count; one++) {
                vec predicted = vec_load_bf16(from + one * m->width + i);
                vec_store_bf16(to + one * m->width + i, vec_fma(vec_set(shares[one]), missed, predicted));
            }
            vec active = vec_load_bf16(to + m->active * m->width + i);
            vec_store_bf16(own + i, m->scale ? vec_mul(active, vec_load_bf16(m->scale + i)) : active);
        }
    }
}

static void spread_some(void *argument, int thread, int threads) {
    const struct mixing *m = argument;
    for (int64_t row = m->rows * thread / threads; row < m->rows * (thread + 1) / threads; row++)
        for (int64_t one = 1; one < m->count; one++) {
            bf16 *to = m->stack + (row * m->count + one) * m->width;
            const bf16 *own = m->own + row * m->width;
            for (int64_t i = 0; i < m->width; i += LANES)
                vec_store_bf16(to + i, vec_add(vec_load_bf16(to + i), vec_load_bf16(own + i)));
        }
}

INLINE void mix(void (*some)(void *, int, int), const struct mixing *m) {
    quartet_run(some, (void *)m, threads_for(m->rows, m->count * m->width, m->threads));
}

static void predict(const struct mixing *m) { mix(predict_some, m); }
static void correct(const struct mixing *m) { mix(correct_some, m); }
static void spread(const struct mixing *m) { mix(spread_some, m); }

static void gate_sparsely(void *argument, int thread, int threads) {
    const struct gating *g = argument;
    for (int64_t row = g->rows * thread / threads; row < g->rows * (thread + 1) / threads; row++) {
        const bf16 *gate = g->gate + row * 2 * g->width, *factor = gate + g->width;
        vec sum = vec_set(0.0f), squares = vec_set(0.0f);
        for (int64_t i = 0; i < g->width; i += LANES)
            sum = vec_add(sum, vec_load_bf16(gate + i));
        vec mean = vec_set(vec_sum(sum) / (float)g->width);
        for (int64_t i = 0; i < g->width; i += LANES) {
            vec centred = vec_sub(vec_load_bf16(gate + i), mean);
            squares = vec_fma(centred, centred, squares);
        }
        vec least = vec_set(sqrtf(vec_sum(squares) / (float)g->width) * g->cutoff);
        for (int64_t i = 0; i < g->width; i += LANES) {
            bf16 rounded[LANES];
            vec above = vec_sub(vec_sub(vec_load_bf16(gate + i), mean), least);
            vec_store_bf16(rounded, vec_max(vec_set(0.0f), above)); /* in this order a NaN passes */
            vec_store_bf16(rounded, activated(g->activation, vec_load_bf16(rounded)));
            vec y = vec_mul(vec_load_bf16(rounded), vec_load_bf16(factor + i));
            vec_store_bf16(g->out + row * g->width + i, y);
        }
    }
}

static void gate_sparse(const struct gating *g) {
    quartet_run(gate_sparsely, (void *)g, threads_for(g->rows, g->width, g->threads));
}
