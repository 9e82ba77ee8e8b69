/* Whole layers of a decoder: the kernels one after the other, without a way back to Python in between. */
#include "api.h"

static int run_product(const struct kernels *kernels, const struct step *step, const struct product *layer,
                       const uint16_t *x, uint16_t *out) {
    struct product product = *layer;
    product.x = x;
    product.out = out;
    product.rows = step->rows;
    product.threads = step->threads;
    product.additions = step->additions;
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

/* residual += norm(x @ weight.T): in one go where there is no norm, whose output operation is to add; `scale` (or null)
 * is of the sum. */
static int add_product(const struct kernels *kernels, const struct step *step, const struct product *product,
                       const struct norm *norm, const uint16_t *x, const uint16_t *scale) {
    if (!norm->weight)
        return run_product(kernels, step, product, x, step->residual);
    int failed = run_product(kernels, step, product, x, step->branch);
    struct rows rows = {.x = step->branch, .out = step->residual, .rows = step->rows, .width = product->n};
    rows.norm = *norm;
    rows.scale = scale;
    rows.threads = step->threads;
    kernels->add_normed(&rows);
    return failed;
}

static int run_feed_forward(const struct kernels *kernels, const struct step *step, const struct layer *layer) {
    if (layer->experts)
        return quartet_experts(kernels, layer->experts, step->rows, step->residual, 0, step->threads,
                               step->additions);
    const uint16_t *scale = layer->input_gate.n ? 0 : layer->scale;
    return run_product(kernels, step, &layer->gate_up, step->residual, step->inner) |
           add_product(kernels, step, &layer->down, &layer->after_mlp, step->inner, scale);
}

/* residual += norm(projection(activation(gate(residual)) * input)), `input` being the layer's own. */
static int add_input(const struct kernels *kernels, const struct step *step, const struct layer *layer,
                     const uint16_t *input) {
    struct gating gating = {.gate = step->inner, .factor = input, .out = step->inner, .rows = step->rows};
    gating.width = layer->input_gate.n;
    gating.activation = layer->input_gate.activation;
    gating.threads = step->threads;
    int failed = run_product(kernels, step, &layer->input_gate, step->residual, step->inner);
    kernels->gate_rows(&gating);
    return failed | add_product(kernels, step, &layer->input_projection, &layer->after_input, step->inner, layer->scale);
}

/* The residual stream through `count` layers; 0, or -1 where there is no memory. */
int quartet_layers(const struct kernels *kernels, const struct layer *layers, int64_t count, const struct step *step) {
    int failed = 0;
    for (const struct layer *layer = layers; step->rows && layer < layers + count && !failed; layer++) {
        failed |= run_product(kernels, step, &layer->qkv, step->residual, step->qkv);
        run_rotation(kernels, step, layer);
        failed |= run_attention(kernels, step, layer);
        failed |= add_product(kernels, step, &layer->output, &layer->after_attention, step->mixed, 0);
        failed |= run_feed_forward(kernels, step, layer);
        if (layer->input_gate.n)
            failed |= add_input(kernels, step, layer, step->inputs + (layer - layers) * step->rows * layer->input_gate.n);
    }
    return failed;
}
