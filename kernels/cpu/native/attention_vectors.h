/* Attention over a paged pool of keys and values, bfloat16, without AMX.
 *
 * Keys of a block are transposed once for all rows that see them, so that a vector has 16 keys' numbers: a row's scores are
 * sums of these, times single numbers of its query, in float; where there is VDPBF16PS, pairs of both, as they are. Values
 * stay as they are: a vector has numbers of one value, which are weighed by one number, or pairs of two values' numbers,
 * with weights in bfloat16, as with AMX. A few rows at a time keep their sums in registers. Scores and sums are float.
 */
#pragma once

#include "attention_task.h"
#include "transpose.h"

#define MOST_HEADS 1 /* no tile has rows of several */
#ifdef __AVX512F__
#define ROWS_AT_ONCE 8
#define PANELS_FOR(rows) ((rows) <= 2 ? 4 : 2) /* of 16 keys that are scored at once */
#define VALUE_VECTORS 2                        /* that are weighed at once */
#else
#define ROWS_AT_ONCE 6
#define PANELS_FOR(rows) ((rows) <= 2 ? 2 : 1)
#define VALUE_VECTORS 1
#endif
#define MOST_PANELS 4
#define VALUE_COLUMNS (VALUE_VECTORS * LANES)

/* What one thread needs; the sizes are those of the widest head. */
struct workspace {
    factor queries[TASK_TILES * TILE_ROWS * MOST_DIM]; /* (rows, dim); scaled if they are float, else scores will be */
    float sums[PLACES * TILE_ROWS * MOST_DIM];         /* by tile: weighted values (16, dim), not divided yet */
    float largest[PLACES][TILE_ROWS];                  /* score so far, as a power of two */
    float total[PLACES][TILE_ROWS];
    factor keys[BLOCK_KEYS * MOST_DIM];                /* (keys / 16, dim, 16), or in pairs: (keys / 16, dim / 2, 16, 2) */
    const bf16 *value_rows[BLOCK_KEYS / TILE_ROWS];    /* where 16 values of the block begin */
    bf16 copied[TILE_ROWS * MOST_DIM], values[BLOCK_KEYS * MOST_DIM]; /* where they do not lie together */
    float scores[TILE_ROWS][BLOCK_KEYS];               /* of a unit */
    factor weights[TILE_ROWS][BLOCK_KEYS];             /* made of them */
    float shrink[TILE_ROWS];                           /* what sums so far are multiplied with */
    float earlier_sums[PLACES * TILE_ROWS * MOST_DIM]; /* of spans before */
    float earlier_largest[PLACES][TILE_ROWS], earlier_total[PLACES][TILE_ROWS];
} __attribute__((aligned(CACHE_LINE)));

/* With it scores are powers of two, or are in units of the cap. */
INLINE vec scale_of_scores(const struct attention *a) {
    return vec_set(a->softcap > 0.0f ? a->scale / a->softcap : a->scale * LOG2_E);
}

/* Queries on their way in; those in float are scaled. */
INLINE void load_queries(const struct task *task) {
    const struct attention *a = task->a;
    factor *to = task->work->queries;
    for (int64_t row = 0; row < task->rows; row++) {
        const bf16 *from = a->q + offset_of(task, row, 0, a->q_stride);
        for (int64_t d = 0; d < a->dim; d += LANES, to += LANES)
#ifdef PAIRS
            memcpy(to, from + d, LANES * 2);
#else
            vec_store(to, vec_mul(vec_load_bf16(from + d), scale_of_scores(a)));
#endif
    }
}

INLINE void find_keys(const struct task *task, int64_t from) {
    struct workspace *work = task->work;
    int64_t dim = task->a->dim;
    for (int64_t key = 0; key < block_keys(task, from); key += TILE_ROWS) {
        const bf16 *keys = rows_of(task, keys_of(task, 0), from + key, work->copied);
        for (int64_t d = 0; d < dim; d += TILE_DEPTH)
            spread_rows(keys + d, dim, work->keys + (key * dim + d * LANES));
        bf16 *copy = work->values + key * dim;
        work->value_rows[key / TILE_ROWS] = rows_of(task, values_of(task, 0), from + key, copy);
    }
}

/* A row's sums, divided, on their way out. */
INLINE void write_row(const float *sums, float total, int64_t dim, bf16 *out) {
    vec share = vec_set(1.0f / total);
    for (int64_t d = 0; d < dim; d += VALUE_COLUMNS) {
#ifdef __AVX512F__
        vec_store_pairs(out + d, vec_mul(vec_load(sums + d), share), vec_mul(vec_load(sums + d + LANES), share));
#else
        vec x = vec_mul(vec_load(sums + d), share);
        __m256i words = _mm256_or_si256(rounded_bf16(x.low), _mm256_slli_epi32(rounded_bf16(x.high), 16));
        _mm256_storeu_si256((__m256i *)(out + d), words);
#endif
    }
}

#include "attention_work.h"

/* ---- a few rows ---- */

/* Scores of `rows` rows and 16 * `panels` keys. */
INLINE void score_few(int rows, int panels, const struct attention *a, const factor *queries, const factor *keys,
                      float *scores) {
    int64_t dim = a->dim;
    vec sum[ROWS_AT_ONCE][MOST_PANELS];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int panel = 0; panel < panels; panel++)
            sum[row][panel] = vec_set(0.0f);
#ifdef PAIRS
    for (int64_t d = 0; d < dim; d += 2) {
        __m512bh key[MOST_PANELS];
#pragma GCC unroll 4
        for (int panel = 0; panel < panels; panel++)
            key[panel] = (__m512bh)_mm512_loadu_si512(keys + (panel * dim + d) * LANES);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            int32_t pair;
            memcpy(&pair, queries + row * dim + d, 4);
            __m512bh query = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int panel = 0; panel < panels; panel++)
                sum[row][panel] = _mm512_dpbf16_ps(sum[row][panel], query, key[panel]);
        }
    }
#else
    for (int64_t d = 0; d < dim; d++) {
        vec key[MOST_PANELS];
#pragma GCC unroll 4
        for (int panel = 0; panel < panels; panel++)
            key[panel] = vec_load(keys + (panel * dim + d) * LANES);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            vec query = vec_set(queries[row * dim + d]);
#pragma GCC unroll 4
            for (int panel = 0; panel < panels; panel++)
                sum[row][panel] = vec_fma(query, key[panel], sum[row][panel]);
        }
    }
#endif
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int panel = 0; panel < panels; panel++) {
#ifdef PAIRS
            sum[row][panel] = vec_mul(sum[row][panel], scale_of_scores(a));
#endif
            vec_store(scores + row * BLOCK_KEYS + panel * LANES, sum[row][panel]);
        }
}

/* Some numbers of a value, even ones before odd ones (`write_row` puts them in order). */
INLINE void load_value(const bf16 *value, vec *numbers) {
#ifdef __AVX512F__
    vec_load_pairs(value, &numbers[0], &numbers[1]);
#else
    __m256i words = _mm256_loadu_si256((const __m256i *)value);
    numbers->low = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    numbers->high = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32((int)0xFFFF0000)));
#endif
}

#ifdef PAIRS
/* The numbers of two values, side by side: of even columns and of odd ones. Where no row sees the second one, zeros take its place:
 * its numbers may not be finite. */
INLINE void pair_of_values(const bf16 *value, int64_t dim, int sees_second, __m512bh *numbers) {
    __m512i first = _mm512_loadu_si512(value);
    __m512i second = sees_second ? _mm512_loadu_si512(value + dim) : _mm512_setzero_si512();
    numbers[0] = (__m512bh)_mm512_mask_blend_epi16(0xAAAAAAAA, first, _mm512_slli_epi32(second, 16));
    numbers[1] = (__m512bh)_mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(first, 16), second);
}

/* The same for `rows` rows, weighed and added to their sums. */
INLINE void add_two_values(int rows, const factor *weights, const bf16 *values, int64_t dim, int sees_second,
                           vec (*sum)[VALUE_VECTORS]) {
    __m512bh value[VALUE_VECTORS];
    pair_of_values(values, dim, sees_second, value);
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) {
        int32_t pair;
        memcpy(&pair, weights + row * BLOCK_KEYS, 4);
        __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int j = 0; j < VALUE_VECTORS; j++)
            sum[row][j] = _mm512_dpbf16_ps(sum[row][j], weight, value[j]);
    }
}
#endif

/* sums (rows, VALUE_COLUMNS) = sums * shrink + weights (rows, count) @ values, from column d on. */
INLINE void add_few(int rows, const struct workspace *work, int64_t first, int64_t count, int64_t dim, int64_t d,
                    float *sums) {
    vec sum[ROWS_AT_ONCE][VALUE_VECTORS];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
        for (int i = 0; i < VALUE_VECTORS; i++)
            sum[row][i] = vec_mul(vec_load(sums + row * dim + i * LANES), vec_set(work->shrink[first + row]));
    for (int64_t key = 0; key < count; key += TILE_ROWS) {
        const bf16 *values = work->value_rows[key / TILE_ROWS] + d;
        int64_t some = fewer(count - key, TILE_ROWS);
        const factor *weights = &work->weights[first][key];
#ifdef PAIRS
        for (int64_t i = 0; i + 1 < some; i += 2)
            add_two_values(rows, weights + i, values + i * dim, dim, 1, sum);
        if (some % 2)
            add_two_values(rows, weights + some - 1, values + (some - 1) * dim, dim, 0, sum);
#else
        for (int64_t i = 0; i < some; i++, values += dim) {
            vec value[VALUE_VECTORS];
            load_value(values, value);
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++) {
                vec weight = vec_set(weights[row * BLOCK_KEYS + i]);
#pragma GCC unroll 2
                for (int j = 0; j < VALUE_VECTORS; j++)
                    sum[row][j] = vec_fma(weight, value[j], sum[row][j]);
            }
        }
#endif
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
        for (int i = 0; i < VALUE_VECTORS; i++)
            vec_store(sums + row * dim + i * LANES, sum[row][i]);
}

INLINE void score_rows(int rows, const struct unit *unit, int64_t first) {
    struct workspace *work = unit->task->work;
    const struct attention *a = unit->task->a;
    int64_t dim = a->dim;
    const factor *queries = work->queries + (unit->tile * TILE_ROWS + first) * dim;
    int64_t key = 0, step = PANELS_FOR(rows) * LANES;
    for (; key + step <= unit->count; key += step)
        score_few(rows, PANELS_FOR(rows), a, queries, work->keys + key * dim, &work->scores[first][key]);
    for (; PANELS_FOR(rows) > 2 && key < unit->count; key += 2 * LANES)
        score_few(rows, 2, a, queries, work->keys + key * dim, &work->scores[first][key]);
}

INLINE void add_rows(int rows, const struct unit *unit, int64_t first, int64_t keys) {
    struct workspace *work = unit->task->work;
    int64_t dim = unit->task->a->dim, place = unit->task->place + unit->tile;
    float *sums = work->sums + (place * TILE_ROWS + first) * dim;
    for (int64_t d = 0; d < dim; d += VALUE_COLUMNS)
        add_few(rows, work, first, keys, dim, d, sums + d);
}

/* `rows` and what it selects are constants in each case. */
#define CASE(function, rows, ...) \
    case rows: function(rows, __VA_ARGS__); break
#if ROWS_AT_ONCE == 8
#define MORE_CASES(function, ...)    \
    CASE(function, 7, __VA_ARGS__);  \
    CASE(function, 8, __VA_ARGS__)
#else
#define MORE_CASES(function, ...)
#endif
#define FOR_ROWS(function, rows, ...)   \
    switch (rows) {                     \
        CASE(function, 1, __VA_ARGS__); \
        CASE(function, 2, __VA_ARGS__); \
        CASE(function, 3, __VA_ARGS__); \
        CASE(function, 4, __VA_ARGS__); \
        CASE(function, 5, __VA_ARGS__); \
        CASE(function, 6, __VA_ARGS__); \
        MORE_CASES(function, __VA_ARGS__); \
    }

/* ---- a unit ---- */

/* Scores (rows, keys) of a unit's rows. */
static void score_unit(const struct unit *unit, int64_t rows) {
    int64_t parts = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    for (int64_t part = 0; part < parts; part++) {
        int64_t first = rows * part / parts, count = rows * (part + 1) / parts - first;
        FOR_ROWS(score_rows, count, unit, first);
    }
}

/* What a unit's rows have summed, weighed anew, and its weighted values. */
static void add_unit(const struct unit *unit, int64_t rows, int64_t keys) {
    int64_t parts = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    for (int64_t part = 0; part < parts; part++) {
        int64_t first = rows * part / parts, count = rows * (part + 1) / parts - first;
        FOR_ROWS(add_rows, count, unit, first, keys);
    }
}

/* Scores capped, as powers of two. */
static void cap_scores(float *scores, int64_t count, float softcap) {
    for (int64_t key = 0; key < count; key += LANES) {
        vec half = vec_sigmoid(vec_mul(vec_load(scores + key), vec_set(2.0f))); /* tanh x = 2 sigmoid(2 x) - 1 */
        vec tanh = vec_fma(half, vec_set(2.0f), vec_set(-1.0f));
        vec_store(scores + key, vec_mul(vec_set(softcap * LOG2_E), tanh));
    }
}

/* The largest of a row's scores, of which it sees those from `first` to before `end`; the others are hidden. */
static float largest_score(float *scores, int64_t count, int64_t first, int64_t end) {
    for (int64_t key = 0; key < first; key++)
        scores[key] = HIDDEN_SCORE;
    for (int64_t key = end; key < count; key++)
        scores[key] = HIDDEN_SCORE;
    vec largest[2] = {vec_set(HIDDEN_SCORE), vec_set(HIDDEN_SCORE)};
    for (int64_t key = 0; key < count; key += 2 * LANES) /* in this order a NaN passes by, and comes back as a weight */
        for (int i = 0; i < 2; i++)
            largest[i] = vec_max(vec_load(scores + key + i * LANES), largest[i]);
    return vec_largest(vec_max(largest[0], largest[1]));
}

/* Weights 2^(score - largest) of a row; returns their sum. */
static float weigh_row(const float *scores, factor *weights, int64_t count, float largest) {
    vec total[2] = {vec_set(0.0f), vec_set(0.0f)};
    for (int64_t key = 0; key < count; key += 2 * LANES)
        for (int i = 0; i < 2; i++) {
            vec weight = power_of_two(vec_sub(vec_load(scores + key + i * LANES), vec_set(largest)));
#ifdef PAIRS
            vec_store_bf16(weights + key + i * LANES, weight);
#else
            vec_store(weights + key + i * LANES, weight);
#endif
            total[i] = vec_add(total[i], weight);
        }
    return vec_sum(vec_add(total[0], total[1]));
}

/* Weights of a unit's rows, and what sums so far are multiplied with; returns how many keys the last row sees. */
static int64_t weigh_unit(const struct unit *unit, int64_t rows) {
    const struct task *task = unit->task;
    const struct attention *a = task->a;
    struct workspace *work = task->work;
    int64_t place = task->place + unit->tile, first[TILE_ROWS], end[TILE_ROWS];
    float found[TILE_ROWS], totals[TILE_ROWS] = {0};
    vec_store(found, vec_set(HIDDEN_SCORE));
    for (int64_t row = 0; row < rows; row++) {
        int64_t last = position_of(task, unit->tile * TILE_ROWS + row) - unit->from; /* key that it sees */
        first[row] = a->window > 0 && last >= a->window ? last - a->window + 1 : 0;
        end[row] = fewer(last + 1, unit->count);
        if (a->softcap > 0.0f)
            cap_scores(work->scores[row], unit->count, a->softcap);
        if (first[row] < end[row])
            found[row] = largest_score(work->scores[row], unit->count, first[row], end[row]);
    }
    vec before = vec_load(work->largest[place]), largest = vec_max(vec_load(found), before);
    vec shrink = power_of_two(vec_sub(before, largest));
    vec_store(found, largest);
    for (int64_t row = 0; row < rows; row++)
        if (first[row] < end[row])
            totals[row] = weigh_row(work->scores[row], work->weights[row], unit->count, found[row]);
        else
            memset(work->weights[row], 0, (size_t)unit->count * sizeof(factor));
    vec_store(work->largest[place], largest);
    vec_store(work->total[place], vec_fma(vec_load(work->total[place]), shrink, vec_load(totals)));
    vec_store(work->shrink, shrink);
    return end[rows - 1];
}

/* Ask for a quarter of the block that follows the one of `unit`, while the first tile of this one is computed. */
OUTLINE void ask_quarter(const struct stream *stream, const struct unit *unit, int64_t quarter) {
    for (int64_t part = 0; unit->first && part < BLOCK_KEYS / 4; part += TILE_DEPTH)
        ask_behind(stream, unit, quarter * (BLOCK_KEYS / 4) + part);
}

static void compute(const struct stream *stream, const struct unit *unit) {
    const struct task *task = unit->task;
    int64_t rows = fewer(task->rows - unit->tile * TILE_ROWS, TILE_ROWS);
    prepare_sums(unit);
    ask_quarter(stream, unit, 0);
    score_unit(unit, rows);
    ask_quarter(stream, unit, 1);
    int64_t keys = weigh_unit(unit, rows);
    ask_quarter(stream, unit, 2);
    add_unit(unit, rows, keys);
    ask_quarter(stream, unit, 3);
}

static void attend_units(struct stream *stream) {
    struct unit unit = {0};
    while (next_unit(stream, &unit, &unit)) {
        const struct task *task = unit.task;
        compute(stream, &unit);
        if (unit.tile + 1 == tiles_of(task) && unit.from + BLOCK_KEYS >= task->end)
            end_task(stream->attending, task);
    }
}
