/* Which panels of a product a thread takes at once, and what it prefetches of the next product's weight. */
#pragma once

#include "plan.h"

#define FEW_TURNS 4    /* least that a thread has where the threads take several panels of few rows at once */
#define CHUNK_PANELS 8 /* most panels that a thread takes at once */
#define PREFETCHED 16384 /* bytes, of each block of the next product's first panel */

/* Into how many chunks panels of few rows are divided, of which a thread takes one at once: as many for each thread, or where
 * that would be a panel or two in a chunk, one for each panel. */
INLINE int64_t few_chunks(int64_t panels, int64_t threads) {
    int64_t turns = (panels + threads * CHUNK_PANELS - 1) / (threads * CHUNK_PANELS);
    if (panels < 2 * threads * FEW_TURNS)
        return panels;
    return threads * (turns < FEW_TURNS ? FEW_TURNS : turns);
}

/* Where a chunk begins: the first ones have one panel more where the panels cannot be divided. */
INLINE int64_t chunk_begin(int64_t panels, int64_t chunks, int64_t chunk) {
    int64_t more = panels % chunks;
    return chunk * (panels / chunks) + (chunk < more ? chunk : more);
}

/* Prefetch what this thread reads first of the next product's weight, for one row: memory is idle until all threads are
 * here, and what is between the two is done. */
INLINE void prefetch_next(const struct product *p, int thread, int threads) {
    int64_t depth = round_up(p->k, TILE_DEPTH), columns = round_up(p->n, LANES) / LANES;
    int width = p->output == OUTPUT_GATED ? FEW_BLOCKS / 2 : FEW_BLOCKS;
    columns = p->output == OUTPUT_GATED ? columns / 2 : columns;
    int64_t panels = (columns + width - 1) / width, chunks = few_chunks(panels, threads);
    int64_t first = chunk_begin(panels, chunks, thread) * width;
    int64_t bytes = p->quantized.numbers ? depth * 2 * p->quantized.bits : depth * LANES * 2;
    for (int place = 0; place < FEW_BLOCKS && first + place % width < columns; place++) {
        int64_t block = first + place % width + (place < width ? 0 : columns);
        const char *from = (p->quantized.numbers ? (const char *)p->quantized.numbers : (const char *)p->packed) +
                           block * bytes;
        for (int64_t at = 0; at < bytes && at < PREFETCHED; at += CACHE_LINE)
            _mm_prefetch(from + at, _MM_HINT_T1); /* it is more than the first cache has room for */
    }
}
