/* Short causal convolutions over the tokens of each sequence, and how numbers of a model are read and written. */
#pragma once

#include "api.h"
#include "pool.h"
#include "vector.h"

#define CHANNELS_AT_ONCE 64

INLINE vec load_numbers(const void *numbers, int64_t at, int is_float) {
    return is_float ? vec_load((const float *)numbers + at) : vec_load_bf16((const bf16 *)numbers + at);
}

INLINE float load_number(const void *numbers, int64_t at, int is_float) {
    return is_float ? ((const float *)numbers)[at] : from_bf16(((const bf16 *)numbers)[at]);
}

/* The first `count` of 16 numbers, then zeros. */
INLINE vec load_some(const void *numbers, int64_t at, int64_t count, int is_float) {
    if (count >= LANES)
        return load_numbers(numbers, at, is_float);
    float lanes[LANES] = {0};
    for (int64_t i = 0; i < count; i++)
        lanes[i] = load_number(numbers, at + i, is_float);
    return vec_load(lanes);
}

INLINE void store_some(void *numbers, int64_t at, vec x, int64_t count, int is_float) {
    if (count >= LANES && is_float) {
        vec_store((float *)numbers + at, x);
        return;
    }
    if (count >= LANES) {
        vec_store_bf16((bf16 *)numbers + at, x);
        return;
    }
    float lanes[LANES];
    bf16 rounded[LANES];
    vec_store(lanes, x);
    vec_store_bf16(rounded, x);
    for (int64_t i = 0; i < count; i++)
        if (is_float)
            ((float *)numbers)[at + i] = lanes[i];
        else
            ((bf16 *)numbers)[at + i] = rounded[i];
}

/* x as the model's numbers have it. */
INLINE vec as_stored(vec x, int is_float) {
    if (is_float)
        return x;
    bf16 rounded[LANES];
    vec_store_bf16(rounded, x);
    return vec_load_bf16(rounded);
}

/* What the convolution reads of a run's token; tokens in front of the run are below 0. */
INLINE vec convolved_input(const struct convolution *c, const struct run *run, int64_t token, int64_t channel,
                           int64_t count) {
    if (token < 0) {
        int64_t row = run->read * (c->taps - 1) + c->taps - 1 + token;
        return load_some(c->states, row * c->channels + channel, count, c->is_float);
    }
    int64_t at = (run->first + token) * c->x_stride + channel;
    vec x = load_some(c->x, at, count, c->is_float);
    return c->before ? as_stored(vec_mul(x, load_some(c->before, at, count, c->is_float)), c->is_float) : x;
}

INLINE void convolve_token(const struct convolution *c, const struct run *run, int64_t token, int64_t channel,
                           int64_t count, float weights[MOST_TAPS][LANES]) {
    int64_t oldest = token - (c->taps - 1);
    vec y = vec_mul(convolved_input(c, run, oldest, channel, count), vec_load(weights[0]));
    for (int64_t tap = 1; tap < c->taps; tap++)
        y = vec_fma(convolved_input(c, run, oldest + tap, channel, count), vec_load(weights[tap]), y);
    if (c->bias)
        y = vec_add(y, load_some(c->bias, channel, count, c->is_float));
    y = as_stored(y, c->is_float);
    if (c->activates)
        y = vec_silu(y);
    if (c->after)
        y = vec_mul(y, load_some(c->after, (run->first + token) * c->x_stride + channel, count, c->is_float));
    store_some(c->out, (run->first + token) * c->channels + channel, y, count, c->is_float);
}

/* Up to 16 channels of all runs. */
INLINE void convolve_channels(const struct convolution *c, int64_t channel) {
    int64_t count = c->channels - channel < LANES ? c->channels - channel : LANES;
    float weights[MOST_TAPS][LANES] = {{0}};
    for (int64_t lane = 0; lane < count; lane++)
        for (int64_t tap = 0; tap < c->taps; tap++)
            weights[tap][lane] = load_number(c->weight, (channel + lane) * c->taps + tap, c->is_float);
    for (const struct run *run = c->runs; run < c->runs + c->run_count; run++) {
        int64_t tokens = run->last - run->first;
        for (int64_t token = 0; token < tokens; token++)
            convolve_token(c, run, token, channel, count, weights);
        for (int64_t row = 0; row < c->taps - 1; row++) { /* ascending: `read` and `write` may be the same */
            vec x = convolved_input(c, run, tokens - (c->taps - 1) + row, channel, count);
            int64_t at = (run->write * (c->taps - 1) + row) * c->channels + channel;
            store_some(c->states, at, x, count, c->is_float);
        }
    }
}

INLINE void convolve_share(const struct convolution *c, atomic_long *next) {
    int64_t block;
    while ((block = quartet_next(next)) * CHANNELS_AT_ONCE < c->channels)
        for (int64_t channel = block * CHANNELS_AT_ONCE;
             channel < c->channels && channel < (block + 1) * CHANNELS_AT_ONCE; channel += LANES)
            convolve_channels(c, channel);
}

struct convolution_work {
    const struct convolution *convolution;
    atomic_long next;
};

static void convolve_some(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    struct convolution_work *work = argument;
    convolve_share(work->convolution, &work->next);
}

static void convolve(const struct convolution *c) {
    struct convolution_work work = {.convolution = c};
    quartet_run(convolve_some, &work, c->threads);
}
