/* Threads that share one operation: the caller and workers that wait for the next one. */
#pragma once

#include <stdatomic.h>

#include "api.h"

#define MOST_THREADS 64

typedef void (*task)(void *argument, int thread, int threads);

/* Run a task on at most `threads` threads, of which the caller is number 0; returns when all are done. */
void quartet_run(task run, void *argument, int threads);

/* All threads of the running task wait here for one another. */
void quartet_barrier(int threads);

/* The next number of a counter that the threads of a task share. */
static inline long quartet_next(atomic_long *counter) {
    return atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

/* Numbers that the threads of a task divide among them: thread i has i, i + threads and so on, so that all read memory close to one
 * another. Each takes those of its own share, and then what is left of others': until then no core waits for a cache line of another
 * one. */
struct shares {
    int count;
    struct {
        atomic_long next;
        long end;
    } __attribute__((aligned(CACHE_LINE))) of[MOST_THREADS];
};

/* The numbers from 0 to before `numbers`. */
static inline void quartet_share(struct shares *shares, long numbers, int threads) {
    shares->count = threads < MOST_THREADS ? threads : MOST_THREADS;
    for (int i = 0; i < shares->count; i++) {
        atomic_init(&shares->of[i].next, 0);
        shares->of[i].end = (numbers - i + shares->count - 1) / shares->count;
    }
}

/* The next number for a thread, or -1. */
static inline long quartet_take(struct shares *shares, int thread) {
    for (int i = 0; i < shares->count; i++) {
        int from = thread + i < shares->count ? thread + i : thread + i - shares->count;
        if (atomic_load_explicit(&shares->of[from].next, memory_order_relaxed) >= shares->of[from].end)
            continue;
        long number = quartet_next(&shares->of[from].next);
        if (number < shares->of[from].end)
            return number * shares->count + from;
    }
    return -1;
}
