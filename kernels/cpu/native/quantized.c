/* Quantized weights: made from floats, packed in blocks, and read back row by row. For any machine with AVX2. */
#pragma GCC target("avx2,fma,f16c")
#include "quantized.h"
#include "hadamard.h"
#include "pool.h"

#define FEW_NUMBERS 16384  /* so many are read before a second thread is awake */
#define TRIALS 16          /* scales that are tried for a group with an offset */
#define SYMMETRIC_TRIALS 12 /* without one, with fewer than 8 bits */

/* ---- from floats ---- */

struct quantizing {
    const bf16 *x; /* (n, k), rows `stride` apart */
    int64_t n, k, stride;
    int32_t bits, group, zero, rotated;
    uint8_t *numbers;        /* (n, units * 32) */
    float *scales, *offsets; /* (n, units * 32 / group); offsets may be null */
    atomic_long next;
};

INLINE float as_half(float x) { return _cvtsh_ss(_cvtss_sh(x, 0)); }

/* A group of numbers, 16 or 32 of them; with 16 the second vector is left out. */
struct group {
    vec x[2];
    int vecs;
};

INLINE void store_numbers(uint8_t *out, vec numbers) {
    float some[LANES];
    vec_store(some, numbers);
    for (int i = 0; i < LANES; i++)
        out[i] = (uint8_t)(int)some[i];
}

INLINE vec clamp(vec x, float least, float most) { return vec_min(vec_max(x, vec_set(least)), vec_set(most)); }

/* scale * (number - zero), for numbers from 1 to 2 * zero - 1: the largest value gets the largest number. */
INLINE void quantize_symmetric(const struct group *g, int zero, uint8_t *out, float *scale) {
    vec largest = vec_set(0.0f);
    for (int i = 0; i < g->vecs; i++)
        largest = vec_max(largest, vec_max(g->x[i], vec_sub(vec_set(0.0f), g->x[i])));
    float most = (float)(zero - 1);
    *scale = as_half(vec_largest(largest) / most);
    float inverse = *scale > 0 ? 1.0f / *scale : 0.0f;
    for (int i = 0; i < g->vecs; i++) {
        vec number = clamp(vec_round(vec_mul(g->x[i], vec_set(inverse))), -most, most);
        store_numbers(out + i * LANES, vec_add(number, vec_set((float)zero)));
    }
}

/* The same with fewer bits, where rounding costs more: numbers from 0 to 2 * zero - 1. The scale has the sign with which the
 * value farthest from 0 gets a number near 0: there is one more on that side. Of several scales, each improved by least
 * squares, the one whose error is the least, where the error of a large number counts for more (make_qx_quants of ggml). */
INLINE void fit_symmetric(const struct group *g, int zero, uint8_t *out, float *best_scale) {
    float most = (float)zero, best_error = INFINITY;
    vec none = vec_set(0.0f), least = none, largest = none, squares = none, best[2] = {none, none}, weights[2], numbers[2];
    for (int i = 0; i < g->vecs; i++) {
        weights[i] = vec_max(g->x[i], vec_sub(none, g->x[i]));
        largest = vec_max(largest, g->x[i]);
        least = vec_max(least, vec_sub(none, g->x[i]));
        squares = vec_fma(g->x[i], g->x[i], squares);
    }
    float above = vec_largest(largest), below = vec_largest(least), span = above > below ? -above : below;
    float usual = sqrtf(vec_sum(squares) / (float)(g->vecs * LANES));
    for (int i = 0; i < g->vecs; i++)
        weights[i] = vec_add(weights[i], vec_set(usual));
    *best_scale = as_half(span / most); /* stays where the values are too large for float16 */
    for (int trial = 0; trial < SYMMETRIC_TRIALS && span != 0; trial++) {
        float scale = span / (most + ((float)trial - SYMMETRIC_TRIALS / 2) * 0.25f);
        vec sum_nn = none, sum_nx = none, errors = none;
        for (int again = 0; again < 2; again++) {
            vec inverse = vec_set(scale != 0 ? 1.0f / scale : 0.0f);
            for (int i = 0; i < g->vecs; i++) {
                numbers[i] = clamp(vec_round(vec_mul(g->x[i], inverse)), -most, most - 1.0f);
                if (again) {
                    vec difference = vec_sub(vec_mul(numbers[i], vec_set(scale)), g->x[i]);
                    errors = vec_fma(vec_mul(weights[i], difference), difference, errors);
                } else {
                    vec wn = vec_mul(weights[i], numbers[i]);
                    sum_nn = vec_fma(wn, numbers[i], sum_nn);
                    sum_nx = vec_fma(wn, g->x[i], sum_nx);
                }
            }
            if (!again)
                scale = as_half(vec_sum(sum_nx) / vec_sum(sum_nn));
        }
        float error = vec_sum(errors);
        if (error < best_error) {
            best_error = error;
            *best_scale = scale;
            memcpy(best, numbers, sizeof best);
        }
    }
    for (int i = 0; i < g->vecs; i++)
        store_numbers(out + i * LANES, vec_add(best[i], vec_set((float)zero)));
}

INLINE void numbers_of(const struct group *g, float scale, float offset, float most, vec *numbers) {
    vec inverse = vec_set(scale > 0 ? 1.0f / scale : 0.0f);
    for (int i = 0; i < g->vecs; i++)
        numbers[i] = clamp(vec_round(vec_mul(vec_sub(g->x[i], vec_set(offset)), inverse)), 0.0f, most);
}

/* scale * number + offset: of several scales, each improved by least squares, the one whose error is the least, where
 * the error of a large number counts for more. */
INLINE void quantize_offset(const struct group *g, float most, uint8_t *out, float *best_scale, float *best_offset) {
    vec zero = vec_set(0.0f), squares = zero, least = g->x[0], largest = g->x[0], numbers[2], weights[2], best[2];
    for (int i = 0; i < g->vecs; i++) {
        least = vec_min(least, g->x[i]);
        largest = vec_max(largest, g->x[i]);
        squares = vec_fma(g->x[i], g->x[i], squares);
    }
    float low = -vec_largest(vec_sub(zero, least)), span = vec_largest(largest) - low;
    float usual = sqrtf(vec_sum(squares) / (float)(g->vecs * LANES)), best_error = INFINITY;
    vec all = zero, all_x = zero;
    for (int i = 0; i < g->vecs; i++) {
        weights[i] = vec_add(vec_set(usual), vec_max(g->x[i], vec_sub(zero, g->x[i])));
        all = vec_add(all, weights[i]);
        all_x = vec_fma(weights[i], g->x[i], all_x);
        best[i] = zero;
    }
    float w = vec_sum(all), wx = vec_sum(all_x);
    *best_scale = *best_offset = INFINITY; /* where the values are too large for float16 */
    for (int trial = 0; trial < TRIALS; trial++) {
        float scale = span / (most - 1.0f + (float)trial * 2.0f / (TRIALS - 1)), offset = low;
        numbers_of(g, scale, offset, most, numbers);
        vec sum_n = zero, sum_nn = zero, sum_nx = zero, errors = zero;
        for (int i = 0; i < g->vecs; i++) {
            vec wn = vec_mul(weights[i], numbers[i]);
            sum_n = vec_add(sum_n, wn);
            sum_nn = vec_fma(wn, numbers[i], sum_nn);
            sum_nx = vec_fma(wn, g->x[i], sum_nx);
        }
        float wn = vec_sum(sum_n), wnn = vec_sum(sum_nn), wnx = vec_sum(sum_nx), determinant = w * wnn - wn * wn;
        if (determinant > 0) {
            scale = (w * wnx - wn * wx) / determinant;
            offset = (wnn * wx - wn * wnx) / determinant;
        }
        scale = as_half(scale), offset = as_half(offset);
        if (!(scale > 0)) {
            scale = 0;
            offset = as_half(w > 0 ? wx / w : 0.0f);
        }
        numbers_of(g, scale, offset, most, numbers);
        for (int i = 0; i < g->vecs; i++) {
            vec difference = vec_sub(vec_fma(numbers[i], vec_set(scale), vec_set(offset)), g->x[i]);
            errors = vec_fma(vec_mul(weights[i], difference), difference, errors);
        }
        float error = vec_sum(errors);
        if (error < best_error) {
            best_error = error;
            *best_scale = scale;
            *best_offset = offset;
            memcpy(best, numbers, sizeof best);
        }
    }
    for (int i = 0; i < g->vecs; i++)
        store_numbers(out + i * LANES, best[i]);
}

/* Comparisons lose a NaN: where a value is one, or infinite, the scale says so. */
INLINE int is_finite(const struct group *g) {
    vec none = vec_set(0.0f), sum = none;
    for (int i = 0; i < g->vecs; i++)
        sum = vec_fma(g->x[i], none, sum);
    return vec_sum(sum) == 0;
}

/* ROTATED numbers of a row, rotated. */
INLINE void load_rotated(const bf16 *x, vec *numbers) {
    for (int i = 0; i < ROTATED_VECS; i++)
        numbers[i] = vec_load_bf16(x + i * LANES);
    rotate_numbers(numbers);
}

/* A row in groups of many numbers, of which the largest gets the largest integer; every 32 numbers name the scale. */
static void quantize_rotated(const struct quantizing *q, int64_t row) {
    int64_t size = rotated_group(q->k, q->rotated);
    float most = (float)(q->zero - 1), none = 0.0f;
    for (int64_t from = 0; from < q->k; from += size) {
        int64_t count = q->k - from < size ? q->k - from : size, place = row * q->k + from;
        vec numbers[MOST_GROUP / LANES], largest = vec_set(none), check = vec_set(none);
        for (int64_t at = 0; at < count; at += ROTATED) {
            load_rotated(q->x + row * q->stride + from + at, numbers + at / LANES);
            for (int64_t i = at / LANES; i < (at + ROTATED) / LANES; i++) {
                largest = vec_max(largest, vec_max(numbers[i], vec_sub(vec_set(none), numbers[i])));
                check = vec_fma(numbers[i], vec_set(none), check); /* comparisons lose a NaN */
            }
        }
        float scale = as_half(vec_largest(largest) / most), inverse = scale > 0 ? 1.0f / scale : 0.0f;
        for (int64_t i = 0; i < count / LANES; i++) {
            vec number = clamp(vec_round(vec_mul(numbers[i], vec_set(inverse))), -most, most);
            store_numbers(q->numbers + place + i * LANES, vec_add(number, vec_set((float)q->zero)));
        }
        for (int64_t unit = 0; unit < count / TILE_DEPTH; unit++)
            q->scales[place / TILE_DEPTH + unit] = vec_sum(check) == 0 ? scale : NAN;
    }
}

static void quantize_rows(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    struct quantizing *q = argument;
    int64_t size = q->group, groups = (q->k + 31) / 32 * (32 / size), row;
    while ((row = quartet_next(&q->next)) < q->n) {
        if (q->rotated) {
            quantize_rotated(q, row);
            continue;
        }
        for (int64_t group = 0; group < groups; group++) {
            bf16 some[32] = {0};
            int64_t from = group * size, count = q->k - from < size ? q->k - from : size, place = row * groups + group;
            if (count > 0)
                memcpy(some, q->x + row * q->stride + from, (size_t)count * 2);
            struct group g = {.vecs = (int)size / LANES};
            for (int i = 0; i < g.vecs; i++)
                g.x[i] = vec_load_bf16(some + i * LANES);
            uint8_t *out = q->numbers + place * size;
            if (q->offsets)
                quantize_offset(&g, (float)((1 << q->bits) - 1), out, q->scales + place, q->offsets + place);
            else if (q->bits < 8)
                fit_symmetric(&g, q->zero, out, q->scales + place);
            else
                quantize_symmetric(&g, q->zero, out, q->scales + place);
            if (!is_finite(&g))
                q->scales[place] = NAN;
        }
    }
}

/* x (n, k) quantized; rows are filled up with zeros. Without offsets (null): symmetric around `zero`. `rotated`: so
 * many numbers have the same scale; k is a multiple of ROTATED, there are 8 bits, no offsets, and scales for each 32. */
void quartet_quantize(const uint16_t *x, int64_t n, int64_t k, int64_t stride, int32_t bits, int32_t group,
                      int32_t zero, int32_t rotated, uint8_t *numbers, float *scales, float *offsets, int32_t threads) {
    struct quantizing q = {.x = x, .n = n, .k = k, .stride = stride, .bits = bits, .group = group, .zero = zero};
    q.rotated = rotated;
    q.numbers = numbers, q.scales = scales, q.offsets = offsets;
    quartet_run(quantize_rows, &q, threads);
}

/* ---- to blocks ---- */

struct blocking {
    const uint8_t *numbers;              /* (n, units * 32) */
    const float *scales, *offsets;       /* (n, units, halves); offsets may be null */
    int64_t n, units;
    int32_t bits, halves;
    uint8_t *out_numbers;
    uint16_t *out_scales;
    atomic_long next;
};

static void put_line(const uint8_t *numbers, int bits, int number, uint8_t *unit) {
    if (bits == 8) {
        for (int i = 0; i < 64; i++)
            unit[number * 64 + i] = numbers[i] ^ SIGN;
        return;
    }
    for (int i = 0; i < 64; i++)
        unit[number / 2 * 64 + i] |= (uint8_t)((numbers[i] & 15) << (number % 2 * 4));
    for (int plane = 0; plane < bits - 4; plane++)
        for (int i = 0; i < 64; i++)
            unit[256 + plane * 64 + number * 8 + i / 8] |= (uint8_t)((numbers[i] >> (4 + plane) & 1) << i % 8);
}

static void put_unit(const struct blocking *b, int64_t block, int64_t unit) {
    uint8_t *out = b->out_numbers + (block * b->units + unit) * 64 * b->bits;
    memset(out, 0, (size_t)(64 * b->bits));
    for (int number = 0; number < UNIT_LINES; number++) {
        uint8_t numbers[64] = {0};
        for (int column = 0; column < LANES && block * LANES + column < b->n; column++)
            memcpy(numbers + column * 4,
                   b->numbers + ((block * LANES + column) * b->units + unit) * 32 + number * 4, 4);
        put_line(numbers, b->bits, number, out);
    }
    int kinds = b->offsets ? 2 : 1;
    for (int half = 0; half < b->halves; half++)
        for (int kind = 0; kind < kinds; kind++) {
            const float *from = kind ? b->offsets : b->scales;
            int64_t to = ((block * b->units + unit) * b->halves + half) * kinds + kind;
            for (int column = 0; column < LANES; column++) {
                int64_t row = block * LANES + column;
                float own = row < b->n ? from[(row * b->units + unit) * b->halves + half] : 0.0f;
                b->out_scales[to * LANES + column] = (uint16_t)_cvtss_sh(own, 0);
            }
        }
}

static void put_blocks(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    struct blocking *b = argument;
    int64_t block;
    while ((block = quartet_next(&b->next)) * LANES < b->n)
        for (int64_t unit = 0; unit < b->units; unit++)
            put_unit(b, block, unit);
}

/* Quantized rows to the blocks that a product reads; the last block is filled up with zeros. */
void quartet_pack_quantized(const uint8_t *numbers, const float *scales, const float *offsets, int64_t n, int64_t units,
                   int32_t bits, int32_t halves, uint8_t *out_numbers, uint16_t *out_scales, int32_t threads) {
    struct blocking b = {.numbers = numbers, .scales = scales, .offsets = offsets, .n = n, .units = units};
    b.bits = bits, b.halves = halves, b.out_numbers = out_numbers, b.out_scales = out_scales;
    quartet_run(put_blocks, &b, threads);
}

/* ---- back to rows ---- */

struct reading {
    struct quantized weight;
    int64_t k, units, count;
    const int64_t *rows;
    bf16 *out;
    atomic_long next;
};

/* The 32 numbers of a unit for one column. */
INLINE void numbers_at(int bits, const uint8_t *unit, int column, float *out) {
    for (int number = 0; number < UNIT_LINES; number++) {
        int place = column * 4;
        const uint8_t *line = unit + (bits == 8 ? number : number / 2) * 64 + place;
        for (int i = 0; i < 4; i++) {
            int value = bits == 8 ? line[i] ^ SIGN : line[i] >> (number % 2 * 4) & 15;
            for (int plane = 0; plane < bits - 4 && bits < 8; plane++) {
                int eight = unit[256 + plane * 64 + number * 8 + place / 8];
                value |= (eight >> (place % 8 + i) & 1) << (4 + plane);
            }
            out[number * 4 + i] = (float)value;
        }
    }
}

/* The 32 values of unit `unit` of a row. */
INLINE void values_at(const struct reading *r, int64_t row, int64_t unit, vec *values) {
    const struct quantized *w = &r->weight;
    int column = (int)(row % LANES);
    int64_t place = row / LANES * r->units + unit;
    float numbers[32];
    numbers_at(w->bits, w->numbers + place * 64 * w->bits, column, numbers);
    for (int half = 0; half < 2; half++) {
        int64_t group = place * w->halves + (w->halves == 2 ? half : 0);
        const uint16_t *own = w->scales + group * (1 + w->offsets) * LANES + column;
        float scale = _cvtsh_ss(own[0]), offset = w->offsets ? _cvtsh_ss(own[LANES]) : -scale * (float)w->zero;
        values[half] = vec_fma(vec_load(numbers + half * LANES), vec_set(scale), vec_set(offset));
    }
}

static void read_row(const struct reading *r, int64_t row, bf16 *out) {
    int64_t together = r->weight.rotated ? ROTATED / TILE_DEPTH : 1;
    for (int64_t unit = 0; unit < r->units; unit += together) {
        vec values[ROTATED_VECS];
        bf16 numbers[ROTATED];
        for (int64_t i = 0; i < together; i++)
            values_at(r, row, unit + i, values + i * 2);
        if (r->weight.rotated)
            rotate_numbers(values);
        for (int64_t i = 0; i < together * 2; i++)
            vec_store_bf16(numbers + i * LANES, values[i]);
        int64_t left = r->k - unit * 32, most = together * 32;
        memcpy(out + unit * 32, numbers, (size_t)(left < most ? left : most) * 2);
    }
}

static void read_rows(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    struct reading *r = argument;
    int64_t index;
    while ((index = quartet_next(&r->next)) < r->count)
        read_row(r, r->rows[index], r->out + index * r->k);
}

/* Some rows of a weight (n, k) as bfloat16 (count, k), turned back where it is rotated; else the numbers that an exact
 * product computes with. 0, or -1 where the weight does not have one of them. */
int quartet_quantized_rows(const struct quantized *weight, int64_t n, int64_t k, int64_t count, const int64_t *rows,
                           uint16_t *out, int32_t threads) {
    for (int64_t index = 0; index < count; index++)
        if (rows[index] < 0 || rows[index] >= n)
            return -1;
    struct reading r = {.weight = *weight, .k = k, .units = (k + 31) / 32, .count = count, .rows = rows, .out = out};
    quartet_run(read_rows, &r, count * k <= FEW_NUMBERS ? 1 : threads);
    return 0;
}
