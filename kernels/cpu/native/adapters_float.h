/* The same for products in float32 that were computed elsewhere: out += b @ (a @ x). Factors are (blocks, depth, 16). */
#pragma once

#include "adapters.h"

/* sums (rows, 16) += x (rows, depth) @ one block of floats; `rows` is a constant. */
INLINE void multiply_floats(int rows, const float *const *x, const float *weight, int64_t depth, vec *sum) {
    for (int64_t k = 0; k < depth; k++) {
        vec line = vec_load(weight + k * LANES);
        _mm_prefetch((const char *)(weight + k * LANES) + PREFETCH, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++)
            sum[row] = vec_fma(vec_set(x[row][k]), line, sum[row]);
    }
}

INLINE void multiply_some_floats(int rows, const float *const *x, const float *weight, int64_t depth, vec *sum) {
    switch (rows) {
    case 1: multiply_floats(1, x, weight, depth, sum); return;
    case 2: multiply_floats(2, x, weight, depth, sum); return;
    case 3: multiply_floats(3, x, weight, depth, sum); return;
    default: multiply_floats(4, x, weight, depth, sum); return;
    }
}

INLINE void shrink_floats(const struct adding *a, const struct added *added, const struct job *job) {
    const struct segment *segment = added->segment + job->segment;
    const struct addition *its = segment->addition;
    const float *weight = (const float *)its->a + job->block * a->k * LANES;
    const int32_t *places = its->places + job->block * LANES;
    uint32_t rows = segment->rows;
    while (rows) {
        vec sum[TOGETHER];
        const float *x[TOGETHER];
        int taken[TOGETHER], count = take_rows(&rows, taken);
        for (int i = 0; i < count; i++) {
            sum[i] = vec_set(0.0f);
            x[i] = a->x + (segment->tile * TILE_ROWS + taken[i]) * a->x_stride;
        }
        multiply_some_floats(count, x, weight, a->k, sum);
        for (int i = 0; i < count; i++) {
            float numbers[LANES], *inner = (float *)added->inner + (job->segment * TILE_ROWS + taken[i]) * added->width;
            vec_store(numbers, sum[i]);
            for (int lane = 0; lane < LANES; lane++)
                if (places[lane] >= 0)
                    inner[places[lane]] = numbers[lane];
        }
    }
}

/* One block of columns for a segment. */
INLINE void expand_floats(const struct adding *a, const struct added *added, int64_t at, const struct part *part,
                          int64_t block) {
    const struct segment *segment = added->segment + at;
    const float *b = (const float *)part->b + block * part->rank * LANES;
    int64_t column = (part->first + block) * LANES, left = a->n - column < LANES ? a->n - column : LANES;
    uint32_t rows = segment->rows;
    while (rows) {
        vec sum[TOGETHER];
        const float *x[TOGETHER];
        int taken[TOGETHER], count = take_rows(&rows, taken);
        for (int i = 0; i < count; i++) {
            sum[i] = vec_set(0.0f);
            x[i] = (const float *)added->inner + (at * TILE_ROWS + taken[i]) * added->width + part->place;
        }
        multiply_some_floats(count, x, b, part->rank, sum);
        for (int i = 0; i < count; i++) {
            float *out = a->out + (segment->tile * TILE_ROWS + taken[i]) * a->out_stride + column;
            float numbers[LANES] = {0};
            memcpy(numbers, out, (size_t)left * 4);
            vec_store(numbers, vec_add(vec_load(numbers), sum[i]));
            memcpy(out, numbers, (size_t)left * 4);
        }
    }
}

struct floats {
    const struct adding *a;
    struct added added;
    atomic_long next; /* block of columns */
};

static void add_floats(void *argument, int thread, int threads) {
    (void)thread;
    struct floats *floats = argument;
    struct added *added = &floats->added;
    const struct adding *a = floats->a;
    int64_t at, block;
    while ((at = quartet_next(&added->next) * 2) < added->jobs) {
        shrink_floats(a, added, added->job + at);
        if (added->job[at + 1].segment >= 0)
            shrink_floats(a, added, added->job + at + 1);
    }
    quartet_barrier(threads);
    while ((block = quartet_next(&floats->next)) * LANES < a->n)
        for (int64_t segment = 0; segment < added->segments; segment++) {
            const struct addition *its = added->segment[segment].addition;
            for (const struct part *part = its->parts; part < its->parts + its->count; part++)
                if (block >= part->first && block < part->first + part->blocks)
                    expand_floats(a, added, segment, part, block - part->first);
        }
}

static int add_float(const struct adding *a) {
    struct floats floats = {.a = a, .added = {.from = a->additions, .number = a->number}};
    if (plan_added(&floats.added, 0, a->rows, sizeof(float)))
        return -1;
    if (floats.added.jobs)
        quartet_run(add_floats, &floats, a->threads);
    return 0;
}
