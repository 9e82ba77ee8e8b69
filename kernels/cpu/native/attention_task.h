/* What attention computes of a step: a task is rows that see the same keys, of one sequence or of several. */
#pragma once

#include "linear.h"
#include "parts.h"
#include "powers.h"

#define BLOCK_KEYS 128
#define SPAN_KEYS 2048 /* sums begin anew at its multiples, so that threads may share a sequence: a multiple of BLOCK_KEYS */
#define PLACES (TASK_TILES + 1) /* for sums of tiles: those of a task, and one of what follows what sequences share */
#define HIDDEN_SCORE (-1e30f)

struct workspace; /* what one thread needs */

/* What tasks are made of: rows of a sequence, or of several that have their first keys in common. */
struct item {
    int64_t sequence, head, heads, lanes, first_row, rows;
    const int64_t *members; /* or null */
    int64_t count, keys;    /* of members, and what they share */
    int64_t partial;        /* where its sums are left, from 1 on, if it has one span of the keys; or 0 */
    int64_t from, parts;    /* the first key of the span; how many items have the sequence's spans, if this is the first */
};

/* Weighted sums of the rows of a tile. */
struct sums {
    float *values;           /* (16, dim), not divided yet */
    float *largest, *total;  /* score so far, as a power of two; weights */
};

/* Up to TASK_TILES tiles: of one sequence and one KV head, or of several sequences, of one query each, as far as they have
 * the same keys; or one tile of one sequence and several heads. */
struct task {
    const struct attention *a;
    struct workspace *work;
    const struct item *item;
    int64_t number;         /* of the item */
    int side;               /* of what the workspace has twice */
    int64_t place;          /* of its first tile's sums */
    const int64_t *members; /* the sequences, if there are several; or null */
    int64_t kept;           /* the row, of several sequences', that sums begin with; or -1 */
    const int32_t *pages; /* of the sequence */
    int64_t length;       /* of its context */
    int64_t first_token;  /* in q and out */
    int64_t first_position;
    int64_t head, heads;     /* KV heads: the first one, and how many */
    int64_t lanes;           /* of a tile, that each head has */
    int64_t first_row, rows; /* of each head */
    int64_t begin, end;      /* the keys that the rows see; `begin` is that of a block */
    int64_t since;           /* the first key that is in the sums */
};

/* A tile and a block of keys. */
struct unit {
    const struct task *task;
    int64_t tile, from, count; /* of keys that are computed: a multiple of TILE_DEPTH */
    int first;                 /* tile of its block */
    int side;                  /* of the scores */
};

INLINE int64_t fewer(int64_t x, int64_t y) { return x < y ? x : y; }

INLINE int64_t tiles_of(const struct task *task) { return (task->rows + TILE_ROWS - 1) / TILE_ROWS; }

INLINE int64_t position_of(const struct task *task, int64_t row) {
    int64_t at = task->first_position + (int)(task->first_row + row) / (int)task->a->group;
    return task->a->causal && !task->members ? at : task->length - 1;
}

/* The row of its head that a lane has; if there is none, task->rows or more. */
INLINE int64_t row_of(const struct task *task, int64_t tile, int64_t lane) {
    return lane < task->heads * task->lanes ? tile * TILE_ROWS + lane % task->lanes : task->rows;
}

INLINE int64_t offset_of(const struct task *task, int64_t row, int64_t lane, int64_t stride) {
    int place = (int)(task->first_row + row), group = (int)task->a->group;
    int64_t head = (task->head + lane / task->lanes) * group + place % group, query = place / group;
    int64_t token = task->members ? task->a->starts[task->members[query]] : task->first_token + query;
    return token * stride + head * task->a->dim;
}

INLINE const bf16 *keys_of(const struct task *task, int64_t head) {
    return task->a->keys + (task->head + head) * task->a->head_stride;
}

INLINE const bf16 *values_of(const struct task *task, int64_t head) {
    return task->a->values + (task->head + head) * task->a->head_stride;
}

/* TILE_ROWS rows of a pool from a position on: where they lie, if they lie together, else a copy. Those behind what the
 * task sees are zeros. */
INLINE const bf16 *rows_of(const struct task *task, const bf16 *pool, int64_t from, bf16 *copy) {
    int64_t size = task->a->page_size, dim = task->a->dim, count = task->end - from;
    int64_t page = from / size, place = from % size;
    if (count >= TILE_ROWS) {
        int together = 1;
        for (int64_t next = 1, there = size - place; together && there < TILE_ROWS; next++, there += size)
            together = task->pages[page + next] == task->pages[page] + next;
        if (together)
            return pool + (task->pages[page] * size + place) * dim;
        count = TILE_ROWS;
    }
    count = count > 0 ? count : 0;
    for (int64_t at = 0; at < count; page++, place = 0) {
        int64_t some = size - place < count - at ? size - place : count - at;
        memcpy(copy + at * dim, pool + (task->pages[page] * size + place) * dim, (size_t)(some * dim) * 2);
        at += some;
    }
    memset(copy + count * dim, 0, (size_t)((TILE_ROWS - count) * dim) * 2);
    return copy;
}

/* Keys of a task's block, a multiple of TILE_DEPTH. */
INLINE int64_t block_keys(const struct task *task, int64_t from) {
    int64_t there = task->end - from;
    return there < BLOCK_KEYS ? round_up(there, TILE_DEPTH) : BLOCK_KEYS;
}

