/* Recurrent layers: the gated delta rule and the state space of Mamba-2, with the convolution in front of them.
 *
 * Tokens go one by one through a state in float32, prompts too: a block of its columns stays in the first cache, where a
 * step of the recurrence takes fewer operations than the products of chunks. So each sum has one order, and a token has
 * the same bits alone, among others, and wherever its prompt is cut. Threads share channels, then heads, then tokens.
 *
 * Columns of a state do not know of one another, which gives the lanes of a vector:
 *
 *     state = kept * state + key change^T, y = state^T query; change = rate * value in a state space,
 *     change = rate * (value - state^T (kept * key)) under the delta rule
 *
 * One sweep over the state makes a token's y and what the next token needs of it.
 */
#pragma once

#include "convolution.h"

#define TILE_NUMBERS 16384 /* of a block of a state */
#define WIDE_KEYS 128      /* up to such keys a block has 64 columns on AVX-512, else 32 */
#define FEW_UPDATES 32768  /* numbers of states: so few are not worth a second thread */

/* log(1 + e^x). With z = e^-|x|: log(1 + z) = 2 artanh(z / (2 + z)), whose series ends below a float's last bit. */
INLINE vec vec_softplus(vec x) {
    vec zero = vec_set(0.0f), z = vec_exp(vec_min(x, vec_sub(zero, x)));
    vec s = vec_div(z, vec_add(vec_set(2.0f), z)), square = vec_mul(s, s);
    vec y = vec_set(1.0f / 15.0f);
    y = vec_fma(y, square, vec_set(1.0f / 13.0f));
    y = vec_fma(y, square, vec_set(1.0f / 11.0f));
    y = vec_fma(y, square, vec_set(1.0f / 9.0f));
    y = vec_fma(y, square, vec_set(1.0f / 7.0f));
    y = vec_fma(y, square, vec_set(1.0f / 5.0f));
    y = vec_fma(y, square, vec_set(1.0f / 3.0f));
    y = vec_fma(y, square, vec_set(1.0f));
    return vec_fma(vec_mul(vec_set(2.0f), s), y, vec_max(zero, x)); /* in this order a NaN passes */
}

/* What a token's states keep, and the rates of what they take in: r->kept and r->rates. */
INLINE void write_rates(const struct recurrence *r, int64_t token) {
    int is_float = r->convolution.is_float;
    int64_t decays = r->heads * r->decays;
    float *kept = r->kept + token * decays, *rates = r->rates + token * r->heads;
    for (int64_t i = 0; i < decays; i += LANES) {
        int64_t count = decays - i < LANES ? decays - i : LANES;
        float logs[LANES] = {0};
        for (int64_t lane = 0; lane < count; lane++)
            logs[lane] = r->decay_log[(i + lane) / r->decays];
        vec x = load_some(r->decay, token * r->decay_stride + i, count, is_float);
        vec step = vec_softplus(vec_add(x, load_some(r->decay_bias, i, count, is_float)));
        if (r->kind == STATE_SPACE) {
            step = vec_min(vec_set(r->most_step), vec_max(vec_set(r->least_step), step));
            store_some(rates, i, step, count, 1);
        }
        vec decay = vec_mul(vec_sub(vec_set(0.0f), vec_exp(vec_load(logs))), step);
        store_some(kept, i, vec_exp(decay), count, 1);
    }
    if (r->kind == STATE_SPACE)
        return;
    for (int64_t i = 0; i < r->heads; i += LANES) {
        int64_t count = r->heads - i < LANES ? r->heads - i : LANES;
        vec beta = vec_sigmoid(load_some(r->beta, token * r->beta_stride + i, count, is_float));
        store_some(rates, i, vec_mul(beta, vec_set(r->beta_factor)), count, 1);
    }
}

/* A head of a token: what its state keeps, by row; key and query; what is recalled: kept * key. Padded with zeros. */
struct operands {
    float kept[MOST_KEYS], key[MOST_KEYS], query[MOST_KEYS], recalled[MOST_KEYS];
};

/* 1 over the length of a key. */
INLINE float inverse_length(const float *x, int64_t dim) {
    vec squares = vec_set(0.0f);
    for (int64_t i = 0; i < dim; i += LANES)
        squares = vec_fma(vec_load(x + i), vec_load(x + i), squares);
    return 1.0f / sqrtf(vec_sum(squares) + 1e-6f);
}

INLINE void read_operands(const struct recurrence *r, int64_t token, int64_t head, struct operands *o) {
    int is_float = r->convolution.is_float;
    int64_t dim = r->key_dim, shared = head / (r->heads / r->key_heads) * dim, row = token * r->convolution.channels;
    const float *kept = r->kept + (token * r->heads + head) * r->decays;
    for (int64_t i = 0; i < dim; i += LANES) {
        int64_t count = dim - i < LANES ? dim - i : LANES;
        vec_store(o->key + i, load_some(r->convolution.out, row + r->key_at + shared + i, count, is_float));
        vec_store(o->query + i, load_some(r->convolution.out, row + r->query_at + shared + i, count, is_float));
        vec_store(o->kept + i, r->decays == 1 ? vec_set(*kept) : load_some(kept, i, count, 1));
    }
    if (r->kind == STATE_SPACE)
        return;
    vec key_scale = vec_set(inverse_length(o->key, dim));
    vec query_scale = vec_set(inverse_length(o->query, dim) / sqrtf((float)dim));
    for (int64_t i = 0; i < dim; i += LANES) {
        vec key = vec_mul(vec_load(o->key + i), key_scale);
        vec_store(o->key + i, key);
        vec_store(o->query + i, vec_mul(vec_load(o->query + i), query_scale));
        vec_store(o->recalled + i, vec_mul(vec_load(o->kept + i), key));
    }
}

INLINE void prefetch_numbers(const void *numbers, int64_t at, int64_t count, int is_float) {
    const char *from = (const char *)numbers + at * (is_float ? 4 : 2);
    for (int64_t byte = 0; byte < count * (is_float ? 4 : 2); byte += CACHE_LINE)
        _mm_prefetch(from + byte, _MM_HINT_T0);
}

/* Ask for what a head will read of a token: rows lie too far apart for the machine to guess them. */
INLINE void expect_token(const struct recurrence *r, int64_t token, int64_t head, int64_t column, int64_t width) {
    const struct convolution *c = &r->convolution;
    int64_t shared = head / (r->heads / r->key_heads) * r->key_dim, row = token * c->channels;
    prefetch_numbers(c->out, row + r->key_at + shared, r->key_dim, c->is_float);
    prefetch_numbers(c->out, row + r->query_at + shared, r->key_dim, c->is_float);
    prefetch_numbers(c->out, row + r->value_at + head * r->value_dim + column, width, c->is_float);
}

/* sums = state^T recalled, for `vecs` * 16 columns. */
INLINE void recall(int vecs, int64_t keys, const float *state, int64_t stride, const float *recalled, float *sums) {
    vec sum[4];
    for (int v = 0; v < vecs; v++)
        sum[v] = vec_set(0.0f);
    for (int64_t k = 0; k < keys; k++, state += stride) {
        vec one = vec_set(recalled[k]);
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++)
            sum[v] = vec_fma(one, vec_load(state + v * LANES), sum[v]);
    }
    for (int v = 0; v < vecs; v++)
        vec_store(sums + v * LANES, sum[v]);
}

/* One token: the state `from` becomes the state `to`, perhaps in its place. y = to^T query; sums = to^T recalled, what
 * the next token recalls, unless `recalled` is null. */
INLINE void sweep(int vecs, int recalls, const struct operands *o, int64_t keys, const float *from, int64_t from_stride,
                  float *to, int64_t to_stride, const float *change, float *y, const float *recalled, float *sums) {
    vec taken[4], given[4], sum[4];
    for (int v = 0; v < vecs; v++) {
        taken[v] = vec_load(change + v * LANES);
        given[v] = sum[v] = vec_set(0.0f);
    }
    for (int64_t k = 0; k < keys; k++, from += from_stride, to += to_stride) {
        vec kept = vec_set(o->kept[k]), key = vec_set(o->key[k]), query = vec_set(o->query[k]);
        vec one = vec_set(recalls ? recalled[k] : 0.0f);
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            vec state = vec_fma(key, taken[v], vec_mul(vec_load(from + v * LANES), kept));
            vec_store(to + v * LANES, state);
            given[v] = vec_fma(query, state, given[v]);
            if (recalls)
                sum[v] = vec_fma(one, state, sum[v]);
        }
    }
    for (int v = 0; v < vecs; v++) {
        vec_store(y + v * LANES, given[v]);
        if (recalls)
            vec_store(sums + v * LANES, sum[v]);
    }
}

/* What the state takes in of a token's values; `sums`: what it gives for the key. */
INLINE void write_change(const struct recurrence *r, int vecs, const float *values, float rate, const float *sums,
                         float *change) {
    for (int v = 0; v < vecs; v++) {
        vec value = vec_load(values + v * LANES);
        if (r->kind == DELTA_RULE)
            value = vec_sub(value, vec_load(sums + v * LANES));
        vec_store(change + v * LANES, vec_mul(value, vec_set(rate)));
    }
}

INLINE void read_values(const struct recurrence *r, int vecs, int64_t token, int64_t head, int64_t column,
                        float *values) {
    int64_t own = head * r->value_dim, at = token * r->convolution.channels + r->value_at + own + column;
    for (int v = 0; v < vecs; v++)
        vec_store(values + v * LANES, load_some(r->convolution.out, at + v * LANES,
                                                r->value_dim - column - v * LANES, r->convolution.is_float));
}

/* y, to which a state space adds the values themselves. */
INLINE void write_y(const struct recurrence *r, int vecs, int64_t token, int64_t head, int64_t column,
                    const float *values, const float *y) {
    float *to = r->y + (token * r->heads + head) * r->value_dim + column;
    vec skip = vec_set(r->kind == STATE_SPACE ? load_number(r->skip, head, r->convolution.is_float) : 0.0f);
    for (int v = 0; v < vecs; v++) {
        vec given = vec_load(y + v * LANES);
        if (r->kind == STATE_SPACE)
            given = vec_fma(skip, vec_load(values + v * LANES), given);
        store_some(to, v * LANES, given, r->value_dim - column - v * LANES, 1);
    }
}

/* Copy columns of a state, filled up with zeros. */
INLINE void copy_columns(int64_t keys, const float *from, int64_t from_stride, int64_t count, float *to,
                         int64_t to_stride, int64_t width) {
    for (int64_t k = 0; k < keys; k++) {
        memcpy(to + k * to_stride, from + k * from_stride, (size_t)count * 4);
        for (int64_t i = count; i < width; i++)
            to[k * to_stride + i] = 0.0f;
    }
}

/* `vecs` * 16 columns of one head's state through the tokens of a run. */
INLINE void scan_run(const struct recurrence *r, int vecs, const struct run *run, int64_t head, int64_t column) {
    float tile[TILE_NUMBERS] __attribute__((aligned(64)));
    struct operands operands[2];
    float values[4 * LANES], change[4 * LANES], y[4 * LANES], sums[4 * LANES] = {0};
    int64_t width = vecs * LANES, left = r->value_dim - column, keys = r->key_dim;
    int whole = left >= width, recalls = r->kind == DELTA_RULE;
    const float *from = r->states + (run->read * r->heads + head) * keys * r->value_dim + column;
    float *to = r->states + (run->write * r->heads + head) * keys * r->value_dim + column;
    if (!whole)
        copy_columns(keys, from, r->value_dim, left, tile, width, width);
    read_operands(r, run->first, head, &operands[0]);
    if (recalls)
        recall(vecs, keys, whole ? from : tile, whole ? r->value_dim : width, operands[0].recalled, sums);
    for (int64_t token = run->first; token < run->last; token++) {
        struct operands *own = &operands[(token - run->first) & 1], *next = &operands[(token - run->first + 1) & 1];
        int first = token == run->first && whole, last = token + 1 == run->last;
        if (token + 2 < run->last)
            expect_token(r, token + 2, head, column, width);
        if (!last)
            read_operands(r, token + 1, head, next);
        read_values(r, vecs, token, head, column, values);
        write_change(r, vecs, values, r->rates[token * r->heads + head], sums, change);
        const float *source = first ? from : tile;
        float *target = last && whole ? to : tile;
        int64_t source_stride = first ? r->value_dim : width, target_stride = last && whole ? r->value_dim : width;
        if (recalls && !last)
            sweep(vecs, 1, own, keys, source, source_stride, target, target_stride, change, y, next->recalled, sums);
        else
            sweep(vecs, 0, own, keys, source, source_stride, target, target_stride, change, y, 0, 0);
        write_y(r, vecs, token, head, column, values, y);
    }
    if (!whole)
        copy_columns(keys, tile, width, left, to, r->value_dim, left);
}

#ifdef __AVX512F__
#define WIDE_VECS 4
#define NARROW_VECS 2
#else /* two registers hold a vector */
#define WIDE_VECS 2
#define NARROW_VECS 1
#endif

INLINE void scan_share(const struct recurrence *r, atomic_long *next) {
    int wide = r->key_dim <= WIDE_KEYS && r->value_dim > NARROW_VECS * LANES;
    int64_t width = (wide ? WIDE_VECS : NARROW_VECS) * LANES, blocks = (r->value_dim + width - 1) / width, number;
    const struct convolution *c = &r->convolution;
    while ((number = quartet_next(next)) < r->heads * blocks)
        for (const struct run *run = c->runs; run < c->runs + c->run_count; run++)
            if (wide)
                scan_run(r, WIDE_VECS, run, number / blocks, number % blocks * width);
            else
                scan_run(r, NARROW_VECS, run, number / blocks, number % blocks * width);
}

INLINE vec gate_at(const struct recurrence *r, int64_t token, int64_t column, int64_t count) {
    vec gate = load_some(r->gate, token * r->gate_stride + column, count, r->convolution.is_float);
    return r->gate_is_sigmoid ? vec_sigmoid(gate) : vec_silu(gate);
}

/* Norm and gates of numbers of a token that are normed together, from r->y to r->out. */
INLINE void finish_group(const struct recurrence *r, int64_t token, int64_t group) {
    int is_float = r->convolution.is_float, by_head = r->norm_place == NORM_BY_HEAD;
    int64_t begin = group * r->norm_size, width = r->heads * r->value_dim;
    float *y = r->y + token * width + begin;
    vec squares = vec_set(0.0f);
    for (int64_t i = 0; i < r->norm_size; i += LANES) {
        int64_t count = r->norm_size - i < LANES ? r->norm_size - i : LANES;
        vec x = load_some(y, i, count, 1);
        if (by_head)
            x = as_stored(x, is_float);
        else if (r->norm_place != NORM_BEFORE_GATES)
            x = vec_mul(x, gate_at(r, token, begin + i, count));
        squares = vec_fma(x, x, squares);
        store_some(y, i, x, count, 1);
    }
    float mean = vec_sum(squares) / (float)r->norm_size;
    vec scale = vec_set(r->norm_place == NO_NORM ? 1.0f : 1.0f / sqrtf(mean + r->epsilon));
    for (int64_t i = 0; i < r->norm_size; i += LANES) {
        int64_t count = r->norm_size - i < LANES ? r->norm_size - i : LANES;
        vec x = load_some(y, i, count, 1);
        if (r->norm_place != NO_NORM)
            x = vec_mul(vec_mul(x, scale), load_some(r->norm, by_head ? i : begin + i, count, is_float));
        if (by_head)
            x = as_stored(x, is_float);
        if (by_head || r->norm_place == NORM_BEFORE_GATES)
            x = vec_mul(x, gate_at(r, token, begin + i, count));
        store_some(r->out, token * width + begin + i, vec_mul(x, vec_set(r->out_factor)), count, is_float);
    }
}

struct recurrent_work {
    const struct recurrence *recurrence;
    atomic_long channels, columns;
};

static void recur_some(void *argument, int thread, int threads) {
    struct recurrent_work *work = argument;
    const struct recurrence *r = work->recurrence;
    int64_t begin = r->tokens * thread / threads, end = r->tokens * (thread + 1) / threads;
    for (int64_t token = begin; token < end; token++)
        write_rates(r, token);
    convolve_share(&r->convolution, &work->channels);
    quartet_barrier(threads);
    scan_share(r, &work->columns);
    quartet_barrier(threads);
    int64_t groups = r->heads * r->value_dim / r->norm_size, all = r->tokens * groups;
    for (int64_t i = all * thread / threads; i < all * (thread + 1) / threads; i++)
        finish_group(r, i / groups, i % groups);
}

static void recur(const struct recurrence *r) {
    struct recurrent_work work = {.recurrence = r};
    int few = r->tokens * r->heads * r->key_dim * r->value_dim <= FEW_UPDATES;
    quartet_run(recur_some, &work, few ? 1 : r->convolution.threads);
}
