/* Entry points for draws, and the random numbers behind them. */
#include "api.h"

/* Uniform in (0, 1), from 32 bits: Philox4x32-10 with a seed as key and a position as counter, see reference/philox.py. */
double quartet_uniform(int64_t seed, int64_t position) {
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)((uint64_t)seed >> 32)};
    uint32_t even[2] = {0, 0}, odd[2] = {(uint32_t)position, 0};
    for (int round = 0; round < 10; round++) {
        uint64_t first = (uint64_t)even[0] * 0xD2511F53u, second = (uint64_t)even[1] * 0xCD9E8D57u;
        even[0] = (uint32_t)(second >> 32) ^ odd[0] ^ key[0];
        even[1] = (uint32_t)(first >> 32) ^ odd[1] ^ key[1];
        odd[0] = (uint32_t)second;
        odd[1] = (uint32_t)first;
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return ((double)even[0] + 0.5) / 4294967296.0;
}

/* 0, or -1 where there is no memory. */
int quartet_draw(const struct kernels *kernels, struct drawing *d) { return kernels->draw(d); }

/* log(sum(exp(row))) by row; NaN where its largest is not finite. */
void quartet_log_of_sums(const struct kernels *kernels, struct summing *s) { kernels->log_of_sums(s); }
