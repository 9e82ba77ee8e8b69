/* Weighted sums of a task's rows, span by span of their keys, and their way out. */
#pragma once

#include "attention_task.h"

INLINE struct sums present_sums(struct workspace *work, int64_t place, int64_t dim) {
    return (struct sums){work->sums + place * TILE_ROWS * dim, work->largest[place], work->total[place]};
}

INLINE struct sums earlier_sums(struct workspace *work, int64_t place, int64_t dim) {
    float *values = work->earlier_sums + place * TILE_ROWS * dim;
    return (struct sums){values, work->earlier_largest[place], work->earlier_total[place]};
}

OUTLINE void clear_sums(struct sums sums, int64_t dim) {
    memset(sums.values, 0, (size_t)(TILE_ROWS * dim) * 4);
    vec_store(sums.largest, vec_set(HIDDEN_SCORE));
    vec_store(sums.total, vec_set(0.0f));
}

/* The sums of `rows` rows from one on in place of those of the first ones of a tile. */
OUTLINE void copy_sums(struct sums to, struct sums from, int64_t row, int64_t rows, int64_t dim) {
    memcpy(to.values, from.values + row * dim, (size_t)(rows * dim) * 4);
    memcpy(to.largest, from.largest + row, (size_t)rows * 4);
    memcpy(to.total, from.total + row, (size_t)rows * 4);
}

/* Sums of a span added to those of the spans before. */
OUTLINE void join_sums(struct sums sums, struct sums more, int64_t dim) {
    vec before = vec_load(sums.largest), now = vec_load(more.largest), largest = vec_max(before, now);
    vec shrink = power_of_two(vec_sub(before, largest)), share = power_of_two(vec_sub(now, largest));
    float shrinks[TILE_ROWS], shares[TILE_ROWS];
    vec_store(shrinks, shrink);
    vec_store(shares, share);
    vec_store(sums.largest, largest);
    vec_store(sums.total, vec_fma(vec_load(sums.total), shrink, vec_mul(vec_load(more.total), share)));
    for (int64_t row = 0; row < TILE_ROWS; row++)
        for (int64_t at = row * dim; at < (row + 1) * dim; at += LANES) {
            vec added = vec_mul(vec_load(more.values + at), vec_set(shares[row]));
            vec_store(sums.values + at, vec_fma(vec_load(sums.values + at), vec_set(shrinks[row]), added));
        }
}

/* Whether some of a task's sums are of spans before that of its last key. */
INLINE int has_earlier(const struct task *task) { return task->since / SPAN_KEYS < (task->end - 1) / SPAN_KEYS; }

/* A task's sums: nothing yet, or what they were where the keys end that several sequences share. */
OUTLINE void begin_sums(const struct task *task) {
    struct workspace *work = task->work;
    int64_t dim = task->a->dim;
    for (int64_t place = task->place; place < task->place + tiles_of(task); place++) {
        clear_sums(present_sums(work, place, dim), dim);
        if (has_earlier(task))
            clear_sums(earlier_sums(work, place, dim), dim);
    }
    if (task->kept < 0)
        return;
    copy_sums(present_sums(work, task->place, dim), present_sums(work, 0, dim), task->kept, task->rows, dim);
    if (task->begin > SPAN_KEYS)
        copy_sums(earlier_sums(work, task->place, dim), earlier_sums(work, 0, dim), task->kept, task->rows, dim);
}

/* What a unit's sums need before anything is added to them. */
INLINE void prepare_sums(const struct unit *unit) {
    const struct task *task = unit->task;
    int64_t place = task->place + unit->tile, dim = task->a->dim;
    if (unit->first && unit->from == task->begin)
        begin_sums(task);
    if (unit->from % SPAN_KEYS == 0 && unit->from > task->since) {
        join_sums(earlier_sums(task->work, place, dim), present_sums(task->work, place, dim), dim);
        clear_sums(present_sums(task->work, place, dim), dim);
    }
}

static void write_sums(const struct task *task, int64_t tile, struct sums sums) {
    for (int64_t lane = 0; lane < TILE_ROWS; lane++) {
        int64_t row = row_of(task, tile, lane), dim = task->a->dim;
        if (row < task->rows)
            write_row(sums.values + lane * dim, sums.total[lane], dim,
                      task->a->out + offset_of(task, row, lane, task->a->out_stride));
    }
}
