/* What attention computes of one tile of rows and one block of keys, with AMX (attention.h).
 *
 * Scores are computed as (keys, 16 rows), so that a vector holds one key's score for each row, and keys need no other
 * layout than the pool's. Weights are transposed once to be multiplied with the values, (16 rows, dim).
 *
 * A tile may have rows of several KV heads, some lanes each: queries are zeros in the lanes of the others, so the sum of
 * the products with each head's keys has each lane's own scores.
 */
#pragma once

#include "attention_task.h"
#include "transpose.h"

#define MOST_HEADS 8  /* KV heads that share a tile; times dim MOST_DIM at most */
/* What one thread needs; the sizes are those of the widest head. */
struct workspace {
    bf16 queries[2][TASK_TILES * TILE_ROWS * MOST_DIM]; /* by task, tile and head: (dim / 2, 16, 2) */
    int32_t positions[2][TASK_TILES][TILE_ROWS];
    float sums[PLACES * TILE_ROWS * MOST_DIM]; /* by tile: weighted values (16, dim), not divided yet */
    float largest[PLACES][TILE_ROWS];          /* score so far, as a power of two */
    float total[PLACES][TILE_ROWS];
    const bf16 *key_rows[MOST_HEADS][BLOCK_KEYS / TILE_ROWS]; /* where 16 keys of the block that is scored begin */
    bf16 keys[BLOCK_KEYS * MOST_DIM], values[TILE_ROWS * MOST_DIM]; /* copies where they do not lie together */
    bf16 paired[BLOCK_KEYS * MOST_DIM];                             /* by head: values as (keys / 2, dim, 2) */
    float scores[2][BLOCK_KEYS][TILE_ROWS];                         /* of this unit and the next */
    bf16 weights[BLOCK_KEYS / TILE_DEPTH][TILE_ROWS][TILE_DEPTH];
    int lanes; /* that the tiles are configured for */
    float earlier_sums[PLACES * TILE_ROWS * MOST_DIM]; /* of spans before */
    float earlier_largest[PLACES][TILE_ROWS], earlier_total[PLACES][TILE_ROWS];
} __attribute__((aligned(CACHE_LINE)));

/* Tiles 2, 3 and 7 have so many rows, the others 16. */
INLINE void configure_tiles(struct workspace *work, int lanes) {
    struct tile_config config;
    if (work->lanes == lanes)
        return;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        config.bytes[tile] = 64;
        config.rows[tile] = tile == 2 || tile == 3 || tile == 7 ? (uint8_t)lanes : TILE_ROWS;
    }
    _tile_loadconfig(&config);
    work->lanes = lanes;
}

/* Queries on their way in, and the positions of their rows. */
INLINE void load_queries(const struct task *task) {
    int64_t dim = task->a->dim, tiles = (task->rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t tile = 0; tile < tiles; tile++) {
        const bf16 *from[TILE_ROWS];
        for (int64_t lane = 0; lane < TILE_ROWS; lane++) {
            int64_t row = row_of(task, tile, lane);
            from[lane] = row < task->rows ? task->a->q + offset_of(task, row, lane, task->a->q_stride) : 0;
            row = row < task->rows ? row : task->rows - 1;
            task->work->positions[task->side][tile][lane] = (int32_t)position_of(task, row);
        }
        bf16 *to = task->work->queries[task->side] + tile * TILE_ROWS * dim;
        for (int64_t head = 0; head < task->heads; head++)
            for (int64_t d = 0; d < dim; d += TILE_DEPTH, to += TILE_ROWS * TILE_DEPTH) {
                __m512i rows[TILE_ROWS];
                for (int64_t lane = 0; lane < TILE_ROWS; lane++) {
                    rows[lane] = _mm512_setzero_si512();
                    if (from[lane] && lane / task->lanes == head)
                        rows[lane] = _mm512_loadu_si512(from[lane] + d);
                }
                transpose_words(rows, to);
            }
    }
}

INLINE void find_keys(const struct task *task, int64_t from) {
    struct workspace *work = task->work;
    for (int64_t head = 0; head < task->heads; head++)
        for (int64_t key = 0; key < block_keys(task, from); key += TILE_ROWS) {
            bf16 *copy = work->keys + (head * BLOCK_KEYS + key) * task->a->dim;
            work->key_rows[head][key / TILE_ROWS] = rows_of(task, keys_of(task, head), from + key, copy);
        }
}

/* Values of a block (keys, dim) → (keys / 2, dim, 2), as the second factor of a product of tiles is read; of 32 columns
 * first 0 to 3, 8 to 11 and so on, then the others, as unpacking gives them (`write_rows` puts them in order). */
INLINE void pair_values(const struct task *task, int64_t from) {
    int64_t dim = task->a->dim;
    for (int64_t head = 0; head < task->heads; head++)
        for (int64_t group = 0; group < block_keys(task, from); group += TILE_ROWS) {
            const bf16 *values = rows_of(task, values_of(task, head), from + group, task->work->values);
            bf16 *out = task->work->paired + (head * BLOCK_KEYS + group) * dim;
            for (int64_t key = 0; key < TILE_ROWS; key += 2)
                for (int64_t d = 0; d < dim; d += TILE_DEPTH) {
                    __m512i even = _mm512_loadu_si512(values + key * dim + d);
                    __m512i odd = _mm512_loadu_si512(values + (key + 1) * dim + d);
                    _mm512_storeu_si512(out + key * dim + 2 * d, _mm512_unpacklo_epi16(even, odd));
                    _mm512_storeu_si512(out + key * dim + 2 * d + 2 * LANES, _mm512_unpackhi_epi16(even, odd));
                }
        }
}

/* Scores (TILE_DEPTH, 16) of a unit = keys @ queries, from key number `part` on. */
INLINE void score(const struct unit *unit, int64_t part) {
    const struct task *task = unit->task;
    struct workspace *work = task->work;
    int64_t dim = task->a->dim;
    const bf16 *queries = work->queries[task->side] + unit->tile * TILE_ROWS * dim;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t head = 0; head < task->heads; head++) {
        const bf16 *first = work->key_rows[head][part / TILE_ROWS], *second = work->key_rows[head][part / TILE_ROWS + 1];
        for (int64_t d = 0; d < dim; d += TILE_DEPTH, queries += TILE_ROWS * TILE_DEPTH) {
            _tile_loadd(6, queries, 64);
            _tile_loadd(4, first + d, dim * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, second + d, dim * 2);
            _tile_dpbf16ps(1, 5, 6);
        }
    }
    _tile_stored(0, work->scores[unit->side][part], 64);
    _tile_stored(1, work->scores[unit->side][part + TILE_ROWS], 64);
}

/* Which rows see a key. */
struct sight {
    __m512i last, first; /* position that a row sees */
};

INLINE struct sight sight_of(const struct unit *unit) {
    const struct task *task = unit->task;
    int64_t window = task->a->window;
    __m512i last = _mm512_loadu_si512(task->work->positions[task->side][unit->tile]);
    int32_t behind = window > 0 && window < INT32_MAX ? (int32_t)window - 1 : INT32_MAX;
    return (struct sight){last, _mm512_sub_epi32(last, _mm512_set1_epi32(behind))};
}

INLINE __mmask16 seen(struct sight sight, int64_t position) {
    __m512i at = _mm512_set1_epi32((int32_t)position);
    return _mm512_mask_cmpge_epi32_mask(_mm512_cmple_epi32_mask(at, sight.last), at, sight.first);
}

/* Scores scaled and capped, in place. */
INLINE void cap_scores(const struct unit *unit) {
    const struct attention *a = unit->task->a;
    float (*scores)[TILE_ROWS] = unit->task->work->scores[unit->side];
    for (int64_t key = 0; key < unit->count; key++) {
        vec s = vec_mul(vec_load(scores[key]), vec_set(a->scale));
        vec half = vec_sigmoid(vec_mul(s, vec_set(2.0f / a->softcap))); /* tanh x = 2 sigmoid(2 x) - 1 */
        vec_store(scores[key], vec_mul(vec_set(a->softcap), vec_fma(half, vec_set(2.0f), vec_set(-1.0f))));
    }
}

/* Each row's largest of the scores that it sees, times `scale`. */
INLINE vec largest_score(const struct unit *unit, int hides, vec scale) {
    float (*scores)[TILE_ROWS] = unit->task->work->scores[unit->side];
    struct sight sight = sight_of(unit);
    vec largest[4];
    for (int i = 0; i < 4; i++)
        largest[i] = vec_set(HIDDEN_SCORE);
    for (int64_t key = 0; key < unit->count; key += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            vec s = vec_mul(vec_load(scores[key + i]), scale);
            if (hides)
                s = _mm512_mask_mov_ps(vec_set(HIDDEN_SCORE), seen(sight, unit->from + key + i), s);
            largest[i] = vec_max(s, largest[i]); /* in this order a NaN passes by, and comes back as a weight */
        }
    return vec_max(vec_max(largest[0], largest[1]), vec_max(largest[2], largest[3]));
}

/* Weights 2^(scale * score - largest) of TILE_DEPTH keys from number `part` on, as (16 rows, keys); returns their sums. */
INLINE vec weigh_keys(const struct unit *unit, int64_t part, int hides, vec scale, vec largest) {
    struct workspace *work = unit->task->work;
    float (*scores)[TILE_ROWS] = work->scores[unit->side] + part;
    struct sight sight = sight_of(unit);
    vec minus = vec_sub(vec_set(0.0f), largest), total[2] = {vec_set(0.0f), vec_set(0.0f)};
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32((int)0xFFFF0000);
    __m512i rows[TILE_ROWS];
    for (int pair = 0; pair < TILE_ROWS; pair++) {
        __m512i bits[2];
#pragma GCC unroll 2
        for (int one = 0; one < 2; one++) {
            int key = 2 * pair + one;
            vec weight = power_of_two(vec_fma(vec_load(scores[key]), scale, minus));
            if (hides)
                weight = _mm512_maskz_mov_ps(seen(sight, unit->from + part + key), weight);
            total[one] = vec_add(total[one], weight);
            bits[one] = _mm512_add_epi32(_mm512_castps_si512(weight), half); /* rounded to bfloat16 */
        }
        rows[pair] = _mm512_ternarylogic_epi32(upper, bits[1], _mm512_srli_epi32(bits[0], 16), 0xCA);
    }
    transpose_words(rows, (bf16 *)work->weights[part / TILE_DEPTH]);
    return vec_add(total[0], total[1]);
}

/* What was summed so far, scaled to a new largest score. */
INLINE void shrink_sums(struct workspace *work, int64_t place, int64_t dim, vec shrink) {
    if (_mm512_cmp_ps_mask(shrink, vec_set(1.0f), _CMP_NEQ_UQ) == 0)
        return;
    float by[LANES], *sums = work->sums + place * TILE_ROWS * dim;
    vec_store(by, shrink);
    for (int row = 0; row < TILE_ROWS; row++)
        for (int64_t d = row * dim; d < (row + 1) * dim; d += LANES)
            vec_store(sums + d, vec_mul(vec_load(sums + d), vec_set(by[row])));
}

/* sums (16, dim) += weights (16, keys) @ values (keys, dim). */
INLINE void add_values(const struct unit *unit) {
    const struct task *task = unit->task;
    struct workspace *work = task->work;
    int64_t dim = task->a->dim, lanes = task->lanes;
    configure_tiles(work, (int)lanes);
    for (int64_t head = 0; head < task->heads; head++) {
        const bf16 *values = work->paired + head * BLOCK_KEYS * dim;
        for (int64_t d = 0; d < dim; d += 2 * LANES) {
            float *sums = work->sums + ((task->place + unit->tile) * TILE_ROWS + head * lanes) * dim + d;
            _tile_loadd(2, sums, dim * 4);
            _tile_loadd(3, sums + LANES, dim * 4);
            for (int64_t key = 0; key < unit->count; key += TILE_DEPTH) {
                _tile_loadd(7, work->weights[key / TILE_DEPTH][head * lanes], 64);
                _tile_loadd(4, values + key * dim + 2 * d, dim * 4);
                _tile_dpbf16ps(2, 7, 4);
                _tile_loadd(5, values + key * dim + 2 * (d + LANES), dim * 4);
                _tile_dpbf16ps(3, 7, 5);
            }
            _tile_stored(2, sums, dim * 4);
            _tile_stored(3, sums + LANES, dim * 4);
        }
    }
}

/* One row's sums, divided, on their way out. */
INLINE void write_row(const float *sums, float total, int64_t dim, bf16 *out) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    vec share = vec_set(1.0f / total);
    for (int64_t d = 0; d < dim; d += TILE_DEPTH) { /* in the order of `pair_values` */
        vec low = vec_mul(vec_load(sums + d), share), high = vec_mul(vec_load(sums + d + LANES), share);
        vec_store_bf16(out + d, _mm512_permutex2var_ps(low, first, high));
        vec_store_bf16(out + d + LANES, _mm512_permutex2var_ps(low, second, high));
    }
}
