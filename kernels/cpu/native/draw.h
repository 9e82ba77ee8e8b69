/* Chooses one token from each row of logits, and sums rows up. The bits are the same on every instruction set.
 *
 * A row at temperature 0 gives its first largest logit; from the others a token is drawn. What a bit mask does not allow
 * is as if its logit were -INFINITY: of blocks without an allowed token nothing is read.
 *
 * A token's weight is exp(logit / temperature - largest / temperature). Weights below a floor count nothing; the floor
 * follows from top-k, top-p and min-p, all three on one and the same distribution. The token is where the cumulative
 * weight, in the order of the vocabulary, passes a uniform number's share of all: first among blocks, then inside one.
 * Without a floor no weight is stored: the chosen block's are computed twice.
 */
#pragma once

#include "api.h"
#include "pool.h"
#include "vector.h"

#define DRAW_BLOCK 256                /* tokens whose weights are summed before a draw looks at them */
#define DRAW_WORDS (DRAW_BLOCK / 32) /* of the bit mask */
#define LEAST_WEIGHT 2e-38f          /* smaller ones are 0 */
#define SAFETY 0.999                 /* of a bound on weights, as sums are rounded */
#define DRAW_SLOT 8                  /* of quartet_scratch */

/* One row, with memory for it. */
struct draw_row {
    const float *x;
    const uint32_t *allowed; /* bit i % 32 of word i / 32 is for token i; null: all are */
    int64_t n, blocks;
    vec temperature, best; /* the latter after the division */
    float *weights;        /* (blocks * DRAW_BLOCK,) */
    float *candidates;     /* as many */
    float *sums, *maxima;  /* (blocks,) */
};

/* ---- logits ---- */

/* The words of a row's mask that are for one block, taken together. */
INLINE int allows_any(const struct draw_row *row, int64_t block) {
    const uint32_t *words = row->allowed + block * DRAW_WORDS;
    int64_t left = (row->n + 31) / 32 - block * DRAW_WORDS, count = left < DRAW_WORDS ? left : DRAW_WORDS;
    uint32_t any = 0;
    for (int64_t i = 0; i < count; i++)
        any |= words[i];
    return any != 0;
}

INLINE int allows_all(const struct draw_row *row, int64_t block) {
    const uint32_t *words = row->allowed + block * DRAW_WORDS;
    uint32_t every = UINT32_MAX;
    for (int64_t i = 0; i < DRAW_WORDS; i++)
        every &= words[i];
    return every == UINT32_MAX;
}

/* The logits of a block, -INFINITY where a token is not allowed and behind the last one; null where none is allowed.
 * They stand in `own` where those of the row will not do. */
INLINE const float *logits_of(const struct draw_row *row, int64_t block, float *own) {
    const float *x = row->x + block * DRAW_BLOCK;
    int64_t left = row->n - block * DRAW_BLOCK, count = left < DRAW_BLOCK ? left : DRAW_BLOCK;
    if (row->allowed && !allows_any(row, block))
        return 0;
    if (count == DRAW_BLOCK && (!row->allowed || allows_all(row, block)))
        return x;
    memcpy(own, x, (size_t)count * sizeof *own);
    for (int64_t i = count; i < DRAW_BLOCK; i++)
        own[i] = -INFINITY;
    if (row->allowed)
        quartet_mask_row(own, row->allowed + block * DRAW_WORDS, count);
    return own;
}

/* The largest logit, NaN where one is, and its first place. */
static float largest_logit(const struct draw_row *row, int64_t *place) {
    float best = -INFINITY, own[DRAW_BLOCK];
    int64_t block = 0;
    for (int64_t at = 0; at < row->blocks && best == best; at++) {
        const float *x = logits_of(row, at, own);
        float most = x ? quartet_largest_of(x, DRAW_BLOCK) : -INFINITY;
        if (most > best || most != most) {
            best = most;
            block = at;
        }
    }
    const float *x = logits_of(row, block, own);
    int64_t i = 0;
    while (x && i < DRAW_BLOCK - 1 && x[i] != best)
        i++;
    *place = block * DRAW_BLOCK + i;
    return best;
}

/* ---- weights ---- */

/* Weights of the tokens of a block, 0 for those that are not allowed and behind the last; whether any is allowed. */
INLINE int weigh_block(const struct draw_row *row, int64_t block, float *out) {
    float own[DRAW_BLOCK];
    const float *x = logits_of(row, block, own);
    if (!x)
        return 0;
    for (int64_t i = 0; i < DRAW_BLOCK; i += LANES) {
        vec w = vec_exp(vec_sub(vec_div(vec_load(x + i), row->temperature), row->best));
        vec_store(out + i, vec_from(w, LEAST_WEIGHT));
    }
    return 1;
}

INLINE float sum_of_block(const float *weights) {
    vec even = vec_load(weights), odd = vec_load(weights + LANES);
    for (int i = 2 * LANES; i < DRAW_BLOCK; i += 2 * LANES) {
        even = vec_add(even, vec_load(weights + i));
        odd = vec_add(odd, vec_load(weights + i + LANES));
    }
    return vec_sum(vec_add(even, odd));
}

INLINE float largest_weight(const float *weights) {
    vec most = vec_load(weights);
    for (int i = LANES; i < DRAW_BLOCK; i += LANES)
        most = vec_max(most, vec_load(weights + i));
    return vec_largest(most);
}

/* ---- the floor ---- */

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* Of values in (0, 1], from the largest on: the one with which their number, or their sum, reaches the target; the
 * smallest where nothing does. A radix search: the bits of positive floats are in the order of the values. */
static float floor_of(const float *values, int64_t count, int by_mass, double target) {
    static const int widths[] = {12, 9, 9}; /* of the 30 bits that values up to 1 have */
    double amounts[1 << 12], reached = 0;
    uint32_t prefix = 0;
    int shift = 30;
    for (int level = 0; level < 3; level++) {
        int above = shift, bins = 1 << widths[level];
        shift -= widths[level];
        memset(amounts, 0, (size_t)bins * sizeof *amounts);
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits = bits_of(values[i]);
            if (bits >> above == prefix)
                amounts[bits >> shift & (uint32_t)(bins - 1)] += by_mass ? values[i] : 1;
        }
        int chosen = -1;
        for (int bin = bins - 1; bin >= 0 && (chosen < 0 || reached < target); bin--)
            if (amounts[bin] > 0) {
                chosen = bin;
                reached += amounts[bin];
            }
        reached -= amounts[chosen];
        prefix = prefix << widths[level] | (uint32_t)chosen;
    }
    float found;
    memcpy(&found, &prefix, 4);
    return found;
}

/* Weights of at least `cut`, but no zeros, to row->candidates; how many. */
static int64_t collect(const struct draw_row *row, float cut) {
    int64_t count = 0, end = row->blocks * DRAW_BLOCK;
    __m256 least = _mm256_set1_ps(cut > LEAST_WEIGHT ? cut : LEAST_WEIGHT);
    for (int64_t i = 0; i < end; i += 8) {
        __m256 some = _mm256_loadu_ps(row->weights + i);
        for (int mask = _mm256_movemask_ps(_mm256_cmp_ps(some, least, _CMP_GE_OQ)); mask; mask &= mask - 1)
            row->candidates[count++] = row->weights[i + __builtin_ctz((unsigned)mask)];
    }
    return count;
}

/* The smallest weight that stays. Few weights decide: as many blocks as top-k asks for have a weight of at least the
 * k-th largest of their maxima, and all weights below (1 - top_p) / n of the sum are no more than 1 - top_p together. */
static float smallest_kept(const struct draw_row *row, int64_t top_k, double top_p, float min_p, double total) {
    int by_rank = top_k > 0 && top_k < row->n, by_mass = top_p < 1;
    float floor = min_p;
    if (!by_rank && !by_mass)
        return floor;
    float cut = INFINITY;
    if (by_rank)
        cut = top_k <= row->blocks ? floor_of(row->maxima, row->blocks, 0, (double)top_k) : 0;
    if (by_mass) {
        float bound = (float)(SAFETY * (1 - top_p) * total / (double)row->n);
        cut = bound < cut ? bound : cut;
    }
    int64_t count = collect(row, cut);
    if (by_rank && count >= top_k) {
        float own = floor_of(row->candidates, count, 0, (double)top_k);
        floor = own > floor ? own : floor;
    }
    if (by_mass) {
        float own = floor_of(row->candidates, count, 1, top_p * total);
        floor = own > floor ? own : floor;
    }
    return floor;
}

/* Weights below the floor become 0, and sums follow. */
static void apply_floor(const struct draw_row *row, float floor) {
    for (int64_t block = 0; block < row->blocks; block++) {
        float *weights = row->weights + block * DRAW_BLOCK;
        for (int i = 0; i < DRAW_BLOCK; i += LANES)
            vec_store(weights + i, vec_from(vec_load(weights + i), floor));
        row->sums[block] = sum_of_block(weights);
    }
}

/* ---- the draw ---- */

static double total_of(const struct draw_row *row) {
    double total = 0;
    for (int64_t block = 0; block < row->blocks; block++)
        total += row->sums[block];
    return total;
}

/* `stored`: whether row->weights has the weights. */
static int64_t pick(const struct draw_row *row, double number, int stored) {
    double target = number * total_of(row), below = 0, inside = 0;
    int64_t block = 0;
    while (below + row->sums[block] <= target) /* the last sum passes it: the number is below 1 */
        below += row->sums[block++];
    float own[DRAW_BLOCK];
    const float *weights = row->weights + block * DRAW_BLOCK;
    if (!stored) {
        weigh_block(row, block, own);
        weights = own;
    }
    int last = 0; /* rounding may leave the target just beyond the block's sum: its last possible token is meant then */
    for (int i = 0; i < DRAW_BLOCK; i++)
        if (weights[i] > 0) {
            last = i;
            inside += weights[i];
            if (inside > target - below)
                break;
        }
    return block * DRAW_BLOCK + last;
}

static int64_t draw_one(const struct draw_row *row, const struct drawing *d, int64_t at) {
    int filtered = d->top_ks[at] > 0 || d->top_ps[at] < 1 || d->min_ps[at] > 0;
    for (int64_t block = 0; block < row->blocks; block++) {
        float own[DRAW_BLOCK], *weights = filtered ? row->weights + block * DRAW_BLOCK : own;
        int any = weigh_block(row, block, weights);
        if (!any && filtered)
            memset(weights, 0, DRAW_BLOCK * sizeof *weights);
        row->sums[block] = any ? sum_of_block(weights) : 0;
        if (filtered)
            row->maxima[block] = any ? largest_weight(weights) : 0;
    }
    if (filtered)
        apply_floor(row, smallest_kept(row, d->top_ks[at], d->top_ps[at], d->min_ps[at], total_of(row)));
    return pick(row, quartet_uniform(d->seeds[at], d->positions[at]), filtered);
}

/* The token of one row; `memory`: for what draw_row keeps of so many blocks. */
static void choose_one(struct drawing *d, int64_t at, float *memory, int64_t blocks) {
    struct draw_row row = {
        .x = d->logits + at * d->stride,
        .allowed = d->allowed ? d->allowed + at * d->words : 0,
        .n = d->n,
        .blocks = blocks,
        .weights = memory,
        .candidates = memory + blocks * DRAW_BLOCK,
        .sums = memory + 2 * blocks * DRAW_BLOCK,
        .maxima = memory + 2 * blocks * DRAW_BLOCK + blocks,
    };
    float temperature = d->temperatures[at], best = largest_logit(&row, d->tokens + at);
    if (temperature > 0)
        best /= temperature;
    d->valid[at] = best - best == 0;
    if (!d->valid[at]) {
        d->tokens[at] = 0;
    } else if (temperature > 0) {
        row.temperature = vec_set(temperature);
        row.best = vec_set(best);
        d->tokens[at] = draw_one(&row, d, at);
    }
}

static void choose_rows(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    struct drawing *d = argument;
    int64_t blocks = (d->n + DRAW_BLOCK - 1) / DRAW_BLOCK, at;
    float *memory = quartet_scratch(DRAW_SLOT, (2 * DRAW_BLOCK + 2) * blocks * (int64_t)sizeof(float));
    if (!memory) {
        atomic_store(&d->failed, 1);
        return;
    }
    while ((at = quartet_next(&d->next)) < d->rows)
        choose_one(d, at, memory, blocks);
}

static int draw(struct drawing *d) {
    quartet_run(choose_rows, d, d->rows < d->threads ? (int)d->rows : d->threads);
    return atomic_load(&d->failed) ? -1 : 0;
}

/* ---- sums ---- */

static void sum_rows(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    struct summing *s = argument;
    int64_t at;
    while ((at = quartet_next(&s->next)) < s->rows) {
        struct draw_row row = {.x = s->x + at * s->stride, .n = s->n, .temperature = vec_set(1), .best = vec_set(s->best[at])};
        double total = 0;
        for (int64_t block = 0; block * DRAW_BLOCK < s->n; block++) {
            float weights[DRAW_BLOCK];
            weigh_block(&row, block, weights);
            total += sum_of_block(weights);
        }
        s->out[at] = s->best[at] - s->best[at] == 0 ? (float)(s->best[at] + log(total)) : NAN;
    }
}

static void log_of_sums(struct summing *s) { quartet_run(sum_rows, s, s->rows < s->threads ? (int)s->rows : s->threads); }
