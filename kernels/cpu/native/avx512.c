/* All kernels, compiled for avx512. */
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

#include "attention_vectors.h"
#include "all.h"

const struct kernels quartet_avx512 = ALL_KERNELS(attention);
