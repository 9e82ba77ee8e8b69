/* The entry points that Python calls, and the choice of an instruction set. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "api.h"
#include "pool.h"

#define SLOTS 10
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

static int has_amx(void) {
    unsigned a = 7, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    int there = (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1); /* AMX-BF16, AMX-TILE, AMX-INT8 */
    there = there && __builtin_cpu_supports("avx512vbmi");
    return there && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static int has_avx512_vnni(void) { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

static int has_avx512_bf16(void) { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

/* The kernels for this instruction set; null where the machine or this library does not have it. */
const struct kernels *quartet_kernels(const char *name) {
    __builtin_cpu_init();
    const struct {
        const char *name;
        int there;
        const struct kernels *kernels;
    } table[] = {
        {"avx2", has_avx2(), &quartet_avx2},
        {"avx512", has_avx512(), &quartet_avx512},
        {"avx512_vnni", has_avx512_vnni(), &quartet_avx512_vnni},
        {"avx512_bf16", has_avx512_bf16(), &quartet_avx512_bf16},
        {"amx", has_avx512_bf16() && has_amx(), &quartet_amx},
    };
    for (unsigned i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(name, table[i].name) && table[i].there)
            return table[i].kernels;
    return 0;
}

void *quartet_scratch(int slot, int64_t bytes) {
    static __thread struct {
        void *memory;
        int64_t bytes;
    } slots[SLOTS];
    if (slots[slot].bytes < bytes) {
        free(slots[slot].memory);
        int64_t size = (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
        slots[slot].memory = aligned_alloc(CACHE_LINE, (size_t)size);
        slots[slot].bytes = slots[slot].memory ? size : 0;
    }
    return slots[slot].memory;
}

/* 0, or -1 where there is no memory. */
int quartet_product(const struct kernels *kernels, const struct product *p) {
    return p->rows ? kernels->product(p) : 0;
}

/* 0, or -1 where there is no memory. */
int quartet_add_float(const struct kernels *kernels, const struct adding *a) {
    return a->rows ? kernels->add_float(a) : 0;
}

void quartet_rotate(const struct kernels *kernels, const struct rotation *r) { kernels->rotate(r); }

void quartet_norm(const struct kernels *kernels, const struct rows *rows) { kernels->norm(rows); }

void quartet_add_normed(const struct kernels *kernels, const struct rows *rows) { kernels->add_normed(rows); }

void quartet_gate_rows(const struct kernels *kernels, const struct gating *g) { kernels->gate_rows(g); }

int quartet_has_attention(const struct kernels *kernels) { return kernels->attention != 0; }

/* 0, or -1 where there is no memory. */
int quartet_attention(const struct kernels *kernels, const struct attention *a) { return kernels->attention(a); }

void quartet_convolve(const struct kernels *kernels, const struct convolution *c) { kernels->convolve(c); }

void quartet_recur(const struct kernels *kernels, const struct recurrence *r) { kernels->recur(r); }

struct packing {
    const uint16_t *weight;
    int64_t n, k, stride;
    uint16_t *out;
    atomic_long next;
};

static void pack_blocks(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    struct packing *p = argument;
    int64_t depth = (p->k + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH;
    int64_t block;
    while ((block = quartet_next(&p->next)) * TILE_COLUMNS < p->n) {
        uint32_t *lines = (uint32_t *)(p->out + block * depth * TILE_COLUMNS);
        for (int64_t column = 0; column < TILE_COLUMNS; column++) {
            int64_t row = block * TILE_COLUMNS + column, there = row < p->n ? p->k : 0;
            const uint16_t *from = p->weight + row * p->stride;
            for (int64_t k = 0; k < depth; k += 2) {
                uint32_t low = k < there ? from[k] : 0, high = k + 1 < there ? from[k + 1] : 0;
                lines[k / 2 * TILE_COLUMNS + column] = low | high << 16;
            }
        }
    }
}

/* weight (n, k), rows `stride` apart → (ceil(n / 16), ceil(k / 32) * 16, 16, 2), padded with zeros. */
void quartet_pack(const uint16_t *weight, int64_t n, int64_t k, int64_t stride, uint16_t *out, int32_t threads) {
    struct packing packing = {.weight = weight, .n = n, .k = k, .stride = stride, .out = out};
    quartet_run(pack_blocks, &packing, threads);
}
