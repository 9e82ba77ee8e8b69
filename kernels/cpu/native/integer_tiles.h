/* Products of rows in groups (group_rows.h) with rotated weights of 8 bits, as tiles of integers (AMX).
 *
 * A job is one group for 32 rows and 32 columns: its four tiles of 32-bit sums go to memory, from where they are scaled and
 * added to the sums of the product as floats. That takes almost as long as the tiles do, so it is done between the tiles of
 * the job that follows: the upper two tiles of a job are stored at its end, the lower two in the middle of the next job.
 * Where the sums are complete and only SiLU is left, that is done there too.
 */
#pragma once

#include "group_rows.h"

#if defined(__AMX_BF16__)

#define TILE_SUMS (16 * LANES)
#define JOB_COLUMNS (2 * LANES)

/* ---- jobs ---- */

/* A job's sums on their way to those of the product. */
struct scaled {
    const float *row_scales; /* of 32 rows */
    vec scales[2];           /* of 32 columns */
    float *sums;             /* (32, JOB_COLUMNS) of the product */
    __mmask16 kept;          /* all ones where earlier groups are in `sums`, else 0 */
    bf16 *out;               /* where the sums are complete, and gated by SiLU: 16 columns of the result; or null */
    int64_t out_stride, rows;
};

/* What a job asks for on its way, in each step of k: some cache lines of what is read next. */
struct asked {
    const uint8_t *from[2]; /* of each block, or null */
    int lines;
};

struct job_tiles {
    const int8_t *x; /* a row block; the second lies `stride` behind */
    int64_t stride;
    const uint8_t *weight[2];
    const struct scaled *before; /* the job whose sums are in `sums`, and in tiles 2 and 3 */
    int32_t *sums;               /* four tiles */
    struct asked asked;
};

/* `gated`, a constant of the caller: the job has an `out`. */
INLINE void scale_rows(int gated, const struct scaled *job, const int32_t *sums, int begin, int end) {
#pragma GCC unroll 4
    for (int row = begin; row < end; row++) {
        const int32_t *own = sums + row / 16 * 2 * TILE_SUMS + row % 16 * LANES;
        float *to = job->sums + row * JOB_COLUMNS;
        vec scale = vec_set(job->row_scales[row]);
        vec first = vec_mul(_mm512_cvtepi32_ps(_mm512_load_si512(own)), scale);
        vec second = vec_mul(_mm512_cvtepi32_ps(_mm512_load_si512(own + TILE_SUMS)), scale);
        first = vec_fma(first, job->scales[0], _mm512_maskz_loadu_ps(job->kept, to));
        second = vec_fma(second, job->scales[1], _mm512_maskz_loadu_ps(job->kept, to + LANES));
        if (gated) {
            __m256i result = (__m256i)_mm512_cvtneps_pbh(gate(ACTIVATION_SILU, first, second));
            _mm256_mask_storeu_epi16(job->out + row * job->out_stride, row < job->rows ? 0xFFFF : 0, result);
        } else {
            vec_store(to, first);
            vec_store(to + LANES, second);
        }
    }
}

INLINE void ask(const struct asked *asked, int step) {
#pragma GCC unroll 2
    for (int block = 0; block < 2; block++)
        for (int line = 0; asked->from[block] && line < asked->lines; line++)
            _mm_prefetch((const char *)asked->from[block] + (step * asked->lines + line) * CACHE_LINE, _MM_HINT_T1);
}

/* `steps` of k, `halves` (row blocks), and whether the job before is `gated` are constants of the caller. */
INLINE void run_job(int steps, int halves, int gated, const struct job_tiles *job) {
    const struct scaled before = *job->before;
    const uint8_t *first = job->weight[0], *second = job->weight[1];
    const int8_t *x = job->x, *lower = x + job->stride;
    int slots = 2 * steps;
    _tile_zero(0);
    _tile_zero(1);
#pragma GCC unroll 4
    for (int step = 0; step < steps; step++) {
        ask(&job->asked, step);
        _tile_loadd(6, first + step * TILE_BYTES, STEP);
        _tile_loadd(4, x + step * TILE_BYTES, STEP);
        _tile_dpbssd(0, 4, 6);
        scale_rows(gated, &before, job->sums, 2 * step * 16 / slots, (2 * step + 1) * 16 / slots);
        _tile_loadd(7, second + step * TILE_BYTES, STEP);
        _tile_dpbssd(1, 4, 7);
        scale_rows(gated, &before, job->sums, (2 * step + 1) * 16 / slots, (2 * step + 2) * 16 / slots);
    }
    if (halves == 2) {
        _tile_stored(2, job->sums + 2 * TILE_SUMS, STEP);
        _tile_stored(3, job->sums + 3 * TILE_SUMS, STEP);
        _tile_zero(2);
        _tile_zero(3);
#pragma GCC unroll 4
        for (int done = 0; done < steps; done++) { /* backwards: the weight's last tiles are there */
            int step = steps - 1 - done;
            if (done)
                _tile_loadd(6, first + step * TILE_BYTES, STEP);
            _tile_loadd(5, lower + step * TILE_BYTES, STEP);
            _tile_dpbssd(2, 5, 6);
            scale_rows(gated, &before, job->sums, 16 + 2 * done * 16 / slots, 16 + (2 * done + 1) * 16 / slots);
            if (done)
                _tile_loadd(7, second + step * TILE_BYTES, STEP);
            _tile_dpbssd(3, 5, 7);
            scale_rows(gated, &before, job->sums, 16 + (2 * done + 1) * 16 / slots, 16 + (2 * done + 2) * 16 / slots);
        }
    }
    _tile_stored(0, job->sums, STEP);
    _tile_stored(1, job->sums + TILE_SUMS, STEP);
}

OUTLINE void run_any_job(int64_t steps, int halves, const struct job_tiles *job) {
    switch (steps * 4 + (halves == 2) * 2 + (job->before->out != 0)) {
    case 8: run_job(2, 1, 0, job); return;
    case 10: run_job(2, 2, 0, job); return;
    case 11: run_job(2, 2, 1, job); return;
    case 16: run_job(4, 1, 0, job); return;
    case 18: run_job(4, 2, 0, job); return;
    default: run_job(4, 2, 1, job); return;
    }
}

/* ---- panels ---- */

/* What a thread has begun: the job whose sums are on their way, and where its rows stand. */
struct begun {
    struct scaled scaled;
    int64_t panel, row, rows; /* what is written when the sums are complete; rows 0: nothing */
};

/* What a job asks for: all of the group that comes next, if there are no other rows, else a share of it. */
INLINE struct asked asked_by(const struct plan *plan, struct group_place next, int64_t row, int64_t steps) {
    struct asked asked = {{0, 0}, 16};
    if (plan->padded_rows <= GRID_ROWS) {
        for (int place = 0; place < 2; place++)
            asked.from[place] = group_numbers(plan, next, place);
        return asked;
    }
    int64_t jobs = plan->padded_rows / GRID_ROWS, job = row / GRID_ROWS, half = (jobs + 1) / 2;
    asked.lines = (int)((16 + half - 1) / half);
    asked.from[0] = group_numbers(plan, next, job >= half) + job % half * steps * asked.lines * CACHE_LINE;
    return asked;
}

/* Whether sums of a panel become a result where they are scaled: whole columns, gated by SiLU, nothing added. */
INLINE int gates_at_once(const struct plan *plan, int64_t panel) {
    const struct product *p = plan->p;
    int plain = p->output == OUTPUT_GATED && p->activation == ACTIVATION_SILU && !p->bias && !p->out_tiles;
    return plain && !plan->added.jobs && plan->padded_rows > 16 && (panel + 1) * LANES <= p->n / 2;
}

INLINE void write_begun(const struct plan *plan, int64_t first, const struct begun *begun) {
    if (!begun->rows || begun->scaled.out)
        return;
    if (plan->added.jobs)
        add_adapters(plan, begun->panel, begun->row, begun->rows, begun->scaled.sums, JOB_COLUMNS);
    write_tile(plan, begun->panel, first + begun->row, begun->rows, begun->scaled.sums, JOB_COLUMNS);
}

/* All rows of a block through one group of a panel. `next`: the group that comes after it. */
INLINE void compute_group(const struct plan *plan, int64_t first, int64_t rows, struct group_place at,
                          struct group_place next, float *kept, int32_t *sums, struct begun *begun) {
    int64_t size = group_size(plan, at.from), steps = size / STEP;
    int halves = plan->padded_rows > 16 ? 2 : 1, last = at.from + size == plan->depth;
    struct job_tiles job = {.stride = 16 * plan->depth, .sums = sums, .before = &begun->scaled};
    struct scaled scaled = {.kept = at.from ? 0xFFFF : 0, .out_stride = plan->p->out_stride};
    for (int place = 0; place < 2; place++) {
        job.weight[place] = group_numbers(plan, at, place);
        scaled.scales[place] = vec_load_half((const uint16_t *)group_scales(plan, at, place));
        _mm_prefetch((const char *)group_scales(plan, next, place), _MM_HINT_T0);
    }
    for (int64_t row = 0; row < rows; row += GRID_ROWS) {
        int64_t some = rows - row < GRID_ROWS ? rows - row : GRID_ROWS;
        job.x = (const int8_t *)plan->x + row * plan->depth + at.from * 16;
        job.asked = asked_by(plan, next, row, steps);
        run_any_job(steps, halves, &job);
        write_begun(plan, first, begun);
        scaled.row_scales = plan->row_scales + at.from / plan->group * plan->padded_rows + row;
        scaled.sums = kept + row * JOB_COLUMNS;
        scaled.rows = some;
        if (last && gates_at_once(plan, at.panel))
            scaled.out = (bf16 *)plan->p->out + (first + row) * scaled.out_stride + at.panel * LANES;
        *begun = (struct begun){scaled, at.panel, row, last ? some : 0};
    }
}

/* All rows of a block through some panels. `kept`: sums of (panels of a chunk or 1, padded rows, JOB_COLUMNS), aligned. */
static void compute_groups(const struct plan *plan, int64_t first, int64_t rows, int64_t begin, int64_t end,
                                  float *kept) {
    float unused[GRID_ROWS * JOB_COLUMNS] __attribute__((aligned(CACHE_LINE)));
    int32_t sums[4 * TILE_SUMS] __attribute__((aligned(CACHE_LINE)));
    float none[GRID_ROWS] = {0};
    struct begun begun = {.scaled = {.row_scales = none, .scales = {vec_set(0.0f), vec_set(0.0f)}, .sums = unused}};
    int64_t piece = plan->piece < plan->depth ? plan->group : plan->depth, size = plan->padded_rows * JOB_COLUMNS;
    memset(sums, 0, sizeof sums);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t part = 0; part < plan->depth; part += piece)
        for (int64_t panel = begin; panel < end; panel++)
            for (int64_t from = part; from < part + piece && from < plan->depth; from += plan->group) {
                struct group_place at = {panel, from}, next = group_after(plan, at, part, part + piece, begin, end);
                float *own = kept + (piece < plan->depth ? panel - begin : 0) * size;
                compute_group(plan, first, rows, at, next, own, sums, &begun);
            }
    int count = plan->padded_rows > 16 ? 32 : 16;
    if (count == 32) {
        _tile_stored(2, sums + 2 * TILE_SUMS, STEP);
        _tile_stored(3, sums + 3 * TILE_SUMS, STEP);
    }
    if (begun.scaled.out)
        scale_rows(1, &begun.scaled, sums, 0, count);
    else
        scale_rows(0, &begun.scaled, sums, 0, count);
    write_begun(plan, first, &begun);
}

#endif
