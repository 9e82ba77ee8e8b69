/* A pool of threads for operations that take 20 to 1,000 microseconds and follow one another closely.
 *
 * A worker looks for the next operation for some microseconds before it sleeps: waking it takes longer than many an
 * operation. Between the steps of a server it sleeps. Threads that another caller has taken are not waited for: an
 * operation then runs on its caller alone.
 *
 * Workers stay off the caller's CPU. A kernel may wake a thread where its waker runs, and leave it there for
 * milliseconds: short work is then done one part after the other while a CPU idles. Virtual machines whose kernels pack
 * short work on few CPUs halve the speed so.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <x86intrin.h>

#include "pool.h"

#define LOOK_CYCLES 150000 /* about 50 microseconds */
#define SPINS_BEFORE_YIELD 2000

static struct {
    pthread_mutex_t owner;
    int workers;
    pthread_t ids[MOST_THREADS];
    int cpus[MOST_THREADS]; /* the CPU that is a worker's own, or -1 */
    int placed;  /* so many workers have been told which CPUs are theirs, */
    int avoided; /* and that this is the caller's */
    _Alignas(CACHE_LINE) task run; /* what the caller writes and the workers look at: one cache line */
    void *argument;
    int threads;
    atomic_int generation; /* of the running operation */
    _Alignas(CACHE_LINE) atomic_uint finished; /* operations that workers have seen through: they write it, the caller reads it */
    atomic_int sleeping;
    _Alignas(CACHE_LINE) atomic_int arrived;
    atomic_int barriers;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .avoided = -1};

static void wait_for_next(int seen) {
    unsigned long long begin = __rdtsc();
    while (atomic_load_explicit(&pool.generation, memory_order_acquire) == seen) {
        if (__rdtsc() - begin < LOOK_CYCLES) {
            _mm_pause();
            continue;
        }
        atomic_fetch_add(&pool.sleeping, 1);
        syscall(SYS_futex, &pool.generation, FUTEX_WAIT_PRIVATE, seen, 0, 0, 0);
        atomic_fetch_sub(&pool.sleeping, 1);
    }
}

/* `start`: the number of the worker in the lowest byte, above it the generation that it was hired in. */
static void *work(void *start) {
    int thread = (int)((long)start & 0xFF), seen = (int)((long)start >> 8);
    for (;;) {
        wait_for_next(seen);
        seen = atomic_load(&pool.generation);
        if (thread < pool.threads)
            pool.run(pool.argument, thread, pool.threads);
        atomic_fetch_add_explicit(&pool.finished, 1, memory_order_release);
    }
    return 0;
}

/* In a child process there are no workers. */
static void forget_workers(void) {
    pool.workers = pool.placed = 0;
    atomic_store(&pool.sleeping, 0);
    atomic_store(&pool.arrived, 0);
    pthread_mutex_init(&pool.owner, 0);
}

static void hire(int workers) {
    static int prepared;
    if (!prepared)
        prepared = !pthread_atfork(0, 0, forget_workers);
    while (pool.workers < workers) {
        pthread_t *thread = &pool.ids[pool.workers];
        long start = (long)atomic_load(&pool.generation) << 8 | (pool.workers + 1);
        if (pthread_create(thread, 0, work, (void *)start))
            return;
        pthread_detach(*thread);
        pool.cpus[pool.workers] = -1;
        pool.workers++;
    }
}

/* The number of the first CPU of a set, which is taken out. */
static int take_cpu(cpu_set_t *cpus) {
    int cpu = 0;
    while (!CPU_ISSET(cpu, cpus))
        cpu++;
    CPU_CLR(cpu, cpus);
    return cpu;
}

/* Keep the workers off a CPU, which the caller runs on. Where there are as many threads as CPUs each gets its own. */
static void place_workers(int avoided) {
    pool.placed = pool.workers;
    pool.avoided = avoided;
    cpu_set_t others; /* than the caller's, of those that it may use */
    if (avoided < 0 || avoided >= CPU_SETSIZE || sched_getaffinity(0, sizeof others, &others))
        return; /* the kernel knows more CPUs than a set has room for, or does not tell */
    CPU_CLR(avoided, &others);
    if (!CPU_COUNT(&others))
        pool.placed = 0; /* look again the next time */
    int own = CPU_COUNT(&others) == pool.workers;
    for (int worker = 0; worker < pool.workers; worker++) {
        int cpu = own ? pool.cpus[worker] : -1;
        if (cpu >= 0 && CPU_ISSET(cpu, &others))
            CPU_CLR(cpu, &others); /* it stays */
        else
            pool.cpus[worker] = -1;
    }
    for (int worker = 0; worker < pool.workers && CPU_COUNT(&others); worker++) {
        if (pool.cpus[worker] >= 0)
            continue;
        cpu_set_t cpus = others;
        if (own) {
            pool.cpus[worker] = take_cpu(&others);
            CPU_ZERO(&cpus);
            CPU_SET(pool.cpus[worker], &cpus);
        }
        pthread_setaffinity_np(pool.ids[worker], sizeof cpus, &cpus);
    }
}

static inline void pause_a_little(int *spins) {
    if (++*spins % SPINS_BEFORE_YIELD)
        _mm_pause();
    else
        sched_yield();
}

void quartet_barrier(int threads) {
    if (threads == 1)
        return;
    int barrier = atomic_load(&pool.barriers), spins = 0;
    if (atomic_fetch_add(&pool.arrived, 1) == threads - 1) {
        atomic_store(&pool.arrived, 0);
        atomic_fetch_add(&pool.barriers, 1);
        return;
    }
    while (atomic_load_explicit(&pool.barriers, memory_order_acquire) == barrier)
        pause_a_little(&spins);
}

void quartet_run(task run, void *argument, int threads) {
    threads = threads < MOST_THREADS ? threads : MOST_THREADS;
    if (threads <= 1 || pthread_mutex_trylock(&pool.owner)) {
        run(argument, 0, 1);
        return;
    }
    hire(threads - 1);
    int cpu = sched_getcpu();
    if (cpu != pool.avoided || pool.placed != pool.workers)
        place_workers(cpu);
    pool.run = run;
    pool.argument = argument;
    pool.threads = threads = threads <= pool.workers ? threads : pool.workers + 1;
    unsigned finished = atomic_load_explicit(&pool.finished, memory_order_relaxed) + (unsigned)pool.workers;
    atomic_fetch_add(&pool.generation, 1);
    if (atomic_load(&pool.sleeping))
        syscall(SYS_futex, &pool.generation, FUTEX_WAKE_PRIVATE, MOST_THREADS, 0, 0, 0);
    run(argument, 0, threads);
    int spins = 0;
    while (atomic_load_explicit(&pool.finished, memory_order_acquire) != finished)
        pause_a_little(&spins);
    pthread_mutex_unlock(&pool.owner);
}
