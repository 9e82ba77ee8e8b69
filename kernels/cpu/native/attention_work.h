/* In which order attention is computed, on any instruction set.
 *
 * The rows of a sequence and a KV head are its queries times the query heads that share the head. 16 rows form a tile.
 * Each thread goes through its units, a tile and a block of keys each. Keys come in blocks that begin at multiples of
 * BLOCK_KEYS, and a row's sums depend on its own keys alone: the same bits whatever is computed beside it. (Flash
 * attention: Dao et al., arXiv 2205.14135.)
 *
 * Where there are fewer tasks than threads have time for, a task has a span of a sequence's keys. Sums of a span begin with
 * nothing, and those of all spans are joined in their order, whoever computed them: so they are the same bits as well.
 *
 * A file that includes this has defined before what it computes with: `struct workspace` with `sums`, `largest` and
 * `total`, of the present span and of `earlier` ones, MOST_HEADS, load_queries, find_keys and write_row; and behind it
 * attend_units.
 */
#pragma once

#include "attention_sums.h"

#define TASKS_OF_A_THREAD 4 /* with fewer, heads do not share tiles */
#define FEWEST_TASKS 2      /* of a thread; with fewer, spans are tasks */

struct attending {
    const struct attention *a;
    struct workspace *workspaces; /* by thread */
    struct item *items;
    int64_t count;
    int splits; /* items are spans where a sequence has several */
    int64_t partials;
    float *sums; /* of these */
    atomic_long next, joined;
};

/* One thread's way through its tasks: the present one and the next, and the one it most likely takes then. */
struct stream {
    struct attending *attending;
    struct workspace *work;
    int64_t threads;
    struct task tasks[2], later;
};

/* ---- items ---- */

/* KV heads whose rows share a tile, if each has so many. */
INLINE int64_t heads_together(const struct attention *a, int64_t rows) {
    int64_t heads = 1;
    while (2 * heads <= MOST_HEADS && rows * 2 * heads <= TILE_ROWS && 2 * heads * a->dim <= MOST_DIM &&
           heads < a->kv_heads && a->sequences * a->kv_heads >= 2 * heads * TASKS_OF_A_THREAD * a->threads)
        heads *= 2;
    return heads;
}

/* Lanes of a tile for rows of one head. */
INLINE int64_t lanes_for(int64_t rows) { return rows <= TILE_ROWS / 2 ? TILE_ROWS / 2 : TILE_ROWS; }

INLINE void add_item(struct attending *attending, struct item item) {
    if (attending->items)
        attending->items[attending->count] = item;
    attending->count++;
}

/* Where the block begins that has the first key which a position sees. */
INLINE int64_t first_key(const struct attention *a, int64_t position) {
    return a->window > 0 && position >= a->window ? (position - a->window + 1) / BLOCK_KEYS * BLOCK_KEYS : 0;
}

/* The items of a sequence of one tile and several spans; false: it is none. */
INLINE int list_spans(struct attending *attending, int64_t sequence, int64_t rows) {
    const struct attention *a = attending->a;
    int64_t length = a->lengths[sequence], begin = first_key(a, length - rows / a->group) / SPAN_KEYS * SPAN_KEYS;
    int64_t spans = (length - begin + SPAN_KEYS - 1) / SPAN_KEYS;
    if (rows > TILE_ROWS || spans < 2)
        return 0;
    for (int64_t head = 0; head < a->kv_heads; head++)
        for (int64_t span = 0; span < spans; span++) {
            struct item item = {.sequence = sequence, .head = head, .heads = 1, .lanes = lanes_for(rows), .rows = rows};
            item.from = begin + span * SPAN_KEYS;
            item.partial = ++attending->partials;
            item.parts = span ? 0 : spans;
            add_item(attending, item);
        }
    return 1;
}

/* The items of a sequence, those with the most keys first. */
INLINE void list_sequence(struct attending *attending, int64_t sequence) {
    const struct attention *a = attending->a;
    int64_t rows = (a->starts[sequence + 1] - a->starts[sequence]) * a->group, most = TASK_TILES * TILE_ROWS;
    if (rows && attending->splits && list_spans(attending, sequence, rows))
        return;
    int64_t together = heads_together(a, rows), first = rows > 0 ? (rows - 1) / most * most : -1;
    for (; first >= 0; first -= most)
        for (int64_t head = 0; head < a->kv_heads; head += together) {
            struct item item = {.sequence = sequence, .head = head, .first_row = first};
            item.heads = fewer(together, a->kv_heads - head);
            item.rows = fewer(rows - first, most);
            item.lanes = together > 1 ? TILE_ROWS / together : lanes_for(item.rows);
            add_item(attending, item);
        }
}

/* Those of sequences of one query that begin with the same keys, in parts as even as they can be. */
INLINE void list_members(struct attending *attending, const int64_t *members, int64_t count, int64_t keys) {
    const struct attention *a = attending->a;
    int64_t own = 0;
    for (int64_t member = 0; member < count; member++)
        own += a->lengths[members[member]] - keys;
    int64_t threads = (a->threads * count + a->sequences - 1) / a->sequences; /* the others have other sequences */
    int64_t parts = parts_for(count, a->group, a->kv_heads, keys, own, threads);
    for (int64_t member = 0; parts == count && member < count; member++)
        list_sequence(attending, members[member]);
    for (int64_t part = 0; parts < count && part < parts; part++)
        for (int64_t head = 0; head < a->kv_heads; head++) {
            int64_t begin = count * part / parts, end = count * (part + 1) / parts;
            struct item item = {.head = head, .heads = 1, .lanes = TILE_ROWS, .keys = keys};
            item.members = members + begin;
            item.count = end - begin;
            item.rows = item.count * a->group;
            add_item(attending, item);
        }
}

static void list_items(struct attending *attending) {
    const struct attention *a = attending->a;
    attending->count = attending->partials = 0;
    const int64_t *members = a->members;
    int can_share = a->window <= 0 && a->causal && a->group <= TILE_ROWS;
    for (int64_t group = 0; group < a->groups; group++) {
        int64_t count = a->sharing[2 * group], keys = a->sharing[2 * group + 1] / BLOCK_KEYS * BLOCK_KEYS;
        if (can_share && keys)
            list_members(attending, members, count, keys);
        for (int64_t member = 0; (!can_share || !keys) && member < count; member++)
            list_sequence(attending, members[member]);
        members += count;
    }
    for (int64_t sequence = a->sequences - 1; !a->groups && sequence >= 0; sequence--) /* long ones, prompts, come last */
        list_sequence(attending, sequence);
}

/* ---- tasks ---- */

/* Rows of a sequence. */
static struct task own_task(const struct attending *attending, const struct item *item, int64_t sequence) {
    const struct attention *a = attending->a;
    int64_t queries = a->starts[sequence + 1] - a->starts[sequence];
    struct task task = {
        .a = a,
        .item = item,
        .kept = -1,
        .pages = a->pages + a->page_starts[sequence],
        .length = a->lengths[sequence],
        .first_token = a->starts[sequence],
        .first_position = a->lengths[sequence] - queries,
        .head = item->head,
        .heads = item->heads,
        .lanes = item->lanes,
        .first_row = item->first_row,
        .rows = item->rows,
    };
    task.begin = first_key(a, position_of(&task, 0));
    task.end = position_of(&task, task.rows - 1) + 1;
    if (item->partial) {
        task.begin = task.begin > item->from ? task.begin : item->from;
        task.end = fewer(task.end, item->from + SPAN_KEYS);
    }
    task.since = task.begin;
    return task;
}

/* What all members of an item see. */
static struct task shared_task(const struct attending *attending, const struct item *item) {
    struct task task = own_task(attending, item, item->members[0]);
    task.members = item->members;
    task.length = task.end = item->keys;
    return task;
}

/* The rest of what member number `member` of an item sees. */
static struct task rest_task(const struct attending *attending, const struct item *item, int64_t member) {
    struct task task = own_task(attending, item, item->members[member]);
    task.rows = attending->a->group;
    task.lanes = lanes_for(task.rows);
    task.end = task.length;
    task.begin = item->keys;
    task.since = 0;
    task.place = TASK_TILES;
    task.kept = member * task.rows;
    return task;
}

/* The first task of item number `number`; its `a` is null behind the last one. */
static struct task first_task(const struct attending *attending, int64_t number) {
    if (number >= attending->count)
        return (struct task){0};
    const struct item *item = &attending->items[number];
    struct task task = item->members ? shared_task(attending, item) : own_task(attending, item, item->sequence);
    task.number = number;
    return task;
}

/* The task that follows one of the same item; its `a` is null behind the last one. */
static struct task following_task(const struct attending *attending, const struct task *task) {
    int64_t member = task->kept < 0 ? 0 : task->kept / task->a->group + 1;
    if (!task->item->members || member >= task->item->count)
        return (struct task){0};
    struct task following = rest_task(attending, task->item, member);
    following.number = task->number;
    return following;
}

/* Have the thread go on to the task behind `task`, or to its first one; null: there is none. */
static const struct task *take_task(struct stream *stream, const struct task *task) {
    const struct attending *attending = stream->attending;
    int side = task ? !task->side : 0;
    struct task *taken = &stream->tasks[side];
    *taken = task ? following_task(attending, task) : (struct task){0};
    if (!taken->a)
        *taken = first_task(attending, quartet_next(&stream->attending->next));
    if (!taken->a)
        return 0;
    taken->side = side;
    taken->work = stream->work;
    load_queries(taken);
    stream->later = following_task(attending, taken);
    if (!stream->later.a)
        stream->later = first_task(attending, taken->number + stream->threads);
    return taken;
}

/* ---- units, in the order in which they are computed ---- */

/* The first unit of a block, or of its tiles from `tile` on, whose rows see some of it; false: there is none. */
INLINE int find_unit(struct unit *unit, const struct task *task, int64_t from, int64_t tile) {
    int first = !tile;
    for (; tile < tiles_of(task); tile++) {
        int64_t end = (tile + 1) * TILE_ROWS, last = (end < task->rows ? end : task->rows) - 1;
        int64_t count = position_of(task, last) + 1 - from;
        if (count <= 0)
            continue;
        count = count < BLOCK_KEYS ? round_up(count, TILE_DEPTH) : BLOCK_KEYS;
        *unit = (struct unit){task, tile, from, count, first, !unit->side};
        return 1;
    }
    return 0;
}

/* The unit that follows, its queries and the places of its keys at hand; false: there is none. */
INLINE int next_unit(struct stream *stream, const struct unit *unit, struct unit *next) {
    const struct task *task = unit->task;
    next->side = unit->side;
    if (task && find_unit(next, task, unit->from, unit->tile + 1))
        return 1;
    if (task && unit->from + BLOCK_KEYS < task->end) {
        find_unit(next, task, unit->from + BLOCK_KEYS, 0);
    } else {
        const struct task *taken = take_task(stream, task);
        if (!taken)
            return 0;
        find_unit(next, taken, taken->begin, 0);
    }
    find_keys(next->task, next->from);
    return 1;
}

/* Ask for TILE_DEPTH keys and values from a position on that are needed soon. */
INLINE void ask_for(const struct task *task, int64_t from) {
    const struct attention *a = task->a;
    int64_t end = from + TILE_DEPTH < task->end ? from + TILE_DEPTH : task->end;
    while (from < end) {
        int64_t place = from % a->page_size, some = a->page_size - place;
        some = some < end - from ? some : end - from;
        int64_t first = (task->pages[from / a->page_size] * a->page_size + place) * a->dim;
        for (int64_t head = 0; head < task->heads; head++) {
            const char *keys = (const char *)(keys_of(task, head) + first);
            const char *values = (const char *)(values_of(task, head) + first);
            for (int64_t byte = 0; byte < some * a->dim * 2; byte += CACHE_LINE) {
                _mm_prefetch(keys + byte, _MM_HINT_T1);
                _mm_prefetch(values + byte, _MM_HINT_T1);
            }
        }
        from += some;
    }
}

/* Ask for a part of the block behind the one of `next`. */
INLINE void ask_behind(const struct stream *stream, const struct unit *next, int64_t part) {
    if (next->from + BLOCK_KEYS < next->task->end)
        ask_for(next->task, next->from + BLOCK_KEYS + part);
    else if (stream->later.a)
        ask_for(&stream->later, stream->later.begin + part);
}

/* ---- results ---- */

/* The sums of an item that has one span. */
INLINE struct sums partial_sums(const struct attending *attending, int64_t partial) {
    int64_t dim = attending->a->dim;
    float *sums = attending->sums + (partial - 1) * TILE_ROWS * (dim + 2);
    return (struct sums){sums + 2 * TILE_ROWS, sums, sums + TILE_ROWS};
}

/* What a task whose keys have all been added leaves. */
OUTLINE void end_task(const struct attending *attending, const struct task *task) {
    int64_t dim = task->a->dim;
    if (task->item->partial)
        copy_sums(partial_sums(attending, task->item->partial), present_sums(task->work, 0, dim), 0, TILE_ROWS, dim);
    for (int64_t tile = 0; tile < tiles_of(task) && !task->item->partial && !task->members; tile++) {
        struct sums sums = present_sums(task->work, task->place + tile, dim);
        if (has_earlier(task)) {
            join_sums(earlier_sums(task->work, task->place + tile, dim), sums, dim);
            sums = earlier_sums(task->work, task->place + tile, dim);
        }
        write_sums(task, tile, sums);
    }
}

/* ---- all ---- */

static void attend_units(struct stream *stream);

/* Join the spans of sequences. */
static void join_items(struct attending *attending) {
    int64_t number;
    while ((number = quartet_next(&attending->joined)) < attending->count) {
        const struct item *item = &attending->items[number];
        for (int64_t part = 1; part < item->parts; part++)
            join_sums(partial_sums(attending, item->partial), partial_sums(attending, item->partial + part),
                      attending->a->dim);
        if (item->parts) {
            struct task task = own_task(attending, item, item->sequence);
            write_sums(&task, 0, partial_sums(attending, item->partial));
        }
    }
}

static void attend(void *argument, int thread, int threads) {
    struct attending *attending = argument;
    struct stream stream = {.attending = attending, .work = attending->workspaces + thread, .threads = threads};
    attend_units(&stream);
    if (!attending->partials)
        return;
    quartet_barrier(threads);
    join_items(attending);
}

static int attention(const struct attention *a) {
    int threads = a->threads < MOST_THREADS ? a->threads : MOST_THREADS;
    struct attending attending = {.a = a};
    list_items(&attending); /* counts them */
    attending.splits = threads > 1 && attending.count < FEWEST_TASKS * threads;
    if (attending.splits)
        list_items(&attending);
    attending.items = quartet_scratch(2, (attending.count + 1) * (int64_t)sizeof(struct item));
    attending.workspaces = quartet_scratch(3, threads * (int64_t)sizeof(struct workspace));
    attending.sums = quartet_scratch(9, (attending.partials * (a->dim + 2) + 1) * TILE_ROWS * 4);
    if (!attending.items || !attending.workspaces || !attending.sums)
        return -1;
    list_items(&attending);
    quartet_run(attend, &attending, threads);
    return 0;
}
