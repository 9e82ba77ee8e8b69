/* Weights in whole numbers: made from floats, put into blocks, and read back row by row. For any machine with AVX2. */
#pragma GCC target("avx2,fma,f16c")
#include "grouped.h"
#include "pool.h"

#define TRIALS 20 /* scales that are tried for a group of 4 bits */

/* ---- from floats ---- */

struct quantizing {
    const bf16 *x; /* (n, k), rows `stride` apart */
    int64_t n, k, stride;
    int32_t bits;
    uint8_t *numbers; /* (n, units * 32) */
    float *scales;    /* (n, units) */
    float *offsets;   /* (n, units) with 4 bits */
    atomic_long next;
};

INLINE float as_half(float x) { return _cvtsh_ss(_cvtss_sh(x, 0)); }

/* The nearest whole number, for |x| < 2^22. */
INLINE float whole(float x) { return (x + 12582912.0f) - 12582912.0f; }

/* 32 numbers as scale * (number - 128). */
static void quantize_8(const float *x, uint8_t *numbers, float *scale) {
    float largest = 0;
    for (int i = 0; i < 32; i++) {
        float size = x[i] < 0 ? -x[i] : x[i];
        largest = largest < size ? size : largest;
    }
    *scale = as_half(largest / 127.0f);
    float inverse = *scale > 0 ? 1.0f / *scale : 0.0f;
    for (int i = 0; i < 32; i++) {
        float number = whole(x[i] * inverse);
        number = number < -127 ? -127 : number > 127 ? 127 : number;
        numbers[i] = (uint8_t)(int)(number + 128);
    }
}

INLINE void numbers_of(const float *x, float scale, float offset, float *numbers) {
    float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (int i = 0; i < 32; i++) {
        float number = whole((x[i] - offset) * inverse);
        numbers[i] = number < 0 ? 0 : number > 15 ? 15 : number;
    }
}

/* 32 numbers as scale * number + offset: of several scales, each improved by least squares, the one whose error is the
 * least, where the error of a large number counts for more. */
static void quantize_4(const float *x, uint8_t *out, float *best_scale, float *best_offset) {
    float least = x[0], largest = x[0], weights[32], numbers[32], best = INFINITY;
    for (int i = 0; i < 32; i++) {
        least = x[i] < least ? x[i] : least;
        largest = x[i] > largest ? x[i] : largest;
    }
    float span = largest - least, mean = 0;
    for (int i = 0; i < 32; i++)
        mean += x[i] * x[i] / 32;
    for (int i = 0; i < 32; i++)
        weights[i] = sqrtf(mean) + (x[i] < 0 ? -x[i] : x[i]);
    *best_scale = *best_offset = 0;
    for (int trial = 0; trial <= TRIALS; trial++) {
        float scale = span / (14.0f + 0.1f * (float)trial), offset = least;
        numbers_of(x, scale, offset, numbers);
        float w = 0, wn = 0, wnn = 0, wx = 0, wnx = 0;
        for (int i = 0; i < 32; i++) {
            float wi = weights[i], ni = numbers[i];
            w += wi;
            wn += wi * ni;
            wnn += wi * ni * ni;
            wx += wi * x[i];
            wnx += wi * ni * x[i];
        }
        float determinant = w * wnn - wn * wn;
        if (determinant > 0) {
            scale = (w * wnx - wn * wx) / determinant;
            offset = (wnn * wx - wn * wnx) / determinant;
        }
        scale = as_half(scale), offset = as_half(offset);
        if (!(scale > 0)) {
            scale = 0;
            offset = as_half(wx / w);
        }
        numbers_of(x, scale, offset, numbers);
        float error = 0;
        for (int i = 0; i < 32; i++) {
            float difference = scale * numbers[i] + offset - x[i];
            error += weights[i] * difference * difference;
        }
        if (error < best) {
            best = error;
            *best_scale = scale;
            *best_offset = offset;
            for (int i = 0; i < 32; i++)
                out[i] = (uint8_t)(int)numbers[i];
        }
    }
}

static void quantize_rows(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    struct quantizing *q = argument;
    int64_t units = (q->k + 31) / 32, row;
    while ((row = quartet_next(&q->next)) < q->n)
        for (int64_t unit = 0; unit < units; unit++) {
            float x[32] = {0};
            int64_t count = q->k - unit * 32 < 32 ? q->k - unit * 32 : 32, place = row * units + unit;
            for (int64_t i = 0; i < count; i++)
                x[i] = from_bf16(q->x[row * q->stride + unit * 32 + i]);
            if (q->bits == 8)
                quantize_8(x, q->numbers + place * 32, q->scales + place);
            else
                quantize_4(x, q->numbers + place * 32, q->scales + place, q->offsets + place);
        }
}

/* x (n, k) as whole numbers: 8 bits with zero 128, or 4 bits with offsets. Behind the end of a row are zeros of x. */
void quartet_quantize(const uint16_t *x, int64_t n, int64_t k, int64_t stride, int32_t bits, uint8_t *numbers,
                      float *scales, float *offsets, int32_t threads) {
    struct quantizing q = {.x = x, .n = n, .k = k, .stride = stride, .bits = bits};
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
        memcpy(unit + number * 64, numbers, 64);
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

/* Rows of whole numbers into the blocks that a product reads; the last block is filled up with zeros. */
void quartet_group(const uint8_t *numbers, const float *scales, const float *offsets, int64_t n, int64_t units,
                   int32_t bits, int32_t halves, uint8_t *out_numbers, uint16_t *out_scales, int32_t threads) {
    struct blocking b = {.numbers = numbers, .scales = scales, .offsets = offsets, .n = n, .units = units};
    b.bits = bits, b.halves = halves, b.out_numbers = out_numbers, b.out_scales = out_scales;
    quartet_run(put_blocks, &b, threads);
}

/* ---- back to rows ---- */

struct reading {
    struct grouped weight;
    int64_t k, units, count;
    const int64_t *rows;
    bf16 *out;
    atomic_long next;
};

INLINE int number_at(const struct grouped *w, const uint8_t *unit, int at, int column) {
    int number = at / 4, place = column * 4 + at % 4;
    if (w->bits == 8)
        return unit[number * 64 + place];
    int value = unit[number / 2 * 64 + place] >> (number % 2 * 4) & 15;
    for (int plane = 0; plane < w->bits - 4; plane++)
        value |= (unit[256 + plane * 64 + number * 8 + place / 8] >> place % 8 & 1) << (4 + plane);
    return value;
}

static void read_row(const struct reading *r, int64_t row, bf16 *out) {
    const struct grouped *w = &r->weight;
    int column = (int)(row % LANES);
    for (int64_t unit = 0; unit < r->units; unit++) {
        int64_t place = row / LANES * r->units + unit;
        for (int at = 0; at < 32 && unit * 32 + at < r->k; at++) {
            int half = w->halves == 2 && at >= 16;
            const uint16_t *own = w->scales + (place * w->halves + half) * (1 + w->offsets) * LANES + column;
            float scale = _cvtsh_ss(own[0]), offset = w->offsets ? _cvtsh_ss(own[LANES]) : -scale * (float)w->zero;
            float number = (float)number_at(w, w->numbers + place * 64 * w->bits, at, column);
            out[unit * 32 + at] = to_bf16(__builtin_fmaf(number, scale, offset));
        }
    }
}

static void read_rows(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    struct reading *r = argument;
    int64_t index;
    while ((index = quartet_next(&r->next)) < r->count)
        read_row(r, r->rows[index], r->out + index * r->k);
}

/* Some rows of a weight (n, k) as bfloat16 (count, k), the numbers that an exact product computes with. */
void quartet_grouped_rows(const struct grouped *weight, int64_t k, int64_t count, const int64_t *rows, uint16_t *out,
                          int32_t threads) {
    struct reading r = {.weight = *weight, .k = k, .units = (k + 31) / 32, .count = count, .rows = rows, .out = out};
    quartet_run(read_rows, &r, threads);
}
