/* Mixtures of experts: each expert computes the rows that have chosen it, so it reads its weights once.
 *
 * A row's experts are added up in float32 in the order of their numbers, so its bits do not depend on other rows.
 */
#include <math.h>
#include <string.h>

#include "api.h"
#include "pool.h"

/* What the rows of a call need in between, all in one piece of scratch memory. */
struct room {
    uint16_t *normed;     /* (rows, hidden) */
    float *logits;        /* (rows, count) */
    float *sums;          /* (rows, hidden) */
    int64_t *chosen;      /* (rows, top_k): experts, best first */
    float *shares;        /* as `chosen`: their weights */
    int64_t *starts;      /* (count + 1,): where an expert's rows begin in what follows */
    int64_t *places;      /* (rows * top_k,): the rows by expert */
    float *weights;       /* as `places` */
    int32_t *owners;      /* of one expert's rows: their adapters */
    uint16_t *own, *inner, *out; /* of one expert, as many rows as there are: (rows, hidden), (rows, widest), (rows, hidden) */
};

static void *take(char **at, int64_t bytes) {
    char *here = *at;
    *at += (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    return here;
}

/* The parts of `memory`; returns how many bytes they take, also where it is null. */
static int64_t divide(const struct experts *e, int64_t rows, char *memory, struct room *room) {
    char *at = memory;
    int64_t all = rows * e->top_k, widest = e->size > e->shared_size ? e->size : e->shared_size;
    room->normed = take(&at, rows * e->hidden * 2);
    room->logits = take(&at, rows * e->count * 4);
    room->sums = take(&at, rows * e->hidden * 4);
    room->chosen = take(&at, all * 8);
    room->shares = take(&at, all * 4);
    room->starts = take(&at, (e->count + 1) * 8);
    room->places = take(&at, all * 8);
    room->weights = take(&at, all * 4);
    room->owners = take(&at, rows * 4);
    room->own = take(&at, rows * e->hidden * 2);
    room->inner = take(&at, rows * widest * 2);
    room->out = take(&at, rows * e->hidden * 2);
    return at - memory;
}

static int run(const struct kernels *kernels, const struct product *of, int64_t rows, const void *x, void *out,
               int32_t threads, const struct additions *additions) {
    struct product product = *of;
    product.x = x;
    product.out = out;
    product.rows = rows;
    product.threads = threads;
    product.additions = additions;
    return kernels->product(&product);
}

static float number_of(uint16_t bf16) {
    uint32_t bits = (uint32_t)bf16 << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* The `top_k` largest of a row's shares of all experts, of equal ones the first. */
static void choose(const struct experts *e, float *logits, int64_t *chosen, float *shares) {
    for (int64_t i = 0; e->router_scale != 0 && i < e->count; i++)
        logits[i] *= e->router_scale;
    float most = logits[0], total = 0, kept = 0;
    for (int64_t i = 1; i < e->count; i++)
        most = logits[i] > most ? logits[i] : most;
    for (int64_t i = 0; i < e->count; i++)
        total += logits[i] = expf(logits[i] - most);
    for (int64_t place = 0; place < e->top_k; place++) {
        int64_t best = -1;
        for (int64_t i = 0; i < e->count; i++) {
            int taken = 0;
            for (int64_t before = 0; before < place; before++)
                taken |= chosen[before] == i;
            if (!taken && (best < 0 || logits[i] > logits[best]))
                best = i;
        }
        chosen[place] = best;
        shares[place] = logits[best] / total;
        kept += shares[place];
    }
    for (int64_t place = 0; e->renormalize && place < e->top_k; place++)
        shares[place] /= kept;
    for (int64_t place = 0; e->expert_scale && place < e->top_k; place++)
        shares[place] *= number_of(e->expert_scale[chosen[place]]);
}

struct choosing {
    const struct experts *e;
    const struct room *room;
    int64_t rows;
};

static void choose_some(void *argument, int thread, int threads) {
    const struct choosing *c = argument;
    int64_t top_k = c->e->top_k;
    for (int64_t row = c->rows * thread / threads; row < c->rows * (thread + 1) / threads; row++)
        choose(c->e, c->room->logits + row * c->e->count, c->room->chosen + row * top_k, c->room->shares + row * top_k);
}

/* Put the rows in the order of the experts that they chose. */
static void group(const struct experts *e, int64_t rows, const struct room *room) {
    int64_t all = rows * e->top_k, *starts = room->starts;
    memset(starts, 0, (size_t)(e->count + 1) * 8);
    for (int64_t i = 0; i < all; i++)
        starts[room->chosen[i] + 1]++;
    for (int64_t expert = 0; expert < e->count; expert++)
        starts[expert + 1] += starts[expert];
    for (int64_t i = 0; i < all; i++) { /* counts the starts up to the ends */
        int64_t place = starts[room->chosen[i]]++;
        room->places[place] = i / e->top_k;
        room->weights[place] = room->shares[i];
    }
    memmove(starts + 1, starts, (size_t)e->count * 8);
    starts[0] = 0;
}

/* One expert's block of some rows, weighted, to the sums. */
static int add_block(const struct kernels *kernels, const struct experts *e, const struct product *gate_up,
                     const struct product *down, const uint16_t *x, struct weighted *to, const struct room *room,
                     const struct additions *additions) {
    int failed = run(kernels, gate_up, to->rows, x, room->inner, to->threads, additions);
    failed |= run(kernels, down, to->rows, room->inner, room->out, to->threads, additions);
    to->x = room->out;
    to->sums = room->sums;
    to->width = e->hidden;
    kernels->add_weighted(to);
    return failed;
}

static int add_chosen(const struct kernels *kernels, const struct experts *e, const struct room *room, int32_t threads,
                      const struct additions *additions) {
    int failed = 0;
    struct additions own;
    if (additions) {
        own = *additions;
        own.owners = room->owners;
    }
    for (int64_t expert = 0; expert < e->count && !failed; expert++) {
        int64_t first = room->starts[expert], rows = room->starts[expert + 1] - first;
        if (!rows)
            continue;
        for (int64_t row = 0; row < rows; row++)
            memcpy(room->own + row * e->hidden, room->normed + room->places[first + row] * e->hidden,
                   (size_t)e->hidden * 2);
        for (int64_t row = 0; additions && row < rows; row++)
            room->owners[row] = additions->owners[room->places[first + row]];
        struct weighted to = {.weights = room->weights + first, .places = room->places + first, .rows = rows};
        to.threads = threads;
        failed = add_block(kernels, e, e->gate_up + expert, e->down + expert, room->own, &to, room,
                           additions ? &own : 0);
    }
    return failed;
}

/* The expert that every row passes. */
static int add_shared(const struct kernels *kernels, const struct experts *e, int64_t rows, const struct room *room,
                      int32_t threads, const struct additions *additions) {
    float *weights = room->logits; /* which nobody needs any more */
    int failed = run(kernels, &e->shared_gate, rows, room->normed, weights, threads, additions);
    for (int64_t row = 0; row < rows; row++)
        weights[row] = 1.0f / (1.0f + expf(-weights[row]));
    struct weighted to = {.weights = weights, .rows = rows, .threads = threads};
    return failed | add_block(kernels, e, &e->shared_gate_up, &e->shared_down, room->normed, &to, room, additions);
}

static struct rows rows_of(const struct experts *e, int64_t rows, const uint16_t *x, uint16_t *out, struct norm norm,
                           int32_t threads) {
    return (struct rows){.x = x, .out = out, .rows = rows, .width = e->hidden, .norm = norm, .threads = threads};
}

/* room->own = norm(the chosen experts' sum) + norm(the shared expert of norm(residual)). */
static int join_normed(const struct kernels *kernels, const struct experts *e, int64_t rows, const uint16_t *residual,
                       const struct room *room, int32_t threads, const struct additions *additions) {
    struct rows chosen = rows_of(e, rows, 0, room->own, e->after_chosen, threads);
    chosen.sums = room->sums;
    kernels->norm(&chosen);
    struct rows in = rows_of(e, rows, residual, room->normed, e->shared_before, threads);
    kernels->norm(&in);
    int failed = run(kernels, &e->shared_gate_up, rows, room->normed, room->inner, threads, additions);
    failed |= run(kernels, &e->shared_down, rows, room->inner, room->out, threads, additions);
    struct rows shared = rows_of(e, rows, room->out, room->own, e->shared_after, threads);
    kernels->add_normed(&shared);
    return failed;
}

int quartet_experts(const struct kernels *kernels, const struct experts *e, int64_t rows, uint16_t *residual,
                    int64_t *ids, float scale, int32_t threads, const struct additions *additions) {
    struct room room;
    char *memory = quartet_scratch(5, divide(e, rows, 0, &room));
    if (!memory)
        return -1;
    divide(e, rows, memory, &room);
    struct rows in = rows_of(e, rows, residual, room.normed, e->before, threads);
    kernels->norm(&in);
    struct rows asked = rows_of(e, rows, residual, room.own, e->router_norm, threads);
    if (e->router_norm.weight)
        kernels->norm(&asked);
    const uint16_t *reads = e->router_norm.weight ? room.own : room.normed;
    int failed = run(kernels, &e->router, rows, reads, room.logits, threads, additions);
    struct choosing choosing = {.e = e, .room = &room, .rows = rows};
    quartet_run(choose_some, &choosing, rows * e->count <= 1024 ? 1 : threads);
    if (ids)
        memcpy(ids, room.chosen, (size_t)(rows * e->top_k) * 8);
    group(e, rows, &room);
    memset(room.sums, 0, (size_t)(rows * e->hidden) * 4);
    failed |= add_chosen(kernels, e, &room, threads, additions);
    struct rows out = rows_of(e, rows, room.own, residual, e->after, threads);
    if (e->after_chosen.weight)
        failed |= join_normed(kernels, e, rows, residual, &room, threads, additions);
    else {
        out.sums = room.sums;
        if (e->has_shared)
            failed |= add_shared(kernels, e, rows, &room, threads, additions);
    }
    out.scale = scale;
    kernels->add_normed(&out);
    return failed;
}
