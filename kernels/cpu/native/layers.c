/* Whole layers of a decoder: the kernels one after the other, without a way back to Python in between. */
#include "api.h"

static int run_product(const struct kernels *kernels, const struct step *step, const struct product *layer,
                       const uint16_t *x, uint16_t *out) {
    struct product product = *layer;
    product.x = x;
    product.out = out;
    product.rows = step->rows;
    product.threads = step->threads;
    return kernels->product(&product);
}

static void run_rotation(const struct kernels *kernels, const struct step *step, const struct layer *layer) {
    struct rotation rotation = layer->rotation;
    rotation.qkv = step->qkv;
    rotation.q = step->q;
    rotation.tokens = step->rows;
    rotation.cos = step->cosines[layer->rope];
    rotation.sin = step->sines[layer->rope];
    rotation.slots = step->slots;
    rotation.threads = step->threads;
    kernels->rotate(&rotation);
}

static int run_attention(const struct kernels *kernels, const struct step *step, const struct layer *layer) {
    struct attention attention = layer->attention;
    attention.q = step->q;
    attention.out = step->mixed;
    attention.page_size = step->page_size;
    attention.sequences = step->sequences;
    attention.starts = step->starts;
    attention.lengths = step->lengths;
    attention.pages = step->pages;
    attention.page_starts = step->page_starts;
    attention.threads = step->threads;
    return kernels->attention(&attention);
}

/* The residual stream through `count` layers; 0, or -1 where there is no memory. */
int quartet_layers(const struct kernels *kernels, const struct layer *layers, int64_t count, const struct step *step) {
    int failed = 0;
    for (const struct layer *layer = layers; step->rows && layer < layers + count && !failed; layer++) {
        failed |= run_product(kernels, step, &layer->qkv, step->residual, step->qkv);
        run_rotation(kernels, step, layer);
        failed |= run_attention(kernels, step, layer);
        failed |= run_product(kernels, step, &layer->output, step->mixed, step->residual);
        failed |= run_product(kernels, step, &layer->gate_up, step->residual, step->inner);
        failed |= run_product(kernels, step, &layer->down, step->inner, step->residual);
    }
    return failed;
}
