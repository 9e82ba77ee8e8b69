/* Rows of rotated weights as int8 with a scale for each row and group of up to MOST_GROUP numbers in k, as the weight has
 * them: sums of whole groups are exact integers. Products read them from tiles of GROUP_ROWS rows and STEP numbers.
 */
#pragma once

#include "hadamard.h"
#include "plan.h"

#if defined(__AMX_BF16__)
#define GROUP_ROWS 16 /* of a tile of TDPBSSD */
#define SUMS_ROWS 0
#elif defined(__AVX512VNNI__)
#define GROUP_ROWS 6 /* that pass a panel together (integer_groups.h) */
#define SUMS_ROWS 1  /* VPDPBUSD takes the weight's numbers plus SIGN */
#else
#define GROUP_ROWS 0 /* no product takes rows in groups */
#endif

#if GROUP_ROWS

#define STEP 64                        /* numbers in k of a tile */
#define TILE_BYTES (GROUP_ROWS * STEP) /* of rows */

INLINE int64_t group_size(const struct plan *plan, int64_t from) {
    return plan->depth - from < plan->group ? plan->depth - from : plan->group;
}

/* ---- rows on their way in ---- */

/* ROTATED numbers of a row that is there, normed and rotated, times sqrt(ROTATED). */
INLINE void load_group_part(const struct product *p, const bf16 *x, float scale, int64_t at, vec *numbers) {
#pragma GCC unroll 8
    for (int i = 0; i < ROTATED_VECS; i++) {
        numbers[i] = vec_load_bf16(x + at + i * LANES);
        if (p->norm) {
            vec weight = vec_add(vec_load_bf16(p->norm + at + i * LANES), vec_set(p->norm_offset));
            numbers[i] = vec_mul(vec_mul(numbers[i], vec_set(scale)), weight);
        }
    }
    rotate_unscaled(numbers);
}

/* 64 numbers times `inverse`, rounded to int8. */
INLINE __m512i rounded_bytes(const vec *numbers, vec inverse) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i whole[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        whole[i] = _mm512_cvtps_epi32(vec_mul(numbers[i], inverse));
    __m512i first = _mm512_packs_epi32(whole[0], whole[1]), second = _mm512_packs_epi32(whole[2], whole[3]);
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(first, second));
}

/* A group of a row: rotated, rounded to int8, in tiles (row block, depth / STEP, GROUP_ROWS, STEP). Returns its scale, and
 * the sum of its numbers if SUMS_ROWS. */
INLINE float prepare_group(const struct plan *plan, const bf16 *x, float row_scale, int64_t from, int64_t count,
                           int8_t *out, int32_t *sum) {
    vec numbers[MOST_GROUP / LANES];
    __m512i largest = _mm512_setzero_si512(); /* bits of absolute values: those of what is no number are the largest */
    for (int64_t at = 0; at < count; at += ROTATED) {
        vec *own = numbers + at / LANES;
        load_group_part(plan->p, x, row_scale, from + at, own);
#pragma GCC unroll 8
        for (int i = 0; i < ROTATED_VECS; i++)
            largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(own[i])));
    }
    uint32_t bits = _mm512_reduce_max_epu32(largest);
    float most;
    memcpy(&most, &bits, 4);
    int finite = bits < 0x7F800000;
    vec inverse = vec_set(finite && most > LEAST_LARGEST ? 127.0f / most : 0.0f);
    __m512i sums = _mm512_setzero_si512();
    for (int64_t at = 0; at < count; at += STEP, out += TILE_BYTES) {
        __m512i bytes = rounded_bytes(numbers + at / LANES, inverse);
        if (SUMS_ROWS)
            sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), bytes);
        _mm512_storeu_si512(out, bytes);
    }
    if (SUMS_ROWS)
        *sum = _mm512_reduce_add_epi32(sums);
    return finite ? most / 127.0f * ROTATION_SCALE : NAN;
}

/* A row of the block; zeros if the product does not have it. */
OUTLINE void prepare_groups(const struct plan *plan, int64_t first, int64_t row) {
    const struct product *p = plan->p;
    const bf16 *x = p->x + (first + row) * p->x_stride;
    int there = first + row < p->rows;
    float scale = there && p->norm ? row_scale(x, p->k, p->epsilon) : 1.0f;
    int8_t *out = (int8_t *)plan->x + row / GROUP_ROWS * GROUP_ROWS * plan->depth + row % GROUP_ROWS * STEP;
    for (int64_t from = 0; from < plan->depth; from += plan->group) {
        int64_t count = group_size(plan, from);
        int64_t place = from / plan->group * plan->padded_rows + row;
        if (there) {
            int32_t *sum = SUMS_ROWS ? plan->row_sums + place : 0;
            plan->row_scales[place] = prepare_group(plan, x, scale, from, count, out + from * GROUP_ROWS, sum);
            continue;
        }
        plan->row_scales[place] = 0;
        if (SUMS_ROWS)
            plan->row_sums[place] = 0;
        for (int64_t at = 0; at < count; at += STEP)
            memset(out + (from + at) * GROUP_ROWS, 0, STEP);
    }
}

/* ---- groups of the weight ---- */

/* One group of a panel. */
struct group_place {
    int64_t panel, from;
};

INLINE const uint8_t *group_numbers(const struct plan *plan, struct group_place at, int place) {
    return quantized_numbers(&plan->p->quantized, plan->depth, block_of(plan, at.panel, place), at.from);
}

INLINE const uint8_t *group_scales(const struct plan *plan, struct group_place at, int place) {
    return quantized_scales(&plan->p->quantized, plan->depth, block_of(plan, at.panel, place), at.from);
}

/* The group that a thread computes after `at`: the next of the same piece of k, which is [part, part_end), or where there is
 * none, the first of it in the next panel. */
INLINE struct group_place group_after(const struct plan *plan, struct group_place at, int64_t part, int64_t part_end,
                                      int64_t begin, int64_t end) {
    int64_t from = at.from + plan->group;
    if (from < part_end && from < plan->depth)
        return (struct group_place){at.panel, from};
    return (struct group_place){panel_after(plan, at.panel, begin, end), part};
}

#endif
