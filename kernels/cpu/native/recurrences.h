/* What the kernels of recurrent layers take: see recurrent.h for what they compute and recurrent.py for the caller. */
#pragma once

#include <stdint.h>

#define MOST_TAPS 8   /* of a convolution */
#define MOST_KEYS 512 /* numbers of a key */

/* Tokens [first, last) of a step: one sequence's. The state in front of them is in row `read` of the pools of states, the
 * one behind them goes to row `write`. Runs are computed in order: one may read what one before it has written. */
struct run {
    int64_t first, last, read, write;
};

/* out = after * silu(the weighted sum of before * x over the last `taps` tokens), by channel. */
struct convolution {
    const void *x;              /* (tokens, channels), rows `x_stride` numbers apart; numbers: see is_float */
    const void *before, *after; /* (tokens, channels) with the same stride, or null */
    int64_t x_stride;
    const void *weight; /* (channels, taps): the last one for the token itself */
    const void *bias;   /* (channels,) or null */
    void *states;       /* (rows, taps - 1, channels): the inputs in front */
    void *out;          /* (tokens, channels) */
    int64_t channels, taps;
    int32_t is_float; /* numbers of the model are float32, else bfloat16 */
    int32_t activates;
    const struct run *runs;
    int64_t run_count;
    int32_t threads;
};

enum recurrence_kind { DELTA_RULE, STATE_SPACE };
enum norm_place { NORM_BY_HEAD, NORM_BEHIND_GATES, NORM_BEFORE_GATES, NO_NORM };

/* A layer between its products: convolution, recurrence, norm and gates. Numbers are the model's unless they are float. */
struct recurrence {
    struct convolution convolution; /* of queries, keys and values; its `out` is scratch memory */
    int32_t kind;
    int64_t tokens, heads, key_heads, key_dim, value_dim; /* heads / key_heads neighbours share queries and keys */
    int64_t query_at, key_at, value_at;                   /* their first channels */
    const void *decay;                                    /* (tokens, heads * decays), before its function */
    int64_t decay_stride, decays;                         /* decays of a head: 1, or key_dim */
    const void *decay_bias;                               /* (heads * decays,) */
    const float *decay_log;                               /* (heads,) */
    const void *beta;                                     /* delta rule: (tokens, heads), before its function */
    int64_t beta_stride;
    float beta_factor;
    float least_step, most_step; /* state space */
    const void *skip;            /* state space: (heads,) */
    float *states;               /* (rows, heads, key_dim, value_dim) */
    float *kept, *rates, *y;     /* scratch memory: (tokens, heads * decays), (tokens, heads), (tokens, heads * value_dim) */
    const void *gate;            /* (tokens, heads * value_dim) */
    int64_t gate_stride;
    int32_t gate_is_sigmoid; /* else silu */
    int32_t norm_place;
    const void *norm;   /* weight of the norm: (value_dim,), else (heads * value_dim,) */
    int64_t norm_size;  /* numbers that are normed together */
    float epsilon, out_factor;
    void *out; /* (tokens, heads * value_dim) */
};
