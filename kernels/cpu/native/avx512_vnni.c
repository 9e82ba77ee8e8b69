/* All kernels, compiled for avx512_vnni. */
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "attention_vectors.h"
#include "all.h"

const struct kernels quartet_avx512_vnni = ALL_KERNELS(attention);
