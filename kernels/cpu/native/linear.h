/* Products with packed bfloat16 weights, summed in float32.
 *
 * A weight (n, k) is packed as (columns / 16, depth / 2, 16, 2): for 16 columns of the result, pairs of numbers that
 * are neighbours in k, one cache line for each pair. AMX and VDPBF16PS read exactly this; older instruction sets take
 * the even and the odd numbers apart. n and k are padded with zeros to multiples of 16 and 32.
 *
 * Few rows: the weight is read once, in order, and reading it is what takes the time. Many rows: blocks of ROW_BLOCK
 * rows, which stay in the second cache while the weight passes; k longer than DEPTH_BLOCK is cut into pieces for the same
 * reason, and these into steps for the first cache, with the sums kept in memory. Each number of a result is summed in
 * one order, however many rows there are: a row has the same bits alone and among others.
 *
 * Rows are copied in the form that the inner loops read. Where these read bfloat16 and there is nothing to do to it (no
 * norm), rows are read where they are: to take the lines of a copy from another core, which has read them last, took up to
 * a fifth of a product.
 *
 * A quantized weight (quantized.h) is expanded panel by panel to the same form, in memory that stays in the second cache;
 * from there on all is alike. Unless `exact` forbids it, few rows are multiplied as integers (integers.h). Where the weight
 * is rotated more rows are too, in whole groups: by AMX (integer_tiles.h), or by VNNI (integer_groups.h), which takes few
 * rows so as well.
 */
#pragma once

#include "ahead.h"
#include "grid.h"
#include "integer_groups.h"
#include "integer_tiles.h"
#include "plan.h"
#include "pool.h"

#define ROW_BLOCK 640  /* room for 512 tokens of prompts and the decode rows of their step */
#define VECTOR_ROW_BLOCK 320 /* the same without tiles: they share the second cache with their sums */
#define DEPTH_BLOCK 1024 /* longer k is cut into pieces: of a step where x is in tiles */
#define STEP_BLOCK 256 /* of k: so much of a panel stays in the first cache while many rows pass */
#define VECTOR_STEP_BLOCK 448 /* the same, of a panel of GRID_BLOCKS blocks that rows pass without tiles */
#define FEW_STEP_BLOCK 512 /* the same, of an expanded panel and fewer rows than two times MANY_ROWS */
#define MOST_APART 4   /* threads of which each prepares a single row for itself: quicker than to wait for all of its parts */
#define CHUNK_OF_PIECES 16 /* where k is cut into pieces: a chunk reads all of x, from beyond the second cache */

/* Steps of k of a thread's panels, in the order in which they are computed. */
struct position {
    int64_t panel, after; /* the panel, and the one that follows it */
    int64_t begin, from, end; /* of k: the piece that is computed, and where its step begins */
};

/* Where the blocks begin that are expanded behind block `place` of a panel. */
INLINE struct place expanded_next(const struct plan *plan, const struct position *at, int64_t depth, int place) {
    int64_t panel = at->panel, from = at->from;
    int last = place + 1 == plan->blocks;
    if (last && from + depth < at->end) {
        from += depth;
    } else if (last) {
        panel = at->after;
        from = at->begin;
    }
    int64_t block = block_of(plan, panel, last ? 0 : place + 1);
    return place_of(&plan->p->quantized, plan->depth, block, from);
}

/* Whether rows pass parts of the weight that stay in the first cache, without tiles. */
INLINE int in_steps(const struct plan *plan) {
#ifdef PAIRS
    return plan->grid_rows == GRID_ROWS && !plan->integers && !plan->grouped;
#else
    (void)plan;
    return 0;
#endif
}

/* The blocks of a panel for a step of k, expanded if need be; `next`: those of the panel that follows. */
INLINE void load_panel(const struct plan *plan, const struct position *at, int64_t depth, bf16 *expanded,
                       const bf16 **weight, const bf16 **next) {
    const struct quantized *quantized = &plan->p->quantized;
    for (int place = 0; place < plan->blocks; place++) {
        int64_t block = block_of(plan, at->panel, place);
        if (quantized->numbers) {
            bf16 *out = expanded + place * depth * LANES;
            struct place soon = expanded_next(plan, at, depth, place);
            expand_block(quantized, plan->depth, block, at->from, depth, soon, out);
            weight[place] = next[place] = out;
        } else {
            weight[place] = packed_block(plan, block, at->from);
            if (in_steps(plan) && at->from + depth < at->end)
                next[place] = packed_block(plan, block, at->from + depth);
            else
                next[place] = packed_block(plan, block_of(plan, at->after, place), in_steps(plan) ? at->begin : at->from);
        }
    }
}

/* All rows of a block through some panels; `kept` has the sums of a step of k where there are several steps. */
INLINE void compute_panels(const struct plan *plan, int64_t first, int64_t rows, int64_t begin, int64_t end,
                           float *kept, bf16 *expanded) {
    float local[MOST_ROWS * MOST_COLUMNS] __attribute__((aligned(CACHE_LINE)));
    int64_t stride = plan->blocks * LANES, in_pieces = plan->piece < plan->depth;
    for (int64_t piece = 0; piece < plan->depth; piece += plan->piece) {
        int64_t piece_end = piece + plan->piece < plan->depth ? piece + plan->piece : plan->depth;
        for (int64_t panel = begin; panel < end; panel++)
            for (int64_t from = piece; from < piece_end; from += plan->step) {
                int64_t depth = piece_end - from < plan->step ? piece_end - from : plan->step;
                const bf16 *weight[FEW_BLOCKS], *next[FEW_BLOCKS];
                struct position at = {panel, panel_after(plan, panel, begin, end), piece, from, piece_end};
                load_panel(plan, &at, depth, expanded, weight, next);
                for (int64_t row = 0; row < rows; row += plan->grid_rows) {
                    int64_t place = in_pieces ? panel - begin : 0;
                    float *sums = kept ? kept + (place * plan->padded_rows + row) * stride : local;
                    int64_t some = rows - row < plan->grid_rows ? rows - row : plan->grid_rows;
                    if (!from && !plan->tiled)
                        memset(sums, 0, (size_t)(plan->grid_rows * stride) * 4);
                    multiply_grid(plan, weight, next, row, some, from, depth, sums, stride);
                    if (from + depth == plan->depth && plan->added.jobs)
                        add_adapters(plan, panel, row, some, sums, stride);
                    if (from + depth == plan->depth)
                        write_tile(plan, panel, first + row, some, sums, stride);
                }
            }
    }
}

/* The same, with rows and weight as integers. */
static void compute_integers(const struct plan *plan, int64_t first, int64_t rows, int64_t begin, int64_t end) {
    float sums[4 * MOST_COLUMNS] __attribute__((aligned(CACHE_LINE)));
    const struct quantized *quantized = &plan->p->quantized;
    for (int64_t panel = begin; panel < end; panel++) {
        int64_t blocks[FEW_BLOCKS], after[FEW_BLOCKS], next = panel_after(plan, panel, begin, end);
        for (int place = 0; place < plan->blocks; place++) {
            blocks[place] = block_of(plan, panel, place);
            after[place] = block_of(plan, next, place);
        }
        for (int64_t row = 0; row < rows; row += 4) {
            int64_t some = rows - row < 4 ? rows - row : 4;
            switch (quantized->bits) {
            case 4: integer_grid(quantized, 4, &plan->rows, row, some, blocks, after, sums, MOST_COLUMNS); break;
            case 5: integer_grid(quantized, 5, &plan->rows, row, some, blocks, after, sums, MOST_COLUMNS); break;
            case 6: integer_grid(quantized, 6, &plan->rows, row, some, blocks, after, sums, MOST_COLUMNS); break;
            default: integer_grid(quantized, 8, &plan->rows, row, some, blocks, after, sums, MOST_COLUMNS); break;
            }
            if (plan->added.jobs)
                add_adapters(plan, panel, row, some, sums, MOST_COLUMNS);
            write_tile(plan, panel, first + row, some, sums, MOST_COLUMNS);
        }
    }
}

/* One block of rows. */
struct block {
    struct plan *plan;
    int64_t first, rows;
    int64_t count;     /* of chunks of panels: a thread takes one at once */
    float *kept;       /* sums between pieces of k, or null */
    int64_t kept_size; /* of each thread */
    bf16 *expanded;    /* a panel of the weight, or null */
    int64_t expanded_size; /* of each thread */
    struct shares chunks;
};

/* What goes with rows as integers lies behind them. */
INLINE void place_scales(struct plan *plan) {
    if (plan->integers)
        plan->rows = integer_rows_at(plan->x, plan->padded_rows, plan->depth, plan->p->quantized.row_bits);
    if (!plan->grouped)
        return;
    plan->row_scales = (float *)((int8_t *)plan->x + plan->padded_rows * plan->depth);
    plan->row_sums = (int32_t *)(plan->row_scales + plan->depth / ROTATED * plan->padded_rows);
}

/* A plan with a place of its own for the rows. */
INLINE struct plan own_plan(const struct plan *plan, int thread) {
    struct plan own = *plan;
    own.x = plan->x + thread * plan->padded_rows * plan->room;
    place_scales(&own);
    return own;
}

static void compute_block(void *argument, int thread, int threads) {
    struct block *block = argument;
    struct plan *plan = block->plan, own;
    if (plan->apart) {
        own = own_plan(plan, thread);
        plan = &own;
    }
#if defined(__AMX_BF16__)
    unsigned state = _mm_getcsr();
    _mm_setcsr(state | 0x8040); /* as tiles do: numbers too small to be normal are zeros */
#endif
#if GROUP_ROWS
    if (plan->grouped)
        for (int64_t row = plan->apart ? 0 : thread; row < (plan->apart ? 1 : plan->padded_rows); row += threads)
            prepare_groups(plan, block->first, row);
    else
#endif
    if (plan->apart)
        prepare_part(plan, block->first, 0, 0, plan->depth);
    else if (!plan->p->x_tiles && !plan->direct)
        prepare_rows(plan, block->first, block->rows, plan->padded_rows, thread, threads);
    if (plan->plain)
        prepare_rows(plan->plain, block->first, block->rows, plan->padded_rows, thread, threads);
    if (!plan->direct && !plan->apart)
        quartet_barrier(threads);
    if (plan->tiled || plan->grouped)
        tiles_begin(plan->tiled ? block->rows : MOST_ROWS);
    if (plan->added.jobs) {
        shrink(&plan->added);
        quartet_barrier(threads);
    }
    bf16 *expanded = block->expanded ? block->expanded + thread * block->expanded_size : 0;
    float *kept = block->kept ? block->kept + thread * block->kept_size : 0;
    long chunk;
    while ((chunk = quartet_take(&block->chunks, thread)) >= 0) {
        int64_t begin = chunk_begin(plan->panels, block->count, chunk);
        int64_t end = chunk_begin(plan->panels, block->count, chunk + 1);
        if (plan->integers) {
            compute_integers(plan, block->first, block->rows, begin, end);
            continue;
        }
#if GROUP_ROWS
        if (plan->grouped) {
            compute_groups(plan, block->first, block->rows, begin, end, kept);
            continue;
        }
#endif
        compute_panels(plan, block->first, block->rows, begin, end, kept, expanded);
    }
    if (plan->p->next && plan->p->rows == 1)
        prefetch_next(plan->p->next, thread, threads);
    if (plan->tiled || plan->grouped)
        tiles_end();
#if defined(__AMX_BF16__)
    _mm_setcsr(state);
#endif
}

INLINE int is_rotated(const struct product *p) { return p->quantized.numbers && p->quantized.rotated; }

INLINE int as_integers(const struct product *p) {
    int64_t most = is_rotated(p) ? MOST_ROTATED_ROWS : MOST_INTEGER_ROWS;
    if (p->quantized.row_bits == 16 && most > MOST_LONG_ROWS)
        most = MOST_LONG_ROWS;
    return p->quantized.numbers && !p->quantized.exact && p->rows <= most;
}

INLINE int in_groups(const struct product *p) {
#if GROUP_ROWS
    return is_rotated(p) && !p->quantized.exact && !as_integers(p);
#else
    (void)p;
    return 0;
#endif
}

INLINE int on_tiles(const struct product *p) {
#if defined(__AMX_BF16__)
    return p->rows > FEW_ROWS && !as_integers(p);
#else
    (void)p;
    return 0;
#endif
}

/* A part of k, at most `most` (a multiple of TILE_DEPTH), of which all are alike but for the last, which may be less. */
INLINE int64_t even_part(int64_t depth, int64_t most) {
    int64_t parts = (depth + most - 1) / most;
    return round_up((depth + parts - 1) / parts, TILE_DEPTH);
}

static int run_block(struct plan *plan, int64_t first, int64_t rows) {
    struct block block = {.plan = plan, .first = first, .rows = rows};
    int threads = plan->p->threads, many_in_groups = plan->grouped && (on_tiles(plan->p) || rows > plan->grid_rows);
    int tiles = plan->tiled || many_in_groups;
    int expands = plan->p->quantized.numbers && !plan->integers && !plan->grouped, many = rows > MANY_ROWS, deep;
    plan->piece = plan->step = plan->depth;
    deep = plan->depth > DEPTH_BLOCK && (expands || (many && !plan->integers));
    if (deep && plan->grouped)
        plan->piece = plan->group;
    else if (deep)
        plan->piece = even_part(plan->depth, in_steps(plan) ? VECTOR_STEP_BLOCK : plan->tiled && many ? STEP_BLOCK : DEPTH_BLOCK);
    if (in_steps(plan) && !deep) {
        block.count = plan->panels;
    } else if (tiles || many) {
        int64_t most = threads * (deep && tiles && many ? CHUNK_OF_PIECES : CHUNK_PANELS);
        int64_t turns = (plan->panels + most - 1) / most; /* of each thread */
        block.count = plan->panels < threads * turns ? plan->panels : threads * turns;
    } else {
        block.count = few_chunks(plan->panels, threads);
    }
    quartet_share(&block.chunks, block.count, threads);
    if (plan->tiled && (expands || many))
        plan->step = even_part(plan->piece, expands && rows <= 2 * MANY_ROWS ? FEW_STEP_BLOCK : STEP_BLOCK);
    else if (in_steps(plan) && plan->padded_rows > GRID_ROWS)
        plan->step = even_part(plan->piece, VECTOR_STEP_BLOCK);
    else
        plan->step = plan->piece;
    place_scales(plan);
    if (plan->step < plan->depth || plan->grouped) {
        int64_t panels = plan->piece < plan->depth ? (plan->panels + block.count - 1) / block.count : 1;
        block.kept_size = panels * plan->padded_rows * plan->blocks * LANES;
        block.kept = quartet_scratch(1, threads * block.kept_size * 4);
        if (!block.kept)
            return -1;
    }
    if (expands) {
        block.expanded_size = plan->blocks * plan->step * LANES;
        block.expanded = quartet_scratch(4, threads * block.expanded_size * 2);
        if (!block.expanded)
            return -1;
    }
    if (plan->added.from && plan_added(&plan->added, first, rows, sizeof(factor)))
        return -1;
    quartet_run(compute_block, &block, threads);
    return 0;
}

/* Have the plan add what adapters have, for blocks of at most so many rows; `plain` is memory for another plan. */
static int plan_adapters(struct plan *plan, struct plan *plain, int64_t rows) {
    if (!plan->p->additions)
        return 0;
    plan->added = (struct added){.from = plan->p->additions, .number = plan->p->number, .depth = plan->depth};
    plan->added.x = plan->x;
    plan->added.tiled = on_tiles(plan->p);
    if (!plan->integers && !plan->rotated)
        return 0;
    *plain = *plan;
    plain->integers = plain->grouped = plain->rotated = 0;
    plain->tiled = plan->added.tiled;
    plan->added.x = plain->x = quartet_scratch(7, rows * plan->depth * (int64_t)sizeof(factor));
    plan->plain = plain;
    return plain->x ? 0 : -1;
}

static int takes_tiles(const struct product *p) { return on_tiles(p) && !is_rotated(p) && p->k % TILE_DEPTH == 0; }

/* Whether the inner loops read the rows where they are. */
INLINE int takes_rows(const struct plan *plan) {
#ifdef PAIRS
    const struct product *p = plan->p;
    return !(p->norm || plan->rotated || plan->integers || p->additions) && p->k == plan->depth;
#else
    (void)plan;
    return 0;
#endif
}

static int product(const struct product *p) {
    struct plan plan = {.p = p, .grid_rows = GRID_ROWS, .blocks = GRID_BLOCKS}, plain;
    int gated = p->output == OUTPUT_GATED;
    plan.integers = as_integers(p);
    plan.rotated = is_rotated(p);
    plan.grouped = in_groups(p);
    plan.tiled = on_tiles(p) && !plan.grouped;
    if (plan.integers) {
        plan.blocks = FEW_BLOCKS;
        plan.grid_rows = p->rows < 3 ? (int)p->rows : 4;
    } else if (plan.grouped && !on_tiles(p)) {
        plan.blocks = FEW_BLOCKS;
        plan.grid_rows = GROUP_ROWS;
    } else if (!on_tiles(p) && p->rows <= FEW_ROWS) {
        plan.blocks = FEW_BLOCKS;
        plan.grid_rows = FEW_ROWS;
    } else if (gated && GRID_BLOCKS == 1) {
        plan.blocks = 2; /* one of the gate and one of what it is multiplied with */
    }
    plan.depth = round_up(p->k, TILE_DEPTH);
    plan.room = plan.depth;
    if (plan.integers && p->quantized.row_bits == 16)
        plan.room += round_up(plan.depth / TILE_DEPTH * (int64_t)sizeof(float), CACHE_LINE) / 2;
    plan.group = plan.rotated ? rotated_group(plan.depth, p->quantized.rotated) : plan.depth;
    plan.columns = (gated ? p->n / 2 : p->n) / LANES + ((gated ? p->n / 2 : p->n) % LANES != 0);
    int width = gated ? plan.blocks / 2 : plan.blocks;
    plan.panels = (plan.columns + width - 1) / width;
    int64_t most_rows = in_steps(&plan) ? VECTOR_ROW_BLOCK : ROW_BLOCK;
    int64_t blocks = (p->rows + most_rows - 1) / most_rows; /* of rows, as even as they can be */
    int64_t block = round_up((p->rows + blocks - 1) / blocks, MOST_ROWS);
    int64_t most = p->rows < block ? p->rows : block;
    int64_t pad = on_tiles(p) && most <= 16 ? 16 : plan.grid_rows;
    plan.direct = takes_rows(&plan);
    plan.stride = plan.direct ? p->x_stride : plan.depth;
    plan.apart = p->rows == 1 && p->threads <= MOST_APART && !plan.direct && !p->x_tiles && !p->additions;
    int64_t copies = plan.apart ? p->threads : 1, numbers = copies * round_up(most, pad) * plan.room;
    plan.x = p->x_tiles || plan.direct ? (factor *)p->x : quartet_scratch(0, numbers * (int64_t)sizeof(factor));
    if (!plan.x)
        return -1;
    if (plan_adapters(&plan, &plain, round_up(most, pad)))
        return -1;
    for (int64_t first = 0; first < p->rows; first += block) {
        int64_t rows = p->rows - first < block ? p->rows - first : block;
        plan.padded_rows = round_up(rows, pad);
        if (p->x_tiles)
            plan.added.x = plan.x = (factor *)(p->x + first * plan.depth);
        if (plan.direct)
            plan.x = (factor *)(p->x + first * p->x_stride);
        int failed = run_block(&plan, first, rows);
        if (failed)
            return failed;
    }
    return 0;
}
