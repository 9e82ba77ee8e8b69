/* Attention over a paged pool of keys and values, bfloat16, with AMX.
 *
 * Where rows are few, as when one token is computed, rows of several KV heads share a tile. The tiles score the next unit
 * while vectors weigh the present one.
 */
#pragma once

#include "attention_tiles.h"

#include "attention_work.h"

/* Weights of a unit, and what was summed so far scaled to the new largest score. On the way `next`, if there is one, is
 * scored. */
INLINE void weigh(const struct stream *stream, const struct unit *unit, const struct unit *next, int hides, vec scale) {
    struct workspace *work = stream->work;
    int64_t place = unit->task->place + unit->tile, scored = 0;
    vec before = vec_load(work->largest[place]);
    vec largest = vec_max(largest_score(unit, hides, scale), before);
    vec shrink = power_of_two(vec_sub(before, largest));
    vec total = vec_mul(vec_load(work->total[place]), shrink);
    for (int64_t part = 0; part < unit->count; part += TILE_DEPTH) {
        if (next && scored < next->count) {
            score(next, scored);
            scored += TILE_DEPTH;
        }
        if (next && unit->first)
            ask_behind(stream, next, part);
        total = vec_add(total, weigh_keys(unit, part, hides, scale, largest));
    }
    for (; next && scored < next->count; scored += TILE_DEPTH)
        score(next, scored);
    for (int64_t part = unit->count; next && unit->first && part < BLOCK_KEYS; part += TILE_DEPTH)
        ask_behind(stream, next, part);
    vec_store(work->largest[place], largest);
    vec_store(work->total[place], total);
    shrink_sums(work, place, unit->task->a->dim, shrink);
}

/* What is left of a unit that is scored; `next`, or null, is scored on the way. */
INLINE void finish(const struct stream *stream, const struct unit *unit, const struct unit *next) {
    const struct task *task = unit->task;
    const struct attention *a = task->a;
    vec scale = vec_set(a->softcap > 0.0f ? LOG2_E : a->scale * LOG2_E);
    prepare_sums(unit);
    if (unit->first) /* before anything is weighed, since tiles are slow to read what was just written */
        pair_values(task, unit->from);
    if (a->softcap > 0.0f)
        cap_scores(unit);
    if (a->window > 0 || position_of(task, unit->tile * TILE_ROWS) < unit->from + unit->count - 1)
        weigh(stream, unit, next, 1, scale);
    else
        weigh(stream, unit, next, 0, scale);
    add_values(unit);
    if (!next || next->task != task)
        end_task(stream->attending, task);
}

static void attend_units(struct stream *stream) {
    struct unit unit = {0}, next;
    stream->work->lanes = 0;
    if (!next_unit(stream, &unit, &unit))
        return;
    configure_tiles(stream->work, (int)unit.task->lanes);
    for (int64_t part = 0; part < unit.count; part += TILE_DEPTH)
        score(&unit, part);
    while (next_unit(stream, &unit, &next)) {
        finish(stream, &unit, &next);
        unit = next;
    }
    finish(stream, &unit, 0);
    tiles_end();
}
