/* The largest number of each row, and where it is first. For any machine with AVX2. */
#pragma GCC target("avx2")
#include <immintrin.h>
#include <math.h>

#include "api.h"
#include "pool.h"

#define BLOCK 1024 /* numbers that are searched again when they have the largest */

struct search {
    const float *x; /* (rows, n), rows `stride` apart */
    int64_t rows, n, stride;
    float *values;
    int64_t *places;
    atomic_long next;
};

float quartet_largest_of(const float *x, int64_t count) {
    __m256 most = _mm256_set1_ps(-INFINITY), other = most, unordered = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m256 first = _mm256_loadu_ps(x + i), second = _mm256_loadu_ps(x + i + 8);
        most = _mm256_max_ps(most, first);
        other = _mm256_max_ps(other, second);
        unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(first, second, _CMP_UNORD_Q));
    }
    float lanes[8], largest = -INFINITY;
    _mm256_storeu_ps(lanes, _mm256_max_ps(most, other));
    int is_nan = _mm256_movemask_ps(unordered);
    for (int lane = 0; lane < 8; lane++)
        largest = lanes[lane] > largest ? lanes[lane] : largest;
    for (; i < count; i++) {
        is_nan |= x[i] != x[i];
        largest = x[i] > largest ? x[i] : largest;
    }
    return is_nan ? NAN : largest;
}

static void search_row(const float *x, int64_t n, float *value, int64_t *place) {
    float best = -INFINITY;
    int64_t block = 0;
    for (int64_t from = 0; from < n; from += BLOCK) {
        float own = quartet_largest_of(x + from, n - from < BLOCK ? n - from : BLOCK);
        if (own > best || own != own) {
            best = own;
            block = from;
        }
        if (own != own)
            break;
    }
    int64_t i = block;
    while (i < n && (best == best ? x[i] != best : x[i] == x[i]))
        i++;
    *value = best;
    *place = i;
}

static void search_rows(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    struct search *search = argument;
    int64_t row;
    while ((row = quartet_next(&search->next)) < search->rows)
        search_row(search->x + row * search->stride, search->n, search->values + row, search->places + row);
}

/* By row: the largest of n numbers, n > 0, and its first place; of a row with a NaN the first of these. */
void quartet_largest(const float *x, int64_t rows, int64_t n, int64_t stride, float *values, int64_t *places,
                     int32_t threads) {
    struct search search = {.x = x, .rows = rows, .n = n, .stride = stride, .values = values, .places = places};
    quartet_run(search_rows, &search, rows < threads ? (int)rows : threads);
}
