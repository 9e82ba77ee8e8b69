/* All kernels, compiled for avx512_bf16. */
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,prfchw")

#include "attention_vectors.h"
#include "all.h"

const struct kernels quartet_avx512_bf16 = ALL_KERNELS(attention);
