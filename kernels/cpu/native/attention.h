/* Attention over a paged pool of keys and values, bfloat16, with AMX.
 *
 * The rows of a sequence and a KV head are its queries times the query heads that share the head. 16 rows form a tile:
 * scores are computed as (keys, 16 rows), so that a vector holds one key's score for each row, and keys need no other
 * layout than the pool's. Weights are transposed once to be multiplied with the values, (16 rows, dim).
 *
 * Keys come in blocks that begin at multiples of BLOCK_KEYS, and a row's sums depend on its own keys alone: the same
 * bits whatever is computed beside it. (Flash attention: Dao et al., arXiv 2205.14135.)
 */
#pragma once

#include "linear.h"

#define BLOCK_KEYS 128
#define TILE_ROWS 16
#define TASK_TILES 16 /* tiles that share the reading of keys and values */
#define HIDDEN_SCORE (-1e30f)

/* What one thread needs; the sizes are those of the widest head. */
struct workspace {
    bf16 queries[TASK_TILES * TILE_ROWS * MOST_DIM]; /* by tile: (dim / 2, 16, 2) */
    float sums[TASK_TILES * TILE_ROWS * MOST_DIM];   /* by tile: weighted values (16, dim), not divided yet */
    float largest[TASK_TILES][TILE_ROWS], total[TASK_TILES][TILE_ROWS];
    bf16 keys[BLOCK_KEYS * MOST_DIM], values[BLOCK_KEYS * MOST_DIM]; /* copies where they do not lie together */
    bf16 paired[BLOCK_KEYS * MOST_DIM];                              /* values as (keys / 2, dim, 2) */
    float scores[BLOCK_KEYS][TILE_ROWS];
    bf16 weights[BLOCK_KEYS / TILE_DEPTH][TILE_ROWS][TILE_DEPTH];
} __attribute__((aligned(CACHE_LINE)));

/* Up to TASK_TILES tiles of one sequence and one KV head. */
struct task {
    const struct attention *a;
    struct workspace *work;
    const int32_t *pages; /* of the sequence */
    int64_t length;       /* of its context */
    int64_t first_token;  /* in q and out */
    int64_t first_position;
    int64_t head;         /* KV head */
    int64_t first_row, rows;
    const struct task *next; /* that probably follows on this thread, or null */
};

INLINE int64_t position_of(const struct task *task, int64_t row) {
    int64_t at = task->first_position + (task->first_row + row) / task->a->group;
    return task->a->causal ? at : task->length - 1;
}

INLINE int64_t offset_of(const struct task *task, int64_t row, int64_t stride) {
    int64_t place = task->first_row + row, group = task->a->group;
    return (task->first_token + place / group) * stride + (task->head * group + place % group) * task->a->dim;
}

/* A 16 x 16 matrix of words transposed. */
INLINE void transpose_words(__m512i rows[16], bf16 *out) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(out + (i + 0) * TILE_DEPTH, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(out + (i + 4) * TILE_DEPTH, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
        _mm512_storeu_si512(out + (i + 8) * TILE_DEPTH, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD));
        _mm512_storeu_si512(out + (i + 12) * TILE_DEPTH, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD));
    }
}

INLINE void begin_task(const struct task *task) {
    struct workspace *work = task->work;
    int64_t dim = task->a->dim, tiles = (task->rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t tile = 0; tile < tiles; tile++) {
        memset(work->sums + tile * TILE_ROWS * dim, 0, (size_t)(TILE_ROWS * dim) * 4);
        vec_store(work->largest[tile], vec_set(HIDDEN_SCORE));
        vec_store(work->total[tile], vec_set(0.0f));
        for (int64_t d = 0; d < dim; d += TILE_DEPTH) {
            __m512i rows[TILE_ROWS];
            for (int64_t lane = 0; lane < TILE_ROWS; lane++) {
                int64_t row = tile * TILE_ROWS + lane;
                rows[lane] = _mm512_setzero_si512();
                if (row < task->rows)
                    rows[lane] = _mm512_loadu_si512(task->a->q + offset_of(task, row, task->a->q_stride) + d);
            }
            transpose_words(rows, work->queries + (tile * dim + d) * TILE_ROWS);
        }
    }
}

INLINE const bf16 *keys_of(const struct task *task) { return task->a->keys + task->head * task->a->head_stride; }

INLINE const bf16 *values_of(const struct task *task) { return task->a->values + task->head * task->a->head_stride; }

/* Where the keys begin that the task's rows see, at the beginning of a block. */
INLINE int64_t begin_of(const struct task *task) {
    int64_t window = task->a->window, first = position_of(task, 0);
    return window > 0 && first >= window ? (first - window + 1) / BLOCK_KEYS * BLOCK_KEYS : 0;
}

INLINE int64_t end_of(const struct task *task) { return position_of(task, task->rows - 1) + 1; }

/* Ask for keys or values that are needed soon, TILE_DEPTH of them from a multiple of TILE_DEPTH on. */
INLINE void ask_for(const struct task *task, const bf16 *pool, int64_t from) {
    const struct attention *a = task->a;
    int64_t end = from + TILE_DEPTH < task->length ? from + TILE_DEPTH : task->length;
    while (from < end) {
        int64_t place = from % a->page_size, some = a->page_size - place;
        if (some > end - from)
            some = end - from;
        const char *first = (const char *)(pool + (task->pages[from / a->page_size] * a->page_size + place) * a->dim);
        for (int64_t byte = 0; byte < some * a->dim * 2; byte += CACHE_LINE)
            _mm_prefetch(first + byte, _MM_HINT_T0);
        from += some;
    }
}

/* Rows of a pool at some positions: in the pool if they are neighbours, else a copy, with zeros behind the end. */
INLINE const bf16 *rows_of(const struct task *task, const bf16 *pool, int64_t from, int64_t count, bf16 *copy) {
    const struct attention *a = task->a;
    int64_t size = a->page_size, dim = a->dim, first = task->pages[from / size] * size + from % size;
    int together = count % TILE_DEPTH == 0;
    for (int64_t page = from / size; together && page <= (from + count - 1) / size; page++)
        together = task->pages[page] == task->pages[from / size] + page - from / size;
    if (together)
        return pool + first * dim;
    for (int64_t at = 0; at < count;) {
        int64_t position = from + at, some = size - position % size;
        if (some > count - at)
            some = count - at;
        memcpy(copy + at * dim, pool + (task->pages[position / size] * size + position % size) * dim,
               (size_t)(some * dim) * 2);
        at += some;
    }
    int64_t end = round_up(count, TILE_DEPTH);
    memset(copy + count * dim, 0, (size_t)((end - count) * dim) * 2);
    return copy;
}

/* values (keys, dim) → (keys / 2, dim, 2), as the second factor of a product of tiles is read; of 32 columns first 0 to 3,
 * 8 to 11 and so on, then the others, as unpacking gives them (`end_task` puts them in order). */
INLINE void pair_values(const bf16 *values, int64_t count, int64_t dim, bf16 *out) {
    for (int64_t key = 0; key < count; key += 2)
        for (int64_t d = 0; d < dim; d += TILE_DEPTH) {
            __m512i even = _mm512_loadu_si512(values + key * dim + d);
            __m512i odd = _mm512_loadu_si512(values + (key + 1) * dim + d);
            _mm512_storeu_si512(out + key * dim + 2 * d, _mm512_unpacklo_epi16(even, odd));
            _mm512_storeu_si512(out + key * dim + 2 * d + 2 * LANES, _mm512_unpackhi_epi16(even, odd));
        }
}

/* scores (count, 16) = keys @ queries; the first tile asks for the values that follow. */
INLINE void score(const struct task *task, int64_t tile, const bf16 *keys, int64_t from, int64_t count) {
    struct workspace *work = task->work;
    int64_t dim = task->a->dim;
    for (int64_t key = 0; key < count; key += 2 * TILE_ROWS) {
        if (!tile)
            ask_for(task, values_of(task), from + key);
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t d = 0; d < dim; d += TILE_DEPTH) {
            _tile_loadd(4, keys + key * dim + d, dim * 2);
            _tile_loadd(5, keys + (key + TILE_ROWS) * dim + d, dim * 2);
            _tile_loadd(6, work->queries + (tile * dim + d) * TILE_ROWS, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, work->scores[key], 64);
        _tile_stored(1, work->scores[key + TILE_ROWS], 64);
    }
}

/* Scale, cap and hide scores in place; returns each row's largest. */
INLINE vec adjust_scores(const struct task *task, int64_t tile, int64_t from, int64_t count, __mmask16 *seen) {
    const struct attention *a = task->a;
    struct workspace *work = task->work;
    int32_t positions[LANES];
    int hides = a->window > 0;
    for (int lane = 0; lane < LANES; lane++) {
        int64_t row = tile * TILE_ROWS + lane;
        positions[lane] = (int32_t)position_of(task, row < task->rows ? row : task->rows - 1);
        hides |= positions[lane] < from + count - 1;
    }
    __m512i last = _mm512_loadu_si512(positions);
    __m512i first = _mm512_sub_epi32(last, _mm512_set1_epi32(a->window > 0 ? (int32_t)a->window - 1 : INT32_MAX));
    vec scale = vec_set(a->scale), largest = vec_set(HIDDEN_SCORE);
    for (int64_t key = 0; key < count; key++) {
        vec s = vec_mul(vec_load(work->scores[key]), scale);
        if (a->softcap > 0.0f) {
            vec half = vec_sigmoid(vec_mul(s, vec_set(2.0f / a->softcap))); /* tanh x = 2 sigmoid(2 x) - 1 */
            s = vec_mul(vec_set(a->softcap), vec_fma(half, vec_set(2.0f), vec_set(-1.0f)));
        }
        seen[key] = 0xFFFF;
        if (hides) {
            __m512i at = _mm512_set1_epi32((int32_t)(from + key));
            seen[key] = _mm512_cmple_epi32_mask(at, last) & _mm512_cmpge_epi32_mask(at, first);
            s = _mm512_mask_mov_ps(vec_set(HIDDEN_SCORE), seen[key], s);
        }
        vec_store(work->scores[key], s);
        largest = vec_max(s, largest);
    }
    return largest;
}

/* Ask for keys of the block behind `from`, or of the next task. */
INLINE void ask_for_next(const struct task *task, int64_t from, int64_t part) {
    if (from + BLOCK_KEYS < end_of(task))
        ask_for(task, keys_of(task), from + BLOCK_KEYS + part);
    else if (task->next)
        ask_for(task->next, keys_of(task->next), begin_of(task->next) + part);
}

/* Weights e^(score - largest) as (16 rows, keys), what was summed so far scaled to the new largest. The first tile asks
 * for the keys that follow. */
INLINE void weigh(const struct task *task, int64_t tile, int64_t from, int64_t count) {
    struct workspace *work = task->work;
    int64_t dim = task->a->dim;
    __mmask16 seen[BLOCK_KEYS];
    vec before = vec_load(work->largest[tile]);
    vec largest = vec_max(adjust_scores(task, tile, from, count, seen), before);
    vec shrink = vec_exp(vec_sub(before, largest));
    vec total = vec_mul(vec_load(work->total[tile]), shrink);
    for (int64_t part = 0; part < count; part += TILE_DEPTH) {
        __m512i rows[16];
        if (!tile)
            ask_for_next(task, from, part);
        for (int pair = 0; pair < 16; pair++) {
            vec weight[2];
            for (int one = 0; one < 2; one++) {
                int64_t key = part + 2 * pair + one;
                weight[one] = vec_exp(vec_sub(vec_load(work->scores[key]), largest));
                weight[one] = _mm512_maskz_mov_ps(seen[key], weight[one]);
                total = vec_add(total, weight[one]);
            }
            __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(weight[0]));
            __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(weight[1]));
            rows[pair] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
        }
        transpose_words(rows, (bf16 *)work->weights[part / TILE_DEPTH]);
    }
    vec_store(work->largest[tile], largest);
    vec_store(work->total[tile], total);
    if (_mm512_cmp_ps_mask(shrink, vec_set(1.0f), _CMP_NEQ_UQ) == 0)
        return;
    float by[LANES], *sums = work->sums + tile * TILE_ROWS * dim;
    vec_store(by, shrink);
    for (int row = 0; row < TILE_ROWS; row++)
        for (int64_t d = row * dim; d < (row + 1) * dim; d += LANES)
            vec_store(sums + d, vec_mul(vec_load(sums + d), vec_set(by[row])));
}

/* sums (16, dim) += weights (16, keys) @ values (keys, dim). */
INLINE void add_values(struct workspace *work, int64_t tile, int64_t count, int64_t dim) {
    const bf16 *values = work->paired;
    for (int64_t d = 0; d < dim; d += 2 * LANES) {
        float *sums = work->sums + tile * TILE_ROWS * dim + d;
        _tile_loadd(0, sums, dim * 4);
        _tile_loadd(1, sums + LANES, dim * 4);
        for (int64_t key = 0; key < count; key += TILE_DEPTH) {
            _tile_loadd(4, work->weights[key / TILE_DEPTH], 64);
            _tile_loadd(6, values + key * dim + 2 * d, dim * 4);
            _tile_loadd(7, values + key * dim + 2 * (d + LANES), dim * 4);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, sums, dim * 4);
        _tile_stored(1, sums + LANES, dim * 4);
    }
}

INLINE void end_task(const struct task *task) {
    struct workspace *work = task->work;
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t row = 0; row < task->rows; row++) {
        int64_t tile = row / TILE_ROWS, lane = row % TILE_ROWS;
        vec share = vec_set(1.0f / work->total[tile][lane]);
        bf16 *out = task->a->out + offset_of(task, row, task->a->out_stride);
        for (int64_t d = 0; d < task->a->dim; d += TILE_DEPTH) {
            const float *sums = work->sums + row * task->a->dim + d; /* in the order of `pair_values` */
            vec low = vec_mul(vec_load(sums), share), high = vec_mul(vec_load(sums + LANES), share);
            vec_store_bf16(out + d, _mm512_permutex2var_ps(low, first, high));
            vec_store_bf16(out + d + LANES, _mm512_permutex2var_ps(low, second, high));
        }
    }
}

static void run_task(const struct task *task) {
    const struct attention *a = task->a;
    struct workspace *work = task->work;
    int64_t end = end_of(task);
    begin_task(task);
    for (int64_t from = begin_of(task); from < end; from += BLOCK_KEYS) {
        int64_t there = end - from < BLOCK_KEYS ? end - from : BLOCK_KEYS;
        const bf16 *keys = rows_of(task, keys_of(task), from, there, work->keys), *values = 0;
        for (int64_t tile = 0; tile * TILE_ROWS < task->rows; tile++) {
            int64_t last = (tile + 1) * TILE_ROWS < task->rows ? (tile + 1) * TILE_ROWS : task->rows;
            int64_t count = position_of(task, last - 1) + 1 - from;
            if (count <= 0)
                continue;
            count = round_up(count < there ? count : there, TILE_DEPTH);
            score(task, tile, keys, from, count);
            if (!values) { /* here, since tiles are slow to read what was just written */
                values = rows_of(task, values_of(task), from, there, work->values);
                pair_values(values, round_up(there, TILE_DEPTH), a->dim, work->paired);
            }
            weigh(task, tile, from, count);
            add_values(work, tile, count, a->dim);
        }
    }
    end_task(task);
}

struct attending {
    const struct attention *a;
    struct workspace *workspaces;     /* by thread */
    const int64_t *tasks;   /* (sequences + 1,): tasks of one KV head before each sequence */
    atomic_long next;
};

/* Task number `number`; its `a` is null behind the last one. */
static struct task task_of(const struct attending *attending, int64_t number, int thread) {
    const struct attention *a = attending->a;
    const int64_t *tasks = attending->tasks, per_task = TASK_TILES * TILE_ROWS;
    if (number >= tasks[a->sequences] * a->kv_heads)
        return (struct task){0};
    int64_t place = tasks[a->sequences] - 1 - number / a->kv_heads; /* last rows see the most keys: first */
    int64_t low = 0, high = a->sequences - 1;
    while (low < high) { /* the last sequence that begins at `place` or before */
        int64_t middle = (low + high + 1) / 2;
        if (tasks[middle] <= place)
            low = middle;
        else
            high = middle - 1;
    }
    int64_t queries = a->starts[low + 1] - a->starts[low], first = (place - tasks[low]) * per_task;
    int64_t rows = queries * a->group - first;
    return (struct task){
        .a = a,
        .work = attending->workspaces + thread,
        .pages = a->pages + a->page_starts[low],
        .length = a->lengths[low],
        .first_token = a->starts[low],
        .first_position = a->lengths[low] - queries,
        .head = number % a->kv_heads,
        .first_row = first,
        .rows = rows < per_task ? rows : per_task,
    };
}

static void attend(void *argument, int thread, int threads) {
    struct attending *attending = argument;
    int64_t number;
    tiles_begin(TILE_ROWS);
    for (;;) {
        number = quartet_next(&attending->next);
        struct task task = task_of(attending, number, thread), next = task_of(attending, number + threads, thread);
        if (!task.a)
            break;
        task.next = next.a ? &next : 0;
        run_task(&task);
    }
    tiles_end();
}

static int attention(const struct attention *a) {
    int threads = a->threads < MOST_THREADS ? a->threads : MOST_THREADS;
    int64_t *tasks = quartet_scratch(2, (a->sequences + 1) * (int64_t)sizeof(int64_t));
    struct workspace *workspaces = quartet_scratch(3, threads * (int64_t)sizeof(struct workspace));
    if (!tasks || !workspaces)
        return -1;
    tasks[0] = 0;
    for (int64_t i = 0; i < a->sequences; i++) {
        int64_t rows = (a->starts[i + 1] - a->starts[i]) * a->group;
        tasks[i + 1] = tasks[i] + (rows + TASK_TILES * TILE_ROWS - 1) / (TASK_TILES * TILE_ROWS);
    }
    struct attending attending = {.a = a, .workspaces = workspaces, .tasks = tasks};
    quartet_run(attend, &attending, threads);
    return 0;
}
