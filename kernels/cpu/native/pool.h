/* Threads that share one operation: the caller and workers that wait for the next one. */
#pragma once

#include <stdatomic.h>

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
