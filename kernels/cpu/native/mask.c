/* Numbers that a bit mask does not allow become -inf. For any machine with AVX2. */
#pragma GCC target("avx2")
#include <immintrin.h>
#include <math.h>

#include "api.h"
#include "pool.h"

#define WORD 32
#define ALONE (1 << 17) /* numbers that one thread masks in less time than another one takes to begin */

struct masking {
    float *x; /* (rows, n), rows `stride` apart */
    const uint32_t *allowed; /* (rows, words): bit i % 32 of word i / 32 is for number i */
    int64_t rows, n, stride, words;
    atomic_long next;
};

/* 32 numbers, of which some are not allowed. */
static void mask_word(float *x, uint32_t word) {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256 never = _mm256_set1_ps(-INFINITY);
    for (int i = 0; i < WORD; i += 8) {
        __m256i set = _mm256_and_si256(_mm256_set1_epi32((int)(word >> i)), bits);
        __m256 keep = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bits));
        _mm256_storeu_ps(x + i, _mm256_blendv_ps(never, _mm256_loadu_ps(x + i), keep));
    }
}

void quartet_mask_row(float *x, const uint32_t *allowed, int64_t n) {
    int64_t i = 0;
    for (; i + WORD <= n; i += WORD)
        if (allowed[i / WORD] != UINT32_MAX)
            mask_word(x + i, allowed[i / WORD]);
    for (; i < n; i++)
        if (!(allowed[i / WORD] >> (i % WORD) & 1))
            x[i] = -INFINITY;
}

static void mask_rows(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    struct masking *masking = argument;
    int64_t row;
    while ((row = quartet_next(&masking->next)) < masking->rows)
        quartet_mask_row(masking->x + row * masking->stride, masking->allowed + row * masking->words, masking->n);
}

/* In place on x (rows, n). */
void quartet_mask(float *x, int64_t rows, int64_t n, int64_t stride, const uint32_t *allowed, int64_t words,
                  int32_t threads) {
    struct masking masking = {.x = x, .rows = rows, .n = n, .stride = stride, .allowed = allowed, .words = words};
    int most = rows < threads ? (int)rows : threads;
    quartet_run(mask_rows, &masking, rows * n < ALONE ? 1 : most);
}
