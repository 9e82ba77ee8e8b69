/* How a product is computed, its rows on their way in, and its sums on their way out; linear.h does what is in between. */
#pragma once

#include "adapters.h"
#include "api.h"
#include "ends.h"
#include "hadamard.h"
#include "integers.h"
#include "sums.h"
#include "vector.h"

#define MANY_ROWS 64   /* with fewer rows all of k fits, and the weight comes as fast as memory gives it */
#define MOST_ROWS 32   /* of a tile of sums */
#define MOST_COLUMNS 64

struct plan {
    const struct product *p;
    int tiled;            /* x is packed in AMX tiles */
    int integers;         /* x is packed as int8 or int16 */
    int grouped;          /* x is packed as int8 in whole groups, see group_rows.h */
    int rotated;          /* x is rotated */
    int grid_rows;        /* rows of a tile of sums */
    int blocks;           /* blocks of 16 columns of a tile of sums */
    int64_t depth;        /* k, padded */
    int64_t room;         /* numbers of `x` that a row takes, its scales included where it is int16 */
    int64_t columns;      /* blocks of 16 columns in a row of the result (before the gate: in one half) */
    int64_t panels;       /* tiles of sums side by side */
    int64_t padded_rows;  /* of a block of rows */
    int64_t piece;        /* of k: numbers that are summed before the next panel's turn */
    int64_t step;         /* of a piece: numbers that are summed before the next rows' turn */
    int64_t group;        /* of k: numbers of x and the weight that share a scale, if `grouped` */
    int direct;           /* the rows are read where they are */
    int64_t stride;       /* numbers from row to row of `x` */
    factor *x;            /* the rows of one block, normed; tiles of bfloat16 if `tiled`, of int8 if `grouped` */
    float *row_scales;    /* (groups, padded_rows), if `grouped` */
    int32_t *row_sums;    /* the same, of the numbers as int8, if SUMS_ROWS */
    struct integer_rows rows; /* instead, if `integers` */
    int apart;                /* each thread prepares the single row in memory of its own, and waits for nobody */
    struct added added;       /* by adapters */
    const struct plan *plain; /* prepares the rows for adapters where they are integers or rotated; or null */
};

INLINE int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

/* The block of the weight that is number `place` in a panel. Behind the end: the last one, whose sums nobody reads. */
INLINE int64_t block_of(const struct plan *plan, int64_t panel, int place) {
    int gated = plan->p->output == OUTPUT_GATED;
    int width = gated ? plan->blocks / 2 : plan->blocks;
    int64_t column = panel * width + place % width;
    if (column >= plan->columns)
        column = plan->columns - 1;
    if (gated && place >= width)
        column += plan->columns;
    return column;
}

/* The panel that a thread most likely takes after `panel`, the last of whose chunk is the one before `end`. */
INLINE int64_t panel_after(const struct plan *plan, int64_t panel, int64_t begin, int64_t end) {
    return panel + 1 < end ? panel + 1 : end + (end - begin) * (plan->p->threads - 1);
}

INLINE const bf16 *packed_block(const struct plan *plan, int64_t block, int64_t from) {
    return plan->p->packed + block * plan->depth * LANES + from * LANES;
}

/* ---- rows on their way in ---- */

/* Other cores have read what lies where a row will be written: to take it from them line by line would cost more than all
 * else that is done with the row. */
INLINE void ask_to_write(const factor *row, int64_t numbers) {
    for (int64_t i = 0; i < numbers; i += CACHE_LINE / (int64_t)sizeof(factor))
        __builtin_prefetch(row + i, 1);
}

/* 16 numbers of a row of the block, in the form that the inner loops of floats read. */
INLINE void store_part(const struct plan *plan, int64_t row, int64_t at, const bf16 *numbers) {
    if (plan->tiled) {
        bf16 *tile = (bf16 *)plan->x + row / 16 * 16 * plan->depth + at / TILE_DEPTH * 16 * TILE_DEPTH;
        memcpy(tile + row % 16 * TILE_DEPTH + at % TILE_DEPTH, numbers, LANES * 2);
    } else {
#ifdef PAIRS
        memcpy(plan->x + row * plan->depth + at, numbers, LANES * 2);
#else
        vec_store(plan->x + row * plan->depth + at, vec_load_bf16(numbers));
#endif
    }
}

/* ROTATED numbers of a row of the product, normed and rotated; zeros of a row that is not there. */
INLINE void load_rotated_part(const struct product *p, int64_t row, float scale, int64_t at, vec *numbers) {
    for (int i = 0; i < ROTATED_VECS; i++) {
        bf16 some[LANES] = {0};
        if (row < p->rows)
            load_normed(p, p->x + row * p->x_stride, scale, at + i * LANES, some);
        numbers[i] = vec_load_bf16(some);
    }
    rotate_numbers(numbers);
}

/* As `prepare_part`; `from` and `to` are multiples of ROTATED. */
INLINE void prepare_rotated(const struct plan *plan, int64_t first, int64_t row, int64_t from, int64_t to, float scale) {
    for (int64_t at = from; at < to; at += ROTATED) {
        vec numbers[ROTATED_VECS];
        load_rotated_part(plan->p, first + row, scale, at, numbers);
        for (int i = 0; i < ROTATED_VECS; i += 2) {
            int64_t place = at + i * LANES;
            if (plan->integers) {
                store_integers(&plan->rows, row, place / TILE_DEPTH, numbers[i], numbers[i + 1]);
                continue;
            }
            for (int next = 0; next < 2; next++) {
                bf16 some[LANES];
                vec_store_bf16(some, numbers[i + next]);
                store_part(plan, row, place + next * LANES, some);
            }
        }
    }
}

/* Numbers `from` to `to` of row `row` of the block, both multiples of `least_part`: normed, padded with zeros, in the form
 * that the inner loops read. */
OUTLINE void prepare_part(const struct plan *plan, int64_t first, int64_t row, int64_t from, int64_t to) {
    const struct product *p = plan->p;
    int there = first + row < p->rows;
#ifdef PAIRS
    if (!plan->integers)
        ask_to_write(plan->x + row * plan->depth + from, to - from);
#endif
    const bf16 *x = there ? p->x + (first + row) * p->x_stride : 0;
    float scale = there && p->norm ? row_scale(x, p->k, p->epsilon) : 1.0f;
    if (plan->rotated) {
        prepare_rotated(plan, first, row, from, to, scale);
        return;
    }
    for (int64_t at = from; at < to; at += LANES) {
        bf16 numbers[LANES] = {0};
        if (there)
            load_normed(p, x, scale, at, numbers);
        if (plan->integers) {
            bf16 second[LANES] = {0};
            if (there)
                load_normed(p, x, scale, at + LANES, second);
            store_integers(&plan->rows, row, at / TILE_DEPTH, vec_load_bf16(numbers), vec_load_bf16(second));
            at += LANES;
            continue;
        }
        store_part(plan, row, at, numbers);
    }
}

INLINE int64_t least_part(const struct plan *plan) { return plan->rotated ? ROTATED : TILE_DEPTH; }

/* A thread's share of the rows of a block, padding included. `count` rows that are fewer than threads are divided by their
 * numbers, so that a thread looks at two rows at most for their norm. */
INLINE void prepare_rows(const struct plan *plan, int64_t first, int64_t count, int64_t rows, int thread, int threads) {
    if (count >= threads) {
        for (int64_t row = rows * thread / threads; row < rows * (thread + 1) / threads; row++)
            prepare_part(plan, first, row, 0, plan->depth);
        return;
    }
    int64_t depth = plan->depth, unit = least_part(plan), units = depth / unit;
    int64_t from = count * units * thread / threads * unit, to = count * units * (thread + 1) / threads * unit;
    for (int64_t row = from / depth; row * depth < to; row++) {
        int64_t begin = row * depth, end = begin + depth;
        prepare_part(plan, first, row, (from > begin ? from : begin) - begin, (to < end ? to : end) - begin);
    }
    from = units * thread / threads * unit, to = units * (thread + 1) / threads * unit;
    for (int64_t row = count; row < rows; row++) /* padding */
        prepare_part(plan, first, row, from, to);
}

/* ---- sums on their way out ---- */

/* 16 columns of a gated result to the tiles that the next product reads; `first`: a multiple of 16. */
INLINE void write_to_tiles(const struct product *p, int64_t column, int64_t first, int64_t rows, const float *sums,
                           int64_t stride, int64_t up) {
    int64_t columns = p->n / 2;
    for (; rows > 0; first += 16, rows -= 16, sums += 16 * stride) {
        bf16 *tile = (bf16 *)p->out + first * columns + column / TILE_DEPTH * 16 * TILE_DEPTH;
        char *out = (char *)(tile + column % TILE_DEPTH);
        write_columns(p, OUTPUT_GATED, p->bias != 0, column, rows < 16 ? rows : 16, LANES, out, TILE_DEPTH, sums, stride,
                      up);
    }
}

static void write_tile(const struct plan *plan, int64_t panel, int64_t first, int64_t rows, const float *sums,
                       int64_t stride) {
    const struct product *p = plan->p;
    int gated = p->output == OUTPUT_GATED, width = gated ? plan->blocks / 2 : plan->blocks;
    int64_t half = gated ? p->n / 2 : p->n, up = width * LANES;
    for (int place = 0; place < width; place++, sums += LANES) {
        int64_t column = (panel * width + place) * LANES, left = half - column, to = p->out_stride;
        if (left <= 0)
            return;
        if (p->out_tiles) {
            write_to_tiles(p, column, first, rows, sums, stride, up);
            continue;
        }
        char *out = (char *)p->out + (first * to + column) * (p->output == OUTPUT_FLOAT ? 4 : 2);
        switch (p->output * 2 + (p->bias != 0)) {
        case OUTPUT_BF16 * 2: write_columns(p, OUTPUT_BF16, 0, column, rows, left, out, to, sums, stride, up); break;
        case OUTPUT_BF16 * 2 + 1: write_columns(p, OUTPUT_BF16, 1, column, rows, left, out, to, sums, stride, up); break;
        case OUTPUT_ADD * 2: write_columns(p, OUTPUT_ADD, 0, column, rows, left, out, to, sums, stride, up); break;
        case OUTPUT_GATED * 2: write_columns(p, OUTPUT_GATED, 0, column, rows, left, out, to, sums, stride, up); break;
        default: write_columns(p, p->output, p->bias != 0, column, rows, left, out, to, sums, stride, up); break;
        }
    }
}

/* What adapters add to a panel's sums of rows from `row` of the block on. */
INLINE void add_adapters(const struct plan *plan, int64_t panel, int64_t row, int64_t rows, float *sums,
                         int64_t stride) {
    int64_t blocks[FEW_BLOCKS], width = plan->p->output == OUTPUT_GATED ? plan->blocks / 2 : plan->blocks;
    for (int place = 0; place < plan->blocks; place++)
        blocks[place] = block_of(plan, panel, place);
    int64_t ahead = plan->added.rows > MANY_ROWS ? 0 : width * plan->p->threads;
    expand(&plan->added, blocks, plan->blocks, ahead, row, rows, sums, stride);
}
