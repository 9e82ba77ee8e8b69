/* A few rows of a product through one panel, by whichever inner loop is for so many (sums.h). */
#pragma once

#include "plan.h"

/* From so many rows on, padding included, each of the first GRID_BLOCKS grids asks for one block of what comes next; with fewer the
 * first grid asks for all. Quantized weights are asked for where they are expanded. */
#define LEAST_SHARED_ROWS 48

/* Some rows of a block through a panel; `next` is what the thread reads after it: the panel that follows in the same
 * piece of k, or where rows pass in steps without tiles the next step. */
INLINE void multiply_grid(const struct plan *plan, const bf16 *const *weight, const bf16 *const *next, int64_t row,
                          int64_t rows, int64_t from, int64_t depth, float *sums, int64_t stride) {
#if defined(__AMX_BF16__)
    if (plan->tiled) {
        const bf16 *x = (const bf16 *)plan->x + row * plan->depth + from * 16;
        if (rows > 16 && plan->padded_rows <= MANY_ROWS) { /* the first rows ask for the weight, the others find it */
            multiply_tiles(2, x, 16 * plan->depth, weight, row ? 0 : next, depth, !from, sums, stride, 0, 0);
        } else if (rows > 16) { /* each grid of rows asks for a share of the next panel's blocks, one after the other */
            int64_t tiles = plan->padded_rows / GRID_ROWS, tile = row / GRID_ROWS, half = (tiles + 1) / 2;
            int64_t lines = (16 + half - 1) / half;
            const bf16 *share = next[tile >= half] + tile % half * lines * depth;
            multiply_tiles(2, x, 16 * plan->depth, weight, 0, depth, !from, sums, stride, share, (int)lines);
        } else {
            multiply_tiles(1, x, 0, weight, next, depth, !from, sums, stride, 0, 0);
        }
        return;
    }
#endif
    const factor *x = plan->x + row * plan->stride + from;
    if (plan->grid_rows <= FEW_ROWS) {
        switch (rows) {
        case 1: multiply_few(1, FEW_BLOCKS, x, plan->stride, weight, next, depth, sums, stride); return;
#if FEW_ROWS > 1
        case 2: multiply_few(2, FEW_BLOCKS, x, plan->stride, weight, next, depth, sums, stride); return;
#endif
#if FEW_ROWS > 2
        case 3: multiply_few(3, FEW_BLOCKS, x, plan->stride, weight, next, depth, sums, stride); return;
        default: multiply_few(4, FEW_BLOCKS, x, plan->stride, weight, next, depth, sums, stride); return;
#endif
        }
    }
#ifdef PAIRS
    int64_t grid = row / GRID_ROWS, shares = plan->padded_rows >= LEAST_SHARED_ROWS ? GRID_BLOCKS : 1;
    int asks = grid < shares && !plan->p->quantized.numbers ? GRID_BLOCKS / (int)shares : 0;
    next += grid % shares;
    switch (rows) {
    case 1: multiply_many_1_0(x, plan->stride, weight, next, depth, sums); return;
    case 2: multiply_many_2_0(x, plan->stride, weight, next, depth, sums); return;
    case 3: multiply_many_3_0(x, plan->stride, weight, next, depth, sums); return;
    case 4: multiply_many_4_0(x, plan->stride, weight, next, depth, sums); return;
    case 5: (asks == GRID_BLOCKS ? multiply_many_5_4 : multiply_many_5_0)(x, plan->stride, weight, next, depth, sums); return;
    }
    switch (asks) {
    case 0: multiply_many_6_0(x, plan->stride, weight, next, depth, sums); return;
    case 1: multiply_many_6_1(x, plan->stride, weight, next, depth, sums); return;
    default: multiply_many_6_4(x, plan->stride, weight, next, depth, sums); return;
    }
#elif !defined(__AMX_BF16__)
    for (int place = 0; place < plan->blocks; place += GRID_BLOCKS)
        multiply_few(GRID_ROWS, GRID_BLOCKS, x, plan->stride, weight + place, 0, depth, sums + place * LANES, stride);
#endif
}
