/* Quantized weights: made from floats, packed in blocks, and read back row by row. For any machine with AVX2. */
#pragma GCC target("avx2,fma,f16c")
#include "quantized.h"
#include "fit.h"
#include "hadamard.h"
#include "pool.h"

#define FEW_NUMBERS 16384  /* so many are read before a second thread is awake */

/* ---- from floats ---- */

struct quantizing {
    const bf16 *x; /* (n, k), rows `stride` apart */
    int64_t n, k, stride;
    int32_t bits, group, zero, rotated;
    uint8_t *numbers;        /* (n, units * 32) */
    float *scales, *offsets; /* (n, units * 32 / group), or of a rotated weight (n, groups); offsets may be null */
    float *least;            /* (n,): scales are bytes; null: they are float16 */
    atomic_long next;
};

/* ROTATED numbers of a row, rotated. */
INLINE void load_rotated(const bf16 *x, vec *numbers) {
    for (int i = 0; i < ROTATED_VECS; i++)
        numbers[i] = vec_load_bf16(x + i * LANES);
    rotate_numbers(numbers);
}

/* A row in groups of many numbers, of which the largest gets the largest integer. */
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
        q->scales[row * ((q->k + size - 1) / size) + from / size] = vec_sum(check) == 0 ? scale : NAN;
    }
}

/* A group of a row, filled up with zeros. */
INLINE struct group group_of(const struct quantizing *q, int64_t row, int64_t group) {
    bf16 some[32] = {0};
    int64_t size = q->group, from = group * size, count = q->k - from < size ? q->k - from : size;
    if (count > 0)
        memcpy(some, q->x + row * q->stride + from, (size_t)count * 2);
    struct group g = {.vecs = (int)size / LANES};
    for (int i = 0; i < g.vecs; i++)
        g.x[i] = vec_load_bf16(some + i * LANES);
    return g;
}

/* The power of two that is the least scale of a row: the largest one is in reach, of the values as far as they are finite. */
static float least_scale(const struct quantizing *q, int64_t row, int64_t groups) {
    float most = q->offsets ? (float)((1 << q->bits) - 1) : (float)(q->zero - 1), scale = 0.0f;
    for (int64_t group = 0; group < groups; group++) {
        struct group g = group_of(q, row, group);
        if (is_finite(&g))
            scale = fmaxf(scale, span_of(&g, q->offsets != 0).size / most);
    }
    int power;
    (void)frexpf(scale * SCALE_ROOM, &power); /* it is less than 2^power */
    return ldexpf(1.0f, (power < SMALLEST_POWER ? SMALLEST_POWER : power) - SCALE_POWERS);
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
        if (q->least)
            q->least[row] = least_scale(q, row, groups);
        for (int64_t group = 0; group < groups; group++) {
            struct group g = group_of(q, row, group);
            int64_t place = row * groups + group;
            uint8_t *out = q->numbers + place * size;
            if (q->least && q->offsets)
                fit_bytes_offset(&g, (float)((1 << q->bits) - 1), q->least[row], out, q->scales + place, q->offsets + place);
            else if (q->least)
                fit_bytes(&g, (float)q->zero, q->least[row], out, q->scales + place);
            else if (q->offsets)
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
 * many numbers have the same scale; k is a multiple of ROTATED, there are 8 bits and no offsets. `least`: null, or scales are
 * bytes, and it takes the least one of each row; there are 4 bits then if there are offsets. */
void quartet_quantize(const uint16_t *x, int64_t n, int64_t k, int64_t stride, int32_t bits, int32_t group, int32_t zero,
                      int32_t rotated, uint8_t *numbers, float *scales, float *offsets, float *least, int32_t threads) {
    struct quantizing q = {.x = x, .n = n, .k = k, .stride = stride, .bits = bits, .group = group, .zero = zero};
    q.rotated = rotated;
    q.numbers = numbers, q.scales = scales, q.offsets = offsets, q.least = least;
    quartet_run(quantize_rows, &q, threads);
}

/* ---- to blocks ---- */

struct blocking {
    const uint8_t *numbers;                /* (n, units * 32) */
    const float *scales, *offsets, *least; /* (n, groups), the same or null, (n,) or null */
    int64_t n, units, groups;
    const struct quantized *to; /* its numbers and scales are written */
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
    int bits = b->to->bits;
    uint8_t *out = (uint8_t *)b->to->numbers + (block * b->units + unit) * 64 * bits;
    memset(out, 0, (size_t)(64 * bits));
    for (int number = 0; number < UNIT_LINES; number++) {
        uint8_t numbers[64] = {0};
        for (int column = 0; column < LANES && block * LANES + column < b->n; column++)
            memcpy(numbers + column * 4,
                   b->numbers + ((block * LANES + column) * b->units + unit) * 32 + number * 4, 4);
        put_line(numbers, bits, number, out);
    }
}

/* Scales and offsets of one column of a block. */
static void put_scales(const struct blocking *b, int64_t block, int column) {
    struct scale_lines lines = scale_lines(b->to, b->units * TILE_DEPTH);
    int64_t row = block * LANES + column;
    int there = row < b->n;
    uint8_t *head = (uint8_t *)b->to->scales + block * lines.block, *out = head + lines.head;
    float least = there && b->least ? b->least[row] : LEAST_SCALE;
    if (b->to->scale_bits == 8)
        ((bf16 *)head)[column] = to_bf16(least);
    for (int64_t group = 0; group < b->groups; group++, out += (1 + b->to->offsets) * LANES * (b->to->scale_bits / 8)) {
        float scale = there ? b->scales[row * b->groups + group] : 0.0f;
        float offset = there && b->offsets ? b->offsets[row * b->groups + group] : 0.0f;
        if (b->to->scale_bits == 16) {
            ((uint16_t *)out)[column] = (uint16_t)_cvtss_sh(scale, 0);
            if (b->offsets)
                ((uint16_t *)out)[LANES + column] = (uint16_t)_cvtss_sh(offset, 0);
            continue;
        }
        out[column] = there ? (uint8_t)scale_byte(scale, least) : 0;
        if (b->offsets)
            out[LANES + column] = there ? (uint8_t)lrintf(-offset / scale * ZERO_STEPS) : 0;
    }
}

static void put_blocks(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    struct blocking *b = argument;
    int64_t block;
    while ((block = quartet_next(&b->next)) * LANES < b->n) {
        for (int64_t unit = 0; unit < b->units; unit++)
            put_unit(b, block, unit);
        for (int column = 0; column < LANES; column++)
            put_scales(b, block, column);
    }
}

/* Quantized rows (n, units * 32) to the blocks of `to` that a product reads; the last block is filled up with zeros. */
void quartet_pack_quantized(const uint8_t *numbers, const float *scales, const float *offsets, const float *least,
                            int64_t n, int64_t units, int64_t groups, const struct quantized *to, int32_t threads) {
    struct blocking b = {numbers, scales, offsets, least, n, units, groups, to, 0};
    quartet_run(put_blocks, &b, threads);
}

/* ---- back to rows ---- */

struct reading {
    struct quantized weight;
    struct scale_lines lines;
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

struct pair {
    float scale, offset;
};

INLINE struct pair scale_and_offset(const struct quantized *w, const struct scale_lines *lines, int64_t row, int64_t unit,
                                    int half) {
    const uint8_t *head = w->scales + row / LANES * lines->block;
    const uint8_t *line = head + lines->head + (unit >> lines->shift) * lines->size + half * (lines->size / 2);
    int64_t column = row % LANES;
    if (w->scale_bits == 16) {
        const uint16_t *own = (const uint16_t *)line + column;
        float scale = _cvtsh_ss(own[0]);
        return (struct pair){scale, w->offsets ? _cvtsh_ss(own[LANES]) : -scale * (float)w->zero};
    }
    uint32_t bits = ((uint32_t)((const bf16 *)head)[column] << 16) + ((uint32_t)line[column] << SCALE_SHIFT);
    float scale, zero = w->offsets ? (float)line[LANES + column] / ZERO_STEPS : (float)w->zero;
    memcpy(&scale, &bits, 4);
    return (struct pair){scale, -scale * zero};
}

/* The 32 values of unit `unit` of a row. */
INLINE void values_at(const struct reading *r, int64_t row, int64_t unit, vec *values) {
    const struct quantized *w = &r->weight;
    int column = (int)(row % LANES);
    int64_t place = row / LANES * r->units + unit;
    float numbers[32];
    numbers_at(w->bits, w->numbers + place * 64 * w->bits, column, numbers);
    for (int half = 0; half < 2; half++) {
        struct pair by = scale_and_offset(w, &r->lines, row, unit, w->halves == 2 ? half : 0);
        values[half] = vec_fma(vec_load(numbers + half * LANES), vec_set(by.scale), vec_set(by.offset));
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
    r.lines = scale_lines(weight, r.units * TILE_DEPTH);
    quartet_run(read_rows, &r, count * k <= FEW_NUMBERS ? 1 : threads);
    return 0;
}
