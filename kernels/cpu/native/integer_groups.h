/* Products of rows in groups (group_rows.h) with rotated weights of 8 bits by VPDPBUSD.
 *
 * GROUP_ROWS rows pass a group of a panel together. Their sums stay in registers for the whole group, and only then are
 * scaled and added to the sums of the product, so nearly all that the inner loop does is to multiply. A group of a panel is
 * read by all rows of the block before the next one is: it stays in the first or second cache.
 */
#pragma once

#include "grid.h"
#include "group_rows.h"

#if GROUP_ROWS && !defined(__AMX_BF16__)

#define GROUP_BLOCKS FEW_BLOCKS /* of a panel */

/* Rows of one tile and a group of a panel. */
struct group_job {
    const int8_t *x; /* (size / STEP, GROUP_ROWS, STEP) */
    const uint8_t *weight[GROUP_BLOCKS];
    const uint8_t *ahead[GROUP_BLOCKS]; /* blocks that are asked for on the way, as many as `asks` says */
    vec scales[GROUP_BLOCKS];
    const float *row_scales;
    const int32_t *row_sums;
    float *sums; /* (GROUP_ROWS, MOST_COLUMNS), to which is added unless the group is the first */
    int64_t size; /* numbers in k */
    int first;
};

/* `rows` and `asks` are constants of the caller. One loop: with two the compiler moves sums to memory and back. */
INLINE void multiply_group(int rows, int asks, const struct group_job *job) {
    integers dots[GROUP_ROWS][GROUP_BLOCKS];
    const uint8_t *weight[GROUP_BLOCKS], *ahead[GROUP_BLOCKS];
    const int8_t *x = job->x;
#pragma GCC unroll 4
    for (int block = 0; block < GROUP_BLOCKS; block++) {
        weight[block] = job->weight[block];
        ahead[block] = asks == GROUP_BLOCKS ? weight[block] + AHEAD : job->ahead[block];
    }
    int64_t turn = job->size > AHEAD / LANES ? job->size - AHEAD / LANES : 0;
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int block = 0; block < GROUP_BLOCKS; block++)
            dots[row][block] = integers_set(-SIGN * job->row_sums[row]);
    for (int64_t at = 0; at < job->size; at += 4, x += 4) {
        line numbers[GROUP_BLOCKS];
        if (at && at % STEP == 0)
            x += TILE_BYTES - STEP;
        if (asks == GROUP_BLOCKS && at == turn)
#pragma GCC unroll 4
            for (int block = 0; block < GROUP_BLOCKS; block++)
                ahead[block] = job->ahead[block] - at * LANES;
#pragma GCC unroll 4
        for (int block = 0; block < asks; block++)
            _mm_prefetch((const char *)ahead[block] + at * LANES, ASKED_TO);
#pragma GCC unroll 4
        for (int block = 0; block < GROUP_BLOCKS; block++)
            numbers[block] = number_line(weight[block] + at * LANES, 8, 0);
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            int32_t four;
            memcpy(&four, x + row * STEP, 4);
#pragma GCC unroll 4
            for (int block = 0; block < GROUP_BLOCKS; block++)
                dots[row][block] = add_dots(dots[row][block], numbers[block], four, 8);
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int block = 0; block < GROUP_BLOCKS; block++) {
            float *sums = job->sums + row * MOST_COLUMNS + block * LANES;
            vec before = job->first ? vec_set(0.0f) : vec_load(sums);
            vec scaled = vec_mul(integers_to_vec(dots[row][block]), vec_set(job->row_scales[row]));
            vec_store(sums, vec_fma(scaled, job->scales[block], before));
        }
}

/* Each on its own, as those of bfloat16 are (sums.h). */
#define MULTIPLY_GROUP(rows, asks)                                                                                       \
    OUTLINE void multiply_group_##rows##_##asks(const struct group_job *job) { multiply_group(rows, asks, job); }
MULTIPLY_GROUP(1, 0)
MULTIPLY_GROUP(2, 0)
MULTIPLY_GROUP(3, 0)
MULTIPLY_GROUP(4, 0)
MULTIPLY_GROUP(5, 0)
MULTIPLY_GROUP(6, 0)
MULTIPLY_GROUP(6, 1)
MULTIPLY_GROUP(1, 4)
MULTIPLY_GROUP(2, 4)
MULTIPLY_GROUP(3, 4)
MULTIPLY_GROUP(4, 4)
MULTIPLY_GROUP(5, 4)
MULTIPLY_GROUP(6, 4)
#undef MULTIPLY_GROUP

/* `asks`: 0, all blocks, or 1 with GROUP_ROWS rows. */
INLINE void multiply_any_group(int64_t rows, int asks, const struct group_job *job) {
    switch (rows) {
    case 1: (asks ? multiply_group_1_4 : multiply_group_1_0)(job); return;
    case 2: (asks ? multiply_group_2_4 : multiply_group_2_0)(job); return;
    case 3: (asks ? multiply_group_3_4 : multiply_group_3_0)(job); return;
    case 4: (asks ? multiply_group_4_4 : multiply_group_4_0)(job); return;
    case 5: (asks ? multiply_group_5_4 : multiply_group_5_0)(job); return;
    }
    switch (asks) {
    case 0: multiply_group_6_0(job); return;
    case 1: multiply_group_6_1(job); return;
    default: multiply_group_6_4(job); return;
    }
}

/* All rows of a block through one group of a panel; `next` is the group that comes after it. */
INLINE void compute_group(const struct plan *plan, int64_t first, int64_t rows, struct group_place at,
                          struct group_place next, float *kept) {
    int64_t size = group_size(plan, at.from), place = at.from / plan->group * plan->padded_rows;
    int64_t shares = plan->padded_rows >= LEAST_SHARED_ROWS ? GROUP_BLOCKS : 1;
    const uint8_t *ahead[GROUP_BLOCKS];
    struct group_job job;
    job.size = size;
    job.first = !at.from;
    for (int block = 0; block < GROUP_BLOCKS; block++) {
        job.weight[block] = group_numbers(plan, at, block);
        job.scales[block] = vec_load_half((const uint16_t *)group_scales(plan, at, block));
        job.ahead[block] = ahead[block] = group_numbers(plan, next, block);
        _mm_prefetch((const char *)group_scales(plan, next, block), ASKED_TO);
    }
    for (int64_t row = 0, tile = 0; row < rows; row += GROUP_ROWS, tile++) {
        int64_t some = rows - row < GROUP_ROWS ? rows - row : GROUP_ROWS;
        job.x = (const int8_t *)plan->x + row * plan->depth + at.from * GROUP_ROWS;
        job.row_scales = plan->row_scales + place + row;
        job.row_sums = plan->row_sums + place + row;
        job.sums = kept + row * MOST_COLUMNS;
        if (shares > 1)
            job.ahead[0] = ahead[tile % shares];
        multiply_any_group(some, tile < shares ? GROUP_BLOCKS / (int)shares : 0, &job);
        if (at.from + size < plan->depth)
            continue;
        if (plan->added.jobs)
            add_adapters(plan, at.panel, row, some, job.sums, MOST_COLUMNS);
        write_tile(plan, at.panel, first + row, some, job.sums, MOST_COLUMNS);
    }
}

/* All rows of a block through some panels. `kept`: sums of (panels of a chunk or 1, padded rows, MOST_COLUMNS), aligned. */
static void compute_groups(const struct plan *plan, int64_t first, int64_t rows, int64_t begin, int64_t end, float *kept) {
    int64_t piece = plan->piece < plan->depth ? plan->group : plan->depth, size = plan->padded_rows * MOST_COLUMNS;
    for (int64_t part = 0; part < plan->depth; part += piece)
        for (int64_t panel = begin; panel < end; panel++)
            for (int64_t from = part; from < part + piece && from < plan->depth; from += plan->group) {
                struct group_place at = {panel, from}, next = group_after(plan, at, part, part + piece, begin, end);
                compute_group(plan, first, rows, at, next, kept + (piece < plan->depth ? panel - begin : 0) * size);
            }
}

#endif
