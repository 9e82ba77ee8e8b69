/* Draws one token from each row of logits, and sums rows up. The bits are the same on every instruction set.
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

#define DRAW_BLOCK 256           /* tokens whose weights are summed before a draw looks at them */
#define LEAST_WEIGHT 2e-38f /* smaller ones are 0 */
#define SAFETY 0.999        /* of a bound on weights, as sums are rounded */
#define DRAW_SLOT 8              /* of quartet_scratch */

/* One row, with memory for it. */
struct draw_row {
    const float *x;
    int64_t n, blocks;
    vec temperature, best; /* the latter after the division */
    float *weights;        /* (blocks * DRAW_BLOCK,) */
    float *candidates;     /* as many */
    float *sums, *maxima;  /* (blocks,) */
};

/* ---- weights ---- */

/* Weights of the tokens of a block, zeros behind the last of the vocabulary. */
INLINE void weigh_block(const struct draw_row *row, int64_t block, float *out) {
    const float *x = row->x + block * DRAW_BLOCK;
    int64_t left = row->n - block * DRAW_BLOCK;
    float padded[LANES];
    for (int64_t i = 0; i < DRAW_BLOCK; i += LANES, x += LANES, left -= LANES) {
        const float *some = x;
        if (left < LANES) {
            for (int64_t lane = 0; lane < LANES; lane++)
                padded[lane] = lane < left ? x[lane] : -INFINITY;
            some = padded;
        }
        vec w = vec_exp(vec_sub(vec_div(vec_load(some), row->temperature), row->best));
        vec_store(out + i, vec_from(w, LEAST_WEIGHT));
    }
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
        weigh_block(row, block, weights);
        row->sums[block] = sum_of_block(weights);
        if (filtered)
            row->maxima[block] = largest_weight(weights);
    }
    if (filtered)
        apply_floor(row, smallest_kept(row, d->top_ks[at], d->top_ps[at], d->min_ps[at], total_of(row)));
    return pick(row, quartet_uniform(d->seeds[at], d->positions[at]), filtered);
}

static void draw_rows(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    struct drawing *d = argument;
    int64_t blocks = (d->n + DRAW_BLOCK - 1) / DRAW_BLOCK, at;
    float *memory = quartet_scratch(DRAW_SLOT, (2 * DRAW_BLOCK + 2) * blocks * (int64_t)sizeof(float));
    if (!memory) {
        atomic_store(&d->failed, 1);
        return;
    }
    while ((at = quartet_next(&d->next)) < d->count) {
        int64_t number = d->rows[at];
        float temperature = d->temperatures[at], best = d->best[number] / temperature;
        d->valid[number] = best - best == 0;
        d->tokens[number] = 0;
        if (!d->valid[number])
            continue;
        struct draw_row row = {
            .x = d->logits + number * d->stride,
            .n = d->n,
            .blocks = blocks,
            .temperature = vec_set(temperature),
            .best = vec_set(best),
            .weights = memory,
            .candidates = memory + blocks * DRAW_BLOCK,
            .sums = memory + 2 * blocks * DRAW_BLOCK,
            .maxima = memory + 2 * blocks * DRAW_BLOCK + blocks,
        };
        d->tokens[number] = draw_one(&row, d, at);
    }
}

static int draw(struct drawing *d) {
    quartet_run(draw_rows, d, d->count < d->threads ? (int)d->count : d->threads);
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
