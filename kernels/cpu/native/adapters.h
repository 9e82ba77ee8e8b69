/* What LoRA adapters add to a product: b @ (a @ x), for the rows that have an adapter, to the sums of the product before
 * these are rounded, gated or added to anything.
 *
 * Rows are grouped by adapter within tiles of 16 rows. The first factors are multiplied beside the rows' preparation, the
 * second ones panel by panel with the weight, whose columns they share. With AMX a whole tile of rows is multiplied with
 * the factors of each adapter that occurs in it, for the tile takes no longer than a row: rows of others are left out of
 * the first result, and are zeros in the second product. Numbers between the factors are rounded to bfloat16. Sums are
 * made in one order, so the bits of a row do not depend on the rows beside it.
 */
#pragma once

#include "api.h"
#include "pool.h"
#include "sums.h"
#include "vector.h"

#define TILE_ROWS 16
#define TOGETHER 4 /* rows that share what is read of a factor */

/* The rows of a tile that have one adapter. */
struct segment {
    const struct addition *addition;
    int64_t tile;
    uint32_t rows; /* one bit each */
};

/* One block of 16 ranks for a segment; none where `segment` is -1. */
struct job {
    int32_t segment, block;
};

/* What is added to a block of rows. */
struct added {
    const struct additions *from; /* null: nothing */
    int64_t number;
    int64_t first, rows; /* of the block, in the product */
    const void *x;       /* rows as the first factors take them: of `depth` numbers, or in tiles */
    int64_t depth;
    int tiled;
    int64_t width; /* numbers between the factors, of the adapter that has most */
    int64_t segments, jobs;
    struct segment *segment;
    int64_t *starts; /* (tiles + 1,): the first segment of each */
    struct job *job; /* two by two, which share a tile of rows */
    void *inner;     /* (segments, 16, width) numbers between the factors; tiled: (segments, width / 32, 16, 32) */
    atomic_long next; /* pair of jobs */
};

INLINE int64_t cache_lines(int64_t bytes) { return (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE; }

INLINE const struct addition *addition_of(const struct added *added, int32_t owner) {
    const struct addition *its = owner < 0 ? 0 : added->from->adapters[owner] + added->number;
    return its && its->a ? its : 0;
}

/* The segments of all tiles; they are at most as many as rows. */
INLINE void find_segments(struct added *added, int64_t tiles) {
    const int32_t *owners = added->from->owners + added->first;
    added->segments = 0;
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t from = tile * TILE_ROWS, end = from + TILE_ROWS < added->rows ? from + TILE_ROWS : added->rows;
        added->starts[tile] = added->segments;
        for (int64_t row = from; row < end; row++) {
            const struct addition *its = addition_of(added, owners[row]);
            if (!its)
                continue;
            int64_t at = added->starts[tile];
            while (at < added->segments && added->segment[at].addition != its)
                at++;
            if (at == added->segments)
                added->segment[added->segments++] = (struct segment){.addition = its, .tile = tile};
            added->segment[at].rows |= 1u << (row - from);
        }
    }
    added->starts[tiles] = added->segments;
}

INLINE void list_jobs(struct added *added, int64_t tiles) {
    added->jobs = 0;
    for (int64_t tile = 0; tile < tiles; tile++) {
        for (int64_t at = added->starts[tile]; at < added->starts[tile + 1]; at++)
            for (int64_t block = 0; block < added->segment[at].addition->ranks / LANES; block++)
                added->job[added->jobs++] = (struct job){(int32_t)at, (int32_t)block};
        if (added->jobs % 2)
            added->job[added->jobs++] = (struct job){-1, 0};
    }
}

/* Group the rows of a block; `size`: of a number between the factors. 0, or -1 where there is no memory. */
static int plan_added(struct added *added, int64_t first, int64_t rows, int64_t size) {
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, ranks = 0;
    added->first = first;
    added->rows = rows;
    added->width = added->segments = added->jobs = 0;
    atomic_store(&added->next, 0);
    for (int32_t owner = 0; owner < added->from->count; owner++) {
        const struct addition *its = addition_of(added, owner);
        if (its && its->width > added->width)
            added->width = its->width;
        if (its && its->ranks > ranks)
            ranks = its->ranks;
    }
    if (!ranks)
        return 0;
    int64_t most = tiles * added->from->count < rows ? tiles * added->from->count : rows;
    int64_t starts = cache_lines((tiles + 1) * 8), segments = cache_lines(most * (int64_t)sizeof(struct segment));
    int64_t jobs = cache_lines((most * (ranks / LANES) + tiles) * (int64_t)sizeof(struct job));
    int64_t inner = most * TILE_ROWS * added->width * size;
    char *memory = quartet_scratch(6, starts + segments + jobs + inner);
    if (!memory)
        return -1;
    added->starts = (void *)memory;
    added->segment = (void *)(memory + starts);
    added->job = (void *)(memory + starts + segments);
    added->inner = memory + starts + segments + jobs;
    find_segments(added, tiles);
    list_jobs(added, tiles);
    memset(added->inner, 0, (size_t)(added->segments * TILE_ROWS * added->width * size));
    return 0;
}

/* sums (rows, 16) += x (rows, depth) @ one block, in the order of any other product; `rows` is a constant. */
INLINE void multiply_rows(int rows, const factor *const *x, const bf16 *weight, int64_t depth, float *const *sums) {
    vec sum[TOGETHER];
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++)
        sum[row] = vec_load(sums[row]);
#if defined(__AMX_BF16__)
    for (int64_t from = 0; from < depth; from += TILE_DEPTH) {
        int64_t end = from + TILE_DEPTH < depth ? from + TILE_DEPTH : depth;
        vec evens[TOGETHER], odds[TOGETHER];
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++)
            evens[row] = odds[row] = vec_set(0.0f);
        for (int64_t k = from; k < end; k += 2) {
            vec even, odd;
            _mm_prefetch((const char *)(weight + k * LANES) + PREFETCH, _MM_HINT_T0);
            vec_load_pairs(weight + k * LANES, &even, &odd);
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++) {
                evens[row] = vec_fma(vec_set(x[row][k]), even, evens[row]);
                odds[row] = vec_fma(vec_set(x[row][k + 1]), odd, odds[row]);
            }
        }
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++)
            sum[row] = vec_add(sum[row], vec_add(evens[row], odds[row]));
    }
#else
    for (int64_t k = 0; k < depth; k += 2) {
        const bf16 *line = weight + k * LANES;
        _mm_prefetch((const char *)line + PREFETCH, _MM_HINT_T0);
#if defined(__AVX512BF16__)
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++)
            add_pair(&sum[row], line, x[row] + k);
#else
        vec even, odd;
        vec_load_pairs(line, &even, &odd);
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            sum[row] = vec_fma(vec_set(x[row][k]), even, sum[row]);
            sum[row] = vec_fma(vec_set(x[row][k + 1]), odd, sum[row]);
        }
#endif
    }
#endif
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++)
        vec_store(sums[row], sum[row]);
}

OUTLINE void multiply_some(int rows, const factor *const *x, const bf16 *weight, int64_t depth, float *const *sums) {
    switch (rows) {
    case 1: multiply_rows(1, x, weight, depth, sums); return;
    case 2: multiply_rows(2, x, weight, depth, sums); return;
    case 3: multiply_rows(3, x, weight, depth, sums); return;
    default: multiply_rows(4, x, weight, depth, sums); return;
    }
}

/* Take the next rows out of a set, at most TOGETHER; returns how many. */
INLINE int take_rows(uint32_t *rows, int *taken) {
    int count = 0;
    for (; *rows && count < TOGETHER; *rows &= *rows - 1)
        taken[count++] = __builtin_ctz(*rows);
    return count;
}

/* One row's sums of a block of ranks to their places, rounded. */
INLINE void keep_row(const struct added *added, const struct job *job, int row, const float *sums) {
    const struct addition *its = added->segment[job->segment].addition;
    const int32_t *places = its->places + job->block * LANES;
    bf16 numbers[LANES];
    vec_store_bf16(numbers, vec_load(sums));
    int64_t begin = job->segment * TILE_ROWS * added->width;
    for (int i = 0; i < LANES; i++) {
        int64_t place = places[i];
        if (place < 0)
            continue;
        if (added->tiled) {
            bf16 *tile = (bf16 *)added->inner + begin + place / TILE_DEPTH * TILE_ROWS * TILE_DEPTH;
            tile[row * TILE_DEPTH + place % TILE_DEPTH] = numbers[i];
        } else {
            factor *to = (factor *)added->inner + begin + row * added->width + place;
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
            *to = numbers[i];
#else
            *to = from_bf16(numbers[i]);
#endif
        }
    }
}

/* A job, row by row. */
INLINE void shrink_rows(const struct added *added, const struct job *job) {
    const struct segment *segment = added->segment + job->segment;
    const bf16 *weight = (const bf16 *)segment->addition->a + job->block * added->depth * LANES;
    uint32_t rows = segment->rows;
    while (rows) {
        float sums[TOGETHER][LANES], *each[TOGETHER];
        const factor *x[TOGETHER];
        int taken[TOGETHER], count = take_rows(&rows, taken);
        for (int i = 0; i < count; i++) {
            memset(each[i] = sums[i], 0, sizeof sums[i]);
            x[i] = (const factor *)added->x + (segment->tile * TILE_ROWS + taken[i]) * added->depth;
        }
        multiply_some(count, x, weight, added->depth, each);
        for (int i = 0; i < count; i++)
            keep_row(added, job, taken[i], sums[i]);
    }
}

#if defined(__AMX_BF16__)

/* Two jobs of a tile of rows. */
INLINE void shrink_tile(const struct added *added, const struct job *jobs) {
    float sums[TILE_ROWS * 2 * LANES] __attribute__((aligned(CACHE_LINE)));
    const bf16 *weights[2];
    for (int i = 0; i < 2; i++) {
        const struct job *job = jobs[i].segment < 0 ? jobs : jobs + i;
        const struct addition *its = added->segment[job->segment].addition;
        weights[i] = (const bf16 *)its->a + job->block * added->depth * LANES;
    }
    int64_t tile = added->segment[jobs[0].segment].tile;
    const bf16 *x = (const bf16 *)added->x + tile * TILE_ROWS * added->depth;
    multiply_tiles(1, x, 0, weights, weights, added->depth, 1, sums, 2 * LANES, 0, 0);
    for (int i = 0; i < 2 && jobs[i].segment >= 0; i++)
        for (uint32_t rows = added->segment[jobs[i].segment].rows; rows; rows &= rows - 1) {
            int row = __builtin_ctz(rows);
            keep_row(added, jobs + i, row, sums + row * 2 * LANES + i * LANES);
        }
}

/* Two blocks of columns of a tile of rows. Tiles 2 and 3 stay as they are: integer_tiles.h has sums in them meanwhile. */
INLINE void expand_tile(const struct added *added, int64_t tile, const int64_t *blocks, int64_t ahead, float *sums,
                        int64_t stride) {
    int64_t bytes = stride * 4;
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, sums + LANES, bytes);
    for (int64_t at = added->starts[tile]; at < added->starts[tile + 1]; at++) {
        const struct addition *its = added->segment[at].addition;
        const bf16 *inner = (const bf16 *)added->inner + at * TILE_ROWS * added->width;
        for (const struct part *part = its->parts; part < its->parts + its->count; part++)
            for (int place = 0; place < 2; place++) {
                int64_t block = blocks[place] - part->first;
                if (block < 0 || block >= part->blocks)
                    continue;
                const bf16 *x = inner + part->place * TILE_ROWS;
                const bf16 *b = (const bf16 *)part->b + block * part->rank * LANES;
                for (int64_t line = 0; ahead && line < part->rank / 2; line++)
                    _mm_prefetch((const char *)(b + ahead * part->rank * LANES + line * 32), _MM_HINT_T0);
                for (int64_t k = 0; k < part->rank; k += TILE_DEPTH) {
                    _tile_loadd(4, x + k * TILE_ROWS, 64);
                    if (place) {
                        _tile_loadd(7, b + k * LANES, 64); /* lines behind the ranks meet zeros */
                        _tile_dpbf16ps(1, 4, 7);
                    } else {
                        _tile_loadd(6, b + k * LANES, 64);
                        _tile_dpbf16ps(0, 4, 6);
                    }
                }
            }
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + LANES, bytes);
}

#endif

/* The first products, by all threads of a task. */
OUTLINE void shrink(struct added *added) {
    int64_t at;
    while ((at = quartet_next(&added->next) * 2) < added->jobs) {
        const struct job *jobs = added->job + at;
#if defined(__AMX_BF16__)
        if (added->tiled) {
            shrink_tile(added, jobs);
            continue;
        }
#endif
        shrink_rows(added, jobs);
        if (jobs[1].segment >= 0)
            shrink_rows(added, jobs + 1);
    }
}

/* What a segment adds to one block of columns, for those of its rows that are `wanted`; `sums` begin with row `row`. */
INLINE void expand_rows(const struct added *added, int64_t at, const struct part *part, int64_t block, uint32_t wanted,
                        int64_t row, float *sums, int64_t stride) {
    const struct segment *segment = added->segment + at;
    const bf16 *b = (const bf16 *)part->b + block * part->rank * LANES;
    while (wanted) {
        float *each[TOGETHER];
        const factor *x[TOGETHER];
        int taken[TOGETHER], count = take_rows(&wanted, taken);
        for (int i = 0; i < count; i++) {
            each[i] = sums + (segment->tile * TILE_ROWS + taken[i] - row) * stride;
            x[i] = (const factor *)added->inner + (at * TILE_ROWS + taken[i]) * added->width + part->place;
        }
        multiply_some(count, x, b, part->rank, each);
    }
}

/* sums (rows, count * 16) of rows from `row` of the block on += the second products, for these blocks of columns.
 * `ahead`: how many blocks later the thread will probably come to next, or 0. */
OUTLINE void expand(const struct added *added, const int64_t *blocks, int count, int64_t ahead, int64_t row, int64_t rows,
                   float *sums, int64_t stride) {
    for (int64_t tile = row / TILE_ROWS; tile * TILE_ROWS < row + rows; tile++) {
        if (added->starts[tile] == added->starts[tile + 1])
            continue;
#if defined(__AMX_BF16__)
        if (added->tiled) {
            expand_tile(added, tile, blocks, ahead, sums + (tile * TILE_ROWS - row) * stride, stride);
            continue;
        }
#endif
        int64_t from = tile * TILE_ROWS < row ? row - tile * TILE_ROWS : 0, end = row + rows - tile * TILE_ROWS;
        uint32_t wanted = (end < TILE_ROWS ? (1u << end) - 1 : 0xFFFF) & ~((1u << from) - 1);
        for (int64_t at = added->starts[tile]; at < added->starts[tile + 1]; at++) {
            const struct addition *its = added->segment[at].addition;
            for (const struct part *part = its->parts; part < its->parts + its->count; part++)
                for (int place = 0; place < count; place++) {
                    int64_t block = blocks[place] - part->first;
                    if (block >= 0 && block < part->blocks)
                        expand_rows(added, at, part, block, added->segment[at].rows & wanted, row, sums + place * LANES,
                                    stride);
                }
        }
    }
    (void)ahead;
}
