/* All kernels, compiled for avx2. */
#pragma GCC target("avx2,fma,f16c")

#include "attention_vectors.h"
#include "all.h"

const struct kernels quartet_avx2 = ALL_KERNELS(attention);
