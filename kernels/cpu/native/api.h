/* What every instruction set offers: the table that dispatch.c chooses one of. See library.py for the callers. */
#pragma once

#include <stdatomic.h>
#include <stdint.h>

#include "recurrences.h"

#define TILE_COLUMNS 16 /* columns of a product that lie side by side in a packed weight */
#define TILE_DEPTH 32   /* k of a packed weight is a multiple of this */
#define CACHE_LINE 64

#define SCALE_SHIFT 19 /* bits of a float below the upper four of its mantissa */
#define ZERO_STEPS 16

enum activation { ACTIVATION_SILU, ACTIVATION_GELU_TANH };

enum output { OUTPUT_BF16, OUTPUT_FLOAT, OUTPUT_ADD, OUTPUT_GATED };

/* A quantized weight: scale * (number - zero point), or scale * number + offset, with integers of few bits.
 *
 * It lies in blocks of 16 columns of a product, those in units of 32 numbers in k (see quantized.h). Scales and offsets
 * are float16: for each unit, and for each of its halves where `halves` is 2, 16 scales and then 16 offsets, if any. In a
 * rotated weight the units of a group (rotated_group) have one line of scales together.
 *
 * Or they are bytes, in units without halves. A block then begins with the least scale of each of its 16 columns, a power of
 * two in bfloat16. The bits of a scale as a float are those of the least one plus its byte << SCALE_SHIFT: it has four bits
 * of mantissa. An offset is -scale * byte / ZERO_STEPS.
 */
struct quantized {
    const uint8_t *numbers; /* (blocks, units, 64 * bits); null: the weight is bfloat16 */
    const uint8_t *scales;  /* (blocks, units or groups, halves, 1 + offsets, 16), see above */
    int32_t bits;           /* 4, 5, 6 or 8 */
    int32_t halves, offsets, zero;
    int32_t scale_bits; /* 16 or 8 */
    int32_t rotated; /* not 0: rows are rotated (hadamard.h), so many numbers have the same scale; 8 bits, no offsets or
                        halves, k a multiple of ROTATED */
    int32_t row_bits; /* of the integers that rows become: 8; or 16, with 8 bits, `zero` SIGN, no offsets or halves */
    int32_t exact; /* compute with bfloat16 activations always: a row's bits do not depend on the other rows */
};

/* What LoRA adapters add to a product, see adapters.h. Numbers of both factors are bfloat16, or float for `add_float`. */

/* The second factor of one part of a weight: some columns of the product. */
struct part {
    int64_t first, blocks; /* of 16 columns; those that are not the part's are zeros in `b` */
    int64_t rank;          /* of bfloat16: even */
    int64_t place;         /* where its numbers begin among those between the factors: a multiple of TILE_DEPTH */
    const void *b;         /* (blocks, rank / 2, 16, 2), and 16 more lines of zeros; of floats (blocks, rank, 16) */
};

/* What one adapter has for a product. */
struct addition {
    const void *a;         /* (ranks / 16, k / 2, 16, 2), padded as a weight; of floats (ranks / 16, k, 16); null: nothing */
    int64_t ranks;         /* of all parts together, padded to whole blocks */
    int64_t width;         /* numbers of a row between the factors, each part's padded to TILE_DEPTH */
    const int32_t *places; /* (ranks,): where they stand among these; -1: padding */
    const struct part *parts;
    int64_t count; /* of parts */
};

/* What the adapters of a step have. */
struct additions {
    const struct addition *const *adapters; /* each an array, by the number of a product */
    int64_t count;
    const int32_t *owners; /* (rows,): index of a row's adapter, or -1 */
};

/* out (rows, n) = x (rows, k) @ weight.T + bias, after a root-mean-square norm of x and before an output operation. */
struct product {
    const uint16_t *x; /* (rows, k) bfloat16, rows `x_stride` apart */
    int64_t rows, x_stride;
    const uint16_t *norm; /* (k,) weight of the norm, or null */
    float epsilon, norm_offset;
    const uint16_t *packed; /* (columns / 16, k / 2, 16, 2), see linear.h; or null */
    struct quantized quantized; /* the weight where `packed` is null */
    int64_t n, k;           /* as the weight has them, without padding */
    const uint16_t *bias;   /* (n,) or null */
    int32_t output;         /* enum output; gated: activation(first half of n) * second half, (rows, n / 2) */
    int32_t activation;     /* enum activation */
    void *out;              /* rows `out_stride` numbers apart, in other memory than x */
    int64_t out_stride;
    int32_t threads;
    int64_t number;                    /* of this product, as adapters know it */
    const struct additions *additions; /* to the sums, before the output operation; or null */
    int32_t x_tiles, out_tiles; /* x, or the gated result, is in tiles: (rows / 16, columns / 32, 16, 32) */
    const struct product *next; /* whose weight will be read next, or null; a hint */
};

/* out (rows, n) += what adapters add for x (rows, k), all in float. */
struct adding {
    const float *x;
    int64_t rows, k, x_stride;
    float *out;
    int64_t n, out_stride;
    int64_t number;
    const struct additions *additions;
    int32_t threads;
};

#define MOST_DIM 512 /* of an attention head */

/* Attention of queries (tokens, kv_heads * group, dim) over pools of keys and values (kv_heads, pool tokens, dim). */
struct attention {
    const uint16_t *q; /* rows `q_stride` apart */
    int64_t q_stride;
    uint16_t *out; /* as q */
    int64_t out_stride;
    const uint16_t *keys, *values;
    int64_t head_stride; /* between the heads of a pool */
    int64_t kv_heads, group, dim, page_size, sequences;
    const int64_t *starts;      /* (sequences + 1,): where a sequence's queries begin among the tokens */
    const int64_t *lengths;     /* (sequences,): its context, which ends with the queries */
    const int32_t *pages;       /* of all sequences */
    const int64_t *page_starts; /* (sequences,): where a sequence's begin */
    int64_t groups;             /* of sequences that begin with the same keys; 0: none do, and nothing is said of them */
    const int64_t *members;     /* (sequences,): all sequences, group by group */
    const int64_t *sharing;     /* (groups, 2): how many sequences, and how many keys; of one query each, if there are keys */
    float scale, softcap;       /* softcap 0: none */
    int64_t window;             /* a query at p sees keys in (p - window, p]; 0: all */
    int32_t causal, threads;
};

/* Heads normed, if there are weights, and those of queries and keys rotated; keys and values go to their places in the
 * pools. With no heads of keys nothing is written. */
struct rotation {
    const uint16_t *qkv; /* (tokens, heads + 2 * kv_heads, dim), rows `qkv_stride` apart; see `values_from_keys` */
    int64_t tokens, qkv_stride;
    int64_t heads, kv_heads, dim, rotary_dim;
    const uint16_t *query_norm, *key_norm, *value_norm; /* (dim,) or null */
    float epsilon, norm_offset;
    const uint16_t *cos, *sin; /* (tokens, rotary_dim); the first half of the sines is negated */
    const int64_t *slots;      /* (tokens,) */
    uint16_t *keys, *values;   /* pools (kv_heads, pool tokens, dim) */
    int64_t head_stride;
    uint16_t *q; /* (tokens, heads, dim) */
    int32_t values_from_keys; /* there are no columns of values: they are the keys, as these are before their norm */
    int32_t threads;
};

/* A root-mean-square norm; none where `weight` is null. */
struct norm {
    const uint16_t *weight;
    float epsilon, offset; /* the latter is added to the weight */
};

/* Rows (rows, width) that are normed on their way; `x` and `out` may be the same. */
struct rows {
    const uint16_t *x;
    const float *sums; /* instead of `x`: rounded to bfloat16 first */
    uint16_t *out;
    int64_t rows, width;
    struct norm norm;
    float scale; /* of what add_normed leaves, which is rounded before; 0: none */
    int32_t threads;
};

/* out (rows, width) = activation(gate) * factor, which may all be one; the activation is rounded before.
 *
 * Sparse: gate and factor are the halves of rows (rows, 2 * width) at `gate`, and a gate counts as far as it is above the
 * mean of its row by more than `cutoff` standard deviations. */
struct gating {
    const uint16_t *gate, *factor;
    uint16_t *out;
    int64_t rows, width;
    float cutoff;
    int32_t activation; /* enum activation */
    int32_t threads;
};

#define MOST_STREAMS 16

/* Several residual streams of each row, which are mixed by shares: weights @ tanh(said / width). */
struct mixing {
    int64_t rows, count, active, width;
    const float *said;       /* (rows, count) */
    const uint16_t *weights; /* (count * count, count) for predictions, (count, count) for corrections */
    uint16_t *stack, *predicted; /* (rows, count, width) */
    uint16_t *own;           /* (rows, width) */
    const uint16_t *scale;   /* (width,) or null */
    int32_t threads;
};

/* sums[places[row]] += weights[row] * x[row]; places are different ones, and all rows are taken in order without them. */
struct weighted {
    const uint16_t *x; /* (rows, width) */
    const float *weights;
    const int64_t *places; /* or null */
    float *sums;
    int64_t rows, width;
    int32_t threads;
};

/* A mixture of experts, each a gated feed-forward block, and perhaps one that every row passes. As in a layer, products
 * lack what a step decides. */
struct experts {
    struct norm before, after; /* of what comes in, and of the weighted sum */
    int64_t count, top_k, hidden, size;
    int32_t renormalize;                  /* weights of the chosen experts sum to one */
    struct product router;                /* (count, hidden), to float */
    const struct product *gate_up, *down; /* by expert */
    int32_t has_shared;
    int64_t shared_size;
    struct product shared_gate_up, shared_down, shared_gate; /* the sigmoid of the last, (1, hidden), is its weight */
    struct norm router_norm; /* the router reads what comes in by this norm, if it has one */
    float router_scale;      /* of its logits; 0: none */
    const uint16_t *expert_scale; /* (count,) of the weights of chosen experts, or null */
    /* If there is a norm behind the chosen experts' sum, the shared expert has its own before and behind, and no gate. */
    struct norm after_chosen, shared_before, shared_after;
};

/* What a layer has where it reads one of several residual streams (streams.py), and a product of low rank beside
 * attention. */
struct streams {
    int64_t count, active;
    struct product router; /* (count, hidden), with a norm before, to float */
    const uint16_t *predictions, *corrections, *scale; /* as in struct mixing */
    struct norm before, after; /* of the product beside attention */
    struct product left, right;
};

/* One layer of a decoder: attention, then a gated feed-forward block or a mixture of experts. What a step decides is left
 * out: rows, threads, what comes in and what goes out. */
struct layer {
    struct product qkv, output, gate_up, down; /* with the norm before, and an output operation */
    struct norm after_attention, after_mlp;
    const struct experts *experts; /* in place of gate_up and down, or null */
    struct product input_gate, input_projection; /* of the layer's own input; without columns: it has none */
    struct norm after_input;
    const uint16_t *scale; /* (1,) of what the layer leaves, whose last norm is not null then; or null */
    const struct streams *streams; /* or null */
    float cutoff;
    int32_t sparse; /* the gates of the feed-forward block are, see struct gating */
    struct rotation rotation;
    struct attention attention;
    int64_t rope; /* which of the step's rotations */
};

/* What all layers of a step have in common. */
struct step {
    int64_t rows;
    uint16_t *residual;                         /* (rows, hidden): changed in place */
    uint16_t *qkv, *q, *mixed, *inner, *branch; /* scratch memory: what goes from one operation to the next */
    const uint16_t *inputs; /* (layers, rows, columns of `input_gate`): the layers' own; or null */
    uint16_t *wide;   /* scratch memory: gates and factors of sparse blocks */
    uint16_t *stack;  /* (rows, streams, hidden): changed in place, where layers have streams; `residual` is scratch then */
    uint16_t *predicted, *beside; /* scratch memory: as the stack, and (rows, hidden) */
    float *said;                  /* scratch memory: (rows, streams) */
    const uint16_t *const *cosines, *const *sines; /* by rope, see struct rotation */
    const int64_t *slots;
    int64_t page_size, sequences;               /* the rest as in struct attention */
    const int64_t *starts, *lengths;
    const int32_t *pages;
    const int64_t *page_starts;
    int64_t groups;
    const int64_t *members, *sharing;
    int32_t threads;
    const struct additions *additions; /* to the products; or null */
    /* Rows whose results behind the last layer are wanted: they are moved to the front of `residual`. Of each sequence they
     * are the last ones; by sequence, where they begin among all of them. `wanted_starts` null: all rows are wanted. */
    int64_t wanted;
    const int64_t *wanted_rows, *wanted_starts;
    struct norm final; /* of these, in place; of `residual` */
};

/* Rows of logits that give a token each, see draw.h. All lists have an item for each of them. */
struct drawing {
    const float *logits; /* rows `stride` apart */
    int64_t rows, n, stride;
    const uint32_t *allowed; /* (rows, words): bit i % 32 of word i / 32 allows token i; null: all are */
    int64_t words;
    const float *temperatures; /* 0: the first largest logit, whatever the others say */
    const int64_t *top_ks;     /* 0: all tokens */
    const double *top_ps;      /* 1: all */
    const float *min_ps;       /* 0: all */
    const int64_t *seeds, *positions;
    int64_t *tokens; /* what is chosen */
    uint8_t *valid;  /* whether the row's largest logit is finite; if not, its token is 0 */
    int32_t threads;
    atomic_long next;
    atomic_int failed;
};

/* out = log(sum(exp(x))) by row. */
struct summing {
    const float *x; /* (rows, n), rows `stride` apart */
    int64_t rows, n, stride;
    const float *best; /* (rows,) */
    float *out;        /* (rows,) */
    int32_t threads;
    atomic_long next;
};

struct kernels {
    int (*product)(const struct product *);
    int (*takes_tiles)(const struct product *); /* whether x may be in tiles; rows are rounded up to 32 then */
    void (*rotate)(const struct rotation *);
    int (*attention)(const struct attention *); /* null where there is none */
    void (*norm)(const struct rows *);       /* out = norm(x) */
    void (*add_normed)(const struct rows *); /* out += norm(x), which is rounded before */
    void (*add_weighted)(const struct weighted *);
    int (*add_float)(const struct adding *);
    void (*convolve)(const struct convolution *);
    void (*recur)(const struct recurrence *);
    int (*draw)(struct drawing *);
    void (*log_of_sums)(struct summing *);
    void (*gate_rows)(const struct gating *);
    void (*gate_sparse)(const struct gating *);
    void (*predict)(const struct mixing *); /* predicted, own = predicted[active] */
    void (*correct)(const struct mixing *); /* stack from own; own = stack[active] * scale */
    void (*spread)(const struct mixing *);  /* stack += own, but for the first stream */
};

/* Of these a library has one; the addresses of the others are null. */
#define MAYBE __attribute__((weak))
extern const struct kernels quartet_avx2 MAYBE, quartet_avx512 MAYBE, quartet_avx512_vnni MAYBE,
    quartet_avx512_bf16 MAYBE, quartet_amx MAYBE;

/* residual (rows, hidden) += the mixture of its rows, times `scale` (0: none). `ids` (rows, top_k): the experts chosen,
 * best first; may be null. So may `additions`. 0, or -1 where there is no memory. */
int quartet_experts(const struct kernels *kernels, const struct experts *e, int64_t rows, uint16_t *residual,
                    int64_t *ids, float scale, int32_t threads, const struct additions *additions);

/* The largest of `count` numbers, NaN if one of them is; -INFINITY of none. */
float quartet_largest_of(const float *x, int64_t count);

/* -INFINITY in place of each of n numbers whose bit, i % 32 of word i / 32, is not set. */
void quartet_mask_row(float *x, const uint32_t *allowed, int64_t n);

/* Uniform in (0, 1), a function of both. */
double quartet_uniform(int64_t seed, int64_t position);

/* Scratch memory of this thread, aligned to cache lines, kept from call to call; null where there is none. */
void *quartet_scratch(int slot, int64_t bytes);
