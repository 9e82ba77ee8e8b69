/* What every instruction set offers: the table that dispatch.c chooses one of. See library.py for the callers. */
#pragma once

#include <stdint.h>

#define TILE_COLUMNS 16 /* columns of a product that lie side by side in a packed weight */
#define TILE_DEPTH 32   /* k of a packed weight is a multiple of this */
#define CACHE_LINE 64

enum activation { ACTIVATION_SILU, ACTIVATION_GELU_TANH };

enum output { OUTPUT_BF16, OUTPUT_FLOAT, OUTPUT_ADD, OUTPUT_GATED };

/* out (rows, n) = x (rows, k) @ weight.T + bias, after a root-mean-square norm of x and before an output operation. */
struct product {
    const uint16_t *x; /* (rows, k) bfloat16, rows `x_stride` apart */
    int64_t rows, x_stride;
    const uint16_t *norm; /* (k,) weight of the norm, or null */
    float epsilon, norm_offset;
    const uint16_t *packed; /* (columns / 16, k / 2, 16, 2), see linear.h */
    int64_t n, k;           /* as the weight has them, without padding */
    const uint16_t *bias;   /* (n,) or null */
    int32_t output;         /* enum output; gated: activation(first half of n) * second half, (rows, n / 2) */
    int32_t activation;     /* enum activation */
    void *out;              /* rows `out_stride` numbers apart */
    int64_t out_stride;
    int32_t threads;
};

struct kernels {
    int (*product)(const struct product *);
};

extern const struct kernels quartet_avx2, quartet_avx512, quartet_avx512_bf16, quartet_amx;

/* Scratch memory of this thread, aligned to cache lines, kept from call to call; null where there is none. */
void *quartet_scratch(int slot, int64_t bytes);
