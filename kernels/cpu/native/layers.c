/* Whole layers of a decoder: the kernels one after the other, without a way back to Python in between. */
#include <string.h>

#include "api.h"

#define HALF_POWER 0.70710678118654752f

/* The scale of what a layer leaves; 0: none. */
static float scale_of(const struct layer *layer) {
    if (!layer->scale)
        return 0;
    uint32_t bits = (uint32_t)*layer->scale << 16;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

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
    attention.groups = step->groups;
    attention.members = step->members;
    attention.sharing = step->sharing;
    attention.threads = step->threads;
    return kernels->attention(&attention);
}

/* residual += norm(x @ weight.T): in one go where there is no norm, whose output operation is to add; `scale` (or 0)
 * is of the sum. */
static int add_product(const struct kernels *kernels, const struct step *step, const struct product *product,
                       const struct norm *norm, const uint16_t *x, float scale) {
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
    float scale = layer->input_gate.n ? 0 : scale_of(layer);
    if (layer->experts)
        return quartet_experts(kernels, layer->experts, step->rows, step->residual, 0, scale, step->threads,
                               step->additions);
    int failed;
    if (layer->sparse) {
        struct gating gating = {.gate = step->wide, .out = step->inner, .rows = step->rows, .width = layer->down.k};
        gating.cutoff = layer->cutoff;
        gating.activation = layer->gate_up.activation;
        gating.threads = step->threads;
        failed = run_product(kernels, step, &layer->gate_up, step->residual, step->wide);
        kernels->gate_sparse(&gating);
        return failed | add_product(kernels, step, &layer->down, &layer->after_mlp, step->inner, scale);
    }
    struct product gate_up = layer->gate_up, down = layer->down;
    gate_up.rows = down.rows = step->rows;
    gate_up.out_tiles = down.x_tiles = kernels->takes_tiles(&gate_up) && kernels->takes_tiles(&down);
    failed = run_product(kernels, step, &gate_up, step->residual, step->inner);
    return failed | add_product(kernels, step, &down, &layer->after_mlp, step->inner, scale);
}

/* step->inner = activation(gate(residual)) * input, `input` being the layer's own. */
static int gate_input(const struct kernels *kernels, const struct step *step, const struct layer *layer,
                      const uint16_t *input) {
    struct gating gating = {.gate = step->inner, .factor = input, .out = step->inner, .rows = step->rows};
    gating.width = layer->input_gate.n;
    gating.activation = layer->input_gate.activation;
    gating.threads = step->threads;
    int failed = run_product(kernels, step, &layer->input_gate, step->residual, step->inner);
    kernels->gate_rows(&gating);
    return failed;
}

/* residual += attention. */
static int add_attention(const struct kernels *kernels, const struct step *step, const struct layer *layer) {
    int failed = run_product(kernels, step, &layer->qkv, step->residual, step->qkv);
    run_rotation(kernels, step, layer);
    failed |= run_attention(kernels, step, layer);
    return failed | add_product(kernels, step, &layer->output, &layer->after_attention, step->mixed, 0);
}

/* Keep some rows (ascending) of a matrix in front. */
static void keep_rows(uint16_t *matrix, int64_t width, const int64_t *rows, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        memmove(matrix + i * width, matrix + rows[i] * width, (size_t)width * 2);
}

/* The last layer, as far as it is wanted: keys and values of all rows, all else of those that somebody looks at. */
static int run_last_layer(const struct kernels *kernels, const struct step *step, const struct layer *layer) {
    int failed = run_product(kernels, step, &layer->qkv, step->residual, step->qkv);
    run_rotation(kernels, step, layer);
    if (failed || !step->wanted)
        return failed;
    struct step own = *step;
    own.rows = step->wanted;
    own.starts = step->wanted_starts;
    own.groups = 0;
    keep_rows(step->q, layer->output.k, step->wanted_rows, step->wanted);
    keep_rows(step->residual, layer->output.n, step->wanted_rows, step->wanted);
    failed = run_attention(kernels, &own, layer);
    failed |= add_product(kernels, &own, &layer->output, &layer->after_attention, step->mixed, 0);
    return failed | run_feed_forward(kernels, &own, layer);
}

static int run_layer(const struct kernels *kernels, const struct step *step, const struct layer *layer,
                     const uint16_t *input) {
    int failed = add_attention(kernels, step, layer) | run_feed_forward(kernels, step, layer);
    if (!layer->input_gate.n)
        return failed;
    failed |= gate_input(kernels, step, layer, input);
    return failed | add_product(kernels, step, &layer->input_projection, &layer->after_input, step->inner,
                                scale_of(layer));
}

/* step->said = what the router says of rows that are so far apart. */
static int ask_router(const struct kernels *kernels, const struct step *step, const struct streams *streams,
                      const uint16_t *x, int64_t stride) {
    struct product router = streams->router;
    router.x_stride = stride;
    return run_product(kernels, step, &router, x, (uint16_t *)step->said);
}

static struct rows rows_of(const struct step *step, const uint16_t *x, uint16_t *out, int64_t width,
                           struct norm norm) {
    return (struct rows){.x = x, .out = out, .rows = step->rows, .width = width, .norm = norm, .threads = step->threads};
}

/* residual = (residual + attention + beside) / sqrt(2), `beside` being x + norm(right(left(x))) of x = norm(residual). */
static int add_attention_and_beside(const struct kernels *kernels, const struct step *step, const struct layer *layer) {
    const struct streams *streams = layer->streams;
    int64_t width = layer->output.n;
    struct rows before = rows_of(step, step->residual, step->beside, width, streams->before);
    kernels->norm(&before);
    int failed = run_product(kernels, step, &streams->left, step->beside, step->inner);
    failed |= run_product(kernels, step, &streams->right, step->inner, step->branch);
    struct rows after = rows_of(step, step->branch, step->beside, width, streams->after);
    kernels->add_normed(&after);
    failed |= add_attention(kernels, step, layer);
    struct rows both = rows_of(step, step->beside, step->residual, width, (struct norm){0});
    both.scale = HALF_POWER;
    kernels->add_normed(&both);
    return failed;
}

/* A layer that reads one of several streams, predicts all of them before and corrects them behind. */
static int run_among_streams(const struct kernels *kernels, const struct step *step, const struct layer *layer,
                             const uint16_t *input) {
    const struct streams *streams = layer->streams;
    int64_t width = layer->output.n, count = streams->count;
    struct mixing mixing = {.rows = step->rows, .count = count, .active = streams->active, .width = width};
    mixing.said = step->said;
    mixing.weights = streams->predictions;
    mixing.stack = step->stack;
    mixing.predicted = step->predicted;
    mixing.own = step->residual;
    mixing.scale = streams->scale;
    mixing.threads = step->threads;
    int failed = ask_router(kernels, step, streams, step->stack + streams->active * width, count * width);
    kernels->predict(&mixing);
    failed |= add_attention_and_beside(kernels, step, layer) | run_feed_forward(kernels, step, layer);
    failed |= ask_router(kernels, step, streams, step->residual, width);
    mixing.weights = streams->corrections;
    kernels->correct(&mixing);
    failed |= gate_input(kernels, step, layer, input);
    failed |= run_product(kernels, step, &layer->input_projection, step->inner, step->branch);
    struct rows added = rows_of(step, step->branch, step->residual, width, layer->after_input);
    kernels->norm(&added);
    kernels->spread(&mixing);
    return failed;
}

static int run_layers(const struct kernels *kernels, const struct layer *layers, int64_t count, const struct step *step) {
    int failed = 0;
    for (const struct layer *layer = layers; step->rows && layer < layers + count && !failed; layer++) {
        if (step->wanted_starts && layer + 1 == layers + count)
            return run_last_layer(kernels, step, layer);
        const uint16_t *input = step->inputs + (layer - layers) * step->rows * layer->input_gate.n;
        failed |= (layer->streams ? run_among_streams : run_layer)(kernels, step, layer, input);
    }
    return failed;
}

/* The residual stream through `count` layers and the final norm; 0, or -1 where there is no memory. */
int quartet_layers(const struct kernels *kernels, const struct layer *layers, int64_t count, const struct step *step) {
    int failed = run_layers(kernels, layers, count, step);
    if (failed || !step->final.weight)
        return failed;
    struct rows rows = rows_of(step, step->residual, step->residual, layers->output.n, step->final);
    if (step->wanted_starts)
        rows.rows = step->wanted;
    kernels->norm(&rows);
    return 0;
}
